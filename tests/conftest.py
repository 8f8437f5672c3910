"""Tiny models and rows that need no network, and how close two computations of the same number must be.

One thread: these matrices are too small to share. LLM_JEPA_TEST_THREADS=2 asks for two.
"""

from __future__ import annotations

import gc
import os

THREADS = os.environ.get("LLM_JEPA_TEST_THREADS", "1")
for key, value in {
    "OMP_NUM_THREADS": THREADS,
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": os.environ.get("LLM_JEPA_TEST_GPUS", ""),
}.items():
    os.environ[key] = value

import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from hypothesis import settings
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from llm_jepa.lm.arguments import LLMJEPAConfig
from llm_jepa.lm.from_scratch import random_model, train_tokenizer
from llm_jepa.synthetic import nl_rx

torch.set_num_threads(int(THREADS))
disable_progress_bar()
settings.register_profile("any machine", deadline=None)  # no test is about time
settings.load_profile("any machine")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": LLAMA,
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8},
    "olmo2": {**LLAMA, "model_type": "olmo2"},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip

# The same shape as LLAMA with layer norms, which compute in float64. The RMS norms of transformers round to float32.
LAYER_NORM = {
    **LLAMA, "model_type": "starcoder2", "sliding_window": None, "tie_word_embeddings": False,
    "residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip

# More, for the claims about many families. Windows and chunks are 8 tokens, rows are longer. A large spread of the
# weights makes attention attend: at 0.02 it is nearly flat, and an error in who sees whom nearly invisible.
BASE = {key: value for key, value in LLAMA.items() if key != "model_type"} | {
    "pad_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
WINDOWED = {**BASE, "sliding_window": 8}
MIXED = {**WINDOWED, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
MORE_FAMILIES = {
    # attention with positions of its own or rotary ones: packed
    "llama": BASE,
    "qwen2": BASE,
    "qwen3": {**BASE, "head_dim": 8},
    "olmo2": BASE,
    "olmo3": MIXED,
    "mistral": WINDOWED,
    "ministral": {**MIXED, "head_dim": 8},
    "phi": BASE,
    "phi3": WINDOWED,
    "gemma": {**BASE, "head_dim": 8},
    "gemma2": {**MIXED, **GEMMA},
    "gemma3_text": {**MIXED, **GEMMA},
    "gemma4_text": {**MIXED, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": 400, "num_kv_shared_layers": 0},
    "cohere": BASE,
    "cohere2": MIXED,
    "gpt_neox": BASE,
    "smollm3": BASE,
    "granite": BASE,
    "stablelm": BASE,
    "glm4": {**BASE, "head_dim": 8},
    "starcoder2": WINDOWED,
    "modernbert-decoder": {**MIXED, "pad_token_id": 0},
    "gpt2": {**GPT, **NO_DROPOUT},
    "gptj": {**GPT, **NO_DROPOUT, "rotary_dim": 4},
    "opt": {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.3},
    "biogpt": {**BASE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "falcon": {**BASE, "alibi": False, "new_decoder_architecture": False},
    "mixtral": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**BASE, **EXPERTS, "num_experts": 4},
    "gpt_oss": {**MIXED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {**BASE, "head_dim": 8, "attention_chunk_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
                    "intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"],
                    "no_rope_layers": [1, 0]},
    "deepseek_v3": {**BASE, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
                    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    # ALiBi, windows by place, recurrence, convolution: rows of their own
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "initializer_range": 0.3},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256, "window_size": 8,
                "attention_types": [[["global", "local"], 1]], "resid_dropout": 0.0, "embed_dropout": 0.0,
                "attention_dropout": 0.0, "initializer_range": 0.3},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8,
               "n_groups": 1, "expand": 2, "chunk_size": 16},
    "qwen3_next": {**BASE, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16,
                   "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {**BASE, "layer_types": ["conv", "full_attention"]},
    "jamba": {**BASE, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "falcon_h1": {**BASE, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "head_dim": 8,
                  "mamba_chunk_size": 32},
    "recurrent_gemma": {**BASE, "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 256},
}  # fmt: skip


# How far two computations of the same number may be apart, relative to it. They add up in another order, by batches,
# ranks, threads or the instructions of the processor. A wrong factor or a missing pair changes 1e-3 and more.
EXACT = 1e-12  # both in float64; 3e-15 was measured after three steps of SGD
LOGGED = 1e-6  # training losses in the log: sums of a few micro-batches in float32, each rounded by up to 6e-8
FLOAT32 = 2e-5  # both in float32, after a few steps of SGD; 4e-6 was measured at a gradient norm of 124
UNIT32 = 1e-5  # both in float32: values of unit vectors, cosines and probabilities after one forward pass
FLOAT32_LOGITS = 1e-6  # against transformers' own loss, which rounds logits of any dtype to float32


def assert_same_weights(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    *,
    bound: float = EXACT,
    start: dict[str, Tensor] | None = None,
) -> None:
    """Weights (or gradients) by name differ by at most `bound` times the largest value of the same tensor.

    Relative to the tensor, not to each value: rounding follows the largest terms of a sum, even if they cancel. Nor is
    a tensor judged by less than a thousandth of the largest value of all: the exact gradient of some, such as the bias
    of keys, is 0, and what they hold is rounding. With `start`, the weights before training, it also checks that
    training moved them.
    """
    assert actual.keys() == expected.keys()
    if start is not None:
        moved = max(_largest(actual[name].detach() - start[name]) for name in actual)
        assert moved > 2e-4, "nothing was trained: equal weights would prove nothing"
    least = max(map(_largest, expected.values())) / 1000
    for name, tensor in expected.items():
        if bound == EXACT:
            assert tensor.dtype == torch.float64, f"{name} is {tensor.dtype}: compare in float64, or say a bound"
        allowed = bound * max(_largest(tensor), least)
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """Hide from the garbage collector what exists before a file's tests: mostly the objects of imported modules.

    Every `Trainer.train()` collects garbage. With all that transformers imports, that takes longer than training.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return nl_rx.generate(48, seed=3, wordings=(0, 1, 2, 3))


@pytest.fixture(scope="session")
def dataset(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows)


@pytest.fixture
def tokenizer(rows: list[dict]) -> PreTrainedTokenizerFast:
    return train_tokenizer(rows, 320)


def tiny_model(
    tokenizer: PreTrainedTokenizerFast, family: str = "llama", dtype: torch.dtype = torch.float32, **options: object
) -> PreTrainedModel:
    attention = options.pop("attn_implementation", "sdpa")
    return random_model({**FAMILIES[family], **options}, tokenizer, seed=0, dtype=dtype, attn_implementation=attention)


def exact_model(tokenizer: PreTrainedTokenizerFast, **options: object) -> PreTrainedModel:
    """A tiny model that computes in float64 from end to end, for comparisons with the bound `EXACT`."""
    return random_model({**LAYER_NORM, **options}, tokenizer, seed=0, dtype=torch.float64, attn_implementation="sdpa")


def family_model(
    tokenizer: PreTrainedTokenizerFast, family: str, dtype: torch.dtype = torch.float64, **options: object
) -> PreTrainedModel:
    """One of MORE_FAMILIES, evaluation mode. Experts one by one: their grouped product has no float64 here."""
    attention = options.pop("attn_implementation", None)  # the family's own choice: sdpa where it can
    settings = {**MORE_FAMILIES.get(family, BASE), **options, "vocab_size": len(tokenizer)}
    settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    experts = {"experts_implementation": "eager"} if any("expert" in key for key in settings) else {}
    set_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **settings), dtype=dtype, attn_implementation=attention, **experts
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(dtype).eval()  # some keep a few weights in float32


def config(output_dir: object, **options: object) -> LLMJEPAConfig:
    """A quiet CPU configuration; SGD, so that a step is the gradient and weights compare gradients."""
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "activation_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "diagnostics_pairs": 0,
    }
    return LLMJEPAConfig(**{**defaults, **options})  # type: ignore[arg-type]


def expect_refusal(capsys, argv, *said):
    """A command that ends with exit code 2 and one line on stderr that says all of `said`, without a traceback."""
    from llm_jepa.cli import main

    capsys.readouterr()
    code = main(argv)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("llm-jepa:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for text in said:
        assert text in lines[0], lines[0]
