"""The parts of a new VL-JEPA: load them, shorten the predictor, and find out what the config must say about them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from ..core.diagnostics import evaluating
from ..core.errors import UserError
from ..core.json_files import read_json
from ..core.random_weights import random_weights
from ..core.safetensors_files import find_file
from ..core.untrusted import load_config, load_model

logger = logging.getLogger(__name__)
Part: TypeAlias = str | PreTrainedConfig | PreTrainedModel  # a Hub id or folder, a config (random weights), or a model
NAMES = ("x_encoder", "predictor", "y_encoder")
UNUSED = r"(^|\.)(pooler|predictor)\."  # weights that a part need not have: `modeling` drops these modules


def load_part(name: str, part: Part, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model of one part, without a head. Raises UserError if it cannot be loaded."""
    if isinstance(part, PreTrainedModel):
        model = part.base_model  # without a head: a LlamaForCausalLM becomes its LlamaModel
    elif isinstance(part, str):
        config = load_config(part, what=f"the {name}", revision=revision)
        model = load_model(
            AutoModel, part, config, what=f"the {name}", revision=revision, unused=UNUSED, dtype=dtype
        )  # fmt: skip
    else:
        model = random_weights(AutoModel, part, what=name, dtype=dtype)
    # CLIP-like models hold a vision and a text tower; only one of them is this part.
    tower = getattr(model, {"x_encoder": "vision_model", "y_encoder": "text_model"}.get(name, ""), None)
    return tower if isinstance(tower, PreTrainedModel) else model


def sources_of(parts: Mapping[str, Part], revisions: Mapping[str, str]) -> dict[str, dict[str, str | None]]:
    """Part -> {"name", "revision"} of every part that comes from a Hub id or folder."""
    sources: dict[str, dict[str, str | None]] = {}
    for name, part in parts.items():
        if isinstance(part, str):
            sources[name] = {"name": part, "revision": _commit_of(part, revisions.get(name))}
    return sources


def last_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A copy of a decoder with its last `count` layers only; it keeps the embeddings and the final norm.

    Raises UserError for more layers than there are, and if the list of layers cannot be found.
    """
    total = model.config.num_hidden_layers
    if not 1 <= count <= total:
        raise UserError(f"num_predictor_layers={count}: the predictor has {total} layers; choose 1 to {total}.")
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [name for name, module in lists if len(module) == total]
    if len(stacks) != 1:
        raise UserError(
            f"A {type(model).__name__} has {len(stacks)} lists of {total} modules, so its layers cannot be found; "
            "leave num_predictor_layers out."
        )
    options = model.config.to_dict()
    options["num_hidden_layers"] = count
    if options.get("layer_types"):
        options["layer_types"] = options["layer_types"][-count:]
    config = type(model.config).from_dict(options)
    config._attn_implementation = model.config._attn_implementation
    shorter = type(model)(config).to(model.device, model.dtype)  # not a shortened list: a layer stores its own index
    prefix, state = f"{stacks[0]}.", {}
    for key, value in model.state_dict().items():
        if key.startswith(prefix):
            number, _, rest = key.removeprefix(prefix).partition(".")
            if int(number) < total - count:
                continue
            key = f"{prefix}{int(number) - (total - count)}.{rest}"
        state[key] = value
    shorter.load_state_dict(state)
    return shorter.train(model.training)


@torch.no_grad()
def shape_of_tokens(x_encoder: PreTrainedModel, frame_size: int | None) -> dict[str, Any]:
    """visual_dim and visual_grid of an x_encoder. They are read off its output for one black frame."""
    config = x_encoder.config
    if config.model_type == "vjepa2":
        side = config.crop_size // config.patch_size
        return {"visual_dim": config.hidden_size, "visual_grid": [side, side]}
    size = frame_size or getattr(config, "image_size", None) or 224
    if isinstance(size, int):
        size = (size, size)
    height, width = size
    frame = torch.zeros(1, 3, height, width, dtype=x_encoder.dtype, device=x_encoder.device)
    with evaluating(x_encoder):
        states = x_encoder(pixel_values=frame).last_hidden_state  # [1, N, D_x], or [1, D_x, h, w] from a CNN
    if states.dim() == 4:
        return {"visual_dim": states.shape[1], "visual_grid": list(states.shape[2:])}
    grid = None
    patch = getattr(config, "patch_size", None)
    # With a class token there is one state more than patches. It has no place on a grid.
    if isinstance(patch, int) and (height // patch) * (width // patch) == states.shape[1]:
        grid = [height // patch, width // patch]
    return {"visual_dim": states.shape[2], "visual_grid": grid}


def pooling_of(source: str, revision: str | None) -> str:
    """The y_pooling of a sentence-transformers folder; "mean" if it does not say. Raises UserError for other kinds."""
    modules = _read_json(source, "modules.json", [{"type": str, "path": str}], revision) or []
    if any(module["type"].endswith("Dense") for module in modules):
        logger.warning("%s: its Dense layers are left out; target_projection is new.", source)
    folder = next((module["path"] for module in modules if module["type"].endswith("Pooling")), None)
    if folder and not re.fullmatch(r"[\w-][\w.-]*", folder):
        raise UserError(f"modules.json of {source} names the folder {folder!r}; only its own folders are read.")
    pooling = _read_json(source, f"{folder}/config.json", dict, revision) if folder else None
    if pooling is None:
        return "mean"
    prefix = "pooling_mode_"
    modes = [key.removeprefix(prefix) for key, value in pooling.items() if key.startswith(prefix) and value]
    known = {"mean_tokens": "mean", "cls_token": "first", "lasttoken": "last"}
    if len(modes) != 1 or modes[0] not in known:
        raise UserError(
            f"{source} pools by {', '.join(modes) or 'nothing'}; mean, first (cls) or last token is possible."
        )
    return known[modes[0]]


@torch.no_grad()
def check_bidirectional(predictor: PreTrainedModel) -> None:
    """Raise UserError for a predictor that stays causal: some families ignore `is_causal`.

    If a later token changes, the first state must change, with and without padding.
    """
    device = predictor.device
    tokens = torch.randn(1, 4, predictor.config.hidden_size, device=device, dtype=predictor.dtype)
    changed = tokens.clone()
    changed[:, 2] *= -1  # a constant added would vanish in a LayerNorm (gpt2)
    for mask in (torch.ones(1, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 0]])):
        mask = mask.to(device)
        with evaluating(predictor):
            before = predictor(inputs_embeds=tokens, attention_mask=mask, use_cache=False).last_hidden_state[:, 0]
            after = predictor(inputs_embeds=changed, attention_mask=mask, use_cache=False).last_hidden_state[:, 0]
        if torch.equal(before, after):
            raise UserError(
                f"A {predictor.config.model_type} predictor stays causal: its first token does not see the last. "
                "Choose a family that follows is_causal=False (llama, qwen3, mistral, ...)."
            )


def _commit_of(source: str, revision: str | None) -> str | None:
    """The commit of a Hub id's revision, because a branch moves on. `revision` for a folder, or if it is unknown."""
    path = find_file(source, "config.json", revision=revision)
    if path is None or Path(source).is_dir():
        return revision
    folder = path.parent  # .../snapshots/<commit>
    return folder.name if folder.parent.name == "snapshots" else revision


def _read_json(source: str, name: str, shape: Any, revision: str | None) -> Any:
    """A JSON file of a Hub id or folder; None if it has no such file."""
    path = find_file(source, name, revision=revision)
    return None if path is None else read_json(path, shape)
