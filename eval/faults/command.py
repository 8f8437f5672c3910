"""The command `python -m eval.faults`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.core.files import write_json

from ..command import ArgumentParser, check_writable, one_line_errors, seed_number, whole
from ..provenance import environment
from . import __doc__ as about
from . import caches, changes, damage, forgeries, hostile, kills, machine, ranks, stops, streams
from .cases import SKIPPED, SURVIVED, Case, Outcome, run_cases
from .figures import summary, table

PARTS = {
    "kills": kills.cases,
    "damaged": damage.cases,
    "forged": forgeries.cases,
    "signals": stops.cases,
    "machine": machine.cases,
    "changed": changes.cases,
    "ranks": ranks.cases,
    "caches": caches.cases,
    "streams": streams.cases,
    "hostile": hostile.cases,
}
# For every process that is forked: one thread each, no network.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1",
    # Forked processes leave without the locks that tqdm made in them.
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
}  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, more = str(about).partition("\n\n")
    parser = ArgumentParser(
        prog="python -m eval.faults",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a sample of every kind: under a minute on two cores")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="KIND", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file for the outcome of every fault")
    parser.add_argument("--workers", type=whole(1), default=2, help="faults at a time (default: 2)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the random instants")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the runs, and the folders of failures, here")
    options = parser.parse_args(argv)
    if not hasattr(os, "fork"):
        raise UserError("eval.faults needs a system that forks processes, such as Linux.")
    check_writable(options.out)
    return options


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Inject every fault. Returns the result file's content."""
    began = time.monotonic()
    journal = Journal(options)
    outcomes: list[tuple[Case, Outcome]] = []
    seconds = {}
    for name in options.only or PARTS:
        since = time.monotonic()
        found = list(PARTS[name](work, seed=options.seed, quick=options.quick))
        outcomes += run_part(name, found, journal, work, options.workers)
        seconds[name] = round(time.monotonic() - since, 1)
    journal.remove()
    return {
        "environment": {**environment(), "safetensors": version("safetensors"), "numpy": version("numpy")},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "config": {"quick": options.quick, "parts": list(options.only or PARTS), "seed": options.seed},
        "seconds": {**seconds, "all": round(time.monotonic() - began, 1)},
        "summary": summary(outcomes),
        "failures": {
            case.key: [outcome.verdict, outcome.note.replace(f"{work}/", "")]
            for case, outcome in outcomes
            if outcome.verdict not in (SURVIVED, SKIPPED)
        },
        "faults": {case.key: outcome.verdict for case, outcome in outcomes},
    }


def run_part(name: str, found: list[Case], journal: Journal, work: Path, workers: int) -> list[tuple[Case, Outcome]]:
    """Run the cases that the journal does not have. Prints every failure, and a line every ten seconds."""
    outcomes = [(case, journal.before[case.key]) for case in found if case.key in journal.before]
    left = [case for case in found if case.key not in journal.before]
    said = time.monotonic()
    for case, outcome in run_cases(left, work / "cases", workers=workers):
        outcomes.append((case, outcome))
        journal.add(case, outcome)
        if outcome.verdict not in (SURVIVED, SKIPPED):
            print(f"  {outcome.verdict}: {case.key}: {' '.join(outcome.note.split())[:300]}", flush=True)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"  {name}: {len(outcomes)} of {len(found)}", flush=True)
    survived = sum(outcome.verdict == SURVIVED for _, outcome in outcomes)
    skipped = sum(outcome.verdict == SKIPPED for _, outcome in outcomes)
    print(f"{name}: {survived} of {len(outcomes) - skipped} survived", flush=True)
    return outcomes


class Journal:
    """The outcomes so far, next to the result file, so that a stopped command goes on."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._path = options.out.with_suffix(".partial.jsonl") if options.out else None
        self.before: dict[str, Outcome] = {}
        head = {"commit": environment()["commit"], "quick": options.quick, "seed": options.seed}
        if self._path is None:
            return
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        if lines and json.loads(lines[0]) == head:
            entries = [json.loads(line) for line in lines[1:] if line.endswith("]")]  # the last may be cut
            self.before = {key: Outcome(verdict, note) for key, verdict, note in entries}
            print(f"Going on after {len(self.before)} faults of {self._path}.")
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(head) + "\n")

    def add(self, case: Case, outcome: Outcome) -> None:
        if self._path is not None:
            with open(self._path, "a") as file:
                file.write(json.dumps([case.key, *outcome]) + "\n")

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _preload() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload([f"{__package__}.preload"])


@one_line_errors("eval.faults")
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    os.environ.update(ENVIRONMENT)
    _preload()
    work = (options.work or Path(tempfile.mkdtemp(prefix="llm_jepa_faults_"))).absolute()
    try:
        result = run(options, work)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print(table(result["summary"]))
    if options.out is not None:
        write_json(options.out, result)
    all_kinds = result["summary"]["all"]
    print(f"{result['seconds']['all']:.0f} s", file=sys.stderr)
    return 0 if all_kinds["survived"] == all_kinds["injected"] else 1
