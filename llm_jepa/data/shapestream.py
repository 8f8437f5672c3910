import sys

from .._moved import names_of

HOMES = ("", ".texts", ".scenes", ".events", ".pictures", ".questions", ".samples", ".__main__")
__getattr__ = names_of("llm_jepa.data.shapestream", *(f"llm_jepa.synthetic.shapestream{part}" for part in HOMES))

if __name__ == "__main__":  # Python hides a DeprecationWarning of a module that runs as a command
    print("llm_jepa.data.shapestream has moved; run python -m llm_jepa.synthetic.shapestream.", file=sys.stderr)
    raise SystemExit(__getattr__("main")())
