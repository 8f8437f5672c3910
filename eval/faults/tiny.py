"""Tiny models and data for hostile inputs: made once, in a forked process, so that this one keeps a single thread."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from llm_jepa.core.strict_yaml import dump_yaml

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
RUN = {
    "learning_rate": 0.01, "max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 4, "use_cpu": True,
    "report_to": "none", "disable_tqdm": True, "diagnostics_pairs": 4,
}  # fmt: skip
LM = {
    "family": "lm", "model_config": GPT2, "tokenizer_vocab_size": 300, "activation_checkpointing": False,
    "max_length": 64, **RUN,
}  # fmt: skip
VL = {
    "family": "vl", "frame_size": 16, "num_frames": 2, "shared_dim": 8, "tokenizer_vocab_size": 280,
    "x_encoder": {"model_type": "vit", **SMALL, "image_size": 16, "patch_size": 8, "num_hidden_layers": 2},
    "predictor": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "num_hidden_layers": 1},
    "y_encoder": {"model_type": "bert", **SMALL, "num_hidden_layers": 1}, **RUN,
}  # fmt: skip
# What the commands import. A process that is forked afterwards need not; it would take nine seconds, and its limit of
# memory.
EVAL = __name__.partition(".")[0]  # the evaluation has another name in the wheel
MODULES = (
    "av", "pyarrow.parquet", "llm_jepa.cli", "llm_jepa.lm.commands", "llm_jepa.lm.trainer", "llm_jepa.vl.commands",
    "llm_jepa.vl.trainer", "llm_jepa.vl.watch_command",
    *(f"{EVAL}.{name}" for name in ("figures.groups", "graders.cider", "robustness")),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "vit")),
)  # fmt: skip
ROWS = [{"prompt": f"name number {i}", "completion": f" it is {i * 7}"} for i in range(8)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(folder: Path, recipe: Mapping[str, Any], data: Path | str, **changes: Any) -> str:
    """A recipe whose run goes to the work folder of the input; returns its path."""
    folder.mkdir(exist_ok=True)
    values = {**recipe, "train_data": str(data), "output_dir": str(folder / "work" / "run"), **changes}
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml({key: value for key, value in values.items() if value is not None}))
    return str(path)


def lm_data(folder: Path) -> Path:
    """Eight rows."""
    return write_rows(folder / "rows.jsonl", ROWS)


def vl_data(folder: Path) -> Path:
    """A manifest of eight images."""
    from PIL import Image

    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 255 - 30 * i, 90)).save(folder / f"{i}.png")
    return write_rows(folder / "clips.jsonl", [{"image": f"{i}.png", "target": f"colour {i}"} for i in range(8)])


def trained(folder: Path, recipe: Mapping[str, Any], data: Path) -> Path:
    """The folder of a model that was trained for one step, here or by a call before."""
    run = folder / "work" / "run"
    if run.exists():
        return run
    words = ["train", write_recipe(folder, recipe, data)]
    for name in MODULES:
        import_module(name)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            from llm_jepa.cli import main

            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = main(words)
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    if status != 0:
        raise RuntimeError(f"{words} failed with status {status}")
    return run
