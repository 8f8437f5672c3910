"""Views -> one row per example -> one forward pass, exact against separate passes in loss and gradient.

    [ LM row ][ predictor tokens ][ target view ][ pad ]                     context_view="prefix"
    [ LM row ][ context view, predictor tokens ][ target view ][ pad ]       context_view="message"

Three int tensors [R, L] say who sees whom; no L x L tensor leaves the collator:

    doc      which segment a token belongs to; it sees that segment, causally. -1 is padding.
    parent   a second segment it sees, or NO_PARENT
    visible  how many of the parent's first positions it sees

Predictor tokens of the `prefix` view lie after the LM row, but continue the prompt: they see the LM row up to `split`
and their positions start there. Putting them *inside* the row would let the model's label shift train the first
completion token from a predictor token. Padding sees padding, because a row of -inf scores is NaN in eager attention.

Exact for attention with rotary or absolute position ids. Recurrent, convolutional, ALiBi and physically windowed layers
would be silently wrong: `check_packable` refuses what has not been shown to be exact (tests/test_packing.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import UserError
from .views import IGNORE

PAD, NO_PARENT = -1, -2
LM_ROW, CONTEXT, TARGET = 0, 1, 2
EXACT_FAMILIES = ("gpt2", "llama", "olmo2", "qwen2", "qwen3")
EXACT_BACKENDS = ("eager", "sdpa")
MODEL_KEYS = ("input_ids", "position_ids", "doc", "parent", "visible")


@dataclass(frozen=True)
class JEPACollator:
    """Rows of `views.add_view_columns` -> a batch of plain tensors.

    with_views=False gives plain SFT rows (`input_ids`, `attention_mask`, `labels`) and nothing else. With views:
    MODEL_KEYS and `labels`, all [R, L]; `context_at`, `target_at` [B], indices into the flattened [R * L] tokens;
    `target_key` [B].
    """

    pad_token_id: int
    predictor_ids: Sequence[int] = ()
    with_views: bool = True
    pad_to_multiple_of: int = 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        segments: list[dict[str, Any]] = [
            self.segments(row) if self.with_views else plain_segments(row) for row in rows
        ]
        step = self.pad_to_multiple_of
        length = -(-max(len(s["input_ids"]) for s in segments) // step) * step
        fill: dict[str, int] = {
            "input_ids": self.pad_token_id,
            "position_ids": 0,
            "doc": PAD,
            "parent": NO_PARENT,
            "visible": 0,
            "labels": IGNORE,
        }
        batch = {
            key: torch.tensor([s[key] + [value] * (length - len(s[key])) for s in segments])
            for key, value in fill.items()
        }
        if not self.with_views:
            return {
                "input_ids": batch["input_ids"],
                "attention_mask": (batch["doc"] != PAD).long(),
                "labels": batch["labels"],
            }
        for name in ("context_at", "target_at"):
            batch[name] = torch.tensor([r * length + s[name] for r, s in enumerate(segments)])
        batch["target_key"] = torch.tensor([row["target_key"] for row in rows])
        return batch

    def segments(self, row: dict[str, Any]) -> dict[str, Any]:
        """One packed row, unpadded: lists per key, and the places inside it where the two views are read."""
        packed: dict[str, Any] = plain_segments(row)
        predictors, context, target = list(self.predictor_ids), row["context_ids"], row["target_ids"]
        context_at = row["split"] - 1  # without predictor tokens the LM row already holds the context embedding
        if context:
            _append(packed, CONTEXT, [*context, *predictors], start=0)
            context_at = len(packed["input_ids"]) - 1
        elif predictors:
            _append(packed, CONTEXT, predictors, start=row["split"], parent=LM_ROW, visible=row["split"])
            context_at = len(packed["input_ids"]) - 1
        _append(packed, TARGET, target, start=0)
        return {**packed, "context_at": context_at, "target_at": len(packed["input_ids"]) - 1}


def plain_segments(row: dict[str, Any]) -> dict[str, list[int]]:
    """The LM row alone, which is the plain SFT row."""
    packed: dict[str, list[int]] = {key: [] for key in (*MODEL_KEYS, "labels")}
    _append(packed, LM_ROW, row["input_ids"], start=0, labels=row["labels"])
    return packed


def _append(
    packed: dict[str, list[int]],
    doc: int,
    ids: Sequence[int],
    *,
    start: int,
    parent: int = NO_PARENT,
    visible: int = 0,
    labels: Sequence[int] | None = None,
) -> None:
    n = len(ids)
    packed["input_ids"] += ids
    packed["position_ids"] += range(start, start + n)
    packed["doc"] += [doc] * n
    packed["parent"] += [parent] * n
    packed["visible"] += [visible] * n
    packed["labels"] += labels if labels is not None else [IGNORE] * n


def who_sees_whom(doc: Tensor, parent: Tensor, visible: Tensor, position_ids: Tensor) -> Tensor:
    """[R, L] each -> bool [R, L (query), L (key)], True where the query may look."""
    order = torch.arange(doc.shape[1], device=doc.device)
    own = (doc[:, :, None] == doc[:, None, :]) & (order[:, None] >= order[None, :])
    inherited = (parent[:, :, None] == doc[:, None, :]) & (position_ids[:, None, :] < visible[:, :, None])
    return own | inherited


def model_inputs(batch: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Any]:
    """What the model's forward takes for a collated batch, packed or plain. The mask is built on the batch's device.

    sdpa takes a bool mask. Eager attention *adds* the mask to its scores, so a bool one would be a silent error there.
    """
    if "doc" not in batch:
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    mask = who_sees_whom(batch["doc"], batch["parent"], batch["visible"], batch["position_ids"])[:, None]
    if model.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(model.dtype).min
        )
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": mask,
        "use_cache": False,
    }


def read_pairs(hidden: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Last hidden states [R, L, D] -> `predicted`, `target`, both [B, D]."""
    flat = hidden.flatten(0, 1)
    return flat[batch["context_at"]], flat[batch["target_at"]]


@torch.no_grad()
def embed_pairs(
    model: torch.nn.Module, base: PreTrainedModel, batches: Iterable[dict[str, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """`predicted`, `target` [N, D] float32 and `target_key` [N] of packed batches, in evaluation mode.

    `model` is called; `base` is the same model without its DDP or PEFT wrapper. The training mode is put back.
    """
    was_training = model.training
    model.eval()
    parts: list[tuple[Tensor, ...]] = []
    try:
        for cpu_batch in batches:
            batch = {key: value.to(base.device) for key, value in cpu_batch.items()}
            # One logit per row, because none is not on offer.
            output = model(**model_inputs(batch, base), logits_to_keep=1, output_hidden_states=-1)
            predicted, target = read_pairs(output.hidden_states[-1], batch)
            parts.append((predicted.float(), target.float(), batch["target_key"]))
    finally:
        model.train(was_training)
    predicted, target, key = (torch.cat(column) for column in zip(*parts, strict=True))
    return predicted, target, key


def check_packable(model: PreTrainedModel) -> None:
    """Raises UserError unless packed rows are known to equal separate passes for this model."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.model_type not in EXACT_FAMILIES or layers != {"full_attention"}:
        raise UserError(
            f"Packed rows are not known to be exact for {config.model_type!r} with {sorted(layers)} layers; use one of "
            f"{', '.join(EXACT_FAMILIES)} with full attention, or train plain SFT with jepa_weight: 0."
        )
    if model.config._attn_implementation not in EXACT_BACKENDS:
        raise UserError(
            f"attn_implementation={model.config._attn_implementation!r} cannot take the mask of packed rows; "
            "set attn_implementation: sdpa."
        )
