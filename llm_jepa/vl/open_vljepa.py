"""Import of the public VL-JEPA re-implementation open-vljepa (github.com/dion-jy/open-vljepa, cun-bjy/open-vljepa).

Its checkpoints are one torch.save dict {epoch, model_state_dict, loss, config}: eight layers of Llama-3.2-1B,
EmbeddingGemma-300M and three linear maps, 394 tensors, backbones in bfloat16; the frozen V-JEPA 2 is left out. Every
tensor has its place in a `VLJEPAModel`:

    predictor.vis_proj.*                           vision_projection.*
    predictor.out_proj.*                           output_projection.*
    predictor.{embed_tokens, layers.i, norm}.*     the same
    y_encoder.model.*                              y_encoder.*
    y_encoder.projector.*                          target_projection.*

Layout rebuilt from its save code, the published file not opened. Nor have its retrieval numbers been measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from ..core.errors import UserError
from .modeling import VLJEPAModel
from .parts import Part

PAD_TOKEN_ID = 128004  # Llama-3.2's <|finetune_right_pad_id|>, what it fills short queries with
TEMPERATURE = 0.07  # of its loss; fixed, and so not among its tensors
NUM_FRAMES = 8  # of its video stage (configs/base.yaml)
FRAME_SIZE = 256

# meta-llama/Llama-3.2-1B, config.json: what no tensor shape tells. Read in public copies, the gated file not opened.
LLAMA_3_2_1B: dict[str, Any] = {
    "head_dim": 64,  # 32 heads and 8 of keys and values, by the shapes
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": True,
}

# google/embeddinggemma-300m, config.json: what no tensor shape tells. Read as constants of converters that check the
# gated file against them, the file itself not opened.
EMBEDDING_GEMMA_300M: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,  # both sides together: transformers makes it 257, the first distance not seen
    "sliding_window_pattern": 6,  # five windowed layers, then one that sees everything
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "use_bidirectional_attention": True,
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

_RENAMED = (
    ("predictor.vis_proj.", "vision_projection."),
    ("predictor.out_proj.", "output_projection."),
    ("y_encoder.projector.", "target_projection."),
    ("y_encoder.model.", "y_encoder."),
)
# The tensors that sizes are read off, with their number of dimensions.
_LAYER = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.mlp.gate_proj")
_SIZED_BY = {
    "predictor.vis_proj.weight": 2,
    "predictor.out_proj.weight": 2,
    **{f"predictor.{name}.weight": 2 for name in ("embed_tokens", *_LAYER)},
    **{f"y_encoder.model.{name}.weight": 2 for name in ("embed_tokens", *_LAYER)},
    "y_encoder.model.layers.0.self_attn.q_norm.weight": 1,
}


def from_open_vljepa(
    path: str | Path,
    *,
    x_encoder: Part,
    predictor_config: PreTrainedConfig | None = None,
    y_encoder_config: PreTrainedConfig | None = None,
) -> VLJEPAModel:
    """A checkpoint of open-vljepa as a `VLJEPAModel` in float32, in evaluation mode.

    Layout rebuilt from its save code, the published file not opened. The model computes what its code does: visual
    tokens first, then the query, positions 0, 1, ...; no causal mask; mean over visual and real query tokens; masked
    mean of the y_encoder's states, without the Dense layers and prompts that come with EmbeddingGemma; temperature
    0.07. One thing differs: it was trained in bfloat16, where Gemma's embedding scale, sqrt(768) = 27.71, is 27.75.

    Its processor: `VLJEPAProcessor.from_parts(model.config, image_processor=open_vljepa_frames(), tokenizer=
    "meta-llama/Llama-3.2-1B", target_tokenizer="google/embeddinggemma-300m")`. What it pads with makes no difference.

    Args:
        path: the file. Read as tensors and plain values only: a pickle that would run code is refused.
        x_encoder: not in the file. A Hub id or folder, a config (random weights) or a model; it was trained with
            facebook/vjepa2-vitl-fpc64-256.
        predictor_config, y_encoder_config: used as they are. None: sizes are read off the tensors, the rest is
            `LLAMA_3_2_1B` and `EMBEDDING_GEMMA_300M`.

    Raises UserError for a file that cannot be read so, for keys that are missing, unexpected or of another shape, and
    for an x_encoder whose features the projection cannot take.
    """
    state = _read(path)
    _check_parts(path, state)
    predictor_config = predictor_config or _llama_config(path, state)
    y_encoder_config = y_encoder_config or _gemma_config(path, state)
    _check_layout(path, state, predictor_config, y_encoder_config)
    ours = {our_key(key): tensor for key, tensor in state.items()}
    shared_dim, visual_dim = state["predictor.out_proj.weight"].shape[0], state["predictor.vis_proj.weight"].shape[1]
    model = VLJEPAModel.from_parts(
        x_encoder,
        _with_weights(predictor_config, _below("predictor", ours)),
        _with_weights(y_encoder_config, _below("y_encoder", ours)),
        shared_dim=shared_dim,
        y_pooling="mean",
        temperature=TEMPERATURE,
        num_frames=NUM_FRAMES,
    )
    if model.config.visual_dim != visual_dim:
        raise UserError(
            f"The x_encoder gives features of {model.config.visual_dim}, predictor.vis_proj of {path} takes "
            f"{visual_dim}; give the x_encoder it was trained with, facebook/vjepa2-vitl-fpc64-256 (1024)."
        )
    for name in ("vision_projection", "output_projection", "target_projection"):
        getattr(model, name).load_state_dict(_below(name, ours))
    return model.eval()


def open_vljepa_frames() -> Any:
    """What open-vljepa does to a frame, by PIL: shorter side to 256, the middle 256 x 256, ImageNet normalisation.

    V-JEPA 2's own processor resizes to 292 before the same crop (`processing.vjepa2_frames`). Bilinear as there; which
    filter open-vljepa takes is not confirmed.
    """
    from transformers import VideoMAEImageProcessorPil

    return VideoMAEImageProcessorPil(
        size={"shortest_edge": FRAME_SIZE},
        crop_size={"height": FRAME_SIZE, "width": FRAME_SIZE},
        resample=PILImageResampling.BILINEAR,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def our_key(key: str) -> str:
    """open-vljepa's name of a tensor -> `VLJEPAModel`'s."""
    for theirs, ours in _RENAMED:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _read(path: str | Path) -> dict[str, Tensor]:
    """model_state_dict of the file; `epoch`, `loss`, `config` and an optimizer's state are left alone."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or type(error).__name__}.") from None
    except Exception as error:  # damaged bytes end in any of a dozen kinds, struct.error and AssertionError among them
        if type(error).__name__ == "UnpicklingError":  # its text advises weights_only=False
            raise UserError(
                f"{path} holds more than tensors and plain values, or is no torch checkpoint. It is refused, because "
                "unpickling it could run code; save it again as {'model_state_dict': ...} of tensors."
            ) from None
        raise UserError(
            f"{path} is no torch checkpoint, or a broken one ({type(error).__name__}); fetch it again."
        ) from None
    state = checkpoint.get("model_state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not state:
        found = ", ".join(map(str, list(checkpoint)[:3])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(
            f"{path} has no model_state_dict, but {found[:200] or 'nothing'}: it is no open-vljepa checkpoint."
        )
    odd = [
        str(key)
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, Tensor) and value.is_floating_point())
        or value.layout is not torch.strided
        or value.device.type != "cpu"
    ]
    if odd:
        raise UserError(f"{path}: {_some(odd)} in its model_state_dict: not a dense tensor of floats under a name.")
    return state


def _check_parts(path: str | Path, state: dict[str, Tensor]) -> None:
    """What must hold before sizes can be read off. Raises UserError."""
    foreign = [key for key in state if not key.startswith(("predictor.", "y_encoder.model.", "y_encoder.projector."))]
    missing = [key for key in _SIZED_BY if key not in state]
    misshaped = [
        f"{key} {list(state[key].shape)}"
        for key, dims in _SIZED_BY.items()
        if key in state and (state[key].dim() != dims or 0 in state[key].shape)
    ]
    _refuse(path, missing, foreign, misshaped)


def _check_layout(
    path: str | Path, state: dict[str, Tensor], predictor_config: PreTrainedConfig, y_encoder_config: PreTrainedConfig
) -> None:
    """Every tensor the two parts and the projections need, no other, each in its shape. Raises UserError."""
    expected: dict[str, list[int]] = {}
    for prefix, config in (("predictor", predictor_config), ("y_encoder.model", y_encoder_config)):
        with torch.device("meta"):  # names and shapes, no memory
            part = AutoModel.from_config(config)
        expected |= {f"{prefix}.{key}": list(value.shape) for key, value in part.state_dict().items()}
    hidden, y_dim = predictor_config.hidden_size, y_encoder_config.hidden_size
    shared_dim, visual_dim = state["predictor.out_proj.weight"].shape[0], state["predictor.vis_proj.weight"].shape[1]
    for name, rows, columns in (
        ("predictor.vis_proj", hidden, visual_dim),
        ("predictor.out_proj", shared_dim, hidden),
        ("y_encoder.projector", shared_dim, y_dim),
    ):
        expected |= {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}
    misshaped = [
        f"{key} {list(state[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in state and list(state[key].shape) != shape
    ]
    missing, unexpected = [key for key in expected if key not in state], [key for key in state if key not in expected]
    _refuse(path, missing, unexpected, misshaped)


def _refuse(path: str | Path, missing: Sequence[str], unexpected: Sequence[str], misshaped: Sequence[str]) -> None:
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    problems = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in found.items() if keys]
    if not problems:
        return
    if any(key.startswith("module.") for key in unexpected):
        advice = "Take the prefix 'module.' of a DistributedDataParallel off its keys first."
    else:
        advice = "Give the predictor_config and y_encoder_config it was trained with, or a file of that layout."
    raise UserError(f"Keys of {path} that do not fit open-vljepa's layout, {'; '.join(problems)}. {advice}")


def _some(keys: Sequence[str]) -> str:
    return ", ".join(key[:100] for key in keys[:3]) + (", ..." if len(keys) > 3 else "")


def _llama_config(path: str | Path, state: dict[str, Tensor]) -> PreTrainedConfig:
    sizes = _sizes(path, state, "predictor.", LLAMA_3_2_1B["head_dim"], "predictor_config")
    pad = PAD_TOKEN_ID if sizes["vocab_size"] > PAD_TOKEN_ID else None
    return LlamaConfig(**LLAMA_3_2_1B | sizes, pad_token_id=pad)


def _gemma_config(path: str | Path, state: dict[str, Tensor]) -> PreTrainedConfig:
    head_dim = len(state["y_encoder.model.layers.0.self_attn.q_norm.weight"])
    sizes = _sizes(path, state, "y_encoder.model.", head_dim, "y_encoder_config")
    return Gemma3TextConfig(**EMBEDDING_GEMMA_300M | sizes)


def _sizes(path: str | Path, state: dict[str, Tensor], prefix: str, head_dim: int, option: str) -> dict[str, int]:
    vocab_size, hidden = state[f"{prefix}embed_tokens.weight"].shape
    rows = {name: state[f"{prefix}layers.0.self_attn.{name}.weight"].shape[0] for name in ("q_proj", "k_proj")}
    heads, key_heads = rows["q_proj"] // head_dim, rows["k_proj"] // head_dim
    if any(count % head_dim for count in rows.values()) or heads % key_heads or hidden % heads:
        raise UserError(
            f"{path}: {prefix}layers.0 has {rows['q_proj']} query and {rows['k_proj']} key rows for states of "
            f"{hidden}, which are no heads of {head_dim}; give the {option} it was trained with."
        )
    # Counted, not the highest number: a key like layers.999999999 must not build that many.
    layers = {key.removeprefix(f"{prefix}layers.").split(".")[0] for key in state if key.startswith(f"{prefix}layers.")}
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": state[f"{prefix}layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
    }


def _with_weights(config: PreTrainedConfig, state: dict[str, Tensor]) -> PreTrainedModel:
    """Marked as loaded, which `load_state_dict` would not do: the model around it leaves such weights alone."""
    with torch.device("meta"):
        kind = type(AutoModel.from_config(config))
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}
