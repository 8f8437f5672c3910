from .._moved import names_of

__getattr__ = names_of(__name__, "llm_jepa.stream.opening", "llm_jepa.stream.clips", "llm_jepa.stream.frames")
