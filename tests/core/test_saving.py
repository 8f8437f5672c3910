"""Claims about saving while training goes on: whoever needs the checkpoint waits for it, and nobody else does.

`seal` is the long part of publishing. These tests hold it up, so that every moment is exact.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time

import pytest
import torch
import yaml
from transformers import TrainerCallback

from llm_jepa.cli import main
from llm_jepa.core import publish
from llm_jepa.core.checkpoint import checkpoints, fault, fault_of_model
from llm_jepa.core.errors import LAUNCHED, announces
from llm_jepa.lm.trainer import LLMJEPATrainer
from tests.core.test_stopping import at, send_at
from tests.lm.test_ranks import RECIPE

DEADLINE_S = 60
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "validation_rows": 6}


@pytest.fixture
def train(rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:24]))

    def call(**changes):
        values = {**RECIPE, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, **changes}
        values |= {"train_data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run")}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return main(["train", str(tmp_path / "recipe.yaml")])

    return call


@pytest.fixture
def slow_seal(monkeypatch):
    seal = publish.seal

    def slow(folder, **options):
        time.sleep(0.3)
        seal(folder, **options)

    monkeypatch.setattr(publish, "seal", slow)


def at_each_loss(monkeypatch, call):
    """Call `call(trainer)` before every loss."""
    compute = LLMJEPATrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        call(self)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(LLMJEPATrainer, "compute_loss", compute_loss)


def test_training_goes_on_while_a_checkpoint_is_published(train, tmp_path, monkeypatch):
    """The checkpoint of step 2 is sealed in step 4 at the earliest; a save that waits would wait for ever."""
    seal, reached = publish.seal, threading.Event()

    def seal_later(folder, **options):
        assert reached.wait(DEADLINE_S), "training waits for the checkpoint"
        seal(folder, **options)

    def look(trainer):
        if trainer.state.global_step == 3:
            assert not checkpoints(tmp_path / "run")
            reached.set()

    at_each_loss(monkeypatch, look)
    monkeypatch.setattr(publish, "seal", seal_later)
    assert train() == 0
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    assert fault(tmp_path / "run" / "checkpoint-6") is None
    assert not list((tmp_path / "run").glob(".stage-*"))


def test_a_launched_process_announces_that_it_publishes(train, tmp_path, monkeypatch):
    """Or its launcher would end it two seconds after another process has failed."""
    launcher = tmp_path / "launcher"
    launcher.mkdir()
    monkeypatch.setenv(LAUNCHED, str(launcher))
    seal, said = publish.seal, []

    def look(folder, **options):
        said.append((folder.name, announces(str(launcher), os.getpid())))
        seal(folder, **options)

    monkeypatch.setattr(publish, "seal", look)
    assert train() == 0
    assert said[:3] == [(f"checkpoint-{step}", True) for step in (2, 4, 6)]
    assert not list(launcher.iterdir())


@pytest.mark.parametrize("changes", [BEST, {**BEST, "load_best_model_at_end": False, "metric_for_best_model": "loss"}])
def test_the_end_of_training_waits(changes, train, tmp_path, slow_seal):
    """The best weights are read from their checkpoint, and all others are removed."""
    assert train(**changes) == 0
    assert fault_of_model(tmp_path / "run") is None
    best = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert [str(path) for path in checkpoints(tmp_path / "run")] == [best]


def test_a_run_that_is_stopped_waits(train, tmp_path, slow_seal, monkeypatch, capsys):
    send_at(monkeypatch, LLMJEPATrainer, "save_more", at(4), number=signal.SIGTERM)
    assert train() == 75
    assert f"Saved last: {tmp_path}/run/checkpoint-4. Continue" in capsys.readouterr().err
    assert fault(tmp_path / "run" / "checkpoint-4") is None


def test_a_loss_that_is_not_finite_names_the_checkpoint_that_was_just_saved(train, slow_seal, monkeypatch, capsys):
    def spoil(trainer):
        if trainer.state.global_step == 4:
            next(trainer.model.parameters()).data.fill_(torch.nan)

    at_each_loss(monkeypatch, spoil)
    assert train() == 3
    assert "run/checkpoint-4. " in capsys.readouterr().err


def test_what_goes_wrong_in_the_thread_ends_the_run(train, tmp_path, monkeypatch, capsys):
    """The run ends at one of the next steps, not at the next save; the stage is dropped, the last checkpoint kept."""
    steps, failed, seal = [], [], publish.seal

    def full(folder, **options):
        if folder.name == "checkpoint-4":
            failed.append(folder)
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(folder, **options)

    def look(trainer):
        steps.append(trainer.state.global_step)
        if failed:
            trainer._work.join(DEADLINE_S)

    at_each_loss(monkeypatch, look)
    monkeypatch.setattr(publish, "seal", full)
    assert train(max_steps=40, save_steps=4) == 4
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("llm-jepa: stopped: the disk of") and line.endswith("Last good checkpoint: none yet.")
    assert steps[-1] < 8, "nobody looked before the next save"
    assert not checkpoints(tmp_path / "run") and not list((tmp_path / "run").glob(".stage-*"))


def test_a_callback_that_is_told_of_a_save_finds_it(train, tmp_path, slow_seal, monkeypatch):
    found = []

    class Uploads(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found.append(fault(tmp_path / "run" / f"checkpoint-{state.global_step}"))

    begin = LLMJEPATrainer.begin_training
    monkeypatch.setattr(LLMJEPATrainer, "begin_training", lambda self, s: (self.add_callback(Uploads), begin(self, s)))
    assert train() == 0
    assert found == [None, None, None]


def test_a_second_ctrl_c_does_not_wait(train, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(publish, "seal", lambda folder, **_: ended.wait(DEADLINE_S))

    def interrupt(trainer):
        if trainer.state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    at_each_loss(monkeypatch, interrupt)
    begin = time.monotonic()
    assert train() == 130
    assert time.monotonic() - begin < DEADLINE_S, "it waited for the checkpoint"
    ended.set()
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("the cause"), 2), (torch.OutOfMemoryError("CUDA out of memory."), 5)]
)
def test_an_error_of_a_step_waits_and_comes_out(error, code, train, tmp_path, monkeypatch, capsys):
    """Step 4 fails while the checkpoint of step 2 is sealed."""
    seal, failed = publish.seal, threading.Event()

    def seal_later(folder, **options):
        assert failed.wait(DEADLINE_S)
        time.sleep(0.3)  # so that whoever does not wait is gone
        seal(folder, **options)

    def fail(trainer):
        if trainer.state.global_step == 3:
            assert not checkpoints(tmp_path / "run")
            failed.set()
            raise error

    threads = set(threading.enumerate())
    at_each_loss(monkeypatch, fail)
    monkeypatch.setattr(publish, "seal", seal_later)
    assert train() == code
    left = [thread for thread in threading.enumerate() if thread not in threads and isinstance(thread, publish.Work)]
    published = [path.name for path in checkpoints(tmp_path / "run")]
    for thread in left:  # or it would write into the next test
        thread.join(DEADLINE_S)
    assert published == ["checkpoint-2"] and not left, "it did not wait"
    assert fault(tmp_path / "run" / "checkpoint-2") is None and not list((tmp_path / "run").glob(".stage-*"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert ("the cause" if code == 2 else "out of memory in training") in line
