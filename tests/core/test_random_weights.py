"""Claims about models with random weights: what cannot be built is one line that names the key."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, set_seed

from llm_jepa.core.errors import UserError
from llm_jepa.core.random_weights import config_of, random_weights

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip
VIT = {"model_type": "vit", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
       "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}  # fmt: skip


def build(model_class, options):
    config = config_of(options, what="part", **({} if options["model_type"] == "vit" else {"vocab_size": 300}))
    return random_weights(model_class, config, what="part", dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (GPT2 | {"n_layer": 100_000}, "n_layer is 100,000; 1,000 are the most"),
        (GPT2 | {"n_layer": 10**12}, "n_layer is 1000000000000"),
        (GPT2 | {"n_layer": 1_001}, "n_layer is 1,001"),
        (LLAMA | {"num_hidden_layers": 50_000}, "num_hidden_layers is 50,000"),
        (GPT2 | {"n_embd": 10_000_000}, "lower n_embd: 10,000,000"),
        (GPT2 | {"n_positions": 10**12}, "lower n_positions: 1,000,000,000,000"),
        (GPT2 | {"n_inner": 10**15}, "lower n_inner: "),
        (LLAMA | {"intermediate_size": 10**12}, "lower intermediate_size: "),
        (LLAMA | {"head_dim": 10**10}, "lower head_dim: "),
        (GPT2 | {"n_embd": 2**62}, "n_embd: 4,611,686,018,427,387,904"),
        (GPT2 | {"n_head": 0}, "n_head is 0; it must be 1 or more"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (LLAMA | {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        (LLAMA | {"intermediate_size": -5}, "intermediate_size: -5 is below 0"),
        (GPT2 | {"n_head": 3}, "must be divisible by num_heads"),
        (GPT2 | {"activation_function": "zz"}, "activation_function: 'zz' is unknown"),
        (LLAMA | {"hidden_act": "zz"}, "hidden_act: 'zz' is unknown"),
        (GPT2 | {"n_layer": "two"}, "n_layer"),
        (GPT2 | {"n_embedding": 3}, "gpt2 has no n_embedding"),
        ({"model_type": "gpt"}, "not know model_type 'gpt'"),
        (VIT | {"image_size": 10**7}, "lower image_size: 10,000,000"),
        (VIT | {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        (VIT | {"hidden_size": 10**8}, "lower hidden_size: 100,000,000"),
        (VIT | {"patch_size": 0}, "patch_size is 0"),
        (VIT | {"hidden_act": "zz"}, "hidden_act: 'zz' is unknown"),
    ],
)
def test_a_slip_in_a_size_or_a_name(options, said):
    with pytest.raises(UserError) as error:
        build(AutoModel if options["model_type"] == "vit" else AutoModelForCausalLM, options)
    message = str(error.value)
    assert message.startswith("part: ") and said in message and "\n" not in message and len(message) < 300, message


def test_more_memory_than_the_machine_has_is_refused_and_as_much_is_not(monkeypatch):
    """Counted in the type of the weights, and nothing is allocated for it."""
    count = sum(p.numel() for p in build(AutoModelForCausalLM, LLAMA | {"tie_word_embeddings": False}).parameters())

    class Memory:
        total = 4 * count - 4

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    with pytest.raises(UserError, match="GB"):
        build(AutoModelForCausalLM, LLAMA | {"tie_word_embeddings": False})
    monkeypatch.setattr(Memory, "total", 8 * count)
    build(AutoModelForCausalLM, LLAMA | {"tie_word_embeddings": False})


@pytest.mark.parametrize("options", [GPT2, LLAMA])
def test_the_weights_are_those_of_a_model_that_nobody_has_counted(options):
    config = config_of(options, what="part", vocab_size=300)
    set_seed(3)
    built = random_weights(AutoModelForCausalLM, config, what="part")
    set_seed(3)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options, vocab_size=300))
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in built.state_dict().items())


def test_lack_of_memory_stays_lack_of_memory():
    class Builder:
        @staticmethod
        def from_config(config, **options):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as error:
        build(Builder, GPT2)
    assert not isinstance(error.value, UserError)
