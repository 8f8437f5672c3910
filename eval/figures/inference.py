"""Intervals and tests for paired comparisons of models: over groups of wordings, over seeds, and over both.

The unit of resampling is the group (one meaning, all its wordings), because the rows of a group are not independent. A
seed is a training run; differences over seeds compare runs that share seed and data order.

scipy is in the extra `eval`. It is imported where it is used, because scoring a model does not need it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm_jepa import UserError

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and its interval, at the level that the function was called with. Undefined bounds are NaN."""

    estimate: float
    low: float
    high: float


def resampled_means(values: ArrayLike, *, num_resamples: int = 10_000, seed: int = 0) -> Array:
    """Means [num_resamples, ...] of resamples, with replacement and of the same size, of the groups (axis 0).

    The draws depend only on the number of groups, `num_resamples` and `seed`: two arrays over the same groups get the
    same resamples. Takes about 64 MB, however many groups there are. Raises UserError for fewer than two groups or a
    NaN.
    """
    table = _checked(values, "group(s)")
    flat = table.reshape(len(table), -1)
    rng, groups = np.random.default_rng(seed), len(table)
    rows = min(num_resamples, max(1, 2**22 // groups))
    parts = [
        _counts(rng, min(rows, num_resamples - start), groups) @ flat / groups
        for start in range(0, num_resamples, rows)
    ]
    return np.concatenate(parts).reshape(num_resamples, *table.shape[1:])


def percentile(estimate: float, draws: Array, *, level: float = 0.95) -> Interval:
    """Percentile interval (Efron and Tibshirani 1993, ch. 13) of bootstrap draws [R].

    The bounds are NaN if any draw is NaN: a statistic that is undefined on some resamples has no interval.
    """
    if np.isnan(draws).any():
        return Interval(float(estimate), math.nan, math.nan)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high))


def bootstrap(values: ArrayLike, *, num_resamples: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Percentile bootstrap of the mean over groups: rows of `values` [groups, ...] are resampled whole.

    Raises UserError for fewer than two groups or a NaN.
    """
    means = resampled_means(values, num_resamples=num_resamples, seed=seed).reshape(num_resamples, -1).mean(axis=1)
    return percentile(float(np.asarray(values, dtype=np.float64).mean()), means, level=level)


class McNemar(NamedTuple):
    only_a: int  # items that only a has right
    only_b: int
    p: float


def mcnemar(a: ArrayLike, b: ArrayLike) -> McNemar:
    """Exact two-sided McNemar test on paired 0/1 outcomes [items]: discordant pairs are fair coin flips.

    p = min(1, 2 P(X <= min(only_a, only_b))), X ~ Binomial(only_a + only_b, 1/2); 1 without discordant pairs. Items
    must be independent: give it one wording at a time, not all rows of a group. Raises UserError for unequal lengths
    or values other than 0 and 1.
    """
    one, other = np.asarray(a), np.asarray(b)
    if one.shape != other.shape or one.ndim != 1:
        raise UserError(f"Shapes {one.shape} and {other.shape}: McNemar's test needs two lists over the same items.")
    if not (np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all()):
        raise UserError("McNemar's test needs outcomes of 0 and 1; bootstrap the differences of other scores.")
    only_a, only_b = int(((one == 1) & (other == 0)).sum()), int(((one == 0) & (other == 1)).sum())
    if only_a == only_b:  # also without any discordant pair, for which binomtest has no p
        return McNemar(only_a, only_b, 1.0)
    from scipy import stats

    return McNemar(only_a, only_b, float(stats.binomtest(only_a, only_a + only_b).pvalue))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p values (Holm 1979), in the same order. Reject those <= alpha; the tests may depend on
    each other."""
    if any(not 0 <= p <= 1 for p in p_values.values()):
        raise UserError(f"p values must be in 0..1, not {dict(p_values)}.")
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def hierarchical(difference: ArrayLike, *, num_resamples: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Crossed bootstrap of the mean of paired differences [seeds, items]: new seeds *and* new items.

    All seeds answer the same items (crossed, not nested), so seeds and items are resampled independently of each other:
    the pigeonhole bootstrap (Owen 2007, arXiv:0712.1111). With seed, item and residual variances A, I and E over S
    seeds and n items, the variance of the mean is A/S + I/n + E/(Sn); the bootstrap's is, in expectation,
    (1 - 1/S) A/S + (1 - 1/n) I/n + ((2 - 1/S)(2 - 1/n) - 1) E/(Sn). So it counts E about three times (conservative),
    but misses 1/S of A: if fewer than about ten seeds differ much, it is too narrow. Then claim from `t_interval` of
    the seed means, which is about new seeds on these same items.
    """
    table = _checked(difference, "seed(s)")
    if table.ndim != 2 or table.shape[1] < 2:
        raise UserError(f"Differences of shape {table.shape}: hierarchical needs [seeds, items] with two of each.")
    num_seeds, items = table.shape
    rng = np.random.default_rng(seed)
    rows = min(num_resamples, max(1, 2**22 // items))
    draws = []
    for start in range(0, num_resamples, rows):
        n = min(rows, num_resamples - start)
        by_item = _counts(rng, n, num_seeds) @ table / num_seeds  # [n, items]
        draws.append((by_item * _counts(rng, n, items)).sum(axis=1) / items)
    return percentile(table.mean(), np.concatenate(draws), level=level)


def t_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Student's interval of the mean of independent values, for instance one paired difference per seed.

    Raises UserError for fewer than two values.
    """
    x = _by_seed(values)
    if _all_equal(x):
        return Interval(float(x[0]), float(x[0]), float(x[0]))
    from scipy import stats

    low, high = stats.ttest_1samp(x, 0.0).confidence_interval(level)
    return Interval(float(x.mean()), float(low), float(high))


def t_test(values: ArrayLike) -> float:
    """Two-sided p of "the mean is 0"; given paired differences by seed, the paired t test.

    Equal values are the limit of a vanishing spread: p = 0, or 1 if all are 0.
    """
    x = _by_seed(values)
    if _all_equal(x):
        return float(x[0] == 0)
    from scipy import stats

    return float(stats.ttest_1samp(x, 0.0).pvalue)


class Equivalence(NamedTuple):
    interval: Interval  # at `level`
    equivalent: bool  # the interval is within -margin..margin, that is, both one-sided p are below (1 - level) / 2


def equivalence(differences_by_seed: ArrayLike, margin: float, *, level: float = 0.90) -> Equivalence:
    """Two one-sided t tests (TOST; Schuirmann 1987): is the difference smaller than `margin`, either way?

    `level` 0.90 claims equivalence at 5 %. Fix the margin before you look at the data. "Not equivalent" does not mean
    different; it may mean too few seeds. Raises UserError for a margin <= 0 or fewer than two seeds.
    """
    if not margin > 0:
        raise UserError(f"margin={margin}: equivalence needs a margin above 0, in the unit of the differences.")
    interval = t_interval(differences_by_seed, level=level)
    return Equivalence(interval, -margin < interval.low and interval.high < margin)


def p_not_worse(differences_by_seed: ArrayLike, margin: float) -> float:
    """One-sided p of "the mean difference is -margin or less", from the paired t test: small means not worse by more.

    Fix the margin before you look at the data. Raises UserError for a negative margin or fewer than two seeds.
    """
    if not margin >= 0:
        raise UserError(f"margin={margin}: give how much worse is still accepted, 0 or more.")
    x = _by_seed(differences_by_seed)
    if _all_equal(x):
        return float(x[0] <= -margin)
    from scipy import stats

    return float(stats.ttest_1samp(x, -margin, alternative="greater").pvalue)


def show_p(p: float) -> str:
    """A p value for a table: three decimals, or "< 0.001"."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def detectable_difference(
    sd_of_paired_difference: float, num_seeds: int, *, num_tests: int = 1, power: float = 0.8
) -> float:
    """The true mean difference that a two-sided paired t test over `num_seeds` at 5 % finds with probability `power`.

    num_tests: the size of a family under Holm. Its smallest p must pass at 5 % / num_tests, so this test must too.

    From the noncentral t. A significant difference with the wrong sign does not count. In the unit of the sd. Raises
    UserError for fewer than two seeds.
    """
    if num_seeds < 2:
        raise UserError(f"num_seeds={num_seeds}: a spread over seeds needs two.")
    from scipy import optimize, stats

    df = num_seeds - 1
    critical = stats.t.ppf(1 - 0.025 / num_tests, df)

    def missing_power(noncentrality: float) -> float:
        return float(stats.nct.sf(critical, df, noncentrality)) - power

    high = 1.0
    while missing_power(high) < 0:
        high *= 2
    noncentrality = optimize.brentq(missing_power, 0.0, high, xtol=1e-10)
    return float(noncentrality) * sd_of_paired_difference / math.sqrt(num_seeds)


def _counts(rng: np.random.Generator, resamples: int, size: int) -> Array:
    """[resamples, size]: how often each of `size` units is in each resample."""
    drawn = rng.integers(0, size, (resamples, size), dtype=np.int64)
    drawn += np.arange(resamples)[:, None] * size
    return np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size).astype(np.float64)


def _checked(values: ArrayLike, unit: str) -> Array:
    table = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if len(table) < 2:
        raise UserError(f"{len(table)} {unit}: an interval needs two or more.")
    if not np.isfinite(table).all():
        count = int((~np.isfinite(table)).sum())
        raise UserError(f"{count} value(s) are not finite, so there is no interval; remove the runs they come from.")
    return table


def _by_seed(values: ArrayLike) -> Array:
    x = _checked(values, "seed(s)")
    if x.ndim != 1:
        raise UserError(f"Values of shape {x.shape}: give one value per seed.")
    return x


def _all_equal(x: Array) -> bool:
    """Equal values have no spread. The rounding of their mean would give one of 1e-17, and a huge t."""
    return bool((x == x[0]).all())
