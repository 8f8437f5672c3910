"""Is the embedding space collapsing? Figures of a fixed bank of pairs, cheap enough for every evaluation.

A JEPA loss near zero says nothing by itself: a space in which everything is one point has loss zero as well. What
tells the two apart is whether a *wrong* target is further away than the right one, and how many directions are used.

Pretrained models are anisotropic (any two states have a high cosine), so the headline figures are *centred*: each side
has its own mean removed. Recall and rank depend on the number of pairs; compare them only between banks of one size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_rank(embeddings: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of the centred [N, D]; 1 = a line, min(N - 1, D) = isotropic.

    (Roy and Vetterli 2007, definition 1; they do not centre.) A matrix of equal rows has rank 0, one with
    non-finite entries NaN.
    """
    centred = embeddings.float() - embeddings.float().mean(dim=0)
    if not centred.isfinite().all():  # a diverging run: its next step stops with a message, an SVD would not
        return torch.full((), torch.nan, device=embeddings.device)
    singular = torch.linalg.svdvals(centred)
    total = singular.sum()
    if total <= 1e-6 * embeddings.float().norm():  # the mean of equal float32 rows is a rounding off them
        return torch.zeros((), device=embeddings.device)
    p = singular / total
    return torch.exp(-(p * p.clamp_min(1e-12).log()).sum())


def recall_at_1(predicted: Tensor, target: Tensor, target_key: Tensor | None = None) -> Tensor:
    """Share of predictions whose nearest target (centred cosine) is their own, or one with an equal key. Scalar."""
    similarity = _centred(predicted) @ _centred(target).T  # [N, N]
    nearest = similarity.argmax(dim=1)
    own = torch.arange(len(nearest), device=nearest.device)
    hit = nearest == own if target_key is None else target_key[nearest] == target_key
    return hit.float().mean()


def space_diagnostics(predicted: Tensor, target: Tensor, target_key: Tensor | None = None) -> dict[str, float]:
    """Geometry of N pairs of embeddings [N, D].

    cosine_matched, cosine_mismatched: mean centred cosine of right and of wrong pairs (equal keys are not "wrong").
    raw_cosine_matched, raw_cosine_mismatched: the same without centring; both near 1 is the signature of collapse.
    recall_at_1: see `recall_at_1`; chance is 1 / N.
    effective_rank_predicted, effective_rank_target: see `effective_rank`.

    Raises ValueError for fewer than two pairs: there is no wrong pair to compare with.
    """
    if len(predicted) < 2:
        raise ValueError(f"{len(predicted)} pair(s): the diagnostics compare right with wrong pairs and need two.")
    predicted, target = predicted.float(), target.float()
    right = torch.eye(len(predicted), dtype=torch.bool, device=predicted.device)
    same = right if target_key is None else target_key[:, None] == target_key[None, :]
    figures = {}
    for name, z, s in (
        ("", _centred(predicted), _centred(target)),
        ("raw_", F.normalize(predicted, dim=-1), F.normalize(target, dim=-1)),
    ):
        cosine = z @ s.T  # [N, N]
        figures[f"{name}cosine_matched"] = cosine[right].mean()
        # all targets equal: no wrong pair exists
        figures[f"{name}cosine_mismatched"] = cosine[~same].mean() if (~same).any() else cosine.new_tensor(0.0)
    figures["recall_at_1"] = recall_at_1(predicted, target, target_key)
    figures["effective_rank_predicted"] = effective_rank(predicted)
    figures["effective_rank_target"] = effective_rank(target)
    return {key: float(value) for key, value in figures.items()}


def has_collapsed(now: dict[str, float], start: dict[str, float]) -> bool:
    """True when the space shrank to a point or to a few directions since step 0.

    To a point: wrong pairs kept less than a twentieth of their distance 1 - cos, and less than twice that of right
    pairs. Relative to the start, because pretrained models begin at high cosines. The centred rank does not see this,
    since it ignores scale. To a few directions: one side keeps under a tenth of its effective rank, and fewer than ten.

    Thresholds from small runs (eval/results/tiny_nl_rx): from raw cosine 0.28 for wrong pairs, plain cosine ends above
    0.99 with recall@1 near 0, InfoNCE at 0.00 with recall@1 above 0.9.
    """
    distance, distance_at_start = 1 - now["raw_cosine_mismatched"], 1 - start["raw_cosine_mismatched"]
    to_a_point = distance < 0.05 * distance_at_start and distance < 2 * (1 - now["raw_cosine_matched"])
    to_a_line = any(
        now[side] < 0.1 * start[side] and now[side] < 10
        for side in ("effective_rank_predicted", "effective_rank_target")
    )
    return to_a_point or to_a_line


def _centred(x: Tensor) -> Tensor:
    x = x.float()
    return F.normalize(x - x.mean(dim=0), dim=-1)
