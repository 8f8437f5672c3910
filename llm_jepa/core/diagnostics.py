"""Is the embedding space collapsing? Figures of a fixed bank of pairs, cheap enough for every evaluation.

A JEPA loss near zero says nothing by itself: a space in which everything is one point has loss zero as well. What
tells the two apart is whether a *wrong* target is further away than the right one, and how many directions are used.

Pretrained models are anisotropic (any two states have a high cosine), so the headline figures are *centred*: each side
has its own mean removed. Recall and rank depend on the number of pairs; compare them only between banks of one size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Keys = Tensor | tuple[Tensor, ...]  # [N] ints each; equal things have an equal key, see `losses.info_nce`


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards the mode from before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


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


def recall_at_1(
    predicted: Tensor, target: Tensor, target_key: Keys | None = None, context_key: Keys | None = None
) -> Tensor:
    """Share of predictions whose nearest target (centred cosine) is a right answer to their context. Scalar.

    Right are the pair's own target, and those that belong to an equal context in another pair, by the keys.
    """
    similarity = _centred(predicted) @ _centred(target).T  # [N, N]
    nearest = similarity.argmax(dim=1, keepdim=True)  # [N, 1]
    hit = _right_answers(predicted, target_key, context_key).gather(1, nearest)
    return hit.float().mean()


def linear_r2(
    predicted: Tensor,
    target: Tensor,
    target_key: Keys | None = None,
    context_key: Keys | None = None,
    *,
    train_share: float = 0.5,
) -> Tensor:
    """R^2 of a linear map from predictions to targets [N, D], fitted on the first pairs, scored on the rest. Scalar.

    1 - sum |s - (W z + b)|^2 / sum |s - mean|^2 over the scored pairs, `mean` that of the fitted targets: 1 = every
    target follows, 0 = no better than that mean, below 0 = worse. It does not ask, as a cosine does, in
    which coordinates a prediction knows its target. The residual of a fit, measured on the fitted pairs
    (arXiv:2509.14252, table 14), is perfect whenever N < D; this is not.

    W is a ridge regression with a free intercept. Its strength is the one of 13, 1e-6 to 1e6 times the mean squared
    length of the centred fitted predictions, with the least leave-one-out error on the fitted pairs; all 13 come from
    one singular value decomposition, in float64.

    Args:
        target_key, context_key: [N] ints or several, see `losses.info_nce`. Scored pairs whose target or context was
            fitted are left out: a map could have learnt them by heart.
        train_share: share of the pairs to fit on, rounded down. The order of the pairs must say nothing.

    NaN for non-finite embeddings and if no pair is left to score; 0 if the scored targets do not vary.

    Raises ValueError for fewer than two pairs to fit or none to score.
    """
    fit = int(train_share * len(predicted))
    if not 2 <= fit < len(predicted):
        raise ValueError(
            f"train_share={train_share} of {len(predicted)} pairs leaves {fit} to fit; 2 are needed, and 1 to score."
        )
    nothing = torch.full((), torch.nan, device=predicted.device)
    z, s = predicted.detach().cpu().double(), target.detach().cpu().double()  # on the CPU: MPS has no float64
    if not (z.isfinite().all() and s.isfinite().all()):
        return nothing
    unseen = _unseen(fit, len(z), target_key, context_key)
    if not unseen.any():
        return nothing
    new = s[fit:][unseen]
    if (new - new.mean(dim=0)).norm() <= 1e-6 * new.norm():  # equal but for float32 roundings
        return torch.zeros((), device=predicted.device)
    x, y = z[:fit] - z[:fit].mean(dim=0), s[:fit] - s[:fit].mean(dim=0)
    x_new, y_new = z[fit:][unseen] - z[:fit].mean(dim=0), new - s[:fit].mean(dim=0)
    mapped = torch.zeros_like(y_new)
    if x.norm() > 1e-6 * z[:fit].norm():  # else the predictions do not vary, and say nothing
        u, singular, v = torch.linalg.svd(x, full_matrices=False)  # [fit, K], [K], [K, D], K = min(fit, D)
        rotated = u.T @ y
        best, error = x.new_zeros(()), torch.inf
        for strength in x.square().sum() / fit * torch.logspace(6, -6, 13, dtype=x.dtype):
            shrinkage = singular.square() / (singular.square() + strength)  # [K]
            leverage = 1 / fit + u.square() @ shrinkage  # [fit]; 1 / fit is the intercept's
            left_out = (y - u @ (shrinkage[:, None] * rotated)) / (1 - leverage)[:, None]
            if (now := float(left_out.square().sum())) < error * (1 - 1e-9):  # a tie, as for fit = 2: the strongest
                best, error = strength, now
        mapped = x_new @ v.T @ ((singular / (singular.square() + best))[:, None] * rotated)
    r2 = 1 - (y_new - mapped).square().sum() / y_new.square().sum()
    return r2.float().to(predicted.device)


# The names that `space_diagnostics` gives.
SPACE_FIGURES = (
    "cosine_matched", "cosine_mismatched", "raw_cosine_matched", "raw_cosine_mismatched", "recall_at_1",
    "effective_rank_predicted", "effective_rank_target", "linear_r2",
)  # fmt: skip


def space_diagnostics(
    predicted: Tensor, target: Tensor, target_key: Keys | None = None, context_key: Keys | None = None
) -> dict[str, float]:
    """Geometry of N pairs of embeddings [N, D], with keys as in `linear_r2`.

    - `cosine_matched`, `cosine_mismatched`: mean centred cosine of the N pairs, and of contexts with wrong targets. A
      right answer of another pair is neither.
    - `raw_cosine_matched`, `raw_cosine_mismatched`: the same without centring; if both are near 1, the space has
      collapsed.
    - `recall_at_1`: see `recall_at_1`; chance is 1 / N.
    - `effective_rank_predicted`, `effective_rank_target`: see `effective_rank`.
    - `linear_r2`: see `linear_r2`. Left out for fewer than four pairs, and if no pair is new in the second half.

    Raises ValueError for fewer than two pairs: there is no wrong pair to compare with.
    """
    if len(predicted) < 2:
        raise ValueError(f"{len(predicted)} pair(s): the diagnostics compare right with wrong pairs and need two.")
    predicted, target = predicted.float(), target.float()
    own = torch.eye(len(predicted), dtype=torch.bool, device=predicted.device)
    right = _right_answers(predicted, target_key, context_key)
    figures = {}
    for name, z, s in (
        ("", _centred(predicted), _centred(target)),
        ("raw_", F.normalize(predicted, dim=-1), F.normalize(target, dim=-1)),
    ):
        cosine = z @ s.T  # [N, N]
        figures[f"{name}cosine_matched"] = cosine[own].mean()
        # all targets equal: no wrong pair exists
        figures[f"{name}cosine_mismatched"] = cosine[~right].mean() if (~right).any() else cosine.new_tensor(0.0)
    figures["recall_at_1"] = recall_at_1(predicted, target, target_key, context_key)
    figures["effective_rank_predicted"] = effective_rank(predicted)
    figures["effective_rank_target"] = effective_rank(target)
    if len(predicted) >= 4 and _unseen(len(predicted) // 2, len(predicted), target_key, context_key).any():
        figures["linear_r2"] = linear_r2(predicted, target, target_key, context_key)
    return {key: float(value) for key, value in figures.items()}


def has_collapsed(now: dict[str, float], start: dict[str, float]) -> bool:
    """Whether the space shrank to a point or to a few directions since step 0.

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


def _unseen(fit: int, count: int, target_key: Keys | None, context_key: Keys | None) -> Tensor:
    """[count - fit] bools, on the CPU: which pairs after the first `fit` have keys that none of those has."""
    unseen = torch.ones(count - fit, dtype=torch.bool)
    for key in (*_as_tuple(target_key), *_as_tuple(context_key)):
        unseen &= ~torch.isin(key[fit:], key[:fit]).cpu()
    return unseen


def _right_answers(pairs: Tensor, target_key: Keys | None, context_key: Keys | None) -> Tensor:
    """[N, N] bools, as `losses.right_answers`: whether some pair has a context equal to i and a target equal to j."""
    return _equal(pairs, context_key) @ _equal(pairs, target_key) > 0


def _equal(pairs: Tensor, keys: Keys | None) -> Tensor:
    """[N, N] of 1 and 0: whether two pairs have an equal key, or are the same pair."""
    equal = torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)
    for key in _as_tuple(keys):
        equal |= key[:, None] == key[None, :]
    return equal.float()


def _as_tuple(keys: Keys | None) -> tuple[Tensor, ...]:
    if keys is None:
        return ()
    return (keys,) if isinstance(keys, Tensor) else keys


def _centred(x: Tensor) -> Tensor:
    x = x.float()
    return F.normalize(x - x.mean(dim=0), dim=-1)
