"""Claims about the collapse figures: closed forms on clouds worked by hand, invariances, and one cloud of each fate."""

from __future__ import annotations

import math
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.core.diagnostics import effective_rank, has_collapsed, linear_r2, recall_at_1, space_diagnostics

RAW = ("raw_cosine_matched", "raw_cosine_mismatched")
CENTRED = ("cosine_matched", "cosine_mismatched", "recall_at_1", "effective_rank_predicted", "effective_rank_target")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def frame(rows, columns, seed=0):
    """[rows, columns] orthonormal columns, each of mean 0: centring leaves them alone."""
    draw = torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)
    return torch.linalg.qr(draw - draw.mean(dim=0))[0]


# -- effective rank -------------------------------------------------------------------------------------------------


def test_effective_rank_of_an_orthonormal_frame_is_its_dimension():
    """+e_i and -e_i for 6 axes: mean 0, six singular values sqrt 2, entropy ln 6."""
    axes = torch.eye(6)
    assert effective_rank(torch.cat([axes, -axes])).item() == pytest.approx(6, rel=1e-5)


def test_effective_rank_of_n_independent_rows_is_n_minus_one():
    """Centring takes one direction away: I - 11'/5 has the singular values 1, 1, 1, 1, 0."""
    assert effective_rank(torch.eye(5, 8)).item() == pytest.approx(4, rel=1e-5)


def test_effective_rank_of_a_line_is_one():
    """Off the origin, and unevenly spaced."""
    steps = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    line = torch.tensor([5.0, -7.0, 2.0]) + steps * torch.tensor([1.0, 2.0, -0.5])
    assert effective_rank(line).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 512])
def test_effective_rank_of_equal_rows_is_zero(rows):
    """Also where the mean of equal float32 rows is a rounding off them, as it is for most numbers and counts."""
    row = torch.randn(1, 32, generator=generator(rows))
    assert effective_rank(row.expand(rows, -1)).item() == 0


@pytest.mark.parametrize("order", [(4.0, 2.0, 1.0), (1.0, 4.0, 2.0)])
def test_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values(order):
    """p = 4/7, 2/7, 1/7: exp(H) = prod p^-p = 7 / (4^(4/7) 2^(2/7)) = 7 / 2^(10/7) = 2.6003.

    Of the squared singular values it would be 21 / (16^(16/21) 4^(4/21)) = 1.95.
    """
    u, v = frame(9, 3), torch.linalg.qr(torch.randn(5, 3, generator=generator(2), dtype=torch.float64))[0]
    cloud = u @ torch.tensor(order, dtype=torch.float64).diag() @ v.T
    assert effective_rank(cloud).item() == pytest.approx(7 / 2 ** (10 / 7), rel=1e-5)


def test_effective_rank_does_not_see_scale_rotation_or_translation():
    """Nor the order of the rows; it does see one axis stretched, or the comparison would prove nothing."""
    cloud = torch.randn(40, 6, generator=generator(), dtype=torch.float64) * torch.tensor([3, 2, 1, 1, 0.5, 0.1])
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator(1), dtype=torch.float64))[0]
    rank = effective_rank(cloud).item()
    assert 2 < rank < 5.5
    for same in (cloud * 1e-6, cloud * 1e6, cloud @ rotation, cloud + 30 * rotation[0], cloud.flip(0)):
        assert effective_rank(same).item() == pytest.approx(rank, rel=1e-4)
    assert effective_rank(cloud * torch.tensor([5.0, 1, 1, 1, 1, 1])).item() < 0.9 * rank


# -- recall ---------------------------------------------------------------------------------------------------------

# Both sides have mean 0. By angle the predictions (14, -11, 186 degrees) are nearest to target 0 (0 degrees), 0 and
# 2 (225); the other way round the targets (0, 135, 225) are nearest to prediction 1, 2 and 2.
PREDICTED = torch.tensor([[2.0, 0.5], [1.0, -0.2], [-3.0, -0.3]])
TARGET = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])


@pytest.mark.parametrize(
    "key, hits",
    [
        (None, 2),  # 0 and 2 are right, 1 picks 0
        ([7, 7, 1], 3),  # target 0 is as good for prediction 1
        ([1, 7, 7], 2),  # the key of another row does not help
    ],
)
def test_recall_counts_predictions_whose_nearest_target_is_their_own_or_an_equal_one(key, hits):
    key = None if key is None else torch.tensor(key)
    assert recall_at_1(PREDICTED, TARGET, key).item() == pytest.approx(hits / 3)
    assert space_diagnostics(PREDICTED, TARGET, key)["recall_at_1"] == pytest.approx(hits / 3)


def test_recall_takes_every_answer_to_the_same_context():
    """Prediction 1 picks target 0, which is a right answer if contexts 0 and 1 are equal."""
    for contexts, hits in (([5, 5, 6], 3), ([5, 6, 5], 2)):
        key = torch.tensor(contexts)
        assert recall_at_1(PREDICTED, TARGET, context_key=key).item() == pytest.approx(hits / 3)
        assert space_diagnostics(PREDICTED, TARGET, None, key)["recall_at_1"] == pytest.approx(hits / 3)


def test_an_answer_to_the_same_context_is_neither_a_matched_nor_a_wrong_pair():
    """Unit vectors, so raw cosines are products: right pairs 1, .6, -.8; wrong ones without those of contexts 0, 1."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    s = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    figures = space_diagnostics(z, s, torch.tensor([1, 2, 3]), torch.tensor([8, 8, 9]))
    assert figures["raw_cosine_matched"] == pytest.approx((1 + 0.6 - 0.8) / 3, abs=1e-6)
    assert figures["raw_cosine_mismatched"] == pytest.approx((0.6 + 0.6 + 0 + 0.8) / 4, abs=1e-6)
    everything = space_diagnostics(z, s, torch.tensor([1, 2, 3]))
    assert everything["raw_cosine_mismatched"] == pytest.approx((0.6 + 0.6 + 1 + 0.6 + 0 + 0.8) / 6, abs=1e-6)


def test_linear_r2_leaves_out_contexts_that_were_fitted():
    """The last two pairs have contexts of the first half. Without them the map is perfect. Any key counts."""
    z = torch.randn(12, 2, generator=generator())
    s = z @ torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    s[-2:] = torch.randn(2, 2, generator=generator(3))
    context = torch.tensor([*range(10), 1, 4])
    target = torch.arange(12)
    assert linear_r2(z, s, target).item() < 0.9
    assert linear_r2(z, s, target, context).item() == pytest.approx(1, abs=1e-3)
    assert linear_r2(z, s, target, (torch.arange(12), context)).item() == pytest.approx(1, abs=1e-3)


def test_recall_asks_from_the_prediction_to_the_targets():
    """The other way round only target 2 finds its own."""
    assert recall_at_1(TARGET, PREDICTED).item() == pytest.approx(1 / 3)


def test_recall_centres_each_side_on_its_own_mean():
    """Far from the origin, and on either side of it, all directions are alike or opposite."""
    moved = recall_at_1(PREDICTED + torch.tensor([90.0, 40.0]), TARGET - torch.tensor([70.0, -20.0]))
    assert moved.item() == pytest.approx(2 / 3)


# -- cosines --------------------------------------------------------------------------------------------------------

# Means 0. |z| = 5, 13, 8 sqrt 2 and |s| = 5, 17, 12 sqrt 2.
CLOUD_Z = torch.tensor([[3.0, 4.0], [5.0, -12.0], [-8.0, 8.0]])
CLOUD_S = torch.tensor([[4.0, 3.0], [8.0, -15.0], [-12.0, 12.0]])
MATCHED = (24 / 25 + 220 / 221 + 1) / 3
WRONG = {
    (0, 1): -36 / 85,
    (0, 2): 1 / (5 * sqrt(2)),
    (1, 0): -16 / 65,
    (1, 2): -17 / (13 * sqrt(2)),
    (2, 0): -1 / (5 * sqrt(2)),
    (2, 1): -23 / (17 * sqrt(2)),
}


@pytest.mark.parametrize(
    "key, wrong",
    [(None, list(WRONG)), ([4, 4, 9], [(0, 2), (1, 2), (2, 0), (2, 1)]), ([4, 9, 4], [(0, 1), (1, 0), (1, 2), (2, 1)])],
)
def test_cosines_of_right_and_wrong_pairs_worked_by_hand(key, wrong):
    """z0.s0 = (12 + 12)/25, z0.s1 = (24 - 60)/85, ...; equal keys are neither right nor wrong pairs of each other."""
    found = space_diagnostics(CLOUD_Z, CLOUD_S, None if key is None else torch.tensor(key))
    mismatched = sum(WRONG[pair] for pair in wrong) / len(wrong)
    for prefix in ("", "raw_"):  # the means are 0: centring changes nothing
        assert found[f"{prefix}cosine_matched"] == pytest.approx(MATCHED, rel=1e-5)
        assert found[f"{prefix}cosine_mismatched"] == pytest.approx(mismatched, rel=1e-5)


def test_a_common_offset_changes_the_raw_figures_alone():
    """100 on every coordinate leaves the centred figures where they were and takes both raw cosines to 1."""
    cloud_z, noise = torch.randn(2, 60, 12, generator=generator()).unbind()
    cloud_s = cloud_z + 0.5 * noise
    before, after = space_diagnostics(cloud_z, cloud_s), space_diagnostics(cloud_z + 100, cloud_s + 100)
    assert {key: after[key] for key in CENTRED} == pytest.approx({key: before[key] for key in CENTRED}, abs=1e-3)
    assert 0.8 < before["raw_cosine_matched"] < 0.95 and abs(before["raw_cosine_mismatched"]) < 0.1
    assert all(after[key] > 0.999 for key in RAW)


def test_each_side_loses_its_own_mean():
    """Offsets that differ between the sides, which one common mean would leave in."""
    before = space_diagnostics(CLOUD_Z, CLOUD_S)
    after = space_diagnostics(CLOUD_Z + torch.tensor([50.0, 0.0]), CLOUD_S + torch.tensor([0.0, -80.0]))
    assert {key: after[key] for key in CENTRED} == pytest.approx({key: before[key] for key in CENTRED}, abs=1e-4)


def test_the_sides_are_not_mixed_up():
    """A flat predicted side (a line, rank 1) beside a round target side."""
    target = torch.randn(50, 8, generator=generator())
    found = space_diagnostics(target[:, :1] * torch.ones(1, 8), target)
    assert found["effective_rank_predicted"] == pytest.approx(1, abs=0.01)
    assert found["effective_rank_target"] > 7


def test_figures_are_plain_floats():
    """They go into a JSON log."""
    found = space_diagnostics(CLOUD_Z.bfloat16(), CLOUD_S.bfloat16(), torch.tensor([1, 2, 3]))
    assert set(found) == {*RAW, *CENTRED}
    assert all(type(value) is float for value in found.values())
    z, s = linear_pairs(8, noise=0.5)
    found = space_diagnostics(z.bfloat16(), s.bfloat16(), torch.arange(8))
    assert set(found) == {*RAW, *CENTRED, "linear_r2"}
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    "predicted, target, key",
    [
        (CLOUD_Z[:2], CLOUD_S[:2], None),
        (torch.zeros(3, 4), torch.zeros(3, 4), None),
        (torch.zeros(3, 4), torch.eye(3, 4), None),
        (torch.ones(5, 4) * 0.1, torch.ones(5, 4) * 0.3, None),
        (torch.ones(5, 1) * 0.1, torch.arange(5.0)[:, None], torch.tensor([1, 1, 2, 2, 3])),
        (CLOUD_Z, CLOUD_S, torch.tensor([6, 6, 6])),
        (CLOUD_Z * 1e-20, CLOUD_S * 1e18, None),
    ],
    ids=["two pairs", "zeros", "one side zero", "equal rows", "one dimension", "one key", "tiny and huge"],
)
def test_small_and_degenerate_banks_have_finite_figures(predicted, target, key):
    """Cosines within -1..1, recall within 0..1, ranks within 0..D; a constant prediction explains nothing."""
    found = space_diagnostics(predicted, target, key)
    assert all(math.isfinite(value) for value in found.values())
    assert found.pop("linear_r2", 0) == 0
    assert all(abs(found[name]) <= 1 + 1e-5 for name in found if "rank" not in name)
    assert all(0 <= found[name] <= predicted.shape[1] + 1e-3 for name in found if "rank" in name)


def test_without_a_wrong_pair_the_mismatched_cosine_is_zero():
    found = space_diagnostics(CLOUD_Z, CLOUD_S, torch.tensor([6, 6, 6]))
    assert (found["cosine_mismatched"], found["raw_cosine_mismatched"]) == (0, 0)
    assert found["cosine_matched"] == pytest.approx(MATCHED, rel=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_pairs_are_refused(count):
    with pytest.raises(ValueError, match="two"):
        space_diagnostics(CLOUD_Z[:count], CLOUD_S[:count])


# -- linear R^2 -----------------------------------------------------------------------------------------------------


def linear_pairs(count, *, dimensions=6, noise=0.0, seed=0):
    """z from N(0, I) and s = z W + b + noise e: of the variance of s, 1 / (1 + noise^2) follows from z. W is orthogonal
    times 3; both sides are off the origin."""
    draw = generator(seed)
    z, e = torch.randn(2, count, dimensions, generator=draw, dtype=torch.float64).unbind()
    w = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=draw, dtype=torch.float64))[0]
    return z + 4, 3 * (z @ w + noise * e) - 7


def refitted(z, s, fit):
    """`linear_r2` the long way: W by normal equations, the leave-one-out error by leaving each pair out."""

    def ridge(z, s, strength):
        x, y = z - z.mean(dim=0), s - s.mean(dim=0)
        w = torch.linalg.solve(x.T @ x + strength * torch.eye(z.shape[1], dtype=z.dtype), x.T @ y)
        return lambda new: (new - z.mean(dim=0)) @ w + s.mean(dim=0)

    scale = (z[:fit] - z[:fit].mean(dim=0)).square().sum(dim=1).mean()
    errors = {}
    for strength in (scale * 10**power for power in range(6, -7, -1)):
        errors[strength] = 0
        for i in range(fit):
            others = torch.arange(fit) != i
            errors[strength] += (ridge(z[:fit][others], s[:fit][others], strength)(z[i]) - s[i]).square().sum().item()
    mapped = ridge(z[:fit], s[:fit], min(errors, key=errors.get))(z[fit:])
    return 1 - (s[fit:] - mapped).square().sum() / (s[fit:] - s[:fit].mean(dim=0)).square().sum()


@pytest.mark.parametrize(
    "count, dimensions, noise", [(24, 3, 0.3), (24, 3, 2.0), (16, 20, 0.1), (16, 20, 1.0), (5, 2, 0.1)]
)
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_linear_r2_is_a_ridge_fit_of_the_first_pairs_with_the_strength_of_least_leave_one_out_error(
    count, dimensions, noise, share
):
    """With more pairs than dimensions and with fewer, where the fit itself is perfect at any small strength."""
    z, s = linear_pairs(count, dimensions=dimensions, noise=noise)
    expected = refitted(z, s, int(share * count)).item()
    assert linear_r2(z, s, train_share=share).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_linear_r2_worked_by_hand():
    """Fitted on z = -1, 1 with s = 0, 4: one pair left out leaves one, whose target is the guess at any strength, so
    the first and largest stays: 1e6 times the mean square 1, against a sum of squares 2, a slope of 4 / (1e6 + 2). The
    guess for all others is 2: R^2 = 1 - 13 / 13 to 1e-5. With the pair 0, 2 between the two, the smallest strength is
    best: slope 2, guesses 8 and -4 for z = 3, -3, targets 7 and -4, mean 2: R^2 = 1 - 1 / (25 + 36)."""
    z, s = torch.tensor([[-1.0], [1.0], [3.0], [-3.0]]), torch.tensor([[0.0], [4.0], [4.0], [-1.0]])
    assert linear_r2(z, s).item() == pytest.approx(0, abs=3e-5)
    z = torch.tensor([[-1.0], [0.0], [1.0], [3.0], [-3.0]])
    s = torch.tensor([[0.0], [2.0], [4.0], [7.0], [-4.0]])
    assert linear_r2(z, s, train_share=0.6).item() == pytest.approx(1 - 1 / 61, abs=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 3.0])
def test_linear_r2_is_the_share_of_the_variance_that_follows(noise):
    """1 / (1 + noise^2), on 2000 scored pairs; less 6 dimensions' worth of fit over 2000 pairs."""
    z, s = linear_pairs(4000, noise=noise)
    assert linear_r2(z, s).item() == pytest.approx(1 / (1 + noise**2), abs=0.02 if noise else 1e-6)


@pytest.mark.parametrize("count, dimensions", [(400, 8), (40, 200), (64, 64)])
def test_linear_r2_of_pairs_that_have_nothing_in_common_is_about_zero(count, dimensions):
    """Though with fewer pairs than dimensions a map fits the first half perfectly, and where D = N / 2 an unregularised
    one would blow up on the second."""
    z, s = torch.randn(2, count, dimensions, generator=generator(3)).unbind()
    assert abs(linear_r2(z, s).item()) < 0.1


def test_linear_r2_with_fewer_pairs_than_dimensions_sees_what_lies_in_few_directions():
    """100 pairs in 300 dimensions, of which 5 vary."""
    z, s = linear_pairs(100, dimensions=5)
    axes = torch.linalg.qr(torch.randn(300, 10, generator=generator(1), dtype=torch.float64))[0]
    assert linear_r2(z @ axes[:, :5].T, s @ axes[:, 5:].T).item() == pytest.approx(1, abs=1e-5)


def test_linear_r2_does_not_see_scale_rotation_or_translation_of_either_side():
    """Nor the order within each half; it does see the halves swapped, the sides swapped and one dimension stretched."""
    z, s = linear_pairs(40, noise=0.7)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator(1), dtype=torch.float64))[0]
    order = torch.cat([torch.randperm(20, generator=generator()), 20 + torch.randperm(20, generator=generator())])
    before = linear_r2(z, s).item()
    assert 0.4 < before < 0.9
    moves = (lambda x: x * 1e-6, lambda x: x * 1e6, lambda x: x @ rotation, lambda x: x + 30 * rotation[0])
    for move in moves:
        assert linear_r2(move(z), s).item() == pytest.approx(before, abs=1e-5)
        assert linear_r2(z, move(s)).item() == pytest.approx(before, abs=1e-5)
    assert linear_r2(z[order], s[order]).item() == pytest.approx(before, abs=1e-5)
    stretch = torch.tensor([9.0, 1, 1, 1, 1, 1])
    for other in ((z.roll(20, 0), s.roll(20, 0)), (s, z), (z, s * stretch), (z.roll(1, 0), s)):
        assert linear_r2(*other).item() != pytest.approx(before, abs=1e-3)


def test_linear_r2_scores_no_pair_whose_target_was_fitted():
    """20 of the 40 scored pairs repeat fitted ones, and 40 pairs in 60 dimensions are half learnt
    by heart. With keys those are gone, and what is left is what the other 20 alone give."""
    z, s = torch.randn(2, 80, 60, generator=generator(2), dtype=torch.float64).clone()
    s = s + z  # else the best strength is so large that nothing is learnt by heart
    repeated = torch.arange(50, 70)
    z[repeated], s[repeated] = z[5:25].clone(), s[5:25].clone()
    key = torch.arange(80)
    key[repeated] = key[5:25].clone()
    kept = torch.ones(80, dtype=torch.bool).index_fill(0, repeated, False)
    alone = linear_r2(z[kept], s[kept], train_share=0.67).item()  # 40 of 60 are fitted
    assert linear_r2(z, s).item() > alone + 0.1
    assert linear_r2(z, s, key).item() == pytest.approx(alone, abs=1e-6)
    assert linear_r2(z, s, torch.arange(80)).item() == linear_r2(z, s).item()
    assert space_diagnostics(z, s, key)["linear_r2"] == pytest.approx(alone, abs=1e-6)


def test_equal_targets_within_the_scored_half_stay():
    """Only what was fitted leaks."""
    z, s = linear_pairs(20, noise=0.5)
    key = torch.cat([torch.arange(10), torch.full((10,), 77)])
    assert linear_r2(z, s, key).item() == linear_r2(z, s).item()


def test_without_a_new_target_there_is_no_linear_r2():
    """A yes/no task: NaN, and no figure among the diagnostics, which a log would carry as not a number for ever."""
    z, s = linear_pairs(20)
    assert torch.isnan(linear_r2(z, s, torch.arange(20) % 2))
    assert "linear_r2" not in space_diagnostics(z, s, torch.arange(20) % 2)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_linear_r2_is_a_diagnostic_of_four_pairs_or_more(count):
    z, s = linear_pairs(count)
    found = space_diagnostics(z, s)
    assert ("linear_r2" in found) is (count >= 4)
    if count >= 4:
        assert found["linear_r2"] == pytest.approx(linear_r2(z.float(), s.float()).item(), rel=1e-6)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("row", [1, 18])
def test_linear_r2_of_non_finite_embeddings_is_nan(side, value, row):
    """In the fitted and in the scored half, on either side; with the other figures no error."""
    pair = [x.float() for x in linear_pairs(20)]
    pair[side][row, 2] = value
    assert torch.isnan(linear_r2(*pair))
    assert math.isnan(space_diagnostics(*pair)["linear_r2"])


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_linear_r2_of_targets_that_do_not_vary_is_zero(level):
    """The scored ones alone or all of them; also where one is a float32 rounding off the others, and where they are not
    what was fitted."""
    z, s = (x.float() for x in linear_pairs(22))
    s[11:] = level
    assert linear_r2(z, s).item() == 0
    if level:
        s[15] = s[15].nextafter(torch.tensor(2e4))
        assert (s[15] != s[16]).all() and linear_r2(z, s).item() == 0
    s[:] = level
    assert linear_r2(z, s).item() == 0


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_linear_r2_of_predictions_that_do_not_vary_is_zero(level):
    """All guesses are the mean of the fitted targets; the rounding of equal rows is no prediction."""
    z, s = (x.float() for x in linear_pairs(22))
    z[:11] = level
    assert linear_r2(z, s).item() == 0


def test_linear_r2_needs_no_grad_and_gives_none():
    z, s = linear_pairs(20, noise=0.5)
    assert not linear_r2(z.requires_grad_(), s).requires_grad
    assert linear_r2(z, s).shape == () and linear_r2(z, s).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 30), st.integers(1, 40), st.integers(1, 5), st.integers(0, 10**6))
def test_linear_r2_is_never_above_one_and_always_finite(count, dimensions, targets, seed):
    """Also with outliers, and with a target of another size than the prediction."""
    draw = generator(seed)
    z = torch.randn(count, dimensions, generator=draw) ** 3
    s = torch.randn(count, targets, generator=draw) ** 3 + z[:, :1]
    found = linear_r2(z, s, train_share=0.7).item()
    assert math.isfinite(found) and found <= 1


@pytest.mark.parametrize("count, share", [(3, 0.5), (1, 0.5), (0, 0.5), (10, 0.1), (10, 1.0), (10, 0.0)])
def test_linear_r2_refuses_a_share_that_leaves_nothing_to_fit_or_score(count, share):
    z, s = linear_pairs(count)
    with pytest.raises(ValueError, match="train_share"):
        linear_r2(z, s, train_share=share)


# -- collapse -------------------------------------------------------------------------------------------------------


def cloud(*, directions, noise=0.0, offset=0.0, seed=0, target_key=None):
    """512 pairs in 128 dimensions: a signal that the pair shares in `directions` axes (their squared lengths sum to
    1), noise of each side's own (squared length `noise`^2), and an offset of length `offset` common to all.

    raw mismatched = offset^2 / (offset^2 + 1 + noise^2), raw matched = (offset^2 + 1) / the same.
    """
    draw = generator(seed)
    axes = torch.linalg.qr(torch.randn(128, 128, generator=draw))[0]
    signal = torch.randn(512, directions, generator=draw) @ axes[:directions] / sqrt(directions)
    sides = [
        signal + noise * torch.randn(512, directions, generator=draw) @ axes[:directions] / sqrt(directions)
        for _ in range(2)
    ]
    return space_diagnostics(*(side + offset * axes[-1] for side in sides), target_key)


def start_of_a_random_model():
    """Before training: pairs hardly agree, wrong pairs are at 0.3, about fifty directions."""
    figures = cloud(directions=55, noise=1.5, offset=1.2)
    assert 0.2 < figures["raw_cosine_mismatched"] < 0.5 and 45 < figures["effective_rank_predicted"] < 55
    return figures


def test_non_finite_embeddings_have_no_rank_and_raise_nothing():
    """A diverged model must reach the trainer's own stop, not die in an SVD."""
    broken = torch.randn(8, 4)
    broken[3, 1] = torch.inf
    assert torch.isnan(effective_rank(broken))
    rank = space_diagnostics(broken, torch.randn(8, 4))["effective_rank_predicted"]
    assert rank != rank  # NaN


@pytest.mark.parametrize("directions", [3, 6])
def test_a_cloud_that_became_a_narrow_cone_has_collapsed(directions):
    """Offset^2 = 664 beside 1 + 1: wrong pairs at 664 / 666 = 0.997, right ones at 665 / 666, rank 3 or 6, and right
    pairs so little closer than wrong ones that few predictions find their own."""
    now = cloud(directions=directions, noise=1.0, offset=sqrt(664))
    assert now["raw_cosine_matched"] == pytest.approx(665 / 666, abs=3e-4)
    assert now["raw_cosine_mismatched"] == pytest.approx(664 / 666, abs=3e-4)
    assert 2 <= now["effective_rank_predicted"] <= 6 and now["recall_at_1"] < 0.2
    assert has_collapsed(now, start_of_a_random_model())


def test_a_cone_in_which_right_pairs_are_no_closer_has_collapsed():
    """0.997 / 0.997 and a rank of 4, as plain cosine ended: 332 x 401 against 401, and what is left is noise."""
    now = cloud(directions=4, noise=20.0, offset=sqrt(332 * 401))
    assert now["raw_cosine_matched"] == pytest.approx(0.997, abs=2e-4)
    assert now["raw_cosine_mismatched"] == pytest.approx(0.997, abs=2e-4)
    assert has_collapsed(now, start_of_a_random_model())


def test_an_aligned_cloud_with_many_directions_has_not_collapsed():
    """Raw 0.9 / 0.0 and a rank above 45, as InfoNCE ended: 1 / (1 + noise^2) = 0.9 at noise = 1/3."""
    now = cloud(directions=50, noise=1 / 3)
    assert now["raw_cosine_matched"] == pytest.approx(0.9, abs=0.02)
    assert now["raw_cosine_mismatched"] == pytest.approx(0, abs=0.02)
    assert min(now["effective_rank_predicted"], now["effective_rank_target"]) > 45
    assert not has_collapsed(now, start_of_a_random_model())


@pytest.mark.parametrize("before, after", [(0.90, 0.94), (0.97, 0.985), (0.99, 0.99)])
def test_a_pretrained_model_that_was_a_cone_from_the_start_has_not_collapsed(before, after):
    """Raw cosines of wrong pairs up to 0.99 at both ends, but right pairs closer and a rank that stays."""
    start = cloud(directions=60, noise=0.8, offset=sqrt(before / (1 - before) * (1 + 0.8**2)))
    now = cloud(directions=40, noise=0.2, offset=sqrt(after / (1 - after) * (1 + 0.2**2)))
    assert start["raw_cosine_mismatched"] == pytest.approx(before, abs=0.005)
    assert now["raw_cosine_mismatched"] == pytest.approx(after, abs=0.005)
    assert now["recall_at_1"] > 0.99
    assert not has_collapsed(now, start)


def test_a_space_that_has_not_moved_has_not_collapsed():
    for figures in (start_of_a_random_model(), cloud(directions=4, noise=0.3, offset=20.0)):
        assert not has_collapsed(figures, figures)


FIGURES = {
    "raw_cosine_matched": 0.5,
    "raw_cosine_mismatched": 0.2,
    "recall_at_1": 0.1,
    "effective_rank_predicted": 50.0,
    "effective_rank_target": 50.0,
}


@pytest.mark.parametrize("side", ["effective_rank_predicted", "effective_rank_target"])
@pytest.mark.parametrize("rank, collapsed", [(4.9, True), (5.1, False)])
def test_one_side_that_lost_nine_tenths_of_its_directions_has_collapsed(side, rank, collapsed):
    """From 50, whatever the cosines; 20 from 500 is few for 500 and many for a space."""
    assert has_collapsed({**FIGURES, side: rank}, FIGURES) is collapsed
    assert not has_collapsed({**FIGURES, side: 20.0}, {**FIGURES, side: 500.0})


@pytest.mark.parametrize("start, now, matched, collapsed", [
    (0.2, 0.961, 0.961, True), (0.2, 0.959, 0.959, False),
    (0.9, 0.9951, 0.9951, True), (0.9, 0.9949, 0.9949, False), (0.99, 0.9951, 0.9951, False),
    (0.2, 0.98, 0.991, False), (0.2, 0.98, 0.989, True),
])  # fmt: skip
def test_wrong_pairs_that_kept_a_twentieth_of_their_distance_are_a_point(start, now, matched, collapsed):
    """0.8 / 20 = 0.04 and 0.1 / 20 = 0.005 are left of 1 - cos; right pairs at less than half of it excuse it."""
    figures = {**FIGURES, "raw_cosine_mismatched": now, "raw_cosine_matched": matched}
    assert has_collapsed(figures, {**FIGURES, "raw_cosine_mismatched": start}) is collapsed


def test_a_pretrained_cone_that_collapsed_further_is_noticed():
    """From 0.96 with 50 directions to 0.9997 with 7, right pairs no closer than wrong ones, recall at chance."""
    start = cloud(directions=60, noise=0.8, offset=sqrt(0.96 / 0.04 * 1.64))
    now = cloud(directions=7, noise=20.0, offset=sqrt(3332 * 401))
    assert start["raw_cosine_mismatched"] == pytest.approx(0.96, abs=0.002) and start["effective_rank_predicted"] > 50
    assert now["raw_cosine_matched"] - now["raw_cosine_mismatched"] < 1e-4 and now["recall_at_1"] < 0.02
    assert has_collapsed(now, start)


def test_a_healthy_space_may_become_a_cone():
    """From 0.3 to 0.985 for wrong pairs, while right pairs go to 0.9994 and every prediction finds its own target."""
    now = cloud(directions=50, noise=0.2, offset=sqrt(0.985 / 0.015 * 1.04))
    assert now["raw_cosine_mismatched"] == pytest.approx(0.985, abs=0.001)
    assert now["recall_at_1"] > 0.99 and now["cosine_matched"] > 0.9
    assert not has_collapsed(now, start_of_a_random_model())


def test_a_collapse_is_noticed_where_only_two_targets_exist():
    """A yes/no task, 7 yes for 3 no: a random pick has an equal key in 0.49 + 0.09 = 0.58 of the rows."""
    key = (torch.rand(512, generator=generator(5)) < 0.7).long()
    now = cloud(directions=7, noise=20.0, offset=sqrt(3332 * 401), target_key=key)
    assert now["raw_cosine_matched"] - now["raw_cosine_mismatched"] < 1e-4 and 0.5 < now["recall_at_1"] < 0.65
    assert has_collapsed(now, start_of_a_random_model())
