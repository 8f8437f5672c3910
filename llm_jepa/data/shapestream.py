from .._moved import names_of

HOMES = ("", ".texts", ".scenes", ".events", ".pictures", ".questions", ".samples", ".__main__")
__getattr__ = names_of("llm_jepa.data.shapestream", *(f"llm_jepa.synthetic.shapestream{part}" for part in HOMES))

if __name__ == "__main__":
    raise SystemExit(__getattr__("main")())
