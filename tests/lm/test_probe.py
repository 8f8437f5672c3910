"""Claims about the probe: it picks the layouts a model computes exactly, sees planted bugs, and leaves no trace."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from llm_jepa.core.errors import UserError
from llm_jepa.lm import probe
from llm_jepa.lm.probe import choose_layout, why_inexact
from tests.conftest import BASE, family_model
from tests.lm.test_batching import TOLERANCE, assert_same, gradients, packed_pass, separate_passes, views_of


@pytest.fixture
def warned(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(probe.logger, "warning", lambda text, *rest: found.append(text))
    return found


# -- decisions ----------------------------------------------------------------------------------------------------


def test_attention_gets_packed_rows_without_a_word(tokenizer, warned):
    assert choose_layout(family_model(tokenizer, "llama"), 2) == "packed" and warned == []


@pytest.mark.parametrize("family", ["mamba2", "bloom", "gpt_neo"])
@pytest.mark.parametrize("predictors", [0, 2])
def test_a_fallback_is_one_warning_with_the_model_and_the_reason(family, predictors, tokenizer, warned):
    model = family_model(tokenizer, family, torch.float32)
    assert choose_layout(model, predictors) == "separate"
    assert len(warned) == 1 and "\n" not in warned[0] and len(warned[0]) < 300
    assert type(model).__name__ in warned[0] and "packed rows: " in warned[0]


def test_flash_attention_takes_no_mask_of_predictor_tokens(tokenizer):
    model = family_model(tokenizer, "llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="attn_implementation: sdpa, or num_predictor_tokens: 0"):
        choose_layout(model, 1)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_flash_attention_gets_flat_rows_where_they_are_exact(family, tokenizer, monkeypatch, warned):
    """What is asked, and in which order; sdpa answers here in the place of a GPU's flash attention."""
    model = family_model(tokenizer, family, torch.float32)
    backend, asked = model.config._attn_implementation, []

    def answer(model, layout, predictors):
        asked.append((layout, predictors))
        model.config._attn_implementation = backend
        return why_inexact(model, layout, predictors)

    monkeypatch.setattr(probe, "why_inexact", answer)
    model.config._attn_implementation = "flash_attention_2"
    expected = ["flat"] if family == "llama" else ["flat", "separate"]
    assert choose_layout(model, 0) == expected[-1]
    assert asked == [(layout, 0) for layout in expected] and len(warned) == len(expected) - 1


def test_flex_attention_is_refused(tokenizer):
    model = family_model(tokenizer, "llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="set attn_implementation: sdpa"):
        choose_layout(model, 0)


def bidirectional(tokenizer):
    """What `AutoModelForCausalLM` makes of an ordinary BERT checkpoint: a causal LM by name, which looks ahead."""
    size = {key: BASE[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(vocab_size=len(tokenizer), **size)).eval()


@pytest.mark.parametrize("predictors", [0, 2])
def test_a_model_that_looks_ahead_is_refused_in_a_line(predictors, tokenizer, warned):
    with pytest.raises(UserError, match="BertLMHeadModel computes no layout") as error:
        choose_layout(bidirectional(tokenizer), predictors)
    text = str(error.value)
    assert "\n" not in text and "packed rows: " in text and "separate rows: " in text and "jepa_weight: 0" in text
    assert warned == []


# -- planted bugs -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hooked(*hooks):
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def masked_by(change, model):
    """Every attention layer takes `change(mask)`, bool, [1, 1, L, L] or wider, for its mask."""

    def before(module, args, kwargs):
        length = kwargs["hidden_states"].shape[1]
        mask = kwargs["attention_mask"]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril() if mask is None else mask
        return args, {**kwargs, "attention_mask": change(mask)}

    return [layer.self_attn.register_forward_pre_hook(before, with_kwargs=True) for layer in model.model.layers]


def band(mask, width):
    order = torch.arange(mask.shape[-1])
    return mask & (order[:, None] - order[None, :] < width)


def test_probe_sees_a_window_by_place(tokenizer):
    """Exact for whole sequences, where place is position; wrong for what continues an LM row from behind it."""
    model = family_model(tokenizer, "llama", torch.float32)
    with hooked(*masked_by(lambda mask: band(mask, 8), model)):
        assert "differ from those of the sequences alone" in why_inexact(model, "packed")
        assert why_inexact(model, "separate") is None
    assert why_inexact(model, "packed") is None, "the hooks are still there"


@pytest.mark.parametrize(
    ("family", "key"), [("mistral", "sliding_window"), ("llama4_text", "attention_chunk_size")]
)  # fmt: skip
def test_probe_sees_a_long_window_by_place(family, key, tokenizer):
    """Of 4096 tokens, no row here is as long: the model reads it from its configuration, which the probe narrows."""
    model = family_model(tokenizer, family, torch.float32, **{key: 4096})
    assert why_inexact(model, "packed") is None
    with hooked(*masked_by(lambda mask: band(mask, getattr(model.config, key)), model)):
        assert "differ from those of the sequences alone" in why_inexact(model, "packed")


@pytest.mark.parametrize("predictors", [0, 2])
def test_probe_sees_ignored_positions(predictors, tokenizer):
    model = family_model(tokenizer, "llama", torch.float32)

    def forget(module, args, kwargs):
        return args, {key: value for key, value in kwargs.items() if key != "position_ids"}

    with hooked(model.get_decoder().register_forward_pre_hook(forget, with_kwargs=True)):
        assert "differ from those of the sequences alone" in why_inexact(model, "packed", predictors)
        assert "tokens they must not see" in why_inexact(model, "flat", 0), "nothing parts the segments any more"
        assert why_inexact(model, "separate", predictors) is None


def test_probe_sees_a_mask_that_is_dropped(tokenizer):
    model = family_model(tokenizer, "llama", torch.float32)
    causal = lambda mask: torch.ones_like(mask).tril()  # noqa: E731
    with hooked(*masked_by(causal, model)):
        assert "tokens they must not see" in why_inexact(model, "packed")
        assert why_inexact(model, "separate") is None


@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_probe_sees_a_leak_from_the_neighbour(family, size, tokenizer):
    """A convolution over two places: harmless in a row of its own, however small it is a leak in a shared one."""
    model = family_model(tokenizer, family, torch.float32)
    layer = model.get_decoder().layers[0]

    def leak(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden + size * torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]

    with hooked(layer.register_forward_hook(leak)):
        assert "tokens they must not see" in why_inexact(model, "packed")
        assert why_inexact(model, "separate") is None


def test_probe_sees_a_leak_between_rows(tokenizer):
    """What a batch norm would do. Then no layout is exact."""
    model = family_model(tokenizer, "llama", torch.float32)
    mix = lambda module, args, output: output - output.mean(dim=(0, 1), keepdim=True)  # noqa: E731
    with hooked(model.get_decoder().norm.register_forward_hook(mix)):
        assert "tokens they must not see" in why_inexact(model, "separate")
        with pytest.raises(UserError, match="LlamaForCausalLM computes no layout"):
            choose_layout(model, 2)


def test_probe_sees_nan(tokenizer, warned):
    """A model that breaks down in long rows alone."""
    model = family_model(tokenizer, "llama", torch.float32)
    break_down = lambda module, args, output: output * (1.0 if output.shape[1] < 50 else torch.nan)  # noqa: E731
    with hooked(model.get_decoder().norm.register_forward_hook(break_down)):
        assert choose_layout(model, 2) == "separate"


@pytest.mark.parametrize(("dtype", "family"), [(torch.bfloat16, "llama"), (torch.bfloat16, "gemma3_text"),
                                               (torch.bfloat16, "qwen3_moe"), (torch.float16, "llama")])  # fmt: skip
def test_narrow_weights_pass(dtype, family, tokenizer, warned):
    """Their rounding is no inexact layout."""
    assert choose_layout(family_model(tokenizer, family, dtype, initializer_range=0.02), 2) == "packed"


# -- no trace -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma3_text", {"sliding_window": 32}),
        ("llama4_text", {"attention_chunk_size": 32}),
        ("recurrent_gemma", {"attention_window_size": 32}),  # known to the configuration as sliding_window
        ("jamba", {}),  # raises in packed rows
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5}),
    ],
)
def test_probe_leaves_no_trace(family, options, training, tokenizer, warned):
    model = family_model(tokenizer, family, torch.float32, **options).train(training)
    before, weights = copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    random = torch.get_rng_state()
    choose_layout(model, 2)
    assert model.config.to_dict() == before and [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# -- flat rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_view", ["prefix", "message"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_flat_equals_separate_passes(family, context_view, rows, tokenizer, tmp_path):
    """One row, positions that start over, no mask: transformers parts the segments by itself."""
    model = family_model(tokenizer, family)
    assert why_inexact(model, "flat", 0) is None
    views, copied = views_of(rows, tokenizer, context_view, count=3), copy.deepcopy(model)
    reference = separate_passes(copied, views, [], "info_nce", 0.7)
    reference.backward()
    ours = packed_pass(model, model, views, [], "info_nce", 0.7, tmp_path, tokenizer, layout="flat")
    ours.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=TOLERANCE)
    assert_same(gradients(model), gradients(copied))


@pytest.mark.parametrize("family", ["gpt_oss", "opt", "mamba2"])  # falcon too before transformers 5.24
def test_flat_is_refused_where_the_model_sees_one_sequence(family, tokenizer):
    model = family_model(tokenizer, family, torch.float32)
    assert "tokens they must not see" in why_inexact(model, "flat", 0)


def test_tf32_is_off_meanwhile(tokenizer, monkeypatch):
    """Its 10 bits are off by more than the tolerance in float32: every model would be sent to separate rows."""
    seen, real = [], probe.model_inputs
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(probe, "model_inputs", lambda *args: seen.append(matmul.fp32_precision) or real(*args))
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert choose_layout(family_model(tokenizer, "llama"), 1) == "packed"
        assert set(seen) == {"ieee"} and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
