"""Fine-tune language models with an embedding-space JEPA loss beside the causal-LM loss.

    from llm_jepa import LLMJEPAConfig, LLMJEPATrainer

Names are imported when first used: `import llm_jepa` loads neither torch nor trl.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LLMJEPAConfig
    from .errors import UserError
    from .generation import generate
    from .losses import info_nce, jepa_distance
    from .trainer import LLMJEPATrainer

_HOMES = {
    "LLMJEPAConfig": "config",
    "LLMJEPATrainer": "trainer",
    "UserError": "errors",
    "generate": "generation",
    "info_nce": "losses",
    "jepa_distance": "losses",
}
__all__ = ["LLMJEPAConfig", "LLMJEPATrainer", "UserError", "generate", "info_nce", "jepa_distance"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
