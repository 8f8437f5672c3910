"""Plots of `eval.robustness`: accuracy against the worst wording, and accuracy by wording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .robustness_report import most_runs, wordings_of_a_group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The colours of Okabe and Ito, which colour-blind readers can distinguish; markers for prints in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_worst(analysis: Mapping[str, Any]) -> Figure:
    """Accuracy against worst of k. On the diagonal no wording costs anything; the distance below it is the loss."""
    figure, axes = _canvas((6.4, 6.2))
    ends: list[float] = []
    for name, colour, marker in _styles(analysis):
        metrics = analysis["models"][name]["metrics"]
        x, y = metrics["accuracy"], metrics["worst_of_k"]
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
        for figure_of_model in (x, y):
            ends += [100 * figure_of_model["low"], 100 * figure_of_model["high"]]
        if len(x["by_seed"]) > 1:
            axes.plot(
                [100 * v for v in x["by_seed"]], [100 * v for v in y["by_seed"]], marker, color=colour, markersize=4,
                alpha=0.55, linestyle="none", zorder=2,
            )  # fmt: skip
            ends += [100 * value for value in (*x["by_seed"], *y["by_seed"])]
    low, high = _room(ends)
    axes.plot([low, high], [low, high], color="#777777", linewidth=1, linestyle=(0, (5, 4)), zorder=1)
    middle = (low + high) / 2
    axes.annotate(
        "no wording costs anything", (middle, middle), xytext=(-4, 4), textcoords="offset points", rotation=45,
        rotation_mode="anchor", color="#666666", fontsize=9, ha="center", va="bottom",
    )  # fmt: skip
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel(f"accuracy over all wordings, % ({analysis['metric']})")
    axes.set_ylabel(f"worst of {wordings_of_a_group(analysis)} wordings, %")
    runs = "; small marks: single runs" if most_runs(analysis) > 1 else ""
    _finish(figure, axes, analysis, "Accuracy, and what is left of it in the worst wording", runs)
    return figure


def plot_phrasing(analysis: Mapping[str, Any]) -> Figure:
    """Accuracy of each wording: a line for each model, with its 95 % interval over groups shaded."""
    wordings = analysis["wordings"]
    figure, axes = _canvas((max(6.4, 1.1 * len(wordings) + 3), 5.4))
    ends: list[float] = []
    places = range(len(wordings))
    for name, colour, marker in _styles(analysis):
        values = [analysis["models"][name]["wordings"][wording] for wording in wordings]
        low, high = _bounds(values, "low"), _bounds(values, "high")
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    return figure, axes


def _styles(analysis: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(name, COLOURS[i % 7], MARKERS[(i + i // 7) % 7]) for i, name in enumerate(analysis["order"])]


def _bounds(figures: Sequence[Mapping[str, Any]], side: str) -> list[float]:
    """The bounds of intervals, in per cent; an estimate without an interval is its own bound."""
    return [100 * (figure["estimate"] if figure[side] is None else figure[side]) for figure in figures]


def _bars(figure: Mapping[str, Any]) -> list[list[float]]:
    ends = figure["estimate"] - figure["low"], figure["high"] - figure["estimate"]
    return [[100 * max(0.0, end)] for end in ends]  # rounding can make an end of an interval without width negative


def _room(ends: Sequence[float]) -> tuple[float, float]:
    """The limits of an axis in per cent: a little more than the figures; 0 to 100 if they are all the same."""
    if max(ends) - min(ends) < 1e-9:
        return -2.0, 102.0
    margin = max(1.0, 0.08 * (max(ends) - min(ends)))
    return max(-2.0, min(ends) - margin), min(102.0, max(ends) + margin)


def _finish(figure: Figure, axes: Axes, analysis: Mapping[str, Any], title: str, more: str = "") -> None:
    axes.xaxis.label.set_fontsize(11)
    axes.yaxis.label.set_fontsize(11)
    axes.set_title(title, fontsize=13, loc="left", pad=22)
    note = f"{analysis['task']}: {analysis['counted_groups']} requests, 95 % bootstrap intervals over them{more}"
    axes.text(0, 1.015, note, transform=axes.transAxes, fontsize=9, color="#555555", va="bottom")
    figure.legend(loc="outside lower center", ncols=min(3, len(analysis["order"])), frameon=False, fontsize=10)
