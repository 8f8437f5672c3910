"""Claims about saved adapters: they hold what was trained and nothing else, and the lines of their card load them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_jepa.cli import main
from llm_jepa.lm.adapter import save_adapter
from llm_jepa.lm.inference import generate
from llm_jepa.lm.keys import ModelArguments
from llm_jepa.lm.loading import lora_config
from llm_jepa.lm.trainer import LLMJEPATrainer
from tests.conftest import FLOAT32, config, expect_refusal, tiny_model

RECIPE = {
    "family": "lm",
    "train_data": "train.jsonl",
    "output_dir": "run",
    "model_name_or_path": "base",
    "use_peft": True,
    "lora_r": 4,
    "lora_target_modules": "all-linear",
    "num_predictor_tokens": 2,
    "use_cpu": True,
    "activation_checkpointing": False,
    "learning_rate": 0.1,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, rows, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def base_model(tokenizer, *, tied: bool = True, spare_rows: int = 0) -> PreTrainedModel:
    """A model in the folder `base`, with its tokenizer."""
    model = tiny_model(tokenizer, tie_word_embeddings=tied)
    model.resize_token_embeddings(len(tokenizer) + spare_rows, mean_resizing=False)
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    return model


def train(*words: str, **changes) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}))
    assert main(["train", "recipe.yaml", *words]) == 0


def lines_of_card(folder: str) -> str:
    _, block = Path(folder, "README.md").read_text().split("```python\n")
    return block.partition("```")[0]


@pytest.mark.parametrize("spare_rows", [0, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_the_lines_of_the_card_load_the_model_that_was_merged(tied, spare_rows, tokenizer):
    """As they are, in the folder of base and run. 8 spare rows: the vocabulary does not grow, and must not shrink."""
    base_model(tokenizer, tied=tied, spare_rows=spare_rows)
    train()
    merged = AutoModelForCausalLM.from_pretrained("run").eval()
    for folder in ("run/adapter", "run/checkpoint-4"):
        names: dict = {}
        exec(lines_of_card(folder), names)
        model, tokens = names["model"].eval(), names["tokenizer"]
        predictors = tokens.convert_tokens_to_ids(["<|predictor_1|>", "<|predictor_2|>"])
        ids = torch.tensor([[*range(5, 40), *predictors]])
        with torch.no_grad():
            logits, expected = model(ids).logits, merged(ids).logits
        known = [i for i in range(len(tokens)) if i not in predictors]  # an untied head has no trained rows for them
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits[..., known], expected[..., known], rtol=FLOAT32, atol=FLOAT32)
        assert model.generation_config.suppress_tokens == merged.generation_config.suppress_tokens == predictors
        prompts = [[{"role": "user", "content": "lines with a vowel"}]]
        texts = [generate(m, tokens, prompts, max_new_tokens=8)[0].text for m in (model, merged)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("jepa_weight", [0.0, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_token_that_the_base_lacks_are_in_the_adapter(tied, jepa_weight, tokenizer, folder):
    """A token of the user's own: its new rows are nowhere else, in the embedding and in an untied head."""
    base_model(tokenizer, tied=tied)
    tokenizer.add_tokens(["<|mine|>"], special_tokens=True)
    tokenizer.save_pretrained("base")
    rows = Path("train.jsonl").read_text().replace("lines", "<|mine|> lines")
    assert "<|mine|>" in rows, "nobody writes it: this would prove nothing"
    Path("train.jsonl").write_text(rows)
    train(jepa_weight=jepa_weight)
    merged = AutoModelForCausalLM.from_pretrained("run").eval()
    names: dict = {}
    exec(lines_of_card("run/adapter"), names)
    mine = names["tokenizer"].convert_tokens_to_ids("<|mine|>")
    ids = torch.tensor([[*range(5, 40), mine]])
    with torch.no_grad():
        logits, expected = names["model"].eval()(ids).logits, merged(ids).logits
    torch.testing.assert_close(logits[..., : mine + 1], expected[..., : mine + 1], rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_holds_the_adapter_and_the_trained_rows_only(tied, tokenizer):
    base_model(tokenizer, tied=tied)
    train()
    sizes = {}
    for folder in ("run/adapter", "run/checkpoint-2"):
        saved = load_file(f"{folder}/adapter_model.safetensors")
        rows = {name: value for name, value in saved.items() if ".lora_" not in name}
        assert [value.shape[0] for value in rows.values()] == [2], "two predictor tokens"
        sizes[folder] = sum(value.numel() for value in saved.values())
    # q, k, v, o and gate, up, down of 2 layers, r = 4: 4 (inputs + outputs) each; and 2 rows of 32
    adapters = 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    assert set(sizes.values()) == {adapters + 2 * 32}


def test_modules_that_peft_trains_whole_are_saved(tokenizer, dataset):
    base_model(tokenizer, tied=False)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained("base")
    trainer = LLMJEPATrainer(model, config("run", num_predictor_tokens=2), dataset, None, tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model("adapter")
    saved = load_file("adapter/adapter_model.safetensors")
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(value.numel() for value in saved.values()) == trained
    names: dict = {}
    exec(lines_of_card("adapter").replace(f"{Path.cwd().name}/adapter", "adapter"), names)
    ids = torch.tensor([[*range(5, 40)]])
    with torch.no_grad():
        torch.testing.assert_close(names["model"](ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # of the earlier version
@pytest.mark.parametrize("written_by", ["us", "an earlier version"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_resumed_run_is_the_uninterrupted_run(written_by, tied, tokenizer, monkeypatch):
    """Bit for bit, also from a checkpoint that holds the embedding, as PEFT saves it by default."""
    base_model(tokenizer, tied=tied)
    train(output_dir="whole")
    save = PeftModel.save_pretrained
    with monkeypatch.context() as patch:
        if written_by != "us":
            patch.setattr(
                PeftModel,
                "save_pretrained",
                lambda self, *folder, **options: save(self, *folder, **{**options, "save_embedding_layers": "auto"}),
            )
        train(output_dir="cut")
    holds = any(
        "embed_tokens" in name and "delta" not in name
        for name in load_file("cut/checkpoint-2/adapter_model.safetensors")
    )
    assert holds == (written_by != "us"), "this would prove nothing"
    shutil.rmtree("cut/checkpoint-4")
    Path("cut/model.safetensors").unlink()
    train("--resume_from_checkpoint", "true", output_dir="cut")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "checkpoint-4/adapter_model.safetensors"):
        a, b = load_file(f"whole/{file}"), load_file(f"cut/{file}")
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file


def test_no_saved_file_names_a_path_of_this_machine(folder, tokenizer):
    """Only the records of the run do, which nobody needs in order to use the model."""
    base_model(tokenizer)
    train(model_name_or_path=str(folder / "base"))
    naming = [
        path for path in (folder / "run").rglob("*") if path.is_file() and str(folder).encode() in path.read_bytes()
    ]
    assert {path.name for path in naming} == {"run.json"}
    for path in (folder / "run").rglob("tokenizer_config.json"):
        assert not {"is_local", "local_files_only"} & set(json.loads(path.read_text()))
    card = Path("run/adapter/README.md").read_text()
    assert "base_model:" not in card and 'from_pretrained("base")' in card and "library_name: peft" in card


def test_a_base_of_the_hub_is_named(tokenizer, tmp_path):
    """With the commit that was loaded."""
    model = base_model(tokenizer)
    model.config._name_or_path, model.config._commit_hash = "some/model", "0123abc"
    model.name_or_path = "some/model"
    adapted = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    save_adapter(PeftModel(model, adapted), tokenizer, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model: some/model" in card and 'from_pretrained("some/model", revision="0123abc")' in card
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "some/model"
    )


def test_an_adapter_of_random_weights_says_that_it_is_useless_alone(folder):
    """Its base is nowhere: the card gives no lines that could not work."""
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    train(
        model_name_or_path=None, tokenizer_vocab_size=320,
        model_config={**shape, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    )  # fmt: skip
    card = Path("run/adapter/README.md").read_text()
    assert "cannot be used alone" in card and "```" not in card


def test_the_commands_say_that_a_folder_holds_an_adapter(tokenizer, capsys):
    """Of the adapter and of a checkpoint; a Hub user would try it."""
    base_model(tokenizer)
    train()
    for folder in ("run/adapter", "run/checkpoint-2"):
        expect_refusal(capsys, ["generate", folder, "--prompt", "x"], "holds an adapter, not a whole model")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.q_proj",
        r"model\.layers\.1\..*_proj",
        r".*\.(q|v)_proj",
        r"model\.layers\.\d\.mlp\.\w+_proj",
        "(.*up_proj)",
    ],
)
def test_a_pattern_adapts_the_modules_that_peft_would_find(pattern, tokenizer):
    base = base_model(tokenizer)
    arguments = ModelArguments(model_name_or_path="base", use_peft=True, lora_target_modules=pattern)
    ours = lora_config(arguments, base)
    assert not isinstance(ours.target_modules, str), "PEFT would use the engine"
    found = get_peft_model(base, ours).targeted_module_names
    expected = get_peft_model(tiny_model(tokenizer), LoraConfig(target_modules=pattern)).targeted_module_names
    assert sorted(found) == sorted(expected) and found


def test_a_pattern_of_a_short_name_adapts_no_longer_one():
    """PEFT takes `head` in a list for the end of `inner.head`, too."""
    base = torch.nn.ModuleDict(
        {"head": torch.nn.Linear(2, 2), "inner": torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2)})}
    )
    arguments = ModelArguments(model_name_or_path="base", use_peft=True, lora_target_modules="he(ad|)")
    targets = lora_config(arguments, base).target_modules
    assert get_peft_model(base, LoraConfig(target_modules=targets)).targeted_module_names == ["head"]


def test_an_adapter_is_no_model_for_generate_and_train(tokenizer, capsys):
    """One line says what to name instead. transformers would load the base that the adapter names."""
    base_model(tokenizer)
    train()
    for words in (
        ["generate", "run/adapter", "--prompt", "x"],
        ["train", "recipe.yaml", "--model_name_or_path", "run/adapter", "--output_dir", "new"],
    ):
        expect_refusal(
            capsys, words, "run/adapter holds an adapter, not a whole model: name the folder of the finished run"
        )
    assert main(["generate", "run", "--prompt", "x", "--max_new_tokens", "1"]) == 0
