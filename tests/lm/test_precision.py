"""Low precision and flash attention; on a GPU with LLM_JEPA_TEST_GPUS=0 python -m pytest -m "gpu or not gpu" FILE

Against the same model in float32 with sdpa: bfloat16 and flash kernels round, so directions of gradients are compared.
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F

from llm_jepa.core.losses import jepa_loss
from llm_jepa.lm.attention import attention_of_views, model_inputs
from llm_jepa.lm.batching import JEPACollator
from llm_jepa.lm.predictor_tokens import add_predictor_tokens
from llm_jepa.lm.probe import choose_layout
from llm_jepa.lm.reading import read_pairs
from tests.conftest import tiny_model
from tests.lm.test_batching import views_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(model, views, predictors, layout, **collator) -> tuple[float, torch.Tensor]:
    """LM + cosine loss of a batch, and the gradient of everything as one vector."""
    batch = {
        key: value.to(DEVICE) for key, value in JEPACollator(0, predictors, layout=layout, **collator)(views).items()
    }
    wanted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    output = model(
        **model_inputs(batch, model, attention_of_views(layout)), logits_to_keep=wanted != -100, output_hidden_states=-1
    )
    predicted, target = read_pairs(output.hidden_states[-1], batch)
    lm = F.cross_entropy(output.logits.flatten(0, -2).float(), wanted[wanted != -100])
    loss = lm + jepa_loss(predicted, target, objective="cosine").mean()
    model.zero_grad()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shared", [0, 10**6])
def test_bfloat16_adds_no_error_of_its_own(attention, shared, rows, tokenizer):
    model = tiny_model(tokenizer, hidden_size=128, intermediate_size=256, attn_implementation=attention).to(DEVICE)
    predictors = add_predictor_tokens(model, tokenizer, 2)
    views = views_of(rows, tokenizer)
    assert choose_layout(model, 2) == "packed"
    loss, gradient = step(model, views, predictors, "packed", row_cost=shared)
    separate_loss, separate = step(model, views, predictors, "separate")
    assert loss == pytest.approx(separate_loss, rel=1e-4)
    assert F.cosine_similarity(gradient, separate, dim=0) > 0.9999
    half = copy.deepcopy(model).to(torch.bfloat16)
    half_loss, half_gradient = step(half, views, predictors, "packed", row_cost=shared)
    assert half_loss == pytest.approx(loss, rel=2e-2)
    assert F.cosine_similarity(half_gradient, gradient, dim=0) > 0.98


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, and LLM_JEPA_TEST_GPUS to show it to tests")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
def test_one_flat_row_in_flash_attention_is_packed_rows_in_sdpa(rows, tokenizer):
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
    views = views_of(rows, tokenizer)
    sdpa = tiny_model(tokenizer, **shape).to(DEVICE, torch.bfloat16)
    flash = tiny_model(tokenizer, **shape, attn_implementation="flash_attention_2").to(DEVICE, torch.bfloat16)
    flash.load_state_dict(sdpa.state_dict())
    assert choose_layout(flash, 0) == "flat"
    loss, gradient = step(sdpa, views, [], "packed")
    flat_loss, flat = step(flash, views, [], "flat")
    assert flat_loss == pytest.approx(loss, rel=2e-2)
    assert F.cosine_similarity(flat, gradient, dim=0) > 0.98
