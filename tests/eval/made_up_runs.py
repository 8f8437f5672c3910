"""Result files of `eval.experiments.replication` with a known truth, in the schema of real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval.experiments.replication.planned_analysis import METRICS
from eval.experiments.replication.runs import planned_runs, settings_of

START = {"start": "smollm2-135m-instruct", "start_sha256": "b5" * 32}


def write(plan: dict[str, Any], out: Path, truth: Mapping[str, Mapping[str, float]], *, lines: int = 300) -> None:
    """Write every run of the plan. truth: arm, or "arm wording" -> the shares `starts`, `stops` and `ends`.

    A line starts right with the share `starts`, and then contains the gold. It stops with the share `stops`. If it does
    both, it is exact with the share `ends`. The lines differ in difficulty, the same in all runs. The arms of a seed
    share most of their chance, as runs do that share initial weights and the order of the rows.
    """
    for cell, setup in planned_runs(plan, "", out):
        bits = {}
        for wording in setup.wordings:
            shares = truth.get(f"{cell.arm} {wording}", truth[cell.arm])
            bits[wording] = {
                metric: "".join("01"[int(bit)] for bit in of_metric)
                for metric, of_metric in _bits(shares, f"{cell.out.stem} {wording}", cell.seed, lines).items()
            }
        metrics = {w: {metric: of.count("1") / lines for metric, of in bits[w].items()} for w in bits}
        run = {
            **settings_of(cell, setup),
            **START,
            "lines": lines,
            "metrics": {wording: {**of, "undecided": 0.0} for wording, of in metrics.items()},
            "bits": {wording: {**of, "undecided": "0" * lines} for wording, of in bits.items()},
            "correct": {wording: of["equivalent"] for wording, of in bits.items()},
            "cost": {"steps": cell.steps, "tokens": 100_000 + cell.seed, "process_seconds": 1.0, "log": []},
            "data_sha256": plan.get("data_sha256", {}),
            "environment": {"commit": "ab" * 20, "torch": "2", "transformers": "5", "uncommitted_changes": False},
            "seconds": 1.0,
        }
        cell.out.parent.mkdir(parents=True, exist_ok=True)
        cell.out.write_text(json.dumps(run))


def _bits(shares: Mapping[str, float], run: str, seed: int, lines: int) -> dict[str, np.ndarray]:
    difficulty = np.random.default_rng(7).uniform(size=lines)
    of_seed, of_run = np.random.default_rng(10 + seed), np.random.default_rng(list(run.encode()))

    def happens(share: float, base: np.ndarray) -> np.ndarray:
        return (base + of_run.normal(scale=0.02, size=lines)) % 1.0 < share

    starts = happens(shares["starts"], 0.9 * difficulty + 0.1 * of_seed.uniform(size=lines))
    stops = happens(shares["stops"], of_seed.uniform(size=lines))
    exact = starts & stops & happens(shares["ends"], of_seed.uniform(size=lines))
    bits = {"exact": exact, "stop_rate": stops, "startswith": starts, "contains": starts, "equivalent": exact}
    assert bits.keys() == set(METRICS)
    return bits
