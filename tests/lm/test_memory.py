"""Claims about the dry run's figures: steps are those of the trainer, and the formula knows families and adapters.

tests/eval/test_memory.py has the terms of a whole model, and the committed peaks.
"""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from llm_jepa.lm.data import prepare_rows
from llm_jepa.lm.dry_run import count_steps, largest_batch, token_cost, way_of
from llm_jepa.lm.keys import ModelArguments
from llm_jepa.lm.memory import Batch, Counts, Way, activations, counts_of, held, moment_bytes, without_weights
from llm_jepa.lm.predictor_tokens import predictor_token_names
from llm_jepa.lm.trainer import LLMJEPATrainer
from tests.conftest import LLAMA, MORE_FAMILIES, config, tiny_model

COUNTS = Counts(1000, 100, 400, 10, 20, 2, 40)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (48, {}),
        (47, {"gradient_accumulation_steps": 4}),
        (47, {"gradient_accumulation_steps": 2, "dataloader_drop_last": True}),
        (33, {"num_train_epochs": 0.5}),
        (9, {"gradient_accumulation_steps": 8, "num_train_epochs": 2}),
        (48, {"max_steps": 5}),
    ],
)
def test_steps_are_those_of_the_trainer(count, options, tmp_path, tokenizer, dataset):
    args = config(tmp_path, **{"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4, **options})
    trainer = LLMJEPATrainer(tiny_model(tokenizer), args, dataset.select(range(count)), None, tokenizer)
    _, an_epoch, _, _, _, _, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert count_steps(count, args, 1) == (an_epoch, steps)
    if "dataloader_drop_last" not in options:
        assert count_steps(2 * count, args, 2) == (an_epoch, steps)


def test_the_largest_batch_and_the_tokens_are_those_of_the_collator(tmp_path, tokenizer):
    """The longest row is not the one with the longest LM row: its views count as well."""
    rows = [{"prompt": "a b c d " * n, "completion": "e"} for n in (1, 9, 2)]
    rows.append({"prompt": "a b c d " * 8, "completion": "e", "views": {"targets": ["f g h i " * 9]}})
    args = config(tmp_path, per_device_train_batch_size=1, objective="cosine")
    views, _, _ = prepare_rows(Dataset.from_list([{"views": None, **row} for row in rows]), None, tokenizer, args)
    tokenizer.add_tokens(predictor_token_names(1), special_tokens=True)
    trainer = LLMJEPATrainer(tiny_model(tokenizer), args, views, None, tokenizer)
    batches = [trainer.data_collator([row]) for row in views]
    sizes = [batch["input_ids"].numel() for batch in batches]
    assert max(range(4), key=lambda i: len(views[i]["input_ids"])) == 1 and max(sizes) == sizes[3] > sizes[1]
    largest = largest_batch(views, tokenizer, args)
    assert largest == Batch(sizes[3], int((batches[3]["labels"] != -100).sum()))
    pair = largest_batch(views, tokenizer, config(tmp_path, per_device_train_batch_size=2, objective="cosine"))
    assert pair.tokens == 2 * sizes[3], "two rows, padded to the longer one"
    tokens = sum(int((batch["doc"] >= 0).sum()) for batch in batches)
    said = token_cost(views, tokenizer, args)
    assert f"About {tokens:,} tokens an epoch" in said and f"({sum(map(len, views['input_ids'])):,} in" in said


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral", "qwen3_moe", "bloom", "mamba", "lfm2"])
def test_counts_of_families(family):
    """Built without memory, whatever the family; the layer is the largest one of the right list."""
    options = {**MORE_FAMILIES[family], "vocab_size": 300}
    full = AutoConfig.for_model(family, **options)
    empty = without_weights(full)
    assert empty is not None and all(weight.is_meta for weight in empty.parameters())
    counts, real = counts_of(empty), AutoModelForCausalLM.from_config(full)
    weights = {id(weight): weight.numel() for weight in real.parameters()}
    assert counts.total == sum(weights.values())
    blocks = next(m for m in real.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == counts.layers)
    assert counts.layer == max(sum(p.numel() for p in block.parameters()) for block in blocks)
    assert counts.layers * counts.layer < 1.5 * counts.total
    assert counts.is_tied == (real.get_input_embeddings().weight is real.get_output_embeddings().weight)
    if family == "qwen3_moe":
        assert counts.intermediate == 2 * 16  # two experts of 16 for each token


def test_bytes_of_optimizers_by_hand():
    """What torch's optimizers really hold for a weight of 4 bytes."""
    for name, optimizer in {
        "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop,
        "adamw_torch_fused": torch.optim.AdamW,
    }.items():  # fmt: skip
        weight = torch.nn.Parameter(torch.ones(100))
        tool = optimizer([weight], lr=0.1)
        weight.sum().backward()
        tool.step()
        state = [value for value in tool.state[weight].values() if torch.is_tensor(value) and value.dim()]
        assert moment_bytes(name) == sum(value.nbytes for value in state) / 100
    assert (moment_bytes("adamw_8bit"), moment_bytes("lion_32bit"), moment_bytes("adafactor")) == (2, 4, 0)
    assert moment_bytes("adamw_torch", 2) == 4


def test_further_terms_by_hand():
    tied = COUNTS._replace(is_tied=True)
    base = sum(held(COUNTS, 1000, Way()).values())
    assert sum(held(COUNTS, 1000, Way(average=True)).values()) == base + 4000
    assert sum(held(tied, 1000, Way()).values()) == base + 4 * 40 * 10
    assert held(COUNTS, 10, Way(token_rows=True))["token rows"] == 2 * 4 * 400
    assert held(tied, 10, Way(token_rows=True))["token rows"] == 3 * 4 * 400 and not held(tied, 10, Way())["tied"]
    assert sum(held(COUNTS, 1000, Way(trained_bytes=2, moments=4)).values()) == 6000


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_values_that_a_layer_keeps_with_an_adapter(dropout):
    """What autograd saves for one more layer of a Llama with LoRA, against the formula."""
    sizes = {**LLAMA, "hidden_size": 64, "intermediate_size": 256, "num_key_value_heads": 4, "vocab_size": 500}
    kept = []
    for layers in (2, 3):
        full = AutoConfig.for_model(**{**sizes, "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(full, attn_implementation="sdpa")
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", lora_dropout=dropout)
        model = get_peft_model(model, lora).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def keep(tensor, weights=weights, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage  # held, so that no address is used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(2, 128, dtype=torch.long), use_cache=False)
        kept.append(sum(storage.nbytes() for storage in saved.values()))
    counts = counts_of(without_weights(AutoConfig.for_model(**sizes)))
    way = Way(lora_dropout=dropout > 0)
    one, two = (activations(counts._replace(layers=n), Batch(256, 0), way) for n in (1, 2))
    assert kept[1] - kept[0] == pytest.approx(two - one, rel=0.15)


def test_a_recipe_in_the_terms_of_the_formula(tmp_path):
    model = ModelArguments(model_name_or_path="x", dtype="bfloat16")
    way = way_of(model, config(tmp_path, optim="adamw_torch"), "fsdp2", 1)
    assert way == Way(sharing="one", trained_bytes=2, frozen_bytes=2, moments=4)
    lora = ModelArguments(model_name_or_path="x", dtype="bfloat16", use_peft=True)
    args = config(tmp_path, optim="adamw_torch", gradient_accumulation_steps=2, activation_checkpointing=True)
    assert way_of(lora, args, "ddp", 4) == Way(
        "ddp", 4, False, True, True, frozen_bytes=2, trained_bytes=4, moments=8, lora_dropout=True, token_rows=True
    )
    ema = config(tmp_path, target_encoder="ema")
    assert way_of(ModelArguments(model_name_or_path="x"), ema, "ddp", 1) == Way(moments=0, average=True)
    assert math.isfinite(activations(COUNTS, Batch(1, 1), way))
