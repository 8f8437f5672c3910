"""GSM8K: math word problems whose solutions end in `#### number` (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

from typing import Any

from .. import graders
from ..graders import Grade
from .questions import LLM_JEPA, Data, Group, Task, read_questions


def load(source: str) -> Data:
    return read_questions(
        source,
        "gsm8k",
        system="Answer the math question, show steps.",
        columns=("question", "answer"),
        ask=lambda row: (row["question"], row["answer"]),
        extra=_check,
        config="main",
    )


def _check(_: str, answer: str) -> dict[str, Any]:
    if graders.marked_number(answer) is None:
        raise ValueError("the gold solution has no number after '####'")
    return {}


def _grade(group: Group, text: str, stopped: bool) -> Grade:
    return graders.gsm8k(group.answer, text, stopped)


TASK = Task(
    "gsm8k",
    load,
    _grade,
    metric="number",
    max_new_tokens=512,
    published=f"{LLM_JEPA}, table 13), Llama-3.2-1B: 32.36 +- 0.58 (SFT), 36.36 +- 0.20",
    trap="cuts at 128 new tokens (22 % of the gold solutions have more than 384 characters), then compares strings: "
    "1,000 and 1000 differ. GSM8K's own code and lm-eval's strict match compare the string right after '#### ' without "
    "commas: there 5.0, $5 and 5. are not 5; lm-eval's flexible extract takes the last number instead",
)
