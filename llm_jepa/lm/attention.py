"""Who sees whom in packed rows: the masks and positions that a model takes for a batch of `batching`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .batching import PAD, Layout

# segments: several sequences a row, kept apart by a mask. rows: one sequence a row. flat: all sequences in one row,
# which flash attention keeps apart because positions restart.
Attention = Literal["segments", "rows", "flat"]


def attention_of_views(layout: Layout) -> Attention:
    """How the model must attend to a batch with views."""
    by_layout: dict[Layout, Attention] = {"packed": "segments", "separate": "rows", "flat": "flat"}
    return by_layout[layout]


def attention_of_lm_rows(layout: Layout, batch: dict[str, Tensor]) -> Attention:
    """How the model must attend to a batch of LM rows alone.

    Shapes tell whether examples share rows: `lm_at` [B] is longer than `doc` [R, L]. Values would wait for the device.
    """
    if layout != "packed":
        return attention_of_views(layout)
    return "segments" if len(batch["lm_at"]) > len(batch["doc"]) else "rows"


def model_inputs(batch: dict[str, Tensor], model: PreTrainedModel, attention: Attention) -> dict[str, Any]:
    """The arguments of the model's forward pass for a collated batch. The mask is built here, on the batch's device."""
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if attention == "segments":
        return {**inputs, "position_ids": batch["position_ids"], "attention_mask": attention_mask(batch, model)}
    if attention == "rows":
        return {**inputs, "attention_mask": (batch["doc"] != PAD).long()}  # [R, L]
    # No mask, not even one of ones: transformers starts a sequence at every restart of the positions only without one.
    return {**inputs, "position_ids": batch["position_ids"]}


def attention_mask(batch: dict[str, Tensor], model: PreTrainedModel) -> Tensor | dict[str, Tensor]:
    """[R, 1, L, L], or one for each layer type of the model.

    Windows and chunks count positions, because a view continues from positions that are not next to it in the row.
    sdpa takes a bool mask. Eager attention *adds* the mask to its scores, so there it is a float mask: a bool one would
    be a silent error.
    """
    config = model.config.get_text_config()
    position = batch["position_ids"]  # [R, L]
    sees = who_sees_whom(batch["doc"], batch["parent"], batch["visible"], position)  # [R, L, L]
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    masks = {}
    for kind in sorted(set(layers)):
        mask = sees
        if kind == "sliding_attention" and window:
            mask = sees & (position[:, :, None] - position[:, None, :] < window)
        elif kind == "chunked_attention" and chunk:
            mask = sees & (position[:, :, None] // chunk == position[:, None, :] // chunk)
        mask = mask[:, None]  # [R, 1, L, L]
        if model.config._attn_implementation == "eager":
            # The smallest number instead of -inf: a row of -inf would be NaN after the softmax.
            blank = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
            mask = blank.masked_fill_(~mask, torch.finfo(model.dtype).min)
        masks[kind] = mask
    return masks if len(masks) > 1 else next(iter(masks.values()))


def who_sees_whom(doc: Tensor, parent: Tensor, visible: Tensor, position_ids: Tensor) -> Tensor:
    """[R, L] each -> bool [R, L (query), L (key)], True if the query may look at the key."""
    order = torch.arange(doc.shape[1], device=doc.device)
    own = (doc[:, :, None] == doc[:, None, :]) & (order[:, None] >= order[None, :])
    inherited = (parent[:, :, None] == doc[:, None, :]) & (position_ids[:, None, :] < visible[:, :, None])
    return own | inherited
