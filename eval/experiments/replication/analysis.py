"""The plan's analysis of the runs on test, and its tables."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jepa import UserError
from llm_jepa.core.json_files import read_json

from ...figures.inference import detectable_difference, hierarchical, holm, show_p, t_interval, t_test
from ...figures.tables import estimate_spread, markdown_table
from .runs import result_file

WORDINGS = ("synth", "turk")
METRICS = ("startswith", "exact", "contains", "stop_rate", "equivalent")

# Differences outside the plan: to plain SFT with as many tokens as the views cost, and right against wrong targets.
CONTROLS = (
    ("cosine", "sft_flops"),
    ("info_nce", "sft_flops"),
    ("vicreg", "sft_flops"),
    ("sigreg", "sft_flops"),
    ("info_nce", "mismatched"),
)
TITLES = {"sft_flops": "sft, equal tokens"}  # of arms whose name is not their title
SAME_IN_ALL_RUNS = ("data_sha256", "lines", "steps", "learning_rate", "start", "part")

# arXiv:2509.14252, NL-RX-SYNTH, mean +- sd over 5 seeds: (metric, regular, LLM-JEPA with cosine); labels on every
# non-pad token. From random weights (table 2, a Llama-3.2-1B shape) startswith, else (table 12) exact match.
PUBLISHED = {
    "": ("startswith", "54.38 ± 1.70", "60.59 ± 1.01"),
    "meta-llama/Llama-3.2-1B-Instruct": ("exact", "57.29 ± 5.32", "71.46 ± 1.34"),
    "google/gemma-2-2b-it": ("exact", "33.65 ± 3.24", "43.12 ± 2.61"),
    "apple/OpenELM-1_1B-Instruct": ("exact", "12.07 ± 1.81", "25.40 ± 2.40"),
    "allenai/OLMo-2-0425-1B-Instruct": ("exact", "87.09 ± 0.36", "87.52 ± 0.29"),
}


def analyse(plan: dict[str, Any], out: Path) -> dict[str, Any]:
    """By protocol: mean and sd of every arm, its difference to sft in points, and the differences CONTROLS.

    All are over the seeds that every arm has. Raises UserError if there are fewer than two such seeds, or if some runs
    do not belong together.
    """
    figures: dict[str, Any] = {}
    for name, protocol in plan["protocols"].items():
        by_arm, seeds = _runs_by_arm(name, protocol, out)
        first = by_arm["sft"][0]
        figures[name] = {
            "seeds": seeds,
            "lines": first["lines"],
            "start": first["start"],
            "arms": {arm: _figures_of_arm(runs) for arm, runs in by_arm.items()},
            "minus_sft": _differences(by_arm, [(arm, "sft") for arm in protocol["arms"][1:]]),
            "controls": _differences(by_arm, [pair for pair in CONTROLS if set(pair) <= set(by_arm)]),
        }
    return figures


def _runs_by_arm(name: str, protocol: dict[str, Any], out: Path) -> tuple[dict[str, list[dict[str, Any]]], list[int]]:
    """(arm -> its result files by seed, the seeds that every arm has). Raises UserError."""
    runs, missing = {}, set()
    for arm, seed in itertools.product(protocol["arms"], protocol["seeds"]):
        path = result_file(name, arm, seed, out)
        if path.is_file():
            runs[arm, seed] = read_json(path, is_finite=False)
        else:
            missing.add(seed)
    seeds = [seed for seed in protocol["seeds"] if seed not in missing]
    if len(seeds) < 2:
        raise UserError(f"{out} holds {len(seeds)} whole seed(s) of protocol {name}; run compare first.")
    kinds = set()
    for (arm, _), run in runs.items():
        kinds.add(json.dumps([run[key] for key in SAME_IN_ALL_RUNS], sort_keys=True))
        if run["weight"] != runs[arm, seeds[0]]["weight"]:
            kinds.add(f"{arm} {run['weight']}")
    if len(kinds) > 1:
        raise UserError(f"The {name} runs in {out} are of {len(kinds)} settings or data sets; remove the odd ones.")
    return {arm: [runs[arm, seed] for seed in seeds] for arm in protocol["arms"]}, seeds


def _figures_of_arm(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """[mean, sd] over the seeds of an arm, by name of the figure; and its weight."""
    values = {}
    for wording, metric in itertools.product(WORDINGS, METRICS):
        values[f"{wording} {metric}"] = [run["metrics"][wording][metric] for run in runs]
    values["tokens"] = [run["cost"]["tokens"] for run in runs]
    figures: dict[str, Any] = {
        name: [statistics.mean(by_seed), statistics.stdev(by_seed)] for name, by_seed in values.items()
    }
    return {**figures, "weight": runs[0]["weight"]}


def _differences(
    by_arm: dict[str, list[dict[str, Any]]], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """One family of paired differences: "one - other" -> wording -> figures. Holm's p is within a wording."""
    differences: dict[str, dict[str, dict[str, Any]]] = {f"{one} - {other}": {} for one, other in pairs}
    for wording in WORDINGS:
        p = {}
        for one, other in pairs:
            figures = _minus(by_arm[one], by_arm[other], wording, num_tests=len(pairs))
            differences[f"{one} - {other}"][wording] = figures
            p[f"{one} - {other}"] = figures["p"]
        for name, p_holm in holm(p).items():
            differences[name][wording]["p_holm"] = p_holm
    return differences


def _minus(
    runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], wording: str, *, num_tests: int
) -> dict[str, Any]:
    """Differences paired by seed, in points.

    The one in startswith has a t interval, the one in equal language a hierarchical interval.
    """
    gains, gains_by_line = [], []
    for run, base in zip(runs, baseline, strict=True):
        gains.append(100 * (run["metrics"][wording]["startswith"] - base["metrics"][wording]["startswith"]))
        gains_by_line.append(_bits(run, wording) - _bits(base, wording))
    return {
        "startswith_by_seed": gains,
        "startswith": t_interval(gains)._asdict(),
        "p": t_test(gains),
        "equivalent": hierarchical(100.0 * np.stack(gains_by_line))._asdict(),
        "detectable": detectable_difference(statistics.stdev(gains), len(gains), num_tests=num_tests),
    }


def _bits(run: dict[str, Any], wording: str) -> np.ndarray:
    """[lines]: 1 for an answer of the right language, else 0."""
    return np.array([int(bit) for bit in run["correct"][wording]])


def seeds_of(figures: dict[str, Any], plan: dict[str, Any]) -> str:
    return ", ".join(
        f"{len(of_protocol['seeds'])} of {len(plan['protocols'][protocol]['seeds'])} seeds under {protocol}"
        for protocol, of_protocol in figures.items()
    )


COLUMNS = (
    "synth startswith", "synth exact", "synth contains", "synth stop_rate", "synth equivalent",
    "turk startswith", "turk equivalent",
)  # fmt: skip


def table(figures: dict[str, Any]) -> str:
    """Markdown: a row for each arm, with the published figure if there is one, then the differences between arms."""
    return f"{_arms_table(figures)}\n\n{_differences_table(figures)}"


def _arms_table(figures: dict[str, Any]) -> str:
    rows = []
    for protocol, of_protocol in figures.items():
        published = _published(protocol, of_protocol["start"])
        for arm, values in of_protocol["arms"].items():
            cells = [protocol, TITLES.get(arm, arm), f"{values['weight']:g}"]
            for name in COLUMNS:
                mean, sd = values[name]
                cells.append(estimate_spread(100 * mean, 100 * sd))
            rows.append([*cells, published.get(arm, "")])
    return markdown_table(["labels", "arm", "weight", *COLUMNS, "published"], rows, align="ll" + "r" * 9)


def _published(protocol: str, start: str) -> dict[str, str]:
    """Arm -> its published figure, if there is one for this start and protocol."""
    if protocol != "paper" or start not in PUBLISHED:
        return {}
    metric, sft, cosine = PUBLISHED[start]
    return {"sft": f"{sft} {metric}", "cosine": f"{cosine} {metric}"}


def _differences_table(figures: dict[str, Any]) -> str:
    rows = []
    for family, note in (("minus_sft", ""), ("controls", ", not planned")):
        for protocol, of_protocol in figures.items():
            for name, by_wording in of_protocol[family].items():
                title = " - ".join(TITLES.get(arm, arm) for arm in name.split(" - "))
                cells = [*_difference_cells(by_wording["synth"]), *_difference_cells(by_wording["turk"])]
                rows.append([protocol + note, title, *cells])
    header = ["labels", "difference in startswith", "synth", "p (Holm)", "detectable", "turk", "p (Holm)", "detectable"]
    return markdown_table(header, rows, align="ll" + "r" * 6)


def _difference_cells(difference: dict[str, Any]) -> list[str]:
    mean, low, high = difference["startswith"].values()
    return [
        f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
        show_p(difference["p_holm"]),
        f"{difference['detectable']:.1f}",
    ]
