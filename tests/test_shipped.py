"""Claims about what comes with the package: recipes and checkpoints are found by name, and a file or folder wins.

The checkpoints are the measured ones, small, free of local paths, and do what their cards say.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from eval.checkpoints import check_is_measured, file_hashes
from llm_jepa.cli import main
from llm_jepa.core.errors import UserError
from llm_jepa.core.publishable import check_file
from llm_jepa.families import check_recipe
from llm_jepa.lm import Embedder
from llm_jepa.shipped import CHECKPOINTS, checkpoint, checkpoint_names, model_source, recipe_names, recipe_path
from llm_jepa.synthetic import shapestream as world
from llm_jepa.vl import VLJEPA

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


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_checkpoints_have_names_and_a_sentence_each(capsys):
    assert checkpoint_names().keys() == {"nl-rx", "shapestream"}
    assert all(title.startswith("A ") and title.endswith((".", ":")) for title in checkpoint_names().values())
    assert main(["checkpoints"]) == 0
    *lines, empty, where = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(checkpoint_names()) and not empty
    assert "](" not in "".join(lines) and where == f"They are in {CHECKPOINTS}."


@pytest.mark.parametrize("name", ["nl-rx", "shapestream"])
def test_a_checkpoint_is_the_measured_one_and_its_card_says_which(name):
    """`file_hashes` compares with the result file; the card lists the hash of every weight file, and of no other."""
    hashes = file_hashes(name)
    card = (checkpoint(name) / "README.md").read_text()
    listed = dict(re.findall(r"^\| `(\S+\.safetensors)` \| `(\w{64})` \|$", card, re.MULTILINE))
    assert listed == hashes and "model.safetensors" in hashes


@pytest.mark.parametrize("name", ["nl-rx", "shapestream"])
def test_a_checkpoint_is_small_and_fit_to_be_published(name):
    folder = checkpoint(name)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    for path in files:
        check_file(path, path.relative_to(folder).as_posix(), folder)


def test_another_model_cannot_take_its_place(tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint("nl-rx"), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1e-3}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="does not hold the weights that completion-info_nce-seed0.json measured"):
        check_is_measured("nl-rx", folder)


def test_shapestream_knows_new_clips():
    """Of 52 clips that no run has seen: the kind by caption and by nearest text, the text written, an answer."""
    model = VLJEPA.from_pretrained(checkpoint("shapestream"))
    clips = [world.clip(9_000_000 + i, split="test", size=40) for i in range(52)]
    written = [model.caption(clip.frames).text for clip in clips]
    events = [(clip.event.kind, clip.event.actor, clip.event.patient) for clip in clips]
    right = sum(world.slots(text) == event for text, event in zip(written, events, strict=True))
    assert right >= 42, [*zip(written, events, strict=True)]
    questions = [(clip, question) for clip in clips for question in clip.questions]
    answers = [model.answer(clip.frames, question.question, question.candidates)[0] for clip, question in questions]
    right = sum(answer.text == question.answer for answer, (_, question) in zip(answers, questions, strict=True))
    assert right >= 0.85 * len(questions) and len(questions) > 52


def test_nl_rx_answers_and_finds_its_pairs(capsys):
    """The rows of the quickstart data are another draw of requests; the model answers and embeds them."""
    assert main(["generate", "nl-rx", "--prompt", "lines with a vowel"]) == 0
    assert "[AEIOUaeiou]" in capsys.readouterr().out
    embedder = Embedder.from_pretrained(checkpoint("nl-rx"))
    pairs = {
        "lines with a vowel": ".*([AEIOUaeiou]).*",
        "lines with a number": ".*([0-9]).*",
        "lines with the string 'dog'": ".*(dog).*",
        "lines ending with a capital letter": "(.*)([A-Z])",
    }
    similarity = embedder.encode_prompts(list(pairs)) @ embedder.encode_completions(list(pairs.values())).T
    assert similarity.argmax(dim=1).tolist() == [0, 1, 2, 3], similarity


def test_a_run_starts_from_a_name_as_from_its_folder(tmp_path, capsys):
    """One step gives the same weights, and not those of the start. A checkpoint of another family is refused."""
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "lines with a vowel", "completion": ".*([AEIOUaeiou]).*"}\n' * 2, encoding="utf-8")
    recipe = ["train", NAME, "--train_data", str(data), "--validation_data", "null", "--eval_strategy", "no",
              "--load_best_model_at_end", "false", "--model_config", "null", "--max_steps", "1",
              "--warmup_steps", "0", "--objective", "cosine", "--per_device_train_batch_size", "2"]  # fmt: skip
    for out, model in (("a", "nl-rx"), ("b", str(CHECKPOINTS / "nl-rx"))):
        assert main([*recipe, "--output_dir", str(tmp_path / out), "--model_name_or_path", model]) == 0
    trained, again = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    start = load_file(CHECKPOINTS / "nl-rx" / "model.safetensors")
    assert all(trained[name].equal(again[name]) for name in trained)
    assert any(not trained[name].equal(start[name].to(trained[name].dtype)) for name in trained)
    capsys.readouterr()
    other = ["--output_dir", str(tmp_path / "c"), "--model_name_or_path", "shapestream"]
    assert main([*recipe, *other]) == 2
    assert "VL-JEPA" in capsys.readouterr().err


def test_a_folder_wins_and_other_names_are_refused(tmp_path):
    assert model_source("nl-rx") == str(CHECKPOINTS / "nl-rx")
    assert model_source("user/name") == "user/name" and model_source("gpt2") == "gpt2"
    (tmp_path / "nl-rx").mkdir()
    assert model_source("nl-rx") == "nl-rx"
    with pytest.raises(UserError, match="'gpt2' is not a checkpoint of ours; these are: nl-rx, shapestream"):
        checkpoint("gpt2")
    with pytest.raises(UserError, match="not a checkpoint of ours"):
        checkpoint("../recipes")


def test_the_version_says_where_the_package_is(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert str(ROOT / "llm_jepa") in capsys.readouterr().out
