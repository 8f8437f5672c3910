"""The table of the keys that families inherit from TRL and transformers. It answers before those are imported.

`inherited_keys.json` is written by `python -m tests.inherited_keys` from the dataclasses, which stay the source. The
table counts for the versions that it names; with others, the caller asks the dataclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .json_files import read_json
from .kinds import as_json, from_json

TABLE = Path(__file__).parent.parent / "inherited_keys.json"
PACKAGES = ("transformers", "trl")
Fields = dict[str, tuple[dataclasses.Field[Any], Any]]  # name -> (field, its type)


def read_inherited(family: str) -> Fields:
    """The keys of the table, as `recipe.recipe_fields` would give them."""
    fields: Fields = {}
    for name, key in read_json(TABLE)[family].items():
        fields[name] = (
            dataclasses.field(default=key["default"], metadata={"help": key.get("help")}),
            from_json(key["type"]),
        )
    return fields


def is_of_installed_versions() -> bool:
    """Whether the table was made from the versions of the libraries that are installed."""
    return read_json(TABLE)["versions"] == installed_versions()


def installed_versions() -> dict[str, str | None]:
    """package -> version; None if it is not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def table_of(families: Mapping[str, Fields], described: Mapping[str, set[str]]) -> dict[str, Any]:
    """The table as JSON. described: family -> the inherited keys whose help is shown, because the default is ours."""
    table: dict[str, Any] = {"versions": installed_versions()}
    for family, fields in families.items():
        keys = table[family] = {}
        for name, (field, hint) in fields.items():
            default = default_of(field)
            keys[name] = {"type": as_json(hint), "default": getattr(default, "value", default)}
            if name in described[family]:
                keys[name]["help"] = field.metadata["help"]
    return table


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; `dataclasses.MISSING` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
