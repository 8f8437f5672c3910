"""All figures of `eval.robustness`, as plain data: the content of results.json."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_jepa import UserError

from ..provenance import environment
from .groups import Answers, Comparison, compare, figures, read_answers, robustness
from .inference import Interval, holm

SCHEMA = 1
# Two runs can be compared only if these are equal. Otherwise a difference may not come from the models.
SAME = ("task", "data_sha256", "limit", "groups", "wordings")
# Metrics that are tested; chosen in advance and kept few to preserve power.
TESTED = ("accuracy", "worst_of_k", "consistency")
NOT_DEFINED = Interval(math.nan, math.nan, math.nan)

Arms = Mapping[str, Sequence["Run"]]


@dataclass(frozen=True)
class Run:
    """One scored model: what `eval.run` writes about it."""

    result: dict[str, Any]
    samples: list[dict[str, Any]]
    embedding: dict[str, Interval] | None = None


def analyse(arms: Arms, *, baseline: str, metric: str) -> dict[str, Any]:
    """All figures. An arm is a model, or several runs (seeds) of one recipe.

    Raises UserError if the runs differ in task, data, groups, wordings or decoding, or lack the metric.
    """
    check_comparable(arms)
    answers: dict[str, list[Answers]] = {}
    for name, runs in arms.items():
        answers[name] = [read_answers(run.samples, metric) for run in runs]
    first_name = next(iter(arms))
    first, first_answers = arms[first_name][0].result, answers[first_name][0]
    num_wordings = first_answers.present.sum(axis=1)
    comparisons = {name: _compared(answers[name], answers[baseline]) for name in arms if name != baseline}
    _adjust_p_values(comparisons)
    return {
        "schema": SCHEMA,
        "kind": "robustness",
        "finished": True,
        "metric": metric,
        **{key: first.get(key) for key in SAME},
        "decoding": _decoding(first),
        "counted_groups": len(first_answers.groups),
        "left_out": first_answers.left_out,
        "wordings": list(first_answers.wordings),
        "k": [int(num_wordings.min()), int(num_wordings.max())],
        "baseline": baseline,
        "order": list(arms),
        "models": {name: _of_arm(runs, answers[name]) for name, runs in arms.items()},
        "comparisons": comparisons,
        "environment": environment(),
    }


def check_comparable(arms: Arms) -> None:
    """Raises UserError if two runs differ in a setting that changes the figures."""
    first_name, (first, *_) = next(iter(arms.items()))
    expected = _settings(first.result)
    for name, runs in arms.items():
        for run in runs:
            settings = _settings(run.result)
            for key, value in expected.items():
                if settings[key] != value:
                    raise UserError(
                        f"{first_name} and {name} differ in {key} ({shortened(value)} and "
                        f"{shortened(settings[key])}), so they cannot be compared; score both with the same settings."
                    )


def shortened(value: Any) -> str:
    """A setting as JSON, cut to 60 characters for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _settings(result: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: result.get(key) for key in SAME}, **_decoding(result)}


def _decoding(result: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of decoding that must be equal. Stop tokens may differ with the tokenizer, the batch size too."""
    return {key: result["decoding"].get(key) for key in ("greedy", "max_new_tokens")}


def _adjust_p_values(comparisons: Mapping[str, dict[str, Any]]) -> None:
    """Add Holm's p. All p values of a kind that the report shows are one family."""
    for kind in ("mcnemar", "over_seeds"):
        tests = {}
        for name, pair in comparisons.items():
            for key, test in pair[kind].items():
                tests[f"{name}\n{key}"] = test
        for name, p in holm({name: test["p"] for name, test in tests.items()}).items():
            tests[name]["p_holm"] = p


def _of_arm(runs: Sequence[Run], answers: Sequence[Answers]) -> dict[str, Any]:
    """The figures of a model, or of several runs of it."""
    estimates = robustness(answers)
    by_seed = [figures(one) for one in answers]
    result: dict[str, Any] = {"runs": [run.result for run in runs]}
    for kind, intervals in (("metrics", estimates.metrics), ("wordings", estimates.wordings)):
        result[kind] = {}
        for name, interval in intervals.items():
            values = [_or_none(one[kind, name]) for one in by_seed]
            result[kind][name] = {**_plain(interval), "by_seed": values}
    result["scores"] = {name: _mean_score(runs, name) for name in _names_of_scores(runs)}
    views = [run.embedding for run in runs if run.embedding is not None]
    if views:
        result["embedding"] = {name: _over_runs([view[name] for view in views]) for name in views[0]}
    return result


def _names_of_scores(runs: Sequence[Run]) -> list[str]:
    names: dict[str, None] = {}
    for run in runs:
        for row in run.samples:
            names |= dict.fromkeys(row["scores"])
    return list(names)


def _mean_score(runs: Sequence[Run], name: str) -> float:
    return statistics.mean([figures(read_answers(run.samples, name))["metrics", "accuracy"] for run in runs])


def _over_runs(intervals: Sequence[Interval]) -> dict[str, Any]:
    """The mean over runs. Only a single run has an interval over groups."""
    estimates = [interval.estimate for interval in intervals]
    interval = intervals[0] if len(intervals) == 1 else NOT_DEFINED
    return {**_plain(interval), "estimate": statistics.mean(estimates), "by_seed": estimates}


def _compared(model: Sequence[Answers], baseline: Sequence[Answers]) -> dict[str, Any]:
    comparison = compare(model, baseline)
    return {
        "metrics": {name: _plain(interval) for name, interval in comparison.metrics.items()},
        "wordings": {name: _plain(interval) for name, interval in comparison.wordings.items()},
        "mcnemar": _mcnemar(comparison),
        "over_seeds": _over_seeds(comparison),
    }


def _mcnemar(comparison: Comparison) -> dict[str, dict[str, Any]]:
    tests = {}
    for wording, test in comparison.mcnemar.items():
        tests[wording] = {"only_model": test.only_a, "only_baseline": test.only_b, "p": test.p}
    return tests


def _over_seeds(comparison: Comparison) -> dict[str, dict[str, Any]]:
    tests = {}
    for name in TESTED:
        seeds = comparison.over_seeds.get(name)
        if seeds is not None:
            tests[name] = {
                "by_seed": list(seeds.by_seed),
                "t": _plain(seeds.t),
                "p": seeds.p,
                "crossed": _plain(seeds.crossed) if seeds.crossed else None,
            }
    return tests


def _plain(interval: Interval) -> dict[str, float | None]:
    return {key: _or_none(value) for key, value in interval._asdict().items()}  # JSON has no NaN


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
