"""JEPA training in the Hugging Face ecosystem. Each family of models is a package: `llm_jepa.lm`, `llm_jepa.vl`.

    from llm_jepa import LLMJEPAConfig, LLMJEPATrainer
    from llm_jepa.vl import VLJEPA

Names are imported when first used: `import llm_jepa` loads neither torch nor trl. It is enough for `AutoModel`,
`AutoProcessor` and `pipeline("vl-jepa")` of transformers to know a VL-JEPA.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from ._lazy import names_from
from ._moved import explain_old_paths

if TYPE_CHECKING:
    from . import lm, vl
    from .core.diagnostics import effective_rank, space_diagnostics
    from .core.errors import UserError
    from .core.losses import info_nce, jepa_distance
    from .core.pairs import compare_pairs
    from .families import parse_recipe
    from .lm.arguments import LLMJEPAConfig
    from .lm.inference import generate
    from .lm.trainer import LLMJEPATrainer
    from .shipped import checkpoint

_HOMES = {
    "LLMJEPAConfig": ".lm.arguments",
    "LLMJEPATrainer": ".lm.trainer",
    "UserError": ".core.errors",
    "checkpoint": ".shipped",
    "compare_pairs": ".core.pairs",
    "effective_rank": ".core.diagnostics",
    "generate": ".lm.inference",
    "info_nce": ".core.losses",
    "jepa_distance": ".core.losses",
    "parse_recipe": ".families",
    "space_diagnostics": ".core.diagnostics",
}
__all__ = [
    "LLMJEPAConfig",
    "LLMJEPATrainer",
    "UserError",
    "checkpoint",
    "compare_pairs",
    "effective_rank",
    "generate",
    "info_nce",
    "jepa_distance",
    "lm",
    "parse_recipe",
    "space_diagnostics",
    "vl",
]
__getattr__ = names_from(__name__, _HOMES, packages=("lm", "vl"))
explain_old_paths()
# PEFT imports bitsandbytes, if it is there, which then says on a CPU that a package for faster kernels is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import_module(f"{__name__}.vl")  # makes the names of a VL-JEPA known to transformers, and loads nothing
