"""Short runs of both families: recipes and their data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import LLAMA
from tests.vl.test_commands import RECIPE as VL_RECIPE

SHORT = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01,
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "diagnostics_pairs": 8,
}  # fmt: skip
LM = {
    "family": "lm", "model_config": {**LLAMA, "attention_dropout": 0.1}, "tokenizer_vocab_size": 320,
    "per_device_train_batch_size": 4, "activation_checkpointing": False, "eval_strategy": "no", **SHORT,
}  # fmt: skip
VL = {**VL_RECIPE, "pairs_per_clip": 1, **SHORT}
BEST = {"validation_rows": 6, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
RESUME = ["--resume_from_checkpoint", "true"]


def write_rows(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_images(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    lines = []
    for i in range(12):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "target": f"number {i % 5}"}) + "\n")
    (folder / "clips.jsonl").write_text("".join(lines))
    return folder / "clips.jsonl"
