"""Requests to stop: SIGTERM, SIGUSR1 and SIGINT at random instants. The run saves, says how to go on, exits with 75 or
130, and the resumed run is the undisturbed one."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from llm_jepa.core.checkpoint import RUN_FILE, newest_sealed
from llm_jepa.core.signals import INTERRUPTED, TRY_AGAIN

from .cases import LOST, Case, Outcome
from .kills import kill_after
from .runs import RESUME, Run, Said, ended_badly, is_one_line, judge, train, undisturbed

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
INSTANTS = 24


def cases(work: Path, *, seed: int, quick: bool) -> Iterator[Case]:
    """Random instants of the whole command, and of its evaluations."""
    for name in ("lm, long",) if quick else ("lm, long", "vl, long"):
        run = undisturbed(name, work)
        for kind in SIGNALS:
            for number in range(2 if quick else INSTANTS // 2):
                share = random.Random(f"{seed} {name} {kind} {number}").random()
                yield Case(kind, f"{name}, {share:.3f} of the run", stopped, (run, kind, share))
            for number in range(1 if quick else 5):
                pause = random.Random(f"{seed} {name} {kind} evaluation {number}").random() * 0.02
                yield Case(
                    f"{kind} in an evaluation", f"{name}, {pause:.4f} s", stopped_in_evaluation, (run, kind, pause)
                )


def stopped(folder: Path, run: Run, name: str, share: float) -> Outcome:
    """Send a signal after a share of the time that a run takes from its first step, or before it."""
    seconds = train(run, folder).seconds
    (folder / "run").rename(folder / "timed")
    began = folder / "began"  # before the command begins nobody can listen
    said = train(run, folder, before=began.touch, meanwhile=partial(_when, began, seconds * share, name))
    return _judge_stop(said, folder, run, name)


def stopped_in_evaluation(folder: Path, run: Run, name: str, pause: float) -> Outcome:
    """Send a signal a random moment after the second evaluation has begun."""
    began = folder / "began"
    said = train(run, folder, before=partial(_mark_evaluation, began), meanwhile=partial(_when, began, pause, name))
    if not began.exists():
        return Outcome(LOST, "the suite failed: there was no evaluation")
    return _judge_stop(said, folder, run, name)


def _judge_stop(said: Said, folder: Path, run: Run, name: str) -> Outcome:
    if said.code == 0:  # the request came in the final save, or later
        return judge(said, folder / "run", run.whole)
    bad = ended_badly(said)
    if bad is not None:
        return bad
    expected = INTERRUPTED if name == "SIGINT" else TRY_AGAIN
    if not is_one_line(said, (expected,)):
        return Outcome(LOST, f"exit {said.code}, not {expected}: {said.err[-300:]}")
    saved = newest_sealed(folder / "run")
    promised = re.search(r"Saved last: (\S+)\. Continue:", said.lines[0])
    if (saved is None) != (promised is None):
        return Outcome(LOST, f"saved {saved}, but it says: {said.lines[0]}")
    has_begun = '"loss"' in "".join(path.read_text() for path in (folder / "run").glob("*/trainer_state.json"))
    if saved is None and has_begun:
        return Outcome(LOST, "a step was made and not saved")
    words = RESUME if (folder / "run" / RUN_FILE).exists() else ()
    return judge(train(run, folder, *words), folder / "run", run.whole, is_exact=False)


def _mark_evaluation(began: Path) -> None:
    """Make a file as soon as the trainer evaluates after step 3."""
    from llm_jepa.core.trainer import JEPATrainer

    evaluate = JEPATrainer.evaluation_loop

    def marked(self: JEPATrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step > 3:
            began.touch()
        return evaluate(self, *args, **kwargs)  # type: ignore[arg-type]

    JEPATrainer.evaluation_loop = marked  # type: ignore[method-assign]


def _when(path: Path, pause: float, name: str, process: int) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.0005)
    kill_after(pause, signal.Signals[name], process)
