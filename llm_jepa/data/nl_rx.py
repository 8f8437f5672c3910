from .._moved import names_of

__getattr__ = names_of("llm_jepa.data.nl_rx", "llm_jepa.synthetic.nl_rx")

if __name__ == "__main__":
    raise SystemExit(__getattr__("main")())
