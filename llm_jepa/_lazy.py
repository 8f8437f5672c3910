"""Public names of a package, imported when first used, and modules that are imported after those of another package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
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


def import_after(followers: Mapping[str, str]) -> None:
    """Import each module of ours as soon as the other package's module, its key, is imported: now, or later.

    A module of ours that registers a class with another package need not load that package to do so: nobody can look
    for the class before.
    """
    later = {}
    for leader, follower in followers.items():
        if leader in sys.modules:
            import_module(follower)
        else:
            later[leader] = follower
    if later:
        sys.meta_path.insert(0, _Followers(later))


class _Followers(MetaPathFinder):
    """Leaves the search to the other finders, and adds an import to what the loader does."""

    def __init__(self, followers: dict[str, str]) -> None:
        self.followers = followers

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        follower = self.followers.pop(name, None)  # taken out before the search below, which comes here again
        if follower is None:
            return None
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_both(module: ModuleType) -> None:
            execute(module)
            import_module(follower)

        spec.loader.exec_module = execute_both  # type: ignore[method-assign]
        return spec
