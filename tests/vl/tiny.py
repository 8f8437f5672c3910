"""Tiny configs, models and inputs of VL-JEPA for the tests of its modules, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    Gemma3TextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    VJEPA2Config,
    set_seed,
)

from llm_jepa.vl.modeling import VLJEPAModel

VISUAL, HIDDEN, Y_HIDDEN, SHARED, VOCABULARY = 24, 32, 16, 20, 90
# A large spread of the weights makes attention attend: at 0.02 it is nearly flat, and an error in who sees whom hides.
BASE: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": VOCABULARY, "initializer_range": 0.3,
}  # fmt: skip
MIXED: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {**MIXED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "olmo2": {},
    "olmo3": MIXED,
    "phi3": {"sliding_window": 4, "pad_token_id": 0},
    "gpt_neox": {},
}
VJEPA2 = VJEPA2Config(
    crop_size=32, patch_size=16, frames_per_clip=4, hidden_size=VISUAL, num_hidden_layers=1, num_attention_heads=2,
    initializer_range=0.3, pred_hidden_size=12, pred_num_hidden_layers=1, pred_num_attention_heads=1,
    pred_num_mask_tokens=1,
)  # fmt: skip
VIT = {"hidden_size": VISUAL, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE_ENCODERS: dict[str, dict[str, Any]] = {
    **{name: {**VIT, "image_size": 32, "patch_size": 16, "initializer_range": 0.3} for name in (
        "vit", "ijepa", "siglip_vision_model", "clip_vision_model", "dinov2")},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, VISUAL], "depths": [1, 1], "layer_type": "basic"},
    "mobilenet_v2": {"depth_multiplier": 0.35, "image_size": 64, "initializer_range": 0.3},
    "convnext": {"num_stages": 2, "hidden_sizes": [8, VISUAL], "depths": [1, 1], "image_size": 32},
}  # fmt: skip
BERT = BertConfig(
    hidden_size=Y_HIDDEN, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCABULARY,
    initializer_range=0.3,
)  # fmt: skip
GEMMA = Gemma3TextConfig(
    **{**BASE, "hidden_size": Y_HIDDEN}, head_dim=8, query_pre_attn_scalar=8, sliding_window=12,
    layer_types=["sliding_attention", "full_attention"], use_bidirectional_attention=True,
)  # fmt: skip


def fresh(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of its own: models write into theirs."""
    return type(config).from_dict(config.to_dict())


def predictor_config(family: str = "llama", **options: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**BASE, **FAMILIES.get(family, {}), **options})


def build(
    x_encoder: Any = None, predictor: Any = None, y_encoder: Any = None, *, attention: str | None = None, **options: Any
) -> VLJEPAModel:
    set_seed(0)
    predictor = predictor or predictor_config()
    if attention is not None:
        predictor = AutoModel.from_config(predictor, attn_implementation=attention)
    defaults = {"shared_dim": SHARED, "num_frames": 4, "dtype": torch.float64}
    return VLJEPAModel.from_parts(
        x_encoder or fresh(VJEPA2), predictor, y_encoder or fresh(BERT), **{**defaults, **options}
    ).eval()


def texts(*lengths: int, extra: int = 0, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Right padded ids and mask; what stands in the padding is any id, not only that of a pad token."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths) + extra
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, VOCABULARY, (len(lengths), longest), generator=generator), mask


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def assert_same(first: PreTrainedModel, second: PreTrainedModel) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in ours.items())
