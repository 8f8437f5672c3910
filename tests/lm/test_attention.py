"""Who sees whom, worked by hand: two views in one row, windows, chunks, the kind of mask, and what a model is given."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_jepa.lm.attention import (
    attention_mask,
    attention_of_lm_rows,
    attention_of_views,
    model_inputs,
    who_sees_whom,
)
from tests.conftest import BASE

# An LM row of 4 tokens; a view that goes on after 3 of them; a view of 1 token that sees nothing else; a pad.
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 9, 4, 0]]),
    "doc": torch.tensor([[0, 0, 0, 0, 1, 1, 2, -1]]),
    "parent": torch.tensor([[-2, -2, -2, -2, 0, 0, -2, -2]]),
    "visible": torch.tensor([[0, 0, 0, 0, 3, 3, 0, 0]]),
    "position_ids": torch.tensor([[0, 1, 2, 3, 3, 4, 0, 0]]),
}
SEES = [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0, 0],
    [1, 1, 1, 0, 1, 0, 0, 0],
    [1, 1, 1, 0, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 1],
]
# By positions 0 1 2 3 | 3 4 | 0: the view's tokens 3, 4 are 1 and 2 positions after the LM row's token 2.
WINDOW_OF_2 = [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [0, 1, 1, 0, 0, 0, 0, 0],
    [0, 0, 1, 1, 0, 0, 0, 0],
    [0, 0, 1, 0, 1, 0, 0, 0],
    [0, 0, 0, 0, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 1],
]
CHUNKS_OF_2 = [  # positions 0 1 | 2 3 | 4
    [1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0],
    [0, 0, 1, 0, 0, 0, 0, 0],
    [0, 0, 1, 1, 0, 0, 0, 0],
    [0, 0, 1, 0, 1, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 1],
]


def model(family, attention="sdpa", dtype=torch.float32, **options):
    config = AutoConfig.for_model(family, **{**BASE, "vocab_size": 12, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def test_a_token_sees_its_segment_and_the_beginning_of_its_parent():
    seen = who_sees_whom(BATCH["doc"], BATCH["parent"], BATCH["visible"], BATCH["position_ids"])
    assert seen.dtype == torch.bool and seen[0].int().tolist() == SEES


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {}, SEES),
        ("mistral", {"sliding_window": 2}, WINDOW_OF_2),
        ("mistral", {"sliding_window": None}, SEES),
        ("qwen2", {"sliding_window": 2, "use_sliding_window": False}, SEES),  # its layer types say full_attention
    ],
    ids=["full", "window", "no window", "window that no layer uses"],
)
def test_a_model_of_one_kind_of_layer_gets_one_mask(family, options, expected):
    mask = attention_mask(BATCH, model(family, **options))
    assert mask.shape == (1, 1, 8, 8) and mask[0, 0].int().tolist() == expected


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 2,
                         "layer_types": ["sliding_attention", "full_attention"]},
         {"full_attention": SEES, "sliding_attention": WINDOW_OF_2}),
        ("llama4_text", {"head_dim": 8, "attention_chunk_size": 2, "num_local_experts": 2, "num_experts_per_tok": 1,
                         "intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"],
                         "no_rope_layers": [1, 0]},
         {"chunked_attention": CHUNKS_OF_2, "full_attention": SEES}),
    ],
    ids=["window", "chunks"],
)  # fmt: skip
def test_a_model_of_two_kinds_of_layers_gets_a_mask_for_each(family, options, expected):
    masks = attention_mask(BATCH, model(family, **options))
    assert {kind: mask[0, 0].int().tolist() for kind, mask in masks.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_adds_the_smallest_number_of_its_dtype(dtype):
    """Not -inf, which is NaN after the softmax of a row of them; and not a bool, which it would add as 0 and 1."""
    mask = attention_mask(BATCH, model("llama", "eager", dtype))
    assert mask.dtype == dtype and mask.shape == (1, 1, 8, 8)
    expected = torch.where(torch.tensor(SEES).bool(), 0.0, torch.finfo(dtype).min).to(dtype)
    assert torch.equal(mask[0, 0], expected)


def test_what_a_model_is_given():
    """With segments a mask and positions; with rows a mask of the tokens; with a flat row positions, and no mask."""
    llama = model("llama")
    segments, rows, flat = (model_inputs(BATCH, llama, attention) for attention in ("segments", "rows", "flat"))
    for inputs in (segments, rows, flat):
        assert inputs["input_ids"] is BATCH["input_ids"] and inputs["use_cache"] is False
    assert set(segments) == {"input_ids", "use_cache", "position_ids", "attention_mask"}
    assert torch.equal(segments["attention_mask"], attention_mask(BATCH, llama))
    assert segments["position_ids"] is flat["position_ids"] is BATCH["position_ids"]
    assert set(rows) == {"input_ids", "use_cache", "attention_mask"}
    assert rows["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]] and rows["attention_mask"].dtype == torch.long
    assert set(flat) == {"input_ids", "use_cache", "position_ids"}


def test_how_a_layout_is_attended_to():
    assert [attention_of_views(layout) for layout in ("packed", "separate", "flat")] == ["segments", "rows", "flat"]
    alone = {"lm_at": torch.tensor([0, 8]), "doc": torch.zeros(2, 8)}
    together = {"lm_at": torch.tensor([0, 4]), "doc": torch.zeros(1, 8)}
    assert [attention_of_lm_rows("packed", batch) for batch in (alone, together)] == ["rows", "segments"]
    assert [attention_of_lm_rows(layout, together) for layout in ("separate", "flat")] == ["rows", "flat"]
    with pytest.raises(KeyError):
        attention_of_views("other")


def test_masks_are_built_on_the_device_of_the_batch():
    batch = {name: column.to("meta") for name, column in BATCH.items()}
    for attention in ("sdpa", "eager"):
        assert attention_mask(batch, model("mistral", attention, sliding_window=2)).device.type == "meta"
