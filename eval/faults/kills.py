"""Kills: a run that is killed at any moment of a save ends, with the same command, as the run that was not killed.

See `states` for how a run is killed. Some runs are killed in earnest, at random instants.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from llm_jepa.core.checkpoint import RUN_FILE, checkpoints
from llm_jepa.core.publish import MANIFEST

from .cases import LOST, Case, Outcome
from .runs import RESUME, Run, command, in_child, judge, train, undisturbed
from .states import add_torn_files, watch

PHASES = ("first", "later", "final")
# name of the run -> every which state is tried
STATES = {"lm": 1, "vl": 1, "lm, best": 3, "lm, ema": 3, "lm, lora": 3, "lm, no checkpoint": 1, "vl, best": 3}
RANDOM_INSTANTS = 10


def cases(work: Path, *, seed: int, quick: bool) -> Iterator[Case]:
    """Record the runs in `work`, and yield a case for every state."""
    for name, stride in STATES.items() if not quick else (("lm", 40), ("vl", 40)):
        run = undisturbed(name, work)
        states = recorded(name, run, work)
        for phase in PHASES:
            for state in [state for state in states if phase_of(state) == phase][::stride]:
                yield Case(f"kill in the {phase} save", f"{name}, {state.name}", resume_killed, (state, run))
    for name in () if quick else ("lm", "vl"):
        run = undisturbed(name, work)
        for number in range(RANDOM_INSTANTS):
            share = random.Random(f"{seed} {name} {number}").random()
            yield Case("kill at a random instant", f"{name}, {share:.3f} of the run", kill_at_random, (run, share))


def recorded(name: str, run: Run, work: Path) -> list[Path]:
    """The states of a run before each of its file events, and torn ones. They are made once in `work`."""
    states = work / "states" / run.recipe.parent.name
    if not states.exists():
        in_child(_record, run, states)
    return sorted(states.iterdir())


def phase_of(state: Path) -> str:
    """Which save was cut: the first, a later one, the final one."""
    sealed = [path.name for path in checkpoints(state) if (path / MANIFEST).exists()]
    if "checkpoint-6" in sealed or _saves_no_checkpoint(state):
        return "final"
    return "later" if sealed else "first"


def _saves_no_checkpoint(state: Path) -> bool:
    return state.parent.name == "lm-no-checkpoint"


def resume_killed(folder: Path, state: Path, run: Run, *, is_resumed: bool = True) -> Outcome:
    """Give the state's files to the same command. A run that has not written RUN_FILE is started, not resumed."""
    shutil.copytree(state, folder / "run", symlinks=True)
    is_new = not (state / RUN_FILE).exists()
    said = train(run, folder, *(() if is_new or not is_resumed else RESUME))
    outcome = judge(said, folder / "run", run.whole)
    has_saved = any(state.glob(f"checkpoint-*/{MANIFEST}")) or (state / MANIFEST).exists()
    if said.code == 0 and not is_new and not has_saved and "starting at step 0" not in said.out:
        return Outcome(LOST, "it started at step 0 and did not say so")
    return outcome


def kill_at_random(folder: Path, run: Run, share: float) -> Outcome:
    """Kill the process after a share of the time that the run takes, then run the same command again."""
    seconds = command(["train", str(run.recipe), "--output_dir", "timed"], folder).seconds
    train(run, folder, meanwhile=partial(kill_after, seconds * share, signal.SIGKILL))
    is_new = not (folder / "run" / RUN_FILE).exists()
    return judge(train(run, folder, *(() if is_new else RESUME)), folder / "run", run.whole)


def kill_after(seconds: float, number: int, process: int) -> None:
    time.sleep(seconds)
    os.kill(process, number)  # its parent has not waited for it, so the id is still its own


# -- recording --------------------------------------------------------------------------------------------------------


def _record(run: Run, states: Path) -> None:
    folder = states.with_name(f"{states.name}.run")
    taken = states.with_name(f"{states.name}.taken")
    for path in (folder, taken):
        path.mkdir(parents=True)
    said = train(run, folder, before=partial(watch, folder / "run", taken))
    assert said.code == 0, said.err
    add_torn_files(taken)
    taken.rename(states)
