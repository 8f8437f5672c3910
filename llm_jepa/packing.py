from ._moved import names_of

__getattr__ = names_of(
    __name__, "llm_jepa.lm.batching", "llm_jepa.lm.attention", "llm_jepa.lm.reading", "llm_jepa.core.diagnostics",
    Example="PackedExample", read="gather_states",
)  # fmt: skip
