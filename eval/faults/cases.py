"""One fault is a case: a function that injects it into a folder of its own, in a process of its own, and judges what
came of it. `run_cases` runs many of them, a few at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

# The first is what must come of every fault; the others are ways to fail.
SURVIVED = "survived"  # the result is that of the undisturbed run, or one line says what is wrong
SILENT = "silent"  # exit 0, another result, and nothing said
TRACEBACK = "traceback"  # an error that nobody foresaw, or the process was aborted
HUNG = "hung"
EXECUTED = "executed"  # code of a stranger ran
WROTE = "wrote"  # a file elsewhere was changed, for example through a link
LOST = "lost"  # it ended in one line, but not as promised: work that must survive did not, or a wrong exit code
SKIPPED = "skipped"  # not injected, for example for lack of the right to mount a disk
VERDICTS = (SURVIVED, SILENT, TRACEBACK, HUNG, EXECUTED, WROTE, LOST)


class Outcome(NamedTuple):
    """What came of a fault. note: why, if it is not `SURVIVED`."""

    verdict: str
    note: str = ""


class Case(NamedTuple):
    """function: called as function(folder, *arguments) in a new process, with an empty folder.

    It returns an outcome, or, if it tries many things one after the other, their names and outcomes.
    """

    kind: str
    name: str
    function: Callable[..., Outcome | list[tuple[str, Outcome]]]
    arguments: tuple[Any, ...] = ()
    limit_s: float = 120.0

    @property
    def key(self) -> str:
        return f"{self.kind}: {self.name}"


def run_cases(cases: Sequence[Case], work: Path, *, workers: int) -> Iterator[tuple[Case, Outcome]]:
    """Run cases, `workers` at a time, and yield each with its outcome as soon as it ends.

    The folder of a case that did not survive is kept in `work`.
    """
    waiting = list(reversed(cases))
    running: dict[int, tuple[Case, BaseProcess, Path, float]] = {}
    number = 0
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                case, number = waiting.pop(), number + 1
                folder = work / f"{case.kind.replace(' ', '-')}-{number}"
                folder.mkdir(parents=True)
                process = start(_run_case, case, folder)
                running[process.sentinel] = case, process, folder, time.monotonic() + case.limit_s
            wait(list(running), timeout=0.5)
            for sentinel, (case, process, folder, end) in list(running.items()):
                is_late = time.monotonic() > end
                if process.is_alive() and not is_late:
                    continue
                del running[sentinel]
                if process.is_alive():
                    _end(process)
                    ended = [(case, Outcome(HUNG, f"not ended after {case.limit_s:.0f} s"))]
                else:
                    ended = _outcomes(case, process, folder)
                _clean(folder, [outcome for _, outcome in ended])
                yield from ended
    finally:
        for _, process, _, _ in running.values():
            _end(process)


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Call a function of a module in a new process, which is forked from one that has imported everything."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process


def _run_case(case: Case, folder: Path) -> None:
    os.setsid()  # a group, so that all of its processes can be ended together
    log = os.open(folder / "case.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        outcome = case.function(folder, *case.arguments)
    except BaseException:
        outcome = Outcome(LOST, "the suite failed: " + traceback.format_exc()[-800:])
    (folder / "outcome.json").write_text(json.dumps(outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _outcomes(case: Case, process: BaseProcess, folder: Path) -> list[tuple[Case, Outcome]]:
    try:
        found = json.loads((folder / "outcome.json").read_text())
    except FileNotFoundError:
        return [(case, Outcome(LOST, f"the suite failed: its process ended with {process.exitcode}"))]
    if isinstance(found[0], str):
        return [(case, Outcome(*found))]
    return [(case._replace(name=name), Outcome(*outcome)) for name, outcome in found]


def _end(process: BaseProcess) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL) if process.pid else None
    process.kill()  # it may not have made its group yet
    process.join()


def _clean(folder: Path, outcomes: list[Outcome]) -> None:
    for disk in folder.glob("disk*"):
        if os.path.ismount(disk):
            subprocess.run(["umount", "-l", disk], capture_output=True)
    if all(outcome.verdict in (SURVIVED, SKIPPED) for outcome in outcomes):
        shutil.rmtree(folder, ignore_errors=True)
