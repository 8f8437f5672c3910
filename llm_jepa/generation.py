"""Batched greedy decoding, the same for `llm-jepa generate` and for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import UserError
from .views import end_of_turn_ids

Prompt = str | list[dict[str, Any]]


# What a checkpoint's generation_config may ask for (Qwen2.5: repetition_penalty) and argmax decoding does not do.
PLAIN = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
}


class Generation(NamedTuple):
    text: str  # special tokens removed, edge whitespace stripped
    stopped: bool  # ended by itself, not by max_new_tokens
    num_tokens: int  # generated, the stop token included


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Generation]:
    """Continue each prompt greedily, in the order given.

    Prompts are strings, or lists of messages (rendered with the chat template and its generation prompt). Batches are
    left padded and sorted by length; decoding stops at the template's end of turn and at eos. Predictor tokens are
    never generated (`suppress_tokens` of the model's generation config).

    Raises UserError for an empty prompt, or messages without a chat template.
    """
    encoded = [_encode(tokenizer, prompt, index) for index, prompt in enumerate(prompts)]
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))  # longest first: out of memory comes early
    stop = end_of_turn_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop or [0])[0]
    results: dict[int, Generation] = {}
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="Generating", disable=not progress, unit="batch"):
            indices = order[start : start + batch_size]
            length = max(len(encoded[i]) for i in indices)
            ids = torch.tensor([[pad] * (length - len(encoded[i])) + encoded[i] for i in indices])
            mask = torch.tensor([[0] * (length - len(encoded[i])) + [1] * len(encoded[i]) for i in indices])
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=stop or None,
                pad_token_id=pad,
                **PLAIN,
            )
            for index, row in zip(indices, output[:, length:].tolist(), strict=True):
                end = next((i for i, token in enumerate(row) if token in stop), None)
                text = tokenizer.decode(row[:end], skip_special_tokens=True).strip()
                results[index] = Generation(text, end is not None, len(row) if end is None else end + 1)
    finally:
        model.train(was_training)
    return [results[i] for i in range(len(prompts))]


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, index: int) -> list[int]:
    if not prompt:
        raise UserError(f"Prompt {index} is empty.")
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise UserError(f"Prompt {index} holds messages, but the tokenizer has no chat template; give it as a string.")
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"Prompt {index} is empty.")
    return list(ids)
