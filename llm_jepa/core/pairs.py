"""Pairs of embeddings of all ranks -> a loss per pair of this rank. What LLM-JEPA and VL-JEPA both do with a batch."""

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
    """`predicted`, `target` [P, D] -> [P]. Where all pairs meet (InfoNCE, regularizers), those of all ranks do.

    Every rank computes the loss of all pairs and returns its own rows of it: sum them, divide by the pairs of all
    ranks, and multiply by the number of ranks where gradients are averaged (see `distributed`).

    Args:
        target_key: [P] ints, equal for equal targets, on whatever rank.
        regularizer: None, "vicreg" or "sigreg", added for each side by itself (their mean), to every pair alike.
        both_sides: regularize the targets too; not where they have no gradient, whose spread cannot mend.
        seed, step: of the random slices of sigreg, equal on all ranks.
    """
    own = slice(None)
    if objective == "info_nce" or regularizer is not None:
        predicted, own = gather_with_grad(predicted)
        target, _ = gather_with_grad(target)
        target_key, _ = gather_with_grad(target_key)
    loss = jepa_loss(predicted, target, objective=objective, temperature=temperature, target_key=target_key)
    if regularizer is not None and len(predicted) > 1:  # one row, at the end of an epoch, has no spread
        sides = [predicted, target] if both_sides else [predicted]
        if regularizer == "sigreg":
            slices = random_slices(predicted.shape[1], SLICES, seed=seed, step=step, device=predicted.device)
            terms = [sigreg(side, slices) for side in sides]
        else:
            terms = [vicreg(side) for side in sides]
        loss = loss + regularizer_weight * torch.stack(terms).mean()
    return loss[own]
