"""The page of the tiny NL-RX runs: arms under two label protocols, and their differences to plain SFT."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llm_jepa.core.json_files import read_json

from ..figures.tables import markdown_table, mean_spread
from . import RESULTS, render, short_commits

FOLDER = RESULTS / "tiny_nl_rx"
ARMS = {"sft": "plain SFT", "info_nce": "LLM-JEPA, InfoNCE 0.1", "cosine": "LLM-JEPA, cosine 1.0"}
PROTOCOLS = ("completion", "paper")
Result = dict[str, Any]
Runs = dict[tuple[str, str], list[Result]]  # (protocol, arm) -> results by seed


class Column(NamedTuple):
    title: str
    form: str
    value: Callable[[Result], float]

    def cell(self, results: list[Result]) -> str:
        """The mean and spread over results, by seed."""
        return mean_spread([self.value(result) for result in results], self.form)


COLUMNS = (
    Column("synth exact", ".1f", lambda result: percent(result, "original", "exact")),
    Column("synth startswith", ".1f", lambda result: percent(result, "original", "startswith")),
    Column("synth stop rate", ".1f", lambda result: percent(result, "original", "stop_rate")),
    Column("turk startswith", ".1f", lambda result: percent(result, "paraphrase", "startswith")),
    Column("recall@1", ".2f", lambda result: space(result, "recall_at_1")),
    Column("wrong-pair cosine", ".2f", lambda result: space(result, "raw_cosine_mismatched")),
    Column("rank context", ".0f", lambda result: space(result, "effective_rank_predicted")),
)


def percent(result: Result, wording: str, metric: str) -> float:
    return 100 * float(result["metrics"][wording][metric])


def space(result: Result, name: str) -> float:
    """A figure of the embedding space of the validation pairs."""
    return float(result["model"]["validation"][name])


def load(folder: Path = FOLDER) -> Runs:
    runs: Runs = {}
    for path in sorted(folder.glob("*.json")):
        protocol, arm, _ = path.stem.split("-")
        runs.setdefault((protocol, arm), []).append(read_json(path, is_finite=False))
    return runs


def table(runs: Runs) -> str:
    """Markdown: a row for each arm, then the differences to plain SFT, then the origin of the numbers."""
    results = [result for group in runs.values() for result in group]
    one = results[0]
    return render(
        "nl_rx",
        arms=_arms_table(runs),
        differences=_differences_table(runs),
        seeds=sorted({_seed(result) for result in results}),
        items=one["items"],
        dropped=one["dropped_as_known_from_train"],
        commits=short_commits(results),
        versions=one["environment"],
    )


def _arms_table(runs: Runs) -> str:
    rows = []
    for protocol in PROTOCOLS:
        for arm, title in ARMS.items():
            if (protocol, arm) not in runs:
                continue
            results = runs[protocol, arm]
            cells = [column.cell(results) for column in COLUMNS]
            tokens = _mean_tokens(results) / _mean_tokens(runs[protocol, "sft"])
            rows.append([protocol, title, *cells, f"{tokens:.2f}"])
    header = ["labels", "arm", *(column.title for column in COLUMNS), "tokens / SFT"]
    return markdown_table(header, rows, align="ll" + "r" * (len(COLUMNS) + 1))


def _mean_tokens(results: list[Result]) -> float:
    return statistics.mean(result["model"]["train_tokens"] for result in results)


def _differences_table(runs: Runs) -> str:
    """LLM-JEPA minus SFT of the same seed (same initial weights, same order of data): startswith, in points."""
    rows = []
    for protocol in PROTOCOLS:
        for arm, title in ARMS.items():
            if arm != "sft" and (protocol, arm) in runs and (protocol, "sft") in runs:
                cells = [_difference(runs[protocol, arm], runs[protocol, "sft"], w) for w in ("original", "paraphrase")]
                rows.append([protocol, title, *cells])
    if not rows:
        return ""
    return markdown_table(["labels", "arm minus SFT of the same seed, startswith", "synth", "turk"], rows, align="llrr")


def _difference(results: list[Result], baseline: list[Result], wording: str) -> str:
    """The mean and spread of the differences of each seed, and all of them."""
    sft = {_seed(result): percent(result, wording, "startswith") for result in baseline}
    gaps = [percent(result, wording, "startswith") - sft[_seed(result)] for result in results]
    return f"{mean_spread(gaps, '+.1f')} ({', '.join(f'{gap:+.1f}' for gap in gaps)})"


def _seed(result: Result) -> int:
    seed: int = result["model"]["run"]["seed"]
    return seed
