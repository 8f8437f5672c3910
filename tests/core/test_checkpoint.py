"""Claims about crashes: whatever a kill leaves, the run resumes from a whole checkpoint or says why it cannot."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llm_jepa.cli import main
from llm_jepa.core.checkpoint import (
    CARD,
    RUN_FILE,
    STATE_FILE,
    checkpoints,
    ended_at,
    fault,
    fault_of_model,
    find_resume,
    hold,
    is_finished_of_before,
    is_last,
    newest_complete,
    rotate,
)
from llm_jepa.core.errors import UserError
from llm_jepa.core.files import content_sha256, file_sha256, make_stage, write_json
from llm_jepa.core.publish import MANIFEST, publish_into, seal
from tests.lm.test_ranks import RECIPE
from tests.ranks import start


@pytest.fixture
def run_dir(tmp_path):
    """A run with two sealed checkpoints."""
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_bytes(f"{name} of step {step}".encode() * 50)
        write_json(folder / "trainer_state.json", {"global_step": step, "max_steps": 20, "log_history": []})
        seal(folder)
    write_json(tmp_path / RUN_FILE, {"seed": 0})
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "torn", "flipped"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(name, damage, run_dir, capsys):
    path = run_dir / "checkpoint-10" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    else:  # one bit; same size
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    assert fault(run_dir / "checkpoint-10") is not None
    assert newest_complete(run_dir) == run_dir / "checkpoint-2"
    assert find_resume(run_dir, {"seed": 0}, resume="true") == str(run_dir / "checkpoint-2")
    assert "Skipped 1 damaged checkpoint(s): checkpoint-10" in capsys.readouterr().out


def test_checkpoints_are_ordered_by_step_not_by_name(run_dir):
    (run_dir / "checkpoint-x").mkdir()
    assert [path.name for path in checkpoints(run_dir)] == ["checkpoint-10", "checkpoint-2"]
    assert fault(run_dir / "checkpoint-10") is None


def test_nothing_whole_to_resume_from_is_an_error_that_names_the_fault(run_dir):
    for path in run_dir.glob("checkpoint-*/optimizer.pt"):
        path.unlink()
    with pytest.raises(UserError, match="optimizer.pt is missing"):
        find_resume(run_dir, {"seed": 0}, resume="true")


def test_another_run_is_refused_and_the_difference_named(run_dir):
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        find_resume(run_dir, {"seed": 1}, resume="true")
    with pytest.raises(UserError, match="holds a run already"):
        find_resume(run_dir, {"seed": 0}, resume=None)


def test_write_json_never_leaves_half_a_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(tmp_path / "a.json", {"new": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


def test_killed_run_resumes_bit_for_bit(rows, tmp_path):
    """SIGKILL of a real training process between two saves and inside one, then --resume_from_checkpoint true: weights
    and logged losses of the uninterrupted run."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {**RECIPE, "train_data": str(data), "max_steps": 40, "save_strategy": "steps", "save_steps": 5}
    values |= {"optim": "adamw_torch", "learning_rate": 0.01, "eval_strategy": "no"}

    def recipe(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / name)}))
        return str(path)

    def outcome(name):
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return load_file(tmp_path / name / "model.safetensors"), [e["loss"] for e in log if "loss" in e]

    assert main(["train", recipe("whole")]) == 0
    weights, losses = outcome("whole")
    assert len(losses) == 40

    for name, wanted in (
        ("between", f"checkpoint-15/{MANIFEST}"),
        ("inside", ".stage-*/checkpoint-15/model.safetensors"),
    ):
        process = start(main, ["train", recipe(name)])
        deadline = time.monotonic() + 120
        while not any((tmp_path / name).glob(wanted)) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
        assert not (tmp_path / name / "model.safetensors").exists()
        assert main(["train", recipe(name), "--resume_from_checkpoint", "true"]) == 0
        resumed_weights, resumed_losses = outcome(name)
        assert all(torch.equal(weights[key], resumed_weights[key]) for key in weights), name
        assert resumed_losses == losses, name


def test_content_is_the_same_in_a_folder_and_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    """A downloaded copy may take the place of the repository. Of the cache, large files are not read: their name is
    their hash."""
    folder, commit = tmp_path / "copy", "c" * 40
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "trainer_state.json").write_text("not what is loaded")
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / commit
    for part in (repository / "blobs", repository / "refs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    blob = repository / "blobs" / file_sha256(folder / "model.safetensors")
    blob.write_bytes(b"not read")
    (snapshot / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert content_sha256("some/model", "main") == content_sha256(str(folder)) is not None
    assert content_sha256("some/other", "main") is None, "not downloaded yet"
    before = content_sha256(str(folder))
    (folder / "trainer_state.json").write_text("another run")
    assert content_sha256(str(folder)) == before
    (folder / "chat_template.jinja").write_text("x")
    assert content_sha256(str(folder)) != before


# -- which run, and from where ----------------------------------------------------------------------------------------

TRAINED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
MODEL = ("model.safetensors", "config.json", CARD)


def save(
    folder: Path,
    step: int,
    last: int = 8,
    *,
    names: tuple[str, ...] = TRAINED,
    run: str | None = None,
    **figures: float,
) -> Path:
    """A sealed checkpoint or final model after `step` of `last` steps. figures: what the last step has logged."""
    folder.mkdir(exist_ok=True)
    stage = make_stage(folder)
    staged = stage / folder.name
    staged.mkdir()
    for name in names:
        (staged / name).write_text(f"{name} of step {step}")
    log = [{"step": step, **figures}]
    (staged / STATE_FILE).write_text(json.dumps({"global_step": step, "max_steps": last, "log_history": log}))
    seal(staged, run=run)
    publish_into(staged, folder)
    shutil.rmtree(stage)
    return folder


def refusal(folder, run, resume="true", **options):
    with pytest.raises(UserError) as error:
        find_resume(folder, run, resume=resume, **options)
    return str(error.value)


@pytest.mark.parametrize("figure", [math.inf, math.nan])
def test_a_figure_that_is_not_finite_loses_no_run(figure, tmp_path):
    """In fp16 a gradient may overflow: its norm is logged as Infinity, the step is skipped, and the run goes on."""
    run = {"id": "abc", "unmarked_to": 4, "num_train_epochs": 1}
    write_json(tmp_path / RUN_FILE, run)
    checkpoint = save(tmp_path / "checkpoint-4", 4, 4, grad_norm=figure)
    assert fault(checkpoint, run=run) is None
    assert find_resume(tmp_path, run, resume="true") == str(checkpoint)
    assert is_last(checkpoint, run) and ended_at(tmp_path) == 4
    longer = {**run, "num_train_epochs": 2}
    assert find_resume(tmp_path, longer, resume="true", needs_its_length=lambda state: None) == str(checkpoint)
    save(tmp_path, 4, 4, names=MODEL, run="abc", grad_norm=figure)
    assert find_resume(tmp_path, run, resume="true") == str(tmp_path), "finished"


def test_a_run_may_be_saved_and_end_after_its_first_step(tmp_path):
    checkpoint = save(tmp_path / "checkpoint-1", 1, 1)
    assert fault(checkpoint) is None and is_last(checkpoint, {}) and ended_at(tmp_path) == 1
    assert fault(checkpoint, run={"id": "abc"}) == "it is of another run", "of a run that marks what it saves"


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("model.safetensors", "weights"),
        ("optimizer.pt", "optimizer state (save_only_model: true saves none)"),
        ("scheduler.pt", "scheduler state (scheduler.pt)"),
        ("scaler.pt", "state of the gradient scaler (scaler.pt)"),
        ("rng_state.pth", "state of the random generators (rng_state.pth)"),
    ],
)
def test_a_checkpoint_says_what_its_manifest_lacks(missing, text, tmp_path):
    names = (*TRAINED, "scaler.pt")
    whole = save(tmp_path / "checkpoint-2", 2, names=names)
    newest = save(tmp_path / "checkpoint-4", 4, names=tuple(name for name in names if name != missing))
    for num_processes in (1, None):
        wanted = {"num_processes": num_processes, "has_scaler": True}
        assert fault(newest, **wanted) == f"it has no {text}"
        assert newest_complete(tmp_path, **wanted) == whole
    # A run that scales no gradients needs no scaler; one that saves models only needs the weights.
    assert newest_complete(tmp_path) == (newest if missing == "scaler.pt" else whole)
    assert newest_complete(tmp_path, has_state=False) == (whole if missing == "model.safetensors" else newest)


@pytest.mark.parametrize("missing", MODEL)
def test_a_final_model_says_what_its_manifest_lacks(missing, tmp_path):
    save(tmp_path, 8, names=tuple(name for name in MODEL if name != missing))
    assert fault_of_model(tmp_path) == f"its {MANIFEST} has no {'weights' if 'model' in missing else missing}"


def test_damaged_checkpoints_are_counted_and_the_newest_fault_is_named(tmp_path, capsys):
    run = {"id": "abc"}
    write_json(tmp_path / RUN_FILE, run)
    whole = save(tmp_path / "checkpoint-2", 2, run="abc")
    damaged = save(tmp_path / "checkpoint-4", 4, run="abc") / "optimizer.pt"
    damaged.write_text("damaged")
    save(tmp_path / "checkpoint-6", 6, run="another")
    assert find_resume(tmp_path, run, resume="true") == str(whole)
    assert capsys.readouterr().out == (
        "Skipped 2 damaged checkpoint(s): checkpoint-6, checkpoint-4 (it is of another run).\n"
    )
    shutil.rmtree(whole)
    assert refusal(tmp_path, run) == (
        f"No checkpoint in {tmp_path} is complete (it is of another run); start a new run in another output_dir."
    )
    assert find_resume(tmp_path, run, resume="true", allowed=("checkpoint",)) == str(tmp_path / "checkpoint-6")


def test_where_a_run_ended(tmp_path):
    """Only its newest checkpoint and its final model count, and one of them may be torn."""
    assert ended_at(tmp_path) == ended_at(tmp_path / "nowhere") == 0
    save(tmp_path / "checkpoint-4", 4, 4)
    assert ended_at(tmp_path) == 4
    save(tmp_path / "checkpoint-6", 6, 8)
    assert ended_at(tmp_path) == 0, "it was made longer, and killed"
    assert not is_last(tmp_path / "checkpoint-6", {"ended_at": 4})
    assert is_last(tmp_path / "checkpoint-4", {}) and not is_last(tmp_path / "checkpoint-4", {"ended_at": 4})
    save(tmp_path, 4, 4, names=MODEL)
    assert ended_at(tmp_path) == 4
    (tmp_path / "checkpoint-6" / STATE_FILE).write_text("{")
    assert ended_at(tmp_path) == 4


def test_a_folder_that_is_held_is_left_alone(tmp_path):
    run = {"seed": 0}
    write_json(tmp_path / RUN_FILE, run)
    checkpoint = save(tmp_path / "checkpoint-4", 4)
    descriptor = hold(tmp_path)
    for resume in ("true", "auto", None, str(checkpoint)):
        assert refusal(tmp_path, run, resume) == (
            f"Another process trains in {tmp_path} now; wait until it ends, or choose another output_dir."
        )
    os.close(descriptor)
    with open(tmp_path / RUN_FILE) as file:  # another process that only looks, at the same time
        fcntl.flock(file, fcntl.LOCK_SH)
        assert find_resume(tmp_path, run, resume="true") == str(checkpoint)


def test_a_file_system_without_locks_holds_no_folder(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    write_json(tmp_path / RUN_FILE, {})
    checkpoint = save(tmp_path / "checkpoint-4", 4)
    monkeypatch.setattr("fcntl.flock", flock)
    assert hold(tmp_path) is None and find_resume(tmp_path, {}, resume="true") == str(checkpoint)


def test_an_output_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file", {}) == f"output_dir {tmp_path / 'file'} is a file; choose another output_dir."
    assert refusal(tmp_path, {}, None) == (
        f"output_dir {tmp_path} is not empty and holds no run of ours; choose another output_dir."
    )
    assert refusal(tmp_path, {}, None, allowed=("seed",)) == (
        "--allow_changed goes with --resume_from_checkpoint: a new run has nothing to compare."
    )
    assert refusal(tmp_path, {}) == (
        f"output_dir {tmp_path} has no run.json, so there is no run to resume; leave out --resume_from_checkpoint to "
        "start one, or write `--resume_from_checkpoint auto`, which does both."
    )
    write_json(tmp_path / RUN_FILE, {})
    save(tmp_path / "checkpoint-4", 4)
    assert refusal(tmp_path, {}, None) == (
        f"output_dir {tmp_path} holds a run already; continue it with --resume_from_checkpoint true, or choose "
        "another output_dir."
    )


def test_auto_resumes_the_run_of_the_folder_and_only_that(tmp_path):
    """A folder without a record is free or not, as for a new run. Of a torn record nobody knows the run."""
    assert find_resume(tmp_path, {}, resume="auto") is None
    checkpoint = save(tmp_path / "checkpoint-4", 4)
    assert "holds no run of ours" in refusal(tmp_path, {}, "auto")
    write_json(tmp_path / RUN_FILE, {"seed": 0})
    for resume in ("auto", "Auto"):
        assert find_resume(tmp_path, {"seed": 0}, resume=resume) == str(checkpoint)
        assert "(seed: 0 -> 1)" in refusal(tmp_path, {"seed": 1}, resume)
    record = tmp_path / RUN_FILE
    record.write_text("[]")
    said = refusal(tmp_path, {"seed": 0}, "auto")
    assert said.startswith(f"{record} cannot be read") and "it is a list instead of an object" in said


def test_a_run_that_has_saved_nothing_starts_again_as_any_run(tmp_path, capsys, monkeypatch):
    """But not from a checkpoint that was named. Of several processes one says so."""
    write_json(tmp_path / RUN_FILE, {"seed": 0})
    start = f"{tmp_path} has no checkpoint yet: starting at step 0.\n"
    for resume in (None, "true", "True", "auto"):
        assert find_resume(tmp_path, {"seed": 1}, resume=resume) is None
        assert capsys.readouterr().out == start
    named = str(tmp_path / "checkpoint-4")
    assert refusal(tmp_path, {"seed": 0}, named) == f"Cannot resume from {named}: there is no such folder."
    make_stage(tmp_path)
    assert find_resume(tmp_path, {}, resume="true") is None
    assert capsys.readouterr().out == start.replace(":", " (a save was cut short):")
    monkeypatch.setenv("RANK", "1")
    assert find_resume(tmp_path, {}, resume="true") is None
    assert capsys.readouterr().out == ""


def test_every_process_of_the_run_needs_its_generators(tmp_path, capsys):
    """Unless the number of processes may differ this time: then no checkpoint has the generators of all."""
    run = {"num_processes": 2}
    write_json(tmp_path / RUN_FILE, run)
    of_two = save(tmp_path / "checkpoint-2", 2, names=(*TRAINED[:3], "rng_state_0.pth", "rng_state_1.pth"))
    of_one = save(tmp_path / "checkpoint-4", 4, names=(*TRAINED[:3], "rng_state_0.pth"))
    lacks = "it has no state of the random generators (rng_state_1.pth)"
    assert refusal(tmp_path, run, str(of_one), num_processes=2) == f"Cannot resume from {of_one}: {lacks}."
    assert find_resume(tmp_path, run, resume=str(of_two), num_processes=2) == str(of_two)
    assert find_resume(tmp_path, run, resume="true", num_processes=2) == str(of_two)
    assert capsys.readouterr().out == f"Skipped 1 damaged checkpoint(s): checkpoint-4 ({lacks}).\n"
    options = {"num_processes": 3, "allowed": ("num_processes",)}
    for resume in ("true", str(of_one)):
        assert find_resume(tmp_path, {"num_processes": 3}, resume=resume, **options) == str(of_one)
    shutil.rmtree(of_two)
    assert refusal(tmp_path, run, num_processes=2) == (
        f"No checkpoint in {tmp_path} is complete ({lacks}); start a new run in another output_dir."
    )


def test_a_refusal_names_three_changes_and_how_to_allow_them(tmp_path):
    before = dict.fromkeys("abcd", 0)
    write_json(tmp_path / RUN_FILE, {**before, "weight_decay": 0})
    save(tmp_path / "checkpoint-4", 4)
    changed = {**dict.fromkeys("abcd", 1), "weight_decay": 0}
    begin = f"Cannot resume {tmp_path}: the run has changed in 4 place(s) (a: 0 -> 1; b: 0 -> 1; c: 0 -> 1). "
    advice = "Put them back, or start a new run in another output_dir."
    flags = "--allow_changed a --allow_changed b --allow_changed c --allow_changed d"
    assert refusal(tmp_path, changed) == f"{begin}{advice} (To go on with the change: {flags}.)"
    # The state of the optimizer brings the old value back, so that no flag would help.
    changed = {**before, "a": 1, "weight_decay": 1}
    assert refusal(tmp_path, changed).endswith(f"in 2 place(s) (a: 0 -> 1; weight_decay: 0 -> 1). {advice}")


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_refused_length_says_how_to_train_on(is_finished, tmp_path):
    """A finished model can begin a new run; without one, only another folder is left."""
    run = {"max_steps": 8, "num_train_epochs": 3}
    write_json(tmp_path / RUN_FILE, run)
    save(tmp_path / "checkpoint-8", 8)
    if is_finished:
        save(tmp_path, 8, names=MODEL)
    begin = f"Cannot resume {tmp_path}: the run has changed"
    for options, words in (({}, "start a new run from its model"), ({"further": "train it again"}, "train it again")):
        advice = f"Put it back, or {words if is_finished else 'start a new run in another output_dir'}."
        assert refusal(tmp_path, {**run, "max_steps": 9}, **options) == (
            f"{begin} (max_steps: 8 -> 9), and a schedule depends on its length, so a longer run is another run. "
            + advice
        )
        assert refusal(tmp_path, {"max_steps": 7, "num_train_epochs": 2}, **options) == (
            f"{begin} (max_steps: 8 -> 7; num_train_epochs: 3 -> 2). {advice} "
            "(To go on with the change: --allow_changed max_steps --allow_changed num_train_epochs.)"
        )


def test_a_length_that_is_over_is_refused_and_epochs_are_no_steps(tmp_path):
    run = {"max_steps": 8}
    write_json(tmp_path / RUN_FILE, run)
    checkpoint = save(tmp_path / "checkpoint-4", 4)
    for last in (1, 3, 4):
        assert refusal(tmp_path, {"max_steps": last}, allowed=("max_steps",)) == (
            f"max_steps: {last} is over: {checkpoint} has taken 4 steps; set more."
        )
    assert find_resume(tmp_path, {"max_steps": 5}, resume="true", allowed=("max_steps",)) == str(checkpoint)
    for steps in ({}, {"max_steps": -1}, {"max_steps": 0}):  # the epochs decide
        write_json(tmp_path / RUN_FILE, {**steps, "num_train_epochs": 2})
        longer = {**steps, "num_train_epochs": 3}
        assert find_resume(tmp_path, longer, resume="true", needs_its_length=lambda state: None) == str(checkpoint)


def test_a_damaged_final_model_is_saved_again_with_a_line(tmp_path, capsys):
    """Of a run that was made longer, the old final model is of no use any more, and nothing is said."""
    run = {"seed": 0}
    write_json(tmp_path / RUN_FILE, run)
    checkpoint = save(tmp_path / "checkpoint-8", 8)
    save(tmp_path, 8, names=MODEL)
    assert find_resume(tmp_path, run, resume="true") == str(tmp_path), "finished"
    (tmp_path / "model.safetensors").write_text("damaged")
    assert find_resume(tmp_path, run, resume="true") == str(checkpoint)
    assert capsys.readouterr().out == (
        f"The run in {tmp_path} is finished, but model.safetensors is damaged: the model is saved again from the last "
        "checkpoint.\n"
    )
    write_json(tmp_path / RUN_FILE, {**run, "ended_at": 8})
    assert find_resume(tmp_path, run, resume="true") == str(checkpoint)
    assert capsys.readouterr().out == ""
    (checkpoint / MANIFEST).unlink()
    assert refusal(tmp_path, run) == (
        f"The run in {tmp_path} is finished, but model.safetensors is damaged, and there is no checkpoint to save the "
        "model again from; start a new run in another output_dir."
    )


@pytest.mark.parametrize("missing", [None, *MODEL, STATE_FILE, RUN_FILE])
def test_a_run_of_an_earlier_version_is_finished_if_all_its_files_are_there(missing, tmp_path):
    write_json(tmp_path / RUN_FILE, {})
    (save(tmp_path, 8, names=MODEL) / MANIFEST).unlink()
    if missing:
        (tmp_path / missing).unlink()
    assert is_finished_of_before(tmp_path) == (missing is None)


def test_a_checkpoint_that_cannot_be_removed_stops_no_training(tmp_path):
    """It lies on another disk, behind a link: neither the link nor what it leads to is removed, but all others are."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    folder.mkdir()
    for step in (2, 4, 6):
        save((folder if step != 4 else elsewhere) / f"checkpoint-{step}", step)
    (folder / "checkpoint-4").symlink_to(elsewhere / "checkpoint-4")
    rotate(folder, step=6, best=None, limit=1)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6", "checkpoint-4"]
    assert fault(elsewhere / "checkpoint-4") is None
