"""The memory tables of docs/scaling.md."""

from __future__ import annotations

import json
import math
from typing import Any

from ..figures.tables import markdown_table
from . import RESULTS, render

MEMORY = RESULTS / "memory" / "cpu.json"
TRAININGS = {"full": "all weights", "lora": "LoRA, float32 base", "lora, bfloat16 base": "LoRA, bfloat16 base"}
WAYS = {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}


def memory_tables() -> str:
    """Markdown: gigabytes per process by model, training and way to share; and the formula against measured peaks."""
    result = json.loads(MEMORY.read_text())
    ranks, summary = result["setting"]["ranks"], result["summary"]
    header = ["model", "trained"] + [
        name if way == "one" else f"{name}, {ranks} processes" for way, name in WAYS.items()
    ]
    table = [[row["model"], TRAININGS[row["training"]], *(_gb(row[way]) for way in WAYS)] for row in result["table"]]
    measured, missed = [], []
    for row in result["measured"]:
        ratio = row["measured"] / row["computed"]
        note = "ok" if 1 / summary["bound"] <= ratio <= summary["bound"] else "MISSED"
        missed += [row] if note == "MISSED" else []
        measured.append([row["case"], f"{row['computed']:.3f}", f"{row['measured']:.3f}", f"{ratio:.2f}", note])
    work: dict[str, Any] = {row["model"]: _gb(row["activations"]) for row in result["table"]}
    return render(
        "memory",
        table=markdown_table(header, table),
        measured=markdown_table(["trained on the CPU", "computed, GB", "peak, GB", "peak / computed", ""], measured),
        work=", ".join(f"{name} {value}" for name, value in work.items()),
        setting=result["setting"],
        summary=summary,
        verdict="ok" if summary["within_bound"] == summary["cases"] else "MISSED",
        largest_gap=math.ceil(max((abs(row["measured"] - row["computed"]) for row in missed), default=0) * 1000),
        environment=result["environment"],
    )


def _gb(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
