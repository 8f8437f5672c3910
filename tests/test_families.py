"""Claim: whatever layout the probe picks for a family, our step in it is that of separate passes, loss and gradient.

The reference is that of test_packing.py. Float64 models, but rotary tables, router scores and some softmaxes stay
float32 in most families, so that even two plain batchings differ by up to 3e-7 in gradient (mpt; 1e-15 in gpt2, which
has none). A window that counts places instead of positions is off by 1e-3 and more.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import config, family_model
from datasets import Dataset
from test_packing import assert_same, packed_pass, separate_passes, views_of
from test_trainer import assert_close, history, weights
from trl import SFTConfig, SFTTrainer

from llm_jepa import packing
from llm_jepa.packing import JEPACollator, model_inputs, router_logits_of, router_loss
from llm_jepa.predictor_tokens import add_predictor_tokens
from llm_jepa.probe import choose_layout
from llm_jepa.trainer import LLMJEPATrainer

PACKED = (
    "llama qwen2 qwen3 olmo2 olmo3 mistral ministral phi phi3 gemma gemma2 gemma3_text gemma4_text cohere cohere2 "
    "gpt_neox smollm3 granite stablelm glm4 starcoder2 modernbert-decoder gpt2 gptj opt biogpt falcon mixtral "
    "qwen3_moe gpt_oss llama4_text deepseek_v3"
).split()
SEPARATE = "bloom mpt gpt_neo mamba mamba2 qwen3_next lfm2 jamba falcon_h1 recurrent_gemma rwkv".split()
EAGER = "llama mistral gemma3_text cohere2 llama4_text qwen3_moe opt".split()
CASES = [
    *((family, None, "packed") for family in PACKED),
    *((family, "eager", "packed") for family in EAGER),
    *((family, None, "separate") for family in SEPARATE),
]


def step_equals_separate_passes(model, rows, tokenizer, tmp_path, monkeypatch, layout=None):
    """Three examples in two rows: (first, third) and (second), padded. Returns the layout."""
    predictors = add_predictor_tokens(model, tokenizer, 2)
    layout = layout or choose_layout(model, 2)
    views, copied = views_of(rows, tokenizer, count=3), copy.deepcopy(model)
    assert min(len(view["contexts"][0]) for view in views) > 24, "nothing reaches beyond a window of 8"
    monkeypatch.setattr(packing, "share_rows", lambda lengths, row_cost: [[0, 2], [1]])
    reference = separate_passes(copied, views, predictors, "info_nce", 0.7)
    reference.backward()
    ours = packed_pass(
        model, model, views, predictors, "info_nce", 0.7, tmp_path, tokenizer, layout=layout, row_cost=1
    )  # fmt: skip
    ours.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=1e-6)
    found, wanted = (
        {name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (model, copied)
    )
    assert sum(g.norm() for g in wanted.values()) > 1, "no gradient: equal ones would prove nothing"
    assert_same(found, wanted)
    return layout


@pytest.mark.parametrize(("family", "attention", "expected"), CASES)
def test_the_chosen_layout_is_exact(family, attention, expected, rows, tokenizer, tmp_path, monkeypatch):
    model = family_model(tokenizer, family, attn_implementation=attention)
    assert step_equals_separate_passes(model, rows, tokenizer, tmp_path, monkeypatch) == expected


def test_windows_of_places_would_show(rows, tokenizer, tmp_path, monkeypatch):
    """The claim above has teeth: with place for position in the masks, every windowed family fails it."""

    def by_place(batch, model):
        order = torch.arange(batch["doc"].shape[1]).expand_as(batch["doc"])
        start = torch.zeros_like(order)  # windows by place, visibility as it should be
        sees = packing.who_sees_whom(batch["doc"], batch["parent"], batch["visible"], batch["position_ids"])
        window = getattr(model.config, "sliding_window", None)
        narrow = sees & (order[:, :, None] - order[:, None, :] < window)
        blank = torch.zeros(narrow[:, None].shape, dtype=model.dtype)
        masks = {}
        for kind in set(getattr(model.config, "layer_types", None) or ["sliding_attention"]):
            mask = (narrow if kind == "sliding_attention" else sees)[:, None] | (start[:, None, None] > 0)
            if model.config._attn_implementation == "eager":
                mask = blank.masked_fill(~mask, torch.finfo(model.dtype).min)
            masks[kind] = mask
        return masks if len(masks) > 1 else next(iter(masks.values()))

    monkeypatch.setattr(packing, "attention_mask", by_place)
    for family in ("mistral", "phi3", "starcoder2", "olmo3", "gemma2", "gemma3_text", "gemma4_text", "cohere2",
                   "ministral", "gpt_oss", "modernbert-decoder"):  # fmt: skip
        own = copy.deepcopy(tokenizer)
        with pytest.raises(AssertionError, match=r"approx|==|assert"):
            step_equals_separate_passes(family_model(own, family), rows, own, tmp_path, monkeypatch, layout="packed")
