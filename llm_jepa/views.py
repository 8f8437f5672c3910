from ._moved import names_of

__getattr__ = names_of(
    __name__,
    "llm_jepa.lm.rows",
    "llm_jepa.lm.views",
    "llm_jepa.lm.prompts",
    Example="ParsedRow",
    as_example="parse_row",
)
