"""Batched greedy decoding, for `llm-jepa generate` and for scoring, and the likelihood of given answers."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from ..core.decoding import generate_as_asked, suppressed_ids
from ..core.diagnostics import evaluating
from ..core.losses import at_least_float32
from .limits import check_sequences, position_limit
from .prompts import Prompt, TurnEnd, answer_row, encode, form_of, turn_end, without_opening

logger = logging.get_logger(__name__)

# transformers 5.24 renamed it and warns about the old name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Generation(NamedTuple):
    """The answer to a prompt.

    Args:
        text: special tokens removed, edge whitespace stripped.
        stopped: ended with a stop token, not by max_new_tokens.
        num_tokens: generated, the stop token included.
    """

    text: str
    stopped: bool
    num_tokens: int


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

    Prompts are what `prompts.encode` takes, and are asked in the form in which the model was trained. Batches are left
    padded and sorted by length; decoding stops at the template's end of turn and at eos. Predictor tokens are never
    generated (`suppress_tokens` of the model's generation config).

    Raises UserError for an empty prompt, messages without a chat template, or a prompt that the model cannot read
    (a token without a row, more tokens than learned positions).
    """
    encoded = encode(tokenizer, prompts, form_of(model.config))
    batches = generate_batches(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size)
    results: dict[int, Generation] = {}
    with tqdm(total=len(encoded), desc="Generating", disable=not progress, unit="prompt") as bar:
        for batch in batches:
            results.update(batch)
            bar.update(len(batch))
    return [results[i] for i in range(len(prompts))]


class _Row(NamedTuple):
    """A prompt and the beginning of its answer."""

    number: int  # of the prompt
    prompt: list[int]
    answer: list[int]


def generate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[dict[int, Generation]]:
    """`generate` for prompts from `encode`. Yields {index: continuation} as batches finish, longest prompts first.

    A batch does not wait for a few slow rows: they are put aside and finished together in later batches.
    The model's training mode is restored when the iteration ends, is closed or raises.
    """
    positions = _positions_for(model, encoded, max_new_tokens)
    # Longest first, so that a batch that does not fit into memory comes at the start.
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    fresh = [_Row(index, encoded[index], []) for index in order]
    slow: list[_Row] = []
    end = turn_end(tokenizer)
    stop = end.ids
    end_text = [StopStringCriteria(tokenizer, [end.text])] if end.text else []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop or [0])[0]
    with evaluating(model):
        prefix = _shared_prefix(model, encoded) if len(encoded) > 1 else (0, None)
        while fresh or slow:
            queue = slow if len(slow) >= batch_size or not fresh else fresh
            batch, queue[:] = queue[:batch_size], queue[batch_size:]
            room = [min(max_new_tokens, positions - len(row.prompt)) - len(row.answer) for row in batch]
            more_to_come = bool(fresh or slow)
            finished = {}
            news = _continue(model, batch, room, stop, pad, prefix, more_to_come, end_text)
            for row, new, limit in zip(batch, news, room, strict=True):
                answer = row.answer + new
                if len(new) == limit or _end_of(tokenizer, answer, end) is not None:
                    finished[row.number] = decode_tokens(tokenizer, answer, end)
                else:
                    slow.append(_Row(row.number, row.prompt, answer))
            if finished:
                yield finished


def _positions_for(model: PreTrainedModel, encoded: Sequence[list[int]], max_new_tokens: int) -> int:
    """How long a prompt and its answer may be together. Warns of prompts whose answers may be cut by that.

    Raises UserError for prompts that the model cannot read.
    """
    check_sequences(model.config, encoded, "prompts", "shorten them, or leave them out")
    limit = position_limit(model.config)
    if limit is None:
        return max(map(len, encoded), default=0) + max_new_tokens
    # The last token of an answer is not read.
    cut = sum(len(ids) + max_new_tokens > limit + 1 for ids in encoded)
    if cut:
        logger.warning(
            f"{cut} of {len(encoded)} prompts leave room for fewer than max_new_tokens={max_new_tokens} in the {limit} "
            "positions of the model; their answers end there at the latest."
        )
    return limit + 1


def _continue(
    model: PreTrainedModel,
    batch: Sequence[_Row],
    room: Sequence[int],
    stop: list[int],
    pad: int,
    prefix: tuple[int, DynamicCache | None],
    may_end_early: bool,
    end_text: Sequence[StoppingCriteria],
) -> list[list[int]]:
    """New tokens of each row, at most its `room`. If the batch may end early, slow rows come back unfinished."""
    shared, states = prefix
    texts = [row.prompt + row.answer for row in batch]
    length = max(map(len, texts))
    ids, mask = [], []
    for text in texts:
        # The padding must precede the tokens that are read in this pass: on the left, or behind the shared prefix.
        padding = length - len(text)
        ids.append(text[:shared] + [pad] * padding + text[shared:])
        mask.append([1] * shared + [0] * padding + [1] * (len(text) - shared))
    cache = copy.deepcopy(states)
    if cache is not None:
        cache.batch_repeat_interleave(len(batch))
    steps = max(room)
    limit = position_limit(model.config)
    if limit is not None:  # a row that has ended still counts on while others run
        steps = min(steps, limit + 1 - length)
    tokens, seen = torch.tensor(ids).to(model.device), torch.tensor(mask).to(model.device)  # [B, L] each
    pause = _Pause(length, room, stop, model.device, may_end_early, may_shrink=cache is not None and not end_text)
    decoding = GenerationConfig(
        eos_token_id=stop or None,
        pad_token_id=pad,
        suppress_tokens=suppressed_ids(model) or None,  # a processor of no tokens would still pass over the logits
    )
    rows = torch.arange(len(batch))  # those that still run
    news: list[list[int]] = [[] for _ in batch]
    with torch.inference_mode():
        while True:
            decoding.max_new_tokens = length + steps - tokens.shape[1]
            tokens = generate_as_asked(
                model,
                decoding,
                input_ids=tokens,
                attention_mask=seen,
                stopping_criteria=StoppingCriteriaList([*end_text, pause]),
                **({} if cache is None else {CACHE: cache}),
            )
            for row, new in zip(rows.tolist(), tokens[:, length:].tolist(), strict=True):
                news[row] = new[: room[row]]
            if not pause.shrinks or tokens.shape[1] == length + steps:
                return news
            # The rows that have ended would still cost as much as the others in every step.
            running = pause.drop_ended()
            rows, tokens, seen = rows[running.cpu()], tokens[running], seen[running]
            seen = torch.nn.functional.pad(seen, (0, tokens.shape[1] - seen.shape[1]), value=1)
            assert cache is not None
            cache.batch_select_indices(running)


@torch.inference_mode()
def _shared_prefix(model: PreTrainedModel, encoded: Sequence[list[int]]) -> tuple[int, DynamicCache | None]:
    """The number of tokens that all prompts begin with (system prompt, header of the user turn), and their cache.

    (0, None) if they are few, or if padding behind them would change the result: with learned positions, sliding
    windows or ALiBi, which count places, and with caches other than keys and values.
    """
    config = model.config.get_text_config()
    first, last = min(encoded), max(encoded)
    longest = min(map(len, encoded)) - 1  # one token is left to read
    shared = next((i for i in range(longest) if first[i] != last[i]), longest)
    rotary = getattr(config, "rope_parameters", None) is not None and not getattr(config, "alibi", False)
    if shared < 8 or not rotary:
        return 0, None
    ids = torch.tensor([encoded[0][:shared]], device=model.device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).get(CACHE)
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return 0, None
    return shared, cache


class _Pause(StoppingCriteria):
    """Ends a batch early: for good if few rows go on, or to drop the rows that have ended.

    For good (if `may_end_early`): at most 1/8 of the rows go on, and the batch has run twice as long as half of the
    rows needed. From then on, its steps cost more than reading the rest again in another batch.

    To drop rows (`may_shrink`): half of the rows that still run have ended, and at least 32 go on. With fewer, a step
    costs about the same on most machines.

    A row ends at a stop token or when its room is used up.
    """

    def __init__(
        self,
        length: int,
        room: Sequence[int],
        stop: Sequence[int],
        device: torch.device,
        may_end_early: bool,
        may_shrink: bool,
    ):
        self.length, self.num_rows, self.steps_of_half = length, len(room), 0
        self.may_end_early, self.may_shrink, self.shrinks = may_end_early, may_shrink, False
        self.room, self.stop = torch.tensor(room, device=device), torch.tensor(stop, dtype=torch.long, device=device)
        self.done = torch.zeros(len(room), dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        steps = input_ids.shape[1] - self.length
        self.done |= torch.isin(input_ids[:, -1], self.stop) | (steps >= self.room)
        # This adds no wait for the device: `generate` asks it in every step as well.
        left = len(self.done) - int(self.done.sum())
        if not self.steps_of_half and 2 * left <= self.num_rows:
            self.steps_of_half = steps
        few = self.may_end_early and 8 * left <= self.num_rows and steps >= 2 * self.steps_of_half
        self.shrinks = self.may_shrink and not few and left >= 32 and 2 * left <= len(self.done)
        return torch.full_like(self.done, few or self.shrinks)

    def drop_ended(self) -> torch.Tensor:
        """Forget the rows that have ended. Returns the places of the others."""
        running = (~self.done).nonzero()[:, 0]
        self.done, self.room = self.done[running], self.room[running]
        return running


def decode_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[int], end: TurnEnd) -> Generation:
    """Generated token ids as the text of the answer: without its end, and without what the template opens it with."""
    length = _end_of(tokenizer, tokens, end)
    answer = without_opening(tokenizer, tokens if length is None else tokens[:length])
    text = tokenizer.decode(answer, skip_special_tokens=True)
    if end.text:
        text = text.partition(end.text)[0]
    return Generation(text.strip(), stopped=length is not None, num_tokens=_generated(tokens, length, end))


def _generated(tokens: list[int], length: int | None, end: TurnEnd) -> int:
    """How many tokens were generated, up to and including the end of the answer; padding follows it."""
    if length is None:
        return len(tokens)
    return length + 1 if length < len(tokens) and tokens[length] in end.ids else length


def _end_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int], end: TurnEnd) -> int | None:
    """The number of tokens before the stop token, or up to and including the stop text; None if the answer goes on."""
    at_token = next((i for i, token in enumerate(tokens) if token in end.ids), None)
    if end.text and end.text in tokenizer.decode(tokens[:at_token]):
        return bisect_left(range(len(tokens)), True, key=lambda i: end.text in tokenizer.decode(tokens[:i]))
    return at_token


class Choice(NamedTuple):
    """Log-likelihoods in nats of the choices of one question, in their order."""

    log_likelihoods: tuple[float, ...]
    num_characters: tuple[int, ...]

    @property
    def most_likely(self) -> int:
        """The number of the choice with the highest log-likelihood."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)

    @property
    def most_likely_per_character(self) -> int:
        """By log-likelihood per character, which is fair to long choices (lm-evaluation-harness: acc_norm)."""
        means = [ll / n for ll, n in zip(self.log_likelihoods, self.num_characters, strict=True)]
        return max(range(len(means)), key=means.__getitem__)


def choose_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int,
) -> Iterator[dict[int, Choice]]:
    """The likelihood of each choice after its prompt. Yields {index of the question: Choice}, longest first.

    log p(choice | prompt) is the sum over the choice's tokens, under the softmax that generation uses: tokens that the
    generation config suppresses (predictor tokens) are left out. Prompt and choice are one row, as in training
    (`prompts.answer_row`): after a text a choice begins with a space, and what a template puts in front of an answer
    is read, not scored. `batch_size` counts rows (question x choice).
    """
    form = form_of(model.config)
    rows = []
    for index, options in enumerate(choices):
        for number, choice in enumerate(options):
            ids, first = answer_row(tokenizer, prompts[index], choice, form, f"Prompt {index}")
            rows.append(_ChoiceRow(index, number, ids, first))
    texts = [row.ids for row in rows]
    check_sequences(model.config, texts, "prompts with a choice", "shorten them, or leave them out")
    rows.sort(key=lambda row: (-len(row.ids), row.question, row.choice))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    known: dict[int, dict[int, float]] = {}  # question -> choice -> log-likelihood
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        for row, value in zip(batch, _log_likelihoods(model, batch, pad), strict=True):
            known.setdefault(row.question, {})[row.choice] = value
        complete = [index for index, values in known.items() if len(values) == len(choices[index])]
        results = {}
        for index in complete:
            values = known.pop(index)
            lengths = tuple(max(1, len(choice.strip())) for choice in choices[index])
            results[index] = Choice(tuple(values[number] for number in range(len(values))), lengths)
        yield results


class _ChoiceRow(NamedTuple):
    question: int
    choice: int
    ids: list[int]  # of the prompt and the choice
    start: int  # the choice is [start, len(ids))


def _log_likelihoods(model: PreTrainedModel, batch: Sequence[_ChoiceRow], pad: int) -> list[float]:
    """log p(choice | prompt) in nats of each row."""
    length = max(len(row.ids) for row in batch)
    # Padded on the right: positions stay those of the row alone, and causal attention does not see the padding.
    ids = torch.full((len(batch), length), pad)  # [B, L]
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(batch):
        end = len(row.ids)
        ids[i, :end], mask[i, :end] = torch.tensor(row.ids), 1
        scored[i, row.start - 1 : end - 1] = True  # the state before a token predicts it
    ids, mask, scored = ids.to(model.device), mask.to(model.device), scored.to(model.device)
    with torch.inference_mode(), evaluating(model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=scored).logits
        logits = logits.reshape(-1, logits.shape[-1])  # [choice tokens of the batch, V]
        logits = at_least_float32(logits)
        logits[:, suppressed_ids(model)] = -torch.inf
        targets = ids[:, 1:][scored[:, :-1]]  # [choice tokens of the batch]
        by_token = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0].cpu()
    return [float(part.sum()) for part in by_token.split([len(row.ids) - row.start for row in batch])]
