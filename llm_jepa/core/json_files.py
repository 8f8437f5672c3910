"""Reads JSON files that a stranger may have written, under limits. Whatever is wrong with one is a UserError.

Python's own reader raises RecursionError for 100,000 `[`, takes NaN and the last of two equal keys, and returns `[]`
where an object is expected.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from .errors import UserError

LARGEST = 50_000_000  # bytes; the index of a model with 1,000,000 tensors has as many
DEEPEST = 64  # lists and objects inside each other; configs have 5
LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

# What a value must be: a type; a tuple of types; a set of the possible values; [shape] for a list of them;
# {str: shape} for an object with values of one shape; {"key": shape, "optional?": shape} for an object that may have
# other keys, too.
Shape = Any


def read_json(path: str | Path, shape: Shape = dict, *, largest: int = LARGEST, is_finite: bool = True) -> Any:
    """The value of a JSON file.

    Args:
        shape: what the value must be, see `Shape`.
        largest: bytes that the file may have.
        is_finite: False lets NaN and Infinity through, which Python writes for such floats.

    Raises UserError that names the file and what is wrong with it, and OSError if it cannot be read.
    """
    return parse_json(read_text(path, largest=largest), str(path), shape, is_finite=is_finite)


def read_json_lines(path: str | Path, shape: Shape = dict, *, largest: int = 10**9) -> list[Any]:
    """The values of a file of JSON lines; empty lines are left out. Raises UserError and OSError like `read_json`."""
    lines = read_text(path, largest=largest).splitlines()
    return [
        parse_json(line, f"{path}, line {number}", shape, is_finite=False)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def read_text(path: str | Path, *, largest: int = LARGEST) -> str:
    """The text of a UTF-8 file. Raises UserError for devices and pipes, for other bytes, and beyond `largest` bytes."""
    path = Path(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file; put a file in its place.")
    if status.st_size > largest:
        raise UserError(f"{path} has {status.st_size:,} bytes, and {largest:,} are the most that is read; shorten it.")
    with open(path, "rb") as file:
        data = file.read(largest)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from None


def parse_json(text: str, name: str, shape: Shape = dict, *, is_finite: bool = True) -> Any:
    """The value of a JSON text. Raises UserError that begins with `name`."""

    def refuse(constant: str) -> NoReturn:
        raise UserError(f"it holds {constant}, which is not JSON")

    try:
        hooks: dict[str, Any] = {"parse_constant": refuse, "parse_float": _finite} if is_finite else {}
        value = json.loads(text, object_pairs_hook=_object, **hooks)
        if LONE_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        reason = shape_fault(value, shape) or _depth_fault([value])
    except RecursionError:
        reason = "it is nested too deeply"
    except UnicodeEncodeError:
        reason = "it holds half of a surrogate pair, which is not text"
    except ValueError as error:
        reason = str(error) if isinstance(error, UserError) else f"it is not JSON: {error}"
    if reason is not None:
        raise UserError(f"{name} cannot be read: {reason}; mend it, or take a whole copy of the file.") from None
    return value


def shape_fault(value: Any, shape: Shape, place: str = "it") -> str | None:
    """Why a value has another shape, or None if it has this one."""
    if isinstance(shape, (type, tuple)):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        is_bool = isinstance(value, bool) and bool not in kinds
        if isinstance(value, kinds) and not is_bool or type(value) is int and float in kinds:
            return None
        return f"{place} is {_name(value)} instead of {' or '.join(_NAMES[kind] for kind in kinds)}"
    if isinstance(shape, (set, frozenset)):
        is_known = isinstance(value, (str, NoneType)) and value in shape
        return None if is_known else f"{place} is {str(value)[:60]!r} instead of {' or '.join(sorted(map(str, shape)))}"
    if fault := shape_fault(value, type(shape), place):
        return fault
    if isinstance(shape, list):
        return _first(shape_fault(item, shape[0], f"item {i} of {place}") for i, item in enumerate(value))
    return _first(_key_fault(value, key, inner, place) for key, inner in shape.items())


def _key_fault(value: Mapping[str, Any], key: Any, shape: Shape, place: str) -> str | None:
    if key is str:
        return _first(shape_fault(item, shape, f"its {name[:60]!r}") for name, item in value.items())
    name = key.removesuffix("?")
    if name in value:
        return shape_fault(value[name], shape, f"its {name!r}")
    return None if key.endswith("?") else f"{place} has no {name!r}"


def _first(faults: Iterable[str | None]) -> str | None:
    return next((fault for fault in faults if fault), None)


_NAMES = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    NoneType: "null",
}  # fmt: skip


def _name(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UserError(f"it holds {text[:20]}, which is beyond all floats")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        known: set[str] = set()
        double = next(key for key, _ in pairs if key in known or known.add(key))  # type: ignore[func-returns-value]
        raise UserError(f"it has the key {double[:60]!r} twice")
    return value


def _depth_fault(value: Any) -> str | None:
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
        level = [item for item in inner if isinstance(item, (dict, list))]
        if not level:
            return None
    return f"it is nested more than {DEEPEST} deep"
