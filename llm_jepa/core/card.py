"""What the model cards of all families share."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def settings_table(args: TrainingArguments, own: dict[str, Any]) -> str:
    """Markdown rows of the trainer's own settings and of those every run has."""
    settings = {
        **own,
        "learning_rate": args.learning_rate,
        "batch per device x accumulation x ranks": f"{args.per_device_train_batch_size} x "
        f"{args.gradient_accumulation_steps} x {args.world_size}",
        "seed": args.seed,
    }
    plain = {key: getattr(value, "value", value) for key, value in settings.items()}  # the word of an enum
    return "\n".join(f"| {key} | {html.escape(str(value))} |" for key, value in plain.items())


def last_evaluation(log_history: list[dict[str, Any]]) -> tuple[int, str]:
    """The step of the last evaluation, and Markdown rows of its figures beside those of step 0."""
    evaluations = [entry for entry in log_history if any(key.startswith("eval_") for key in entry)]
    start = evaluations[0] if evaluations and evaluations[0].get("step") == 0 else {}
    last = evaluations[-1] if evaluations else {}
    keys = sorted(key for key in last if key.startswith("eval_") and "_per_second" not in key and "runtime" not in key)
    rows = [
        f"| {key.removeprefix('eval_')} | {f'{start[key]:.4g}' if key in start else ''} | {last[key]:.4g} |"
        for key in keys
    ]
    return last.get("step", 0), "\n".join(rows) or "| none measured | | |"


def write_card(output_dir: str | Path, text: str) -> Path:
    path = Path(output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
