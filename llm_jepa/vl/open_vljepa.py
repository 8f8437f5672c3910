"""Import checkpoints of open-vljepa, a public VL-JEPA (github.com/dion-jy/open-vljepa, cun-bjy/open-vljepa).

A checkpoint is one torch.save dict {epoch, model_state_dict, loss, config}: eight layers of Llama-3.2-1B,
EmbeddingGemma-300M and three linear maps, 394 tensors, backbones in bfloat16, without the frozen V-JEPA 2. Every tensor
has a counterpart in a `VLJEPAModel`:

    predictor.vis_proj.*                           vision_projection.*
    predictor.out_proj.*                           output_projection.*
    predictor.{embed_tokens, layers.i, norm}.*     unchanged
    y_encoder.model.*                              y_encoder.*
    y_encoder.projector.*                          target_projection.*

The layout was reconstructed from its save code. The published file was not opened, and its retrieval numbers have not
been measured here.
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

PAD_TOKEN_ID = 128004  # Llama-3.2's <|finetune_right_pad_id|>, with which it pads queries
TEMPERATURE = 0.07  # of its loss; it is fixed, so the checkpoint does not hold it
NUM_FRAMES = 8  # of its video stage (configs/base.yaml)
FRAME_SIZE = 256

# meta-llama/Llama-3.2-1B, config.json: values that tensor shapes do not reveal. From public copies, not the gated file.
LLAMA_3_2_1B: dict[str, Any] = {
    "head_dim": 64,  # the shapes then give 32 heads, and 8 of keys and values
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

# google/embeddinggemma-300m, config.json: values that tensor shapes do not reveal. From converters that check the gated
# file against these constants, not from the file.
EMBEDDING_GEMMA_300M: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,  # both sides together: transformers makes it 257, the first distance that is masked
    "sliding_window_pattern": 6,  # five windowed layers, then one with full attention
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
# The tensors whose shapes give the sizes, with their number of dimensions.
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
    """Load a checkpoint of open-vljepa as a `VLJEPAModel` in float32, in evaluation mode.

    The layout was reconstructed from its save code; the published file was not opened. The model computes the same as
    its code:

    - visual tokens first, then the query, positions 0, 1, ...; no causal mask
    - mean over visual and real query tokens
    - masked mean of the y_encoder's states, without the Dense layers and prompts that come with EmbeddingGemma
    - temperature 0.07

    There is one difference: it was trained in bfloat16, in which Gemma's embedding scale, sqrt(768) = 27.71, is 27.75.

    Its processor: `VLJEPAProcessor.from_parts(model.config, image_processor=open_vljepa_frames(), tokenizer=
    "meta-llama/Llama-3.2-1B", target_tokenizer="google/embeddinggemma-300m")`. The padding token makes no difference.

    Args:
        path: the file. It is read as tensors and plain values only: a pickle that would run code is refused.
        x_encoder: not in the file. A Hub id or folder, a config (random weights) or a model; it was trained with
            facebook/vjepa2-vitl-fpc64-256.
        predictor_config, y_encoder_config: used as they are. If None, tensor shapes give the sizes, `LLAMA_3_2_1B` and
            `EMBEDDING_GEMMA_300M` the rest.

    Raises UserError for a file that cannot be read in this way, for keys that are missing, unexpected or of another
    shape, and for an x_encoder whose features do not fit the projection.
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
            f"The x_encoder gives features of {model.config.visual_dim}, but predictor.vis_proj of {path} takes "
            f"{visual_dim}; give the x_encoder it was trained with, facebook/vjepa2-vitl-fpc64-256 (1024)."
        )
    for name in ("vision_projection", "output_projection", "target_projection"):
        getattr(model, name).load_state_dict(_below(name, ours))
    return model.eval()


def open_vljepa_frames() -> Any:
    """open-vljepa's processing of a frame, by PIL: shorter side to 256, centre crop of 256, ImageNet mean and std.

    V-JEPA 2's own processor resizes to 292 before the same crop (`processing.vjepa2_frames`). The filter is bilinear as
    in V-JEPA 2; the filter of open-vljepa is not confirmed.
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
    """The name in `VLJEPAModel` of a tensor of open-vljepa."""
    for theirs, ours in _RENAMED:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _read(path: str | Path) -> dict[str, Tensor]:
    """Read model_state_dict; `epoch`, `loss`, `config` and an optimizer's state are ignored. Raises UserError."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or type(error).__name__}.") from None
    except Exception as error:  # damaged bytes raise any of a dozen kinds, struct.error and AssertionError among them
        if type(error).__name__ == "UnpicklingError":  # do not show its text, which advises weights_only=False
            raise UserError(
                f"{path} holds more than tensors and plain values, or is not a torch checkpoint. It is refused, "
                "because unpickling it could run code; save it again as {'model_state_dict': ...} of tensors."
            ) from None
        raise UserError(
            f"{path} is not a torch checkpoint, or a broken one ({type(error).__name__}); download it again."
        ) from None
    if isinstance(checkpoint, dict):
        state, contents = checkpoint.get("model_state_dict"), ", ".join(str(key) for key in list(checkpoint)[:3])
    else:
        state, contents = None, type(checkpoint).__name__
    if not isinstance(state, dict) or not state:
        raise UserError(
            f"{path} has no model_state_dict, but {contents[:200] or 'nothing'}, so it is not a checkpoint of "
            "open-vljepa; give one that is."
        )
    wrong = [str(key) for key, value in state.items() if not (isinstance(key, str) and _is_weight(value))]
    if wrong:
        raise UserError(f"{path}: {_some(wrong)} in its model_state_dict: not a dense tensor of floats under a name.")
    return state


def _is_weight(value: object) -> bool:
    """Whether this is a dense tensor of floats on the CPU."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.layout is torch.strided and value.device.type == "cpu"


def _check_parts(path: str | Path, state: dict[str, Tensor]) -> None:
    """Check the tensors whose shapes give the sizes, and that no key is foreign. Raises UserError."""
    foreign = [key for key in state if not key.startswith(("predictor.", "y_encoder.model.", "y_encoder.projector."))]
    missing, misshaped = [], []
    for key, dims in _SIZED_BY.items():
        if key not in state:
            missing.append(key)
        elif state[key].dim() != dims or 0 in state[key].shape:
            misshaped.append(f"{key} {list(state[key].shape)}")
    _refuse(path, missing, foreign, misshaped)


def _check_layout(
    path: str | Path, state: dict[str, Tensor], predictor_config: PreTrainedConfig, y_encoder_config: PreTrainedConfig
) -> None:
    """Check that the tensors are exactly those of the two parts and the projections. Raises UserError."""
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
    missing, misshaped = [], []
    for key, shape in expected.items():
        if key not in state:
            missing.append(key)
        elif list(state[key].shape) != shape:
            misshaped.append(f"{key} {list(state[key].shape)} instead of {shape}")
    unexpected = [key for key in state if key not in expected]
    _refuse(path, missing, unexpected, misshaped)


def _refuse(path: str | Path, missing: Sequence[str], unexpected: Sequence[str], misshaped: Sequence[str]) -> None:
    """Raise UserError if one of the lists of keys is not empty."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    problems = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds.items() if keys]
    if not problems:
        return
    if any(key.startswith("module.") for key in unexpected):
        advice = "Remove the prefix 'module.' of a DistributedDataParallel from its keys first."
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
            f"{hidden}, which do not divide into heads of {head_dim}; give the {option} it was trained with."
        )
    # Count the layers instead of taking the highest number: a key like layers.999999999 must not build that many.
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
    """A model with these weights.

    `from_pretrained` marks them as loaded, unlike `load_state_dict`. So the model around it does not initialise them.
    """
    with torch.device("meta"):
        kind = type(AutoModel.from_config(config))
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}
