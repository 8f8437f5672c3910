"""What llm_jepa_nl_rx.yaml calls. The harness loads this file by its path, so the repository is put on the path."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.figures.groups import figures, read_answers
from eval.tasks import TASKS, Group, last_text
from llm_jepa import UserError

TASK = TASKS["nl_rx"]


def load(nl_rx: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """One row a wording. `--metadata` comes in here, together with the harness's model arguments."""
    folder = nl_rx or os.environ.get("LLM_JEPA_NL_RX")
    if not folder:
        raise UserError("Where is NL-RX? Give --metadata nl_rx=FOLDER, or set LLM_JEPA_NL_RX.")
    rows = [
        {
            "group": group.id,
            "wording": wording,
            "user": last_text(prompt),
            "gold": group.answer,
            "degenerate": group.extra["degenerate"],
        }
        for group in TASK.load(folder).groups
        for wording, prompt in zip(group.wordings, group.prompts, strict=True)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Scores of one wording; for figures of groups the whole sample, which the aggregations below put together."""
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
