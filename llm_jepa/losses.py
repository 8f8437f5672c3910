"""The page that holds the science: distances between a predicted and a target embedding.

LLM-JEPA (arXiv:2509.14252, eq. 2) trains

    L = L_LM + jepa_weight * d(Pred(Enc(context)), Enc(target))

and this module is `d`. Every function takes `predicted` and `target` [B, D] and returns one value per pair, [B]: the
caller averages, so that accumulation steps and ranks of different size weigh every pair alike.

Everything is computed in float32 at least: near 1, a bfloat16 cosine is off by half its distance from 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Literal["cosine", "l2", "mse", "smooth_l1", "info_nce"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)


def jepa_distance(predicted: Tensor, target: Tensor, *, kind: str = "cosine", stop_gradient: bool = False) -> Tensor:
    """Distance of each pair on its own, [B]. 0 for equal embeddings.

    cosine:    1 - cos(z, s), in 0..2.                    The paper's default (section 3.1).
    l2:        ||z - s||.                                 Unnormalised; grows with sqrt(D) (paper, table 3).
    mse:       mean over D of (z - s)^2.                  (paper, table 3)
    smooth_l1: mean over D of the Huber loss with beta 1. Not in the paper.

    None of these keeps the space from collapsing: mapping everything to one point is a minimum of each.

    Args:
        predicted, target: [B, D], one row per pair.
        stop_gradient: treat the target as a constant. The paper and its code let both sides move.

    Raises ValueError for an unknown `kind` or shapes that differ.
    """
    _check_shapes(predicted, target)
    z, s = _wide(predicted), _wide(target.detach() if stop_gradient else target)
    if kind == "cosine":
        return 1 - F.cosine_similarity(z, s, dim=-1, eps=1e-6)
    if kind == "l2":
        return torch.linalg.vector_norm(z - s, dim=-1)
    if kind == "mse":
        return (z - s).square().mean(dim=-1)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(z, s, reduction="none").mean(dim=-1)
    raise ValueError(f"kind={kind!r} is no per-pair distance; choose cosine, l2, mse or smooth_l1.")


def info_nce(
    predicted: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.07,
    target_key: Tensor | None = None,
    stop_gradient: bool = False,
) -> Tensor:
    """Symmetric InfoNCE, [B]: row i of `predicted` must pick row i of `target`, and back. In nats; ln(B) at chance.

    value_i = 1/2 [ -log P(positives of z_i | all s) - log P(positives of s_i | all z) ],  logits Z S^T / temperature,
    rows of Z and S scaled to unit norm (arXiv:1807.03748, eq. 4, both directions). The paper's table 3 uses the first
    direction only, and one in-batch positive.

    Args:
        predicted, target: [B, D]. The other rows are the negatives: B is part of the objective, and gradient
            accumulation does not enlarge it.
        temperature: > 0. Smaller is sharper; 0.07 is CLIP's starting value and the reference code's.
        target_key: [B] ints, equal for equal targets. Two rows with the same target are both positives of each
            other: the probability of picking *any* of them is what counts.
        stop_gradient: treat the targets as constants.

    Raises ValueError if shapes differ or temperature <= 0.
    """
    _check_shapes(predicted, target)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0; CLIP starts at 0.07.")
    z = F.normalize(_wide(predicted), dim=-1, eps=1e-6)
    s = F.normalize(_wide(target.detach() if stop_gradient else target), dim=-1, eps=1e-6)
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ s.T / temperature  # [B, B]
    if target_key is None:
        positive = torch.eye(len(z), dtype=torch.bool, device=z.device)
    else:
        if target_key.shape != (len(z),):
            raise ValueError(f"target_key {tuple(target_key.shape)} must hold one key per pair, [{len(z)}].")
        positive = target_key[:, None] == target_key[None, :]
    joint = logits.masked_fill(~positive, -torch.inf)
    forward = logits.logsumexp(dim=1) - joint.logsumexp(dim=1)
    backward = logits.logsumexp(dim=0) - joint.logsumexp(dim=0)
    return (forward + backward) / 2


def jepa_loss(
    predicted: Tensor,
    target: Tensor,
    *,
    objective: str,
    temperature: float = 0.07,
    target_key: Tensor | None = None,
    stop_gradient: bool = False,
) -> Tensor:
    """The objective a recipe names, one value per pair [B]; `temperature` and `target_key` serve `info_nce` alone."""
    if objective == "info_nce":
        return info_nce(predicted, target, temperature=temperature, target_key=target_key, stop_gradient=stop_gradient)
    return jepa_distance(predicted, target, kind=objective, stop_gradient=stop_gradient)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_shapes(predicted: Tensor, target: Tensor) -> None:
    if predicted.shape != target.shape or predicted.dim() != 2:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and target {tuple(target.shape)} must both be [pairs, dimensions]."
        )
