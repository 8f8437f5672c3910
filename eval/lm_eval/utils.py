"""Functions of llm_jepa_nl_rx.yaml. The harness loads this file by its path, so it puts the repository on sys.path."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets

EVAL = Path(__file__).resolve().parents[1]  # `eval` of the repository, or `llm_jepa_eval`
sys.path.insert(0, str(EVAL.parent))
groups, tasks = (import_module(f"{EVAL.name}.{name}") for name in ("figures.groups", "tasks"))
figures, read_answers = groups.figures, groups.read_answers
TASKS, Group, last_text = tasks.TASKS, tasks.Group, tasks.last_text
UserError = import_module("llm_jepa").UserError

TASK = TASKS["nl_rx"]


def load(nl_rx: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """NL-RX, one row for each wording. The harness passes `--metadata` to it, together with its model arguments."""
    folder = nl_rx or os.environ.get("LLM_JEPA_NL_RX")
    if not folder:
        raise UserError("The folder of NL-RX is not known. Give --metadata nl_rx=FOLDER, or set LLM_JEPA_NL_RX.")
    rows = []
    for group in TASK.load(folder).groups:
        same = {"gold": group.answer, "degenerate": group.extra["degenerate"]}
        for wording, prompt in zip(group.wordings, group.prompts, strict=True):
            rows.append({"group": group.id, "wording": wording, "user": last_text(prompt), **same})
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The scores of one wording. Figures of groups get the whole sample; the aggregations below combine them."""
    group = Group(doc["group"], (), (), doc["gold"], {"degenerate": doc["degenerate"]})
    scores, key = TASK.grade(group, results[0].strip(), True)
    sample = {"group": doc["group"], "wording": doc["wording"], "scores": scores, "answer_key": key}
    return {
        "equivalent": scores["equivalent"],
        "exact": scores["exact"],
        "worst_of_k": sample,
        "consistency": sample,
        "consistent_and_correct": sample,
    }


def worst_of_k(samples: Sequence[dict[str, Any]]) -> float:
    return _figure(samples, "worst_of_k")


def consistency(samples: Sequence[dict[str, Any]]) -> float:
    return _figure(samples, "consistency")


def consistent_and_correct(samples: Sequence[dict[str, Any]]) -> float:
    return _figure(samples, "consistent_and_correct")


def _figure(samples: Sequence[dict[str, Any]], name: str) -> float:
    return figures(read_answers(samples, "equivalent"))["metrics", name]
