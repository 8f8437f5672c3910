"""Claim: whatever layout the probe picks for a family, our step in it is that of separate passes, loss and gradient.

The reference is that of test_batching.py. Float64 models, but rotary tables, router scores and some softmaxes stay
float32 in most families, so that even two plain batchings differ by up to 3e-7 in gradient (mpt; 1e-15 in gpt2, which
has none). A window that counts places instead of positions is off by 1e-3 and more.
"""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from llm_jepa.core.errors import UserError
from llm_jepa.lm import attention as attention_module
from llm_jepa.lm import batching
from llm_jepa.lm.attention import attention_of_views, model_inputs
from llm_jepa.lm.batching import JEPACollator
from llm_jepa.lm.predictor_tokens import add_predictor_tokens
from llm_jepa.lm.probe import choose_layout
from llm_jepa.lm.reading import router_logits_of, router_loss
from llm_jepa.lm.trainer import LLMJEPATrainer
from tests.conftest import MORE_FAMILIES, assert_same_weights, config, family_model
from tests.lm.test_batching import TOLERANCE, assert_same, packed_pass, separate_passes, views_of

SEPARATE = ["bloom", "mpt", "gpt_neo", "mamba", "mamba2", "qwen3_next", "lfm2", "jamba", "falcon_h1", "recurrent_gemma",
            "rwkv"]  # fmt: skip
PACKED = [family for family in MORE_FAMILIES if family not in SEPARATE]
EAGER = ["llama", "mistral", "gemma3_text", "cohere2", "llama4_text", "qwen3_moe", "opt"]
WINDOWED = [f for f in PACKED if {"sliding_window", "attention_chunk_size"} & set(MORE_FAMILIES[f])]
MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
       "v_head_dim": 8}  # fmt: skip
LONG_SPANS = {
    "gpt_neo": {"window_size": 80},
    "doge": {"keep_window_size": 80},
    "deepseek_v32": {**MLA, "index_topk": 80, "index_n_heads": 2, "index_head_dim": 8, "n_routed_experts": 4,
                     "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
                     "first_k_dense_replace": 1},
}  # fmt: skip
CASES = [
    *((family, None, "packed") for family in PACKED),
    *((family, "eager", "packed") for family in EAGER),
    *((family, None, "separate") for family in SEPARATE),
]


def step_against_separate_passes(model, rows, tokenizer, tmp_path, monkeypatch, layout=None):
    """Three examples in two rows, (first, third) and (second), padded -> layout, relative errors of loss and gradient.

    The gradient's is the largest over parameters, relative to the norm of the whole.
    """
    predictors = add_predictor_tokens(model, tokenizer, 2)
    layout = layout or choose_layout(model, 2)
    views, copied = views_of(rows, tokenizer, count=3), copy.deepcopy(model)
    assert min(len(view["contexts"][0]) for view in views) > 24, "nothing reaches beyond a window of 8"
    reference = separate_passes(copied, views, predictors, "info_nce", 0.7)
    reference.backward()
    monkeypatch.setattr(batching, "share_rows", lambda lengths, row_cost: [[0, 2], [1]])
    ours = packed_pass(model, model, views, predictors, "info_nce", 0.7, tmp_path, tokenizer, layout=layout, row_cost=1)
    monkeypatch.undo()
    ours.backward()
    found, wanted = ({name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (model, copied))
    assert found.keys() == wanted.keys()
    scale = sum(g.square().sum() for g in wanted.values()).sqrt()
    assert scale > 1, "no gradient: equal ones would prove nothing"
    off = max(float((found[name] - wanted[name]).norm() / scale) for name in wanted)
    return layout, abs(ours.item() / reference.item() - 1), off


@pytest.mark.parametrize(("family", "attention", "expected"), CASES)
def test_the_chosen_layout_is_exact(family, attention, expected, rows, tokenizer, tmp_path, monkeypatch):
    model = family_model(tokenizer, family, attn_implementation=attention)
    layout, loss, gradient = step_against_separate_passes(model, rows, tokenizer, tmp_path, monkeypatch)
    assert layout == expected and loss < TOLERANCE and gradient < TOLERANCE


@pytest.mark.parametrize("family", WINDOWED)
def test_counting_places_would_show(family, rows, tokenizer, tmp_path, monkeypatch):
    """Teeth for the claim above: with windows (and chunks) of places in the row, no windowed family keeps it."""
    model = family_model(tokenizer, family)
    mask, sees = attention_module.attention_mask, attention_module.who_sees_whom

    def by_place(batch, model):
        rightly = sees(batch["doc"], batch["parent"], batch["visible"], batch["position_ids"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_module, "who_sees_whom", lambda *rest: rightly)
            return mask({**batch, "position_ids": torch.arange(rightly.shape[1]).expand(rightly.shape[:2])}, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "attention_mask", by_place)
        _, loss, gradient = step_against_separate_passes(model, rows, tokenizer, tmp_path, monkeypatch, "packed")
    assert loss > 1000 * TOLERANCE and gradient > 1000 * TOLERANCE


@pytest.mark.parametrize(("family", "options"), LONG_SPANS.items(), ids=list(LONG_SPANS))
def test_a_span_longer_than_the_probe(family, options, rows, tokenizer, tmp_path, monkeypatch):
    """Spans of 80 tokens: longer than the probe's rows, shorter than these. Those of published models are 256 (gpt_neo,
    a buffer made with the model) and 2048 (the best of all tokens in the *row*)."""
    model = family_model(tokenizer, family, **options)
    layout, loss, gradient = step_against_separate_passes(model, rows, tokenizer, tmp_path, monkeypatch)
    assert loss < TOLERANCE and gradient < TOLERANCE, f"{layout} rows are off by {loss:.1e}, {gradient:.1e}"


# -- experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "shared", "separate", "flat"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_router_loss_is_that_of_the_plain_rows(family, layout, rows, tokenizer):
    """Over LM tokens alone, in value and gradient: views and padding have no say in the balance of the experts."""
    model = family_model(tokenizer, family)
    predictors = [] if layout == "flat" else add_predictor_tokens(model, tokenizer, 2)
    model.config.output_router_logits = True  # TRL's setting
    views, copied = views_of(rows, tokenizer, count=4), copy.deepcopy(model)
    plain = JEPACollator(tokenizer.pad_token_id, with_views=False)(views)
    inputs = model_inputs(plain, model, "rows")
    reference = copied(**inputs, output_router_logits=True).aux_loss
    reference.backward()
    options = {"layout": "packed", "row_cost": 10**9} if layout == "shared" else {"layout": layout}
    batch = JEPACollator(tokenizer.pad_token_id, predictors, **options)(views)
    assert (batch["doc"] % batching.KINDS != batching.LM_ROW).any(), "no views"
    with router_logits_of(model, True) as logits:
        model(**model_inputs(batch, model, attention_of_views(options["layout"])), output_router_logits=False)
    ours = router_loss(model, logits, batch)
    ours.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=TOLERANCE)
    found, wanted = ({name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (model, copied))
    assert_same({name: found[name] for name in wanted}, wanted)
    assert all(found[name].abs().max() < 1e-12 for name in found.keys() - wanted.keys())
    assert len(logits) == model.config.num_hidden_layers
    with router_logits_of(model, False) as logits:
        model(**model_inputs(batch, model, attention_of_views(options["layout"])), output_router_logits=False)
    assert logits == [] and not any(m._forward_hooks or m._forward_pre_hooks for m in [model.get_decoder()])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_weight_zero_is_plain_sft_with_experts(family, accumulation, rows, tokenizer, tmp_path):
    """Router loss included: loss, gradient norm and final weights of TRL's own SFTTrainer."""
    pairs = Dataset.from_list([{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows])
    options = {
        "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4, "router_aux_loss_coef": 0.1,
    }  # fmt: skip

    start = family_model(tokenizer, family, initializer_range=0.1)
    args = config(tmp_path / "ours", jepa_weight=0.0, **options)
    ours = LLMJEPATrainer(copy.deepcopy(start), args, pairs, None, copy.deepcopy(tokenizer))
    ours.train()
    args = config(tmp_path / "sft", **options)
    fields = {name for name, field in SFTConfig.__dataclass_fields__.items() if field.init}
    sft_args = SFTConfig(**{key: getattr(args, key) for key in fields - {"logging_nan_inf_filter"}})
    sft = SFTTrainer(copy.deepcopy(start), sft_args, train_dataset=pairs, processing_class=copy.deepcopy(tokenizer))
    sft.train()
    logs = ours.state.log_history[:3], sft.state.log_history[:3]
    for key in ("loss", "aux_loss", "grad_norm"):
        found, wanted = ([float(entry[key]) for entry in log] for log in logs)
        assert found == pytest.approx(wanted, rel=TOLERANCE), key
    assert logs[0][0]["loss"] > logs[0][0]["lm_loss"] + 0.1, "the router loss is not in the loss"
    trained, wanted, before = (dict(model.named_parameters()) for model in (ours.model, sft.model, start))
    assert_same_weights(trained, wanted, bound=TOLERANCE, start=before)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_with_a_router_loss_get_packed_rows(family, dataset, tokenizer, tmp_path):
    """The model's own router loss would fail on the mask of packed rows; probe and diagnostics do not ask for it."""
    model = family_model(tokenizer, family, torch.float32)
    args = config(tmp_path, max_steps=1, diagnostics_pairs=8, eval_strategy="no")
    trainer = LLMJEPATrainer(model, args, dataset, dataset.select(range(8)), tokenizer)
    assert trainer.aux_loss_enabled and trainer.layout == "packed"
    trainer.train()
    assert trainer.start_diagnostics and trainer.state.log_history[1]["aux_loss"] > 0
    assert model.config.output_router_logits, "TRL's setting is put back"


def test_a_family_without_a_router_loss_is_refused_in_a_line(dataset, tokenizer, tmp_path):
    """llama4 brings a coefficient, and transformers no function: an AttributeError in the first step."""
    model = family_model(tokenizer, "llama4_text", torch.float32)
    with pytest.raises(UserError, match="router_aux_loss_coef: 0"):
        LLMJEPATrainer(model, config(tmp_path), dataset, None, tokenizer)
    args = config(tmp_path, router_aux_loss_coef=0.0, max_steps=1)
    assert LLMJEPATrainer(model, args, dataset, None, tokenizer).train().training_loss > 0
