from .._moved import names_of

__getattr__ = names_of(__name__, "llm_jepa.vl.arguments", "llm_jepa.vl.keys")
