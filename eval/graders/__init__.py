"""Is an answer right, and are two answers the same? One function per kind of answer: those of the tasks return a
`Grade`, with all metrics of the task; those in BY_NAME, for user files, (is it right, answer key).

The key is what the answer *says*: two wordings of a question got the same answer iff their keys are equal. All
right answers of a question share a key, however they are written.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from .regexes import RegexError, Verdict, equivalent, language

if TYPE_CHECKING:
    from .sql import SqlGrade


class Grade(NamedTuple):
    scores: dict[str, float]  # by metric, 0 to 1; a metric that is not there does not count this answer
    answer_key: str


def written(gold: str, text: str, stopped: bool) -> dict[str, float]:
    """exact, startswith, contains, stop_rate. `startswith` and `contains` forgive what follows (or surrounds) the gold
    string, `exact` does not: it rises with a model that stops in time, whatever it knows."""
    return {
        "exact": float(text == gold),
        "startswith": float(text.startswith(gold)),
        "contains": float(gold in text),
        "stop_rate": float(stopped),
    }


def exact(gold: str, text: str) -> tuple[bool, str]:
    return text.strip() == gold.strip(), text.strip()


def starts_with(gold: str, text: str) -> tuple[bool, str]:
    """The first words of the answer are the gold's, letter case and punctuation aside: for text that runs on (a cloze).
    The key of a wrong answer is its first clause."""
    words, wanted = normalized(text).split(), normalized(gold).split()
    right = bool(wanted) and words[: len(wanted)] == wanted
    return right, " ".join(wanted) if right else normalized(re.split(r"[.,;:!?\n]", text.strip(), maxsplit=1)[0])


# -- numbers ----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?:(?<![\w)])[-\u2212])?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def number(text: str, *, last: bool = False) -> str | None:
    """The first (or last) number in `text` as a canonical decimal string: `$1,234.50.` is `1234.5`. None without one.

    Strings, not floats: 0.1 + 0.2 troubles nobody, and 30 digits stay 30 digits. `5-3` holds 5 and 3, no -3.
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    digits = found[-1 if last else 0].replace(",", "").replace("$", "")
    negative = digits[0] in "-\u2212"
    whole, _, fraction = digits.lstrip("-\u2212").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if negative and value != "0" else value


def marked_number(text: str) -> str | None:
    """The number after the first `####` on its line: GSM8K's answer. A text that goes on to other problems is judged by
    its first answer."""
    match = re.search(r"####([^\n]*)", text)
    return number(match.group(1)) if match else None


def gsm8k(gold: str, text: str, stopped: bool) -> Grade:
    """number: the number after `####` is the gold's. last_number: the same, or without a `####` number the last number
    of the text; apart, as it also credits a number that only happens to stand last."""
    wanted, marked = marked_number(gold), marked_number(text)
    loose = marked if marked is not None else number(text, last=True)
    assert wanted is not None, "checked when the data is loaded"
    scores = {
        "number": float(marked == wanted),
        "last_number": float(loose == wanted),
        "stop_rate": float(stopped),
    }
    return Grade(scores, f"number:{marked}" if marked is not None else f"text:{text.strip()}")


def same_number(gold: str, text: str) -> tuple[bool, str]:
    """The `####` number, else the last number of the text, is the gold's (a number, or a text with `####`)."""
    value = marked_number(text) or number(text, last=True)
    wanted = marked_number(gold) or number(gold, last=True)
    return value is not None and value == wanted, f"number:{value}" if value else f"text:{text.strip()}"


# -- regexes ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8192)  # both wordings of a request, and several models, often write the same regex
def _verdict(gold: str, text: str) -> Verdict:
    return Verdict("equal") if text == gold else equivalent(gold, text)


def regex(gold: str, text: str, stopped: bool, *, degenerate: bool = False) -> Grade:
    """How it is written, and `equivalent`: it matches the same lines as the gold regex.

    `nondegenerate`: the same, on golds that match some lines and not others. A gold that matches nothing or everything
    is equal to a thousand careless answers. `undecided`: the bounds were met; counted as not equivalent.
    """
    verdict = _verdict(gold, text)
    right = float(verdict.status == "equal")
    scores = {**written(gold, text, stopped), "equivalent": right, "undecided": float(verdict.status == "limit")}
    if not degenerate:
        scores["nondegenerate"] = right
    return Grade(scores, _regex_key(gold if right else text))


def same_language(gold: str, text: str) -> tuple[bool, str]:
    right = _verdict(gold, text).status == "equal"
    return right, _regex_key(gold if right else text)


def _regex_key(text: str) -> str:
    try:
        return f"language:{language(text).key}"
    except RegexError:  # no regex, or too large a one: then it is the same answer only if written the same
        return f"text:{text}"


# -- short answers ----------------------------------------------------------------------------------------------------


def normalized(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016) after NFKC: lower case, no punctuation, articles or double spaces.
    An answer that is nothing but articles (the band The The) keeps them."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = " ".join("".join(c for c in text if c not in string.punctuation).split())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()) or text


def open_answer(alternatives: Sequence[str], text: str, stopped: bool) -> Grade:
    """equal: the first answer given (before any `; `) is one of the gold alternatives, both normalised. any_listed: one
    of the `; `-separated answers is; it pays for hedging. contains: an alternative stands in the text as whole words.
    An answer without a word is never right."""
    wanted = [key for key in map(normalized, alternatives) if key]
    given = [normalized(piece) for piece in text.split("; ")]
    padded = f" {normalized(text)} "
    scores = {
        "equal": float(given[0] in wanted),
        "any_listed": float(any(piece in wanted for piece in given)),
        "contains": float(any(f" {key} " in padded for key in wanted)),
        "stop_rate": float(stopped),
    }
    return Grade(scores, wanted[0] if scores["equal"] else given[0])


def one_of(gold: str, text: str) -> tuple[bool, str]:
    """`open_answer` on alternatives joined by `; `."""
    scores, key = open_answer(gold.split("; "), text, True)
    return bool(scores["equal"]), key


# For user files ("grader"): (gold, text) -> (is it right, answer key)
BY_NAME = {
    "exact": exact,
    "startswith": starts_with,
    "number": same_number,
    "regex": same_language,
    "alternatives": one_of,
}


# -- SQL --------------------------------------------------------------------------------------------------------------


def sql(grade: SqlGrade, stopped: bool) -> Grade:
    """execution: both queries ran and gave the same rows. A query that fails is wrong, whatever the gold returns."""
    scores = {
        "execution": float(grade.correct),
        "failed": float(grade.status != "ok"),
        "stop_rate": float(stopped),
    }
    return Grade(scores, grade.answer_key)
