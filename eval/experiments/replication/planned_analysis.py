"""The analysis of a plan that names its primary metrics.

Keys of such a plan, beside those that its runs need:

    primary: [exact, stop_rate]              # Holm's correction is over the arms, for each of them
    margin: {metric: contains, points: 3}    # a difference within +- 3 points is none
    contrasts: [[cosine, mismatched]]        # planned differences beside "each arm minus sft"

All figures come from the bits of the result files. Differences are in points, paired by seed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_jepa import UserError
from llm_jepa.core.json_files import read_json

from ...figures.inference import (
    Interval,
    detectable_difference,
    equivalence,
    hierarchical,
    holm,
    t_interval,
    t_test,
)
from ..small_runs import refuse_other_settings
from .runs import planned_runs, result_file, settings_of, setup_of, trained_wording

METRICS = ("exact", "stop_rate", "startswith", "contains", "equivalent")
SAME_IN_ALL_RUNS = ("start", "start_sha256", "data_sha256", "lines")
STOPPING = {"exact", "stop_rate"}  # a plan with both as primary asks whether a gain in exact is one in stopping
BASELINE = "sft"

Run = dict[str, Any]  # a result file
Answers = Mapping[str, NDArray[np.float64]]  # metric -> [seeds, lines] of 0 and 1


def names_its_primary(plan: dict[str, Any]) -> bool:
    """Whether the plan is one for this analysis. Raises UserError if its keys do not belong together."""
    primary, margin, contrasts = plan.get("primary"), plan.get("margin"), plan.get("contrasts")
    if primary is None:
        if margin is not None or contrasts is not None:
            raise UserError("The plan has `margin` or `contrasts`, but no `primary`: name the metrics they are about.")
        return False
    arms = set(setup_of(plan).arms)
    known = f"one of {', '.join(METRICS)}"
    if not isinstance(primary, list) or not primary or not set(primary) <= set(METRICS):
        raise UserError(f"primary: {primary!r} must be a list of metrics, each {known}.")
    if not isinstance(margin, dict) or margin.keys() != {"metric", "points"} or margin["metric"] not in METRICS:
        raise UserError(f"margin: {margin!r} must be {{metric: ..., points: ...}}, with a metric that is {known}.")
    if not isinstance(margin["points"], int | float) or not margin["points"] > 0:
        raise UserError(f"margin: {margin['points']!r} points must be a number above 0.")
    if any(BASELINE not in protocol["arms"] for protocol in plan["protocols"].values()):
        raise UserError(f"Every protocol of a plan with `primary` must have the arm {BASELINE}: it is the baseline.")
    for pair in contrasts or []:
        if not isinstance(pair, list) or len(pair) != 2 or not set(pair) <= arms:
            raise UserError(f"contrasts: {pair!r} must be two arms of {', '.join(sorted(arms))}.")
    return True


def whole_seeds(plan: dict[str, Any], out: Path) -> dict[str, list[int]]:
    """Protocol -> its seeds for which every arm has a result file."""
    whole = {}
    for name, protocol in plan["protocols"].items():
        whole[name] = [
            seed
            for seed in protocol["seeds"]
            if all(result_file(name, arm, seed, out).is_file() for arm in protocol["arms"])
        ]
    return whole


def load(plan: dict[str, Any], out: Path) -> dict[str, dict[str, list[Run]]]:
    """Protocol -> arm -> result files of the whole seeds, in the plan's order.

    Raises UserError if a protocol has fewer than two whole seeds, if a run has other settings than the plan, or if the
    runs are of several starts or data sets.
    """
    whole = whole_seeds(plan, out)
    for name, seeds in whole.items():
        if len(seeds) < 2:
            raise UserError(f"{out} holds {len(seeds)} whole seed(s) of protocol {name}; run compare first.")
    files: dict[Path, Run] = {}
    for cell, setup in planned_runs(plan, "", out):
        if not cell.out.is_file():
            continue
        settings = settings_of(cell, setup)
        del settings["start"]  # the plan names none; all runs must have the same, below
        refuse_other_settings(cell.out, settings)
        files[cell.out] = read_json(cell.out, is_finite=False)
        _check_content(files[cell.out], plan, setup.wordings, cell.out)
    kinds = {json.dumps([run.get(key) for key in SAME_IN_ALL_RUNS], sort_keys=True) for run in files.values()}
    if len(kinds) > 1:
        raise UserError(f"The runs in {out} are of {len(kinds)} starts or data sets; remove the odd ones.")
    runs: dict[str, dict[str, list[Run]]] = {}
    for name, seeds in whole.items():
        arms = plan["protocols"][name]["arms"]
        runs[name] = {arm: [files[result_file(name, arm, seed, out)] for seed in seeds] for arm in arms}
    return runs


def _check_content(run: Run, plan: dict[str, Any], wordings: Sequence[str], path: Path) -> None:
    """Raises UserError for data that are not the plan's, and for bits that are missing or do not fit the figures."""
    planned = plan.get("data_sha256", {})
    if any(run["data_sha256"].get(name) != sha256 for name, sha256 in planned.items()):
        raise UserError(f"{path} is a run on other data than the plan's (SHA-256); move it away.")
    for wording in wordings:
        for metric in METRICS:
            bits = run.get("bits", {}).get(wording, {}).get(metric, "")
            if len(bits) != run["lines"] or abs(bits.count("1") / len(bits) - run["metrics"][wording][metric]) > 1e-9:
                raise UserError(f"{path}: the bits of {wording} {metric} do not give its figure; repeat this run.")


def analyse(plan: dict[str, Any], out: Path) -> dict[str, Any]:
    """The planned figures, by protocol, then by wording. Raises UserError as `load` does."""
    runs = load(plan, out)
    seeds = whole_seeds(plan, out)
    train = {cell.out: trained_wording(setup) for cell, setup in planned_runs(plan, "", out)}
    figures: dict[str, Any] = {}
    for name, by_arm in runs.items():
        protocol, first = plan["protocols"][name], by_arm[BASELINE][0]
        figures[name] = {
            "seeds": seeds[name],
            "planned_seeds": len(protocol["seeds"]),
            "lines": first["lines"],
            "start": first["start"],
            "trained": train[result_file(name, BASELINE, seeds[name][0], out)],
            "weight": {arm: of_arm[0]["weight"] for arm, of_arm in by_arm.items()},
            "tokens": {arm: statistics.mean(run["cost"]["tokens"] for run in of_arm) for arm, of_arm in by_arm.items()},
            "wordings": {
                wording: _of_wording({arm: _answers(of_arm, wording) for arm, of_arm in by_arm.items()}, plan)
                for wording in setup_of(plan).wordings
            },
        }
    return figures


def _answers(runs: Sequence[Run], wording: str) -> Answers:
    return {
        metric: np.array([[int(bit) for bit in run["bits"][wording][metric]] for run in runs], dtype=np.float64)
        for metric in METRICS
    }


def _of_wording(answers: Mapping[str, Answers], plan: dict[str, Any]) -> dict[str, Any]:
    planned = [(arm, BASELINE) for arm in answers if arm != BASELINE]
    contrasts = [(one, other) for one, other in plan.get("contrasts") or [] if {one, other} <= answers.keys()]
    minus_sft = _differences(answers, planned, plan)
    figures = {
        "arms": {arm: _of_arm(of_arm) for arm, of_arm in answers.items()},
        "minus_sft": minus_sft,
        "contrasts": _differences(answers, contrasts, plan),
    }
    if set(plan["primary"]) >= STOPPING:
        figures["gain"] = {
            f"{one} - {other}": {
                "by_stopping": _decomposed(answers[one], answers[other], "stop_rate"),
                "by_start": _decomposed(answers[one], answers[other], "startswith"),
                "hypothesis": hypothesis(minus_sft[f"{one} - {other}"], plan["margin"]["metric"]),
            }
            for one, other in planned
        }
    return figures


def _of_arm(answers: Answers) -> dict[str, Any]:
    """Mean and sd over the seeds, by metric, in %; and the exact ones among the answers that stopped."""
    figures: dict[str, Any] = {}
    for metric, bits in answers.items():
        by_seed = 100 * bits.mean(axis=1)
        figures[metric] = {
            "mean": float(by_seed.mean()),
            "sd": float(by_seed.std(ddof=1)),
            "by_seed": by_seed.tolist(),
        }
    shares = exact_of_stopped(answers)
    some = shares[~np.isnan(shares)]
    figures["exact_of_stopped"] = {
        "mean": float(some.mean()) if len(some) else None,
        "sd": float(some.std(ddof=1)) if len(some) > 1 else None,
        "seeds": len(some),
        "stopped": int(answers["stop_rate"].sum()),
    }
    return figures


def exact_of_stopped(answers: Answers) -> NDArray[np.float64]:
    """[seeds], in %: the share of exact answers among those that stopped; NaN for a seed in which none did."""
    stopped = answers["stop_rate"].sum(axis=1)
    exact = (answers["exact"] * answers["stop_rate"]).sum(axis=1)
    return 100 * np.divide(exact, stopped, out=np.full(len(stopped), np.nan), where=stopped > 0)


def _differences(
    answers: Mapping[str, Answers], pairs: Sequence[tuple[str, str]], plan: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """One family of paired differences: "one - other" -> metric -> figures. Holm's p is over the pairs, by metric."""
    names, margin = [f"{one} - {other}" for one, other in pairs], plan["margin"]
    differences: dict[str, dict[str, Any]] = {name: {} for name in names}
    for metric in METRICS:
        for name, (one, other) in zip(names, pairs, strict=True):
            gains = 100 * (answers[one][metric] - answers[other][metric])
            differences[name][metric] = _difference(gains, num_tests=len(pairs))
            if metric in (*plan["primary"], margin["metric"]):  # 10,000 resamples each
                differences[name][metric]["hierarchical"] = hierarchical(gains)._asdict()
        corrected = holm({name: differences[name][metric]["p"] for name in names})
        for name in names:
            figures = differences[name][metric]
            figures["p_holm"] = corrected[name]
            figures["verdict"] = verdict(Interval(*figures["t_interval"].values()), corrected[name], margin["points"])
            if metric == margin["metric"]:
                figures["within_margin"] = within_margin(figures["by_seed"], margin["points"])
    for name, (one, other) in zip(names, pairs, strict=True):
        shares = exact_of_stopped(answers[one]) - exact_of_stopped(answers[other])
        differences[name]["exact_of_stopped"] = _interval_of_some(shares)
    return differences


def _difference(gains: NDArray[np.float64], *, num_tests: int) -> dict[str, Any]:
    """Figures of one difference. gains: [seeds, lines] in points; num_tests: the size of its family under Holm."""
    by_seed = gains.mean(axis=1)
    return {
        "by_seed": by_seed.tolist(),
        "t_interval": t_interval(by_seed)._asdict(),
        "p": t_test(by_seed),
        "detectable": detectable_difference(float(by_seed.std(ddof=1)), len(by_seed), num_tests=num_tests),
    }


def verdict(difference: Interval, p_holm: float, margin: float) -> str:
    """The word for a difference in points: "gain", "loss", "no gain" or "undecided".

    A gain or a loss is significant at 5 % after Holm's correction. "no gain": it is neither, and the 95 % interval ends
    below the margin, so a gain of that size is excluded.
    """
    if p_holm < 0.05:
        return "gain" if difference.estimate > 0 else "loss"
    return "no gain" if difference.high < margin else "undecided"


def within_margin(by_seed: Sequence[float], margin: float) -> str:
    """Two one-sided tests: "yes" if the 95 % interval is inside +- margin, "no" if it is outside, else "undecided"."""
    interval, is_within = equivalence(by_seed, margin, level=0.95)
    if is_within:
        return "yes"
    return "no" if interval.low >= margin or interval.high <= -margin else "undecided"


def hypothesis(differences: Mapping[str, Mapping[str, Any]], content: str) -> str:
    """Is the gain of this arm in exact a gain in stopping?

    "no gain": exact does not gain. "confirmed": the stop rate gains, too, and content is within the margin. "refuted":
    content is outside the margin, or the stop rate rises by less than exact does (its 95 % interval ends before
    that of exact begins). Else "undecided".
    """
    exact, stops = differences["exact"], differences["stop_rate"]
    same_content = differences[content]["within_margin"]
    if exact["verdict"] != "gain":
        return "undecided" if exact["verdict"] == "undecided" else "no gain"
    if same_content == "no" or stops["t_interval"]["high"] < exact["t_interval"]["low"]:
        return "refuted"
    return "confirmed" if same_content == "yes" and stops["verdict"] == "gain" else "undecided"


def _decomposed(answers: Answers, baseline: Answers, condition: str) -> dict[str, Any]:
    """The parts of the change of exact (see `parts_of_change`) over the seeds in which they are defined, in points."""
    parts = np.array(
        [
            parts_of_change(*of_seed)
            for of_seed in zip(
                answers["exact"], answers[condition], baseline["exact"], baseline[condition], strict=True
            )
        ]
    )
    change = (100 * (answers["exact"] - baseline["exact"])).mean(axis=1)  # as in `_differences`, to the last digit
    columns = {
        "change": np.where(np.isnan(parts[:, 0]), np.nan, change),
        "condition": 100 * parts[:, 0],
        "exact_given_it": 100 * parts[:, 1],
        "exact_without": 100 * parts[:, 2],
    }
    return {name: _interval_of_some(column) for name, column in columns.items()}


def parts_of_change(
    exact: NDArray[np.float64],
    condition: NDArray[np.float64],
    base_exact: NDArray[np.float64],
    base_condition: NDArray[np.float64],
) -> tuple[float, float, float]:
    """Splits the change of the share of exact answers. All arguments: [lines] of 0 and 1, of one seed.

    With a condition c (the answer stopped), P(exact) = P(c) P(exact | c) + P(exact, not c). The change of the product
    a b is divided evenly: (a1 - a0)(b1 + b0)/2 + (b1 - b0)(a1 + a0)/2, the Shapley values of its two factors.

    Returns the part of P(c), the part of P(exact | c), and the change of P(exact, not c). They sum to the change. NaN
    if no line of one arm fulfils c: then nothing is known of P(exact | c).
    """
    if not condition.any() or not base_condition.any():
        return (np.nan, np.nan, np.nan)
    share, base_share = condition.mean(), base_condition.mean()
    given, base_given = exact[condition == 1].mean(), base_exact[base_condition == 1].mean()
    without, base_without = (exact * (1 - condition)).mean(), (base_exact * (1 - base_condition)).mean()
    return (
        float((share - base_share) * (given + base_given) / 2),
        float((given - base_given) * (share + base_share) / 2),
        float(without - base_without),
    )


def _interval_of_some(by_seed: NDArray[np.float64]) -> dict[str, Any]:
    """The t interval over the seeds whose value is defined, and their number; None for fewer than two."""
    some = by_seed[~np.isnan(by_seed)]
    if len(some) < 2:
        return {"seeds": len(some), "t_interval": None}
    return {"seeds": len(some), "t_interval": t_interval(some)._asdict()}
