"""The plan's analysis of the confirmatory runs, its tables and its picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jepa import UserError
from llm_jepa.core.files import written_whole
from llm_jepa.core.json_files import read_json

from ...figures.inference import detectable_difference, equivalence, hierarchical, holm, show_p, t_interval, t_test
from ...figures.tables import estimate_spread, markdown_table, mean_spread
from . import RESULTS
from .data import WORDINGS

CONFIRMED = RESULTS / "confirm"
METRICS = ("equivalent", "exact", "startswith", "contains", "stop_rate")
SAME_IN_ALL_RUNS = ("data_sha256", "base_sha256", "settings", "part", "lines")
Runs = dict[tuple[str, int], dict[str, Any]]  # (arm, seed) -> result file


def confirmed(plan: dict[str, Any], folder: Path = CONFIRMED) -> Runs:
    """The result files of the seeds for which every arm is there, in the plan's order.

    Raises UserError for fewer than two such seeds, and for runs that do not belong together.
    """
    paths = {(arm, seed): folder / f"{arm}-seed{seed}.json" for arm in plan["arms"] for seed in plan["seeds"]}
    missing = {seed for (_, seed), path in paths.items() if not path.is_file()}
    seeds = [seed for seed in plan["seeds"] if seed not in missing]
    if len(seeds) < 2:
        raise UserError(f"{folder} holds {len(seeds)} whole seed(s) of {plan['arms']}; run confirm first.")
    runs = {key: read_json(path, is_finite=False) for key, path in paths.items() if key[1] in seeds}
    kinds = set()
    for run in runs.values():
        kinds.add(json.dumps([run[name] for name in SAME_IN_ALL_RUNS], sort_keys=True))
    if len(kinds) > 1:
        raise UserError(f"The runs in {folder} are of {len(kinds)} data sets, bases or settings; remove the odd ones.")
    return runs


def analyse(plan: dict[str, Any], folder: Path = CONFIRMED) -> dict[str, Any]:
    """The plan's analysis of the seeds for which every arm is there. Differences are in points of turk equality.

    Primary: the difference `plan["primary"]` with its hierarchical interval (seeds and lines), the paired t test over
    seeds, and the equivalence test at the plan's margin. The other comparisons are secondary, with Holm's p over them.
    """
    runs = confirmed(plan, folder)
    seeds = sorted({seed for _, seed in runs}, key=plan["seeds"].index)
    correct = {key: _bits(run) for key, run in runs.items()}

    def gains(one: str, other: str) -> np.ndarray:
        """[seeds, lines] in points."""
        return 100.0 * np.stack([correct[one, seed] - correct[other, seed] for seed in seeds])

    margin, planned = plan["margin_points"], plan["secondary"]
    facts = read_json(folder.parent / "test_lines.json", is_finite=False)
    secondary = {
        f"{one} - {other}": _comparison(gains(one, other), margin, num_tests=len(planned)) for one, other in planned
    }
    for name, p in holm({name: figures["p"] for name, figures in secondary.items()}).items():
        secondary[name]["p_holm"] = p
    return {
        "seeds": seeds,
        "lines": runs[plan["arms"][0], seeds[0]]["lines"],
        "arms": {arm: _figures_of_arm([runs[arm, seed] for seed in seeds]) for arm in plan["arms"]},
        "sensitivity": _sensitivity(gains(*plan["primary"]), facts),
        "primary": {"arms": plan["primary"], **_comparison(gains(*plan["primary"]), margin, num_tests=1)},
        "secondary": secondary,
    }


def _bits(run: dict[str, Any]) -> np.ndarray:
    """[lines]: 1 for a turk request answered with the right language, else 0."""
    return np.array([int(bit) for bit in run["correct"]["turk"]])


def _figures_of_arm(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """[mean, sd] over the seeds of an arm, by name of the figure."""
    values: dict[str, list[float]] = {}
    for wording in WORDINGS:
        for metric in METRICS:
            values[f"{wording} {metric}"] = [run["metrics"][wording][metric] for run in runs]
    for name in ("consistent", "consistent_and_correct"):
        values[name] = [run["metrics"]["both"][name] for run in runs]
    for name in ("steps", "tokens"):
        values[name] = [run["cost"][name] for run in runs]
    return {name: [statistics.mean(by_seed), statistics.stdev(by_seed)] for name, by_seed in values.items()}


def _comparison(gains: np.ndarray, margin: float, *, num_tests: int) -> dict[str, Any]:
    """All figures of one difference. gains: [seeds, lines] in points; num_tests: the size of its family under Holm."""
    by_seed = gains.mean(axis=1)
    same = equivalence(by_seed, margin)
    return {
        "by_seed": [round(value, 2) for value in by_seed.tolist()],
        "hierarchical": hierarchical(gains)._asdict(),
        "t_interval": t_interval(by_seed)._asdict(),
        "p": t_test(by_seed),
        "equivalence": {"interval_90": same.interval._asdict(), "within_margin": same.equivalent},
        "detectable": detectable_difference(float(by_seed.std(ddof=1)), len(by_seed), num_tests=num_tests),
    }


def _sensitivity(gains: np.ndarray, facts: dict[str, list[Any]]) -> dict[str, Any]:
    """Two checks outside the plan, of the primary difference.

    Does it come from the lines whose language the base has seen? Does it come from the few languages with many lines?
    """
    in_base = np.array(facts["in_base"])
    languages, language_of_line = np.unique(facts["language"], return_inverse=True)
    lines_of_language = np.bincount(language_of_line)
    # [seeds, languages]: the mean over the lines of a language
    by_language = np.stack([np.bincount(language_of_line, row) / lines_of_language for row in gains])
    return {
        "language not in base": hierarchical(gains[:, ~in_base])._asdict(),
        "lines of a language not in base": int((~in_base).sum()),
        "each language once": hierarchical(by_language)._asdict(),
        "languages": len(languages),
    }


COLUMNS = {
    "turk equivalent": "turk equal language",
    "turk exact": "turk exact",
    "turk startswith": "turk startswith",
    "turk stop_rate": "turk stops",
    "synth equivalent": "synth equal language",
    "consistent": "same answer to both",
}


def table(figures: dict[str, Any]) -> str:
    """Markdown: the arms, then the planned differences."""
    return f"{_arms_table(figures['arms'])}\n\n{_differences_table(figures)}"


def _arms_table(arms: dict[str, dict[str, list[float]]]) -> str:
    rows = []
    for arm, values in arms.items():
        cells = [f"{values['steps'][0]:.0f}", f"{values['tokens'][0] / 1000:,.0f}k"]
        for name in COLUMNS:
            mean, sd = values[name]
            cells.append(estimate_spread(100 * mean, 100 * sd))
        rows.append([arm, *cells])
    return markdown_table(["arm", "steps", "tokens", *COLUMNS.values()], rows)


def _differences_table(figures: dict[str, Any]) -> str:
    primary = figures["primary"]
    rows = [_difference_row(f"**{' - '.join(primary['arms'])}** (primary)", primary, show_p(primary["p"]))]
    for name, difference in figures["secondary"].items():
        rows.append(_difference_row(name, difference, f"{show_p(difference['p_holm'])} (Holm)"))
    header = ["turk, equal language, points", "", "95 %, seeds (t)", "seeds and lines", "p", "by seed", "detectable"]
    return markdown_table(header, rows, align="lrrrrlr")


def _difference_row(name: str, difference: dict[str, Any], p: str) -> list[str]:
    by_seeds, crossed = difference["t_interval"], difference["hierarchical"]
    return [
        name,
        f"{by_seeds['estimate']:+.1f}",
        f"{by_seeds['low']:+.1f} to {by_seeds['high']:+.1f}",
        f"{crossed['low']:+.1f} to {crossed['high']:+.1f}",
        p,
        ", ".join(f"{gain:+.1f}" for gain in difference["by_seed"]),
        f"{difference['detectable']:.1f}",
    ]


def space_table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: similarity, log-probability and votes on the same samples; a row for each arm, over its runs."""
    header = ["arm", "greedy", "8 samples: any right"]
    header += ["picked by similarity", "by log-probability a token", "by vote"]
    header += ["abstention, AURC: similarity", "log-probability a token", "vote"]
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        figures = [_space_figures(run["space"]) for run in runs if run["arm"] == arm]
        rows.append([arm, *map(mean_spread, zip(*figures, strict=True))])
    return markdown_table(header, rows)


def _space_figures(space: dict[str, Any]) -> list[float]:
    """One run's figures in %, in the order of the columns of `space_table`."""
    scores = ("similarity", "log_probability", "votes")
    shares = [space["greedy"], space["any_sample"]]
    shares += [space["reranked"][score] for score in scores]
    shares += [space["abstention"][score]["aurc"] for score in scores]
    return [100 * share for share in shares]


def draw(runs: Runs, path: Path) -> None:
    """Draw every run as a dot: its score on turk, and its gain over `rewriting` of the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    turk = {key: 100 * run["metrics"]["turk"]["equivalent"] for key, run in runs.items()}
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    seeds = sorted({seed for _, seed in runs})
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(arms) + 1.8), layout="constrained", sharey=True)
    for row, arm in enumerate(arms):
        scores = [turk[arm, seed] for seed in seeds]
        gains = [turk[arm, seed] - turk["rewriting", seed] for seed in seeds]
        color = "#d55e00" if arm == "info_nce" else "#0072b2"
        for axis, values in zip(axes, (scores, gains), strict=True):
            axis.plot(values, [row] * len(values), "o", color=color, alpha=0.35, markersize=6, markeredgewidth=0)
            axis.plot([statistics.mean(values)], [row], "|", color=color, markersize=22, markeredgewidth=2.5)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="turk requests answered with the right language, %", title="A dot a seed, a bar the mean")
    axes[1].set(xlabel="points", title="Minus rewriting of the same seed")
    axes[1].axvline(0, color="0.6", linewidth=1)
    for axis in axes:
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
