"""What a recipe will do to a row, for people: the packed segments, who sees whom, and what the views cost in tokens."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .config import LLMJEPAConfig
from .packing import CONTEXT, LM_ROW, TARGET, JEPACollator
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
    packed = _collator(tokenizer, args).segments(views)
    lines = []
    for doc in (LM_ROW, CONTEXT, TARGET):
        at = [i for i, value in enumerate(packed["doc"]) if value == doc]
        if not at or (doc != LM_ROW and not args.uses_jepa):
            continue
        ids = [packed["input_ids"][i] for i in at]
        positions = [packed["position_ids"][i] for i in at]
        sees = "itself"
        if packed["visible"][at[0]]:
            sees = f"itself and the first {packed['visible'][at[0]]} tokens of the {NAMES[packed['parent'][at[0]]]}"
        text = repr(tokenizer.decode(ids))
        if color:
            text = f"\x1b[{COLORS[doc]}m{text}\x1b[0m"
        lines.append(f"{NAMES[doc]:8s} {len(ids):4d} tokens, positions {positions[0]}..{positions[-1]}, sees {sees}")
        lines.append(f"         {text}")
        if doc == LM_ROW:
            trained = [token for token, label in zip(ids, views["labels"], strict=True) if label != IGNORE]
            lines.append(f"         trained: {len(trained)} tokens, {tokenizer.decode(trained)!r}")
    if args.uses_jepa:
        for name in ("context", "target"):
            token = packed["input_ids"][packed[f"{name}_at"]]
            lines.append(f"{name} embedding read at index {packed[f'{name}_at']}: {tokenizer.decode([token])!r}")
    else:
        lines.append("jepa_weight is 0: plain SFT, no view is added.")
    return "\n".join(lines)


def token_cost(rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> str:
    """Mean tokens per example against plain SFT, over the first rows. Tokens, not seconds."""
    sample = [_views(row, i, tokenizer, args) for i, row in enumerate(rows.select(range(min(SAMPLE, len(rows)))))]
    sft = sum(len(views["input_ids"]) for views in sample) / len(sample)
    collator = _collator(tokenizer, args)
    ours = sum(len(collator.segments(views)["input_ids"]) for views in sample) / len(sample) if args.uses_jepa else sft
    return (
        f"{ours:.1f} tokens per example against {sft:.1f} of plain SFT: {ours / sft:.2f} x "
        f"(context_view {args.context_view}, mean of {len(sample)} rows; the published code pays 3 x before padding)"
    )


def _views(row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> dict[str, Any]:
    return add_view_columns(
        row,
        index,
        tokenizer=tokenizer,
        context_view=args.context_view,
        label_protocol=args.label_protocol,
        max_length=args.max_length,
    )


def _collator(tokenizer: PreTrainedTokenizerBase, args: LLMJEPAConfig) -> JEPACollator:
    ids = predictor_token_ids(tokenizer, args.num_predictor_tokens) if args.uses_jepa else []
    return JEPACollator(tokenizer.pad_token_id, ids)
