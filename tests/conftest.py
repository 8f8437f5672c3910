"""Tiny offline models and rows. One thread: these matrices are too small to share, and waiting threads only cost."""

from __future__ import annotations

import os

for key, value in {
    "OMP_NUM_THREADS": "1",
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
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llm_jepa.config import LLMJEPAConfig
from llm_jepa.data import nl_rx
from llm_jepa.from_scratch import random_model, train_tokenizer

torch.set_num_threads(1)
disable_progress_bar()

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
