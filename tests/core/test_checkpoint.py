"""Claims about crashes: whatever a kill leaves, the run resumes from a whole checkpoint or says why it cannot."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llm_jepa.cli import main
from llm_jepa.core.checkpoint import RUN_FILE, checkpoints, fault, find_resume, newest_complete
from llm_jepa.core.errors import UserError
from llm_jepa.core.files import content_sha256, file_sha256, write_json
from llm_jepa.core.publish import MANIFEST, seal
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
