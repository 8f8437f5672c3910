"""Tasks from files of groups: those of a user, and ParaRel's cloze texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from llm_jepa import UserError
from llm_jepa.lm import render_kwargs_of, with_kwargs

from .. import graders
from ..graders import Grade
from .choices import one_of
from .questions import Data, Group, Task, nearest, read

KEYS = ("id", "prompts", "answer", "wordings", "choices", "grader", "tools", "chat_template_kwargs")
REQUIRED = KEYS[:3]


def load_groups(source: str, name: str = "groups", rewrite: Callable[[str], str] = lambda text: text) -> Data:
    """Rows {"id", "prompts", "answer"}, and optionally:

    wordings  names of the prompts
    choices   the answer is the likeliest of these
    grader    one of `graders.BY_NAME` (default: exact)
    tools, chat_template_kwargs  go to the chat template, as in rows of training

    rewrite: applied to each plain prompt; it raises ValueError for one that cannot be used.
    """
    rows, hashes = read(source, name, "test")
    groups: list[Group] = []
    row_of_id: dict[str, int] = {}
    for number, raw in enumerate(rows, start=1):
        where = f"{next(iter(hashes))}, row {number}"
        row = {key: value for key, value in raw.items() if value is not None}  # None: a key that only other rows have
        group = _group(row, where, rewrite)
        if group.id in row_of_id:
            raise UserError(f"{where}: the id {row['id']!r} is that of row {row_of_id[group.id]}; ids must be unique.")
        row_of_id[group.id] = number
        groups.append(group)
    return Data(tuple(groups), hashes)


def _group(row: dict[str, Any], where: str, rewrite: Callable[[str], str]) -> Group:
    unknown = [key for key in row if key not in KEYS]
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}{nearest(unknown[0], KEYS)}")
    missing = [key for key in REQUIRED if row.get(key) in (None, "", [])]
    if missing:
        raise UserError(f"{where} has no {' and no '.join(missing)}; a group is {{'id', 'prompts', 'answer'}}.")
    prompts = row["prompts"]
    if not isinstance(prompts, list) or not all(map(_is_prompt, prompts)):
        raise UserError(f"{where}: 'prompts' must be a list of texts, or of lists of messages, none of them empty.")
    wordings = tuple(map(str, row.get("wordings", range(len(prompts)))))
    if len(wordings) != len(prompts) or len(set(wordings)) < len(wordings):
        raise UserError(f"{where}: 'wordings' must give each of the {len(prompts)} prompts a different name.")
    answer = _as_written(row["answer"])
    try:
        extra = _how_to_grade(row, answer)
        kwargs = render_kwargs_of(row, where)
        texts = tuple(rewrite(turns) if isinstance(turns, str) else with_kwargs(turns, kwargs) for turns in prompts)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return Group(str(row["id"]), texts, wordings, answer, extra)


def _how_to_grade(row: dict[str, Any], answer: str) -> dict[str, Any]:
    """The `extra` of a group. Raises ValueError if its choices or its grader do not fit its answer."""
    choices, grader = row.get("choices"), row.get("grader")
    if choices is not None:
        if grader is not None:
            raise ValueError("the row has 'choices' and 'grader'; remove one. A choice is right if it is the answer.")
        return one_of(tuple(map(_as_written, choices)))("", answer)
    if grader is None:
        graders.check_gold("exact", answer)
        return {}
    if grader not in graders.BY_NAME:
        raise ValueError(f"there is no grader {grader!r}{nearest(str(grader), graders.BY_NAME)}")
    graders.check_gold(grader, answer)
    return {"grader": grader}


def _as_written(value: Any) -> str:
    """A text, or how the file spells another value: 5, 0.5, true."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and bool(message.get("content"))


def _grade_group(group: Group, text: str, stopped: bool) -> Grade:
    right, key = graders.BY_NAME[group.extra.get("grader", "exact")](group.answer, text)
    return Grade({"correct": float(right), **graders.written(group.answer, text, stopped)}, key)


def load_pararel(source: str) -> Data:
    """`load_groups` on cloze texts; a final [MASK] or [Y] (ParaRel's object slot) marks the place of the answer."""
    return load_groups(source, "pararel", _up_to_the_slot)


def _up_to_the_slot(text: str) -> str:
    before, slot, after = re.split(r"(\[MASK\]|\[Y\]|$)", text, maxsplit=1)
    if after.strip(" .?!"):
        raise ValueError(
            f"{slot} is not at the end of {text!r}: a left-to-right model cannot see the text after it; reword the "
            "prompt."
        )
    return before.rstrip()


def _grade_pararel(group: Group, text: str, stopped: bool) -> Grade:
    right, key = graders.starts_with(group.answer, text)
    return Grade({"correct": float(right), **graders.written(group.answer, text, stopped)}, key)


PARAREL = Task(
    "pararel",
    load_pararel,
    _grade_pararel,
    metric="correct",
    max_new_tokens=12,
    published="none for causal LMs; ParaRel (arXiv:2102.01017) measures masked LMs",
    trap="consistency alone rewards a constant answer: read it together with accuracy; candidates restricted to single "
    "tokens make both look better",
)
GROUPS = Task(
    "groups",
    load_groups,
    _grade_group,
    metric="correct",
    max_new_tokens=64,
    published="none: your data",
    trap="wordings that the model under test wrote, or that are in its training data. Each grader has its own rule "
    "for equal answers (docs/evaluation.md); numbers are compared without their units",
)
