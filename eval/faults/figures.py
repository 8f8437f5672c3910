"""The summary of the faults, and the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..figures.tables import aligned_table
from .cases import SKIPPED, SURVIVED, VERDICTS, Case, Outcome


class Target(NamedTuple):
    """What is promised of a kind, and how many survived before there was this suite (of its own counts of then)."""

    text: str
    before: str = ""


ALL = Target("all survive")
TARGETS = {
    "kill in the first save": Target("all resumed", "7 of 84"),
    "kill in the later save": Target("all resumed", "283 of 283"),
    "kill in the final save": Target("all whole", "16 of 57"),
    "damaged": Target("all fall back and say so", "112 of 112"),
    "forged": Target("none silent", "17 of 38; 5 silent, 16 tracebacks"),
    "SIGTERM": Target("all saved and bit-exact", "0 of 18"),
    "disk full": Target("one line each", "0 of 18"),
    "no memory": Target("one line each", "0 of 7"),
    "frozen rank": Target("ends in time", "0 of 3"),
    "changed setting": Target("none silent", "8 silent"),
}


def summary(outcomes: Sequence[tuple[Case, Outcome]]) -> dict[str, dict[str, Any]]:
    """Kind -> how many faults were injected, how many ended in each verdict, and why some were skipped; and `all`."""
    kinds = dict.fromkeys(case.kind for case, _ in outcomes)
    rows = {kind: _count([outcome for case, outcome in outcomes if case.kind == kind]) for kind in kinds}
    return {**rows, "all": _count([outcome for _, outcome in outcomes])}


def _count(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    counts: dict[str, Any] = {"injected": sum(outcome.verdict != SKIPPED for outcome in outcomes)}
    counts |= {verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in VERDICTS}
    reasons = [outcome.note for outcome in outcomes if outcome.verdict == SKIPPED]
    return {**counts, "skipped": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}}


def is_met(counts: dict[str, Any]) -> bool:
    return bool(counts["injected"]) and counts[SURVIVED] == counts["injected"]


def verdict_on(counts: dict[str, Any]) -> str:
    """Whether a kind reached its target, in a word."""
    if not counts["injected"]:
        return "skipped"
    return "holds" if is_met(counts) else "MISSED"


def table(kinds: dict[str, dict[str, Any]]) -> str:
    """The summary for a terminal."""
    rows = []
    for kind, counts in kinds.items():
        target = TARGETS.get(kind, ALL)
        figures = [str(counts[name]) for name in ("injected", *VERDICTS)]
        rows.append([kind, *figures, verdict_on(counts), target.text, target.before])
    header = ["fault", "injected", *VERDICTS, "", "target", "before"]
    lines = [aligned_table(header, rows)]
    skipped = kinds["all"]["skipped"]
    lines += [f"Skipped {count}: {reason}" for reason, count in skipped.items()]
    return "\n".join(lines)
