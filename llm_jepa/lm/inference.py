"""Batched greedy decoding, the same for `llm-jepa generate` and for scoring; and how likely given answers are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from ..core.diagnostics import evaluating
from ..core.errors import UserError
from ..core.losses import at_least_float32
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
    encoded = encode(tokenizer, prompts)
    batches = generate_batches(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size)
    results: dict[int, Generation] = {}
    with tqdm(total=len(encoded), desc="Generating", disable=not progress, unit="prompt") as bar:
        for batch in batches:
            results.update(batch)
            bar.update(len(batch))
    return [results[i] for i in range(len(prompts))]


def generate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[dict[int, Generation]]:
    """`generate` for prompts from `encode`, as they finish, longest first: index -> its continuation.

    A batch does not wait for a few slow rows: they are put aside and finished together, in batches of their own.
    The model's training mode is put back when the iteration ends, is closed or raises.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))  # longest first: out of memory comes early
    fresh: list[tuple[int, list[int]]] = [(i, []) for i in order]  # and what has been generated so far
    slow: list[tuple[int, list[int]]] = []
    stop = end_of_turn_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop or [0])[0]
    with evaluating(model):
        shared, states = _shared_prefix(model, encoded) if len(encoded) > 1 else (0, None)
        while fresh or slow:
            source = slow if len(slow) >= batch_size or not fresh else fresh
            batch, source[:] = source[:batch_size], source[batch_size:]
            prompts = [encoded[i] + begun for i, begun in batch]
            left = [max_new_tokens - len(begun) for _, begun in batch]
            length = max(map(len, prompts))
            # The padding stands before the tokens that are read here: on the left, or behind the shared prefix.
            ids = torch.tensor([p[:shared] + [pad] * (length - len(p)) + p[shared:] for p in prompts])
            mask = torch.tensor([[1] * shared + [0] * (length - len(p)) + [1] * (len(p) - shared) for p in prompts])
            cache = copy.deepcopy(states)
            if cache is not None:
                cache.batch_repeat_interleave(len(batch))
            enough = _Enough(length, left, stop, model.device)
            with torch.inference_mode():
                output = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    past_key_values=cache,
                    max_new_tokens=max(left),
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    eos_token_id=stop or None,
                    pad_token_id=pad,
                    stopping_criteria=StoppingCriteriaList([enough] if fresh or slow else []),
                    **PLAIN,
                )
            done = {}
            for (index, begun), room, row in zip(batch, left, output[:, length:].tolist(), strict=True):
                new = row[:room]
                if len(new) == room or not set(stop).isdisjoint(new):
                    done[index] = read(tokenizer, begun + new, stop)
                else:
                    slow.append((index, begun + new))
            if done:
                yield done


@torch.inference_mode()
def _shared_prefix(model: PreTrainedModel, encoded: Sequence[list[int]]) -> tuple[int, DynamicCache | None]:
    """How many tokens all prompts begin with (system prompt, header of the user turn), and their keys and values.

    (0, None) if they are few, or if the padding that then follows them would be seen: by anything but rotary positions
    and full attention (windows and ALiBi count places), or in another kind of cache.
    """
    config = model.config.get_text_config()
    first, last = min(encoded), max(encoded)
    longest = min(map(len, encoded)) - 1  # one token is left to read
    shared = next((i for i in range(longest) if first[i] != last[i]), longest)
    rotary = getattr(config, "rope_parameters", None) is not None and not getattr(config, "alibi", False)
    if shared < 8 or not rotary:
        return 0, None
    ids = torch.tensor([encoded[0][:shared]], device=model.device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).get("past_key_values")
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return 0, None
    return shared, cache


class _Enough(StoppingCriteria):
    """Ends a batch when at most an eighth of its rows go on and it took twice as long as half of them needed: then its
    steps cost more than prefilling the rest once more. A row ends at a stop token or with its own room."""

    def __init__(self, length: int, room: Sequence[int], stop: Sequence[int], device: torch.device):
        self.length, self.steps_of_half = length, 0
        self.room, self.stop = torch.tensor(room, device=device), torch.tensor(stop, dtype=torch.long, device=device)
        self.done = torch.zeros(len(room), dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        steps = input_ids.shape[1] - self.length
        self.done |= torch.isin(input_ids[:, -1], self.stop) | (steps >= self.room)
        done = int(self.done.sum())  # no further wait for the device: `generate` reads whether all are done, too
        if not self.steps_of_half and 2 * done >= len(self.done):
            self.steps_of_half = steps
        enough = 8 * (len(self.done) - done) <= len(self.done) and steps >= 2 * self.steps_of_half
        return torch.full_like(self.done, enough)


def read(tokenizer: PreTrainedTokenizerBase, row: list[int], stop: Sequence[int]) -> Generation:
    """Generated token ids, up to the first stop token, as text."""
    end = next((i for i, token in enumerate(row) if token in stop), None)
    text = tokenizer.decode(row[:end], skip_special_tokens=True).strip()
    return Generation(text, end is not None, len(row) if end is None else end + 1)


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, up to where the answer begins. Raises UserError as `generate`."""
    return [_encode(tokenizer, prompt, index) for index, prompt in enumerate(prompts)]


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


class Choice(NamedTuple):
    """Log-likelihoods in nats of the choices of one question, in their order."""

    log_likelihoods: tuple[float, ...]
    num_characters: tuple[int, ...]

    @property
    def most_likely(self) -> int:
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)

    @property
    def most_likely_per_character(self) -> int:
        """By log-likelihood per character, so that long choices stand a chance (lm-evaluation-harness: acc_norm)."""
        means = [ll / n for ll, n in zip(self.log_likelihoods, self.num_characters, strict=True)]
        return max(range(len(means)), key=means.__getitem__)


def choose_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[list[int]],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int,
) -> Iterator[dict[int, Choice]]:
    """How likely each choice is after its prompt, batch by batch, longest first: index of the question -> `Choice`.

    log p(choice | prompt) = sum over the choice's tokens, as the model would generate them: tokens that its generation
    config suppresses (predictor tokens) leave the softmax. Prompt and choice are tokenized apart, so a choice that
    follows a bare string brings its own leading space. `batch_size` counts rows (question x choice).
    """
    rows = [
        (index, at, tokenizer(choice, add_special_tokens=False)["input_ids"])
        for index, options in enumerate(choices)
        for at, choice in enumerate(options)
    ]
    rows.sort(key=lambda row: (-len(encoded[row[0]]) - len(row[2]), row[0], row[1]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    found: dict[int, dict[int, float]] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        length = max(len(encoded[index]) + len(ids) for index, _, ids in batch)
        ids = torch.full((len(batch), length), pad)  # padded on the right: positions need no help, causality hides it
        mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (index, _, choice_ids) in enumerate(batch):
            whole = encoded[index] + choice_ids
            ids[row, : len(whole)], mask[row, : len(whole)] = torch.tensor(whole), 1
            scored[row, len(encoded[index]) - 1 : len(whole) - 1] = True
        ids, mask, scored = ids.to(model.device), mask.to(model.device), scored.to(model.device)
        with torch.inference_mode(), evaluating(model):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=scored).logits
            logits = logits.reshape(-1, logits.shape[-1])  # [choice tokens of the batch, V]
            logits = at_least_float32(logits)
            suppressed = getattr(model.generation_config, "suppress_tokens", None) or []
            logits[:, suppressed] = -torch.inf
            targets = ids[:, 1:][scored[:, :-1]]
            each = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0].cpu()
        parts = each.split([len(choice_ids) for _, _, choice_ids in batch])
        for (index, at, _), part in zip(batch, parts, strict=True):
            found.setdefault(index, {})[at] = float(part.sum())
        whole_questions = [index for index, by_choice in found.items() if len(by_choice) == len(choices[index])]
        done = {index: found.pop(index) for index in whole_questions}
        yield {
            index: Choice(
                tuple(by_choice[at] for at in range(len(by_choice))),
                tuple(max(1, len(choice.strip())) for choice in choices[index]),
            )
            for index, by_choice in done.items()
        }
