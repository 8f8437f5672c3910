"""A preview of training for people: one packed row, who sees whom in it, and the cost of the views in tokens."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .arguments import LLMJEPAConfig
from .batching import CONTEXT, LM_ROW, TARGET, JEPACollator, Segment
from .data import bank_collator, training_collator
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


def token_cost(rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> str:
    """Mean tokens per example compared with plain SFT, over the first rows. Tokens, not seconds."""
    collator = _collator(tokenizer, args)
    count = min(SAMPLE, len(rows))
    sft = ours = 0
    for row in rows.select(range(count)):
        packed = collator.example(row)
        sft += len(row["input_ids"])
        ours += sum(len(segment.ids) for segment in packed.segments) + sum(map(len, packed.apart))
    return (
        f"{ours / count:.1f} tokens per example against {sft / count:.1f} of plain SFT: {ours / sft:.2f} x "
        f"(context_view {args.context_view}, mean of {count} rows; the published code pays 3 x before padding)"
    )


def _collator(tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> JEPACollator:
    ids = predictor_token_ids(tokenizer, args.num_predictor_tokens) if args.uses_views else []
    return training_collator(bank_collator(args, tokenizer.pad_token_id, ids), args)
