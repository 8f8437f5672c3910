"""Claims about a run that is asked to stop: it finishes its step, saves, says how to go on, and the resumed run is the
uninterrupted one, bit for bit.

A signal is sent to this process from inside the run, at a place that a test names. So the instant is exact.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import time

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from llm_jepa.cli import main
from llm_jepa.core import checkpoint
from llm_jepa.core.errors import UserError
from llm_jepa.core.files import file_sha256
from llm_jepa.core.signals import seconds_of
from llm_jepa.core.stopping import OWED
from llm_jepa.lm.trainer import LLMJEPATrainer
from llm_jepa.vl.trainer import VLJEPATrainer
from tests.lm.test_ranks import RECIPE
from tests.ranks import on_ranks
from tests.vl.test_commands import RECIPE as VL_RECIPE

# Everything that a resumed run must bring back: dropout, a moving average, a coin, accumulation, the best weights. An
# epoch has 5 steps, so that one request comes at its end.
COMMON = {
    "optim": "adamw_torch", "learning_rate": 0.01, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "max_steps": 8, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3,
    "load_best_model_at_end": True, "diagnostics_pairs": 8, "logging_steps": 1,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 256}  # dropout 0.1
LM = {**RECIPE, **COMMON, "model_config": GPT2, "target_encoder": "ema", "jepa_dropout": 0.3, "validation_rows": 8}
DROPOUT = {**VL_RECIPE["y_encoder"], "hidden_dropout_prob": 0.1}
VL = {**VL_RECIPE, **COMMON, "y_encoder": DROPOUT, "validation_rows": 8, "y_encoder_lr_factor": 0.5}
TRAINERS = {"lm": LLMJEPATrainer, "vl": VLJEPATrainer}


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory):
    """Recipes and their data; `lm` and `vl` hold the uninterrupted runs."""
    folder = tmp_path_factory.mktemp("stopping")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw, clips = np.random.default_rng(0), []
    for i in range(48):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        clips.append({"image": f"{i}.png", "target": f"text {i % 7}", "query": ["what?", "where?"][i % 2]})
    (folder / "clips.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    for name, values, data in (("lm", LM, "rows.jsonl"), ("vl", VL, "clips.jsonl")):
        recipe = {**values, "train_data": str(folder / data), "output_dir": str(folder / name)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["train", str(folder / f"{name}.yaml")]) == 0
    return folder


@pytest.fixture(autouse=True)
def survive():
    """A signal that nobody handles is an error, not the end of pytest."""

    def fail(number, frame):
        raise AssertionError("nobody handles the signal")

    before = {number: signal.signal(number, fail) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def outcome(path):
    """What two equal runs have in common: the weights, and every figure of every step but its speed."""
    state = json.loads((path / "trainer_state.json").read_text())
    speed = ("runtime", "_per_second", "preparation_time")
    log = [
        {key: float(value).hex() for key, value in entry.items() if not any(word in key for word in speed)}
        for entry in state["log_history"]
        if "train_runtime" not in entry  # of the last process alone
    ]
    best = str(state["best_model_checkpoint"]).rpartition("/")[2]
    return file_sha256(path / "model.safetensors"), log, best


def send_at(monkeypatch, owner, name, when, *, after=False, number=signal.SIGTERM):
    """Send this process a signal when `owner.name` is called for the first time with `when(first argument)`."""
    call, sent = getattr(owner, name), []

    def wrapped(self, *args, **kwargs):
        wanted = not sent and when(self)
        if wanted and not after:
            sent.append(os.kill(os.getpid(), number))
        result = call(self, *args, **kwargs)
        if wanted and after:
            sent.append(os.kill(os.getpid(), number))
        return result

    monkeypatch.setattr(owner, name, wrapped)
    return sent


def at(step):
    return lambda trainer: trainer.state.global_step == step


# place -> (method, the step that it is called at, before or after the call), the step that is saved
PLACES = {
    "before the first step": ("begin_training", 0, True, 1),
    "in a step": ("compute_loss", 1, False, 2),
    "in a step that is evaluated": ("compute_loss", 2, False, 3),
    "in the optimizer": ("after_optimizer_step", 3, True, 4),
    "in the last step of an epoch": ("compute_loss", 4, False, 5),
    "in an evaluation": ("example_sums", 6, True, 6),
    "at the end of an evaluation": ("measure_space", 6, True, 6),
    "in a save": ("save_more", 3, False, 3),
    "after a save": ("save_more", 3, True, 3),
    "in the last step": ("compute_loss", 7, False, 8),
    "in the last evaluation": ("example_sums", 8, False, 8),
    "in the last save": ("save_more", 8, True, 8),
}
EVALUATED_LATER = {"in a step that is evaluated", "in an evaluation", "in the last step", "in the last evaluation"}
OF_VL = ("in a step that is evaluated", "in the last step of an epoch", "in a save")


# Seconds each: a run that is like another in the default suite is slow.
SLOW = {
    *(("lm", place) for place in ("before the first step", "in the optimizer", "after a save", "in the last save")),
    ("vl", "in a save"),
}
CASES = [*(("lm", place) for place in PLACES), *(("vl", place) for place in OF_VL)]


@pytest.mark.parametrize(
    ("family", "place"), [pytest.param(*case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_a_stopped_run_goes_on_bit_for_bit(family, place, folder, tmp_path, capsys):
    method, step, after, saved = PLACES[place]
    words = ["train", str(folder / f"{family}.yaml"), "--output_dir", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        sent = send_at(patch, TRAINERS[family], method, at(step), after=after)
        assert main(words) == 75 and sent
    said = f"llm-jepa: stopped by SIGTERM. Saved last: {tmp_path}/run/checkpoint-{saved}. Continue: llm-jepa train"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llm-jepa:")]
    assert line.startswith(said) and line.endswith("--resume_from_checkpoint true")
    assert (tmp_path / "run" / f"checkpoint-{saved}" / OWED).exists() == (place in EVALUATED_LATER)
    assert not (tmp_path / "run" / "model.safetensors").exists(), "the final model of a run that goes on"
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert outcome(tmp_path / "run") == outcome(folder / family)


def test_these_runs_would_show_a_difference(folder):
    """Losses differ from step to step, and the best weights are those of an evaluation."""
    for family in TRAINERS:
        _, log, best = outcome(folder / family)
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert len(losses) == len(set(losses)) == 8
        assert [entry["step"] for entry in log if "eval_loss" in entry] == [float(step).hex() for step in (3, 6, 8)]
        assert best in ("checkpoint-3", "checkpoint-6", "checkpoint-8")


@pytest.mark.parametrize("place", ["in an evaluation", "in the last evaluation"])
def test_an_evaluation_that_is_made_up_for_can_be_stopped_too(place, folder, tmp_path):
    method, step, after, saved = PLACES[place]
    words = ["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run")]
    for more in ([], ["--resume_from_checkpoint", "true"]):
        with pytest.MonkeyPatch.context() as patch:
            sent = send_at(patch, LLMJEPATrainer, method, at(step), after=after)
            assert main([*words, *more]) == 75 and sent
    assert checkpoint.checkpoints(tmp_path / "run")[0].name == f"checkpoint-{saved}"
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert outcome(tmp_path / "run") == outcome(folder / "lm")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGUSR1, 75, "stopped by SIGUSR1"), (signal.SIGINT, 130, "interrupted")],
)
def test_the_other_signals(number, code, said, folder, tmp_path, monkeypatch, capsys):
    send_at(monkeypatch, LLMJEPATrainer, "compute_loss", at(1), number=number)
    assert main(["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run")]) == code
    assert f"llm-jepa: {said}. Saved last: {tmp_path}/run/checkpoint-2" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not say who sends a signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_lets_workers_finish_the_step(number, folder, tmp_path, monkeypatch, capsys):
    """As SLURM and systemd send it. After the run, no worker is left."""
    signalled = []

    def to_workers(trainer):
        if trainer.state.global_step == 1 and not signalled:
            me = psutil.Process()
            signalled.extend(child.pid for child in me.children() if child.cmdline() == me.cmdline())
            for worker in signalled:
                os.kill(worker, number)
            time.sleep(0.3)  # in which torch would see that they have ended
        return bool(signalled)

    send_at(monkeypatch, LLMJEPATrainer, "compute_loss", to_workers, number=number)
    words = ["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run"), "--dataloader_num_workers", "2"]
    assert main(words) == 75
    assert f"Saved last: {tmp_path}/run/checkpoint-2" in capsys.readouterr().err
    gc.collect()
    assert len(signalled) == 2 and not any(psutil.pid_exists(worker) for worker in signalled)


def test_a_second_ctrl_c_leaves_at_once(folder, tmp_path, monkeypatch, capsys):
    """The first one comes in the first micro-batch of a step, the second in the second."""
    calls = []
    compute = LLMJEPATrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        calls.append(self.state.global_step)
        os.kill(os.getpid(), signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(LLMJEPATrainer, "compute_loss", interrupted)
    assert main(["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run")]) == 130
    assert calls == [0, 0]
    assert "llm-jepa: interrupted. Nothing is saved yet; start again" in capsys.readouterr().err


def test_a_signal_before_training_ends_at_once_with_75(folder, tmp_path, monkeypatch, capsys):
    send_at(monkeypatch, LLMJEPATrainer, "__init__", lambda trainer: True)
    assert main(["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run")]) == 75
    assert "llm-jepa: stopped by SIGTERM. Nothing is saved yet; start again" in capsys.readouterr().err


def test_a_signal_in_the_final_save_changes_nothing(folder, tmp_path, monkeypatch, capsys):
    send_at(monkeypatch, LLMJEPATrainer, "create_model_card", lambda trainer: trainer.state.global_step == 8)
    words = ["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run"), "--save_strategy", "no"]
    assert main([*words, "--load_best_model_at_end", "false"]) == 0
    assert (tmp_path / "run" / "README.md").exists() and "stopped" not in capsys.readouterr().err


def test_a_run_that_saves_nothing_saves_when_it_is_asked_to_stop(folder, tmp_path, monkeypatch):
    """By epochs: the request comes in a step that ends one, and the evaluation of that epoch is made up for."""
    words = ["train", str(folder / "lm.yaml"), "--save_strategy", "no", "--load_best_model_at_end", "false"]
    words += ["--eval_strategy", "epoch", "--output_dir"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        send_at(patch, LLMJEPATrainer, "compute_loss", at(4))
        assert main([*words, str(tmp_path / "run")]) == 75
    assert (tmp_path / "run" / "checkpoint-5" / OWED).exists()
    assert main([*words, str(tmp_path / "run"), "--resume_from_checkpoint", "true"]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_time_limit_is_a_request(folder, tmp_path, monkeypatch, capsys):
    """An hour passes in the third step. The limit is no part of the run: it may change when the run goes on."""
    now = [0.0]
    monkeypatch.setattr("llm_jepa.core.signals.time.monotonic", lambda: now[0])

    def pass_an_hour(trainer):
        now[0] += 3600 * (trainer.state.global_step == 2)
        return False

    send_at(monkeypatch, LLMJEPATrainer, "compute_loss", pass_an_hour)
    words = ["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run")]
    words += [
        "--resume_from_checkpoint",
        "auto",
        "--disable_tqdm",
        "true",
    ]  # the command of a scheduler, which is always the same
    assert main([*words, "--stop_after", "1h30m"]) == 75
    said = capsys.readouterr().err
    assert "llm-jepa: stopped, because the time of stop_after is over" in said and "checkpoint-3. Continue" in said
    assert "%|" not in said, "a bar of a library, which disable_tqdm hides, too"
    assert main(words) == 0
    assert outcome(tmp_path / "run") == outcome(folder / "lm")
    assert main(words) == 0
    assert "is already finished" in capsys.readouterr().out


def test_times():
    assert [seconds_of(text) for text in ("90s", "1h30m", "2d", "0.5h")] == [90, 5400, 172800, 1800]
    for wrong in ("2", "h", "2 hours", "-1h", "1.h", ""):
        with pytest.raises(UserError, match="write 2h, 1h30m or 90s"):
            seconds_of(wrong)


# -- ranks ------------------------------------------------------------------------------------------------------------


def train_as_rank(rank, words, method, step):
    """Train as one of two ranks. Rank 1 alone gets a signal when its trainer calls `method` at `step`."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1 and method is not None:
            send_at(patch, LLMJEPATrainer, method, at(step))
        code = main(words)
    gc.collect()  # the wrapped model must not outlive the process group
    return code


@pytest.fixture(scope="module")
def two_ranks(folder):
    """The uninterrupted run of two ranks."""
    words = ["train", str(folder / "lm.yaml"), "--per_device_train_batch_size", "2", "--output_dir"]
    assert on_ranks(2, train_as_rank, [*words, str(folder / "two")], None, 0) == [0, 0]
    return words


@pytest.mark.parametrize(
    ("method", "step", "saved"), [pytest.param("compute_loss", 3, 4, marks=pytest.mark.slow), ("example_sums", 6, 6)]
)
def test_all_ranks_stop_if_one_is_asked(method, step, saved, two_ranks, folder, tmp_path):
    words = [*two_ranks, str(tmp_path / "run")]
    assert on_ranks(2, train_as_rank, words, method, step) == [75, 75]
    assert checkpoint.newest_complete(tmp_path / "run").name == f"checkpoint-{saved}"
    words += ["--resume_from_checkpoint", "true"]
    assert on_ranks(2, train_as_rank, words, None, 0) == [0, 0]
    assert outcome(tmp_path / "run") == outcome(folder / "two")
