"""Answers that are numbers: compared by their value, or as GSM8K's metric reads them."""

from __future__ import annotations

import re
from functools import lru_cache

from llm_jepa import UserError

from .text import Grade
from .values import Value, stated_value, value_of

_NUMBER = re.compile(
    r"(?:(?<![\w)])[-\u2212])?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def number(text: str, *, last: bool = False) -> str | None:
    """The first (or last) number in `text` as a canonical decimal string: `$1,234.50.` is `1234.5`. None without one.

    This is GSM8K's grammar: integers and decimals. `values.py` has the wider one, of `same_number`.
    Strings instead of floats avoid rounding: 0.1 stays 0.1, and 30 digits stay 30 digits. `5-3` holds 5 and 3, not -3.
    """
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    digits = (numbers[-1] if last else numbers[0]).replace(",", "").replace("$", "")
    negative = digits[0] in "-\u2212"
    whole, _, fraction = digits.lstrip("-\u2212").partition(".")
    value = whole.lstrip("0") or "0"
    fraction = fraction.rstrip("0")
    if fraction:
        value += f".{fraction}"
    if negative and value != "0":
        value = f"-{value}"
    return value


def marked_number(text: str) -> str | None:
    """The number after the first `####`, on the same line: the answer format of GSM8K.

    A text that continues with other problems is judged by its first answer.
    """
    match = re.search(r"####([^\n]*)", text)
    if match is None:
        return None
    return number(match.group(1))


def gsm8k(gold: str, text: str, stopped: bool) -> Grade:
    """Grade an answer of GSM8K.

    number       the number after `####` is the gold's
    last_number  the same, but an answer without a `####` number is judged by its last number. A separate metric,
                 because it also rewards a number that is last by chance.
    """
    right, marked = marked_number(gold), marked_number(text)
    assert right is not None, "checked when the data is loaded"
    loose = marked or number(text, last=True)
    scores = {
        "number": float(marked == right),
        "last_number": float(loose == right),
        "stop_rate": float(stopped),
    }
    return Grade(scores, _key(marked, text))


def same_number(gold: str, text: str) -> tuple[bool, str]:
    """The number that the text states has the value of the gold, exactly. Grammar: `values.py`.

    The text states the number after `####`, or else its last number. Two currencies differ; one that only one side
    names does not count. Raises UserError if the gold is not a number.
    """
    right = gold_number(gold)
    value = stated_value(text)
    if value is None:
        return False, _key(None, text)
    key = value.key
    if right.currency and value.currency not in ("", right.currency):
        key += value.currency
    return key == right.key, key


@lru_cache(maxsize=8192)
def gold_number(gold: str) -> Value:
    """The value of a gold answer. Raises UserError if it is anything else than one number."""
    value = value_of(gold)
    if value is None:
        raise UserError(
            f"The answer {gold[:80]!r} is not a number of the grammar in eval/graders/values.py. Give the number alone "
            "(digits, without a unit), or use another grader."
        )
    return value


def _key(value: str | None, text: str) -> str:
    if value is None:
        return f"text:{text.strip()}"
    return f"number:{value}"
