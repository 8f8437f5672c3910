"""Fine-tune language models with an embedding-space JEPA loss beside the causal-LM loss.

    from llm_jepa import LLMJEPAConfig, LLMJEPATrainer

Names are imported when first used: `import llm_jepa` loads neither torch nor trl.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.errors import UserError
    from .core.losses import info_nce, jepa_distance
    from .lm.arguments import LLMJEPAConfig
    from .lm.inference import generate
    from .lm.trainer import LLMJEPATrainer

_HOMES = {
    "LLMJEPAConfig": ".lm.arguments",
    "LLMJEPATrainer": ".lm.trainer",
    "UserError": ".core.errors",
    "generate": ".lm.inference",
    "info_nce": ".core.losses",
    "jepa_distance": ".core.losses",
}
__all__ = ["LLMJEPAConfig", "LLMJEPATrainer", "UserError", "generate", "info_nce", "jepa_distance"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
