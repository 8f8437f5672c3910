"""How much does the wording of a request matter? Figures of groups: one meaning, k wordings, one gold answer.

Every figure is computed per group and then averaged over groups, so a group with many wordings weighs as much as one
with two. Intervals resample whole groups. Consistency alone rewards a model that always gives the same answer, so it is
reported together with `consistent_and_correct`, which does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llm_jepa import UserError, effective_rank

from .inference import (
    Array,
    Interval,
    McNemar,
    bootstrap,
    hierarchical,
    mcnemar,
    percentile,
    resampled_means,
    t_interval,
    t_test,
)

# The figures of `robustness`. All but the last two are means over groups of a figure of the group. A group has k
# wordings, each with a score and an answer key; the first is the original.
DEFINITIONS = {
    "accuracy": "mean score over a group's wordings",
    "worst_of_k": "lowest score among a group's wordings; for right/wrong scores: all of them right",
    "best_of_k": "highest score among a group's wordings; for right/wrong scores: one of them right",
    "spread_in_groups": "best_of_k - worst_of_k",
    "consistency": "share of the pairs of a group's wordings whose answers are the same, right or wrong",
    "consistent_and_correct": "share of those pairs whose answers are the same and both fully right",
    "spread_of_wordings": "accuracy of the best wording minus that of the worst, over all groups; never below 0",
    "drop_rate": "1 - accuracy of the other wordings / accuracy of the first (PDR of arXiv:2306.04528)",
}

MAX_WORDINGS = 2000  # 10,000 resamples of two columns each take 320 MB


@dataclass(frozen=True)
class Answers:
    """One model's graded answers, G groups by K wordings. Groups may lack wordings."""

    metric: str
    groups: tuple[str, ...]
    wordings: tuple[str, ...]
    scores: Array  # [G, K], NaN if the group lacks the wording
    keys: NDArray[np.int64]  # [G, K], equal within a row for equal answers; -1 if the group lacks the wording
    first: NDArray[np.int64]  # [G], the column of a group's own first wording
    left_out: int = 0  # groups that the metric does not count

    @property
    def present(self) -> NDArray[np.bool_]:
        return self.keys >= 0


def read_answers(samples: Sequence[Mapping[str, Any]], metric: str) -> Answers:
    """The answers of sample rows {"group", "wording", "scores": {metric: value}, "answer_key"}, in their order.

    The metric does not count a group if none of its rows has the metric; such groups are left out. Raises UserError for
    a metric that no row has or that a group has in part, two rows of one group and wording, groups with a single
    wording, or more than MAX_WORDINGS.
    """
    counted = [row for row in samples if metric in row["scores"]]
    if not counted:
        known = sorted(set().union(*(row["scores"] for row in samples)))
        raise UserError(f"No sample has the metric {metric!r}; there is {', '.join(known) or 'none'}.")
    groups, wordings = _index(counted, "group"), _index(counted, "wording")
    if len(wordings) > MAX_WORDINGS:
        raise UserError(
            f"The groups have {len(wordings)} different wordings, and the limit is {MAX_WORDINGS}: every figure is "
            "resampled for each. Use a part of them, or give the same names to the wordings of all groups."
        )
    in_part = [row for row in samples if metric not in row["scores"] and row["group"] in groups]
    if in_part:
        raise UserError(f"Group {in_part[0]['group']!r} has the metric {metric!r} for some of its wordings only.")
    scores = np.full((len(groups), len(wordings)), np.nan)
    keys = np.full(scores.shape, -1, dtype=np.int64)
    first = np.full(len(groups), -1, dtype=np.int64)
    code: dict[str, int] = {}
    for row in counted:
        g, w = groups[row["group"]], wordings[row["wording"]]
        if keys[g, w] >= 0:
            raise UserError(f"Group {row['group']!r} has two answers for the wording {row['wording']!r}.")
        scores[g, w] = row["scores"][metric]
        if np.isnan(scores[g, w]):
            raise UserError(f"Group {row['group']!r}, wording {row['wording']!r}: its {metric} is not a number.")
        keys[g, w] = code.setdefault(row["answer_key"], len(code))
        if first[g] < 0:
            first[g] = w
    refuse_single(((keys >= 0).sum(axis=1)).tolist())
    left_out = len({row["group"] for row in samples}) - len(groups)
    return Answers(metric, tuple(groups), tuple(wordings), scores, keys, first, left_out)


def _index(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, int]:
    """A number for each value of `key`, in the order of the rows."""
    numbers: dict[str, int] = {}
    for row in rows:
        numbers.setdefault(row[key], len(numbers))
    return numbers


def refuse_single(num_wordings: Sequence[int]) -> None:
    """Raises UserError if a group has a single wording. `num_wordings`: of each group."""
    single = sum(k < 2 for k in num_wordings)
    if single:
        raise UserError(
            f"{single} of {len(num_wordings)} groups have a single wording: robustness compares wordings of one "
            "request. Give each group two or more, or score the task with eval.run."
        )


class Robustness(NamedTuple):
    metrics: dict[str, Interval]  # see DEFINITIONS
    wordings: dict[str, Interval]  # accuracy of each wording, over the groups that have it


def robustness(answers: Sequence[Answers], *, num_resamples: int = 10_000, seed: int = 0) -> Robustness:
    """Figures of one model, or the mean of several seeds of it, with 95 % bootstrap intervals over groups.

    The intervals are about new groups for these trained weights. They do not tell how another training run would do.
    Raises UserError if the seeds answered different groups.
    """
    return _intervals(_draws(answers, num_resamples, seed))


class OverSeeds(NamedTuple):
    """A difference by seed, with runs paired in the order given: would new training runs show it again?"""

    by_seed: tuple[float, ...]
    t: Interval  # Student's 95 % interval of the mean: new seeds, these groups
    p: float  # two-sided paired t test
    crossed: Interval | None  # new seeds and new groups (see `hierarchical`); for means over groups


class Comparison(NamedTuple):
    """Differences `model - baseline`. McNemar is per wording, because the wordings of a group are not independent."""

    metrics: dict[str, Interval]
    wordings: dict[str, Interval]
    mcnemar: dict[str, McNemar]  # `only_a`: right for the model alone. One run a side, scores all 0 or 1; else empty
    over_seeds: dict[str, OverSeeds]  # by metric. Equally many runs a side, two or more; else empty


def compare(
    model: Sequence[Answers], baseline: Sequence[Answers], *, num_resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Paired differences over the groups that both answered, with 95 % bootstrap intervals over groups.

    Several runs (seeds) on a side are averaged first. Raises UserError if not all answered the same groups in the same
    wordings.
    """
    _check_same([*model, *baseline])
    ours, theirs = _draws(model, num_resamples, seed), _draws(baseline, num_resamples, seed)
    paired = _intervals({name: ours[name] - theirs[name] for name in ours})
    tests: dict[str, McNemar] = {}
    over_seeds: dict[str, OverSeeds] = {}
    if len(model) == len(baseline) == 1:
        tests = _mcnemar_by_wording(model[0], baseline[0])
    elif len(model) == len(baseline):
        over_seeds = _compare_seeds(model, baseline, num_resamples=num_resamples, seed=seed)
    return Comparison(paired.metrics, paired.wordings, tests, over_seeds)


def _mcnemar_by_wording(model: Answers, baseline: Answers) -> dict[str, McNemar]:
    tests: dict[str, McNemar] = {}
    if _binary(model) and _binary(baseline):
        for j, wording in enumerate(model.wordings):
            has = model.present[:, j]
            tests[wording] = mcnemar(model.scores[has, j], baseline.scores[has, j])
    return tests


def _compare_seeds(
    model: Sequence[Answers], baseline: Sequence[Answers], *, num_resamples: int, seed: int
) -> dict[str, OverSeeds]:
    pairs = list(zip(model, baseline, strict=True))
    estimates = [(figures(a), figures(b)) for a, b in pairs]
    tables = [(per_group(a), per_group(b)) for a, b in pairs]
    over_seeds: dict[str, OverSeeds] = {}
    for name in DEFINITIONS:
        by_seed = tuple(a["metrics", name] - b["metrics", name] for a, b in estimates)
        if not np.isfinite(by_seed).all():
            continue  # a drop rate is undefined without a right answer
        crossed = None
        if name in tables[0][0]:
            difference = np.stack([a[name] - b[name] for a, b in tables])  # [seeds, G]
            crossed = hierarchical(difference, num_resamples=num_resamples, seed=seed)
        over_seeds[name] = OverSeeds(by_seed, t_interval(by_seed), t_test(by_seed), crossed)
    return over_seeds


def per_group(answers: Answers) -> dict[str, Array]:
    """The figures of DEFINITIONS that are means over groups, for each group: name -> [G]."""
    scores, present, keys = answers.scores, answers.present, answers.keys
    k = present.sum(axis=1)
    same, right = _equal_pairs(keys, present), _equal_pairs(keys, present & (scores >= 1))
    pairs = k * (k - 1) / 2
    worst, best = np.nanmin(scores, axis=1), np.nanmax(scores, axis=1)
    return {
        "accuracy": np.nanmean(scores, axis=1),
        "worst_of_k": worst,
        "best_of_k": best,
        "spread_in_groups": best - worst,
        "consistency": same / pairs,
        "consistent_and_correct": right / pairs,
    }


def _equal_pairs(keys: NDArray[np.int64], counted: NDArray[np.bool_]) -> Array:
    """[G]: how many pairs of the counted answers of each group have the same key. `keys`, `counted`: [G, K]."""
    groups, columns = np.nonzero(counted)
    both, count = np.unique(np.stack([groups, keys[groups, columns]]), axis=1, return_counts=True)
    same: Array = np.bincount(both[0], weights=count * (count - 1) / 2, minlength=len(keys)).astype(np.float64)
    return same


@torch.no_grad()
def embedding_view(embeddings: Tensor, group: Tensor) -> dict[str, Interval]:
    """Are the embeddings of the wordings of a request close to each other?

    cosine_within, cosine_between          mean centred cosine of wordings of one group, and of different groups
    raw_cosine_within, raw_cosine_between  the same without centring; both near 1 is the signature of collapse
    recall_at_1                            share of a group's wordings whose nearest other wording (centred cosine) is
                                           in the same group, averaged over groups; chance is (k - 1) / (N - 1)
    effective_rank                         of all N, see `llm_jepa.core.diagnostics`; depends on N and k

    Args:
        embeddings: [N, D], of all wordings of all groups.
        group: [N] ints.

    The figures within groups and recall have 95 % bootstrap intervals over groups; the others have NaN bounds.
    Raises UserError for fewer than two groups or a group with a single row.
    """
    _, group, size = torch.unique(group, return_inverse=True, return_counts=True)
    if len(size) < 2 or (size < 2).any():
        raise UserError(f"{len(size)} groups, {int((size < 2).sum())} with a single wording: two of each are needed.")
    view: dict[str, Interval] = {}
    wide = embeddings.double()
    for name, x in (("", wide - wide.mean(dim=0)), ("raw_", wide)):
        unit = F.normalize(x, dim=-1)
        sums = unit.new_zeros(len(size), unit.shape[1]).index_add_(0, group, unit)  # [G, D]
        # sum of all cosines in a group = |sum of its unit vectors|^2; it includes each row's cosine with itself
        itself = torch.zeros_like(size, dtype=unit.dtype).index_add_(0, group, unit.square().sum(dim=1))
        inside = sums.square().sum(dim=1)
        view[f"{name}cosine_within"] = bootstrap(((inside - itself) / (size * (size - 1))).numpy(force=True))
        between = (sums.sum(dim=0).square().sum() - inside.sum()) / (len(x) ** 2 - size.square().sum())
        view[f"{name}cosine_between"] = Interval(float(between), math.nan, math.nan)
    hit = _nearest_is_of_the_group(F.normalize(wide - wide.mean(dim=0), dim=-1), group)
    of_group = torch.zeros_like(size, dtype=hit.dtype).index_add_(0, group, hit) / size
    view["recall_at_1"] = bootstrap(of_group.numpy(force=True))
    view["effective_rank"] = Interval(float(effective_rank(embeddings)), math.nan, math.nan)
    return view


def _nearest_is_of_the_group(unit: Tensor, group: Tensor) -> Tensor:
    """[N], 1 if the nearest other row of unit vectors [N, D] is of the same group, else 0."""
    hit = torch.zeros(len(unit), dtype=unit.dtype, device=unit.device)
    for start in range(0, len(unit), 1024):  # N x N cosines, a slice at a time to save memory
        cosine = unit[start : start + 1024] @ unit.T
        rows = torch.arange(len(cosine), device=unit.device)
        cosine[rows, rows + start] = -torch.inf
        hit[start : start + 1024] = (group[cosine.argmax(dim=1)] == group[start : start + 1024]).to(unit.dtype)
    return hit


def figures(answers: Answers) -> dict[tuple[str, str], float]:
    """("metrics", name) or ("wordings", name) -> the estimate of one run, without an interval."""
    means = _table(answers).mean(axis=0)[None]  # [1, C]
    return {name: float(values[0]) for name, values in _of_means(means, answers).items()}


class _Draws(NamedTuple):
    estimate: float
    draws: Array  # [R]

    def __sub__(self, other: _Draws) -> _Draws:
        return _Draws(self.estimate - other.estimate, self.draws - other.draws)


def _draws(answers: Sequence[Answers], num_resamples: int, seed: int) -> dict[tuple[str, str], _Draws]:
    """Estimates and resamples of the figures, averaged over runs.

    Equal numbers of groups get the same resamples, so the draws of two models can be subtracted.
    """
    _check_same(answers)
    estimates = [figures(one) for one in answers]
    draws = [_of_means(resampled_means(_table(one), num_resamples=num_resamples, seed=seed), one) for one in answers]
    averaged = {}
    for name in estimates[0]:
        estimate = float(np.mean([of_run[name] for of_run in estimates]))
        averaged[name] = _Draws(estimate, np.mean([of_run[name] for of_run in draws], axis=0))
    return averaged


def _table(answers: Answers) -> Array:
    """[G, C] columns of whose means every figure is a function, so that one resample of groups serves all figures.

    The columns: the figures of `per_group`; the score of the original, and the mean score of the other wordings; by
    wording the score (0 if it is missing) and whether the group has the wording.
    """
    scores, present = answers.scores, answers.present
    original = scores[np.arange(len(scores)), answers.first]
    others = (np.nansum(scores, axis=1) - original) / (present.sum(axis=1) - 1)
    return np.column_stack([*per_group(answers).values(), original, others, np.nan_to_num(scores), present])


def _of_means(means: Array, answers: Answers) -> dict[tuple[str, str], Array]:
    """Means [R, C] of the columns of `_table` -> figures, each [R]."""
    of_groups = list(DEFINITIONS)[:-2]
    n, k = len(of_groups), len(answers.wordings)
    original, others = means[:, n], means[:, n + 1]
    scores, present = means[:, n + 2 : n + 2 + k], means[:, n + 2 + k :]
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample without a right answer, or without the wording
        by_wording = scores / present  # the mean over the groups that have the wording
        drop = np.where(original > 0, 1 - others / original, np.nan)
    return {
        **{("metrics", name): means[:, i] for i, name in enumerate(of_groups)},
        ("metrics", "spread_of_wordings"): by_wording.max(axis=1) - by_wording.min(axis=1),
        ("metrics", "drop_rate"): drop,
        **{("wordings", name): by_wording[:, j] for j, name in enumerate(answers.wordings)},
    }


def _intervals(draws: Mapping[tuple[str, str], _Draws]) -> Robustness:
    intervals = Robustness({}, {})
    for (kind, name), one in draws.items():
        getattr(intervals, kind)[name] = percentile(one.estimate, one.draws)
    return intervals


def _check_same(answers: Sequence[Answers]) -> None:
    first = answers[0]
    for other in answers[1:]:
        apart = set(first.groups) ^ set(other.groups)
        if apart:
            raise UserError(
                f"{len(apart)} groups were answered by one model and not by the other ({min(apart)!r} is one); score "
                "both on the same data with the same --limit."
            )
        if first.metric != other.metric:
            raise UserError(f"One model was scored by {first.metric}, the other by {other.metric}.")
        if first.groups != other.groups or first.wordings != other.wordings or (first.present != other.present).any():
            raise UserError("The models answered the same groups in another order or in other wordings.")


def _binary(answers: Answers) -> bool:
    return bool(np.isin(answers.scores[answers.present], (0, 1)).all())
