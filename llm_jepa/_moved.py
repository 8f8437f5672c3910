"""Old import paths and names, until version 0.3: those that users could have typed still work, with a warning.

Other modules have moved too. Importing one of them by its old path fails with a line that says where it is.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import Any

GONE = {
    "llm_jepa.checkpoint": "llm_jepa.core.checkpoint",
    "llm_jepa.comparison": "llm_jepa.core.pairs",
    "llm_jepa.diagnostics": "llm_jepa.core.diagnostics",
    "llm_jepa.distributed": "llm_jepa.core.distributed",
    "llm_jepa.dry_run": "llm_jepa.lm.dry_run",
    "llm_jepa.errors": "llm_jepa.core.errors",
    "llm_jepa.from_scratch": "llm_jepa.lm.from_scratch",
    "llm_jepa.generation": "llm_jepa.lm.inference",
    "llm_jepa.loading": "llm_jepa.lm.loading and llm_jepa.core.sources",
    "llm_jepa.model_card": "llm_jepa.lm.card",
    "llm_jepa.objective": "llm_jepa.lm.objective",
    "llm_jepa.predictor_tokens": "llm_jepa.lm.predictor_tokens",
    "llm_jepa.probe": "llm_jepa.lm.probe",
    "llm_jepa.recipe": "llm_jepa.core.recipe",
    "llm_jepa.rows": "llm_jepa.lm.data",
    "llm_jepa.safe_trainer": "llm_jepa.core.trainer",
    "llm_jepa.semantic_tube": "llm_jepa.lm.tubes",
    "llm_jepa.target_encoder": "llm_jepa.core.averaging and llm_jepa.lm.targets",
    "llm_jepa.vl.model_card": "llm_jepa.vl.card",
}


def names_of(old: str, *homes: str, **renamed: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds names in `homes`, the modules that `old` became.

    renamed: old name -> new name. Warns (DeprecationWarning) which module and which name to write instead.

    Raises AttributeError for a name that is in none of them.
    """
    places = " or ".join(homes)
    warnings.warn(
        f"{old} has moved; import from {places}. The old path goes with version 0.3.",
        DeprecationWarning,
        stacklevel=3,
    )

    def find(name: str) -> Any:
        if name.startswith("__"):  # asked by the import system; a home that is a package would answer
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        new = renamed.get(name, name)
        for home in homes:
            module = import_module(home)
            if hasattr(module, new):
                if new != name:
                    warnings.warn(f"{old}.{name} is now {home}.{new}.", DeprecationWarning, stacklevel=2)
                return getattr(module, new)
        raise AttributeError(f"module {old!r} has no attribute {name!r}; look in {places}")

    return find


class _OldPaths(MetaPathFinder):
    """Asked last, after every finder of Python has failed to find a module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name in GONE:
            raise ModuleNotFoundError(f"{name} has moved; import from {GONE[name]}.", name=name)


def explain_old_paths() -> None:
    """Let an import of a module that has moved say where it is."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())
