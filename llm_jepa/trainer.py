from ._moved import names_of

__getattr__ = names_of(__name__, "llm_jepa.lm.trainer", "llm_jepa.core.trainer")
