"""The tables and the report of `eval.robustness`. The sentences are in robustness_report.md.jinja."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..tasks import TASKS
from .groups import DEFINITIONS
from .inference import detectable_difference, show_p
from .tables import aligned_table, estimate_spread, sample_sd

Analysis = Mapping[str, Any]  # the result of `robustness_analysis.analyse`, as in results.json

SCATTER, PHRASING = "accuracy-worst.png", "phrasing.png"  # the plots that the report shows
TITLES = {
    "accuracy": "accuracy",
    "worst_of_k": "worst of k",
    "best_of_k": "best of k",
    "spread_in_groups": "spread in groups",
    "consistency": "consistency",
    "consistent_and_correct": "consistent and correct",
    "spread_of_wordings": "spread of wordings",
    "drop_rate": "drop rate",
}
IN_TERMINAL = ("accuracy", "worst_of_k", "consistency", "consistent_and_correct", "spread_of_wordings", "drop_rate")
EMBEDDING = {
    "cosine_within": "cosine of wordings of one request, centred",
    "cosine_between": "cosine of wordings of different requests, centred",
    "raw_cosine_within": "the same, not centred: one request",
    "raw_cosine_between": "the same, not centred: different requests",
    "recall_at_1": "nearest other prompt is a wording of the same request",
    "effective_rank": "effective rank of all prompts",
}
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def summary(analysis: Analysis, metrics: Sequence[str] = IN_TERMINAL) -> str:
    """A row for each model: % with 95 % intervals over groups, and mean ± sd over seeds if an arm has several."""
    rows = []
    for name in analysis["order"]:
        figures = analysis["models"][name]["metrics"]
        rows.append([name, *(_cell(figures[metric]) for metric in metrics)])
    return aligned_table(["%", *(TITLES[name] for name in metrics)], rows)


def differences(analysis: Analysis, metrics: Sequence[str] = IN_TERMINAL) -> str:
    """Each model minus the baseline, in points, with 95 % intervals over groups."""
    rows = []
    for name, pair in _pairs(analysis):
        rows.append([name, *(_cell(pair["metrics"][metric], "+") for metric in metrics)])
    return aligned_table([f"points, minus {analysis['baseline']}", *(TITLES[name] for name in metrics)], rows)


def report(analysis: Analysis) -> str:
    """report.md: the measurement, its figures, the differences between models, and what cannot be concluded."""
    runs = _all_runs(analysis)
    hashes = sorted((analysis["data_sha256"] or {}).items())
    return TEMPLATES.get_template("robustness_report.md.jinja").render(
        analysis=analysis,
        task=analysis["task"],
        metric=analysis["metric"],
        wordings=analysis["wordings"],
        environment=analysis["environment"],
        k=wordings_of_a_group(analysis),
        dropped=runs[0].get("dropped_as_known_from_train"),
        data=", ".join(f"`{name}` {sha256[:12]}" for name, sha256 in hashes),
        models="\n".join(_model_line(name, analysis["models"][name]["runs"]) for name in analysis["order"]),
        several_runs=most_runs(analysis) > 1,
        summary=summary(analysis, list(DEFINITIONS)),
        definitions=[(TITLES[name], definition) for name, definition in DEFINITIONS.items()],
        scatter=SCATTER,
        phrasing=PHRASING,
        by_wording=_by_wording(analysis),
        all_metrics=_all_metrics(analysis),
        differences=differences(analysis, list(DEFINITIONS)),
        mcnemar=_mcnemar(analysis),
        over_seeds=_over_seeds(analysis),
        embeddings=_embeddings(analysis),
        known_task=TASKS.get(analysis["task"]),
        zero_width_bound=_zero_width_bound(analysis),
        detectable=_detectable(analysis),
        several_templates=len({run.get("template_sha256") for run in runs}) > 1,
    )


def most_runs(analysis: Analysis) -> int:
    """The largest number of runs of an arm."""
    return max(len(model["runs"]) for model in analysis["models"].values())


def wordings_of_a_group(analysis: Analysis) -> str:
    return number_or_range(*analysis["k"])


def number_or_range(low: int, high: int) -> str:
    """ "3" if both are 3, "2 to 3" otherwise."""
    return str(low) if low == high else f"{low} to {high}"


# -- parts of the report -----------------------------------------------------------------------------------------------


def _all_runs(analysis: Analysis) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    for name in analysis["order"]:
        runs += analysis["models"][name]["runs"]
    return runs


def _pairs(analysis: Analysis) -> list[tuple[str, Any]]:
    """(name, comparison with the baseline) in the order of the models."""
    return [(name, analysis["comparisons"][name]) for name in analysis["order"] if name in analysis["comparisons"]]


def _model_line(name: str, runs: Sequence[dict[str, Any]]) -> str:
    sources = []
    for run in runs:
        source = f"`{run['model']['name']}`"
        if weights := run["model"].get("weights_sha256"):
            source += f" (weights {weights[:12]})"
        sources.append(source)
    return f"- **{name}**: {', '.join(sources)}"


def _by_wording(analysis: Analysis) -> str:
    rows = []
    for name in analysis["order"]:
        figures = analysis["models"][name]["wordings"]
        rows.append([name, *(_cell(figures[wording]) for wording in analysis["wordings"])])
    return aligned_table(["%", *analysis["wordings"]], rows)


def _all_metrics(analysis: Analysis) -> str:
    scores = list(analysis["models"][analysis["order"][0]]["scores"])
    rows = []
    for name in analysis["order"]:
        of_model = analysis["models"][name]["scores"]
        rows.append([name, *(_percent(of_model.get(score)) for score in scores)])
    return aligned_table(["%", *scores], rows)


def _embeddings(analysis: Analysis) -> str | None:
    names = [name for name in analysis["order"] if "embedding" in analysis["models"][name]]
    if not names:
        return None
    rows = []
    for key, title in EMBEDDING.items():
        rows.append([title, *(_number(analysis["models"][name]["embedding"][key]) for name in names)])
    return aligned_table(["", *names], rows)


def _mcnemar(analysis: Analysis) -> str | None:
    rows = []
    for name, pair in _pairs(analysis):
        for wording, test in pair["mcnemar"].items():
            counts = [str(test["only_model"]), str(test["only_baseline"])]
            rows.append([f"{name}, {wording}", *counts, show_p(test["p"]), show_p(test["p_holm"])])
    if not rows:
        return None
    return aligned_table(["", "right alone", f"{analysis['baseline']} alone", "p", f"p, Holm of {len(rows)}"], rows)


def _over_seeds(analysis: Analysis) -> str | None:
    rows = []
    for name, pair in _pairs(analysis):
        for metric, test in pair["over_seeds"].items():
            by_run = ", ".join(f"{100 * value:+.1f}" for value in test["by_seed"])
            intervals = [_cell(test["t"], "+"), _cell(test["crossed"], "+")]
            p_values = [show_p(test["p"]), show_p(test["p_holm"])]
            rows.append([f"{name}, {TITLES[metric]}", by_run, *intervals, *p_values])
    if not rows:
        return None
    return aligned_table(["", "by run", "Student 95 %", "crossed 95 %", "p", f"p, Holm of {len(rows)}"], rows)


def _zero_width_bound(analysis: Analysis) -> float | None:
    """The largest rate, in per cent, that 0 hits in all groups leave possible (one-sided 95 %); None if every interval
    has a width or is not at 0 or 100 %."""
    for model in analysis["models"].values():
        for metric in ("accuracy", "worst_of_k"):
            low, high = model["metrics"][metric]["low"], model["metrics"][metric]["high"]
            if low == high and low in (0, 1):
                return 100 * (1 - 0.05 ** (1 / analysis["counted_groups"]))
    return None


def _detectable(analysis: Analysis) -> list[dict[str, Any]]:
    """For each comparison: the pairs of runs, their spread, and the difference in accuracy they can detect, in points.

    `reach` is None if the arms do not have equally many runs, two or more.
    """
    pairs = _pairs(analysis)
    num_tests = sum(len(pair["over_seeds"]) for _, pair in pairs)
    rows: list[dict[str, Any]] = []
    for name, pair in pairs:
        over_seeds = pair["over_seeds"].get("accuracy")
        if over_seeds is None:
            rows.append({"name": name, "reach": None})
            continue
        num_runs, sd = len(over_seeds["by_seed"]), statistics.stdev(over_seeds["by_seed"])
        reach = detectable_difference(sd, num_runs, num_tests=num_tests)
        rows.append({"name": name, "num_runs": num_runs, "sd": 100 * sd, "reach": 100 * reach})
    return rows


# -- cells -------------------------------------------------------------------------------------------------------------


def _cell(figure: Mapping[str, Any] | None, sign: str = "") -> str:
    """An estimate in per cent, with its spread over runs and its interval, if it has them."""
    if figure is None or figure["estimate"] is None:
        return "-"
    sd = sample_sd([value for value in figure.get("by_seed", ()) if value is not None])
    if sd is not None:
        sd = 100 * sd
    shown = estimate_spread(_in_percent(figure["estimate"]), sd, f"{sign}.1f")
    if figure["low"] is None:
        return shown
    return f"{shown} [{_percent(figure['low'], sign)}, {_percent(figure['high'], sign)}]"


def _percent(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{_in_percent(value):{sign}.1f}"


def _in_percent(value: float) -> float:
    return 100 * value + 0.0  # + 0.0 turns -0.0 into 0.0


def _number(figure: Mapping[str, Any]) -> str:
    shown = estimate_spread(figure["estimate"], sample_sd(figure["by_seed"]), ".2f")
    if figure["low"] is None:
        return shown
    return f"{shown} [{figure['low']:.2f}, {figure['high']:.2f}]"
