"""NQ-Open: short answers to questions, any of several alternatives (Lee et al. 2019, arXiv:1906.00300)."""

from __future__ import annotations

from typing import Any

from .. import graders
from ..graders import Grade
from .questions import LLM_JEPA, Data, Group, Task, read_questions


def load(source: str) -> Data:
    """`extra`: alternatives, the answers that count."""
    return read_questions(
        source,
        "nq_open",
        system="Answer the question below.",
        columns=("question", "answer"),
        ask=_ask,
        extra=_alternatives,
        split="validation",
    )


def _ask(row: dict[str, Any]) -> tuple[str, str]:
    answer = row["answer"]
    if isinstance(answer, str):
        return row["question"], answer
    if not isinstance(answer, list) or not all(isinstance(text, str) for text in answer):
        raise ValueError(f"the answer is {answer!r}, neither a text nor a list of texts")
    # "; " separates alternatives. Inside one it would make two right answers of it; SQuAD's normalisation drops both.
    return row["question"], "; ".join(text.replace("; ", ", ") for text in answer)


def _alternatives(_: str, answer: str) -> dict[str, Any]:
    alternatives = answer.split("; ")
    if not any(map(graders.squad_normalized, alternatives)):
        raise ValueError(f"the answer {answer!r} has no word, so nothing could equal it")
    return {"alternatives": alternatives}


def _grade(group: Group, text: str, stopped: bool) -> Grade:
    return graders.open_answer(group.extra["alternatives"], text, stopped)


TASK = Task(
    "nq_open",
    load,
    _grade,
    metric="equal",
    max_new_tokens=64,
    published=f"{LLM_JEPA}, table 13), Llama-3.2-1B: 20.12 +- 0.41 (SFT), 21.59 +- 0.40",
    trap="right if a piece of the answer is in the gold string (the paper says the reverse): an empty answer is right, "
    "and so is one letter. Ours is SQuAD's equality, which drops punctuation: 1.5 million equals 15 million",
)
