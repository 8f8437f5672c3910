"""Pairs of embeddings of all ranks -> a loss per pair of this rank. Every family compares its batches with this."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import gather_with_grad
from .losses import jepa_loss, random_slices, sigreg, vicreg

SLICES = 256  # of sigreg, new ones every step: algorithm 1 of arXiv:2511.08544


def compare_pairs(
    predicted: Tensor,
    target: Tensor,
    target_key: Tensor,
    *,
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
        target_key: [P] ints, equal for equal targets, on whatever rank.
        regularizer: None, "vicreg" or "sigreg": the mean over both sides, added to every pair.
        both_sides: regularize the targets too. False if they have no gradient, since their spread cannot change then.
        seed, step: seed the random slices of sigreg; equal on all ranks.
    """
    own = slice(None)
    if objective == "info_nce" or regularizer is not None:
        predicted, own = gather_with_grad(predicted)  # [P of all ranks, D]
        target, _ = gather_with_grad(target)
        target_key, _ = gather_with_grad(target_key)
    loss = jepa_loss(predicted, target, objective=objective, temperature=temperature, target_key=target_key)
    if regularizer is not None and len(predicted) > 1:  # a single pair, at the end of an epoch, has no spread
        sides = [predicted, target] if both_sides else [predicted]
        if regularizer == "sigreg":
            slices = random_slices(predicted.shape[1], SLICES, seed=seed, step=step, device=predicted.device)
            terms = [sigreg(side, slices) for side in sides]
        else:
            terms = [vicreg(side) for side in sides]
        loss = loss + regularizer_weight * torch.stack(terms).mean()
    return loss[own]
