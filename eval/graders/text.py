"""Answers that are words: compared as strings, by their first words, or with lists of alternatives."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple


class Grade(NamedTuple):
    scores: dict[str, float]  # by metric, 0 to 1; a metric that is missing does not count this answer
    answer_key: str


def written(gold: str, text: str, stopped: bool) -> dict[str, float]:
    """The string metrics exact, startswith, contains and stop_rate.

    `startswith` and `contains` forgive text that follows or surrounds the gold string. `exact` does not: it rises with
    a model that stops in time, whatever it knows.
    """
    return {
        "exact": float(text == gold),
        "startswith": float(text.startswith(gold)),
        "contains": float(gold in text),
        "stop_rate": float(stopped),
    }


def exact(gold: str, text: str) -> tuple[bool, str]:
    """Equal strings, ignoring white space at both ends."""
    return text.strip() == gold.strip(), text.strip()


def starts_with(gold: str, text: str) -> tuple[bool, str]:
    """The answer begins with the words of the gold, ignoring letter case and punctuation.

    For text that runs on (a cloze). The key of a wrong answer is its first clause.
    """
    words, gold_words = normalized(text).split(), normalized(gold).split()
    if gold_words and words[: len(gold_words)] == gold_words:
        return True, " ".join(gold_words)
    return False, normalized(re.split(r"[.,;:!?\n]", text.strip(), maxsplit=1)[0])


def normalized(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016) after NFKC: lower case, no punctuation, articles or double spaces.

    An answer that consists of articles only (the band The The) keeps them.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = " ".join("".join(c for c in text if c not in string.punctuation).split())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()) or text


def open_answer(alternatives: Sequence[str], text: str, stopped: bool) -> Grade:
    """Grade an answer by a list of gold alternatives. Both are normalised; an answer without a word is never right.

    equal       the first answer (before any `; `) is an alternative
    any_listed  one of the `; `-separated answers is an alternative; this rewards hedging
    contains    the text has an alternative in it, as whole words
    """
    right_keys = [key for key in map(normalized, alternatives) if key]
    answers = [normalized(piece) for piece in text.split("; ")]
    padded = f" {normalized(text)} "
    scores = {
        "equal": float(answers[0] in right_keys),
        "any_listed": float(any(answer in right_keys for answer in answers)),
        "contains": float(any(f" {key} " in padded for key in right_keys)),
        "stop_rate": float(stopped),
    }
    return Grade(scores, right_keys[0] if scores["equal"] else answers[0])


def one_of(gold: str, text: str) -> tuple[bool, str]:
    """`open_answer` on alternatives joined by `; `."""
    scores, key = open_answer(gold.split("; "), text, True)
    return bool(scores["equal"]), key
