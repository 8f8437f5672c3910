"""Claims about the import of open-vljepa: it computes what was described, and refuses what it cannot place.

The reference forward pass below is written from the description alone: LlamaModel without a causal mask over
[vis_proj(features); embed(query)], mean over visual and real query tokens, out_proj; Gemma, masked mean, projector.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Gemma3TextConfig, Gemma3TextModel, LlamaConfig, LlamaModel, VJEPA2Config

from llm_jepa.core.errors import UserError
from llm_jepa.vl import open_vljepa
from llm_jepa.vl.configuration import VLJEPAConfig
from llm_jepa.vl.modeling import VLJEPAModel
from llm_jepa.vl.open_vljepa import from_open_vljepa, open_vljepa_frames, our_key
from tests.conftest import UNIT32

VISUAL, HIDDEN, Y_HIDDEN, SHARED = 24, 128, 48, 20
# Heads of 64 as in Llama-3.2-1B, which no shape tells; all other sizes differ from one another.
LLAMA: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": HIDDEN, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
# Seven layers: the sixth sees everything, the others 257 tokens to each side at most, and targets below are longer.
GEMMA: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": Y_HIDDEN, "intermediate_size": 56, "num_hidden_layers": 7,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "query_pre_attn_scalar": 256,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "sliding_window": 512, "use_bidirectional_attention": True,
    "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
}  # fmt: skip
X_ENCODER = VJEPA2Config(
    crop_size=32, patch_size=16, frames_per_clip=8, hidden_size=VISUAL, num_hidden_layers=1, num_attention_heads=2,
    pred_hidden_size=12, pred_num_hidden_layers=1, pred_num_attention_heads=1, pred_num_mask_tokens=1,
)  # fmt: skip


def random_state(llama: dict[str, Any] = LLAMA, gemma: dict[str, Any] = GEMMA) -> dict[str, Tensor]:
    """As its save code writes it: bfloat16 backbones, float32 linear maps, nothing of the x_encoder.

    Weights are spread widely, and norms away from their start: at 0.02 attention is flat and errors in it invisible.
    """
    torch.manual_seed(0)
    parts: dict[str, torch.nn.Module] = {
        "predictor": LlamaModel(LlamaConfig(**llama)),
        "y_encoder.model": Gemma3TextModel(Gemma3TextConfig(**gemma)),
    }
    state = {}
    for prefix, part in parts.items():
        for name, weight in part.state_dict().items():
            centre = 1.0 if weight.dim() == 1 and prefix == "predictor" else 0.0  # Gemma's norms scale by 1 + weight
            state[f"{prefix}.{name}"] = (centre + 0.3 * torch.randn_like(weight)).bfloat16()
    hidden, y_hidden = llama["hidden_size"], gemma["hidden_size"]
    for name, linear in {
        "predictor.vis_proj": torch.nn.Linear(VISUAL, hidden),
        "predictor.out_proj": torch.nn.Linear(hidden, SHARED),
        "y_encoder.projector": torch.nn.Linear(y_hidden, SHARED),
    }.items():
        state |= {f"{name}.{key}": value.clone() for key, value in linear.state_dict().items()}
    return state


def write(path: Path, state: Any) -> Path:
    torch.save(
        {"epoch": 3, "model_state_dict": state, "loss": 1.5, "config": {"training": {"temperature": 0.07}}}, path
    )
    return path


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def model(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> VLJEPAModel:
    return from_open_vljepa(write(tmp_path_factory.mktemp("open_vljepa") / "best.pt", state), x_encoder=X_ENCODER)


def described_prediction(state: dict[str, Tensor], features: Tensor, query: Tensor, mask: Tensor) -> Tensor:
    state = {key: value.float() for key, value in state.items()}
    llama = LlamaModel(LlamaConfig(**LLAMA)).eval()
    own = {key.removeprefix("predictor."): value for key, value in state.items() if key.startswith("predictor.")}
    llama.load_state_dict({key: value for key, value in own.items() if "_proj." not in key or "layers" in key})
    visual = F.linear(features, own["vis_proj.weight"], own["vis_proj.bias"])
    tokens = torch.cat([visual, F.embedding(query, own["embed_tokens.weight"])], dim=1)
    seen = torch.cat([torch.ones(visual.shape[:2], dtype=torch.long), mask], dim=1)
    states = llama(inputs_embeds=tokens, attention_mask=seen, is_causal=False).last_hidden_state
    pooled = torch.stack([row[keep.bool()].mean(dim=0) for row, keep in zip(states, seen, strict=True)])
    return F.linear(pooled, own["out_proj.weight"], own["out_proj.bias"])


def described_target(state: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    state = {key: value.float() for key, value in state.items()}
    gemma = Gemma3TextModel(Gemma3TextConfig(**GEMMA)).eval()
    own = "y_encoder.model."
    gemma.load_state_dict({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})
    states = gemma(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = torch.stack([row[keep.bool()].mean(dim=0) for row, keep in zip(states, mask, strict=True)])
    return F.linear(pooled, state["y_encoder.projector.weight"], state["y_encoder.projector.bias"])


def texts(vocabulary: int, lengths: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, vocabulary, (len(lengths), longest)), mask  # padding holds any id, not only the pad's


@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 2, 5)], ids=["unpadded", "padded"])
@torch.no_grad()
def test_predictions_are_the_described_ones(
    model: VLJEPAModel, state: dict[str, Tensor], lengths: tuple[int, ...]
) -> None:
    query, mask = texts(LLAMA["vocab_size"], lengths, seed=1)
    features = torch.randn(3, 40, VISUAL)
    ours = model(visual_features=features, query_ids=query, query_mask=mask).predicted
    assert ours.shape == (3, SHARED) and ours.std() > 0.1, "flat predictions would agree with anything"
    torch.testing.assert_close(ours, described_prediction(state, features, query, mask), atol=UNIT32, rtol=0)


@pytest.mark.parametrize("lengths", [(290, 290), (290, 7)], ids=["unpadded", "padded"])
@torch.no_grad()
def test_targets_are_the_described_ones(model: VLJEPAModel, state: dict[str, Tensor], lengths: tuple[int, ...]) -> None:
    """290 tokens: beyond the 257 of a windowed layer."""
    ids, mask = texts(GEMMA["vocab_size"], lengths, seed=2)
    ours = model(target_ids=ids, target_mask=mask).target
    assert ours.shape == (2, SHARED) and (ours[0] - ours[1]).abs().max() > 0.1
    torch.testing.assert_close(ours, described_target(state, ids, mask), atol=UNIT32, rtol=0)


@torch.no_grad()
def test_padding_changes_nothing(model: VLJEPAModel) -> None:
    query, _ = texts(LLAMA["vocab_size"], (4,), seed=3)
    target, _ = texts(GEMMA["vocab_size"], (6,), seed=4)
    features = torch.randn(1, 8, VISUAL)
    alone = model(visual_features=features, query_ids=query, target_ids=target)
    padded = model(
        visual_features=features,
        query_ids=F.pad(query, (0, 3), value=7), query_mask=F.pad(torch.ones_like(query), (0, 3)),
        target_ids=F.pad(target, (0, 5), value=7), target_mask=F.pad(torch.ones_like(target), (0, 5)),
    )  # fmt: skip
    torch.testing.assert_close(padded.predicted, alone.predicted, atol=UNIT32, rtol=0)
    torch.testing.assert_close(padded.target, alone.target, atol=UNIT32, rtol=0)


@torch.no_grad()
def test_a_clip_goes_through_the_given_x_encoder(model: VLJEPAModel, state: dict[str, Tensor]) -> None:
    clip = torch.randn(2, 4, 3, 32, 32)
    query, mask = texts(LLAMA["vocab_size"], (3, 5), seed=5)
    features = model.x_encoder(pixel_values_videos=clip, skip_predictor=True).last_hidden_state
    assert features.shape == (2, 8, VISUAL)
    ours = model(pixel_values_videos=clip, query_ids=query, query_mask=mask).predicted
    torch.testing.assert_close(ours, described_prediction(state, features, query, mask), atol=UNIT32, rtol=0)


def test_every_tensor_of_the_file_is_in_the_model_as_float32(model: VLJEPAModel, state: dict[str, Tensor]) -> None:
    ours = model.state_dict()
    assert {our_key(key) for key in state} == {key for key in ours if not key.startswith("x_encoder.")} - {
        "log_temperature"
    }
    for key, value in state.items():
        assert torch.equal(ours[our_key(key)], value.float()), key
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert not model.training
    assert model.temperature.item() == pytest.approx(0.07)


def test_what_shapes_cannot_tell_is_llama_3_2_and_embeddinggemma(model: VLJEPAModel) -> None:
    llama, gemma = model.config.predictor_config, model.config.y_encoder_config
    assert llama.is_causal is False and llama.rms_norm_eps == 1e-5
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim) == (4, 2, 64)
    assert llama.rope_parameters == LlamaConfig(**LLAMA).rope_parameters  # compared in the old spelling of the Hub
    assert (gemma.num_attention_heads, gemma.num_key_value_heads, gemma.head_dim) == (3, 1, 10)
    assert gemma.use_bidirectional_attention is True and gemma.sliding_window == 512 // 2 + 1
    assert gemma.query_pre_attn_scalar == 256 and gemma.rms_norm_eps == 1e-6
    assert gemma.layer_types == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert gemma.rope_parameters == Gemma3TextConfig(**GEMMA).rope_parameters
    assert model.config.y_pooling == "mean" and model.config.token_merge == [1, 1, 1]
    assert model.config.num_frames == 8


@torch.no_grad()
def test_saving_and_loading_is_bit_equal(model: VLJEPAModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = VLJEPAModel.from_pretrained(tmp_path).eval()
    assert model.state_dict().keys() == again.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    query, mask = texts(80, (290, 3), seed=6)
    inputs = {"visual_features": torch.randn(2, 8, VISUAL), "query_ids": query[:, :5], "query_mask": mask[:, :5],
              "target_ids": query, "target_mask": mask}  # fmt: skip
    first, second = model(**inputs), again(**inputs)
    assert torch.equal(first.predicted, second.predicted) and torch.equal(first.target, second.target)


@torch.no_grad()
def test_a_given_config_is_used_and_left_alone(tmp_path: Path) -> None:
    """4 query and 4 key heads of 8: with the published 64 the same rows would not be whole heads."""
    llama = LLAMA | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    path = write(tmp_path / "best.pt", random_state(llama))
    with pytest.raises(UserError, match="32 query and 32 key rows .* heads of 64; give the predictor_config"):
        from_open_vljepa(path, x_encoder=X_ENCODER)
    config = LlamaConfig(**llama | {"rms_norm_eps": 0.5})
    gemma = Gemma3TextConfig(**GEMMA | {"sliding_window": 6})
    before = config.to_dict(), gemma.to_dict()
    model = from_open_vljepa(path, x_encoder=X_ENCODER, predictor_config=config, y_encoder_config=gemma)
    assert model.predictor.layers[0].input_layernorm.variance_epsilon == 0.5
    assert model.y_encoder.config.sliding_window == 4
    assert (config.to_dict(), gemma.to_dict()) == before


def change(**tensors: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = state | {key: value for key, value in tensors.items() if value is not None}
        return {key: value for key, value in state.items() if key not in tensors or tensors[key] is not None}

    return changed


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a missing bias": (
        change(**{"predictor.out_proj.bias": None}), r"1 missing: predictor\.out_proj\.bias\."
    ),
    "a missing tensor that sizes are read off": (
        change(**{"y_encoder.model.embed_tokens.weight": None}), r"1 missing: y_encoder\.model\.embed_tokens\.weight\."
    ),
    "a layer in the middle": (
        lambda state: {key: value for key, value in state.items() if not key.startswith("y_encoder.model.layers.3.")},
        r"13 missing: (y_encoder\.model\.layers\.3\.\S+, ){2}y_encoder\.model\.layers\.3\.\S+, \.\.\.; "
        r"13 unexpected: y_encoder\.model\.layers\.6\.",
    ),
    "a layer of a huge number": (
        lambda state: {key.replace("predictor.layers.1.", "predictor.layers.999999999."): value
                       for key, value in state.items()},
        r"9 missing: predictor\.layers\.1\..*; 9 unexpected: predictor\.layers\.999999999\.",
    ),
    "an unexpected key of a part": (
        change(**{"predictor.layers.0.self_attn.q_proj.bias": torch.zeros(256)}),
        r"layout, 1 unexpected: \S+q_proj\.bias\."
    ),
    "an x_encoder": (change(**{"x_encoder.model.norm.weight": torch.zeros(2)}), r"1 unexpected: x_encoder\.model"),
    "a wrong shape": (
        change(**{"predictor.layers.1.mlp.up_proj.weight": torch.zeros(72, 3)}),
        r"1 of another shape: predictor\.layers\.1\.mlp\.up_proj\.weight \[72, 3\] instead of \[72, 128\]\.",
    ),
    "a transposed projector": (
        change(**{"y_encoder.projector.weight": torch.zeros(Y_HIDDEN, SHARED)}),
        r"projector\.weight \[48, 20\] instead of \[20, 48\]",
    ),
    "projections into two spaces": (
        change(**{f"y_encoder.projector.{name}": torch.zeros(shape)
                  for name, shape in (("weight", (21, Y_HIDDEN)), ("bias", (21,)))}),
        r"2 of another shape: y_encoder\.projector\.weight \[21, 48\] instead of \[20, 48\]",
    ),
    "an embedding that is a vector": (
        change(**{"predictor.embed_tokens.weight": torch.zeros(5)}), r"1 of another shape: predictor\.embed_tokens"
    ),
    "an empty embedding": (
        change(**{"predictor.embed_tokens.weight": torch.zeros(90, 0)}), r"1 of another shape: predictor\.embed_tokens"
    ),
    "a prefix of DDP": (
        lambda state: {f"module.{key}": value for key, value in state.items()},
        r"missing: .*unexpected: module\..*prefix 'module\.'"
    ),
    "a key with and without the prefix": (
        lambda state: state | {"module.predictor.norm.weight": state["predictor.norm.weight"]},
        r"layout, 1 unexpected: module\.predictor\.norm\.weight\. Remove the prefix 'module\.'",
    ),
    "whole numbers": (
        change(**{"predictor.norm.weight": torch.zeros(HIDDEN, dtype=torch.int8)}), r"norm\.weight .*not a dense tensor"
    ),
    "a sparse tensor": (
        change(**{"predictor.norm.weight": torch.ones(HIDDEN).to_sparse()}), r"norm\.weight .*not a dense tensor"
    ),
    "a tensor without values": (
        change(**{"predictor.norm.weight": torch.ones(HIDDEN, device="meta")}), r"norm\.weight .*not a dense tensor"
    ),
    "a number for a tensor": (lambda state: state | {"predictor.norm.weight": 3}, r"norm\.weight .*not a dense tensor"),
    "a key that is no text": (lambda state: state | {7: torch.ones(2)}, r"7 in its model_state_dict: not a dense"),
    "an empty state": (lambda state: {}, "has no model_state_dict, but epoch, model_state_dict, loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_do_not_fit_are_refused_by_name_and_count(
    name: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    damage, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as refused:
        from_open_vljepa(write(tmp_path / "best.pt", damage(state)), x_encoder=X_ENCODER)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1500
    assert str(refused.value).count("self_attn") <= 6, "up to three names of each kind"


def test_an_x_encoder_of_another_size_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = VJEPA2Config(**X_ENCODER.to_dict() | {"hidden_size": 32})
    with pytest.raises(UserError, match=r"features of 32, but predictor\.vis_proj of .* takes 24; .*vjepa2-vitl"):
        from_open_vljepa(write(tmp_path / "best.pt", state), x_encoder=other)


class Code:
    """Unpickling it would write a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("place", ["config", "state", "bare"])
def test_a_pickle_with_code_is_refused_and_does_not_run(state: dict[str, Tensor], tmp_path: Path, place: str) -> None:
    path, marker = tmp_path / "best.pt", tmp_path / "ran"
    if place == "config":
        torch.save({"model_state_dict": state, "config": Code(marker)}, path)
    elif place == "state":
        write(path, state | {"predictor.norm.weight": Code(marker)})
    else:
        path.write_bytes(pickle.dumps(Code(marker)))
    with pytest.raises(UserError, match="could run code") as refused:
        from_open_vljepa(path, x_encoder=X_ENCODER)
    assert not marker.exists()
    assert "weights_only" not in str(refused.value), "torch's own text advises to switch the protection off"
    if place == "config":
        torch.load(path, weights_only=False)
        assert marker.exists(), "the pickle was harmless: this test would prove nothing"


def test_files_that_are_no_checkpoint_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    whole = io.BytesIO()
    torch.save({"model_state_dict": state}, whole)
    for content in (b"", b"\x80", b"text, no pickle", whole.getvalue()[:5000], b"PK\x03\x04" + bytes(100)):
        (tmp_path / "best.pt").write_bytes(content)
        with pytest.raises(UserError, match="best.pt"):
            from_open_vljepa(tmp_path / "best.pt", x_encoder=X_ENCODER)
    for missing in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(UserError, match=r"Cannot read .*(No such file|directory)"):
            from_open_vljepa(missing, x_encoder=X_ENCODER)
    for content, found in (
        (state, "predictor.embed_tokens.weight, "),
        ([1], "list"),
        ({"model_state_dict": [1]}, "model_"),
    ):
        torch.save(content, tmp_path / "best.pt")
        with pytest.raises(UserError, match=f"has no model_state_dict, but {found}"):
            from_open_vljepa(tmp_path / "best.pt", x_encoder=X_ENCODER)


def published_layout() -> dict[str, list[int]]:
    """Names and shapes of the published size, written out from its description."""
    layout = {
        "predictor.embed_tokens.weight": [128256, 2048],
        "predictor.norm.weight": [2048],
        "predictor.vis_proj.weight": [2048, 1024],
        "predictor.vis_proj.bias": [2048],
        "predictor.out_proj.weight": [1536, 2048],
        "predictor.out_proj.bias": [1536],
        "y_encoder.model.embed_tokens.weight": [262144, 768],
        "y_encoder.model.norm.weight": [768],
        "y_encoder.projector.weight": [1536, 768],
        "y_encoder.projector.bias": [1536],
    }
    for prefix, layers, width, queries, keys, inner in (
        ("predictor", 8, 2048, 32 * 64, 8 * 64, 8192),
        ("y_encoder.model", 24, 768, 3 * 256, 256, 1152),
    ):
        norms = ["input_layernorm", "post_attention_layernorm"]
        if prefix != "predictor":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for layer in range(layers):
            shapes = {
                "self_attn.q_proj": [queries, width],
                "self_attn.k_proj": [keys, width],
                "self_attn.v_proj": [keys, width],
                "self_attn.o_proj": [width, queries],
                "mlp.gate_proj": [inner, width],
                "mlp.up_proj": [inner, width],
                "mlp.down_proj": [width, inner],
                **dict.fromkeys(norms, [width]),
            }
            if prefix != "predictor":
                shapes |= {"self_attn.q_norm": [256], "self_attn.k_norm": [256]}
            layout |= {f"{prefix}.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    return layout


def test_the_published_size_has_394_tensors_and_each_has_its_place() -> None:
    layout = published_layout()
    assert len(layout) == 394
    assert sum(math.prod(shape) for shape in layout.values()) == pytest.approx(1.06e9, rel=2e-3)
    state = {key: torch.empty(shape, device="meta") for key, shape in layout.items()}
    llama, gemma = open_vljepa._llama_config("best.pt", state), open_vljepa._gemma_config("best.pt", state)
    open_vljepa._check_layout("best.pt", state, llama, gemma)
    assert (llama.num_hidden_layers, llama.num_attention_heads, llama.num_key_value_heads) == (8, 32, 8)
    assert (llama.pad_token_id, llama.vocab_size, llama.intermediate_size) == (128004, 128256, 8192)
    assert (gemma.num_hidden_layers, gemma.num_attention_heads, gemma.num_key_value_heads) == (24, 3, 1)
    assert gemma.layer_types[5::6] == ["full_attention"] * 4
    assert gemma.layer_types.count("full_attention") == 4
    config = VLJEPAConfig(
        x_encoder_config=VJEPA2Config(hidden_size=1024, num_hidden_layers=1, num_attention_heads=16),
        predictor_config=llama,
        y_encoder_config=gemma,
    )
    with torch.device("meta"):
        whole = VLJEPAModel(config).state_dict()
    ours = {key: list(value.shape) for key, value in whole.items() if not key.startswith("x_encoder.")}
    assert ours.pop("log_temperature") == []
    assert {our_key(key): shape for key, shape in layout.items()} == ours


def test_a_frame_is_resized_to_256_cropped_and_normalised() -> None:
    """300 x 400 -> 256 x 341 -> columns 42..297; by PIL, written out."""
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image[:, :200] //= 3  # left and right differ, and the channels do
    image[..., 1] //= 2
    pixels = open_vljepa_frames()([image, image[:, ::-1]], return_tensors="pt")["pixel_values"]
    assert pixels.shape[-4:] == (2, 3, 256, 256)
    resized = np.asarray(Image.fromarray(image).resize((341, 256), Image.Resampling.BILINEAR))[:, 42:298]
    expected = (resized / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    first = pixels.reshape(-1, 3, 256, 256)[0].permute(1, 2, 0)
    torch.testing.assert_close(first, torch.from_numpy(expected).float(), atol=UNIT32, rtol=0)
