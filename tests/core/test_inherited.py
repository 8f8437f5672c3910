"""Claims about what is answered before a library is imported: help, and a recipe that cannot be right."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jepa.core import inherited
from llm_jepa.core.errors import UserError
from llm_jepa.core.kinds import as_json, coerce, describe, from_json
from llm_jepa.core.recipe import recipe_fields
from llm_jepa.core.strict_yaml import load_yaml
from llm_jepa.families import FAMILIES, check_recipe, fields_of, groups_of, keys_of, parse_recipe
from tests.inherited_keys import as_text, current_table

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "accelerate")
LM = "family: lm\nmodel_config: {model_type: llama}\ntrain_data: rows.jsonl\noutput_dir: run\nuse_cpu: true\n"
VL = (
    "family: vl\nx_encoder: {model_type: vit}\npredictor: {model_type: llama}\ny_encoder: {model_type: bert}\n"
    "frame_size: 16\ntrain_data: clips.jsonl\noutput_dir: run\nuse_cpu: true\n"
)
needs_versions = pytest.mark.skipif(
    not inherited.is_of_installed_versions(), reason="the table is of other versions of transformers and TRL"
)


@needs_versions
def test_the_table_is_that_of_the_dataclasses():
    """Name, type, choices, default, and the help that is shown."""
    assert inherited.TABLE.read_text() == as_text(current_table()), "run python -m tests.inherited_keys"


@needs_versions
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fields_before_the_import_are_those_after_it(family):
    early, late = fields_of(family), recipe_fields(groups_of(family))
    assert early.keys() == late.keys() and len(early) > 100
    for name, (field, hint) in late.items():
        default = inherited.default_of(field)
        assert describe(early[name][1]) == describe(hint), name
        assert inherited.default_of(early[name][0]) == getattr(default, "value", default), name


@pytest.mark.parametrize("family", FAMILIES)
def test_types_survive_json(family):
    for _, hint in recipe_fields(groups_of(family)).values():
        written = json.loads(json.dumps(as_json(hint)))
        assert as_json(from_json(written)) == written and describe(from_json(written)) == describe(hint)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_arguments_have_every_key_of_ours(family):
    ours = recipe_fields([keys_of(family)[-1]])
    late = recipe_fields([groups_of(family)[-1]])
    assert ours and all(late[name] == (late[name][0], hint) for name, (_, hint) in ours.items())
    assert all(late[name][0].default == field.default for name, (field, _) in ours.items())


# -- without an import ------------------------------------------------------------------------------------------------

REFUSED = [
    # words of the command line -> a part of the line
    (["missing.yaml"], "No recipe at missing.yaml"),
    (["lm.yaml", "--jepa_wieght", "1"], "did you mean 'jepa_weight'?"),
    (["lm.yaml", "--learnin_rate", "1"], "did you mean 'learning_rate'?"),
    (["lm.yaml", "--load_in_8bit", "true"], "load_in_4bit: true takes NF4"),
    (["lm.yaml", "--load_in_4bit", "true"], "set use_peft: true, too"),
    (["lm.yaml", "--pool_frames", "true"], "it belongs to family: vl"),
    (["vl.yaml", "--jepa_weight", "1"], "it belongs to family: lm"),
    (["lm.yaml", "--seed", "2.7"], "seed: expected int, got 2.7"),
    (["lm.yaml", "--use_peft", "maybe"], "use_peft: expected true or false"),
    (["lm.yaml", "--optim", "adamw_torhc"], "did you mean 'adamw_torch'?"),
    (["lm.yaml", "--objective", "cosin"], "did you mean 'cosine'?"),
    (["vl.yaml", "--lr_scheduler_type", "lineal"], "did you mean 'linear'?"),
    (["lm.yaml", "--jepa_weight", "-1"], "jepa_weight=-1.0 must be 0 or more"),
    (["lm.yaml", "--learning_rate", "-1"], "learning_rate=-1.0 must be 0 or more"),
    (["lm.yaml", "--max_length", "0"], "max_length=0 must be 1 or more"),
    (["lm.yaml", "--packing", "true"], "packing=True is not supported"),
    (["lm.yaml", "--objective", "cosine", "--temperature", "1"], "temperature: 1.0 would be ignored"),
    (["lm.yaml", "--lora_r", "8"], "it belongs to use_peft: true"),
    (["lm.yaml", "--model_config", "null"], "Set exactly one of model_name_or_path"),
    (["lm.yaml", "--stop_after", "soon"], "stop_after"),
    (["vl.yaml", "--objective", "cosine", "--learn_temperature", "false"], "it belongs to objective: info_nce"),
    (["vl.yaml", "--objective", "l2", "--temperature", "1"], "temperature: 1.0 would be ignored"),
    (["vl.yaml", "--frame_size", "null"], "frame_size goes with"),
    (["vl.yaml", "--pairs_per_clip", "0"], "pairs_per_clip=0 must"),
    (["lm.yaml", "--train_data", "none.jsonl"], "No data file at none.jsonl"),
    (["lm.yaml", "--validation_data", "none/*.jsonl"], "No file matches none/*.jsonl"),
    (["lm.yaml", "--model_config", "null", "--model_name_or_path", "./none"], "No model folder at ./none"),
    (["lm.yaml", "--tokenizer_name_or_path", "./none"], "No model folder at ./none"),
    (["vl.yaml", "--train_data", "none.jsonl"], "No manifest at none.jsonl"),
    (["vl.yaml", "--y_encoder", "./none"], "No model folder at ./none"),
]
CHILD = """
import contextlib, io, json, sys
from llm_jepa.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    answers.append([code, error.getvalue(), [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(answers))
"""


@needs_versions
def test_help_and_refusals_import_no_library(tmp_path):
    """One line and exit code 2 for each mistake, before torch."""
    (tmp_path / "lm.yaml").write_text(LM)
    (tmp_path / "vl.yaml").write_text(VL)
    for name in ("rows.jsonl", "clips.jsonl"):
        (tmp_path / name).write_text("{}\n")
    commands = [["train", "--help"], *(["train", *words] for words, _ in REFUSED)]
    commands += [["train", *words, "--dry-run"] for words, _ in REFUSED[:2]]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands), json.dumps(HEAVY)],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers[0] == [0, "", []]
    said = [said for _, said in REFUSED]
    for words, part, (code, error, imported) in zip(commands[1:], [*said, *said[:2]], answers[1:], strict=True):
        assert code == 2 and part in error and error.count("\n") == 1, (words, error)
        assert not imported, f"{words} imported {imported}"


def test_a_recipe_that_is_right_is_not_refused_early(tmp_path):
    """Or the refusals above would show nothing."""
    for text in (LM, VL):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        assert parse_recipe(path).given == check_recipe(path).given


@pytest.mark.parametrize("words", [words[1:] for words, _ in REFUSED if words[0] == "lm.yaml"][9:17])
def test_python_refuses_the_same_values_in_the_same_words(words, tmp_path):
    """Who builds the dataclasses has no early check."""
    path = tmp_path / "recipe.yaml"
    path.write_text(LM)
    with pytest.raises(UserError) as early:
        check_recipe(path, words)
    fields = recipe_fields(groups_of("lm"))
    values = {name[2:]: coerce(name, load_yaml(text), fields[name[2:]][1]) for name, text in pairwise(words)}
    given = {"train_data": "x", "output_dir": "run", "use_cpu": True, "model_config": {"model_type": "llama"}, **values}
    with pytest.raises(UserError) as late:
        for group in groups_of("lm"):
            names = {field.name for field in dataclasses.fields(group) if field.init}
            group(**{name: value for name, value in given.items() if name in names})
    assert str(late.value) == str(early.value)


def pairwise(words):
    return zip(words[::2], words[1::2], strict=True)


# -- other versions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def older_table(tmp_path, monkeypatch):
    """A table of other versions: without `seed`, and with a key that is gone."""
    table = json.loads(inherited.TABLE.read_text())
    table["versions"]["transformers"] = "5.0.0"
    table["lm"]["gone"] = table["lm"].pop("seed")
    path = tmp_path / "older.json"
    path.write_text(json.dumps(table))
    monkeypatch.setattr(inherited, "TABLE", path)
    return path


def test_with_other_versions_the_dataclasses_decide(older_table, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(LM + "seed: 3\n")
    assert not inherited.is_of_installed_versions()
    assert parse_recipe(path).training.seed == 3
    with pytest.raises(UserError, match="unknown key '--gone'"):
        parse_recipe(path, ["--gone", "1"])
