"""Pairs of embeddings of all ranks -> a loss per pair of this rank. Every family compares its batches with this."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .distributed import gather_with_grad
from .losses import Keys, jepa_loss, keys_as_tuple, random_slices, sigreg, vicreg

SLICES = 256  # of sigreg, new ones every step: algorithm 1 of arXiv:2511.08544


class PairKeys(NamedTuple):
    """What makes two of P pairs equal, on whatever rank: see `losses.info_nce`."""

    target: Keys
    context: Keys


def compare_pairs(
    predicted: Tensor,
    target: Tensor,
    target_key: Keys,
    *,
    context_key: Keys | None = None,
    objective: str,
    temperature: float | Tensor = 0.07,
    regularizer: str | None = None,
    regularizer_weight: float = 1.0,
    both_sides: bool = True,
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    """Loss of each pair: `predicted`, `target` [P, D] -> [P].

    InfoNCE and the regularizers compare every pair with every other, so they gather the pairs of all ranks. Each rank
    then computes the loss of all pairs and returns the rows of its own pairs. The caller sums them, divides by the
    pairs of all ranks, and multiplies by the number of ranks if gradients are averaged over ranks (see `distributed`).

    Args:
        target_key, context_key: [P] ints or several, see `losses.info_nce`. Equal on all ranks for equal texts.
        regularizer: None, "vicreg" or "sigreg": the mean over both sides, added to every pair.
        both_sides: regularize the targets too. False if they have no gradient, since their spread cannot change then.
        seed, step: seed the random slices of sigreg; equal on all ranks.
    """
    own = slice(None)
    if objective == "info_nce" or regularizer is not None:
        predicted, own = gather_with_grad(predicted)  # [P of all ranks, D]
        target, _ = gather_with_grad(target)
        target_key, context_key = _gathered(target_key, context_key)
    loss = jepa_loss(
        predicted,
        target,
        objective=objective,
        temperature=temperature,
        target_key=target_key,
        context_key=context_key,
    )
    if regularizer is not None and len(predicted) > 1:  # a single pair, at the end of an epoch, has no spread
        sides = [predicted, target] if both_sides else [predicted]
        if regularizer == "sigreg":
            slices = random_slices(predicted.shape[1], SLICES, seed=seed, step=step, device=predicted.device)
            terms = [sigreg(side, slices) for side in sides]
        else:
            terms = [vicreg(side) for side in sides]
        loss = loss + regularizer_weight * torch.stack(terms).mean()
    return loss[own]


def _gathered(target_key: Keys, context_key: Keys | None) -> tuple[Keys, Keys | None]:
    """The keys of the pairs of all ranks, in one collective call."""
    targets, contexts = keys_as_tuple(target_key), keys_as_tuple(context_key)
    columns, _ = gather_with_grad(torch.stack([*targets, *contexts], dim=1))  # [P of all ranks, K]
    keys = columns.unbind(dim=1)
    return keys[: len(targets)], keys[len(targets) :] or None
