"""A compiled model computes the same losses, with packed rows of every length (`torch_compile: true`)."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset

from llm_jepa.lm.trainer import LLMJEPATrainer
from tests.conftest import config, tiny_model


def losses(tokenizer, rows, folder, **options) -> list[float]:
    """Of each step and of the validation rows."""
    args = config(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2, logging_steps=1,
        eval_strategy="steps", eval_steps=4, objective="info_nce", **options,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    torch._dynamo.reset()  # after eight graphs of one function it goes on without compiling
    tokenizer = copy.deepcopy(tokenizer)  # training adds predictor tokens
    trainer = LLMJEPATrainer(tiny_model(tokenizer), args, data, data.select(range(4)), tokenizer)
    trainer.train()
    keys = ("lm_loss", "jepa_loss", "eval_lm_loss", "eval_jepa_loss", "grad_norm")
    return [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("share_rows", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_run_is_the_same_run(backend, share_rows, tokenizer, rows, tmp_path):
    plain = losses(tokenizer, rows, tmp_path / "plain", share_rows=share_rows)
    compiled = losses(
        tokenizer, rows, tmp_path / "compiled", share_rows=share_rows, torch_compile=True,
        torch_compile_backend=backend,
    )  # fmt: skip
    assert len(plain) == 4 * 3 + 2 and len(set(plain)) > 10
    assert compiled == pytest.approx(plain, rel=1e-4)
