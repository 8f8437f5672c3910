"""The soak: what it calls growth, and what it calls a leftover."""

from __future__ import annotations

import pytest

from eval.faults.soak import BOUND, Observed, Sample, faults_of, figures_of, main, names_of


def observed(memory, **left):
    """Two samples for each tenth; the first tenth is large, as while a model is loaded."""
    samples = [Sample(10**9, 9, 9, 3)] * 2 + [Sample(memory(i), 4, 6, 0) for i in range(18)]
    return Observed(samples, 5.0, **{"processes_left": 0, "temporary_files_left": [], **left})


def test_growth_is_from_the_second_tenth_to_the_last():
    """From 1000 and 1000 (median 1000) to 1010 and 1030 (1020): 2 %, which is the bound."""
    memory = {0: 1000, 1: 1000, 16: 1010, 17: 1030}
    figures = figures_of(observed(lambda i: memory.get(i, 5000)))
    assert figures["memory_growth"] == pytest.approx(BOUND)
    assert figures["early"] == {"memory": 1000, "descriptors": 4, "threads": 6, "children": 0}
    assert figures["memory_of_each_tenth"] == [10**9, 1000, *[5000] * 7, 1020] and figures["seconds"] == 5
    assert faults_of(figures) == ["memory grew by 2.0 %"]
    assert faults_of(figures_of(observed(lambda i: 1000 + i))) == []


def test_what_is_left_or_grows_is_a_fault():
    figures = figures_of(observed(lambda i: 1000, processes_left=1, temporary_files_left=["a"]))
    figures["late"] |= {"descriptors": 5, "threads": 7, "children": 1}
    assert faults_of({**figures, "other_files": ["b"]}) == [
        "descriptors grew from 4 to 5", "threads grew from 6 to 7", "children grew from 0 to 1",
        "processes left: 1", "temporary files left: ['a']", "other files: ['b']",
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="more --steps"):
        figures_of(Observed([Sample(1, 1, 1, 0)] * 9, 2.0, 0, []))


def test_checkpoints_are_compared_whatever_their_steps(tmp_path):
    for name in ("a/checkpoint-300/x", "a/checkpoint-200/x", "b/checkpoint-10000/x", "b/checkpoint-9900/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
    assert names_of(tmp_path / "a") == names_of(tmp_path / "b") == {"checkpoint 0/x", "checkpoint 1/x"}
    (tmp_path / "b" / ".stage-1").mkdir()
    (tmp_path / "b" / ".stage-1" / "y").touch()
    assert names_of(tmp_path / "b") - names_of(tmp_path / "a") == {".stage-1/y"}


@pytest.mark.slow
def test_a_shorter_soak_is_as_promised(capsys):
    assert main(["--steps", "2000"]) == 0, capsys.readouterr()
