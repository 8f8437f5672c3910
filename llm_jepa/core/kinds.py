"""Types of recipe keys: which values one takes, in words for messages, and as JSON for the table of inherited keys."""

from __future__ import annotations

import difflib
import enum
import math
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, Union

from .errors import UserError
from .options import has_half_character

_LONGEST_LIST = 200  # characters of the words that a key takes; `optim` has 45 of them


def coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it (an int becomes a float), or UserError."""
    _check_plain(key, value)
    accepted, result = accept(value, hint)
    if accepted:
        return result
    if isinstance(value, float) and not math.isfinite(value) and float in options_of(hint):
        raise UserError(f"{key}: expected a finite number, got {value}.")
    given = f"got {value!r} ({type(value).__name__})"
    words = words_of(hint)
    text = str(value)
    near = [word for word in words if text and word.startswith(text)] or difflib.get_close_matches(text, words, n=1)
    if not near:
        raise UserError(f"{key}: expected {describe(hint, most=_LONGEST_LIST)}, {given}.")
    few = _LONGEST_LIST // 2  # characters: the word that is meant says more than a long list
    raise UserError(f"{key}: expected {describe(hint, most=few)}, {given}; did you mean {near[0]!r}?")


def _check_plain(key: str, value: Any) -> None:
    """Raises UserError for a number of more than 64 bits, NaN in a list or mapping and half of a character."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{key}: {value} has more than 64 bits; write a smaller number.")
    if isinstance(value, str) and has_half_character(value):
        raise UserError(f"{key}: the text has a byte that is not UTF-8, or half of a surrogate pair; write it anew.")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            if isinstance(item, float) and math.isnan(item):
                raise UserError(f"{key}: it holds nan; write a finite number.")
            _check_plain(key, item)


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself if it is not one. A text beside an enum is one of its words."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(option for option in options if option is not str) if any(map(_is_enum, options)) else options


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _listed(options: Iterable[Any]) -> list[Any]:
    """The members of an enum that an option is a list of. Then a text of a recipe is such words, with spaces."""
    kinds = [kind for option in options if typing.get_origin(option) is list for kind in typing.get_args(option)]
    return [member.value for kind in kinds if _is_enum(kind) for member in kind]


def words_of(hint: Any) -> list[str]:
    """The words that a key of a few choices takes."""
    options, words = options_of(hint), []
    for option in options:
        if typing.get_origin(option) is Literal:
            words += [word for word in typing.get_args(option) if isinstance(word, str)]
        elif _is_enum(option):
            words += [str(member.value) for member in option]
    return words + _listed(options)


def wants_text(hint: Any, text: str) -> bool:
    """True for a field that takes only text: its override is literal, so `123` is a text, and `*.jsonl` no YAML alias.

    If the field takes a list of texts too, what starts with a bracket is one.
    """
    options = {option for option in options_of(hint) if option is not type(None)}
    return options == {str} or (options == {str, list[str]} and not text.startswith("["))


def accept(value: Any, hint: Any) -> tuple[bool, Any]:
    """(does it fit, the value to use). A bool is not an int; an int becomes a float; nothing else is converted."""
    options = options_of(hint)
    if isinstance(value, str) and (listed := _listed(options)):
        return all(word in listed for word in value.split()), value
    if len(options) > 1:
        for option in sorted(options, key=lambda option: option is float):  # float last, so that an int stays one
            accepted, result = accept(value, option)
            if accepted:
                return True, result
        return False, None
    (hint,) = options
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, value
    if hint is type(None):
        return value is None, None
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments), value
    if _is_enum(hint):
        return value in [member.value for member in hint], value
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < sys.float_info.max:
            return False, None
        return True, float(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if origin is list:
        items = [accept(item, arguments[0]) for item in value] if isinstance(value, list) else [(False, None)]
        return all(fits for fits, _ in items), [item for _, item in items]
    if origin is dict:
        return isinstance(value, dict), value
    return isinstance(hint, type) and isinstance(value, hint), value


def describe(hint: Any, *, most: float = math.inf) -> str:
    """A type in words: "int or null", "one of a, b". A list of choices has at most `most` characters."""

    def choices(words: Iterable[Any], place: str = "") -> str:
        line = ", ".join(map(str, words))
        if len(line) <= most:
            return f"one of {line}"
        start = line[: int(most) // 2].rpartition(", ")[0]
        return f"one of {line.count(', ') + 1} words ({start}, ...{place})"

    def name(option: Any) -> str:
        if typing.get_origin(option) is Literal:
            return choices(typing.get_args(option))
        if _is_enum(option):
            return choices((member.value for member in option), f" see {option.__module__}.{option.__qualname__}")
        if listed := _listed([option]):
            return f"list of {', '.join(map(str, listed))}"
        if option is type(None):
            return "null"
        if option is bool:
            return "true or false"
        return getattr(typing.get_origin(option) or option, "__name__", str(option))

    return " or ".join(dict.fromkeys(name(option) for option in options_of(hint)))


# -- types as JSON ----------------------------------------------------------------------------------------------------

_PLAIN = {"null": type(None), "bool": bool, "int": int, "float": float, "str": str, "dict": dict, "any": Any}


def as_json(hint: Any) -> Any:
    """A type in plain JSON: "int", ["str", "null"], {"list": "str"}, {"words": [...]}, {"class": NAME}."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [as_json(option) for option in typing.get_args(hint)]
    origin = typing.get_origin(hint)
    if origin is Literal:
        return {"words": list(typing.get_args(hint))}
    if origin is list:
        return {"list": as_json(typing.get_args(hint)[0])}
    if _is_enum(hint):
        return {"enum": hint.__qualname__, "of": hint.__module__, "words": [member.value for member in hint]}
    for name, plain in _PLAIN.items():
        if plain in (hint, origin):
            return name
    return {"class": hint.__name__}


def from_json(kind: Any) -> Any:
    """The type that `as_json` wrote. Of a class only the name is left: no value of a recipe is one of it."""
    if isinstance(kind, str):
        return _PLAIN[kind]
    if isinstance(kind, list):
        return Union[tuple(map(from_json, kind))]  # noqa: UP007
    if "enum" in kind:
        members = [(f"word_{index}", word) for index, word in enumerate(kind["words"])]
        return enum.Enum(kind["enum"], members, module=kind["of"], qualname=kind["enum"])
    if "words" in kind:
        return Literal[tuple(kind["words"])]
    return list[from_json(kind["list"])] if "list" in kind else type(kind["class"], (), {})  # type: ignore[misc]
