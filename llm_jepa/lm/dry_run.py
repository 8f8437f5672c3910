"""What a recipe will do to a row, for people: the packed segments, who sees whom, and what the views cost in tokens."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .arguments import LLMJEPAConfig
from .batching import CONTEXT, LM_ROW, TARGET, JEPACollator
from .data import bank_collator, training_collator, view_options
from .predictor_tokens import predictor_token_ids
from .views import IGNORE, add_view_columns

NAMES = {LM_ROW: "LM row", CONTEXT: "context", TARGET: "target"}
COLORS = {LM_ROW: "36", CONTEXT: "35", TARGET: "33"}  # ANSI cyan, magenta, yellow
SAMPLE = 256


def describe_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig, *, color: bool = False
) -> str:
    """The segments of one packed row with positions, what they see, what is trained and where embeddings are read."""
    views = _views(row, 0, tokenizer, args)
    packed = _collator(tokenizer, args).example(views)
    lines = []
    for segment in packed.segments:
        ids, last = segment.ids, segment.start + len(segment.ids) - 1
        sees = f"itself and the first {segment.start} tokens of the LM row" if segment.start else "itself"
        text = repr(tokenizer.decode(ids))
        if color:
            text = f"\x1b[{COLORS[segment.kind]}m{text}\x1b[0m"
        lines.append(f"{NAMES[segment.kind]:8s} {len(ids):4d} tokens, positions {segment.start}..{last}, sees {sees}")
        lines.append(f"         {text}")
        if segment.kind == LM_ROW:
            trained = [token for token, label in zip(ids, views["labels"], strict=True) if label != IGNORE]
            lines.append(f"         trained: {len(trained)} tokens, {tokenizer.decode(trained)!r}")
    for name, reads in (("context", packed.contexts), ("target", packed.targets)):
        for read in reads:
            s, i = read[-1]
            token = repr(tokenizer.decode([packed.segments[s].ids[i]]))
            where = f"the mean of {len(read)} states up to" if args.readout == "mean" else "the state of"
            lines.append(f"{name} embedding: {where} the {NAMES[packed.segments[s].kind]}'s token {i}, {token}")
    for ids in packed.apart:
        lines.append(f"target in a row of its own, without gradient: {tokenizer.decode(ids)!r}")
    if not args.uses_jepa:
        lines.append("jepa_weight is 0: plain SFT, no view is added.")
    elif not args.uses_views:
        lines.append("objective: stp compares states within the LM row; no view is added.")
    return "\n".join(lines)


def token_cost(rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> str:
    """Mean tokens per example against plain SFT, over the first rows. Tokens, not seconds."""
    sample = [_views(row, i, tokenizer, args) for i, row in enumerate(rows.select(range(min(SAMPLE, len(rows)))))]
    sft = sum(len(views["input_ids"]) for views in sample) / len(sample)
    collator = _collator(tokenizer, args)
    examples = [collator.example(views) for views in sample]
    lengths = [sum(len(s.ids) for s in e.segments) + sum(map(len, e.apart)) for e in examples]
    ours = sum(lengths) / len(sample)
    return (
        f"{ours:.1f} tokens per example against {sft:.1f} of plain SFT: {ours / sft:.2f} x "
        f"(context_view {args.context_view}, mean of {len(sample)} rows; the published code pays 3 x before padding)"
    )


def _views(row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> dict[str, Any]:
    return add_view_columns(row, index, tokenizer=tokenizer, **view_options(args))


def _collator(tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> JEPACollator:
    ids = predictor_token_ids(tokenizer, args.num_predictor_tokens) if args.uses_views else []
    return training_collator(bank_collator(args, tokenizer.pad_token_id, ids), args)
