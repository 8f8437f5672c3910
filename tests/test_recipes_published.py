"""Claims about the recipes at the published settings: the tables they repeat, and what their heads and README say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_jepa.core.recipe import EXTENDS
from llm_jepa.core.strict_yaml import read_yaml
from llm_jepa.families import parse_recipe
from recipes import table

ROOT = Path(__file__).parent.parent
LLAMA_1B = "llama-3.2-1b-instruct"
OURS = {"tiny-llama", "smollm2-135m-instruct"}  # folders of recipes without a published number
# Recipe -> learning rate, lambda, k. LLM-JEPA: arXiv:2509.14252v2, the table in the comment. STP: arXiv:2602.22617,
# table 2 for lambda, learning rate inherited, identity predictor.
PUBLISHED: dict[str, tuple[float, float, int]] = {
    f"{LLAMA_1B}/nl-rx-synth": (2e-5, 1, 1),  # 12
    f"{LLAMA_1B}/nl-rx-turk": (2e-5, 1, 1),  # 13
    f"{LLAMA_1B}/gsm8k": (2e-5, 0.5, 4),  # 13
    f"{LLAMA_1B}/spider": (4e-5, 1, 3),  # 13
    f"{LLAMA_1B}/nl-rx-synth-lora": (2e-5, 1, 1),  # 8
    f"{LLAMA_1B}/nl-rx-synth-dropout": (2e-5, 4, 1),  # 6
    f"{LLAMA_1B}/nl-rx-synth-from-scratch": (8e-5, 2, 3),  # 2
    "llama-3.2-3b-instruct/nl-rx-synth": (2e-5, 2, 0),  # 15
    "llama-3.1-8b-instruct/nl-rx-synth": (2e-5, 2, 0),  # 15
    "gemma-2-2b-it/nl-rx-synth": (1e-5, 2, 4),  # 12
    "olmo-2-0425-1b-instruct/nl-rx-synth": (8e-5, 2, 0),  # 12
    "olmo-2-1124-7b-instruct/nl-rx-synth": (2e-5, 20, 2),  # 15
    "qwen3-1.7b/gsm8k": (4e-5, 1, 0),  # 5
    "r1-distill-qwen-1.5b/gsm8k": (8e-5, 0.5, 1),  # 5
    f"{LLAMA_1B}/nl-rx-synth-stp": (2e-5, 0.02, 0),
    f"{LLAMA_1B}/nl-rx-turk-stp": (2e-5, 0.04, 0),
    f"{LLAMA_1B}/gsm8k-stp": (2e-5, 0.005, 0),
    f"{LLAMA_1B}/spider-stp": (4e-5, 0.04, 0),
    "llama-3.2-3b-instruct/nl-rx-synth-stp": (2e-5, 0.01, 0),
    "llama-3.1-8b-instruct/nl-rx-synth-stp": (2e-5, 0.0025, 0),
    "gemma-2-2b-it/nl-rx-synth-stp": (1e-5, 0.005, 0),
    "olmo-2-0425-1b-instruct/nl-rx-synth-stp": (8e-5, 0.01, 0),
    "qwen3-1.7b/gsm8k-stp": (4e-5, 0.02, 0),
    "r1-distill-qwen-1.5b/gsm8k-stp": (8e-5, 0.04, 0),
}
# The keys in which an arm may differ from its baseline: they mean nothing at jepa_weight 0.
JEPA = {"jepa_weight", "jepa_dropout", "objective", "stp_formula", "num_predictor_tokens", "context_view"}
RECIPES = table.runnable()
ARMS = [path for path in RECIPES if not table.is_twin(path)]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def given(path: Path) -> dict[str, Any]:
    return parse_recipe(path, ["--use_cpu", "true"]).given


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_values_are_those_of_the_papers_tables(recipe):
    values = given(ROOT / "recipes" / "lm" / f"{recipe}.yaml")
    assert (values["learning_rate"], values["jepa_weight"], values["num_predictor_tokens"]) == PUBLISHED[recipe]


def test_every_recipe_with_a_published_number_is_in_the_table_above():
    """Those without are ours: models that train on a CPU."""
    assert {name(path) for path in ARMS if table.head(path, table.PUBLISHED)} == set(PUBLISHED)
    assert {path.parent.name for path in ARMS if name(path) not in PUBLISHED} == OURS


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_what_all_published_runs_share(recipe):
    """Section 4.1 (epochs), run.sh (128 = 4 x 4 x 8), section 3.1 (cosine) or STP's formula."""
    values = given(ROOT / "recipes" / "lm" / f"{recipe}.yaml")
    assert values["num_train_epochs"] == 4 and values["max_length"] == 512 and values["seed"] == 82
    assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] == 128
    assert values["lr_scheduler_type"] == "linear" and "warmup_steps" not in values and values["weight_decay"] == 0
    assert values["label_protocol"] == "paper" and values["target_encoder"] == "self"
    assert (values["dtype"], values["bf16"]) == ("float32", True)
    if recipe.endswith("-stp"):
        assert (values["objective"], values["stp_formula"]) == ("stp", "paper")
    else:
        assert (values["objective"], values["context_view"]) == ("cosine", "message") and "stp_formula" not in values
    assert values.get("jepa_dropout", 0) == (0.75 if recipe.endswith("-dropout") else 0)
    assert values.get("use_peft", False) == recipe.endswith("-lora")


def test_lora_is_that_of_the_reference():
    """Alpha is twice the rank, dropout 0.1, all seven matrices of a layer."""
    values = given(ROOT / "recipes" / "lm" / LLAMA_1B / "nl-rx-synth-lora.yaml")
    assert (values["lora_r"], values["lora_alpha"], values["lora_dropout"]) == (512, 2 * 512, 0.1)
    assert {module.removesuffix("_proj") for module in values["lora_target_modules"]} == {*"qkvo", "gate", "up", "down"}


def test_from_scratch_is_llama_3_2_1b():
    """1,235,814,400 parameters, as its checkpoint: 128256 x 2048 embedding, 16 layers, a norm. Nothing is allocated."""
    path = ROOT / "recipes" / "lm" / LLAMA_1B / "nl-rx-synth-from-scratch.yaml"
    options = dict(parse_recipe(path, ["--use_cpu", "true"]).model.model_config or {})
    config = AutoConfig.for_model(options.pop("model_type"), **options, vocab_size=128_256)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == 1_235_814_400
    assert config.rope_parameters["rope_theta"] == 500_000 and config.rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize("path", ARMS, ids=name)
def test_an_arm_names_its_baseline_and_differs_from_it_in_what_that_does_not_read(path):
    """Its own twin, or that of its task; otherwise the comparison in the README is of two things at once."""
    baseline = path.with_name(str(table.head(path, table.BASELINE)["file"]))
    assert baseline in RECIPES and table.is_twin(baseline)
    ours, plain = given(path), given(baseline)
    differing = {key for key in {*ours, *plain} if ours.get(key, "unset") != plain.get(key, "unset")}
    assert {"jepa_weight", "output_dir"} <= differing <= {*JEPA, "output_dir"}
    own = path.with_name(f"{path.stem}-baseline.yaml")
    assert own == baseline or not own.exists()


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_head_of_a_recipe_says_what_it_is(path):
    """The model it loads, the file itself in the launch line, its folder in output_dir, where it was run."""
    lines = path.read_text().splitlines()
    title = re.fullmatch(table.TITLE, lines[0])
    assert title, lines[0]
    values = given(path)
    if values.get("model_name_or_path"):
        model = title["model"].removesuffix(" (random weights)")
        # A folder that a command of ours writes has a name in small letters.
        assert values["model_name_or_path"].endswith((f"/{model}", f"models/{model.lower()}"))
    assert all(str(path.relative_to(ROOT)) in line for line in lines if line.startswith("# Launch:"))
    if path.parent.name != "tiny-llama":
        assert values["output_dir"] == f"runs/{name(path)}"
        assert "Run by us" not in path.read_text(), "then put a result file beside the claim, and change this test"
    where = table.head(path, table.RUN).get("where")
    assert where in (None, "make quickstart") or (ROOT / where).is_dir()


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_number_says_where_it_comes_from(recipe):
    """On its line, wherever a published recipe sets one of these."""
    numbers = ("learning_rate:", "jepa_weight:", "num_predictor_tokens:", "jepa_dropout:", "lora_r:")
    lines = (ROOT / "recipes" / "lm" / f"{recipe}.yaml").read_text().splitlines()
    found = [line for line in lines if line.startswith(numbers)]
    assert found and all(re.search(r"# .*(table|section) \d", line) for line in found)


def test_one_recipe_repeats_nothing_of_its_parent():
    """A value set again to what it is already is copy-paste."""
    for path in RECIPES:
        own = read_yaml(path)
        if EXTENDS in own:
            above: dict[str, Any] = {}
            parent, chain = path, []
            while EXTENDS in (values := read_yaml(parent)):
                parent = parent.parent / values[EXTENDS]
                chain.append(read_yaml(parent))
            for values in reversed(chain):
                above |= values
            assert not [key for key in own if key != EXTENDS and key in above and own[key] == above[key]], path


def test_the_readme_is_up_to_date(capsys):
    assert table.main(check=True) == 0, capsys.readouterr().out
    text = table.README.read_text()
    assert all(f"](lm/{path.parent.name}/{path.name})" in text for path in RECIPES)


def test_a_stale_readme_is_found_and_mended(tmp_path, monkeypatch, capsys):
    """A number typed into the table does not stay."""
    copy = tmp_path / "README.md"
    copy.write_text(table.README.read_text().replace("71.46", "74.16"))
    monkeypatch.setattr(table, "README", copy)
    assert table.main(check=True) == 1 and "stale" in capsys.readouterr().out
    assert table.main(check=False) == 0 and table.main(check=True) == 0
    assert copy.read_text() == (ROOT / "recipes" / "README.md").read_text()
