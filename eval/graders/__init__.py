"""Is an answer right, and are two answers the same? One function for each kind of answer.

The graders of the tasks return a `Grade` with all metrics of the task. Those in BY_NAME, for user files, return (is it
right, answer key).

The key stands for the meaning of an answer: two wordings of a question got the same answer iff their keys are equal.
All right answers of a question share a key, however they are written.

Generation strips white space from the ends of an answer. So no grader counts it, on either side.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from llm_jepa import UserError

from .numbers import gold_number, gsm8k, marked_number, number, same_number
from .regexes import RegexError, Verdict, equivalent, language
from .text import Grade, exact, one_of, open_answer, plain, squad_normalized, starts_with, written

if TYPE_CHECKING:
    from .sql import SqlGrade

__all__ = [
    "BY_NAME",
    "Grade",
    "check_gold",
    "exact",
    "gold_regex",
    "gsm8k",
    "marked_number",
    "number",
    "one_of",
    "open_answer",
    "plain",
    "regex",
    "same_language",
    "same_number",
    "sql_execution",
    "sql_sets",
    "squad_normalized",
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
    spelling = written(gold, text, stopped)
    gold, text = _stripped_regexes(gold, text)
    verdict = _verdict(gold, text)
    right = verdict.status == "equal"
    scores = {**spelling, "equivalent": float(right), "undecided": float(verdict.status == "limit")}
    if not degenerate:
        scores["nondegenerate"] = float(right)
    return Grade(scores, _regex_key(gold, text, right))


def same_language(gold: str, text: str) -> tuple[bool, str]:
    """The text is a regex that matches the same lines as the gold regex, without white space at the ends of either."""
    gold, text = _stripped_regexes(gold, text)
    right = _verdict(gold, text).status == "equal"
    return right, _regex_key(gold, text, right)


def _stripped_regexes(gold: str, text: str) -> tuple[str, str]:
    r"""Both without white space at their ends.

    A space there is a letter of the language, but generation removes it: no answer could equal `a ` as written, and
    `a` and `a ` look the same. A gold that needs the space writes it as `[ ]`. If a gold ends in an escaped space
    (`a\ `), it keeps it, and an answer that lost only the space gets it back.
    """
    bare_gold, bare_text = gold.strip(), text.strip()
    if _ends_in_escape(bare_gold):
        space = gold.lstrip()[len(bare_gold) : len(bare_gold) + 1]
        bare_gold += space
        if _ends_in_escape(bare_text):
            bare_text += space
    return bare_gold, bare_text


def gold_regex(gold: str) -> str:
    """The regex that answers are compared with (see `_stripped_regexes`)."""
    return _stripped_regexes(gold, "")[0]


def _ends_in_escape(regex: str) -> bool:
    return (len(regex) - len(regex.rstrip("\\"))) % 2 == 1


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


def sql_sets(gold: str, text: str, stopped: bool) -> Grade:
    """equivalent: the same clauses as the gold query (see `sql_clauses.clauses`). For questions without databases.

    It needs sqlglot (extra `retrieval`).
    """
    from .sql_clauses import clauses

    key = clauses(text)
    right = key is not None and key == clauses(gold)
    scores = {**written(gold, text, stopped), "equivalent": float(right), "invalid": float(key is None)}
    return Grade(scores, f"text:{text}" if key is None else f"clauses:{key}")


# For user files ("grader"): (gold, text) -> (is it right, answer key)
BY_NAME = {
    "exact": exact,
    "startswith": starts_with,
    "number": same_number,
    "regex": same_language,
    "alternatives": one_of,
}


def check_gold(grader: str, gold: str) -> None:
    """Raises UserError if the grader of that name can call no answer right with this gold."""
    if not gold.strip():
        raise UserError("The answer is empty or white space, so nothing can equal it; fill it in.")
    if grader == "number":
        gold_number(gold)
    elif grader == "regex":
        try:
            language(gold_regex(gold))
        except RegexError as error:
            if error.status == "invalid":
                raise UserError(f"The answer is not a regex: {error}") from None
    elif grader == "alternatives" and not all(piece.strip() for piece in gold.split("; ")):
        raise UserError(f"The answer {gold!r} has an empty alternative; `; ` separates alternatives.")
