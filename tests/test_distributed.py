"""Claim: two gloo ranks are one process, in gradient. Through the real command line, as a user would start it.

A wrong gather or a wrong factor can leave the printed loss alone and change the gradient by a quarter; so weights after
plain SGD steps are compared, and the ranks must have been two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import LLAMA
from safetensors.torch import load_file

RECIPE = {
    "model_config": LLAMA,
    "tokenizer_vocab_size": 320,
    "objective": "cosine",
    "jepa_weight": 2.0,
    "num_predictor_tokens": 1,
    "use_cpu": True,
    "activation_checkpointing": False,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "validation_rows": 11,  # odd: the ranks' last evaluation batch repeats rows, which must not count twice
    "diagnostics_pairs": 8,
    "per_device_eval_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


def train(tmp_path, rows, name, *arguments):
    """`llm-jepa train` in a process of its own; returns (process, output folder)."""
    data, recipe = tmp_path / "train.jsonl", tmp_path / "recipe.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(yaml.safe_dump({**RECIPE, "train_data": str(data), "output_dir": str(tmp_path / name)}))
    done = subprocess.run(
        [sys.executable, "-m", "llm_jepa.cli", "train", str(recipe), *arguments],
        capture_output=True, text=True, timeout=300, env=os.environ,
    )  # fmt: skip
    return done, tmp_path / name


def log(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_two_ranks_are_one_process(rows, tmp_path):
    one, folder_one = train(tmp_path, rows, "one", "--per_device_train_batch_size", "8")
    assert one.returncode == 0, one.stderr[-2000:]
    two, folder_two = train(
        tmp_path, rows, "two", "--per_device_train_batch_size", "4", "--launch", "cpu", "--num_processes", "2"
    )
    assert two.returncode == 0, two.stderr[-2000:]
    losses = [entry["jepa_loss"] for entry in log(folder_one) if "jepa_loss" in entry]
    assert abs(losses[0] - losses[-1]) > 1e-2, "nothing was trained: equal weights would prove nothing"

    a, b = load_file(folder_one / "model.safetensors"), load_file(folder_two / "model.safetensors")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")

    for key in (
        "loss",
        "lm_loss",
        "jepa_loss",
        "grad_norm",
        "num_tokens",
        "eval_loss",
        "eval_lm_loss",
        "eval_jepa_loss",
    ):
        ours, theirs = ([entry[key] for entry in log(folder) if key in entry] for folder in (folder_one, folder_two))
        assert ours and theirs == pytest.approx(ours, rel=1e-4), key
    model_card = (folder_two / "README.md").read_text()
    assert "4 x 1 x 2" in model_card, "the second run did not have two ranks"
