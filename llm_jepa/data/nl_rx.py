import sys

from .._moved import names_of

__getattr__ = names_of("llm_jepa.data.nl_rx", "llm_jepa.synthetic.nl_rx")

if __name__ == "__main__":  # Python hides a DeprecationWarning of a module that runs as a command
    print("llm_jepa.data.nl_rx has moved; run python -m llm_jepa.synthetic.nl_rx.", file=sys.stderr)
    raise SystemExit(__getattr__("main")())
