from .._moved import names_of

__getattr__ = names_of(
    "llm_jepa.data.shapestream", "llm_jepa.synthetic.shapestream", "llm_jepa.synthetic.shapestream.__main__"
)

if __name__ == "__main__":
    raise SystemExit(__getattr__("main")())
