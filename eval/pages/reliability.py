"""The page of reliability: what came of every injected fault, and the cost of a safe save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..faults.cases import VERDICTS
from ..faults.figures import ALL, TARGETS, verdict_on
from ..figures.tables import markdown_table
from . import RESULTS, render

FAULTS = RESULTS / "faults" / "cpu.json"
SAVE_COST = RESULTS / "save_cost" / "cpu.json"


def scorecard(path: Path = FAULTS, save_cost: Path = SAVE_COST) -> str:
    """Markdown: a row for each kind of fault, what was skipped, and every fault that did not survive."""
    result = json.loads(path.read_text())
    kinds = result["summary"]
    columns = [name for name in VERDICTS if name != "survived"]
    rows = []
    for kind, counts in sorted(kinds.items(), key=lambda item: (item[0] == "all", item[0].lower())):
        target = TARGETS.get(kind, ALL)
        figures = [f"{counts['survived']} of {counts['injected']}", *(str(counts[name]) for name in columns)]
        rows.append([kind, *figures, target.text, verdict_on(counts), target.before])
    header = ["fault", "survived", *columns, "target", "", "before"]
    return render(
        "reliability",
        table=markdown_table(header, rows, align="lr" + "r" * len(columns) + "lll"),
        skipped=kinds["all"]["skipped"],
        failures=result["failures"],
        injected=kinds["all"]["injected"],
        minutes=result["seconds"]["all"] / 60,
        config=result["config"],
        machine=result["machine"],
        environment=result["environment"],
        save=_save_cost(save_cost),
    )


def _save_cost(path: Path) -> dict[str, Any] | None:
    """How long training waits for a save of ours, in saves of the stock Trainer, and the bound."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    return {"wait": result["summary"]["lm_large_wait"], "commit": result["environment"]["commit"][:7]}
