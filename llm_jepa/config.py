from ._moved import names_of

__getattr__ = names_of(__name__, "llm_jepa.lm.arguments", "llm_jepa.lm.keys")
