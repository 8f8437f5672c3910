"""Ratios between arms, their bounds, and the tables and bars that show them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_jepa.core.files import written_whole


class Bound(NamedTuple):
    """A bound on the median of the ratios within repetitions: a number, or a multiple of the ratio of padded tokens."""

    numerator: str
    denominator: str
    limit: float
    times_tokens: bool = False


BOUNDS = {
    "ours_over_sft": Bound("ours", "sft", 1.06, times_tokens=True),
    "ours_over_three_rows": Bound("ours", "three_rows", 0.50),
    "ours_over_two_rows": Bound("ours", "two_rows", 0.78),
    "ours_packed_over_packed_sft": Bound("ours_packed", "sft_packed", 1.06, times_tokens=True),
    "ours_message_over_three_rows": Bound("ours_message", "three_rows", 0.68),
    "ours_forward_only_over_sft": Bound("ours_forward_only", "sft", 1.20),
    "ours_cached_over_sft": Bound("ours_cached", "sft", 1.08),
    "ours_dropout75_over_sft": Bound("ours_dropout75", "sft", 1.14),
}
PRODUCTS_LIMIT = 1.8  # a step may take so many times as long as the matrix products in it
MEMORY_BOUND = Bound("ours", "sft", 1.1, times_tokens=True)


class Spread(NamedTuple):
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:5.2f} [{self.low:.2f}, {self.high:.2f}]"


def paired(arms: dict[str, dict[str, list[Any]]], name: str, other: str, key: str) -> Spread:
    """The ratios within repetitions, for the repetitions that both arms ran."""
    ratios = [a / b for a, b in zip(arms[name][key], arms[other][key], strict=False)]
    return Spread(statistics.median(ratios), min(ratios), max(ratios))


def token_ratio(arms: dict[str, dict[str, list[Any]]], name: str, other: str) -> float:
    """The ratio of padded tokens over all batches: of what the layers compute."""
    return sum(arms[name]["padded_tokens"]) / sum(arms[other]["padded_tokens"])


def summary(cell: dict[str, Any], clock: str) -> dict[str, float]:
    """The figures that have a bound, and the token ratios that some of the bounds use."""
    arms = cell["arms"]
    figures = {name: paired(arms, b.numerator, b.denominator, clock).median for name, b in BOUNDS.items()}
    products = {
        f"{name}_over_matrix_products": statistics.median(arm["over_matrix_products"])
        for name, arm in arms.items()
        if "over_matrix_products" in arm
    }
    return {
        **figures,
        **products,
        "token_ratio": token_ratio(arms, "ours", "sft"),
        "token_ratio_packed": token_ratio(arms, "ours_packed", "sft_packed"),
        "ours_memory_over_sft": sum(arms["ours"]["peak_memory"]) / sum(arms["sft"]["peak_memory"]),
    }


def limit_of(name: str, figures: Mapping[str, float]) -> float | None:
    """The highest value that the figure may have; None for the token ratios."""
    if name.endswith("over_matrix_products"):
        return PRODUCTS_LIMIT
    bound = {**BOUNDS, "ours_memory_over_sft": MEMORY_BOUND}.get(name)
    if bound is None:
        return None
    if not bound.times_tokens:
        return bound.limit
    packed = "packed" in bound.numerator
    return bound.limit * figures["token_ratio_packed" if packed else "token_ratio"]


def table(cell: dict[str, Any], clock: str, batch_size: int) -> str:
    """Plain text: a line for each arm, with time, tokens and memory compared with sft."""
    other = "wall_s" if clock == "cpu_s" else "cpu_s"
    lines = [
        f"{cell['data']} ({cell['source']}), {cell['model']} model, {cell['parameters'] / 1e6:.0f} M parameters; "
        "times, padded tokens and peak memory over those of sft",
        f"{'arm':18s}{clock[:-2] + ' time':>20s}{other[:-2]:>8s}{'tokens/example':>16s}{'padded':>8s}{'ratio':>7s}"
        f"{'peak MiB':>10s}{'ratio':>7s}",
    ]
    arms = cell["arms"]
    for name, arm in arms.items():
        examples = batch_size * len(arm["real_tokens"])
        line = f"{name:18s}{paired(arms, name, 'sft', clock)!s:>20s}{paired(arms, name, 'sft', other).median:8.2f}"
        line += f"{sum(arm['real_tokens']) / examples:16.1f}{sum(arm['padded_tokens']) / examples:8.1f}"
        line += f"{token_ratio(arms, name, 'sft'):7.2f}"
        peaks = arm["peak_memory"]
        if peaks:  # --quick counts only two arms
            over_sft = sum(peaks) / sum(arms["sft"]["peak_memory"])
            line += f"{statistics.mean(peaks) / 2**20:10.1f}{over_sft:7.2f}"
        lines.append(line)
    step = statistics.median(arms["sft"][clock])
    lines.append(f"a step of sft: {step:.3f} s ({clock[:-2]}), {len(arms['sft'][clock])} repetitions of {batch_size}")
    return "\n".join(lines)


def bounds_table(figures: Mapping[str, float], missed: str = "MISSED") -> str:
    """Plain text: a line for each figure, with its bound and verdict if it has one."""
    lines = []
    for name, figure in figures.items():
        limit = limit_of(name, figures)
        line = f"{name:30s}{figure:7.3f}"
        if limit is not None:
            verdict = "ok" if figure <= limit else missed
            line += f"  <= {limit:5.3f}  {verdict}"
        lines.append(line)
    return "\n".join(lines)


def plot(cells: list[dict[str, Any]], clock: str, path: Path) -> None:
    """Draw horizontal bars: the median time over SFT's, with the span of the repetitions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(cells), figsize=(1.5 + 4.5 * len(cells), 4.5), squeeze=False, sharey=True)
    for panel, cell in zip(panels[0], cells, strict=True):
        # The bar of the 512-token rows would make all other bars invisible. The table has that arm.
        names = [name for name in cell["arms"] if name not in ("three_rows_512", "ours_dropped")]
        spreads = [paired(cell["arms"], name, "sft", clock) for name in names]
        medians = [spread.median for spread in spreads]
        below = [spread.median - spread.low for spread in spreads]
        above = [spread.high - spread.median for spread in spreads]
        colors = ["#2b6cb0" if name.startswith("ours") else "#718096" for name in names]
        panel.barh(names, medians, xerr=[below, above], color=colors, error_kw={"elinewidth": 0.8, "capsize": 2})
        for row, median in enumerate(medians):
            panel.text(0.05, row, f"{median:.2f}", color="white", fontsize=9, verticalalignment="center")
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(f"{cell['data']}, {cell['model']} model", fontsize=10)
        panel.set_xlabel(f"{clock[:-2]} time of a step / plain SFT")
        panel.invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
