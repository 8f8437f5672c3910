"""Claims about the family of a recipe: who says it, what older recipes mean, and which mistakes are one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jepa.cli import main
from llm_jepa.core.recipe import FAMILY, read_recipe, recipe_fields
from llm_jepa.families import FAMILIES, PLANNED, commands_of, groups_of, parse_recipe

ROOT = Path(__file__).parent.parent
OWN = {
    "lm": "model_name_or_path: some/model\n",
    "vl": "vl_model: some/model\n",
}
REST = "train_data: rows.jsonl\noutput_dir: runs/x\nuse_cpu: true\nseed: 3\n"


@pytest.fixture
def file(tmp_path):
    """Writes a recipe of lines and returns its path."""

    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "llm_jepa.families"]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_has_its_modules_and_no_field_of_the_recipes_own_keys(name):
    commands = commands_of(name)
    assert all(callable(getattr(commands, function)) for function in ("train", "build_trainer", "dry_run"))
    assert commands.VERBS.keys() == FAMILIES[name].verbs.keys()
    assert not {"extends", FAMILY} & recipe_fields(groups_of(name)).keys()
    assert all(isinstance(group, type) for group in groups_of(name))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_family_a_recipe_names_decides_without_a_warning(name, file, caplog):
    recipe = parse_recipe(file(f"family: {name}\n{OWN[name]}{REST}"))
    assert recipe.family == name and isinstance(recipe.training, groups_of(name)[2])
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("recipes/**/[!_]*.yaml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_recipe_of_ours_names_its_family(path):
    assert read_recipe(path).family == path.relative_to(ROOT).parts[1]


@pytest.mark.parametrize(
    ("text", "words", "name"),
    [
        (OWN["lm"], [], "lm"),
        (OWN["vl"], [], "vl"),
        ("", ["--vl-model", "x"], "vl"),
        ("", ["--vl_model=x"], "vl"),
        ("", ["--vl_model", "x", "--run_name", "y"], "vl"),
        # A word that is a value is not a key.
        (OWN["lm"], ["--run_name", "vl_model"], "lm"),
        (OWN["lm"], ["--model_revision", "x_encoder"], "lm"),
    ],
)
def test_an_older_recipe_gets_the_family_of_its_keys_and_one_warning(text, words, name, file, caplog):
    path = file(text + REST)
    assert parse_recipe(path, words).family == name
    assert warnings_of(caplog) == [
        f"{path} names no family; its keys are those of {name}. Write `family: {name}` into it."
    ]


def test_the_warning_is_one_line_on_stderr_and_only_of_the_first_process(file):
    """Several processes of one run read the recipe."""
    path = file(OWN["lm"] + REST)
    code = f"""
import os
from llm_jepa.families import parse_recipe
for rank in "120":
    os.environ["RANK"] = rank
    parse_recipe({str(path)!r})
    os.write(2, f"that was rank {{rank}}\\n".encode())
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "names no family" in line or "that was" in line]
    assert ["family" in line for line in lines] == [False, False, True, False]


def test_the_childs_family_wins_over_the_parents_and_the_command_line_over_both(file, caplog):
    file(f"family: lm\n{REST}", "parent.yaml")
    path = file("extends: parent.yaml\nfamily: vl\nvl_model: x\n", "child.yaml")
    assert parse_recipe(path).family == "vl"
    heir = file("extends: parent.yaml\nmodel_name_or_path: x\n", "heir.yaml")
    assert parse_recipe(heir).family == "lm"
    plain = file(f"family: vl\n{OWN['lm']}{REST}")
    assert parse_recipe(plain, ["--family", "lm"]).family == parse_recipe(plain, ["--family=lm"]).family == "lm"
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_family_is_no_part_of_the_identity_of_a_run(name, file):
    """A run that was started by an older recipe is resumed by the same recipe with its family written into it."""
    older, newer = (parse_recipe(file(text + OWN[name] + REST)) for text in ("", f"family: {name}\n"))
    assert json.dumps(older.identity()) == json.dumps(newer.identity())
    assert older.given == newer.given and FAMILY not in newer.given


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("family: lmm\n", [], "unknown family 'lmm'; write `family: lm` (fine-tunes a causal language model"),
        ("family: [lm]\n", [], "unknown family \"['lm']\"; write `family: lm`"),
        ("family: LM\n", [], "unknown family 'LM'"),
        ("", ["--family", "audio"], "unknown family 'audio'"),
        ("family: world\n", [], "family 'world' does not exist yet; this version has `family: lm`"),
        ("family: lm\nx_encoder: some/vit\n", [], "unknown key 'x_encoder' of family: lm: it belongs to family: vl"),
        ("family: lm\nx_encoder: some/vit\n", [], "write `family: vl` into the recipe to train one, or remove the key"),
        ("family: lm\n", ["--token-merge", "[2, 1, 1]"], "unknown key '--token_merge' of family: lm: it belongs to"),
        (
            "family: vl\nvl_model: x\njepa_weight: 1\n",
            [],
            "unknown key 'jepa_weight' of family: vl: it belongs to family: lm",
        ),
        (
            "family: lm\nx_encoder: some/vit\nlearnin_rate: 1\npairs_per_clip: 3\n",
            [],
            "unknown key 'learnin_rate'; did you mean 'learning_rate'?; unknown keys 'x_encoder', 'pairs_per_clip' of "
            "family: lm: they belong to family: vl; write `family: vl` into the recipe to train one, or remove the "
            "keys",
        ),
        ("family: vl\nvl_model: x\nlearnin_rate: 1\n", [], "unknown key 'learnin_rate'; did you mean 'learning_rate'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(text, words, said, file, capsys):
    path = file(text + REST)
    assert main(["train", str(path), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert str(path) in error or words


def test_no_planned_family_is_in_the_table():
    assert not set(PLANNED) & set(FAMILIES)
