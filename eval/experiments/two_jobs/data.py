"""The rows of a data set: what is trained, and what is asked and searched on validation or on test."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jepa.lm import read_rows

from ... import graders
from ...graders import Grade
from ...tasks import nl_rx
from ..small_runs import without_validation

Messages = list[dict[str, Any]]
FILES = {
    "nl_rx": ("synth_train.jsonl", "turk_train.jsonl", "synth_test.jsonl", "turk_test.jsonl"),
    "spider": ("spider_train.jsonl", "spider_test.jsonl"),
}


@dataclass(frozen=True)
class Questions:
    """Requests in one or more wordings, and what answers them.

    prompts: by wording, the messages before the answer; line i of every wording asks for `golds[i]`.
    """

    prompts: Mapping[str, list[Messages]]
    golds: list[str]


@dataclass(frozen=True)
class Job:
    """A data set of the experiment. `grade` judges (gold, answer, did it stop)."""

    train: list[dict[str, Any]]
    validation: Questions
    test: Questions
    grade: Callable[[str, str, bool], Grade]


@functools.cache
def load(name: str, folder: Path, *, rows: int, validation: int, lines: int) -> Job:
    """The data set `name` below `folder`, the same for every run.

    rows: of training, drawn once. validation: so many lines, or a few more, that are held out of training by answer.
    lines: of the test, drawn once.
    """
    return {"nl_rx": _nl_rx, "spider": _spider}[name](folder / name, rows, validation, lines)


def _nl_rx(folder: Path, rows: int, validation: int, lines: int) -> Job:
    """Every training line is asked in one of the two wordings: half of them in each."""
    synth, turk = ([dict(row) for row in read_rows(str(folder / f"{name}_train.jsonl"))] for name in ("synth", "turk"))
    pairs = [{"messages": one["messages"], "other": other["messages"]} for one, other in zip(synth, turk, strict=True)]
    train, held_out = without_validation(pairs, validation)
    train = random.Random("training rows").sample(train, rows)
    mixed = [
        {"messages": row["messages" if i % 2 == 0 else "other"]} for i, row in enumerate(train)
    ]  # the order is random already
    items, _, _ = nl_rx.load(folder)
    items = random.Random("test lines").sample(items, lines)
    return Job(
        mixed,
        Questions(
            {
                "synth": [row["messages"][:-1] for row in held_out],
                "turk": [row["other"][:-1] for row in held_out],
            },
            [row["messages"][-1]["content"] for row in held_out],
        ),
        Questions(
            {"synth": [list(item.original) for item in items], "turk": [list(item.paraphrase) for item in items]},
            [item.answer for item in items],
        ),
        graders.regex,
    )


def _spider(folder: Path, rows: int, validation: int, lines: int) -> Job:
    """Test questions whose text or query stands in the training file are dropped (72 % of this random re-split)."""
    all_rows = [dict(row) for row in read_rows(str(folder / "spider_train.jsonl"))]
    known = {message["content"] for row in all_rows for message in row["messages"][-2:]}
    test = [row["messages"] for row in map(dict, read_rows(str(folder / "spider_test.jsonl")))]
    test = [messages for messages in test if not known & {messages[-2]["content"], messages[-1]["content"]}]
    test = random.Random("test lines").sample(test, min(lines, len(test)))
    train, held_out = without_validation(all_rows, validation)

    def questions(rows: list[Messages]) -> Questions:
        return Questions({"question": [messages[:-1] for messages in rows]}, [row[-1]["content"] for row in rows])

    return Job(
        random.Random("training rows").sample(train, rows),
        questions([row["messages"] for row in held_out]),
        questions(test),
        graders.sql_sets,
    )
