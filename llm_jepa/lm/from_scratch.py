"""A tokenizer and a model with random weights, for training from scratch without any download."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from ..core.random_weights import config_of, random_weights
from ..core.tokenizer import train_bpe
from .rows import parse_row


def train_tokenizer(rows: Iterable[dict[str, Any]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (`core.tokenizer.train_bpe`) over the texts of TRL rows."""
    return train_bpe(_texts(rows), vocab_size)


def random_model(
    model_config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, *, seed: int, **kwargs: Any
) -> PreTrainedModel:
    """A causal LM with random weights drawn from `seed`; vocabulary and special ids come from the tokenizer.

    Raises UserError for a model_type, key or value that transformers does not know, and for impossible sizes.
    """
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = config_of(model_config, what="model_config", vocab_size=len(tokenizer), **special)
    kwargs["attn_implementation"] = kwargs.get("attn_implementation") or default_attention(config)
    set_seed(seed)
    model = random_weights(AutoModelForCausalLM, config, what="model_config", **kwargs)
    # Set after building. Before, it would become the embedding's padding_idx, and because pad = eos = end of turn, that
    # token's input row would stay zero without gradient. (Llama-3-Instruct has no pad_token_id either.)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def default_attention(config: PreTrainedConfig) -> str:
    """sdpa if the model supports it, else eager. A downloaded config does not decide which attention code runs."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _texts(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    for index, row in enumerate(rows):
        example = parse_row(row, f"row {index}")
        for side in (example.prompt, example.completion):
            if isinstance(side, str):
                yield side
            else:
                yield from (str(message["content"]) for message in side)
