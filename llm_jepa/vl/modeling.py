"""`VLJEPAModel`: predict the embedding of a text from a clip and a query  (VL-JEPA, arXiv:2512.10942v2, section 3.1).

    clip  -> x_encoder -> visual tokens ─┐
                                         ├─> predictor (bidirectional) -> mean -> projection -> predicted [B, D]
    query -> its token embeddings ───────┘
    target text -> y_encoder -> pooling -> projection ------------------------------------> target    [B, D]

B clips, T frames, N visual tokens, Q query tokens, L target tokens, D the shared space. The decoder back to text is no
part of this model: see `y_decoder`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, cached_file

from ..core.diagnostics import evaluating
from ..core.errors import UserError
from .configuration import MIN_TEMPERATURE, VLJEPAConfig

Part: TypeAlias = str | PreTrainedConfig | PreTrainedModel
# Standard deviation of the first weights, times sqrt(inputs). Changes are small beside the features: a star that turns
# moves 6 % of their squares. On ShapeStream 5.7 and 11 serve alike, and with 1.4 the projection learns next to nothing.
MOTION_SCALE = 8.0


@dataclass
class VLJEPAOutput(ModelOutput):
    """predicted [B, D] or None without a clip; target [B, D] or None without a target text, neither normalised.
    temperature: of the contrastive loss, a scalar. (Part of the output, because DDP must see it used.)"""

    predicted: Tensor | None = None
    target: Tensor | None = None
    temperature: Tensor | None = None


class VLJEPAModel(PreTrainedModel):
    """x_encoder, predictor and y_encoder under one roof. `from_parts` builds one; `from_pretrained` loads one.

    Inputs of `forward`, all batch first:
        pixel_values_videos [B, T, 3, H, W] or visual_features [B, N, D_x] (what `encode_frames` gave, cached);
        query_ids, query_mask [B, Q]. Right padded, as all texts are; a mask left out means no padding.
        target_ids, target_mask [B, L] or target_features [B, D_y] (what `pool_text` gave, cached).
        clip_of_pair, target_of_pair [B]: row of the clip and of the target text of each pair, where several pairs share
            one: clips and targets then hold each once, and the x_encoder, most of the cost, sees it once.
    """

    config: VLJEPAConfig
    config_class = VLJEPAConfig
    base_model_prefix = ""
    main_input_name = "pixel_values_videos"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: VLJEPAConfig,
        *,
        x_encoder: PreTrainedModel | None = None,
        predictor: PreTrainedModel | None = None,
        y_encoder: PreTrainedModel | None = None,
    ) -> None:
        given = {"x_encoder": x_encoder, "predictor": predictor, "y_encoder": y_encoder}
        attention = {name: part.config._attn_implementation for name, part in given.items() if part is not None}
        super().__init__(config)  # sets the attention of the parts' configs, for models not built yet
        self.x_encoder = _without_unused(x_encoder or AutoModel.from_config(config.x_encoder_config))
        self.predictor = predictor or AutoModel.from_config(config.predictor_config)
        self.y_encoder = _without_unused(y_encoder or AutoModel.from_config(config.y_encoder_config))
        for name in given:  # one config object, seen from above and from below
            part = getattr(self, name)
            part.config._attn_implementation = (
                attention.get(name) or part.config._attn_implementation or config._attn_implementation
            )
            setattr(config, f"{name}_config", part.config)
        hidden, merged = config.predictor_config.hidden_size, config.visual_dim * math.prod(config.token_merge)
        self.vision_projection = nn.Linear(merged, hidden)
        self.motion_projection: nn.Sequential | None = None
        if config.motion_dim:
            self.motion_projection = nn.Sequential(
                nn.Linear(merged, config.motion_dim), nn.GELU(), nn.Linear(config.motion_dim, hidden)
            )
        self.grid_positions: nn.Embedding | None = None
        if config.grid_positions:
            assert config.visual_grid is not None  # the configuration checks it
            places = math.prod(config.visual_grid) // math.prod(config.token_merge[1:])
            self.grid_positions = nn.Embedding(places, hidden)
        self.output_projection = nn.Linear(hidden, config.shared_dim)
        y_dim = config.y_encoder_config.hidden_size
        self.target_projection = nn.Linear(y_dim, config.shared_dim) if config.project_targets else nn.Identity()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.constant_(self.log_temperature, math.log(self.config.temperature))
            if self.motion_projection is not None:  # at first it adds nothing to the tokens
                first, _, last = self.motion_projection
                assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
                nn.init.normal_(first.weight, std=MOTION_SCALE / math.sqrt(first.in_features))
                nn.init.zeros_(last.weight)

    @property
    def temperature(self) -> Tensor:
        """Of the contrastive loss; a scalar that may be learnt."""
        with torch.no_grad():  # the weight itself, as CLIP's code does: clamped after exp, it would have no gradient
            self.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))  # at the floor, and stay there
        return self.log_temperature.exp()

    def get_input_embeddings(self) -> nn.Module:
        return self.predictor.get_input_embeddings()

    def forward(
        self,
        pixel_values_videos: Tensor | None = None,
        query_ids: Tensor | None = None,
        query_mask: Tensor | None = None,
        target_ids: Tensor | None = None,
        target_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        target_features: Tensor | None = None,
        clip_of_pair: Tensor | None = None,
        target_of_pair: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> VLJEPAOutput:
        predicted = target = None
        if pixel_values_videos is not None or visual_features is not None:
            if visual_features is None:
                visual_features = self.encode_frames(pixel_values_videos)  # type: ignore[arg-type]
            predicted = self.predict(visual_features, query_ids, query_mask, clip_of_pair)
        if target_ids is not None or target_features is not None:
            if target_features is None:
                target_features = self.pool_text(target_ids, target_mask)  # type: ignore[arg-type]
            target = self.target_projection(target_features)
            target = target if target_of_pair is None else target[target_of_pair]
        return VLJEPAOutput(predicted=predicted, target=target, temperature=self.temperature)

    def encode_frames(self, pixel_values_videos: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> visual tokens [B, N, D_x], before any projection: what a cache may keep.

        V-JEPA 2 sees the clip at once; an image encoder sees each frame by itself, and the tokens of the frames follow
        each other. A convolutional map is read row by row. Without gradient where no weight of the encoder is trained.

        Raises UserError for clips the encoder would take and silently misread: V-JEPA 2 computes wrong positions for a
        size other than crop_size, and drops the last frame of an odd number.
        """
        pixels = pixel_values_videos
        if pixels.dim() != 5 or pixels.shape[2] != 3:
            raise UserError(f"Clips are [clips, frames, 3, height, width]; got {tuple(pixels.shape)}.")
        trained = any(weight.requires_grad for weight in self.x_encoder.parameters())
        with contextlib.nullcontext() if trained else torch.no_grad():
            if self.config.x_encoder_config.model_type == "vjepa2":
                self._check_clip(pixels)
                states = self.x_encoder(pixel_values_videos=pixels, skip_predictor=True).last_hidden_state
                states = states.unflatten(1, (-1, math.prod(self.config.visual_grid or [1, 1])))
            else:
                states = self.x_encoder(pixel_values=pixels.flatten(0, 1)).last_hidden_state
                if states.dim() == 4:  # [BT, C, h, w]
                    states = states.flatten(2).transpose(1, 2)
                states = states.unflatten(0, pixels.shape[:2])
            return states.mean(dim=2) if self.config.pool_frames else states.flatten(1, 2)  # from [B, T, n, D_x]

    def predict(
        self,
        visual_features: Tensor,
        query_ids: Tensor | None = None,
        query_mask: Tensor | None = None,
        clip_of_pair: Tensor | None = None,
    ) -> Tensor:
        """Visual tokens [C, N, D_x] and queries [B, Q] -> predicted embeddings [B, D]. C = B without `clip_of_pair`.

        The query stands after the visual tokens (section 4.8) and both see each other. The mean is over all visual and
        all real query tokens: the literal reading of "average pooling on non-[PAD] tokens".
        """
        merged = self._merge(visual_features)  # [C, N', D_x t h w]
        tokens = self.vision_projection(merged)  # [C, N', hidden]
        if self.motion_projection is not None:
            frames = merged.unflatten(-1, (self.config.token_merge[0], -1))
            tokens = tokens + self.motion_projection((frames - frames.mean(dim=-2, keepdim=True)).flatten(-2))
        if self.grid_positions is not None:
            places = self.grid_positions.weight
            if tokens.shape[1] % len(places):
                raise UserError(
                    f"{tokens.shape[1]} visual tokens do not fill a grid of {len(places)}; see visual_grid."
                )
            tokens = (tokens.unflatten(1, (-1, len(places))) + places).flatten(1, 2)
        tokens = tokens if clip_of_pair is None else tokens[clip_of_pair]
        seen = tokens.new_ones(tokens.shape[:2], dtype=torch.long)
        if query_ids is not None and query_ids.shape[1]:
            words = self.predictor.get_input_embeddings()(query_ids)
            tokens = torch.cat([tokens, words.to(tokens.dtype)], dim=1)
            seen = torch.cat([seen, torch.ones_like(query_ids) if query_mask is None else query_mask.long()], dim=1)
        # The whole decoder, not its layers one by one: called alone they are causal where nothing is padded.
        states = self.predictor(inputs_embeds=tokens, attention_mask=seen, use_cache=False).last_hidden_state
        return self.output_projection(_masked_mean(states, seen))

    def pool_text(self, target_ids: Tensor, target_mask: Tensor | None = None) -> Tensor:
        """Target texts [B, L] -> pooled states of the y_encoder [B, D_y], before the projection: what a cache may keep.

        Without gradient where no weight of the encoder is trained.
        """
        mask = torch.ones_like(target_ids) if target_mask is None else target_mask
        trained = any(weight.requires_grad for weight in self.y_encoder.parameters())
        with contextlib.nullcontext() if trained else torch.no_grad():
            states = self.y_encoder(input_ids=target_ids, attention_mask=mask).last_hidden_state
        if self.config.y_pooling == "mean":
            return _masked_mean(states, mask)
        last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
        place = mask.argmax(dim=1) if self.config.y_pooling == "first" else last
        return states[torch.arange(len(states), device=states.device), place]

    def train(self, mode: bool = True) -> VLJEPAModel:
        """What has no trained weight stays in evaluation mode: no dropout, no moving statistics of frozen norms."""
        super().train(mode)
        for module in self.modules() if mode else ():
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                module.eval()
        return self

    def _check_clip(self, pixels: Tensor) -> None:
        config, (frames, height, width) = self.config.x_encoder_config, pixels.shape[1:2] + pixels.shape[3:]
        if (height, width) != (config.crop_size, config.crop_size):
            raise UserError(
                f"Frames of {height} x {width} for a V-JEPA 2 of crop_size {config.crop_size}: it would run, with "
                "wrong positions. Resize the frames, or set crop_size to their size."
            )
        if frames > 1 and frames % config.tubelet_size:
            raise UserError(
                f"{frames} frames for a V-JEPA 2 that reads them in groups of {config.tubelet_size}: the rest would be "
                "dropped. Give a multiple."
            )

    def _merge(self, features: Tensor) -> Tensor:
        """[B, N, D_x] -> [B, N / (t h w), D_x t h w] for token_merge [t, h, w] (space to depth, as Idefics 3 does)."""
        t, h, w = self.config.token_merge
        if t == h == w == 1:
            return features
        batch, count, dim = features.shape
        rows, columns = (1, 1) if self.config.pool_frames else self.config.visual_grid or (0, 0)
        if not rows or count % (rows * columns * t) or rows % h or columns % w:
            raise UserError(
                f"{count} visual tokens on a grid of {rows} x {columns} cannot be merged in blocks of {t} x {h} x {w}; "
                "set visual_grid to the rows and columns of one frame, and blocks that divide it and the frames."
            )
        blocks = features.reshape(batch, -1, t, rows // h, h, columns // w, w, dim)
        return blocks.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, count // (t * h * w), dim * t * h * w)

    @classmethod
    def from_parts(
        cls,
        x_encoder: Part,
        predictor: Part,
        y_encoder: Part,
        *,
        num_predictor_layers: int | None = None,
        frame_size: int | None = None,
        revisions: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> VLJEPAModel:
        """A VL-JEPA of three parts; the projections between them are new and random.

        Args:
            x_encoder, predictor, y_encoder: a Hub id or folder (its weights), a config (random weights), or a model.
                A sentence-transformers folder says itself how it pools; its Dense layers are left out with a note.
            num_predictor_layers: keep only the last so many layers of the predictor (the paper: 8 of Llama-3.2-1B's
                16); None keeps all.
            frame_size: pixels of a frame, for a CNN whose config does not say (its visual_grid depends on it).
            revisions: part -> branch, tag or commit of its Hub id.
            options: fields of `VLJEPAConfig`.

        Raises UserError where parts do not fit: a predictor that cannot be made bidirectional, a shared_dim that is not
        the y_encoder's without project_targets, a part that is no model.
        """
        asked = dict(revisions or {})
        if unknown := sorted(set(asked) - {"x_encoder", "predictor", "y_encoder"}):
            raise UserError(f"revisions names {', '.join(unknown)}; the parts are x_encoder, predictor and y_encoder.")
        parts = {"x_encoder": x_encoder, "predictor": predictor, "y_encoder": y_encoder}
        if unknown := sorted(set(options) - set(VLJEPAConfig.__dataclass_fields__)):
            raise UserError(f"A VL-JEPA has no option {', '.join(unknown)}; see VLJEPAConfig.")
        models = {name: _load(name, part, asked.get(name), dtype) for name, part in parts.items()}
        options.setdefault("revisions", {}).update(
            {
                name: {"name": part, "revision": _commit(part, asked.get(name))}
                for name, part in parts.items()
                if isinstance(part, str)
            }
        )
        if isinstance(y_encoder, str):
            options.setdefault("y_pooling", _pooling_of(y_encoder, asked.get("y_encoder")))
        if num_predictor_layers is not None:
            models["predictor"] = last_layers(models["predictor"], num_predictor_layers)
        with torch.no_grad():
            options = _shape_of_tokens(models["x_encoder"], frame_size) | options
        # Said again, because a composite config overwrites it in its parts.
        attention = {f"{name}_config": model.config._attn_implementation for name, model in models.items()}
        try:
            config = VLJEPAConfig(
                **{f"{name}_config": model.config for name, model in models.items()},
                attn_implementation=attention,
                **options,
            )
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from None
        model = cls(config, **models)
        _check_bidirectional(model.predictor)
        return model.to(dtype)


def last_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The same decoder with its last `count` layers only, embeddings and final norm kept. Raises UserError."""
    total = model.config.num_hidden_layers
    if not 1 <= count <= total:
        raise UserError(f"num_predictor_layers={count}: the predictor has {total} layers; choose 1 to {total}.")
    stacks = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if len(stacks) != 1:
        raise UserError(f"Cannot tell the layers of a {type(model).__name__} apart; leave num_predictor_layers out.")
    options = model.config.to_dict()
    options["num_hidden_layers"] = count
    if options.get("layer_types"):
        options["layer_types"] = options["layer_types"][-count:]
    config = type(model.config).from_dict(options)
    config._attn_implementation = model.config._attn_implementation
    shorter = type(model)(config).to(model.device, model.dtype)  # not a cut list: layers know their own index
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


def _load(name: str, part: Part, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    try:
        if isinstance(part, PreTrainedModel):
            model = part.base_model  # without a head: a LlamaForCausalLM is its LlamaModel
        elif isinstance(part, str):
            model = AutoModel.from_pretrained(
                part, revision=revision or "main", dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        else:
            model = AutoModel.from_config(part, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"Cannot load the {name} from {str(part)[:100]!r}: {reason}") from None
    # CLIP-like models hold a vision and a text tower; only one of them is the part that was asked for.
    tower = {"x_encoder": "vision_model", "y_encoder": "text_model"}.get(name, "")
    return getattr(model, tower) if isinstance(getattr(model, tower, None), PreTrainedModel) else model


def _commit(source: str, revision: str | None) -> str | None:
    """The commit that a Hub id's revision names: a branch moves on. Of a folder, and where unknown: `revision`."""
    path = cached_file(source, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    folder = None if path is None or Path(source).is_dir() else Path(path).parent
    return folder.name if folder is not None and folder.parent.name == "snapshots" else revision


def _without_unused(model: PreTrainedModel) -> PreTrainedModel:
    """Drop what is never run: V-JEPA 2's own predictor (22M), BERT's and ViT's pooler. It would be saved and synced."""
    if model.config.model_type == "vjepa2":
        model.predictor = None
    elif isinstance(getattr(model, "pooler", None), nn.Module) and list(model.pooler.parameters()):
        model.pooler = None
    return model


def _masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    weight = mask[..., None].to(torch.float32)
    return ((states * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)).to(states.dtype)


def _shape_of_tokens(x_encoder: PreTrainedModel, frame_size: int | None) -> dict[str, Any]:
    """visual_dim and visual_grid, by asking the encoder for one black frame."""
    config = x_encoder.config
    if config.model_type == "vjepa2":
        side = config.crop_size // config.patch_size
        return {"visual_dim": config.hidden_size, "visual_grid": [side, side]}
    size = frame_size or getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    frame = torch.zeros(1, 3, height, width, dtype=x_encoder.dtype, device=x_encoder.device)
    with evaluating(x_encoder):
        states = x_encoder(pixel_values=frame).last_hidden_state
    if states.dim() == 4:
        return {"visual_dim": states.shape[1], "visual_grid": list(states.shape[2:])}
    patch = getattr(config, "patch_size", None)
    grid = [height // patch, width // patch] if isinstance(patch, int) else None
    fits = grid is not None and grid[0] * grid[1] == states.shape[1]  # a class token has no place on a grid
    return {"visual_dim": states.shape[2], "visual_grid": grid if fits else None}


def _pooling_of(source: str, revision: str | None) -> str:
    """How a sentence-transformers folder pools; "mean" where it does not say. Raises UserError for other ways."""
    import json
    import logging

    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    modules = cached_file(source, "modules.json", **options)
    if modules is None:
        return "mean"
    with open(modules, encoding="utf-8") as file:
        listed = json.load(file)
    if any(module["type"].endswith("Dense") for module in listed):
        logging.getLogger(__name__).warning("%s: its Dense layers are left out; target_projection is new.", source)
    pooling = next((module["path"] for module in listed if module["type"].endswith("Pooling")), None)
    file_name = pooling and cached_file(source, f"{pooling}/config.json", **options)
    if not file_name:
        return "mean"
    with open(file_name, encoding="utf-8") as file:
        chosen = json.load(file)
    ways = {"mean_tokens": "mean", "cls_token": "first", "lasttoken": "last"}
    on = [
        key.removeprefix("pooling_mode_") for key, value in chosen.items() if key.startswith("pooling_mode_") and value
    ]
    if len(on) != 1 or on[0] not in ways:
        raise UserError(f"{source} pools by {', '.join(on) or 'nothing'}; mean, first (cls) or last token is possible.")
    return ways[on[0]]


@torch.no_grad()
def _check_bidirectional(predictor: PreTrainedModel) -> None:
    """Change the last token: the first state must move, with and without padding. Some families ignore is_causal."""
    device = predictor.device
    tokens = torch.randn(1, 4, predictor.config.hidden_size, device=device, dtype=predictor.dtype)
    changed = tokens.clone()
    changed[:, 2] *= -1  # a constant added would vanish in a LayerNorm (gpt2)
    for mask in (torch.ones(1, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 0]])):
        with evaluating(predictor):
            first, second = (
                predictor(inputs_embeds=x, attention_mask=mask.to(device), use_cache=False).last_hidden_state[:, 0]
                for x in (tokens, changed)
            )
        if torch.equal(first, second):
            raise UserError(
                f"A {predictor.config.model_type} predictor stays causal: its first token does not see the last. "
                "Choose a family that follows is_causal=False (llama, qwen3, mistral, ...)."
            )


AutoModel.register(VLJEPAConfig, VLJEPAModel)
