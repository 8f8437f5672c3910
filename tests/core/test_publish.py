"""Claims about publishing a folder: what is sealed is whole, links are not followed, forged manifests do not verify."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import pytest

from llm_jepa.core.checkpoint import (
    RUN_FILE,
    checkpoints,
    fault,
    fault_of_model,
    find_resume,
    is_finished_of_before,
    rotate,
)
from llm_jepa.core.errors import UserError
from llm_jepa.core.files import file_sha256, make_stage, write_json, written_whole
from llm_jepa.core.publish import (
    MANIFEST,
    broken,
    damage_of,
    leftovers,
    publish,
    publish_into,
    published,
    read_manifest,
    remove_leftovers,
    run_of,
    seal,
)

STATE = {"global_step": 4, "max_steps": 4, "log_history": []}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json")


def fill(folder: Path, *names: str, step: int = 4) -> Path:
    folder.mkdir(parents=True)
    for name in names or FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 50)
    write_json(folder / "trainer_state.json", {**STATE, "global_step": step})
    seal(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return fill(tmp_path / "checkpoint-4")


@pytest.fixture
def model(tmp_path):
    """A finished run."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / RUN_FILE, {})
    stage = make_stage(folder)
    publish_into(fill(stage / "run", "model.safetensors", "config.json", "README.md", "adapter/adapter.txt"), folder)
    shutil.rmtree(stage)
    return folder


def forge(folder: Path, value: object) -> None:
    (folder / MANIFEST).write_text(value if isinstance(value, str) else json.dumps(value))


# -- what verifies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "", "{", "[" * 100_000, "null", "[]", "{}", '"x"', "1e999",
        {"files": None}, {"files": []}, {"files": {}}, {"files": "abc"},
        {"files": [*FILES, "trainer_state.json", "README.md"]},
        {"files": {"a": None}}, {"files": {"a": {}}}, {"files": {"a": {"bytes": "1", "sha256": ""}}},
        {"files": {"a": {"bytes": True, "sha256": ""}}}, {"files": {"a": {"bytes": -1, "sha256": ""}}},
        {"files": {"../a": {"bytes": 1, "sha256": ""}}}, {"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}},
        {"files": {"a\0": {"bytes": 1, "sha256": ""}}}, {"files": {"": {"bytes": 1, "sha256": ""}}},
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_one_line(value, checkpoint, model):
    for folder, faulty in ((checkpoint, fault), (model, fault_of_model)):
        forge(folder, value)
        assert "\n" not in (faulty(folder) or "\n")


@pytest.mark.parametrize(
    "name", ["../a", "b/../../a", "/etc/passwd", "a\0", "", "..", "b/..", "a/", "./a", "b//a", "."]
)
def test_names_outside_of_the_folder_are_no_files_of_it(name, tmp_path):
    """Also if such a file exists, with that size and hash."""
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": file_sha256(tmp_path / "a")}
    (folder / "a").write_bytes(b"x")
    forge(folder, {"files": {"a": entry}})
    assert read_manifest(folder) == {"a": entry}
    forge(folder, {"files": {"a": entry, name: entry}})
    assert read_manifest(folder) is None
    assert broken(folder, required=lambda names: None) == "it has no readable manifest.json: the save was cut short"


@pytest.mark.parametrize(
    "entry",
    [
        None, [], {}, {"bytes": 1}, {"sha256": "x"}, {"bytes": True, "sha256": "x"}, {"bytes": 1.0, "sha256": "x"},
        {"bytes": -1, "sha256": "x"}, {"bytes": 1, "sha256": 1},
    ],
)  # fmt: skip
def test_an_entry_is_a_size_and_a_hash(entry, tmp_path):
    forge(tmp_path, {"files": {"a": entry}})
    assert read_manifest(tmp_path) is None


def test_an_empty_file_is_a_file(tmp_path):
    (tmp_path / "a").touch()
    seal(tmp_path)
    assert read_manifest(tmp_path) == {"a": {"bytes": 0, "sha256": file_sha256(tmp_path / "a")}}
    assert broken(tmp_path, required=lambda names: None) is None
    assert json.loads((tmp_path / MANIFEST).read_text()).keys() == {"files"} and run_of(tmp_path) is None
    seal(tmp_path, run="abc")
    assert run_of(tmp_path) == "abc"
    forge(tmp_path, {"files": {}, "run": 3})
    assert run_of(tmp_path) is None


def test_why_a_folder_is_broken(tmp_path):
    """Missing; another size; the same size and other bytes; only there; one too many; what the caller requires."""
    for name in ("a", "b/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    seal(tmp_path)
    why = functools.partial(broken, tmp_path, required=lambda names: None)
    assert why() is None
    (tmp_path / "b" / "c").write_bytes(b"13")
    assert why() == "b/c is damaged" and why(may_change=("b/c",)) is None
    (tmp_path / "b" / "c").write_bytes(b"123")
    assert why() == "b/c is damaged"
    (tmp_path / "b" / "c").unlink()
    assert why() == why(may_change=("b/c",)) == "b/c is missing"
    (tmp_path / "b" / "c").write_bytes(b"12")
    (tmp_path / "d").touch()
    assert why() == "d is not in its manifest.json" and why(is_shared=True) is None
    assert broken(tmp_path, required=lambda names: f"of {sorted(names)}") == "of ['a', 'b/c']"


def test_damage_of_a_published_folder(tmp_path):
    """Whole beside other files, of an earlier version without a manifest, damaged, and moved in part."""
    folder = tmp_path / "cache"
    with published(folder) as staged:
        (staged / "a").write_bytes(b"1")
    assert damage_of(folder) is None
    (folder / "mine").write_text("mine")
    assert damage_of(str(folder)) is None
    (folder / "a").write_bytes(b"2")
    assert damage_of(folder) == "a is damaged"
    (folder / MANIFEST).unlink()
    assert damage_of(folder) is None, "earlier versions wrote none"
    stage = make_stage(folder)
    (stage / "moving").mkdir()
    (stage / "moving" / MANIFEST).write_text("{}")
    assert damage_of(folder) == "it was only written in part"


def test_files_are_moved_into_folders_that_exist_and_that_do_not(tmp_path):
    folder = tmp_path / "run"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "old").write_text("old")
    names = ["a", "b/new", "c/d/e"]
    stage = make_stage(folder)
    for name in names:
        (stage / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / "run" / name).write_text(name)
    seal(stage / "run")
    publish_into(stage / "run", folder)
    shutil.rmtree(stage)
    assert [(folder / name).read_text() for name in names] == names and (folder / "b" / "old").read_text() == "old"
    assert broken(folder, required=lambda found: None, is_shared=True) is None
    assert set(read_manifest(folder)) == set(names)


def test_what_a_killed_move_left_behind_a_link_is_not_removed(tmp_path):
    """Of a/b/c the links a and a/b are not followed; without a link the file goes."""
    elsewhere = tmp_path / "elsewhere"
    for place in ("a", "a/b", None):
        folder = tmp_path / f"run {place}".replace("/", "-")
        shutil.rmtree(elsewhere, ignore_errors=True)
        (elsewhere / "b").mkdir(parents=True)
        (elsewhere / "b" / "c").write_text("mine")
        (elsewhere / "c").write_text("mine")
        folder.mkdir()
        if place == "a":
            (folder / "a").symlink_to(elsewhere)
        elif place == "a/b":
            (folder / "a").mkdir()
            (folder / "a" / "b").symlink_to(elsewhere)
        else:
            (folder / "a" / "b").mkdir(parents=True)
            (folder / "a" / "b" / "c").write_text("moved")
        moving = make_stage(folder) / "moving"
        moving.mkdir()
        forge(moving, {"files": {"a/b/c": {"bytes": 5, "sha256": "x"}}})
        assert remove_leftovers(folder) == 1
        assert (elsewhere / "b" / "c").exists() and (elsewhere / "c").exists()
        assert (folder / "a" / "b" / "c").exists() == (place is not None)


@pytest.mark.parametrize("name", [*FILES[:-1], "trainer_state.json"])
def test_what_a_resumed_run_needs_must_be_in_the_manifest(name, checkpoint):
    """transformers starts an optimizer, a schedule or the generators afresh if their file is missing, silently."""
    assert fault(checkpoint) is None
    (checkpoint / name).unlink()
    seal(checkpoint)
    assert fault(checkpoint) is not None


def test_a_run_in_fp16_needs_its_gradient_scaler(tmp_path):
    """It would start at 65,536 again, and skip steps that the uninterrupted run took."""
    run = {"seed": 0, "fp16": True}
    write_json(tmp_path / RUN_FILE, run)
    for step in (4, 6):
        fill(tmp_path / f"checkpoint-{step}", *FILES, *(["scaler.pt"] if step == 4 else []), step=step)
    assert "scaler.pt" in fault(tmp_path / "checkpoint-6", has_scaler=True)
    assert find_resume(tmp_path, run, resume="true") == str(tmp_path / "checkpoint-4")
    with pytest.raises(UserError, match="gradient scaler"):
        find_resume(tmp_path, run, resume=str(tmp_path / "checkpoint-6"))
    write_json(tmp_path / RUN_FILE, {"seed": 0})
    assert find_resume(tmp_path, {"seed": 0}, resume="true") == str(tmp_path / "checkpoint-6")


def test_every_process_has_its_generators(tmp_path):
    folder = fill(tmp_path / "checkpoint-4", *FILES[:3], "rng_state_0.pth", "rng_state_1.pth")
    assert fault(folder) is None and fault(folder, num_processes=2) is None
    assert "rng_state.pth" in fault(folder, num_processes=1)
    assert "rng_state_2.pth" in fault(folder, num_processes=3)


@pytest.mark.parametrize(
    "names",
    [
        ("optimizer.bin", "scheduler.pt", "pytorch_model_fsdp.bin"),
        ("optimizer_0/__0_0.distcp", "scheduler.pt", "pytorch_model_fsdp_0/__0_0.distcp"),
        ("global_step4/mp_rank_00_model_states.pt", "latest"),
        ("optimizer.pt", "scheduler.pt", "adapter_model.safetensors"),
        ("optimizer.pt", "scheduler.pt", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    ],
)
def test_checkpoints_of_other_kinds_verify(names, tmp_path):
    assert fault(fill(tmp_path / "checkpoint-4", *names, "rng_state.pth")) is None


def test_a_projector_is_not_the_model(tmp_path):
    folder = fill(tmp_path / "checkpoint-4", *FILES[1:4], "jepa_state.safetensors")
    assert fault(folder) == "it has no weights"


def test_a_checkpoint_holds_nothing_but_its_files(checkpoint, tmp_path):
    (checkpoint / ".nfs0001").write_text("a network file system keeps an open file so")
    assert fault(checkpoint) is None
    (checkpoint / "adapter_config.json").write_text("{}")
    assert fault(checkpoint) == f"adapter_config.json is not in its {MANIFEST}"
    (checkpoint / "adapter_config.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    (checkpoint / "global_step1").symlink_to(tmp_path / "elsewhere")
    assert fault(checkpoint) == f"global_step1 is not in its {MANIFEST}"


@pytest.mark.parametrize(
    "state",
    [
        {**STATE, "global_step": -5}, {**STATE, "global_step": 0}, {**STATE, "global_step": 3},
        {**STATE, "global_step": True}, {**STATE, "global_step": "4"}, {**STATE, "max_steps": None},
        {**STATE, "log_history": {}}, {**STATE, "log_history": [1]}, {}, [], None,
    ],
)  # fmt: skip
def test_a_state_of_another_step_is_one_line(state, checkpoint):
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    seal(checkpoint)
    assert "trainer_state.json" in fault(checkpoint)


def test_a_finished_model_is_what_was_saved(model):
    assert fault_of_model(model) is None
    (model / "README.md").write_text("edited since")
    (model / "embeddings.safetensors").write_text("of the user")
    assert fault_of_model(model) is None
    (model / "adapter" / "adapter.txt").write_text("")
    assert fault_of_model(model) == "adapter/adapter.txt is damaged"


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_finished_model_has_no_second_weights(name, model):
    (model / name).write_text("{}")
    assert fault_of_model(model) == f"{name} is not in its {MANIFEST}"


# -- publishing -------------------------------------------------------------------------------------------------------


def test_a_folder_of_the_same_name_is_replaced(tmp_path):
    target = fill(tmp_path / "checkpoint-4", *FILES, "old.txt")
    stage = make_stage(tmp_path)
    publish(fill(stage / "checkpoint-4"), target)
    assert fault(target) is None and not (target / "old.txt").exists()


@pytest.mark.parametrize("kind", ["checkpoint", "model"])
def test_links_are_replaced_and_not_followed(kind, tmp_path):
    """Planted before a save under the names that will be written, they would let it write elsewhere."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "target").write_text("precious")
    for name in ("checkpoint-4", "model.safetensors", "README.md", MANIFEST):
        (folder / name).symlink_to(elsewhere / "target")
    stage = make_stage(folder)
    if kind == "checkpoint":
        publish(fill(stage / "checkpoint-4"), folder / "checkpoint-4")
    else:
        publish_into(fill(stage / "run", "model.safetensors", "config.json", "README.md"), folder)
        (folder / "card.md").symlink_to(elsewhere / "target")
        with written_whole(folder / "card.md") as temporary:
            temporary.write_text("again")
    assert (elsewhere / "target").read_text() == "precious" and len(list(elsewhere.iterdir())) == 1


def test_a_link_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(tmp_path / "elsewhere")
    staged = fill(make_stage(tmp_path / "run") / "run", "model.safetensors", "adapter/weights.txt")
    with pytest.raises(OSError, match="adapter is a link"):
        publish_into(staged, tmp_path / "run")
    assert not list((tmp_path / "elsewhere").iterdir())
    remove_leftovers(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]


def test_stages_are_private_and_cannot_be_guessed(tmp_path):
    first, second = make_stage(tmp_path), make_stage(tmp_path)
    assert first != second and first.stat().st_mode & 0o777 == 0o700 and len(first.name) >= len(".stage-") + 8
    with pytest.raises(OSError, match="nowhere/a.json"):
        write_json_into_nowhere(tmp_path)


def write_json_into_nowhere(folder: Path) -> None:
    with written_whole(folder / "nowhere" / "a.json"):
        raise AssertionError("there is no such folder")


def test_a_published_file_has_the_usual_mode(tmp_path):
    before = os.umask(0o022)
    try:
        target = tmp_path / "checkpoint-4"
        publish(fill(make_stage(tmp_path) / "checkpoint-4"), target)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o755 and (target / MANIFEST).stat().st_mode & 0o777 == 0o644


# -- leftovers --------------------------------------------------------------------------------------------------------


def test_leftovers_are_removed_and_nothing_else(model):
    (model / "run.123.tmp.json").write_text("of an earlier version")
    (model / ".tmpAb12Cd").write_text("of safetensors")
    (model / "thesis.tmp.txt").write_text("of the user")
    fill(make_stage(model) / "checkpoint-4")
    kept = {path for path in model.iterdir() if path not in leftovers(model)}
    assert remove_leftovers(model) == 3
    assert set(model.iterdir()) == kept and fault_of_model(model) is None


def test_a_cut_move_is_taken_back(tmp_path, monkeypatch):
    """Killed before the manifest: what had been moved is removed, and the user's file is not."""
    (tmp_path / "thesis.txt").write_text("of the user")
    staged = fill(make_stage(tmp_path) / "run", "model.safetensors", "config.json", "README.md", "adapter/a.txt")
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if Path(b).name != MANIFEST else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish_into(staged, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "model.safetensors").exists() and not is_finished_of_before(tmp_path)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"thesis.txt"}


def test_a_file_cut_beside_a_finished_run_of_before_does_not_free_its_folder(model, capsys):
    """No manifest, and the stage of another writer, such as one of cards."""
    (model / MANIFEST).unlink()
    (make_stage(model) / "README.md").write_text("half a card")
    with pytest.raises(UserError, match="holds a run already"):
        find_resume(model, {}, resume=None)
    assert find_resume(model, {}, resume="true") == str(model)  # finished


def test_a_sealed_checkpoint_in_a_stage_is_not_a_cut_move(model):
    (model / MANIFEST).unlink()
    fill(make_stage(model) / "checkpoint-4")
    assert is_finished_of_before(model)
    remove_leftovers(model)
    assert (model / "model.safetensors").exists()


def test_a_run_with_an_id_is_not_finished_without_its_manifest(model):
    """Earlier versions gave no id, and wrote no manifest."""
    (model / MANIFEST).unlink()
    assert is_finished_of_before(model)
    write_json(model / RUN_FILE, {"id": "abc"})
    assert not is_finished_of_before(model)


# -- which run goes on ------------------------------------------------------------------------------------------------


def test_a_first_save_cut_by_an_earlier_version_starts_again(tmp_path, capsys):
    write_json(tmp_path / RUN_FILE, {})
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "model.safetensors").write_text("half")
    (tmp_path / "README.md").write_text("TRL's")
    for resume in (None, "true"):
        assert find_resume(tmp_path, {}, resume=resume) is None
        assert "(a save was cut short): starting at step 0" in capsys.readouterr().out


def test_a_finished_run_that_cannot_be_saved_again_is_left_alone(model):
    (model / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json is damaged, and there is no checkpoint"):
        find_resume(model, {}, resume="true")


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [9, 6, 4, 2]),
        (0, None, [9, 6, 4, 2]),
        (1, None, [9, 6]),
        (2, None, [9, 6, 4]),
        (1, 2, [9, 6, 2]),
        (2, 2, [9, 6, 2]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(limit, best, kept, tmp_path):
    """Checkpoint 9 is a damaged one of a later step: it is not the one to keep."""
    for step in (2, 4, 6, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, step=6, best=best and str(tmp_path / f"checkpoint-{best}"), limit=limit)
    assert [int(path.name.rpartition("-")[2]) for path in checkpoints(tmp_path)] == kept
