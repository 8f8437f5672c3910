"""Claims about recipes by name: those of the package are found from any folder, and a file wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_jepa.cli import main
from llm_jepa.core.errors import UserError
from llm_jepa.families import check_recipe
from llm_jepa.shipped import recipe_names, recipe_path

ROOT = Path(__file__).parent.parent
NAME = "lm/tiny-llama/nl-rx-quickstart"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_recipe_has_a_name_and_none_that_others_extend():
    files = [path for path in (ROOT / "recipes").rglob("*.yaml") if not path.name.startswith("_")]
    assert recipe_names().keys() == {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in files}
    assert recipe_names()[NAME].startswith("A 0.7M-parameter Llama")


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_a_name_is_its_file(name):
    assert recipe_path(name).samefile(ROOT / "recipes" / f"{name}.yaml")
    assert recipe_path(f"recipes/{name}") == recipe_path(name)


def test_a_recipe_by_name_is_the_recipe_with_its_parents():
    by_name, by_path = check_recipe(NAME), check_recipe(ROOT / "recipes" / f"{NAME}.yaml")
    assert by_name.given == by_path.given and len(by_name.source.files) == 2


def test_a_file_wins(tmp_path):
    mine = tmp_path / NAME
    mine.parent.mkdir(parents=True)
    mine.write_text("family: lm\n")
    assert recipe_path(NAME) == Path(NAME)


@pytest.mark.parametrize(
    "name", ["lm/tiny-llama/nl-rx", "lm", "../recipes/lm/template", "lm/../lm/template", "/lm/template", ""]
)
def test_other_words_are_refused(name):
    with pytest.raises(UserError, match="neither a file nor a recipe of ours|is a folder"):
        check_recipe(name)


def test_the_list_is_printed(capsys):
    assert main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(recipe_names())
    assert main(["recipes", "--all", "1"]) == 2


def test_the_version_says_where_the_package_is(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert str(ROOT / "llm_jepa") in capsys.readouterr().out
