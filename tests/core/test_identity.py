"""Claims about the identity of a run: what changes its result is refused by name, or said; nothing else is.

And a run that is made longer is the one that was that long from the start, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llm_jepa.cli import main
from llm_jepa.core import identity
from llm_jepa.core.checkpoint import fault, newest_complete
from llm_jepa.core.files import content_sha256, file_sha256
from llm_jepa.core.publish import MANIFEST, seal
from llm_jepa.families import parse_recipe
from llm_jepa.vl.keys import VLModelArguments
from tests.core.runs import BEST, LM, RESUME, VL, write_images, write_rows

TEMPLATE = "{% for turn in messages %}{{ turn['content'] }}{{ eos_token }}{% endfor %}"


class Run:
    """A recipe and its folder."""

    def __init__(self, folder: Path, values: dict) -> None:
        self.folder, self.out, self.values = folder, folder / "run", values

    def recipe(self, **changes: object) -> str:
        path = self.folder / "recipe.yaml"
        values = {**self.values, "output_dir": str(self.out), **changes}
        path.write_text(yaml.safe_dump(values))
        return str(path)

    def train(self, *words: str, **changes: object) -> int:
        return main(["train", self.recipe(**changes), *words])

    @property
    def record(self) -> dict:
        return json.loads((self.out / "run.json").read_text())

    def edit_record(self, **changes: object) -> None:
        (self.out / "run.json").write_text(json.dumps({**self.record, **changes}))

    def kill_before_the_final_save(self) -> None:
        for path in [MANIFEST, "model.safetensors", "README.md"]:
            (self.out / path).unlink()

    def result(self) -> tuple[str, list]:
        log = json.loads((self.out / "trainer_state.json").read_text())["log_history"]
        return file_sha256(self.out / "model.safetensors"), [(e["step"], e["loss"]) for e in log if "loss" in e]


def copy_of(run: Run, folder: Path) -> Run:
    """The same run in a copy of all of its folders."""
    shutil.copytree(run.folder, folder)
    values = json.loads(json.dumps(run.values).replace(str(run.folder), str(folder)))
    return Run(folder, values)


@pytest.fixture(scope="module")
def lm(rows, tmp_path_factory):
    """A finished run that names every kind of file."""
    folder = tmp_path_factory.mktemp("lm")
    start = {**LM, "train_data": str(write_rows(folder, rows)), "output_dir": str(folder / "start"), "max_steps": 1}
    (folder / "start.yaml").write_text(yaml.safe_dump(start))
    assert main(["train", str(folder / "start.yaml")]) == 0
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "accelerator.json").write_text('{"even_batches": true}')
    shutil.copytree(folder / "start", folder / "tokenizer")
    (folder / "validation.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1]) + "\n")
    values = {key: value for key, value in LM.items() if key not in ("model_config", "tokenizer_vocab_size")}
    values |= {
        "train_data": str(folder / "rows.jsonl"), "validation_data": str(folder / "validation.jsonl"),
        "model_name_or_path": str(folder / "start"), "tokenizer_name_or_path": str(folder / "tokenizer"),
        "chat_template_path": str(folder / "template.jinja"), "target_encoder": "base",
        "accelerator_config": str(folder / "accelerator.json"),
    }  # fmt: skip
    run = Run(folder, values)
    assert run.train() == 0
    return run


@pytest.fixture(scope="module")
def vl(tmp_path_factory):
    """A finished run of a VL-JEPA that was trained before."""
    folder = tmp_path_factory.mktemp("vl")
    start = {**VL, "train_data": str(write_images(folder)), "output_dir": str(folder / "start"), "max_steps": 1}
    (folder / "start.yaml").write_text(yaml.safe_dump(start))
    assert main(["train", str(folder / "start.yaml")]) == 0
    values = {key: value for key, value in VL.items() if key not in VLModelArguments.__dataclass_fields__}
    values |= {"train_data": str(folder / "clips.jsonl"), "vl_model": str(folder / "start")}
    run = Run(folder, values)
    assert run.train() == 0
    return run


# -- what is refused --------------------------------------------------------------------------------------------------


def move_a_weight(path: Path) -> None:
    weights = load_file(path)
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name].view(-1)[0] += 1
    save_file(weights, path, metadata={"format": "pt"})


def append(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def change_a_row(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


# the name that is said -> the file that changes, and how
FILES = {
    "lm": [
        ("model_name_or_path", "start/model.safetensors", move_a_weight),
        ("model_name_or_path", "start/config.json", append),
        ("tokenizer_name_or_path", "tokenizer/tokenizer.json", append),
        ("tokenizer_name_or_path", "tokenizer/chat_template.jinja", lambda path: path.write_text(TEMPLATE)),
        ("tokenizer_name_or_path", "tokenizer/additional_chat_templates/a.jinja", Path.touch),
        ("chat_template_path", "template.jinja", append),
        ("accelerator_config", "accelerator.json", append),
        ("train_data", "rows.jsonl", change_a_row),
        ("validation_data", "validation.jsonl", change_a_row),
    ],
    "vl": [
        ("vl_model", "start/model.safetensors", move_a_weight),
        ("vl_model", "start/target_tokenizer/tokenizer.json", append),
        ("vl_model", "start/processor_config.json", append),
        ("train_data", "3.png", lambda path: shutil.copy(path.with_name("4.png"), path)),
    ],
}


@pytest.mark.parametrize("family", FILES)
def test_a_file_that_changed_is_refused_by_name_and_can_be_allowed(family, request, tmp_path, capsys):
    run = copy_of(request.getfixturevalue(family), tmp_path / "copy")
    assert run.train(*RESUME) == 0, "the copy is another run"
    assert "already finished" in capsys.readouterr().out
    for name, file, change in FILES[family]:
        path = run.folder / file
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        change(path)
        assert run.train(*RESUME) == 2, file
        said = capsys.readouterr().err
        assert f"the run has changed in 1 place(s) ({name}: " in said and f"--allow_changed {name}" in said, said
        assert run.train(*RESUME, "--allow_changed", name) == 0, file
        assert f"Allowed to differ from here on: {name}: " in capsys.readouterr().out
        path.write_bytes(before) if before is not None else path.unlink()
    assert run.train(*RESUME) == 0


def test_a_torn_record_is_not_a_missing_one(lm, tmp_path, capsys):
    run = copy_of(lm, tmp_path / "copy")
    path = run.out / "run.json"
    path.write_text(path.read_text()[:-9])
    for value in ("true", "auto"):
        assert run.train("--resume_from_checkpoint", value) == 2
        assert f"{path} cannot be read" in capsys.readouterr().err
    path.unlink()
    assert run.train(*RESUME) == 2
    assert "has no run.json, so there is no run to resume" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["seed", "num_processes", "sharding", "mixed_precision"])
def test_a_setting_that_changed_is_refused_by_name(name, lm, tmp_path, capsys):
    run = copy_of(lm, tmp_path / "copy")
    defaults = {**run.record["defaults"], "seed": 7}
    run.edit_record(**({"defaults": defaults} if name == "seed" else {name: "another"}))
    assert run.train(*RESUME) == 2
    assert f"in 1 place(s) ({name}: " in capsys.readouterr().err
    assert run.train(*RESUME, "--allow_changed", name) == 0


def test_a_name_that_cannot_be_allowed_is_refused(lm, capsys):
    assert lm.train(*RESUME, "--allow_changed", "learning_rat") == 2
    assert "--allow_changed learning_rat: a run has no such key" in capsys.readouterr().err
    assert lm.train("--allow_changed", "learning_rate") == 2
    assert "--allow_changed goes with --resume_from_checkpoint" in capsys.readouterr().err
    # The optimizer's state has the old value: the change would have no effect.
    assert lm.train(*RESUME, "--allow_changed", "learning_rate", learning_rate=0.5) == 2
    assert "learning_rate: the checkpoint's optimizer state has the old value" in capsys.readouterr().err


def test_what_was_allowed_is_kept_with_the_step(lm, tmp_path, capsys):
    run = copy_of(lm, tmp_path / "copy")
    run.kill_before_the_final_save()
    shutil.rmtree(run.out / "checkpoint-4")
    words = [*RESUME, "--allow_changed", "temperature", "--allow_changed", "jepa_weight"]
    assert run.train(*words, temperature=0.5) == 0
    assert run.record["history"] == [{"step": 2, "changed": {"temperature": [0.07, 0.5]}}]
    assert run.record["temperature"] == 0.5 and run.record["id"] == lm.record["id"]
    assert run.result() != lm.result(), "this change would prove nothing"
    assert run.train(*RESUME, temperature=0.5) == 0  # from here on it is the run's own value
    assert run.train(*RESUME) == 2


# -- what is not refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FILES)
def test_writing_out_every_default_changes_nothing(family, request, capsys):
    run = request.getfixturevalue(family)
    defaults = run.record["defaults"]
    assert len(defaults) > 80
    assert run.train(*RESUME, **defaults) == 0, capsys.readouterr().err
    assert "already finished" in capsys.readouterr().out


def test_the_default_of_another_version_is_a_change(lm, tmp_path, capsys):
    """A later version may have another default of a key that the recipe leaves out, or no such key."""
    run = copy_of(lm, tmp_path / "copy")
    run.edit_record(defaults={**run.record["defaults"], "warmup_steps": 10, "gone_since": 3})
    assert run.train(*RESUME) == 2
    assert "in 1 place(s) (warmup_steps: 10 -> 0)" in capsys.readouterr().err


def test_other_versions_are_said_and_the_run_goes_on(lm, tmp_path, capsys):
    run = copy_of(lm, tmp_path / "copy")
    run.kill_before_the_final_save()
    versions = {**run.record["environment"], "torch": "1.0", "source files of llm-jepa": "other"}
    run.edit_record(environment=versions)
    assert run.train(*RESUME) == 0
    now = lm.record["environment"]
    files = f"source files of llm-jepa other -> {now['source files of llm-jepa']}"
    said = f"Warning: this run goes on with other versions, so its result may be another: {files}, torch 1.0 -> "
    assert said + now["torch"] in capsys.readouterr().out
    assert run.record["environment"] == now and run.record["history"][0]["changed"].keys() == {
        "torch", "source files of llm-jepa",
    }  # fmt: skip
    assert {"python", "transformers", "trl", "peft", "accelerate", "tokenizers", "datasets", "numpy"} <= now.keys()


def test_our_own_source_files_are_part_of_it(monkeypatch, tmp_path):
    package = tmp_path / "llm_jepa"
    (package / "core").mkdir(parents=True)
    (package / "core" / "losses.py").write_text("a")
    monkeypatch.setattr(identity, "__file__", str(package / "core" / "identity.py"))
    before = identity._source_sha256.__wrapped__()
    (package / "core" / "losses.py").write_text("b")
    assert identity._source_sha256.__wrapped__() != before


def test_a_run_of_an_earlier_version_goes_on(lm, tmp_path, capsys):
    """Its record has the given keys only, and its checkpoints do not say whose they are."""
    run = copy_of(lm, tmp_path / "copy")
    run.kill_before_the_final_save()
    new = identity.NOT_COMPARED | {"sharding", "mixed_precision"}
    record = {key: value for key, value in run.record.items() if key not in new}
    paths = ("model_name_or_path", "tokenizer_name_or_path", "chat_template_path", "accelerator_config")
    (run.out / "run.json").write_text(json.dumps({**record, **{key: run.values[key] for key in paths}}))
    for folder in run.out.glob("checkpoint-*"):
        seal(folder)
    shutil.rmtree(run.out / "checkpoint-4")
    assert run.train(*RESUME) == 0, capsys.readouterr().err
    assert run.result() == lm.result() and run.record["unmarked_to"] == 2
    assert fault(run.out / "checkpoint-2", run=run.record) is None
    seal(run.out / "checkpoint-4")
    assert fault(run.out / "checkpoint-4", run=run.record) == "it is of another run"


def test_half_a_repository_has_no_hash(tmp_path, monkeypatch):
    """A dry run downloads the tokenizer only. Later the weights are there, and the run is the same."""
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / ("c" * 40)
    (repository / "refs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert content_sha256("some/model", "main") is None
    tokenizer = content_sha256("some/model", "main", has_weights=False)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    assert content_sha256("some/model", "main") is not None
    assert content_sha256("some/model", "main", has_weights=False) == tokenizer


# -- whose checkpoint -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(lm, tmp_path_factory):
    """The same recipe with another seed."""
    run = copy_of(lm, tmp_path_factory.mktemp("other") / "copy")
    shutil.rmtree(run.out)
    run.values["seed"] = 7
    assert run.train() == 0
    return run


def test_a_checkpoint_of_another_run_is_skipped_with_a_line(lm, other, tmp_path, capsys):
    run = copy_of(lm, tmp_path / "copy")
    run.kill_before_the_final_save()
    shutil.rmtree(run.out / "checkpoint-4")
    shutil.copytree(other.out / "checkpoint-4", run.out / "checkpoint-4")
    assert newest_complete(run.out).name == "checkpoint-4", "it is whole, only not this run's"
    assert run.train(*RESUME) == 0
    assert "Skipped 1 damaged checkpoint(s): checkpoint-4 (it is of another run)" in capsys.readouterr().out
    assert run.result() == lm.result()


def test_a_checkpoint_of_another_run_by_name_or_alone_is_refused(lm, other, tmp_path, capsys):
    run = copy_of(lm, tmp_path / "copy")
    run.kill_before_the_final_save()
    foreign = str(other.out / "checkpoint-2")
    assert run.train("--resume_from_checkpoint", foreign) == 2
    assert f"Cannot resume from {foreign}: it is of another run." in capsys.readouterr().err
    for step in (2, 4):
        shutil.rmtree(run.out / f"checkpoint-{step}")
        shutil.copytree(other.out / f"checkpoint-{step}", run.out / f"checkpoint-{step}")
    assert run.train(*RESUME) == 2
    assert "No checkpoint" in (said := capsys.readouterr().err) and "it is of another run" in said
    assert run.train("--resume_from_checkpoint", foreign, "--allow_changed", "checkpoint") == 0


def test_a_final_model_of_another_run_is_not_this_run(lm, other, tmp_path, capsys):
    run = copy_of(lm, tmp_path / "copy")
    for path in other.out.iterdir():
        if path.is_file() and path.name != "run.json":
            shutil.copy(path, run.out / path.name)
    assert run.train(*RESUME) == 0
    assert "finished, but it is of another run: the model is saved again" in capsys.readouterr().out
    assert run.result() == lm.result() != other.result()


# -- longer runs ------------------------------------------------------------------------------------------------------

CONSTANT = {"lr_scheduler_type": "constant"}
WARM = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "validation_rows": 4}
LONGER = {
    "lm": {**LM, **CONSTANT, **BEST, "jepa_dropout": 0.4},
    "lm, warmup": {**LM, **WARM, "validation_rows": 4, "eval_strategy": "steps", "eval_steps": 2, "share_rows": True},
    "lm, inverse_sqrt": {**LM, "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 3},
    "lm, epochs": {**LM, **CONSTANT, **EPOCHS, "save_steps": 500},
    "lm, packing": {**LM, **CONSTANT, "jepa_weight": 0, "packing": True, "max_length": 64},
    "lm, lora": {**LM, **CONSTANT, "use_peft": True, "lora_r": 2},
    "vl": {**VL, **CONSTANT, "pairs_per_clip": 2},
}
FAST = ("lm", "vl")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in LONGER])
def test_a_run_made_longer_is_the_long_run(name, rows, tmp_path, capsys):
    values = dict(LONGER[name])
    key, short, long = "max_steps", 4, 8
    if name == "lm, epochs":
        del values["max_steps"]
        key, short, long = "num_train_epochs", 1, 2
    values["train_data"] = str(write_images(tmp_path) if values["family"] == "vl" else write_rows(tmp_path, rows))
    whole, run = (Run(tmp_path / part, values) for part in ("whole", "run"))
    for each, length in ((whole, long), (run, short)):
        each.folder.mkdir()
        assert each.train(**{key: length}) == 0
    first = run.result()
    capsys.readouterr()
    assert run.train(*RESUME, **{key: long}) == 0
    assert "It goes on as if it had been that long from the start." in capsys.readouterr().out
    assert run.result() == whole.result() != first
    assert run.train(*RESUME, **{key: long}) == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "killed", ["at once", *(pytest.param(k, marks=pytest.mark.slow) for k in ("later", "in the final save"))]
)
def test_a_longer_run_that_is_killed_goes_on(killed, rows, tmp_path, capsys):
    """The old final model is still there, and its last checkpoint says that no step is left."""
    run = Run(tmp_path, {**LM, **CONSTANT, "train_data": str(write_rows(tmp_path, rows))})
    assert run.train() == 0
    shutil.copytree(run.out, tmp_path / "before")
    assert run.train(*RESUME, max_steps=8) == 0
    whole = run.result()
    if killed == "in the final save":
        run.kill_before_the_final_save()
    else:
        for path in (tmp_path / "before").iterdir():
            if path.is_file() and path.name != "run.json":
                shutil.copy(path, run.out / path.name)
        for step in (8, 6)[: 2 if killed == "at once" else 1]:
            shutil.rmtree(run.out / f"checkpoint-{step}")
    capsys.readouterr()
    assert run.train(*RESUME, max_steps=8) == 0
    assert "already finished" not in capsys.readouterr().out
    assert run.result() == whole


REASONS = {
    "lr_scheduler_type: linear": {"lr_scheduler_type": "linear"},
    "lr_scheduler_type: cosine": {"lr_scheduler_type": "cosine"},
    "warmup_steps: 0.1": {**WARM, "warmup_steps": 0.1},
    "eval_steps: 0.5": {**BEST, "load_best_model_at_end": False, "eval_steps": 0.5},
    "target_encoder: ema": {"target_encoder": "ema"},
    "jepa_weight_end": {"jepa_weight_end": 2.0},
    "the evaluation at its last step, 4,": {**BEST, "load_best_model_at_end": False, "eval_steps": 3},
    "the checkpoint of its last step, 4,": {**BEST, "save_steps": 6, "eval_steps": 2},
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_run_whose_length_matters_is_not_made_longer(reason, lm, tmp_path, capsys):
    """The record is that of a run with such a key, so that nothing needs to be trained."""
    run = copy_of(lm, tmp_path / "copy")
    run.values.pop("validation_data")
    run.values |= {**CONSTANT, "validation_rows": 4, "target_encoder": "self", **REASONS[reason]}
    from llm_jepa.core.sources import data_sha256
    from llm_jepa.lm.commands import SOURCES
    from llm_jepa.lm.loading import load_data

    recipe = parse_recipe(run.recipe())
    rows, held_out = load_data(recipe.data, seed=0)
    record = identity.describe_run(recipe, data_sha256(rows), data_sha256(held_out))
    record |= {"id": run.record["id"], "contents": identity.contents(recipe, SOURCES)}
    (run.out / "run.json").write_text(json.dumps(record))
    assert run.train(*RESUME, max_steps=8) == 2
    said = capsys.readouterr().err
    assert f"the run has changed (max_steps: 4 -> 8), and {reason}" in said and "--output_dir NEW" in said, said
    assert run.train(*RESUME, max_steps=3) == 2
    assert "--allow_changed max_steps" in capsys.readouterr().err
    assert run.train(*RESUME, "--allow_changed", "max_steps", max_steps=3) == 2
    assert "checkpoint-4 has taken 4 steps; set more" in capsys.readouterr().err


def test_a_longer_run_goes_on_at_its_end_only(lm, tmp_path, capsys):
    run = copy_of(lm, tmp_path / "copy")
    run.edit_record(lr_scheduler_type="constant")
    words = ["--resume_from_checkpoint", str(run.out / "checkpoint-2")]
    assert run.train(*words, **CONSTANT, max_steps=8) == 2
    assert "goes on at the last checkpoint: write --resume_from_checkpoint true" in capsys.readouterr().err


def test_a_length_that_is_allowed_is_trained(lm, tmp_path, capsys):
    run = copy_of(lm, tmp_path / "copy")
    assert run.train(*RESUME, "--allow_changed", "max_steps", max_steps=6) == 0
    assert json.loads((run.out / "trainer_state.json").read_text())["global_step"] == 6
    assert run.record["history"] == [{"step": 4, "changed": {"max_steps": [4, 6]}}]


# -- forged checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["lm", "vl"])
def test_a_resealed_checkpoint_with_other_weights_is_one_line(family, request, tmp_path, capsys):
    """A weight that is missing would be random, and another one would be left out."""
    original = request.getfixturevalue(family)
    for forge in (lambda weights: weights.popitem(), lambda weights: weights.update(extra=torch.zeros(2))):
        run = copy_of(original, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        run.kill_before_the_final_save()
        weights = load_file(run.out / "checkpoint-4" / "model.safetensors")
        forge(weights)
        save_file(weights, run.out / "checkpoint-4" / "model.safetensors", metadata={"format": "pt"})
        seal(run.out / "checkpoint-4", run=run.record["id"])
        assert run.train(*RESUME) == 2
        said = capsys.readouterr().err.splitlines()  # above it are the progress bars of loading
        assert said[-1].startswith("llm-jepa: error: ") and "1 weight(s) of this model" in said[-1], said
