"""Public names of a package, imported when first used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def names_from(package: str, homes: Mapping[str, str], packages: Collection[str] = ()) -> Callable[[str], Any]:
    """A package's `__getattr__`: finds each name of `homes` in its module, and the `packages` inside the package."""

    def find(name: str) -> Any:
        if name in packages:
            return import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name], package), name)

    return find
