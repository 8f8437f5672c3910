"""Claims about intervals and tests: closed forms, published tables, and coverage by simulation with fixed seeds."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.figures.inference import (
    Interval,
    bootstrap,
    detectable_difference,
    equivalence,
    hierarchical,
    holm,
    mcnemar,
    p_not_worse,
    resampled_means,
    t_interval,
    t_test,
)
from llm_jepa import UserError


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def share(outcomes: list[bool]) -> float:
    return sum(outcomes) / len(outcomes)


# -- bootstrap ---------------------------------------------------------------------------------------------------------


def test_draws_have_the_mean_and_the_variance_of_the_plug_in_distribution():
    """Of 0, 0, 0, 1, 7 (mean 1.6): a resample's mean has mean 1.6 and variance sum (x - 1.6)^2 / 25 = 37.2 / 25."""
    draws = resampled_means([0, 0, 0, 1, 7], num_resamples=200_000)
    assert draws.mean() == pytest.approx(1.6, abs=0.01)
    assert draws.var() == pytest.approx(37.2 / 25, rel=0.01)


def test_interval_of_two_groups_worked_by_hand():
    """Of 0 and 1 the resampled mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4: the 40 % interval is [1/2, 1/2]."""
    assert bootstrap([0, 1]) == Interval(0.5, 0.0, 1.0)
    assert bootstrap([0, 1], level=0.4) == Interval(0.5, 0.5, 0.5)


def test_rows_of_a_group_are_resampled_together():
    """Two equal wordings say no more than one; as 2 n independent rows they would shrink the interval by sqrt(2)."""
    x = np.random.default_rng(0).random(40)
    one, twice = bootstrap(x), bootstrap(np.stack([x, x], axis=1))
    assert one == pytest.approx(twice)
    rows = bootstrap(np.concatenate([x, x]))
    assert (rows.high - rows.low) == pytest.approx((one.high - one.low) / math.sqrt(2), rel=0.03)


def test_chunks_draw_what_one_chunk_would(monkeypatch):
    """Resamples come in chunks of about 4 M draws; more groups than that still give `num_resamples` of them."""
    values = np.arange(3_000_000.0)
    draws = resampled_means(values, num_resamples=3)
    assert draws.shape == (3,) and draws == pytest.approx(1.5e6, rel=0.005) and len(set(draws)) == 3


def test_coverage_of_the_bootstrap():
    """60 groups, four wordings that share most of their luck: 95 % intervals hold the truth in about 95 of 100."""
    rng, hits, too_narrow = np.random.default_rng(1), [], []
    for _ in range(400):
        values = rng.normal(0.3, 1, (60, 1)) + rng.normal(0, 0.5, (60, 4))
        hits.append(covers(bootstrap(values, num_resamples=1_000), 0.3))
        too_narrow.append(covers(bootstrap(values.ravel(), num_resamples=1_000), 0.3))
    assert 0.91 < share(hits) < 0.975
    assert share(too_narrow) < 0.8, "rows as units should fail here, or this test proves nothing"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap([1.0]), "1 group"),
        (lambda: bootstrap([1.0, math.nan]), "1 value"),
        (lambda: mcnemar([1, 0], [1]), "same items"),
        (lambda: mcnemar([0.5, 0], [1, 0]), "0 and 1"),
        (lambda: holm({"a": 1.2}), "0..1"),
        (lambda: t_interval([1.0]), "1 seed"),
        (lambda: hierarchical([[1.0, 2.0]]), "1 seed"),
        (lambda: hierarchical([1.0, 2.0]), "seeds, items"),
        (lambda: equivalence([1.0, 2.0], 0), "margin"),
        (lambda: detectable_difference(1, 1), "num_seeds=1"),
    ],
)
def test_what_cannot_be_computed(call, message):
    with pytest.raises(UserError, match=message):
        call()


# -- tests on pairs ----------------------------------------------------------------------------------------------------


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[int], list[int]]:
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    return a, [1] * both + [0] * only_a + [1] * only_b + [0] * neither


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (1, 5, 2 * 7 / 64),  # P(X <= 1 of 6) = (1 + 6) / 64
        (5, 1, 2 * 7 / 64),
        (0, 5, 2 / 32),
        (3, 3, 1.0),  # twice P(X <= 3 of 6) is above 1
        (0, 0, 1.0),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_worked_by_hand(only_a, only_b, p):
    assert mcnemar(*outcomes(7, only_a, only_b, 4)) == (only_a, only_b, pytest.approx(p, rel=1e-12))


def test_mcnemar_with_thousands_of_discordant_pairs():
    """5,000 discordant pairs: the exact sum as a fraction; 2^5000 has no float."""
    exact = Fraction(2 * sum(math.comb(5000, i) for i in range(2401)), 2**5000)
    assert mcnemar(*outcomes(10, 2600, 2400, 3)).p == pytest.approx(float(exact), rel=1e-12)
    assert mcnemar(*outcomes(0, 9000, 0, 0)).p == 0.0  # 2^-8999 underflows, and nothing else


def test_mcnemar_rejects_a_null_at_most_at_the_nominal_rate():
    rng = np.random.default_rng(4)
    p = [mcnemar(*rng.integers(0, 2, (2, 300))).p for _ in range(1000)]
    assert 0.02 < share([x <= 0.05 for x in p]) <= 0.06  # exact tests of counts stay below 5 %


def test_holm_worked_by_hand():
    """0.01, 0.04, 0.03, 0.005 of four: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1 raised to the one before."""
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_holm_lies_between_the_p_value_and_bonferroni_and_keeps_the_order(p_values):
    adjusted = holm({str(i): p for i, p in enumerate(p_values)})
    for i, p in enumerate(p_values):
        assert p <= adjusted[str(i)] <= min(1.0, len(p_values) * p)
        assert all(adjusted[str(i)] <= adjusted[str(j)] for j, q in enumerate(p_values) if p < q)


# -- seeds -------------------------------------------------------------------------------------------------------------

# Two-sided 95 % and one-sided 95 % points of Student's t: Abramowitz and Stegun, table 26.10.
TABLE = {1: (12.706, 6.314), 2: (4.303, 2.920), 3: (3.182, 2.353), 4: (2.776, 2.132), 9: (2.262, 1.833),
         10: (2.228, 1.812), 30: (2.042, 1.697), 120: (1.980, 1.658)}  # fmt: skip


def t_quantile(probability: float, df: int) -> float:
    """The factor of the standard error in `t_interval`: its bound for values with mean 0 and standard error 1."""
    x = np.arange(df + 1.0)
    x = (x - x.mean()) / x.std(ddof=1) * math.sqrt(df + 1)
    return t_interval(x, level=2 * probability - 1).high


@pytest.mark.parametrize("df", TABLE)
def test_t_quantiles_are_those_of_the_table(df):
    two_sided, one_sided = TABLE[df]
    assert t_quantile(0.975, df) == pytest.approx(two_sided, abs=5e-4)
    assert t_quantile(0.95, df) == pytest.approx(one_sided, abs=5e-4)


def test_t_of_one_and_two_degrees_in_closed_form():
    """Two-sided p: df 1 is Cauchy, 1 - 2 atan(t) / pi; df 2: 1 - t / sqrt(2 + t^2)."""
    for t in (0.0, 0.3, 1.9, 7.0, 40.0):  # t = mean / standard error
        assert t_test([t - 1, t + 1]) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-14)
        assert t_test([t - math.sqrt(3), t, t + math.sqrt(3)]) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-13)


def test_t_interval_and_test_worked_by_hand():
    """1, 2, 6: mean 3, sd sqrt(7), error sqrt(7 / 3); t = 1.964, and with df 2 p = 1 - t / sqrt(2 + t^2)."""
    t = 3 / math.sqrt(7 / 3)
    assert t_interval([1, 2, 6]) == pytest.approx(
        (3, 3 - 4.302653 * math.sqrt(7 / 3), 3 + 4.302653 * math.sqrt(7 / 3)), abs=1e-5
    )
    assert t_test([1, 2, 6]) == t_test([-1, -2, -6]) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
    assert (t_test([0.1, 0.1, 0.1]), t_test([0, 0])) == (0, 1)


def test_t_interval_covers_and_excludes_zero_exactly_when_the_test_rejects():
    rng, hits = np.random.default_rng(5), []
    for _ in range(2000):
        x = rng.normal(0.5, 1, 3)
        hits.append(covers(t_interval(x), 0.5))
        assert covers(t_interval(x), 0) == (t_test(x) >= 0.05)
    assert 0.935 < share(hits) < 0.965


def test_hierarchical_variance_is_owens():
    """Row effects alone, column effects alone and both with noise: sd^2 of the draws in closed form, S = 4, n = 5.

    For a fixed table the residual term is that of the doubly centred table: (2 - 1/S)(2 - 1/n) - 1 does not hold for
    it, so the variance is summed directly: E[w w'] = (1 - 1/S + [s = s']) / S^2 for a resample's shares w.
    """
    rng = np.random.default_rng(6)
    S, n = 4, 5
    of_seed = (1 - 1 / S + np.eye(S)) / S**2
    of_item = (1 - 1 / n + np.eye(n)) / n**2
    for table in (
        rng.normal(size=(S, 1)) * np.ones((1, n)),
        rng.normal(size=(1, n)) * np.ones((S, 1)),
        rng.normal(size=(S, n)),
    ):
        expected = np.einsum("st,ij,si,tj->", of_seed, of_item, table, table) - table.mean() ** 2
        interval = hierarchical(table, num_resamples=100_000, level=0.6826895)
        assert interval.estimate == pytest.approx(table.mean())
        assert (interval.high - interval.low) / 2 == pytest.approx(math.sqrt(expected), rel=0.12)  # nearly normal


def test_hierarchical_without_seed_noise_is_the_bootstrap_over_items():
    """Equal rows: nothing is left of the seeds, and the interval is that of `bootstrap` over the items."""
    items = np.random.default_rng(7).normal(size=200)
    assert hierarchical(np.tile(items, (3, 1))) == pytest.approx(bootstrap(items), abs=0.01)


@pytest.mark.parametrize(
    ("seed_sd", "residual_sd", "low", "high"),
    [(0.0, 1.0, 0.98, 1.0), (0.3, 0.3, 0.84, 0.95)],  # residual counted three times; 1/S of the seeds' missed
)
def test_hierarchical_is_conservative_about_residuals_and_not_about_few_seeds(seed_sd, residual_sd, low, high):
    """The bias that the docstring states, 5 seeds and 60 items: coverage of a 95 % interval by simulation."""
    rng, hits = np.random.default_rng(8), []
    for _ in range(300):
        table = rng.normal(0, seed_sd, (5, 1)) + rng.normal(0, 0.1, (1, 60)) + rng.normal(0, residual_sd, (5, 60))
        hits.append(covers(hierarchical(table, num_resamples=400), 0))
    assert low <= share(hits) <= high


def test_equivalence_is_the_90_percent_interval_within_the_margin():
    """0.1, 0.3, -0.1, 0.2 (mean 0.125, error 0.0854): 90 % interval 0.125 +- 2.353 x 0.0854 = [-0.076, 0.326]."""
    x = [0.1, 0.3, -0.1, 0.2]
    close, wide = equivalence(x, 0.32), equivalence(x, 0.33)
    assert close.interval == pytest.approx((0.125, -0.076, 0.326), abs=1e-3)
    assert not close.equivalent and wide.equivalent
    assert equivalence([0.1, 0.1], 0.2).equivalent and not equivalence([0.3, 0.3], 0.2).equivalent


def test_equivalence_is_claimed_in_5_percent_when_the_truth_is_the_margin():
    rng = np.random.default_rng(9)
    claimed = [equivalence(rng.normal(0.5, 0.1, 5), 0.5).equivalent for _ in range(2000)]
    assert 0.035 < share(claimed) < 0.065
    assert share([equivalence(rng.normal(0, 0.1, 5), 0.5).equivalent for _ in range(200)]) > 0.99


@pytest.mark.parametrize(("num_seeds", "known"), [(3, 3.264), (5, 1.682), (10, 0.996)])
def test_detectable_difference_has_the_power_it_says(num_seeds, known):
    """`known`: standardised differences at 80 % power as tabulated for the paired t test; and by simulation."""
    assert detectable_difference(1.0, num_seeds) == pytest.approx(known, abs=1e-3)
    of_eight = detectable_difference(1.0, num_seeds, num_tests=8)
    rng, sd = np.random.default_rng(10), 0.02
    x = rng.normal(detectable_difference(sd, num_seeds), sd, (20_000, num_seeds))
    t = x.mean(axis=1) / (x.std(axis=1, ddof=1) / math.sqrt(num_seeds))
    assert (t > t_quantile(0.975, num_seeds - 1)).mean() == pytest.approx(0.8, abs=0.01)
    t += (of_eight - known) / (x.std(axis=1, ddof=1) / sd / math.sqrt(num_seeds))  # the same draws, moved
    assert (t > t_quantile(1 - 0.025 / 8, num_seeds - 1)).mean() == pytest.approx(0.8, abs=0.01)


def test_p_not_worse_is_the_one_sided_t_test_by_hand():
    """Differences 0, 1, 2: mean 1, standard error 1/sqrt(3); t = (1 + 2) sqrt(3) over 2 degrees of freedom.

    The tail of t with 2 degrees of freedom is (1 - t / sqrt(t^2 + 2)) / 2.
    """
    t = 3 * math.sqrt(3)
    assert p_not_worse([0, 1, 2], margin=2) == pytest.approx((1 - t / math.sqrt(t * t + 2)) / 2)
    assert p_not_worse([0, 1, 2], margin=2) == pytest.approx(1 - p_not_worse([-4, -5, -6], margin=2))
    assert (p_not_worse([1, 1], margin=0), p_not_worse([-2, -2], margin=2)) == (0, 1)
    with pytest.raises(UserError, match="0 or more"):
        p_not_worse([0, 1], margin=-1)
