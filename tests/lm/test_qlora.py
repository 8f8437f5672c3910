"""Claims about `load_in_4bit`: it computes what the dequantized weights compute, and leaves an adapter to be merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from llm_jepa.cli import main
from llm_jepa.families import parse_recipe
from llm_jepa.lm import commands, keys, memory
from tests.conftest import expect_refusal, tiny_model

bnb = pytest.importorskip("bitsandbytes")
RECIPE = {
    "family": "lm",
    "train_data": "train.jsonl",
    "validation_rows": 4,
    "output_dir": "run",
    "model_name_or_path": "base",
    "use_peft": True,
    "load_in_4bit": True,
    "lora_r": 4,
    "lora_dropout": 0.0,
    "objective": "info_nce",
    "use_cpu": True,
    "activation_checkpointing": False,
    "learning_rate": 0.01,
    "max_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, rows, tokenizer, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    model = tiny_model(tokenizer)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    return tmp_path


def train(*words: str) -> None:
    assert main(["train", "recipe.yaml", *words]) == 0


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def save_dequantized(model: torch.nn.Module) -> None:
    """The base model with what its layers are in 4 bits, as whole weights, in the folder `dense`."""
    dense = AutoModelForCausalLM.from_pretrained("base")
    layers = {
        name.removesuffix(".base_layer"): m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)
    }
    for name, layer in layers.items():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        dense.get_submodule(name).weight.data = weight.float()
    assert len(layers) == 7 * dense.config.num_hidden_layers
    shutil.copytree("base", "dense")
    dense.save_pretrained("dense")


@pytest.mark.parametrize("objective", ["info_nce", "cosine"])
def test_losses_and_gradients_are_those_of_the_dequantized_weights(objective):
    """After an evaluation, because bitsandbytes repacks the weights of a CPU there and then loses gradients."""
    trainer, _ = commands.build_trainer(parse_recipe("recipe.yaml", ["--objective", objective]))
    save_dequantized(trainer.base_model)
    whole = ["--load_in_4bit", "false", "--model_name_or_path", "dense", "--output_dir", "other"]
    expected, _ = commands.build_trainer(parse_recipe("recipe.yaml", ["--objective", objective, *whole]))
    adapter = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    torch.manual_seed(0)
    for name, p in expected.model.named_parameters():
        if p.requires_grad:
            p.data = torch.randn_like(p) / 10  # LoRA starts with B = 0, where A has no gradient
            adapter[name].data = p.data.clone()
    batch = next(iter(expected.get_train_dataloader()))
    losses = []
    for each in (trainer, expected):
        each.evaluate()
        each.model.train()
        loss = each.compute_loss(each.model, dict(batch))
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    compared = 0
    for name, p in expected.model.named_parameters():
        if p.requires_grad:
            assert p.grad.abs().max() > 1e-6, name
            torch.testing.assert_close(adapter[name].grad, p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item())
            compared += 1
    assert compared == len(adapter) > 14


def test_the_adapter_is_apart_and_export_merges_it_into_the_whole_weights(capsys):
    train()
    assert Path("run/adapter_model.safetensors").is_file() and not Path("run/model.safetensors").exists()
    card = Path("run/README.md").read_text()
    assert "library_name: peft" in card and "base model in 4 bits" in card
    assert "llm-jepa export run run-merged --to transformers --base base" in card
    expect_refusal(capsys, ["generate", "run", "--prompt", "x"], "holds an adapter", "llm-jepa export")
    assert main(["export", "run", "run-merged", "--to", "transformers", "--base", "base"]) == 0
    merged = AutoModelForCausalLM.from_pretrained("run-merged").eval()
    base = AutoModelForCausalLM.from_pretrained("base")
    base.resize_token_embeddings(merged.get_input_embeddings().weight.shape[0], mean_resizing=False)
    whole = PeftModel.from_pretrained(base, "run").eval()
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        logits, expected = merged(ids).logits, whole(ids).logits
    known = merged.get_input_embeddings().weight.shape[0] - 1  # an untied head has no trained row for the predictor
    torch.testing.assert_close(logits[..., :known], expected[..., :known], rtol=1e-4, atol=1e-4)
    assert main(["generate", "run-merged", "--prompt", "x", "--max_new_tokens", "2"]) == 0


def test_a_resumed_run_is_the_uninterrupted_one():
    train()
    expected = load_file("run/adapter_model.safetensors")
    trainer, _ = commands.build_trainer(parse_recipe("recipe.yaml", ["--output_dir", "again"]))
    trainer.add_callback(StopAt(2))
    trainer.train()
    trainer.release_folder()
    assert [path.name for path in Path("again").glob("checkpoint-*")] == ["checkpoint-2"]
    train("--output_dir", "again", "--resume_from_checkpoint", "true")
    resumed = load_file("again/adapter_model.safetensors")
    assert resumed.keys() == expected.keys() and len(resumed) > 14
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--use_peft", "false", "--lora_r", "16", "--lora_dropout", "0.05"], "set use_peft: true, too"),
        (["--dtype", "float64"], "not in float64"),
        (["--model_name_or_path", "null", "--model_config", "{model_type: llama}"], "would freeze random weights"),
    ],
)
def test_what_cannot_work_is_refused(words, said, capsys):
    expect_refusal(capsys, ["train", "recipe.yaml", *words], said)
    assert not Path("run").exists()


def test_without_bitsandbytes_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(keys, "find_spec", lambda name: None)
    expect_refusal(capsys, ["train", "recipe.yaml"], 'pip install "llm-jepa[quant]"')


def test_the_memory_of_4_bits_by_hand():
    """64 * 256 weights: 8,192 bytes, a byte for each of 256 blocks, 4 for all of them. Of the rest, 4 bytes each."""
    counts = memory.Counts(
        total=64 * 256 + 1000 + 10, layer=0, embeddings=1000, hidden=1, intermediate=1, layers=1, vocab=1000
    )
    held = memory.held(counts, 10, memory.Way(in_4bit=True))
    assert held["weights"] == 8192 + 256 + 4 + 4 * 1000 + 4 * 10
