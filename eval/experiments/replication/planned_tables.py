"""The tables and the picture of `planned_analysis`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_jepa.core.files import written_whole

from ...figures.inference import show_p
from ...figures.tables import estimate_spread, markdown_table
from .planned_analysis import METRICS, STOPPING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "exact": "exact",
    "stop_rate": "stops",
    "startswith": "starts right",
    "contains": "contains",
    "equivalent": "equal language",
}
OF_STOPPED = "exact, of those that stop"
DIFFERENCES, STOPS = "differences.png", "stops.png"


def tables(figures: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, str]:
    """Markdown tables: `arms`, `primary`, `beside` (the other metrics, and the margin) and, for a plan that asks about
    stopping, `gain` (what a change of exact consists of)."""
    by_name = {"arms": _arms(figures), "primary": _primary(figures, plan), "beside": _beside(figures, plan)}
    if set(plan["primary"]) >= STOPPING:
        by_name["gain"] = _gain(figures)
    return by_name


def seeds_of(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{len(of['seeds'])} of {of['planned_seeds']} seeds of {name}" for name, of in figures.items())


def _by_wording(figures: Mapping[str, Any]) -> Iterator[tuple[list[str], Mapping[str, Any], Mapping[str, Any]]]:
    """(first two cells of a row, figures of the protocol, figures of the wording)."""
    for name, of in figures.items():
        for wording, of_wording in of["wordings"].items():
            yield [name, f"{wording} (trained)" if wording == of["trained"] else wording], of, of_wording


def _arms(figures: Mapping[str, Any]) -> str:
    rows = []
    for first, of, of_wording in _by_wording(figures):
        for arm, values in of_wording["arms"].items():
            cells = [estimate_spread(values[metric]["mean"], values[metric]["sd"]) for metric in METRICS]
            cells.insert(2, _of_stopped(values["exact_of_stopped"], len(of["seeds"])))
            rows.append([*first, arm, f"{of['weight'][arm]:g}", f"{of['tokens'][arm] / 1000:,.0f}k", *cells])
    titles = [TITLES[metric] for metric in METRICS]
    titles.insert(2, OF_STOPPED)
    return markdown_table(["set", "asked", "arm", "weight", "tokens", *titles], rows, align="lll" + "r" * 8)


def _of_stopped(share: Mapping[str, Any], num_seeds: int) -> str:
    """For instance "41.2 ± 3.0 (n = 63)": n answers stopped in all seeds."""
    if share["mean"] is None:
        return "none stopped"
    seeds = "" if share["seeds"] == num_seeds else f", {share['seeds']} seeds"
    return f"{estimate_spread(share['mean'], share['sd'])} (n = {share['stopped']}{seeds})"


def _primary(figures: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    rows = []
    for first, _, of_wording in _by_wording(figures):
        for family in ("minus_sft", "contrasts"):
            for metric in plan["primary"]:
                for name, difference in of_wording[family].items():
                    rows.append([*first, TITLES[metric], name, *_difference(difference[metric])])
    header = ["set", "asked", "primary", "difference", "points", "seeds and lines", "by seed"]
    header += ["p", "p (Holm)", "detectable", "verdict"]
    return markdown_table(header, rows, align="llllrrrrrrl")


def _difference(figures: Mapping[str, Any]) -> list[str]:
    crossed = figures["hierarchical"]
    return [
        _interval(figures["t_interval"]),
        f"{crossed['low']:+z.1f} to {crossed['high']:+z.1f}",
        ", ".join(f"{gain:+z.1f}" for gain in figures["by_seed"]),
        show_p(figures["p"]),
        show_p(figures["p_holm"]),
        f"{figures['detectable']:.1f}",
        f"**{figures['verdict']}**",
    ]


def _interval(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "undefined"
    return f"{interval['estimate']:+z.1f} ({interval['low']:+z.1f} to {interval['high']:+z.1f})"


def _beside(figures: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """The metrics that are not primary, and whether the one with a margin is within it."""
    others = [metric for metric in METRICS if metric not in plan["primary"]]
    content, points = plan["margin"]["metric"], plan["margin"]["points"]
    rows = []
    for first, _, of_wording in _by_wording(figures):
        for name, difference in {**of_wording["minus_sft"], **of_wording["contrasts"]}.items():
            cells = []
            for metric in others:
                cells.append(f"{_interval(difference[metric]['t_interval'])}, {difference[metric]['verdict']}")
            cells += [_interval_of_some(difference["exact_of_stopped"]), difference[content]["within_margin"]]
            rows.append([*first, name, *cells])
    header = ["set", "asked", "difference", *(TITLES[metric] for metric in others), OF_STOPPED]
    header += [f"{TITLES[content]} within ± {points:g}"]
    return markdown_table(header, rows, align="lll" + "r" * (len(others) + 1) + "l")


def _interval_of_some(figures: Mapping[str, Any]) -> str:
    return f"{_interval(figures['t_interval'])}, {figures['seeds']} seeds"


def _gain(figures: Mapping[str, Any]) -> str:
    """The change of exact and its two decompositions."""
    rows = []
    for first, _, of_wording in _by_wording(figures):
        for name, gain in of_wording["gain"].items():
            stops, starts = gain["by_stopping"], gain["by_start"]
            cells = [_interval_of_some(stops["change"])]
            for parts, key in (
                (stops, "condition"), (stops, "exact_given_it"), (stops, "exact_without"),
                (starts, "exact_given_it"), (starts, "condition"),
            ):  # fmt: skip
                cells.append(_interval(parts[key]["t_interval"]))
            rows.append([*first, name, *cells, f"**{gain['hypothesis']}**"])
    header = ["set", "asked", "difference", "change of exact", "by stopping", "by being right when it stops"]
    header += ["exact without a stop", "by ending after the right start", "by starting right", "hypothesis"]
    return markdown_table(header, rows, align="lll" + "r" * 6 + "l")


def draw(figures: Mapping[str, Any], plan: Mapping[str, Any], out: Path) -> None:
    """Write the pictures of an analysis, whole: differences.png, and stops.png for a plan that asks about stopping."""
    _save(_differences_picture(figures, plan), out / DIFFERENCES)
    if set(plan["primary"]) >= STOPPING:
        _save(_stops_picture(figures), out / STOPS)


def _save(figure: Figure, path: Path) -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png", metadata={"Software": None})


def _differences_picture(figures: Mapping[str, Any], plan: Mapping[str, Any]) -> Figure:
    """A panel for each primary metric and the one with a margin: every difference with its interval and its seeds."""
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys([*plan["primary"], plan["margin"]["metric"]]))
    rows = []
    for first, _, of_wording in _by_wording(figures):
        for name, difference in {**of_wording["minus_sft"], **of_wording["contrasts"]}.items():
            rows.append((", ".join([*first, name]), difference))
    figure = Figure(figsize=(4.2 + 3.2 * len(metrics), 0.36 * len(rows) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        points = plan["margin"]["points"]
        axes.axvspan(-points, points, color="#eeeeee", zorder=0)
        axes.axvline(0, color="#777777", linewidth=1, zorder=1)
        for row, (_, difference) in enumerate(rows):
            mean, low, high = difference[metric]["t_interval"].values()
            axes.plot([low, high], [row, row], color="#0072B2", linewidth=2, zorder=2)
            axes.plot(
                difference[metric]["by_seed"], [row] * len(difference[metric]["by_seed"]), "o", color="#0072B2",
                alpha=0.35, markersize=5, markeredgewidth=0, zorder=3,
            )  # fmt: skip
            axes.plot([mean], [row], "|", color="#0072B2", markersize=14, markeredgewidth=2.5, zorder=4)
        axes.set(xlabel="points", title=TITLES[metric])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [label for label, _ in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


# The colours of Okabe and Ito, which colour-blind readers can distinguish; markers for prints in grey.
COLOURS = ("#000000", "#D55E00", "#CC79A7", "#0072B2", "#009E73", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "X", "^", "D", "v", "P")


def _stops_picture(figures: Mapping[str, Any]) -> Figure:
    """Exact against stop rate: a small mark for each run, a large one for the mean of an arm."""
    from matplotlib.figure import Figure

    wordings = list(_by_wording(figures))
    figure = Figure(figsize=(1.2 + 5 * len(wordings), 5), layout="constrained")
    for axes, (first, _, of_wording) in zip(figure.subplots(1, len(wordings), squeeze=False)[0], wordings, strict=True):
        ends = []
        for i, (arm, values) in enumerate(of_wording["arms"].items()):
            stops, exact, colour, marker = values["stop_rate"], values["exact"], COLOURS[i % 7], MARKERS[i % 7]
            axes.plot(
                stops["by_seed"], exact["by_seed"], marker, color=colour, alpha=0.5, markersize=6, markeredgewidth=0
            )
            axes.plot(
                [stops["mean"]], [exact["mean"]], marker, color=colour, label=arm, markersize=11,
                markeredgecolor="white",
            )  # fmt: skip
            ends += [*stops["by_seed"], *exact["by_seed"]]
        end = min(102.0, 1.1 * max(ends) + 0.5)
        for share in (1.0, 0.75, 0.5, 0.25):
            axes.plot([0, end], [0, share * end], color="#999999", linewidth=0.8, linestyle=(0, (5, 4)), zorder=1)
            axes.annotate(
                f"{share:.0%} of those", (0.97 * end, 0.97 * share * end), xytext=(0, 4), textcoords="offset points",
                fontsize=8, color="#666666", ha="right", va="bottom", rotation=np.degrees(np.arctan(share)),
                rotation_mode="anchor", transform_rotates_text=True,
            )  # fmt: skip
        axes.set(xlim=(-0.02 * end, end), ylim=(-0.02 * end, end), title=", ".join(first))
        axes.set(xlabel="answers that stop, %", ylabel="exact answers, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure
