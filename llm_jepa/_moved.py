"""Old import paths, for one version: a module that has moved warns once and hands out the names of its new homes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def names_of(old: str, *homes: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds names in `homes`, the modules that `old` became.

    Warns (DeprecationWarning) which module to import instead. Raises AttributeError for a name that is nowhere.
    """
    warnings.warn(
        f"{old} has moved; import from {' or '.join(homes)}. The old path goes with version 0.3.",
        DeprecationWarning,
        stacklevel=3,
    )

    def find(name: str) -> Any:
        for home in homes:
            module = import_module(home)
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}; look in {' or '.join(homes)}")

    return find
