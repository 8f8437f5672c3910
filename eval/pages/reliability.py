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
SOAK = RESULTS / "faults" / "soak.json"
MUTANTS = RESULTS / "faults" / "mutants.json"
SAVE_COST = RESULTS / "save_cost" / "cpu.json"
MINUTES = 20  # target for the whole suite on two cores


def scorecard(path: Path = FAULTS, save_cost: Path = SAVE_COST, soak: Path = SOAK, mutants: Path = MUTANTS) -> str:
    """Markdown: a row for each kind of fault, what was skipped, and every fault that did not survive.

    Then the cost of a save, the growth of a long run, and how many wrong lines the tests find.
    """
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
        minutes_target=MINUTES,
        config=result["config"],
        machine=result["machine"],
        environment=result["environment"],
        save=_save_cost(save_cost),
        soak=_read(soak),
        mutants=_mutants(mutants),
    )


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _save_cost(path: Path) -> dict[str, Any] | None:
    """Times of a save of ours, in saves of the stock Trainer: waiting, with the work of the next steps, complete."""
    result = _read(path)
    if result is None:
        return None
    summary = result["summary"]
    rows = [
        [
            f"{case['model']}; {case['bytes']['ours'] / 1e6:.1f} MB",
            *("{:.2f}".format(summary[f"{case['case']}_{part}"]) for part in ("wait", "with_work", "complete")),
        ]
        for case in result["cases"]
    ]
    return {
        "table": markdown_table(["saved", "training waits", "with the next steps", "complete"], rows, align="lrrr"),
        "wait": summary["lm_large_wait"],
        "commit": result["environment"]["commit"][:7],
    }


def _mutants(path: Path) -> dict[str, Any] | None:
    """A table of the wrong lines that the tests of each module found."""
    result = _read(path)
    if result is None:
        return None
    rows = [
        [
            f"`{name}`", f"{counts['killed']} of {counts['mutants']}",
            f"{100 * counts['killed'] / counts['mutants']:.1f}", str(len(counts["equivalent"])),
            "holds" if counts["killed"] >= 0.9 * counts["mutants"] else "MISSED",
        ]
        for name, counts in result["modules"].items()
    ]  # fmt: skip
    header = ["module", "found", "%", "others that change nothing", "target: 90 %"]
    commits = {counts["environment"]["commit"][:7] for counts in result["modules"].values()}
    return {"table": markdown_table(header, rows, align="lrrrl"), "commits": ", ".join(sorted(commits))}
