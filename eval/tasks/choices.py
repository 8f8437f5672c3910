"""Tasks with fixed choices, of which the likeliest is the answer: HellaSwag, Rotten Tomatoes, PAWS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..graders import Grade, exact
from .questions import LLM_JEPA, Data, Group, Task, nearest, read_questions


def one_of(choices: tuple[str, ...]) -> Callable[[str, str], dict[str, Any]]:
    """The `extra` of a question with these choices. Raises ValueError if the answer is not one of them.

    White space at the ends does not count, as everywhere in grading. So it may not be all that two choices differ in.
    """
    names = [choice.strip() for choice in choices]

    def extra(_: str, answer: str) -> dict[str, Any]:
        if "" in names or len(set(names)) < len(names):
            raise ValueError(f"the choices {list(choices)} must be different texts, none of them empty")
        if answer.strip() not in names:
            raise ValueError(f"the answer {answer!r} is none of the choices{nearest(answer, choices)}")
        return {"choices": choices}

    return extra


def _grade(group: Group, text: str, _: bool) -> Grade:
    right, key = exact(group.answer, text)
    return Grade({"accuracy": float(right)}, key)


def _label(value: Any, names: tuple[str, ...]) -> str:
    """The name of class `value`. Any other value stays, so that the message that refuses it can show it."""
    return names[int(value)] if str(value) in map(str, range(len(names))) else str(value)


def load_hellaswag(source: str) -> Data:
    return read_questions(
        source,
        "hellaswag",
        system="Which one of A), B), C), or D) is the best ending for the context? Answer A, B, C, or D.",
        columns=("ctx", "endings", "label"),
        ask=_ask_hellaswag,
        extra=one_of(("A", "B", "C", "D")),
        split="validation",
    )


def _ask_hellaswag(row: dict[str, Any]) -> tuple[str, str]:
    label = str(row["label"])
    if label not in ("0", "1", "2", "3") or len(row["endings"]) != 4:
        raise ValueError(f"the label is {label!r} with {len(row['endings'])} endings; take the validation split.")
    endings = "\n".join(f"{letter}) {ending}" for letter, ending in zip("ABCD", row["endings"], strict=True))
    return f"{row['ctx']}\n{endings}", "ABCD"[int(label)]


def load_rotten_tomatoes(source: str) -> Data:
    return read_questions(
        source,
        "rotten_tomatoes",
        system="Determine whether the comment is positive or negative",
        columns=("text", "label"),
        ask=lambda row: (row["text"], _label(row["label"], ("Bad", "Good"))),
        extra=one_of(("Good", "Bad")),
    )


def load_paws(source: str) -> Data:
    return read_questions(
        source,
        "paws",
        system="Do the two sentences mean the same? Answer Yes or No.",
        columns=("sentence1", "sentence2", "label"),
        ask=lambda row: (f"1) {row['sentence1']}\n2) {row['sentence2']}", _label(row["label"], ("No", "Yes"))),
        extra=one_of(("Yes", "No")),
        config="labeled_final",
    )


HELLASWAG = Task(
    "hellaswag",
    load_hellaswag,
    _grade,
    metric="accuracy",
    max_new_tokens=1,
    published=f"{LLM_JEPA}, table 13), Llama-3.2-1B: 69.40 +- 0.99 (SFT), 70.51 +- 1.20; the same models in "
    "arXiv:2602.22617, fig. 7: 27.93 and 35.22",
    trap="cuts the prompt to 128 tokens from the right by default: the endings, and often the assistant's header, are "
    "lost",
)
ROTTEN_TOMATOES = Task(
    "rotten_tomatoes",
    load_rotten_tomatoes,
    _grade,
    metric="accuracy",
    max_new_tokens=1,
    published=f"{LLM_JEPA}, table 9), pretrained on paraphrases, then tuned: 56.57 +- 1.66, 57.76 +- 1.33",
    trap="startswith on generated text: `Good` and `Goodness` are right, and chance is not 50 %, because the model may "
    "say anything",
)
PAWS = Task(
    "paws",
    load_paws,
    _grade,
    metric="accuracy",
    max_new_tokens=1,
    published="none with LLM-JEPA; PAWS (arXiv:1904.01130): 85 % with PAWS in the training data, below 40 % without",
    trap="classes are unequal: compare with the share of the larger one, not with 50 %",
)
