"""One of two processes (gloo, the real command) is killed, frozen, or raises an error in the middle of training.

The job ends within `ddp_timeout` and 10 seconds with one line, every checkpoint is whole, and the resumed job is the
undisturbed one. A job that is resumed on another number of processes must refuse and name it, or end as before.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from llm_jepa.core.checkpoint import RUN_FILE, checkpoints, fault

from .cases import HUNG, LOST, SURVIVED, TRACEBACK, Case, Outcome
from .runs import (
    RESUME,
    Run,
    Said,
    command,
    difference,
    ended_badly,
    in_child,
    is_one_line,
    judge,
    train,
    undisturbed,
    write_recipe,
)

DDP_TIMEOUT_S, MORE_S = 15, 10
ROOT = Path(__file__).parents[2]
# Long enough for a fault after the first checkpoint.
JOB = {
    "max_steps": 60, "save_steps": 20, "save_total_limit": 2, "ddp_timeout": DDP_TIMEOUT_S, "diagnostics_pairs": 0,
    "per_device_train_batch_size": 2,
}  # fmt: skip
# Any signal that nobody listens to; in the rank it becomes an error.
RAISING = """
import signal

def fail(number, frame):
    raise KeyError("a bug")

signal.signal(signal.SIGUSR2, fail)
"""
FAULTS = {
    "lost rank": signal.SIGKILL,
    "frozen rank": signal.SIGSTOP,
    "raising rank": signal.SIGUSR2,
}
# kind, family, rank, whether the job is run again to its end
CASES = (
    ("lost rank", "lm", 1, True), ("lost rank", "vl", 0, False), ("frozen rank", "lm", 1, True),
    ("frozen rank", "lm", 0, False), ("frozen rank", "vl", 1, False), ("raising rank", "lm", 1, False),
)  # fmt: skip


def cases(work: Path, *, seed: int, quick: bool) -> Iterator[Case]:
    for kind, family, rank, is_resumed in () if quick else CASES:
        job = _undisturbed(family, work)
        yield Case(kind, f"{family}, rank {rank}", disturbed, (kind, job, rank, is_resumed), 400)
    for family in () if quick else ("lm", "vl"):
        two, one = _undisturbed(family, work), undisturbed(family, work)
        yield Case("changed world size", f"{family}, 2 -> 1", resized, (two, 20, 1))
        yield Case("changed world size", f"{family}, 1 -> 2", resized, (one, 2, 2), 240)


def resized(folder: Path, job: Run, step: int, processes: int) -> Outcome:
    """Resume after the checkpoint of a step on another number of processes."""
    checkpoint = f"checkpoint-{max(int(path.name.rpartition('-')[2]) for path in checkpoints(job.whole)) - step}"
    (folder / "run").mkdir()
    shutil.copy(job.whole / RUN_FILE, folder / "run")
    shutil.copytree(job.whole / checkpoint, folder / "run" / checkpoint)
    said = (_launch if processes > 1 else train)(job, folder, *RESUME)
    if (bad := ended_badly(said)) is not None:
        return bad
    if is_one_line(said):
        is_named = "Cannot resume" in said.lines[0] and "num_processes" in said.lines[0]
        return Outcome(SURVIVED) if is_named else Outcome(LOST, said.lines[0])
    return judge(said, folder / "run", job.whole, is_exact=False)


def _undisturbed(family: str, work: Path) -> Run:
    folder = work / "jobs" / family
    job = Run(folder / "recipe.yaml", folder / "run")
    if not job.whole.exists():
        in_child(_launch_undisturbed, family, folder)
    return job


def _launch_undisturbed(family: str, folder: Path) -> None:
    write_recipe(family, folder, **JOB)
    said = _launch(Run(folder / "recipe.yaml", folder), folder)
    assert said.code == 0, said.err


def _launch(job: Run, folder: Path, *words: str, **options: object) -> Said:
    arguments = ["train", str(job.recipe), "--output_dir", "run", "--launch", "cpu", "--num_processes", "2", *words]
    return command(arguments, folder, before=partial(_prepare, folder), limit_s=180, **options)  # type: ignore[arg-type]


def _prepare(folder: Path) -> None:
    """The environment of the ranks: our code, and what turns SIGUSR2 into an error."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(RAISING)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")])


def disturbed(folder: Path, kind: str, job: Run, rank: int, is_resumed: bool) -> Outcome:
    times: list[float] = []
    said = _launch(job, folder, meanwhile=partial(_disturb, folder / "run", FAULTS[kind], rank, times))
    seconds = time.monotonic() - times[0] if times else 0
    if said.code is None:
        return Outcome(HUNG, f"{seconds:.0f} s after the fault")
    if not times or said.code == 0:
        return Outcome(LOST, f"the suite failed: the job ended before the fault: {said.err[-300:]}")
    if "Traceback (most recent call last)" in said.err or said.code < 0:
        return Outcome(TRACEBACK, said.err[-400:])
    if len(said.lines) != 1:
        return Outcome(LOST, f"{len(said.lines)} lines: {said.err[-400:]}")
    if seconds > DDP_TIMEOUT_S + MORE_S:
        return Outcome(HUNG, f"it ended, but {seconds:.0f} s after the fault")
    saved = [path for path in checkpoints(folder / "run") if fault(path, num_processes=2) is None]
    if not saved or len(saved) != len(checkpoints(folder / "run")):
        return Outcome(LOST, "a checkpoint is not whole")
    if not is_resumed:
        return Outcome(SURVIVED)
    again = _launch(job, folder, *RESUME)
    if again.code != 0:
        return Outcome(LOST, f"not resumed, exit {again.code}: {again.err[-300:]}")
    wrong = difference(folder / "run", job.whole)
    return Outcome(SURVIVED) if wrong is None else Outcome(LOST, f"resumed, but {wrong}")


def _disturb(run: Path, number: int, rank: int, times: list[float], process: int) -> None:
    """Wait for the first checkpoint, then send a rank a signal."""
    end = time.monotonic() + 120
    while not checkpoints(run) and time.monotonic() < end:
        time.sleep(0.02)
    for child in psutil.Process(process).children(recursive=True):
        try:
            is_rank = child.environ().get("RANK") == str(rank) and "llm_jepa.cli" in child.cmdline()
        except psutil.Error:
            continue
        if is_rank:
            os.kill(child.pid, number)
            times.append(time.monotonic())
            return
