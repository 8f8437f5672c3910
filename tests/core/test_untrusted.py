"""Claims: every model that transformers saves loads again; one that is larger than its weights is not built."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_jepa.core.errors import UserError
from llm_jepa.core.safetensors_files import Weights, no_larger_than, read_weights
from llm_jepa.core.untrusted import config_fault, load_config
from llm_jepa.lm.loading import model_from
from tests.conftest import MORE_FAMILIES, family_model, tiny_model

SAMPLE = ["llama", "gpt2", "gpt_oss", "mixtral", "deepseek_v3", "mamba2"]  # tied, buffers, experts, no attention


@pytest.mark.parametrize(
    "family", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES]
)
def test_every_family_loads_what_it_saved(family, tokenizer, tmp_path):
    model = family_model(tokenizer, family, torch.float32)
    model.save_pretrained(tmp_path)
    assert read_weights(str(tmp_path)).num_tensors > 5
    saved, loaded = model.state_dict(), model_from(str(tmp_path), dtype=torch.float32).state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_a_checkpoint_in_shards_loads(tokenizer, tmp_path):
    model = tiny_model(tokenizer)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = model_from(str(tmp_path)).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_a_config_chooses_no_attention(tokenizer, tmp_path):
    """What the file says is not kept: transformers would run it for whoever loads the config."""
    tiny_model(tokenizer).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_attn_implementation": "flash_attention_2"}))
    assert load_config(str(tmp_path))._attn_implementation is None
    assert model_from(str(tmp_path)).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "options",
    [
        {"attn_implementation": "org/name"},
        {"text_config": {"_attn_implementation": "org/name@v1"}},
        {"parts": [{"attn_implementation": {"": "org/name:f"}}]},
        {"experts_implementation": "org/name"},
    ],
)
def test_code_of_the_hub_is_refused_wherever_it_is_named(options):
    assert "which is code to download" in config_fault(options)
    assert (
        config_fault(json.loads(json.dumps(options).replace("org/name", "sdpa").replace("@v1", "").replace(":f", "")))
        is None
    )


def test_a_model_may_not_be_much_larger_than_its_weights():
    """Allowed are 4 times the numbers in the files and 10^8 more, and 4 times the tensors and 1,000 more."""
    weights = Weights(num_tensors=10, num_elements=1000)
    with pytest.raises(UserError, match="1,000,000,000 numbers"), no_larger_than(weights, "x"), torch.device("meta"):
        torch.nn.Linear(10**5, 10**4, bias=False)
    with no_larger_than(weights, "x"), torch.device("meta"):
        torch.nn.Linear(10**4, 10**4 - 1, bias=False)
    with pytest.raises(UserError, match="more than 1,041 tensors"), no_larger_than(weights, "x"):
        for _ in range(2000):
            torch.nn.Linear(1, 1, bias=False)
    torch.nn.Linear(10**4, 10**4, device="meta")  # nothing is counted any more
    torch.nn.Linear(10**5, 10**4, device="meta")


def test_buffers_count(tokenizer, tmp_path):
    """A GPT-Neo has a mask of positions x positions in each layer, which no file holds."""
    model = family_model(tokenizer, "gpt_neo", torch.float32)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.max_position_embeddings = 20_000
    with (
        pytest.raises(UserError, match="larger model than its weights"),
        no_larger_than(read_weights(str(tmp_path)), "x"),
        torch.device("meta"),
    ):
        AutoModelForCausalLM.from_config(config)
