"""The plan's analysis of the runs on test: both jobs of every arm, the equivalence tests, the frontier."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.core.files import written_whole
from llm_jepa.core.json_files import read_json

from ...figures.inference import detectable_difference, holm, p_not_worse, show_p, t_interval
from ...figures.tables import markdown_table, mean_spread
from .runs import result_file

Result = dict[str, Any]
Figures = dict[str, Any]
METRICS = ("recall_at_1", "recall_at_10", "mrr")
TWO = "two specialists"
SAME_IN_ALL_RUNS = ("data_sha256", "lines", "start", "start_sha256", "part")
READOUT_TITLES = {"views": "", "mean": " (mean of the bare text)", "specialist": ""}


def analyse(plan: dict[str, Any], out: Path) -> Figures:
    """By data set: arms -> figures by seed, and for nl_rx the tests of the plan.

    All are over the seeds that every arm has, in points or shares of 100. A data set without two whole seeds is left
    out; raises UserError if none is left, or if runs do not belong together.
    """
    figures: Figures = {}
    for name, of_job in plan["jobs"].items():
        runs, seeds = _whole_seeds(name, of_job, out)
        if len(seeds) < 2:
            continue
        arms = _arms(runs)
        figures[name] = {"seeds": seeds, "planned_seeds": len(of_job["seeds"]), "lines": runs["sft"][0]["lines"]}
        figures[name] |= {"arms": arms, "frontier": frontier(arms)}
        if name == plan["selection"]["job"]:
            weights = [arm for arm in of_job["arms"] if arm.startswith("jepa")]
            figures[name]["tests"] = {"margins": plan["margins"], "arms": _tests(arms, weights, plan["margins"])}
    if not figures:
        raise UserError(f"{out} holds no data set with two whole seeds; run compare first.")
    return figures


def has_whole_seeds(plan: dict[str, Any], out: Path) -> bool:
    """Whether there is a data set of which two seeds have a result file for every arm."""
    return any(len(_seeds_and_paths(name, of_job, out)[0]) >= 2 for name, of_job in plan["jobs"].items())


def _seeds_and_paths(name: str, of_job: Mapping[str, Any], out: Path) -> tuple[list[int], dict[tuple[str, int], Path]]:
    paths = {(arm, seed): result_file(name, arm, seed, out) for arm in of_job["arms"] for seed in of_job["seeds"]}
    return [seed for seed in of_job["seeds"] if all(paths[arm, seed].is_file() for arm in of_job["arms"])], paths


def _whole_seeds(name: str, of_job: Mapping[str, Any], out: Path) -> tuple[dict[str, list[Result]], list[int]]:
    """(arm -> results by seed, the seeds that every arm has)."""
    seeds, paths = _seeds_and_paths(name, of_job, out)
    runs = {arm: [read_json(paths[arm, seed], is_finite=False) for seed in seeds] for arm in of_job["arms"]}
    kinds = set()
    for run in itertools.chain.from_iterable(runs.values()):
        shared = {key: value for key, value in run["setup"].items() if key != "options"}
        kinds.add(json.dumps([shared, *(run[key] for key in SAME_IN_ALL_RUNS)], sort_keys=True))
    if len(kinds) > 1:
        raise UserError(f"The {name} runs in {out} are of {len(kinds)} settings or data sets; remove the odd ones.")
    return runs, seeds


def _arms(runs: Mapping[str, list[Result]]) -> dict[str, Figures]:
    """Arm, with its read-out if it has two, -> figures by seed. "two specialists" is put together from two arms."""
    arms: dict[str, Figures] = {}
    for arm, results in runs.items():
        for readout in results[0]["retrieval"]:
            if readout == "mean" and arm != "sft":
                continue  # the read-out that was not trained; the result files keep it
            arms[arm + READOUT_TITLES[readout]] = {
                "right": [100 * _right(result) for result in results],
                **{metric: [100 * _found(result, readout, metric) for result in results] for metric in METRICS},
                "request_to_request": [
                    100 * _found(result, readout, "recall_at_1", to_answers=False) for result in results
                ],
                "tokens": statistics.mean(result["cost"]["tokens"] for result in results),
                "bytes_to_serve": results[0]["bytes_to_serve"],
            }
    answers, search = arms["sft"], arms["contrastive"]
    both = {name: answers[name] + search[name] for name in ("tokens", "bytes_to_serve")}
    return arms | {TWO: {**search, **both, "right": answers["right"]}}


def _right(result: Result) -> float:
    """The share of right answers, mean over the wordings."""
    by_wording = {wording: of for wording, of in result["generation"].items() if wording != "both"}
    return statistics.mean(of["equivalent"] for of in by_wording.values())


def _found(result: Result, readout: str, metric: str, *, to_answers: bool = True) -> float:
    """The mean over the searches for answers, or over those for other requests."""
    by_search = result["retrieval"][readout]
    return statistics.mean(of[metric] for name, of in by_search.items() if name.endswith(" to answer") == to_answers)


def _tests(arms: Mapping[str, Figures], weights: Sequence[str], margins: Mapping[str, float]) -> dict[str, Figures]:
    """For every weight: differences to the two specialists by seed, one-sided p, and Holm's p of the larger one."""
    tests: dict[str, Figures] = {}
    for arm in weights:
        tests[arm] = {"share_of_tokens": arms[arm]["tokens"] / arms[TWO]["tokens"]}
        for metric, margin in margins.items():
            gaps = [a - b for a, b in zip(arms[arm][metric], arms[TWO][metric], strict=True)]
            tests[arm][metric] = {
                "by_seed": gaps,
                "interval_90": t_interval(gaps, level=0.90)._asdict(),  # its low end is the one-sided bound at 5 %
                "p_not_worse": p_not_worse(gaps, margin),
                "detectable": detectable_difference(statistics.stdev(gaps), len(gaps), num_tests=len(weights)),
            }
    adjusted = holm({arm: max(tests[arm][metric]["p_not_worse"] for metric in margins) for arm in weights})
    for arm, p in adjusted.items():
        tests[arm] |= {"p_holm": p, "passes": p <= 0.05}
    return tests


def frontier(arms: Mapping[str, Figures]) -> list[str]:
    """The single models that no other one equals or beats in both jobs, by the means."""
    single = {arm: figures for arm, figures in arms.items() if arm != TWO}
    points = {arm: [statistics.mean(of[job]) for job in ("right", "recall_at_1")] for arm, of in single.items()}

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return one != other and all(a >= b for a, b in zip(one, other, strict=True))

    return [arm for arm, point in points.items() if not any(beats(other, point) for other in points.values())]


def table(figures: Figures) -> str:
    """Markdown: the arms of every data set, then the tests."""
    return "\n\n".join([*(arms_table(name, of_job) for name, of_job in figures.items()), tests_table(figures)])


def arms_table(name: str, of_job: Figures) -> str:
    """Markdown: both jobs of every arm of a data set, mean and sd over seeds, and what it costs."""
    rows = []
    fewest = min(of["tokens"] for of in of_job["arms"].values())
    for arm, of in of_job["arms"].items():
        spread = [mean_spread(of[key]) for key in ("right", *METRICS, "request_to_request")]
        cost = [f"{of['tokens'] / fewest:.2f}", f"{of['bytes_to_serve'] / 1e6:,.0f} MB"]
        rows.append([arm, *spread, *cost, "yes" if arm in of_job["frontier"] else ""])
    header = [name, "right answers", "R@1", "R@10", "MRR", "R@1 request → request", "tokens", "to serve", "frontier"]
    return markdown_table(header, rows)


def tests_table(figures: Figures) -> str:
    """Markdown: every weight against the two specialists."""
    rows = []
    for of_job in figures.values():
        for arm, test in of_job.get("tests", {"arms": {}})["arms"].items():
            cells = []
            for metric in of_job["tests"]["margins"]:
                one = test[metric]
                estimate, low, high = one["interval_90"].values()
                cells += [f"{estimate:+.1f} ({low:+.1f} to {high:+.1f})", show_p(one["p_not_worse"])]
            verdict = "holds" if test["passes"] else "not shown"
            rows.append([arm, *cells, show_p(test["p_holm"]), f"{test['share_of_tokens']:.2f}", verdict])
    header = ["against two specialists", "right answers", "p", "R@1", "p", "p (Holm, both)", "tokens", "hypothesis"]
    return markdown_table(header, rows)


def draw(figures: Figures, path: Path) -> None:
    """Draw right answers against recall@1: a dot a seed, a large mark the mean; one panel a data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ...figures.robustness_plots import COLOURS, MARKERS

    figure, axes = plt.subplots(1, len(figures), figsize=(6.2 * len(figures), 5.4), layout="constrained", squeeze=False)
    for axis, (name, of_job) in zip(axes[0], figures.items(), strict=True):
        styles = zip(of_job["arms"].items(), itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
        for (arm, of), colour, marker in styles:
            x, y = of["recall_at_1"], of["right"]
            is_pair = arm == TWO
            axis.plot(x, y, marker, color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
            axis.plot(
                [statistics.mean(x)], [statistics.mean(y)], marker, color=colour, markersize=10, label=arm,
                markerfacecolor="white" if is_pair else colour, markeredgewidth=2 if is_pair else 0.8,
                markeredgecolor=colour if is_pair else "white",
            )  # fmt: skip
        axis.set(xlabel="search: recall@1 of request → answer, %", ylabel="right answers, %", title=name)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
