"""One run (a cell) and the plan's two series of runs: `select` on validation, `confirm` on test."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_jepa import UserError
from llm_jepa.core.files import write_json
from llm_jepa.core.json_files import read_json
from llm_jepa.core.strict_yaml import dump_yaml

from ...provenance import environment, weights_sha256
from .. import small_runs
from ..small_runs import side_by_side
from . import PLAN, RESULTS
from .arms import Settings, train
from .data import WORDINGS, languages_of_test_lines, prepared, prompts_of
from .space import uses_of_the_space


@dataclass(frozen=True)
class Cell:
    """One run: an arm with its settings, the part of the data to judge it on, and its result file."""

    arm: str
    seed: int
    settings: Settings
    part: str
    out: Path


def run_cell(cell: Cell, work: Path, plan: dict[str, Any]) -> str:
    """Train and judge one cell, unless its result file exists. Returns a line for the log."""
    if cell.out.exists():
        settings = {"arm": cell.arm, "seed": cell.seed, "part": cell.part, "settings": asdict(cell.settings)}
        small_runs.refuse_other_settings(cell.out, settings)
    else:
        write_json(cell.out, _train_and_judge(cell, work, plan))
    result = read_json(cell.out, is_finite=False)
    turk, synth = (result["metrics"][wording] for wording in ("turk", "synth"))
    return (
        f"{cell.out.stem:50s} turk equal {100 * turk['equivalent']:5.1f} exact {100 * turk['exact']:5.1f} "
        f"synth equal {100 * synth['equivalent']:5.1f}  {result['cost']['steps']} steps, "
        f"{result['cost']['tokens']:,} tokens, {result['seconds']:.0f} s"
    )


def _train_and_judge(cell: Cell, work: Path, plan: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    started = time.perf_counter()
    data = prepared(work)
    lines = data.part(cell.part)
    model, tokenizer, cost = train(cell.arm, cell.seed, cell.settings, work, plan)
    prompts = {wording: prompts_of(lines, wording) for wording in WORDINGS}
    judged = small_runs.judge(model, tokenizer, prompts, [line.regex for line in lines])
    space = None
    if cell.part == "test" and cell.arm in plan["rerank"]["arms"]:
        few = lines[: plan["rerank"]["lines"]]
        space = uses_of_the_space(cell.arm, cell.seed, model, tokenizer, few, cell.settings.readout, work, plan)
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "part": cell.part,
        "lines": len(lines),
        "settings": asdict(cell.settings),
        "metrics": judged.metrics,
        "correct": judged.correct,
        "space": space,
        "cost": cost,
        "base_sha256": weights_sha256(work / "base"),
        "data_sha256": data.data_sha256,
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def select(work: Path, plan: dict[str, Any], jobs: int) -> None:
    """Try the plan's grid stage by stage. Each stage keeps its best settings; print the last ones."""
    settings = Settings(**plan["start"])
    for stage in plan["grid"]:
        cells = _cells_of_stage(stage, settings, plan["selection_seeds"])
        flat = list(itertools.chain.from_iterable(cells.values()))
        for line in side_by_side(run_cell, flat, jobs, work, plan):
            print(line, flush=True)
        means = {option: statistics.mean(map(_turk_equivalent, group)) for option, group in cells.items()}
        for option, mean in means.items():
            values = {name: getattr(option, name) for name in stage["values"]}
            print(f"{stage['arm']} {values}: turk equal {100 * mean:.1f}")
        settings = max(means, key=lambda option: means[option])
    print("settled:\n" + dump_yaml(asdict(settings)))


def _cells_of_stage(stage: dict[str, Any], settings: Settings, seeds: list[int]) -> dict[Settings, list[Cell]]:
    """The cells of a stage of the grid: all combinations of its values, each with every seed."""
    cells: dict[Settings, list[Cell]] = {}
    for values in itertools.product(*stage["values"].values()):
        changes = dict(zip(stage["values"], values, strict=True))
        option = replace(settings, **changes)
        name = "-".join([stage["arm"], *(f"{key}={value}" for key, value in changes.items())])
        cells[option] = [
            Cell(stage["arm"], seed, option, "validation", RESULTS / "selection" / f"{name}-seed{seed}.json")
            for seed in seeds
        ]
    return cells


def _turk_equivalent(cell: Cell) -> float:
    share: float = read_json(cell.out, is_finite=False)["metrics"]["turk"]["equivalent"]
    return share


def confirm(work: Path, plan: dict[str, Any], jobs: int) -> None:
    """Run all arms, seed by seed: if you stop early, the finished seeds are whole."""
    if plan["settled"] is None:
        raise UserError(f"{PLAN.name} has no `settled` settings yet; run select, write them there and commit the plan.")
    settings = Settings(**plan["settled"])
    cells = [
        Cell(arm, seed, settings, "test", RESULTS / "confirm" / f"{arm}-seed{seed}.json")
        for seed in plan["seeds"]
        for arm in plan["arms"]
    ]
    write_json(RESULTS / "test_lines.json", languages_of_test_lines(work))
    for line in side_by_side(run_cell, cells, jobs, work, plan):
        print(line, flush=True)
