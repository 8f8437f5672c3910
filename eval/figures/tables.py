"""Figures as text: "mean ± sd" and Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def mean_spread(values: Sequence[float], form: str = ".1f") -> str:
    """Format values as "mean ± sd" (sample standard deviation); a single value is shown alone.

    form: a format specification. A sign in it ("+.1f") is for the mean only.
    """
    return estimate_spread(statistics.mean(values), sample_sd(values), form)


def estimate_spread(estimate: float, sd: float | None, form: str = ".1f") -> str:
    """Format an estimate and a standard deviation computed before as "estimate ± sd"; without an sd, the estimate."""
    if sd is None:
        return format(estimate, form)
    return f"{format(estimate, form)} ± {format(sd, form.lstrip('+'))}"


def sample_sd(values: Sequence[float]) -> float | None:
    """The standard deviation with n - 1 in the denominator; None for fewer than two values."""
    if len(values) < 2:
        return None
    return statistics.stdev(values)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str | None = None) -> str:
    """A Markdown table without padding: `| a | b |`, as the committed reports have it.

    align: "l" or "r" for each column; by default the first column is left-aligned and the others are right-aligned.
    Raises ValueError if a row or `align` has another number of columns than the header.
    """
    align = align or "l" + "r" * (len(header) - 1)
    for cells in (align, *rows):
        if len(cells) != len(header):
            raise ValueError(f"A table of {len(header)} columns cannot have a row of {len(cells)}: {cells!r}.")
    rule = "".join({"l": "---|", "r": "---:|"}[side] for side in align)
    heading = _line(header).replace("|  |", "| |")  # the committed reports write an empty heading with one blank
    return "\n".join([heading, f"|{rule}", *map(_line, rows)])


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded to equal widths, also readable in a terminal; all columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def padded(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return _line([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    rule = _line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join([padded(header), rule, *map(padded, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
