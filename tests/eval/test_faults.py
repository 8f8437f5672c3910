"""Claims about the fault suite: it finds a defence that is broken, it counts what is skipped as skipped, and a sample
of its faults survives."""

from __future__ import annotations

import json
import os

import pytest

from eval import faults
from eval.faults import cases, changes, command, damage, figures, forgeries, stops
from eval.faults.cases import HUNG, LOST, SILENT, SKIPPED, SURVIVED, TRACEBACK, Case, Outcome, run_cases
from eval.faults.runs import Said, ended_badly, is_one_line, undisturbed
from tests import ranks  # noqa: F401 - its fork server has imported everything


def said(code=2, err="llm-jepa: error: no", out=""):
    return Said(code, out, err, 0.0)


# -- a sample ---------------------------------------------------------------------------------------------------------


def test_a_sample_survives(tmp_path, monkeypatch, capsys):
    """In this process; the command does the same. Kills have their own sample in tests/core/test_kills.py."""
    monkeypatch.setattr(command, "ENVIRONMENT", {})
    monkeypatch.setattr(command, "_preload", lambda: None)
    out = tmp_path / "faults.json"
    parts = ["damaged", "forged"]
    code = command.main(["--quick", "--only", *parts, "--out", str(out), "--workers", "1"])
    result = json.loads(out.read_text())
    assert result["failures"] == {} and code == 0, result["failures"]
    counts = result["summary"]["all"]
    assert counts["injected"] == counts["survived"] > 15
    assert counts["injected"] + sum(counts["skipped"].values()) == len(result["faults"])
    assert result["config"]["parts"] == parts and result["environment"]["commit"]
    assert not list(tmp_path.glob("*.partial.jsonl"))
    assert "| all " in capsys.readouterr().out


# -- planted bugs -----------------------------------------------------------------------------------------------------


def _without_hashes(folder, run):
    """The manifest is not compared with the files."""
    from llm_jepa.core import checkpoint

    checkpoint.broken = lambda *args, **kwargs: None
    return damage.damaged(folder, run, "optimizer.pt", "a bit flipped")


def _without_required_files(folder, run):
    """A checkpoint may lack the state of its random generators."""
    from llm_jepa.core import checkpoint

    checkpoint._missing_state = lambda names, num_processes: None
    return forgeries.forged(folder, run, "manifest: without rng_state.pth")


def _without_handlers(folder, run):
    """Nobody listens to signals."""
    import contextlib

    from llm_jepa.core import signals

    signals.handled = lambda numbers, handler: contextlib.nullcontext()
    return stops.stopped_in_evaluation(folder, run, "SIGTERM", 0.0)


def _without_identity(folder, setup):
    """A changed recipe is not noticed."""
    from llm_jepa.core import checkpoint

    checkpoint._check_is_same_run = lambda *args: None
    return changes.changed_key(folder, setup, "jepa_weight", 0.5)


def test_a_broken_defence_is_found(tmp_path):
    lm, long = undisturbed("lm", tmp_path), undisturbed("lm, long", tmp_path)
    setup = changes.prepared("lm", tmp_path)
    planted = [
        Case("planted", "hashes", _without_hashes, (lm,)),
        Case("planted", "required files", _without_required_files, (lm,)),
        Case("planted", "handlers", _without_handlers, (long,)),
        Case("planted", "identity", _without_identity, (setup,)),
    ]
    outcomes = list(run_cases(planted, tmp_path / "cases", workers=1))
    verdicts = {case.name: outcome.verdict for case, outcome in outcomes}
    assert verdicts == {"hashes": SILENT, "required files": TRACEBACK, "handlers": TRACEBACK, "identity": SILENT}, [
        o for _, o in outcomes
    ]
    counts = figures.summary(outcomes)["planted"]
    assert (counts["injected"], counts["survived"], counts["silent"], counts["traceback"]) == (4, 0, 2, 2)
    assert not figures.is_met(counts) and "MISSED" in figures.table({"planted": counts, "all": counts})


# -- counting ---------------------------------------------------------------------------------------------------------


def test_what_was_skipped_is_not_counted_as_survived():
    outcomes = [
        (Case("disk", "a", print), Outcome(SURVIVED)),
        (Case("disk", "b", print), Outcome(SKIPPED, "no right")),
        (Case("disk", "c", print), Outcome(SKIPPED, "no right")),
        (Case("other", "d", print), Outcome(SKIPPED, "no network")),
        (Case("last", "e", print), Outcome(LOST, "no")),
    ]
    found = figures.summary(outcomes)
    assert (found["disk"]["injected"], found["disk"]["survived"], found["disk"]["skipped"]) == (1, 1, {"no right": 2})
    assert found["other"]["injected"] == 0 and not figures.is_met(found["other"])
    assert (found["all"]["injected"], found["all"]["survived"], found["all"]["lost"]) == (2, 1, 1)
    text = figures.table(found)
    assert "Skipped 2: no right" in text and text.count("MISSED") == 2  # last and all
    assert figures.is_met(found["disk"])


@pytest.mark.parametrize(
    ("end", "verdict"),
    [
        (said(), None),
        (said(0, ""), None),
        (said(None), HUNG),
        (said(1, "Traceback (most recent call last):\n  ..."), TRACEBACK),
        (said(2, "llm-jepa: error: KeyError: 'a' (run again with --traceback to see where)"), TRACEBACK),
        (said(-15, ""), TRACEBACK),
    ],
)
def test_how_a_command_may_end(end, verdict):
    assert (ended_badly(end) or Outcome(None)).verdict == verdict


def test_one_line_is_one_line_of_ours():
    assert is_one_line(said()) and is_one_line(said(err="a bar\nllm-jepa: error: no\n"))
    assert not is_one_line(said(err="llm-jepa: a\nllm-jepa: b")) and not is_one_line(said(err="nothing of ours"))
    assert not is_one_line(said(3)) and is_one_line(said(3), (3,))


# -- the runner -------------------------------------------------------------------------------------------------------


def _hang(folder):
    import time

    time.sleep(60)


def _fail(folder):
    raise KeyError("a key")


def _die(folder):
    os._exit(7)


def _look(folder):
    return Outcome(LOST if list(folder.iterdir()) != [folder / "case.log"] else SURVIVED)


def test_a_case_that_hangs_fails_or_dies_is_told(tmp_path):
    found = [Case("k", "hang", _hang, (), 1.0), Case("k", "fail", _fail), Case("k", "die", _die), Case("k", "l", _look)]
    outcomes = {case.name: outcome for case, outcome in run_cases(found, tmp_path, workers=2)}
    assert {name: outcome.verdict for name, outcome in outcomes.items()} == {
        "hang": HUNG, "fail": LOST, "die": LOST, "l": SURVIVED,
    }  # fmt: skip
    assert "KeyError" in outcomes["fail"].note and "ended with 7" in outcomes["die"].note
    assert len(list(tmp_path.iterdir())) == 3, "the folder of a failure is kept"


def test_a_stopped_suite_goes_on(tmp_path, capsys):
    """The journal's last line is cut."""
    options = command.parse(["--out", str(tmp_path / "a.json")])
    journal = command.Journal(options)
    journal.add(Case("k", "one", print), Outcome(LOST, "why"))
    journal.add(Case("k", "two", print), Outcome(SURVIVED))
    path = tmp_path / "a.partial.jsonl"
    path.write_text(path.read_text()[:-5])
    assert command.Journal(options).before == {"k: one": Outcome(LOST, "why")}
    assert command.Journal(command.parse(["--out", str(tmp_path / "a.json"), "--seed", "1"])).before == {}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--workers", "0"], "--workers: '0' must be a whole number, 1 or more"),
        (["--only", "earthquake"], "invalid choice: 'earthquake'"),
        (["--out", "/"], "is a folder"),
    ],
)
def test_a_wrong_option_is_one_line(words, line, capsys):
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval.faults: error:") and error.count("\n") == 1 and line in error


def test_the_help_explains_every_verdict():
    for verdict in cases.VERDICTS:
        assert f"\n    {verdict} " in faults.__doc__


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kill_damage_and_signal_survives(tmp_path):
    assert command.main(["--only", "kills", "damaged", "signals", "--work", str(tmp_path)]) == 0
