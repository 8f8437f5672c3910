"""Types of command-line options. argparse turns their errors into one line that names the option.

parser.add_argument("--steps", type=whole(1), default=2000)
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

MAX_SEED = 2**32 - 1  # numpy takes no larger one
LARGEST = 2**31 - 1  # of a count; torch and Arrow keep some of them in 32 bits
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def whole(low: int = 1, high: int = LARGEST) -> Callable[[str], int]:
    """A whole number in low..high."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,20}", text.strip()) or not low <= int(text) <= high:
            limit = "" if high == LARGEST else f" and {high} or less"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} must be a whole number, {low} or more{limit}")
        return int(text)

    return parse


seed_number = whole(0, MAX_SEED)


def number(low: float = 0, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A finite number in low..high; `above`: not `low` itself."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            limit = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} must be a number {'>' if above else '>='} {low:g}{limit}")
        return value

    return parse


def plain_text(value: str) -> str:
    """A text that a tokenizer can read. A byte that is not UTF-8 reaches Python as half of a surrogate pair."""
    if has_half_character(value):
        raise argparse.ArgumentTypeError("the text has a byte that is not UTF-8, or half of a surrogate pair")
    return value


def pair_of_names(value: str) -> tuple[str, str]:
    """`name=other` as a pair of texts."""
    name, mark, other = value.partition("=")
    if not (name and mark and other) or has_half_character(value):
        raise argparse.ArgumentTypeError(f"{value[:40]!r} must be NAME=OTHER, as in prompt=question")
    return name, other


def has_half_character(value: str) -> bool:
    """Whether a text holds half of a surrogate pair, which is not a character; nothing can write it as UTF-8."""
    return _HALF_CHARACTER.search(value) is not None
