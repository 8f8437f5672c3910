"""A preview of training for people: one packed row, who sees whom in it, steps, tokens, and memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from heapq import nlargest
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from . import memory
from .arguments import LLMJEPAConfig
from .batching import CONTEXT, LM_ROW, TARGET, JEPACollator, Segment
from .data import bank_collator, training_collator
from .formats import count_formats
from .keys import ModelArguments
from .loading import lora_config
from .predictor_tokens import predictor_token_ids
from .prompts import PromptForm, asked_tokens
from .rows import parse_row
from .views import IGNORE

NAMES = {LM_ROW: "LM row", CONTEXT: "context", TARGET: "target"}
COLORS = {LM_ROW: "36", CONTEXT: "35", TARGET: "33"}  # ANSI cyan, magenta, yellow
SAMPLE = 256


def describe_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig, *, color: bool = False
) -> str:
    """The segments of one packed row: positions, what each sees, what is trained, where embeddings are read.

    row: the columns of `data.view_columns`.
    """
    packed = _collator(tokenizer, args).example(row)
    lines = []
    for segment in packed.segments:
        lines += _describe_segment(segment, tokenizer, color)
        if segment.kind == LM_ROW:
            trained = [token for token, label in zip(segment.ids, row["labels"], strict=True) if label != IGNORE]
            lines.append(f"         trained: {len(trained)} tokens, {tokenizer.decode(trained)!r}")
    for name, embeddings in (("context", packed.contexts), ("target", packed.targets)):
        for places in embeddings:  # of the states whose mean, or whose last one, is the embedding
            number, index = places[-1]
            segment = packed.segments[number]
            token = repr(tokenizer.decode([segment.ids[index]]))
            states = f"the mean of {len(places)} states up to" if args.readout == "mean" else "the state of"
            lines.append(f"{name} embedding: {states} the {NAMES[segment.kind]}'s token {index}, {token}")
    for ids in packed.apart:
        lines.append(f"target in a separate row, without gradient: {tokenizer.decode(ids)!r}")
    if not args.uses_jepa:
        lines.append("jepa_weight is 0: plain SFT, no view is added.")
    elif not args.uses_views:
        lines.append("objective: stp compares states within the LM row; no view is added.")
    return "\n".join(lines)


def describe_prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> str:
    """The prompt of a raw row, as a checkpoint of this run is asked it."""
    parsed = parse_row(row, "row 0")
    ids = asked_tokens(tokenizer, parsed.question, form, "row 0")
    where = "the content of the answer" if form.ends == "content" else "the generation prompt"
    ends = f", up to {where}" if form.format == "messages" else ""
    return f"{len(ids)} tokens{ends}: {tokenizer.decode(ids)!r}"


def _describe_segment(segment: Segment, tokenizer: PreTrainedTokenizerBase, color: bool) -> list[str]:
    start, count = segment.start, len(segment.ids)
    sees = f"itself and the first {start} tokens of the LM row" if start else "itself"
    text = repr(tokenizer.decode(segment.ids))
    if color:
        text = f"\x1b[{COLORS[segment.kind]}m{text}\x1b[0m"
    return [
        f"{NAMES[segment.kind]:8s} {count:4d} tokens, positions {start}..{start + count - 1}, sees {sees}",
        f"         {text}",
    ]


def plain_texts(raw: Dataset, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A note if a model with a chat template meets rows that are plain texts; None if not."""
    plain = count_formats(raw)[0]["text"]
    if not plain or tokenizer.chat_template is None:
        return None
    return (
        f"{plain} of {len(raw)} train rows are plain texts, and the tokenizer has a chat template: it is not used for "
        "them, so the model learns to continue texts. To train it as a chat model, write prompts and completions as "
        "messages."
    )


def count_steps(rows: int, args: LLMJEPAConfig, processes: int) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run, as transformers' Trainer counts them."""
    batch = args.per_device_train_batch_size * processes
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return an_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)


def describe_steps(rows: int | None, args: LLMJEPAConfig, processes: int) -> str:
    """How many rows a step has, how many steps an epoch, and how many of both the run. rows: None of a stream."""
    factors = [f"batches of {args.per_device_train_batch_size}"]
    if args.gradient_accumulation_steps > 1:
        factors.append(f"{args.gradient_accumulation_steps} accumulated")
    if processes > 1:
        factors.append(f"{processes} processes")
    if rows is None:
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        return (
            f"{args.max_steps:,} steps of {step:,} rows ({' x '.join(factors)}); a stream has no known number of rows "
            "and epochs"
        )
    an_epoch, steps = count_steps(rows, args, processes)
    return f"{steps:,} steps, {steps / an_epoch:.4g} epochs of {an_epoch:,} ({rows:,} rows, {' x '.join(factors)})"


def token_cost(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig, *, is_stream: bool = False
) -> str:
    """Mean tokens per example compared with plain SFT, over the first rows, and the tokens of an epoch.

    is_stream: the rows are the first of a stream, which has no known number of tokens.
    """
    collator = _collator(tokenizer, args)
    count = min(SAMPLE, len(rows))
    sft = ours = 0
    for row in rows.select(range(count)):
        packed = collator.example(row)
        sft += len(row["input_ids"])
        ours += sum(len(segment.ids) for segment in packed.segments) + sum(map(len, packed.apart))
    means = (
        f"{ours / count:.1f} tokens per example against {sft / count:.1f} of plain SFT: {ours / sft:.2f} x "
        f"(context_view {args.context_view}, mean of {count} rows; the published code pays 3 x before padding)"
    )
    if is_stream:
        return means
    epoch = sum(map(len, _column(rows, "input_ids")))
    return f"{means}\nAbout {epoch * ours / sft:,.0f} tokens an epoch, without padding ({epoch:,} in the LM rows)"


def describe_memory(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelArguments,
    args: LLMJEPAConfig,
    config: PreTrainedConfig,
    sharing: str,
    processes: int,
) -> str:
    """The peak of a process with its largest batch, by the formula of `memory`.

    Args:
        config: of the model; no weights are read.
        sharing: of `memory.Way`.
    """
    empty = memory.without_weights(config)
    if empty is None:
        return f"Not estimated: a {config.model_type} model cannot be built without its weights."
    counts = memory.counts_of(empty)
    trained = counts.total
    lora = lora_config(model, empty)
    if lora is not None:
        trained = _trained_by(empty, lora)
        counts = counts._replace(total=counts.total + trained)
    batch = largest_batch(rows, tokenizer, args)
    way = way_of(model, args, sharing, processes)
    terms = [f"{name} {_size(size)}" for name, size in memory.held(counts, trained, way).items() if size]
    pair = [f"gradients {_size(memory.gradients(trained, way))}"]
    pair += [f"activations {_size(memory.activations(counts, batch, way))}{' (checkpoints)' * way.checkpointing}"]
    terms += pair if way.accumulates else ["and the larger of " + " and ".join(pair)]
    return (
        f"About {_size(memory.predicted(counts, trained, batch, way))} a process at the peak: {', '.join(terms)}\n"
        f"{trained:,} of {counts.total:,} weights are trained; the largest batch has {batch.tokens:,} tokens with "
        f"padding, {batch.labels:,} of them with a label. The formula is in docs/scaling.md; a GPU adds about 1 GB."
    )


NO_TIME = (
    "Not estimated: it depends on the device that trains. Measure it there with --max_steps 20 and another "
    "--output_dir; the last line has train_steps_per_second."
)


def way_of(model: ModelArguments, args: LLMJEPAConfig, sharing: str, processes: int) -> memory.Way:
    """How a recipe trains, in the terms of the formula. An adapter has float32 weights on any base."""
    each = getattr(torch, model.dtype).itemsize
    trained = max(4, each) if model.use_peft else each
    return memory.Way(
        sharing=sharing if processes > 1 else "one",
        ranks=processes,
        autocast=bool(args.bf16 or args.fp16) and trained >= 4,
        checkpointing=bool(args.activation_checkpointing),
        accumulates=args.gradient_accumulation_steps > 1,
        frozen_bytes=each,
        in_4bit=model.load_in_4bit,
        trained_bytes=trained,
        moments=memory.moment_bytes(str(getattr(args.optim, "value", args.optim)), trained),
        average=args.uses_views and args.target_encoder == "ema",
        lora_dropout=model.use_peft and model.lora_dropout > 0,
        token_rows=model.use_peft and args.uses_views and args.num_predictor_tokens > 0,
    )


def largest_batch(rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> memory.Batch:
    """Tokens and labels of a batch of the longest rows."""
    repeated = 1 if args.context_view == "prefix" else 0  # the first context is a part of the LM row
    columns = (_column(rows, name) for name in ("input_ids", "contexts", "targets"))
    lengths = [
        len(ids) + sum(map(len, (*contexts[repeated:], *targets)))
        for ids, contexts, targets in zip(*columns, strict=True)
    ]
    longest = nlargest(args.per_device_train_batch_size, range(len(lengths)), key=lengths.__getitem__)
    batch = _collator(tokenizer, args)(rows.select(longest).to_list())
    return memory.Batch(batch["input_ids"].numel(), int((batch["labels"] != IGNORE).sum()))


def _column(rows: Dataset, name: str) -> Iterator[Any]:
    """The values of a column, some rows at a time."""
    for part in rows.select_columns([name]).iter(batch_size=1000):
        yield from part[name]


def _trained_by(model: torch.nn.Module, lora: LoraConfig) -> int:
    """The number of weights that an adapter trains."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks the model for an old name
        return sum(p.numel() for p in get_peft_model(model, lora).parameters() if p.requires_grad)


def _size(number: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def _collator(tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> JEPACollator:
    ids = predictor_token_ids(tokenizer, args.num_predictor_tokens) if args.uses_views else []
    return training_collator(bank_collator(args, tokenizer.pad_token_id, ids), args)
