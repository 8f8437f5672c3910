"""Is an answer right, and are two answers the same? One function for each kind of answer.

The graders of the tasks return a `Grade` with all metrics of the task. Those in BY_NAME, for user files, return (is it
right, answer key).

The key stands for the meaning of an answer: two wordings of a question got the same answer iff their keys are equal.
All right answers of a question share a key, however they are written.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from .numbers import gsm8k, marked_number, number, same_number
from .regexes import RegexError, Verdict, equivalent, language
from .text import Grade, exact, normalized, one_of, open_answer, starts_with, written

if TYPE_CHECKING:
    from .sql import SqlGrade

__all__ = [
    "BY_NAME",
    "Grade",
    "exact",
    "gsm8k",
    "marked_number",
    "normalized",
    "number",
    "one_of",
    "open_answer",
    "regex",
    "same_language",
    "same_number",
    "sql_execution",
    "starts_with",
    "written",
]


@lru_cache(maxsize=8192)  # both wordings of a request, and several models, often write the same regex
def _verdict(gold: str, text: str) -> Verdict:
    return Verdict("equal") if text == gold else equivalent(gold, text)


def regex(gold: str, text: str, stopped: bool, *, degenerate: bool = False) -> Grade:
    """Grade a regex by its spelling (see `written`) and by its language.

    equivalent     it matches the same lines as the gold regex
    nondegenerate  the same, counted only for golds that match some lines and not others. A gold that matches nothing or
                   everything equals many careless answers.
    undecided      the comparison exceeded its bounds; it counts as not equivalent
    """
    verdict = _verdict(gold, text)
    right = verdict.status == "equal"
    scores = {**written(gold, text, stopped), "equivalent": float(right), "undecided": float(verdict.status == "limit")}
    if not degenerate:
        scores["nondegenerate"] = float(right)
    return Grade(scores, _regex_key(gold, text, right))


def same_language(gold: str, text: str) -> tuple[bool, str]:
    """The text is a regex that matches the same lines as the gold regex."""
    right = _verdict(gold, text).status == "equal"
    return right, _regex_key(gold, text, right)


def _regex_key(gold: str, text: str, right: bool) -> str:
    if right:
        text = gold
    try:
        return f"language:{language(text).key}"
    except RegexError:  # invalid or too large: two such answers are the same only if they are written the same
        return f"text:{text}"


def sql_execution(grade: SqlGrade, stopped: bool) -> Grade:
    """execution: both queries ran and returned the same rows. A query that fails is always wrong."""
    scores = {
        "execution": float(grade.correct),
        "failed": float(grade.status != "ok"),
        "stop_rate": float(stopped),
    }
    return Grade(scores, grade.answer_key)


# For user files ("grader"): (gold, text) -> (is it right, answer key)
BY_NAME = {
    "exact": exact,
    "startswith": starts_with,
    "number": same_number,
    "regex": same_language,
    "alternatives": one_of,
}
