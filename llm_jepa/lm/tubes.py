"""Semantic Tube Prediction (arXiv:2602.22617): the states of one row should move along a straight line.

    L = L_LM + weight * [1 - cos(first, second)]

where `first` and `second` are displacements between hidden states of the *same* forward pass: no second view, no
predictor. The paper (sections 1 and 4, appendix G) and its released code (github.com/galilai-group/llm-jepa, stp.py at
1dce9e7, `--linear=random_span`) choose different displacements, so they are different losses. Both are here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.losses import jepa_distance


class Tube(NamedTuple):
    """Two displacements of one row. Each is the sum of sign * hidden[position] over its (position, sign) entries."""

    first: list[tuple[int, int]]
    second: list[tuple[int, int]]


def draw_tube(spans: Sequence[tuple[int, int]], formula: str, rng: random.Random) -> Tube | None:
    """Draw a random tube of one row, or None if the row is too short for one.

    paper: h_r - h_s and h_t - h_r for s < r < t. The three positions are uniform from the start of the first span to
        the end of the last, tokens between the messages included: the paper uses the trajectory of the whole sequence
        and starts at s > 0 only to skip a preamble (appendix G). None below three positions.
    code: a patch of the content against the rest of it. The L content tokens of all spans are laid end to end; the
        patch is tokens a ~ U{0..L-1} up to b ~ U{a+1..L}, never all of them. Each token moves the state *before* it to
        its own state, so a run of tokens p..q is the displacement h_q - h_(p-1). The patch is compared with the sum of
        the displacements before and after it. None below two tokens (the reference loops forever there).

    Args:
        spans: half-open token ranges [start, end) of the content, in order: the user's, then the assistant's. A token
            at position 0 has no state before it, and `code` leaves it out (the reference asserts that there is none).
        formula: "paper" or "code".

    Raises ValueError for another formula.
    """
    spans = [(start, end) for start, end in spans if start < end]
    assert all(start >= 0 for start, _ in spans), spans
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)), spans
    if formula == "paper":
        positions = range(spans[0][0], spans[-1][1]) if spans else range(0)
        if len(positions) < 3:
            return None
        s, r, t = sorted(rng.sample(positions, 3))
        return Tube(first=[(r, 1), (s, -1)], second=[(t, 1), (r, -1)])
    if formula == "code":
        tokens = [position for start, end in spans for position in range(max(start, 1), end)]
        if len(tokens) < 2:
            return None
        a = rng.randrange(len(tokens))
        # a = 0 with b = L would be all of it; the reference draws b again until it is not.
        b = rng.randrange(a + 1, len(tokens) + (a > 0))
        return Tube(first=_displacement(tokens[a:b]), second=_displacement(tokens[:a] + tokens[b:]))
    raise ValueError(f"formula={formula!r} is unknown; choose paper or code.")


class Tubes(NamedTuple):
    """Tubes of a batch as tensors: the two displacements of tube i are sums of sign * state over W places."""

    at: Tensor  # [n, 2, W] flat places in [R * L]
    sign: Tensor  # [n, 2, W] of -1, 0 and 1


def stack_tubes(tubes: Sequence[tuple[int, int, Tube]], length: int, device: torch.device | str = "cpu") -> Tubes:
    """(row, offset, tube) triples -> tensors, for rows of `length` tokens.

    The positions of a tube count from token `offset` of its row, which is where a packed example starts.
    """
    width = max((len(side) for _, _, tube in tubes for side in tube), default=1)
    places, signs = [], []
    for row, offset, tube in tubes:
        for side in tube:
            # Padded with a place of its own side at sign 0: another state could be infinite, and 0 * inf is NaN.
            padded = side + [(side[0][0], 0)] * (width - len(side))
            assert all(0 <= offset + position < length for position, _ in padded), (offset, tube, length)
            places.append([row * length + offset + position for position, _ in padded])
            signs.append([sign for _, sign in padded])
    both = torch.tensor([places, signs], dtype=torch.long).reshape(2, len(tubes), 2, width)
    return Tubes(*both.to(device, non_blocking=True))  # one copy to the device, and nothing comes back


def tube_distance(hidden: Tensor, tubes: Tubes) -> Tensor:
    """1 - cos(first, second) of each tube, [n], in 0..2. The gradient goes through both displacements.

    Args:
        hidden: [R, L, D], states of the last layer (the default of the paper and of its code).
    """
    states = hidden.flatten(0, 1)[tubes.at]  # [n, 2, W, D]
    # Widened before they are added up: bfloat16 would keep 8 bits of the sum.
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    first, second = (states * tubes.sign[..., None]).sum(dim=2).unbind(dim=1)  # [n, D] each
    return jepa_distance(first, second, kind="cosine")


def _displacement(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """The sum of h[p] - h[p - 1] over `tokens`, less the states that cancel, as (position, sign)."""
    signs = Counter(tokens)
    signs.subtract(position - 1 for position in tokens)
    return [(position, sign) for position, sign in signs.items() if sign]
