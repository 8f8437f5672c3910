"""The page that holds the science: distances between a predicted and a target embedding.

LLM-JEPA (arXiv:2509.14252, eq. 2) trains

    L = L_LM + jepa_weight * d(Pred(Enc(context)), Enc(target))

and this module is `d`. A distance takes `predicted` and `target` [B, D] and returns one value per pair, [B]: the
caller averages, so that accumulation steps and ranks of different size weigh every pair alike.

`vicreg` and `sigreg` are terms to add. Each looks at the embeddings of one side, [B, D], and returns one number that is
large if the space has collapsed.

Everything is computed in float32 at least: near 1, a bfloat16 cosine is off by half its distance from 1.
"""

from __future__ import annotations

import itertools
import random

import torch
import torch.nn.functional as F
from torch import Tensor

Keys = Tensor | tuple[Tensor, ...]  # [B] ints each; equal things have an equal key


def jepa_distance(predicted: Tensor, target: Tensor, *, kind: str = "cosine") -> Tensor:
    """Distance of each pair, [B]; other pairs do not matter. 0 for equal embeddings.

        cosine:    1 - cos(z, s), in 0..2.                    The paper's default (section 3.1).
        l2:        ||z - s||.                                 Unnormalised; grows with sqrt(D) (paper, table 3).
        mse:       mean over D of (z - s)^2.                  (paper, table 3)
        smooth_l1: mean over D of the Huber loss with beta 1. Not in the paper.

    None of these keeps the space from collapsing: mapping everything to one point is a minimum of each.

    Args:
        predicted, target: [B, D], one row per pair. Both get a gradient, as in the paper; detach what must not move.

    Raises ValueError for an unknown `kind` or shapes that differ.
    """
    _check_shapes(predicted, target)
    z, s = at_least_float32(predicted), at_least_float32(target)
    if kind == "cosine":
        return 1 - F.cosine_similarity(z, s, dim=-1, eps=1e-6)
    if kind == "l2":
        return torch.linalg.vector_norm(z - s, dim=-1)
    if kind == "mse":
        return (z - s).square().mean(dim=-1)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(z, s, reduction="none").mean(dim=-1)
    raise ValueError(f"kind={kind!r} is not a per-pair distance; choose cosine, l2, mse or smooth_l1.")


def info_nce(
    predicted: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    target_key: Keys | None = None,
    context_key: Keys | None = None,
) -> Tensor:
    """Symmetric InfoNCE, [B]: row i of `predicted` must pick row i of `target`, and back. In nats; ln(B) at chance.

    value_i = 1/2 [ -log P(positives of z_i | all s) - log P(positives of s_i | all z) ],  logits Z S^T / temperature,
    rows of Z and S scaled to unit norm (arXiv:1807.03748, eq. 4, both directions). The paper's table 3 uses the first
    direction only, and one in-batch positive.

    Args:
        predicted, target: [B, D]. The other rows are the negatives: B is part of the objective, and gradient
            accumulation does not enlarge it.
        temperature: > 0, a number or a scalar tensor that is learnt. Smaller is sharper; 0.07 is CLIP's starting value
            and the reference code's.
        target_key: [B] ints, equal for equal targets; None: all differ. Or a tuple of such keys: targets are equal if
            one of the keys is.
        context_key: the same for contexts, that is, for what the predictions were made from. Every right answer to a
            context is a positive of it (`right_answers`), and the loss is that of picking *any* of them.

    Raises ValueError if shapes differ or temperature <= 0.
    """
    _check_shapes(predicted, target)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0; CLIP starts at 0.07.")
    z = F.normalize(at_least_float32(predicted), dim=-1, eps=1e-6)
    s = F.normalize(at_least_float32(target), dim=-1, eps=1e-6)
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ s.T / temperature  # [B, B]
    positive = right_answers(z, target_key, context_key)  # [B, B]
    joint = logits.masked_fill(~positive, -torch.inf)
    forward = logits.logsumexp(dim=1) - joint.logsumexp(dim=1)
    backward = logits.logsumexp(dim=0) - joint.logsumexp(dim=0)
    return (forward + backward) / 2


def right_answers(pairs: Tensor, target_key: Keys | None = None, context_key: Keys | None = None) -> Tensor:
    """[B, B] bools: whether target j is a right answer to context i, because some pair has an equal context and target.

    A question may have two answers, and an answer may belong to two questions. So this asks for texts, not for rows.

    Args:
        pairs: [B, ...]. Only its length and its device matter.
        target_key, context_key: see `info_nce`.

    Raises ValueError unless every key is [B].
    """
    sides = []
    for name, keys in (("target_key", target_key), ("context_key", context_key)):
        columns = keys_as_tuple(keys)
        for key in columns:
            if key.shape != pairs.shape[:1]:
                raise ValueError(f"{name} {tuple(key.shape)} must hold one key per pair, [{len(pairs)}].")
        # Without keys every pair differs from every other: its number is its key.
        numbers = torch.arange(len(pairs), device=pairs.device)
        sides.append([_first_places(key) for key in columns] or [numbers])
    right = torch.zeros(len(pairs), len(pairs), dtype=torch.bool, device=pairs.device)
    targets, contexts = sides
    for context, target in itertools.product(contexts, targets):  # [B] each
        known = torch.zeros_like(right)
        known[context, target] = True
        right |= known[context][:, target]
    return right


def keys_as_tuple(keys: Keys | None) -> tuple[Tensor, ...]:
    """No key, one key, or several, as a tuple of them."""
    if keys is None:
        return ()
    return (keys,) if isinstance(keys, Tensor) else tuple(keys)


def _first_places(key: Tensor) -> Tensor:
    """[B] keys -> [B] numbers below B, equal for equal keys. Unlike `unique`, it never waits for the device."""
    key = key.contiguous()
    return torch.searchsorted(key.sort().values, key)


def jepa_loss(
    predicted: Tensor,
    target: Tensor,
    *,
    objective: str,
    temperature: float | Tensor = 0.07,
    target_key: Keys | None = None,
    context_key: Keys | None = None,
) -> Tensor:
    """The objective that a recipe names, [B]: one value per pair. `temperature` and the keys are for `info_nce`."""
    if objective == "info_nce":
        return info_nce(predicted, target, temperature=temperature, target_key=target_key, context_key=context_key)
    return jepa_distance(predicted, target, kind=objective)


def vicreg(embeddings: Tensor) -> Tensor:
    """Variance and covariance terms of VICReg, scalar. 0 if every dimension has variance 1 and none are correlated.

    v + c / 25,  v = mean over j of max(0, 1 - sqrt(var_j + 1e-4)),  c = sum over i != j of C_ij^2 / D,  C the
    covariance of the D dimensions, var its diagonal, both over B - 1 (arXiv:2105.04906, eqs. 1-4, gamma = 1). A point
    has v = 0.99; a line has v = 0 but a large c. The paper adds the terms of both sides; here the caller does that.

    Args:
        embeddings: [B, D], one side of the pairs. Gather ranks first: C of a part is not a part of C.

    Raises ValueError for other shapes and for B < 2, which has no variance.
    """
    if embeddings.dim() != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings {tuple(embeddings.shape)} must be [B, D] with B >= 2: one row has no variance.")
    x = at_least_float32(embeddings)
    x = x - x.mean(dim=0)
    variance = x.square().sum(dim=0) / (len(x) - 1)  # [D]
    with torch.autocast(x.device.type, enabled=False):
        gram = x @ x.T / (len(x) - 1)  # [B, B], as large as C = X^T X / (B - 1) in sum of squares, and D is thousands
    v = (1 - (variance + 1e-4).sqrt()).clamp_min(0).mean()
    c = (gram.square().sum() - variance.square().sum()) / x.shape[1]
    return v + c / 25  # the paper's mu = 25 and nu = 1, over lambda = 25: relative to an invariance term of weight 1


def sigreg(embeddings: Tensor, slices: Tensor) -> Tensor:
    """Sketched Isotropic Gaussian Regularisation, scalar: how far the projections on `slices` are from N(0, 1).

    Mean over slices of B * integral of |f(t) - exp(-t^2/2)|^2 exp(-t^2/2) dt over -5..5, where f(t) = mean over rows of
    exp(i t x) and x = row . slice (Epps-Pulley; arXiv:2511.08544, section 4.2.3 and algorithm 1). The sample is not
    standardised: its mean and scale are judged too. B rows drawn from N(0, I) have sqrt(2 pi) - sqrt(2 pi / 3) = 1.06
    on average, whatever B; a point at 0 has 0.41 B, a stationary value; far from 0 it goes up to 3.95 B.

    Args:
        embeddings: [B, D]. Gather ranks first: f is averaged over all rows *before* it is squared, and the mean of
            each rank's value is another, noisier loss.
        slices: [D, M] unit columns, see `random_slices`. The same on every rank, and new ones every step. A few tensors
            of [B, M, 17] are kept for the gradient.

    Raises ValueError for shapes that do not fit.
    """
    if embeddings.dim() != 2 or slices.dim() != 2 or len(slices) != embeddings.shape[1] or not len(embeddings):
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} and slices {tuple(slices.shape)} must be [B, D] and [D, M], B >= 1."
        )
    x = at_least_float32(embeddings)
    # 17 points and -5..5 are the paper's advice (section 6.1). The integrand is even, so all 17 go to t >= 0 (section
    # 5.1; algorithm 1 has them on -5..5). With a spacing h, x that are 2 pi / h apart look equal: 20 here, 10 there.
    t = torch.linspace(0, 5, 17, dtype=x.dtype, device=x.device)
    normal = torch.exp(-t.square() / 2)  # the characteristic function of N(0, 1), and the window (algorithm 1)
    with torch.autocast(x.device.type, enabled=False):
        phase = (x @ slices.to(x.dtype))[..., None] * t  # [B, M, 17]
    error = (phase.cos().mean(dim=0) - normal).square() + phase.sin().mean(dim=0).square()  # [M, 17]
    return 2 * len(x) * torch.trapezoid(error * normal, t, dim=-1).mean()


def random_slices(dim: int, count: int, *, seed: int, step: int, device: torch.device | str) -> Tensor:
    """Draw directions for `sigreg`: [dim, count] float32 unit columns, uniform on the sphere, from `seed` and `step`.

    Drawn on the CPU, so that every device gets the same, and without the global generator. The paper starts
    from 1024 slices (arXiv:2511.08544, section 6.1; 256 in algorithm 1), and new ones every step (section 4.3).
    """
    mixed = random.Random(f"{seed} {step}").getrandbits(32)  # a CPU generator reads no more than 32 bits of its seed
    drawn = torch.randn(dim, count, generator=torch.Generator().manual_seed(mixed))
    return F.normalize(drawn, dim=0).to(device)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64: a check in float64 must not be rounded on the way."""
    return x if x.dtype == torch.float64 else x.float()


def _check_shapes(predicted: Tensor, target: Tensor) -> None:
    if predicted.shape != target.shape or predicted.dim() != 2:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and target {tuple(target.shape)} must both be [pairs, dimensions]."
        )
