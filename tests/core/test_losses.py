"""Claims about the distances: closed forms worked by hand on two pairs, their gradients, and what may not change them.

The two pairs (their cosines are neither 1, 0 nor -1, and one is negative):

    z = (1, 2, 2), s = (2, 3, 6):        |z| = 3, |s| = 7,          z.s = 20, z - s = (-1, -1, -4)
    z = (2, -1, 2), s = (1.5, 2, -1):    |z| = 3, |s| = sqrt(7.25), z.s = -1, z - s = (0.5, -3, 3)
"""

from __future__ import annotations

import contextlib
import math
from math import exp, log, pi, sqrt
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.core.losses import info_nce, jepa_distance, jepa_loss, random_slices, right_answers, sigreg, vicreg
from llm_jepa.lm.arguments import LLMJEPAConfig

OBJECTIVES = ("cosine", "l2", "mse", "smooth_l1", "info_nce")

DISTANCES = ("cosine", "l2", "mse", "smooth_l1")
Z = [[1.0, 2.0, 2.0], [2.0, -1.0, 2.0]]
S = [[2.0, 3.0, 6.0], [1.5, 2.0, -1.0]]


def pairs(count=5, dimensions=7, *, dtype=torch.float64, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(count, dimensions, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    z, s = draw(), draw()
    return z.requires_grad_(grad), s.requires_grad_(grad)


def gradients(loss, *tensors):
    found = torch.autograd.grad(loss, tensors)
    assert all(g.abs().max() > 1e-6 for g in found), "a zero gradient would compare equal to anything"
    return found


# -- each distance alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("cosine", [1 - 20 / 21, 1 + 1 / (3 * sqrt(7.25))]),
        ("l2", [sqrt(1 + 1 + 16), sqrt(0.25 + 9 + 9)]),
        ("mse", [18 / 3, 18.25 / 3]),
        ("smooth_l1", [(0.5 + 0.5 + 3.5) / 3, (0.5**2 / 2 + 2.5 + 2.5) / 3]),
    ],
)
def test_each_distance_is_its_formula_for_each_pair(kind, expected):
    """1 - z.s/|z||s|;  sqrt of the sum of squares;  that sum / 3;  d^2/2 below 1 and |d| - 1/2 above, mean of 3."""
    found = jepa_distance(torch.tensor(Z, dtype=torch.float64), torch.tensor(S, dtype=torch.float64), kind=kind)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert jepa_distance(torch.tensor(Z), torch.tensor(S), kind=kind).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "kind, by_z, by_s",
    [
        # -(s/21 - (20/21) z/9) = (-18 + 20, -27 + 40, -54 + 40)/189; at a right angle to z, so 2 + 26 - 28 = 0.
        ("cosine", [2 / 189, 13 / 189, -14 / 189], [-9 / 1029, -38 / 1029, 22 / 1029]),
        ("l2", [-1 / sqrt(18), -1 / sqrt(18), -4 / sqrt(18)], [1 / sqrt(18), 1 / sqrt(18), 4 / sqrt(18)]),
        ("mse", [-2 / 3, -2 / 3, -8 / 3], [2 / 3, 2 / 3, 8 / 3]),
    ],
)
def test_gradients_of_the_first_pair_are_those_derived_by_hand(kind, by_z, by_s):
    """cosine: see above, and -(z/21 - (20/21) s/49) for s;  l2: (z - s)/l2;  mse: 2 (z - s)/3;  s is minus z there."""
    z, s = (torch.tensor(x[:1], dtype=torch.float64, requires_grad=True) for x in (Z, S))
    for found, expected in zip(gradients(jepa_distance(z, s, kind=kind).sum(), z, s), (by_z, by_s), strict=True):
        assert found[0].tolist() == pytest.approx(expected, rel=1e-10)


def test_smooth_l1_has_the_gradient_of_both_branches():
    """Of the second pair: d = (0.5, -3, 3) is cut to (0.5, -1, 1), over 3 dimensions."""
    z, s = (torch.tensor(x[1:], dtype=torch.float64, requires_grad=True) for x in (Z, S))
    by_z, by_s = gradients(jepa_distance(z, s, kind="smooth_l1").sum(), z, s)
    assert by_z[0].tolist() == pytest.approx([0.5 / 3, -1 / 3, 1 / 3])
    assert by_s[0].tolist() == pytest.approx([-0.5 / 3, 1 / 3, -1 / 3])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_gradient_is_the_numerical_one(objective):
    """Central differences in float64, for both sides, with two rows that share a key."""
    z, s = pairs(4, 3, grad=True)
    key = torch.tensor([5, 2, 5, 9])
    distance = lambda z, s: jepa_loss(z, s, objective=objective, temperature=0.5, target_key=key)  # noqa: E731
    assert torch.autograd.gradcheck(distance, (z, s))
    gradients(distance(z, s).sum(), z, s)


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_distance_is_of_one_pair_alone(kind):
    """Another row 2 changes entry 2 and no other bit; row 2's gradient comes from entry 2 alone."""
    z, s = pairs(grad=True)
    before = jepa_distance(z, s, kind=kind)
    changed = jepa_distance(z + 3 * torch.eye(5, 7, dtype=z.dtype)[2] * (torch.arange(5) == 2)[:, None], s, kind=kind)
    assert before.shape == (5,)
    assert (before != changed).tolist() == [False, False, True, False, False]
    (by_z,) = gradients(before[2], z)
    assert by_z.abs().sum(dim=1).gt(0).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("kind", DISTANCES)
def test_equal_embeddings_have_distance_zero_and_a_finite_gradient(kind):
    """Which is why none of these distances keeps a space from collapsing; at l2 = 0 the square root has no slope."""
    z = torch.tensor(Z, requires_grad=True)
    s = torch.tensor(Z, requires_grad=True)
    distance = jepa_distance(z, s, kind=kind)
    assert distance.tolist() == pytest.approx([0, 0], abs=3e-7)
    for gradient in torch.autograd.grad(distance.sum(), (z, s)):
        assert gradient.isfinite().all() and gradient.abs().max() < 1e-6


def test_only_the_directions_count_for_cosine_and_info_nce():
    """Row i of z times a_i and of s times b_i: the same values, and gradients smaller by a_i and b_i."""
    z, s = pairs(4, grad=True)
    a, b = torch.tensor([[0.3], [2.0], [7.0], [50.0]]), torch.tensor([[11.0], [0.2], [1.5], [4.0]])
    for objective in ("cosine", "info_nce"):
        big_z, big_s = (z * a).detach().requires_grad_(), (s * b).detach().requires_grad_()
        plain, scaled = jepa_loss(z, s, objective=objective), jepa_loss(big_z, big_s, objective=objective)
        torch.testing.assert_close(scaled, plain)
        by_z, by_s = gradients(plain.sum(), z, s)
        by_big_z, by_big_s = gradients(scaled.sum(), big_z, big_s)
        torch.testing.assert_close(by_big_z * a, by_z)
        torch.testing.assert_close(by_big_s * b, by_s)


def test_the_scale_counts_for_the_other_distances():
    """Both sides times 3: l2 times 3, mse times 9, smooth_l1 in between."""
    z, s = torch.tensor(Z), torch.tensor(S)
    ratio = {kind: jepa_distance(3 * z, 3 * s, kind=kind) / jepa_distance(z, s, kind=kind) for kind in DISTANCES}
    assert ratio["l2"].tolist() == pytest.approx([3, 3])
    assert ratio["mse"].tolist() == pytest.approx([9, 9])
    assert all(3 < value < 9 for value in ratio["smooth_l1"].tolist())


def test_l2_squared_is_mse_times_the_dimensions():
    """||d||^2 = D mean(d^2), D = 7; so l2 grows with sqrt(D) where mse does not."""
    z, s = pairs(6, 7)
    torch.testing.assert_close(jepa_distance(z, s, kind="l2") ** 2, 7 * jepa_distance(z, s, kind="mse"))


# -- InfoNCE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_info_nce_of_two_pairs_worked_by_hand(temperature):
    """z = (1, 0), (0, 2) and s = (3, 4), (5, 12): cosines z0s0 = 3/5, z0s1 = 5/13, z1s0 = 4/5, z1s1 = 12/13.

    -log of a softmax of two = log(1 + e^((wrong - right) / t)); each value is half its row's plus half its column's.
    """
    z, s = (
        torch.tensor([[1, 0], [0, 2]], dtype=torch.float64),
        torch.tensor([[3, 4], [5, 12]], dtype=torch.float64),
    )
    loss = lambda wrong, right: log(1 + exp((wrong - right) / temperature))  # noqa: E731
    first = (loss(5 / 13, 3 / 5) + loss(4 / 5, 3 / 5)) / 2
    second = (loss(4 / 5, 12 / 13) + loss(5 / 13, 12 / 13)) / 2
    assert info_nce(z, s, temperature=temperature).tolist() == pytest.approx([first, second], rel=1e-10)
    assert jepa_loss(z, s, objective="info_nce", temperature=temperature).tolist() == pytest.approx([first, second])


def test_info_nce_of_two_orthogonal_pairs_is_log_of_one_plus_e_to_minus_one_over_t():
    """Right pairs at cosine 1, wrong ones at 0, whatever their lengths: log(1 + e^(-1/t)); 6e-7 at t = 0.07."""
    z, s = torch.tensor([[3.0, 4.0], [-8.0, 6.0]]), torch.tensor([[6.0, 8.0], [-4.0, 3.0]])
    assert info_nce(z, s, temperature=0.5).tolist() == pytest.approx([log(1 + exp(-2))] * 2, rel=1e-5)
    swapped = info_nce(z, s.flip(0), temperature=0.5)
    assert swapped.tolist() == pytest.approx([log(1 + exp(2))] * 2, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_info_nce_at_chance_is_ln_of_the_number_of_pairs(count):
    """All predictions equal and all targets equal: every target is as good a guess, -log(1/B)."""
    z, s = torch.tensor([[1.0, 2.0, 2.0]]).expand(count, 3), torch.tensor([[2.0, 3.0, 6.0]]).expand(count, 3)
    assert info_nce(z, s).tolist() == pytest.approx([math.log(count)] * count, abs=1e-6)


def test_info_nce_does_not_care_which_side_predicts():
    """Swapping z and s transposes the logits, and rows and columns count alike; the gradients swap too."""
    z, s = pairs(grad=True)
    key = torch.tensor([4, 4, 1, 8, 1])
    for keys in (None, key):
        there, back = info_nce(z, s, target_key=keys), info_nce(s, z, target_key=keys)
        torch.testing.assert_close(there, back)
        weight = torch.arange(1.0, 6.0, dtype=z.dtype)
        for ours, theirs in zip(gradients(there @ weight, z, s), gradients(back @ weight, z, s), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("keys", [None, [3, 1, 4, 2**62, -7]])
def test_info_nce_with_distinct_keys_is_cross_entropy_both_ways(keys):
    """Half of cross_entropy(logits, 0..B-1) and half of the transposed, per row, in value and gradient."""
    z, s = pairs(grad=True)
    cosine = (z / z.norm(dim=1, keepdim=True)) @ (s / s.norm(dim=1, keepdim=True)).T
    own = torch.arange(5)
    logits = cosine / 0.2
    expected = (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2
    found = info_nce(z, s, temperature=0.2, target_key=None if keys is None else torch.tensor(keys))
    torch.testing.assert_close(found, expected)
    weight = torch.arange(1.0, 6.0, dtype=z.dtype)
    for ours, theirs in zip(gradients(found @ weight, z, s), gradients(expected @ weight, z, s), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equal_targets_are_positives_of_each_other():
    """Rows 0 and 2 share a target. Unit rows z = (1, 0), (0, 1), (.8, .6), s = a, b, a with a = (.6, .8) and
    b = (-.28, .96); cosines over t = 0.5:

        z0: 1.2  -.56  1.2      z1: 1.6  1.92  1.6      z2: 1.92  .704  1.92

    Picking any positive counts: row 0 is -log(2 e^1.2 / (2 e^1.2 + e^-.56)), its column
    -log((e^1.2 + e^1.92) / (e^1.2 + e^1.6 + e^1.92)), and so on.
    """
    a, b = [3.0, 4.0], [-0.28, 0.96]
    z = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.8, 0.6]], dtype=torch.float64)
    s = torch.tensor([a, b, a], dtype=torch.float64)
    rows = [
        -log(2 * exp(1.2) / (2 * exp(1.2) + exp(-0.56))),
        -log(exp(1.92) / (2 * exp(1.6) + exp(1.92))),
        -log(2 * exp(1.92) / (2 * exp(1.92) + exp(0.704))),
    ]
    shared = -log((exp(1.2) + exp(1.92)) / (exp(1.2) + exp(1.6) + exp(1.92)))
    columns = [shared, -log(exp(1.92) / (exp(-0.56) + exp(1.92) + exp(0.704))), shared]
    expected = [(row + column) / 2 for row, column in zip(rows, columns, strict=True)]

    found = info_nce(z, s, temperature=0.5, target_key=torch.tensor([8, 3, 8]))
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    apart = info_nce(z, s, temperature=0.5)
    assert apart[0] > found[0] + 0.3 and apart[1] == pytest.approx(found[1]), "the key changes its own rows alone"


def test_both_answers_to_one_question_are_positives():
    """Pairs 0 and 1 have one context: z = (1, 0), (1, 0), (0, 1), s = (.6, .8), (.8, .6), (-.6, .8). Cosines over .5:

        z0: 1.2  1.6  -1.2      z1: the same      z2: 1.6  1.2  1.6

    Row 0 may pick target 0 or 1: -log((e^1.2 + e^1.6) / (e^1.2 + e^1.6 + e^-1.2)). Target 0 may pick context 0 or 1:
    -log(2 e^1.2 / (2 e^1.2 + e^1.6)).
    """
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([[0.6, 0.8], [0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    row = -log((exp(1.2) + exp(1.6)) / (exp(1.2) + exp(1.6) + exp(-1.2)))
    expected = [
        (row - log(2 * exp(1.2) / (2 * exp(1.2) + exp(1.6)))) / 2,
        (row - log(2 * exp(1.6) / (2 * exp(1.6) + exp(1.2)))) / 2,
        (-log(exp(1.6) / (2 * exp(1.6) + exp(1.2))) - log(exp(1.6) / (2 * exp(-1.2) + exp(1.6)))) / 2,
    ]
    keys = {"target_key": torch.tensor([3, 8, 5]), "context_key": torch.tensor([9, 9, 2**61])}
    found = info_nce(z, s, temperature=0.5, **keys)
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    negatives = info_nce(z, s, temperature=0.5, target_key=keys["target_key"])
    assert negatives[0] > 2 * found[0] and negatives[1] > 2 * found[1], "the keys of the contexts do nothing"
    # As if z picked the pair of answers: -log p_0 - log p_1 pull apart, -log(p_0 + p_1) does not.
    both = by_hand(z, s, [{9}, {9}, {2}], [{3}, {8}, {5}], 0.5)
    for ours, theirs in zip(gradients(found.sum(), z, s), gradients(both.sum(), z, s), strict=True):
        torch.testing.assert_close(ours, theirs)


def by_hand(z, s, contexts, targets, temperature):
    """InfoNCE in loops. Things are sets of names, and equal if they share one; right is what some pair has together."""
    z, s = z / z.norm(dim=1, keepdim=True), s / s.norm(dim=1, keepdim=True)
    probability = torch.exp(z @ s.T / temperature)
    count = range(len(z))

    def right(i, j):
        return any(contexts[k] & contexts[i] and targets[k] & targets[j] for k in count)

    losses = []
    for i in count:
        row = sum(probability[i, j] for j in count if right(i, j)) / probability[i].sum()
        column = sum(probability[j, i] for j in count if right(j, i)) / probability[:, i].sum()
        losses.append(-(row.log() + column.log()) / 2)
    return torch.stack(losses)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 4), min_size=1, max_size=9))
def test_right_answers_are_those_of_some_pair(drawn):
    """Random keys, two of each side: value and gradient against loops over sets of names."""
    target, context, target_text, context_text = torch.tensor(drawn).T
    z, s = pairs(len(drawn), grad=True)
    names = [({f"t{a}", f"T{c}"}, {f"c{b}", f"C{d}"}) for a, b, c, d in drawn]
    expected = by_hand(z, s, [c for _, c in names], [t for t, _ in names], 0.3)
    options = {"target_key": (target, target_text), "context_key": (context, context_text)}
    found = info_nce(z, s, temperature=0.3, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    weight = torch.arange(1.0, len(drawn) + 1, dtype=z.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(found @ weight, (z, s)), torch.autograd.grad(expected @ weight, (z, s)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_an_answer_to_two_questions_does_not_join_their_other_answers():
    """a -> x, b -> x, b -> y: y is right for b alone."""
    context, target = torch.tensor([1, 2, 2]), torch.tensor([7, 7, 9])
    right = right_answers(torch.empty(3), target, context)
    assert right.tolist() == [[True, True, False], [True, True, True], [True, True, True]]


def test_another_wording_that_is_another_rows_answer_is_right_for_both():
    """Row A: a -> x, or in other words y. Row B: b -> y. Keys of the rows, then of the texts."""
    of_row, text = torch.tensor([1, 1, 2]), torch.tensor([1, 2, 2])
    right = right_answers(torch.empty(3), (of_row, text), torch.tensor([5, 5, 6]))
    assert right.tolist() == [[True, True, True], [True, True, True], [False, True, True]]


def test_different_texts_compute_the_same_bits_with_and_without_keys():
    z, s = pairs(7, 33, dtype=torch.float32, grad=True)
    key = torch.randperm(7, generator=torch.Generator().manual_seed(0)) + 2**40
    weight = torch.arange(1.0, 8.0)
    plain = info_nce(z, s)
    by_plain = gradients(plain @ weight, z, s)
    for options in ({"context_key": key}, {"target_key": key, "context_key": -key}, {"target_key": (key, key)}):
        keyed = info_nce(z, s, **options)
        assert keyed.equal(plain)
        for ours, theirs in zip(gradients(keyed @ weight, z, s), by_plain, strict=True):
            assert ours.equal(theirs)


def test_info_nce_of_one_and_the_same_target_is_zero():
    """Every row is a positive: probability 1, no loss and nothing to learn; without keys there would be."""
    z, s = pairs(grad=True)
    found = info_nce(z, s, target_key=torch.full((5,), 6))
    assert found.tolist() == [0.0] * 5
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(found.sum(), (z, s)))
    assert info_nce(z, s).min() > 0.01


# -- precision ------------------------------------------------------------------------------------------------------


def close_pairs(dtype):
    """64 pairs whose 1 - cos is near 1e-3: s = z + 0.045 noise, |noise| = |z|, so tan = 0.045 and 1 - cos = 0.001."""
    z, noise = pairs(64, 256, seed=1)
    return z.to(dtype), (z + 0.045 * noise).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_embeddings_are_compared_in_float32(dtype, objective):
    """To 1 % of what float64 makes of the same inputs, cosines of 0.999 included, and a float32 result. bfloat16
    itself has steps of 0.004 below 1."""
    z, s = close_pairs(dtype)
    found = jepa_loss(z, s, objective=objective)
    expected = jepa_loss(z.double(), s.double(), objective=objective)
    assert found.dtype == torch.float32
    if objective == "cosine":
        assert 0.0008 < expected.mean() < 0.0013
        narrow = 1 - F.cosine_similarity(z, s).double()
        assert (narrow / expected - 1).abs().max() > 0.1, "the inputs are no test of precision"
    assert found.tolist() == pytest.approx(expected.tolist(), rel=0.01, abs=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autocast_changes_nothing(objective):
    """Users call these from training steps of their own, under autocast, which turns matrix products to bfloat16."""
    z, s = pairs(8, 32, dtype=torch.float32)
    expected = jepa_loss(z, s, objective=objective)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z @ s.T).dtype == torch.bfloat16, "autocast is not at work"
        found = jepa_loss(z, s, objective=objective)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_arrive_in_the_dtype_of_the_embeddings(objective):
    """bfloat16 in, bfloat16 gradient out, equal to the float64 gradient up to its own rounding of 2^-8."""
    z, s = (x.requires_grad_() for x in close_pairs(torch.bfloat16))
    wide_z, wide_s = z.detach().double().requires_grad_(), s.detach().double().requires_grad_()
    found = gradients(jepa_loss(z, s, objective=objective).sum(), z, s)
    expected = gradients(jepa_loss(wide_z, wide_s, objective=objective).sum(), wide_z, wide_s)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float64_stays_float64(objective):
    """1e-9 more on one coordinate is still seen; float32 would lose it below 1e-7."""
    z, s = torch.tensor(Z, dtype=torch.float64), torch.tensor(S, dtype=torch.float64)
    moved = jepa_loss(z + torch.tensor([1e-9, 0, 0]), s, objective=objective, temperature=1.0)
    before = jepa_loss(z, s, objective=objective, temperature=1.0)
    assert before.dtype == torch.float64
    assert (moved != before).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("zero", ["predicted", "target", "both"])
def test_a_zero_embedding_has_a_finite_value_and_gradient(objective, zero):
    """It has no direction; a NaN here would end up in every weight."""
    z, s = pairs(3, 4, dtype=torch.float32)
    if zero in ("predicted", "both"):
        z[1] = 0
    if zero in ("target", "both"):
        s[1] = 0
    z.requires_grad_()
    s.requires_grad_()
    values = jepa_loss(z, s, objective=objective)
    assert values.isfinite().all()
    for gradient in torch.autograd.grad(values.sum(), (z, s)):
        assert gradient.isfinite().all() and gradient[0].abs().max() > 0


# -- order and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_another_order_of_the_pairs_is_another_order_of_the_values(objective):
    """Values and gradients move with their rows, shared keys included."""
    z, s = pairs(grad=True)
    key, order = torch.tensor([4, 1, 4, 8, 1]), torch.tensor([3, 0, 4, 1, 2])
    weight = torch.arange(1.0, 6.0, dtype=z.dtype)
    values = jepa_loss(z, s, objective=objective, target_key=key)
    moved_z, moved_s = (x.detach()[order].requires_grad_() for x in (z, s))
    moved = jepa_loss(moved_z, moved_s, objective=objective, target_key=key[order])
    assert values.unique().numel() == 5, "equal values have no order"
    torch.testing.assert_close(moved, values[order])
    by_moved = gradients(moved @ weight[order], moved_z, moved_s)
    for ours, theirs in zip(by_moved, gradients(values @ weight, z, s), strict=True):
        torch.testing.assert_close(ours, theirs[order])


@pytest.mark.parametrize(
    "shapes", [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((1, 3), (2, 3)), ((3,), (3,)), ((2, 1, 3),) * 2]
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_embeddings_that_are_no_pairs_are_refused(objective, shapes):
    """Broadcasting would compare one target with every prediction."""
    with pytest.raises(ValueError, match="must both be"):
        jepa_loss(torch.ones(shapes[0]), torch.ones(shapes[1]), objective=objective)


@pytest.mark.parametrize("temperature", [0, -0.07, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        info_nce(torch.tensor(Z), torch.tensor(S), temperature=temperature)


@pytest.mark.parametrize("shape", [(2,), (1,), (3, 1), (3, 3)])
def test_keys_that_are_not_one_per_pair_are_refused(shape):
    """Three pairs. Broadcast, a single key makes every row a positive (loss 0), and [3, 1] gives [3, 3] values."""
    z, s = pairs(3)
    for name in ("target_key", "context_key"):
        with pytest.raises(ValueError, match=f"^{name} "):
            info_nce(z, s, **{name: torch.zeros(shape, dtype=torch.long)})


@pytest.mark.parametrize("kind", ["info_nce", "cos", "", "L2"])
def test_an_unknown_distance_is_refused_by_naming_the_known_ones(kind):
    with pytest.raises(ValueError, match="cosine, l2, mse or smooth_l1"):
        jepa_distance(torch.tensor(Z), torch.tensor(S), kind=kind)


def test_the_objectives_of_a_recipe_are_those_of_the_losses():
    """The list is written down twice: here and as a choice in the configuration, which adds the one without pairs."""
    choices = get_args(get_type_hints(LLMJEPAConfig)["objective"])
    assert sorted(choices) == sorted([*OBJECTIVES, "stp"])
    assert sorted(OBJECTIVES) == sorted([*DISTANCES, "info_nce"])


def test_what_is_left_out_is_what_the_docstrings_say():
    z, s = pairs()
    assert torch.equal(jepa_distance(z, s), jepa_distance(z, s, kind="cosine"))
    default = info_nce(z, s)
    assert torch.equal(default, info_nce(z, s, temperature=0.07, target_key=None, context_key=None))
    assert torch.equal(default, jepa_loss(z, s, objective="info_nce"))


def test_jepa_loss_hands_on_the_temperature_and_both_keys():
    z, s = pairs()
    options = {"temperature": 0.3, "target_key": torch.tensor([1, 2, 1, 3, 4]), "context_key": torch.arange(5) // 2}
    value = jepa_loss(z, s, objective="info_nce", **options)
    assert torch.equal(value, info_nce(z, s, **options))
    for name in options:
        assert not torch.equal(value, info_nce(z, s, **{**options, name: {"temperature": 0.4}.get(name)})), name


@pytest.mark.parametrize("objective", ["cosine", "info_nce"])
def test_embeddings_shorter_than_a_millionth_count_as_that_long(objective):
    """|z| = |s| = 1e-7 along one direction: the cosine is 1e-14 / 1e-12. No gradient of 1e7."""
    z = torch.tensor([[1e-7, 0.0], [0.0, 3.0]], dtype=torch.float64)
    if objective == "cosine":
        assert jepa_distance(z, z).tolist() == pytest.approx([0.99, 0.0], abs=1e-9)
    else:
        logits = torch.tensor([[0.01, 0.0], [0.0, 1.0]], dtype=torch.float64) / 0.07
        expected = logits.logsumexp(dim=1) - logits.diagonal()
        torch.testing.assert_close(info_nce(z, z), expected, rtol=0, atol=1e-9)


@pytest.fixture
def meta(monkeypatch):
    """The device `meta` holds no values: a tensor on the CPU beside its tensors is an error, as it is on a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know this device
    return torch.zeros(3, 4, device="meta")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_distances_are_computed_where_the_embeddings_are(objective, meta):
    keys = meta[:, 0].long()
    for options in ({}, {"target_key": keys}, {"context_key": keys}, {"target_key": keys, "context_key": keys}):
        assert jepa_loss(meta, meta, objective=objective, **options).device == meta.device


def test_terms_are_computed_where_the_embeddings_are(meta):
    slices = random_slices(4, 5, seed=0, step=0, device="meta")
    assert slices.device == sigreg(meta, slices).device == vicreg(meta).device == meta.device


def test_random_slices_never_change():
    """Pinned: with others, a resumed run would not be the one that was not interrupted."""
    expected = [[0.1262, -0.9519, -0.9906], [0.992, 0.3065, -0.1368]]
    torch.testing.assert_close(
        random_slices(2, 3, seed=1, step=2, device="cpu"), torch.tensor(expected), rtol=0, atol=1e-4
    )


def test_sigreg_in_float64_is_the_trapezoid_rule_at_17_points():
    """By numpy, to the last digits: a step of 5 / 16, and the even integrand's other half is the factor 2."""
    x, slices = cloud(), unit_columns(5, 3)
    t = np.linspace(0, 5, 17)
    normal, phase = np.exp(-(t**2) / 2), (x.detach().numpy() @ slices.numpy())[..., None] * t
    error = np.abs(np.exp(1j * phase).mean(axis=0) - normal) ** 2 * normal
    step = (error[:, 1:] + error[:, :-1]).sum(axis=1) / 2 * (5 / 16)
    assert sigreg(x, slices).item() == pytest.approx(2 * len(x) * step.mean(), rel=1e-12)


def test_jepa_loss_is_the_named_objective():
    """With distinct values for all five, and the distances deaf to keys and temperature."""
    z, s = pairs(3)
    key = torch.tensor([1, 1, 2])
    values = {o: jepa_loss(z, s, objective=o, temperature=0.3, target_key=key) for o in OBJECTIVES}
    for kind in DISTANCES:
        torch.testing.assert_close(values[kind], jepa_distance(z, s, kind=kind), rtol=0, atol=0)
    torch.testing.assert_close(values["info_nce"], info_nce(z, s, temperature=0.3, target_key=key), rtol=0, atol=0)
    assert len({round(value[0].item(), 6) for value in values.values()}) == 5


# -- terms of one side: VICReg --------------------------------------------------------------------------------------

# Means 2, 0.2 and 4. Squared deviations sum to 2, 0.14 and 0, over B - 1 = 2: variances 1, 0.07 and 0. The first two
# have covariance (-1 x -0.2 + 0 x -0.1 + 1 x 0.3) / 2 = 0.25, the third none.
CLOUD = [[1.0, 0.0, 4.0], [2.0, 0.1, 4.0], [3.0, 0.5, 4.0]]


def cloud(rows=12, dimensions=5, seed=0, dtype=torch.float64):
    """Off the origin, correlated, with variances on both sides of 1."""
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.3, 1.5, dimensions, dtype=torch.float64)
    return (draw(rows, dimensions) @ (torch.eye(dimensions) + 0.3 * draw(dimensions, dimensions)) * scale + 0.4).to(
        dtype
    )


def unit_columns(dimensions, count, seed=1):
    return random_slices(dimensions, count, seed=seed, step=0, device="cpu").double()


TERMS = {"vicreg": vicreg, "sigreg": lambda x: sigreg(x, unit_columns(x.shape[1], 6))}


def test_vicreg_worked_by_hand():
    """v = (0 + 1 - sqrt(0.0701) + 1 - 0.01) / 3, as 1 - sqrt(1.0001) is cut to 0;  c = 2 x 0.25^2 / 3;  v + c / 25."""
    expected = (1 - sqrt(0.0701) + 0.99) / 3 + 2 * 0.25**2 / 3 / 25
    assert vicreg(torch.tensor(CLOUD, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)
    assert vicreg(torch.tensor(CLOUD)).item() == pytest.approx(expected, rel=1e-5)


def test_the_covariance_term_of_vicreg_worked_by_hand():
    """Without a variance below 1: (2, 0, -2) and (3, -1, -2) have variances 4 and 7, covariance (6 + 4) / 2 = 5 and
    c = 2 x 25 / 2; with three equal columns of variance 4, c = 6 x 16 / 3."""
    x = torch.tensor([[2.0, 3.0], [0.0, -1.0], [-2.0, -2.0]])
    assert vicreg(x).item() == pytest.approx(25 / 25, rel=1e-6)
    assert vicreg(x[:, :1].expand(-1, 3)).item() == pytest.approx(32 / 25, rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 7), (30, 4), (2, 2), (5, 1)])
def test_vicreg_is_its_four_equations(shape):
    """With fewer and with more rows than dimensions; in value and gradient."""
    x = cloud(*shape).requires_grad_()
    deviation = x - x.mean(dim=0)
    covariance = sum(torch.outer(row, row) for row in deviation) / (shape[0] - 1)
    v = torch.relu(1 - torch.sqrt(covariance.diagonal() + 1e-4)).sum() / shape[1]
    c = covariance[~torch.eye(shape[1], dtype=torch.bool)].square().sum() / shape[1]
    found = vicreg(x)
    torch.testing.assert_close(found, v + c / 25)
    torch.testing.assert_close(*(gradients(value, x)[0] for value in (found, v + c / 25)))


def test_vicreg_of_a_point_a_line_and_a_round_cloud():
    """0.99 = 1 - sqrt(1e-4);  a line along (1, ..., 1) with variance 1 has 30 covariances of 1: 30 / 6 / 25 = 0.2;
    orthogonal columns of variance 1 have nothing, to the 5e-5 by which sqrt(1 + 1e-4) is more than 1 (cut)."""
    line = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64).expand(-1, 6)
    frame = torch.linalg.qr(cloud(20, 6) - cloud(20, 6).mean(dim=0))[0] * sqrt(19)
    assert vicreg(torch.full((4, 6), 3.7)).item() == pytest.approx(0.99, abs=1e-6)
    assert vicreg(line).item() == pytest.approx(0.2, abs=1e-6)
    assert vicreg(frame).item() == pytest.approx(0, abs=1e-9)


def test_vicreg_drives_a_nearly_collapsed_cloud_apart():
    """A step down the gradient lengthens every deviation that is not 0; at the point itself there is no direction."""
    x = (1 + 1e-3 * cloud()).requires_grad_()
    (slope,) = gradients(vicreg(x), x)
    assert vicreg(x) > 0.9
    assert ((x - slope).std(dim=0) > 1.5 * x.std(dim=0)).all()
    point = torch.ones(4, 3, requires_grad=True)
    assert torch.autograd.grad(vicreg(point), point)[0].abs().max() == 0


# -- terms of one side: SIGReg --------------------------------------------------------------------------------------


def epps_pulley(x):
    """The integral of `sigreg` over all t, for projections x [B], by the three Gaussian integrals

    int e^(itd) e^(-t^2/2) = sqrt(2 pi) e^(-d^2/2),  int e^(itx) e^(-t^2) = sqrt(pi) e^(-x^2/4),  int e^(-3t^2/2)
    = sqrt(2 pi / 3), of the squared modulus written out over pairs of rows. What is beyond |t| = 5 is 1e-6.
    """
    apart = x[:, None] - x[None, :]
    pairs = sqrt(2 * pi) * torch.exp(-apart.square() / 2).mean() - 2 * sqrt(pi) * torch.exp(-x.square() / 4).mean()
    return len(x) * (pairs + sqrt(2 * pi / 3))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=9),
    st.lists(st.floats(0, 2 * pi), min_size=1, max_size=4),
)
def test_sigreg_is_the_integral_of_its_definition(rows, angles):
    """For any rows in the plane and any directions, to the error of the quadrature."""
    x = torch.tensor(rows, dtype=torch.float64)
    slices = torch.tensor([[math.cos(a) for a in angles], [math.sin(a) for a in angles]], dtype=torch.float64)
    expected = sum(epps_pulley(x @ direction) for direction in slices.T) / len(angles)
    assert sigreg(x, slices).item() == pytest.approx(expected.item(), abs=2e-5 * len(rows))


def test_the_gradient_of_sigreg_is_that_of_the_integral():
    x, slices = cloud().requires_grad_(), unit_columns(5, 3)
    expected = sum(epps_pulley(x @ direction) for direction in slices.T) / 3
    torch.testing.assert_close(*(gradients(v, x)[0] for v in (sigreg(x, slices), expected)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 7])
def test_sigreg_of_a_point_grows_with_the_number_of_rows(count):
    """|e^(itx) - e^(-t^2/2)|^2 = 1 - 2 cos(tx) e^(-t^2/2) + e^(-t^2) for every row alike: B sqrt(2 pi) (1 - sqrt 2
    e^(-x^2/4) + 1 / sqrt 3), 0.409 B at x = 0. Along (0.6, 0.8) the point (1, 2) is at 2.2, along (1, 0) at 1. At 10 it
    is 3.95 B; with points 2 pi / 10 apart, as those of algorithm 1, it would pass for 0."""
    value = lambda x: count * sqrt(2 * pi) * (1 - sqrt(2) * exp(-(x**2) / 4) + 1 / sqrt(3))  # noqa: E731
    slices = torch.tensor([[0.6, 1.0], [0.8, 0.0]])
    assert sigreg(torch.zeros(count, 2), slices).item() == pytest.approx(value(0), rel=1e-5)
    found = sigreg(torch.tensor([[1.0, 2.0]]).expand(count, 2), slices)
    assert found.item() == pytest.approx((value(2.2) + value(1)) / 2, rel=1e-5)
    far = sigreg(torch.tensor([[6.0, 8.0]]).expand(count, 2), slices[:, :1])
    assert far.item() == pytest.approx(3.954 * count, rel=1e-3) and value(10) == pytest.approx(3.954 * count, rel=1e-3)


@pytest.mark.parametrize("rows", [8, 200])
@pytest.mark.parametrize("sd", [1.0, 2.0])
def test_sigreg_of_a_gaussian_sample_has_the_expected_value(rows, sd):
    """Of N(0, sd^2): E|f - e^(-t^2/2)|^2 = (1 - e^(-sd^2 t^2)) / B + (e^(-sd^2 t^2/2) - e^(-t^2/2))^2. For sd = 1 the
    integral times B is sqrt(2 pi) (1 - 1 / sqrt 3) = 1.059, whatever B. Mean of 4000 samples: each slice is one."""
    e = lambda a: sqrt(pi / a)  # noqa: E731  # int e^(-a t^2), with the window's 1/2 in a
    s2 = sd**2
    expected = e(0.5) - e(s2 + 0.5) + rows * (e(s2 + 0.5) - 2 * e(s2 / 2 + 1) + e(1.5))
    if sd == 1:
        assert expected == pytest.approx(1.0594, abs=1e-4)
    x = sd * torch.randn(rows, 4000, generator=torch.Generator().manual_seed(rows))
    assert sigreg(x, torch.eye(4000)).item() == pytest.approx(expected, rel=0.05)


def test_sigreg_of_the_same_rows_twice_is_twice_as_large():
    """The characteristic function is the same, B is not."""
    x, slices = cloud(), unit_columns(5, 6)
    torch.testing.assert_close(sigreg(torch.cat([x, x]), slices), 2 * sigreg(x, slices))


def test_the_characteristic_function_of_two_ranks_is_averaged_before_it_is_squared():
    """x and -x have conjugate f, so together the imaginary part is gone; the mean of the two values keeps it."""
    x, slices = cloud() + 1, unit_columns(5, 6)
    together = sigreg(torch.cat([x, -x]), slices) / 2
    assert sigreg(-x, slices).item() == pytest.approx(sigreg(x, slices).item(), rel=1e-12)
    assert together < 0.9 * sigreg(x, slices)
    t = torch.linspace(-8, 8, 4001, dtype=x.dtype)
    error = (torch.cos((x @ slices)[..., None] * t).mean(dim=0) - torch.exp(-t.square() / 2)).square()
    expected = len(x) * torch.trapezoid(error * torch.exp(-t.square() / 2), t, dim=-1).mean()
    assert together.item() == pytest.approx(expected.item(), rel=1e-4)


def test_sigreg_turns_with_its_slices():
    """x R and R^T a have the same projections; x R and a do not, and neither do 1.1 x or x + 0.1."""
    x, slices = cloud(), unit_columns(5, 6)
    rotation = torch.linalg.qr(cloud(5, 5, seed=3))[0]
    value = sigreg(x, slices).item()
    assert sigreg(x @ rotation, rotation.T @ slices).item() == pytest.approx(value, rel=1e-10)
    for other in (x @ rotation, 1.1 * x, x + 0.1):
        assert sigreg(other, slices).item() != pytest.approx(value, rel=1e-3)


def test_sigreg_is_largest_for_a_point_and_least_for_a_round_gaussian():
    """Also a gaussian off the origin, of half the size, or flat is worse than the round one."""
    round_cloud = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    flat = torch.tensor([1.0] * 4 + [0.0] * 4)
    line, point = round_cloud[:, :1] * torch.eye(8)[:1], torch.zeros(256, 8)
    slices = unit_columns(8, 512)
    values = [sigreg(x, slices).item() for x in (round_cloud, round_cloud * flat, line, point)]
    assert values == sorted(values) and values[0] < 1.5
    assert values[0] * 5 < values[1] < values[3] / 2 and values[2] < 0.9 * values[3]
    assert all(sigreg(x, slices).item() > 5 * values[0] for x in (round_cloud + 1, round_cloud / 2, 2 * round_cloud))


def test_descending_sigreg_gives_a_cloud_the_mean_and_the_covariance_of_a_standard_gaussian():
    """From a flat cloud off the origin, with new slices every step as in training."""
    x = torch.randn(128, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = (x * torch.tensor([0.1, 1, 1.5, 0.5]) + torch.tensor([0.5, -0.5, 0, 1])).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in range(400):
        optimizer.zero_grad()
        sigreg(x, random_slices(4, 16, seed=0, step=step, device="cpu")).backward()
        optimizer.step()
    assert x.mean(dim=0).abs().max() < 0.1
    torch.testing.assert_close(x.detach().T.cov(), torch.eye(4, dtype=x.dtype), atol=0.15, rtol=0)


# -- slices ---------------------------------------------------------------------------------------------------------


def test_random_slices_are_unit_columns_in_all_directions():
    """a a^T has mean I / D on the sphere, a has mean 0: to 4 / sqrt(20000)."""
    slices = random_slices(3, 20000, seed=4, step=7, device="cpu")
    assert slices.shape == (3, 20000) and slices.dtype == torch.float32
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(20000))
    torch.testing.assert_close(slices @ slices.T / 20000, torch.eye(3) / 3, atol=0.01, rtol=0)
    assert slices.mean(dim=1).abs().max() < 0.02


def test_random_slices_are_those_of_the_seed_and_the_step():
    """Also where the two differ by more than 32 bits or by being swapped: a generator on the CPU reads 32 bits."""
    draw = lambda seed, step: random_slices(4, 8, seed=seed, step=step, device="cpu")  # noqa: E731
    torch.testing.assert_close(draw(3, 5), draw(3, 5), rtol=0, atol=0)
    pairs = [(3, 5), (3, 6), (4, 5), (5, 3), (3, 5 + 2**32), (3 + 2**32, 5), (35, 5), (3, 55), (33, 5), (-3, 5)]
    assert len({tuple(draw(*pair).flatten().tolist()) for pair in pairs}) == len(pairs)


def test_random_slices_neither_move_nor_follow_the_global_generator():
    """Dropout and data order are the same with and without the regulariser, and ranks seeded apart agree."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random_slices(4, 8, seed=3, step=5, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(random_slices(4, 8, seed=3, step=5, device="cpu"), first)


# -- both terms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_a_scalar_whose_gradient_is_the_numerical_one(term):
    x = cloud(6, 4).requires_grad_()
    assert TERMS[term](x).shape == ()
    assert torch.autograd.gradcheck(TERMS[term], (x,))
    gradients(TERMS[term](x), x)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_does_not_know_the_order_of_the_rows(term):
    """Its gradient moves with them."""
    x, order = cloud(6, 4).requires_grad_(), torch.tensor([3, 0, 5, 4, 1, 2])
    moved = x.detach()[order].requires_grad_()
    torch.testing.assert_close(TERMS[term](moved), TERMS[term](x))
    torch.testing.assert_close(gradients(TERMS[term](moved), moved)[0], gradients(TERMS[term](x), x)[0][order])


@pytest.mark.parametrize("shift, changes", [("vicreg", False), ("sigreg", True)])
def test_sigreg_alone_sees_the_mean(shift, changes):
    x = cloud()
    moved = TERMS[shift](x + torch.tensor([3.0, -1.0, 0.5, 0.0, 2.0]))
    assert (abs(moved / TERMS[shift](x) - 1) > 0.1).item() is changes


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_computed_in_float32_at_least(term):
    """bfloat16 in: 1 % from the float64 value of the same numbers, and gradients in bfloat16; also under autocast,
    which leaves float32 alone; float64 stays float64."""
    x = cloud(32, 16).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    expected = TERMS[term](wide)
    (by_wide,) = gradients(expected, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x.float() @ x.float().T).dtype == torch.bfloat16, "autocast is not at work"
        found = TERMS[term](x)
        plain = TERMS[term](x.detach().float())
    assert (found.dtype, plain.dtype, expected.dtype) == (torch.float32, torch.float32, torch.float64)
    for value in (found, plain):
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    (by_x,) = gradients(found, x)
    assert by_x.dtype == torch.bfloat16
    assert (by_x.double() - by_wide).norm() < 0.01 * by_wide.norm()


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (4,), (2, 3, 4)])
def test_vicreg_refuses_what_has_no_variance(shape):
    with pytest.raises(ValueError, match="B >= 2"):
        vicreg(torch.ones(shape))


@pytest.mark.parametrize(
    "shape, slices", [((0, 4), (4, 6)), ((4,), (4, 6)), ((2, 3, 4), (4, 6)), ((5, 4), (6, 4)), ((5, 4), (4,))]
)
def test_sigreg_refuses_slices_that_do_not_fit(shape, slices):
    with pytest.raises(ValueError, match="must be"):
        sigreg(torch.ones(shape), torch.ones(slices))
