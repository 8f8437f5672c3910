"""The pages of cost: a training step, and decoding."""

from __future__ import annotations

from typing import Any

from llm_jepa.core.json_files import read_json

from ..cost.step_cost.figures import paired, token_ratio
from ..figures.tables import markdown_table
from . import RESULTS, render

STEP_COST = RESULTS / "step_cost" / "cpu.json"
THROUGHPUT = RESULTS / "throughput" / "cpu.json"
ARMS = {
    "ours": "LLM-JEPA, one predictor token",
    "ours_k0": "without predictor tokens",
    "ours_message": "`context_view: message`",
    "ours_forward_only": "`target_encoder: stop_gradient`",
    "ours_cached": "`target_encoder: base`",
    "ours_dropout75": "`jepa_dropout: 0.75`",
    "sft_packed": "plain SFT, `share_rows: true`",
    "ours_packed": "LLM-JEPA, `share_rows: true`",
    "two_rows": "two rows and an additive mask (published option)",
    "three_rows": "three rows (published default)",
    "three_rows_512": "three rows padded to 512 (published)",
}
DATA = {"nl_rx": "NL-RX", "longer": "Spider"}


def step_table() -> str:
    """Markdown: a step of each arm over plain SFT's, on each data set, for the model with most work in its layers."""
    result = read_json(STEP_COST, is_finite=False)
    cells = [cell for cell in result["cells"] if cell["model"] == "body"]
    header = ["a step over plain SFT's"]
    for cell in cells:
        header += [f"{DATA[cell['data']]}: time", "tokens", "memory"]
    rows = []
    for arm, title in ARMS.items():
        row = [title]
        for cell in cells:
            row += _ratios(cell["arms"], arm, result["clock"])
        rows.append(row)
    first = cells[0]
    return render(
        "step_cost",
        table=markdown_table(header, rows),
        repetitions=len(first["arms"]["sft"]["wall_s"]),
        batch_size=result["config"]["batch_size"],
        parameters=first["parameters"],
        environment=result["environment"],
    )


def _ratios(arms: dict[str, Any], arm: str, clock: str) -> list[str]:
    """Time, padded tokens and peak memory over those of sft."""
    time = paired(arms, arm, "sft", clock)
    peaks = arms[arm]["peak_memory"]
    memory = sum(peaks) / sum(arms["sft"]["peak_memory"][: len(peaks)])
    tokens = token_ratio(arms, arm, "sft")
    return [f"{time.median:.2f} [{time.low:.2f}, {time.high:.2f}]", f"{tokens:.2f}", f"{memory:.2f}"]


def throughput_line() -> str:
    """Markdown: how much faster batched decoding is."""
    result = read_json(THROUGHPUT, is_finite=False)
    return render("throughput", result=result, commit=result["environment"]["commit"][:7])
