"""YAML of a trusted size and shape: one mapping of words to plain values.

Scalars follow the core rules of YAML 1.2 (`no` is a word, `010` is 10, `1e-5` is a number). Anchors, aliases, tags,
duplicate keys, keys that are not words and deep nesting are refused.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from .errors import UserError, one_line

MAX_BYTES = 100_000
MAX_DEPTH = 20
MAX_NUMBER = 40  # characters; Python takes quadratic time to read a long number
# Tag -> pattern. ruamel's own rules for YAML 1.2 also know `1_000`, `0b11`, dates and merge keys.
SCALARS = [
    (Tag(suffix=f"tag:yaml.org,2002:{name}"), re.compile(pattern))
    for name, pattern in (
        ("bool", r"true|True|TRUE|false|False|FALSE"),
        ("null", r"~|null|Null|NULL|"),
        ("int", r"[-+]?[0-9]+"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    )
]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for anything else."""
    path = Path(path)
    if not path.is_file():
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a recipe (.yaml) in it.")
        raise UserError(
            f"No recipe at {path}; check the path (it is relative to the current folder). The recipe comes first: "
            "llm-jepa train RECIPE.yaml --field value."
        )
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes; a recipe is a page of YAML (limit {MAX_BYTES}).")
    try:
        value = load_yaml(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {one_line(error, 300)}") from None
    if value is None:
        raise UserError(f"{path} is empty; a recipe holds `key: value` lines.")
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold `key: value` lines, found {type(value).__name__}.")
    return value


def load_yaml(text: str) -> Any:
    """The value of one YAML document. Raises ruamel.yaml.YAMLError."""
    loader = YAML(typ="safe", pure=True, plug_ins=[])
    loader.Composer, loader.Resolver, loader.Constructor = _Composer, _Resolver, _Constructor
    return loader.load(text)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """A mapping as YAML that `load_yaml` reads back. Keys stay in order."""
    dumper = YAML(typ="safe", pure=True, plug_ins=[])
    dumper.Resolver = _Resolver  # quotes what `load_yaml` would not read as text
    dumper.default_flow_style = False
    dumper.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    dumper.dump(dict(values), text)
    return text.getvalue()


class _Composer(Composer):
    """Builds the tree. Checks every node before its children are read."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent) or event.anchor is not None:
            raise YAMLError(f"anchors and aliases are not allowed (line {line})")
        if event.tag is not None:
            raise YAMLError(f"tags are not allowed (line {line})")
        if self.depth >= MAX_DEPTH:
            raise YAMLError(f"nested deeper than {MAX_DEPTH} levels (line {line})")
        return super().compose_node(parent, index)


class _Resolver(VersionedResolver):
    """Decides the type of a plain scalar: by SCALARS whatever version a %YAML line names, else it is a word."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is not ScalarNode:
            return super().resolve(kind, value, implicit)
        if implicit[0]:  # neither quoted nor a block
            for tag, pattern in SCALARS:
                if pattern.fullmatch(value):
                    return tag
        return self.DEFAULT_SCALAR_TAG


class _Constructor(SafeConstructor):
    """Builds the values."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[str, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise YAMLError(f"keys must be words (line {line})")
            if key_node.value in seen:
                raise YAMLError(f"{key_node.value!r} is given twice (line {line})")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: ScalarNode) -> int | float:
        if len(node.value) > MAX_NUMBER:
            raise YAMLError(f"a number of {len(node.value)} digits (line {node.start_mark.line + 1})")
        if node.tag == "tag:yaml.org,2002:int":
            return int(node.value)  # ruamel would read 010 as 8 after a %YAML 1.1 directive
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag in ("int", "float"):
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_tag}", _Constructor.construct_number)
