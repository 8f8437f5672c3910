"""Claim: whatever a kill leaves in output_dir, the same command ends with the run that was not killed.

`eval.faults.kills` makes the states that kills leave, and `python -m eval.faults --only kills` tries all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.faults.cases import SURVIVED, Case, run_cases
from eval.faults.kills import PHASES, phase_of, recorded, resume_killed
from eval.faults.runs import RESUME, Run, train, undisturbed
from tests.ranks import start


def lost(run: Run, states: list[Path], folder: Path, *, is_resumed: bool = True) -> list[str]:
    """The states from which the command does not end as the undisturbed run, and why."""
    cases = [Case("kill", state.name, _resume, (state, run, is_resumed)) for state in states]
    return [
        f"{case.name}: {outcome.note}"
        for case, outcome in run_cases(cases, folder, workers=1)
        if outcome.verdict != SURVIVED
    ]


def _resume(folder, state, run, is_resumed):
    return resume_killed(folder, state, run, is_resumed=is_resumed)


@pytest.mark.parametrize("name", ["lm", "vl"])
def test_a_sample_of_kills(name, tmp_path):
    run = undisturbed(name, tmp_path)
    states = recorded(name, run, tmp_path)
    phases = {phase: [state for state in states if phase_of(state) == phase] for phase in PHASES}
    assert all(len(states) > 10 for states in phases.values()), {k: len(v) for k, v in phases.items()}
    assert not lost(run, phases["first"][len(phases["first"]) // 3 :: 40], tmp_path / "first", is_resumed=False)
    sample = [*phases["first"][5::50], *phases["later"][5::30], phases["final"][9], phases["final"][-4]]
    assert not lost(run, sample, tmp_path / "others")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run = undisturbed("lm", tmp_path)
    process = start(_train_twice, run, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert "already finished (6 steps)" in (tmp_path / "said").read_text()


def _train_twice(run, folder):
    train(run, folder)
    said = train(run, folder, *RESUME)
    assert said.code == 0
    (folder / "said").write_text(said.out)
