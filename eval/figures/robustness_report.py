"""What `eval.robustness` found, for people: tables, a report that says what cannot be concluded, and two plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm_jepa import UserError

from ..tasks import TASKS
from .groups import DEFINITIONS
from .inference import detectable_difference, show_p
from .tables import aligned_table, estimate_spread, sample_sd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCATTER, PHRASING = "accuracy-worst.png", "phrasing.png"
# Okabe and Ito's colours, which colour-blind readers tell apart; markers for those who print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# -- report ------------------------------------------------------------------------------------------------------------

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
SHOWN = ("accuracy", "worst_of_k", "consistency", "consistent_and_correct", "spread_of_wordings", "drop_rate")
EMBEDDING = {
    "cosine_within": "cosine of wordings of one request, centred",
    "cosine_between": "cosine of wordings of different requests, centred",
    "raw_cosine_within": "the same, not centred: one request",
    "raw_cosine_between": "the same, not centred: different requests",
    "recall_at_1": "nearest other prompt is a wording of the same request",
    "effective_rank": "effective rank of all prompts",
}


def summary(analysis: Mapping[str, Any], metrics: Sequence[str] = SHOWN) -> str:
    """A model a row, % with 95 % intervals over groups; mean +- sd over seeds where an arm has several."""
    return aligned_table(
        ["%", *(TITLES[name] for name in metrics)],
        [
            [name, *(_cell(analysis["models"][name]["metrics"][metric]) for metric in metrics)]
            for name in analysis["order"]
        ],
    )


def differences(analysis: Mapping[str, Any], metrics: Sequence[str] = SHOWN) -> str:
    """Each model minus the baseline, in points, with 95 % intervals over groups."""
    return aligned_table(
        [f"points, minus {analysis['baseline']}", *(TITLES[name] for name in metrics)],
        [[name, *(_cell(pair["metrics"][metric], "+") for metric in metrics)] for name, pair in _in_order(analysis)],
    )


def report(analysis: Mapping[str, Any]) -> str:
    """report.md: what was measured, figures, differences, and what cannot be concluded."""
    task, metric, order = analysis["task"], analysis["metric"], analysis["order"]
    known = TASKS.get(task)
    parts = [
        f"# Robustness to wording: {task}",
        _measured(analysis),
        "## Figures",
        "Per cent, with 95 % bootstrap intervals over groups"
        + (" (`±`: sample standard deviation over training runs)." if _num_runs(analysis) > 1 else "."),
        summary(analysis, list(DEFINITIONS)),
        "\n".join(f"- **{TITLES[name]}**: {text}." for name, text in DEFINITIONS.items()),
        f"![Accuracy against the worst of {_k(analysis)} wordings]({SCATTER})",
        "## Accuracy by wording",
        aligned_table(
            ["%", *analysis["wordings"]],
            [[name, *(_cell(analysis["models"][name]["wordings"][w]) for w in analysis["wordings"])] for name in order],
        ),
        f"![Accuracy of each wording]({PHRASING})",
        "## All metrics of the task",
        f"Mean over a group's wordings, then over groups, in per cent. `{metric}` is the one used above.",
        aligned_table(
            ["%", *(scores := list(analysis["models"][order[0]]["scores"]))],
            [[name, *(_percent(analysis["models"][name]["scores"].get(s)) for s in scores)] for name in order],
        ),
    ]
    if analysis["comparisons"]:
        parts += _differences_part(analysis)
    embedded = [name for name in order if "embedding" in analysis["models"][name]]
    if embedded:
        parts += [
            "## Where the prompts lie",
            "The prompts embedded by `llm-jepa embed` (the context view, read as the model was trained to read it).",
            aligned_table(
                ["", *embedded],
                [
                    [title, *(_number(analysis["models"][name]["embedding"][key]) for name in embedded)]
                    for key, title in EMBEDDING.items()
                ],
            ),
        ]
    if known is not None:
        parts += ["## Beside published figures", f"Published: {known.published}.\n\nTrap of the evaluator that made "
                  f"it: {known.trap}."]  # fmt: skip
    parts += ["## What cannot be concluded", "\n".join(f"- {sentence}" for sentence in caveats(analysis))]
    return "\n\n".join(parts) + "\n"


def caveats(analysis: Mapping[str, Any]) -> list[str]:
    """What this very measurement leaves open, with its own numbers."""
    low, high = analysis["k"]
    found = [
        f"Anything about other rewordings: these are {_k(analysis)} wordings ({', '.join(analysis['wordings'][:6])}"
        f"{', ...' if len(analysis['wordings']) > 6 else ''}). Worst, best and spread move with k by themselves; "
        "compare them between models on these same wordings only.",
        "Robustness from consistency alone: a model that always answers the same is perfectly consistent. Read it "
        "beside `consistent and correct`.",
        "That the wordings differ, from a spread above 0: noise alone gives one, and shifts its interval upwards.",
        "Anything about sampled decoding: all answers are greedy.",
    ]
    rates = [model["metrics"][name] for model in analysis["models"].values() for name in ("accuracy", "worst_of_k")]
    if any(rate["low"] == rate["high"] in (0, 1) for rate in rates):
        n = analysis["counted_groups"]
        found.append(
            "Certainty, from an interval without width: resampling cannot show what no request showed. "
            f"None of {n} leaves room for {100 * (1 - 0.05 ** (1 / n)):.1f} % (the exact one-sided 95 % bound)."
        )
    if low < high:
        found.append(f"Figures by wording across groups: groups have {low} to {high} wordings, so the sets differ.")
    num_tests = sum(len(pair["over_seeds"]) for pair in analysis["comparisons"].values())
    for name, pair in _in_order(analysis):
        seeds = pair["over_seeds"].get("accuracy")
        if seeds:
            n, sd = len(seeds["by_seed"]), statistics.stdev(seeds["by_seed"])
            reach = 100 * detectable_difference(sd, n, num_tests=num_tests)
            found.append(
                f"No effect of {name}, from a p value above 0.05: with {n} pairs of runs and the spread seen "
                f"({100 * sd:.1f} points), a true difference in accuracy below {reach:.1f} points would be missed more "
                "often than one time in five (at the level of the first of the adjusted tests)."
            )
        else:
            found.append(
                f"Whether the recipe of {name} is better than that of {analysis['baseline']}: intervals and p values "
                "speak about these very weights. Give equally many runs of each (NAME=run1,run2,...) to ask about "
                "recipes."
            )
    if analysis["comparisons"]:
        found.append("Anything from one interval among many: the p values are adjusted (Holm), the intervals are not.")
    results = [run for model in analysis["models"].values() for run in model["runs"]]
    if len({run.get("template_sha256") for run in results}) > 1:
        found.append("Which part the chat template has: the models were prompted with different ones.")
    if analysis["limit"]:
        found.append(
            f"Anything about the rest of the data: only the first {analysis['limit']} groups were used (--limit)."
        )
    if analysis["left_out"]:
        found.append(f"Anything about the {analysis['left_out']} groups that `{analysis['metric']}` does not count.")
    return found


def _measured(analysis: Mapping[str, Any]) -> str:
    runs = {name: analysis["models"][name]["runs"] for name in analysis["order"]}
    hashes = ", ".join(f"`{name}` {value[:12]}" for name, value in sorted((analysis["data_sha256"] or {}).items()))
    models = "\n".join(
        f"- **{name}**: "
        + ", ".join(
            f"`{run['model']['name']}`"
            + (f" (weights {run['model']['weights_sha256'][:12]})" if run["model"].get("weights_sha256") else "")
            for run in of_arm
        )
        for name, of_arm in runs.items()
    )
    e = analysis["environment"]
    commit = f"Commit {e['commit'][:7]}, " if e.get("commit") else ""
    dropped = next(iter(runs.values()))[0].get("dropped_as_known_from_train")
    known = f" ({dropped} left out: they stand in the training data)" if dropped else ""
    return (
        f"{analysis['counted_groups']} requests{known}, each in {_k(analysis)} wordings "
        f"({', '.join(analysis['wordings'])}; the first is the original), scored by `{analysis['metric']}`. Data: "
        f"{hashes}. Decoding: greedy, up to {analysis['decoding']['max_new_tokens']} new tokens. {commit}torch "
        f"{e['torch']}, transformers {e['transformers']}.\n\n{models}"
    )


def _differences_part(analysis: Mapping[str, Any]) -> list[str]:
    parts = [
        f"## Differences to {analysis['baseline']}",
        "In points, paired by group, with 95 % bootstrap intervals over groups (not adjusted for their number). More "
        "is worse for the spreads and the drop rate.",
        differences(analysis, list(DEFINITIONS)),
    ]
    pairs = _in_order(analysis)
    tests = [
        [f"{name}, {wording}", str(t["only_model"]), str(t["only_baseline"]), show_p(t["p"]), show_p(t["p_holm"])]
        for name, pair in pairs
        for wording, t in pair["mcnemar"].items()
    ]
    if tests:
        parts += [
            "Exact McNemar tests, one wording at a time: the wordings of a request are not independent, requests are.",
            aligned_table(["", "right alone", f"{analysis['baseline']} alone", "p", f"p, Holm of {len(tests)}"], tests),
        ]
    seeds = [
        [
            f"{name}, {TITLES[metric]}",
            ", ".join(f"{100 * value:+.1f}" for value in t["by_seed"]),
            _cell(t["t"], "+"),
            _cell(t["crossed"], "+") if t["crossed"] else "-",
            show_p(t["p"]),
            show_p(t["p_holm"]),
        ]
        for name, pair in pairs
        for metric, t in pair["over_seeds"].items()
    ]
    if seeds:
        parts += [
            "Over training runs, paired in the order given: Student's interval speaks of new runs on these requests; "
            "the crossed bootstrap of new runs and new requests, but with so few runs it is too narrow. p: paired t.",
            aligned_table(["", "by run", "Student 95 %", "crossed 95 %", "p", f"p, Holm of {len(seeds)}"], seeds),
        ]
    return parts


def _in_order(analysis: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, analysis["comparisons"][name]) for name in analysis["order"] if name in analysis["comparisons"]]


def _num_runs(analysis: Mapping[str, Any]) -> int:
    return max(len(model["runs"]) for model in analysis["models"].values())


def _k(analysis: Mapping[str, Any]) -> str:
    low, high = analysis["k"]
    return str(low) if low == high else f"{low} to {high}"


def _cell(figure: Mapping[str, Any], sign: str = "") -> str:
    """An estimate in per cent, with its spread over runs and its interval as far as it has them."""
    if figure["estimate"] is None:
        return "-"
    sd = sample_sd([value for value in figure.get("by_seed", ()) if value is not None])
    shown = estimate_spread(_in_percent(figure["estimate"]), None if sd is None else 100 * sd, f"{sign}.1f")
    if figure["low"] is None:
        return shown
    return f"{shown} [{_percent(figure['low'], sign)}, {_percent(figure['high'], sign)}]"


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{_in_percent(value):{sign}.1f}"


def _in_percent(value: float) -> float:
    return 100 * value + 0.0  # + 0.0 turns -0.0 into 0.0


def _number(figure: Mapping[str, Any]) -> str:
    shown = estimate_spread(figure["estimate"], sample_sd(figure["by_seed"]), ".2f")
    return shown if figure["low"] is None else f"{shown} [{figure['low']:.2f}, {figure['high']:.2f}]"


# -- plots -------------------------------------------------------------------------------------------------------------


def plot_worst(analysis: Mapping[str, Any]) -> Figure:
    """Accuracy against worst of k: on the diagonal no wording costs anything; the distance below it is the loss."""
    figure, axes = _canvas((6.4, 6.2))
    points = {name: analysis["models"][name]["metrics"] for name in analysis["order"]}
    ends = []
    for name, colour, marker in _styles(analysis):
        x, y = points[name]["accuracy"], points[name]["worst_of_k"]
        axes.errorbar(
            100 * x["estimate"],
            100 * y["estimate"],
            xerr=_bars(x),
            yerr=_bars(y),
            color=colour,
            elinewidth=1.4,
            zorder=3,
        )
        axes.plot(
            100 * x["estimate"], 100 * y["estimate"], marker, color=colour, label=name, markersize=9,
            markeredgecolor="white", markeredgewidth=0.8, zorder=4,
        )  # fmt: skip
        ends += [100 * value[side] for value in (x, y) for side in ("low", "high")]
        if len(x["by_seed"]) > 1:
            axes.plot(
                [100 * v for v in x["by_seed"]], [100 * v for v in y["by_seed"]], marker, color=colour, markersize=4,
                alpha=0.55, linestyle="none", zorder=2,
            )  # fmt: skip
            ends += [100 * value for one in (x, y) for value in one["by_seed"]]
    low, high = _room(ends)
    axes.plot([low, high], [low, high], color="#777777", linewidth=1, linestyle=(0, (5, 4)), zorder=1)
    middle = (low + high) / 2
    axes.annotate(
        "no wording costs anything", (middle, middle), xytext=(-4, 4), textcoords="offset points", rotation=45,
        rotation_mode="anchor", color="#666666", fontsize=9, ha="center", va="bottom",
    )  # fmt: skip
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel(f"accuracy over all wordings, % ({analysis['metric']})")
    axes.set_ylabel(f"worst of {_k(analysis)} wordings, %")
    runs = "; small marks: single runs" if _num_runs(analysis) > 1 else ""
    _finish(figure, axes, analysis, "Accuracy, and what is left of it in the worst wording", runs)
    return figure


def plot_phrasing(analysis: Mapping[str, Any]) -> Figure:
    """Accuracy of each wording: a line a model, its 95 % interval over groups shaded."""
    wordings = analysis["wordings"]
    figure, axes = _canvas((max(6.4, 1.1 * len(wordings) + 3), 5.4))
    ends = []
    places = range(len(wordings))
    for name, colour, marker in _styles(analysis):
        values = [analysis["models"][name]["wordings"][wording] for wording in wordings]
        low, high = (
            [100 * (v[side] if v[side] is not None else v["estimate"]) for v in values] for side in ("low", "high")
        )
        axes.fill_between(places, low, high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(
            places, [100 * v["estimate"] for v in values], marker=marker, color=colour, label=name, linewidth=2,
            markersize=8, markeredgecolor="white", markeredgewidth=0.8,
        )  # fmt: skip
        ends += [*low, *high]
    axes.set_xticks(list(places), [w if len(w) <= 18 else w[:17] + "…" for w in wordings])
    if sum(len(w) for w in wordings) > 60:
        axes.tick_params(axis="x", rotation=30)
    axes.set_xlim(-0.25, len(wordings) - 0.75)
    axes.set_ylim(*_room(ends))
    axes.set_xlabel("wording (the first is the original)")
    axes.set_ylabel(f"accuracy, % ({analysis['metric']})")
    _finish(figure, axes, analysis, "Accuracy by wording")
    return figure


def _canvas(size: tuple[float, float]) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('The plots need matplotlib: pip install "llm-jepa[eval]".') from None
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    return figure, axes


def _styles(analysis: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(name, COLOURS[i % 7], MARKERS[(i + i // 7) % 7]) for i, name in enumerate(analysis["order"])]


def _bars(figure: Mapping[str, Any]) -> list[list[float]]:
    ends = figure["estimate"] - figure["low"], figure["high"] - figure["estimate"]
    return [[100 * max(0.0, end)] for end in ends]  # an interval without width is off by a rounding


def _room(ends: Sequence[float]) -> tuple[float, float]:
    margin = max(1.0, 0.08 * (max(ends) - min(ends)))
    return max(-2.0, min(ends) - margin), min(102.0, max(ends) + margin)


def _finish(figure: Figure, axes: Axes, analysis: Mapping[str, Any], title: str, more: str = "") -> None:
    axes.xaxis.label.set_fontsize(11)
    axes.yaxis.label.set_fontsize(11)
    axes.set_title(title, fontsize=13, loc="left", pad=22)
    note = f"{analysis['task']}: {analysis['counted_groups']} requests, 95 % bootstrap intervals over them{more}"
    axes.text(0, 1.015, note, transform=axes.transAxes, fontsize=9, color="#555555", va="bottom")
    figure.legend(loc="outside lower center", ncols=min(3, len(analysis["order"])), frameon=False, fontsize=10)
