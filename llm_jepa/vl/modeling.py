"""`VLJEPAModel`: predict the embedding of a text from a clip and a query  (VL-JEPA, arXiv:2512.10942v2, section 3.1).

    clip  -> x_encoder -> visual tokens ─┐
                                         ├─> predictor (bidirectional) -> mean -> projection -> predicted [B, D]
    query -> its token embeddings ───────┘
    target text -> y_encoder -> pooling -> projection ------------------------------------> target    [B, D]

B clips, T frames, N visual tokens, Q query tokens, L target tokens, D the shared space. The decoder back to text is not
part of this model: see `y_decoder`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..core.errors import UserError, one_line
from .configuration import MIN_TEMPERATURE, VLJEPAConfig
from .parts import NAMES, Part, check_bidirectional, last_layers, load_part, pooling_of, shape_of_tokens, sources_of

# Standard deviation of the first weights, times sqrt(inputs). Frame differences are small: a rotating star changes 6 %
# of the squared norm. On ShapeStream 5.7 and 11 work equally well; at 1.4 the projection learns almost nothing.
MOTION_SCALE = 8.0


@dataclass
class VLJEPAOutput(ModelOutput):
    """predicted [B, D], None without a clip; target [B, D], None without a target text; neither is normalised.

    temperature: of the contrastive loss, a scalar. It is part of the output because DDP must see that it is used.
    """

    predicted: Tensor | None = None
    target: Tensor | None = None
    temperature: Tensor | None = None


class VLJEPAModel(PreTrainedModel):
    """x_encoder, predictor and y_encoder in one model. `from_parts` builds one; `from_pretrained` loads one.

    Inputs of `forward`, all batch first:

        pixel_values_videos [B, T, 3, H, W], or visual_features [B, N, D_x] from `encode_frames` (cached)
        query_ids, query_mask [B, Q]
        target_ids, target_mask [B, L], or target_features [B, D_y] from `pool_text` (cached)
        clip_of_pair, target_of_pair [B]: row of the clip and of the target text of each pair. With them, a batch holds
            each clip and each text once, and the x_encoder, most of the cost, encodes each clip once.

    All texts are padded on the right; without a mask there is no padding.
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
        models = {"x_encoder": x_encoder, "predictor": predictor, "y_encoder": y_encoder}
        attention = {name: model.config._attn_implementation for name, model in models.items() if model is not None}
        super().__init__(config)  # sets the attention in the parts' configs, for the parts built below
        self.x_encoder = _without_unused(x_encoder or AutoModel.from_config(config.x_encoder_config))
        self.predictor = predictor or AutoModel.from_config(config.predictor_config)
        self.y_encoder = _without_unused(y_encoder or AutoModel.from_config(config.y_encoder_config))
        for name in NAMES:  # a part and this config share one config object
            part = getattr(self, name)
            part.config._attn_implementation = (
                attention.get(name) or part.config._attn_implementation or config._attn_implementation
            )
            setattr(config, f"{name}_config", part.config)
        self._add_projections(config)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
        self.post_init()

    def _add_projections(self, config: VLJEPAConfig) -> None:
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

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.constant_(self.log_temperature, math.log(self.config.temperature))
            if self.motion_projection is not None:
                first, _, last = self.motion_projection
                assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
                nn.init.normal_(first.weight, std=MOTION_SCALE / math.sqrt(first.in_features))
                nn.init.zeros_(last.weight)  # at first it adds nothing to the tokens

    @property
    def temperature(self) -> Tensor:
        """Temperature of the contrastive loss; a scalar that may be learnt."""
        # Clamp the weight itself, as CLIP's code does. Clamped after exp it would have no gradient at the floor, and
        # would stay there.
        with torch.no_grad():
            self.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))
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
            if target_of_pair is not None:
                target = target[target_of_pair]
        return VLJEPAOutput(predicted=predicted, target=target, temperature=self.temperature)

    def encode_frames(self, pixel_values_videos: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> visual tokens [B, N, D_x], before any projection. A cache may keep them.

        V-JEPA 2 encodes the clip as a whole. An image encoder encodes each frame alone, and the tokens of the frames
        are put one after another. The map of a CNN is read row by row. If no weight of the encoder is trained, no
        gradient is computed.

        Raises UserError for clips that the encoder would accept and silently misread: V-JEPA 2 computes wrong positions
        for a size other than crop_size, and drops the last frame of an odd number.
        """
        pixels = pixel_values_videos
        if pixels.dim() != 5 or pixels.shape[2] != 3:
            raise UserError(f"Clips are [clips, frames, 3, height, width]; got {tuple(pixels.shape)}.")
        with _no_grad_if_frozen(self.x_encoder):
            if self.config.x_encoder_config.model_type == "vjepa2":
                _check_vjepa2_clip(self.config.x_encoder_config, pixels)
                states = self.x_encoder(pixel_values_videos=pixels, skip_predictor=True).last_hidden_state
                places = math.prod(self.config.visual_grid or [1, 1])
                states = states.unflatten(1, (-1, places))  # [B, tubelets, n, D_x]
            else:
                states = self.x_encoder(pixel_values=pixels.flatten(0, 1)).last_hidden_state
                if states.dim() == 4:  # [B T, D_x, h, w]
                    states = states.flatten(2).transpose(1, 2)
                states = states.unflatten(0, pixels.shape[:2])  # [B, T, n, D_x]
            if self.config.pool_frames:
                return states.mean(dim=2)  # [B, T, D_x]
            return states.flatten(1, 2)  # [B, T n, D_x]

    def predict(
        self,
        visual_features: Tensor,
        query_ids: Tensor | None = None,
        query_mask: Tensor | None = None,
        clip_of_pair: Tensor | None = None,
    ) -> Tensor:
        """Visual tokens [C, N, D_x] and queries [B, Q] -> predicted embeddings [B, D]. C = B without `clip_of_pair`.

        The query comes after the visual tokens (section 4.8) and both see each other. The mean is over all visual and
        all real query tokens: the literal reading of "average pooling on non-[PAD] tokens".
        """
        merged = merge_tokens(self.config, visual_features)  # [C, N', D_x t h w]
        tokens = self.vision_projection(merged)  # [C, N', hidden]
        if self.motion_projection is not None:
            frames = merged.unflatten(-1, (self.config.token_merge[0], -1))  # [C, N', t, D_x h w]
            changes = (frames - frames.mean(dim=-2, keepdim=True)).flatten(-2)  # [C, N', t D_x h w]
            tokens = tokens + self.motion_projection(changes)
        if self.grid_positions is not None:
            tokens = _add_positions(tokens, self.grid_positions.weight)
        if clip_of_pair is not None:
            tokens = tokens[clip_of_pair]  # [B, N', hidden]
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.long)
        if query_ids is not None and query_ids.shape[1]:
            if query_mask is None:
                query_mask = torch.ones_like(query_ids)
            words = self.predictor.get_input_embeddings()(query_ids)  # [B, Q, hidden]
            tokens = torch.cat([tokens, words.to(tokens.dtype)], dim=1)  # [B, N' + Q, hidden]
            mask = torch.cat([mask, query_mask.long()], dim=1)
        # Run the whole decoder. Its layers, called one by one, are causal if nothing is padded.
        states = self.predictor(inputs_embeds=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return self.output_projection(_masked_mean(states, mask))

    def pool_text(self, target_ids: Tensor, target_mask: Tensor | None = None) -> Tensor:
        """Target texts [B, L] -> pooled states of the y_encoder [B, D_y], before the projection. A cache may keep them.

        If no weight of the encoder is trained, no gradient is computed.
        """
        mask = torch.ones_like(target_ids) if target_mask is None else target_mask
        with _no_grad_if_frozen(self.y_encoder):
            states = self.y_encoder(input_ids=target_ids, attention_mask=mask).last_hidden_state  # [B, L, D_y]
        if self.config.y_pooling == "mean":
            return _masked_mean(states, mask)
        if self.config.y_pooling == "first":
            place = mask.argmax(dim=1)  # [B]
        else:
            place = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), place]

    def train(self, mode: bool = True) -> VLJEPAModel:
        """Modules without a trained weight stay in evaluation mode: no dropout, no updates of frozen norms."""
        super().train(mode)
        for module in self.modules() if mode else ():
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                module.eval()
        return self

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
        """Build a VL-JEPA from three parts; the projections between them are new and random.

        Args:
            x_encoder, predictor, y_encoder: a Hub id or folder (its weights), a config (random weights), or a model.
                A sentence-transformers folder says how it pools; its Dense layers are left out with a warning.
            num_predictor_layers: keep only this many last layers of the predictor (paper: 8 of Llama-3.2-1B's 16);
                None keeps all.
            frame_size: pixels of a frame, for a CNN whose config does not say (its visual_grid depends on it).
            revisions: part -> branch, tag or commit of its Hub id.
            options: fields of `VLJEPAConfig`.

        Raises UserError for a part that is not a model, a predictor that cannot be made bidirectional, and, without
        project_targets, a shared_dim that is not the y_encoder's.
        """
        revisions = dict(revisions or {})
        if unknown := sorted(set(revisions) - set(NAMES)):
            raise UserError(f"revisions names {', '.join(unknown)}; the parts are x_encoder, predictor and y_encoder.")
        if unknown := sorted(set(options) - set(VLJEPAConfig.__dataclass_fields__)):
            raise UserError(f"A VL-JEPA has no option {', '.join(unknown)}; see VLJEPAConfig.")
        parts = {"x_encoder": x_encoder, "predictor": predictor, "y_encoder": y_encoder}
        models = {name: load_part(name, part, revisions.get(name), dtype) for name, part in parts.items()}
        options.setdefault("revisions", {}).update(sources_of(parts, revisions))
        if isinstance(y_encoder, str):
            options.setdefault("y_pooling", pooling_of(y_encoder, revisions.get("y_encoder")))
        if num_predictor_layers is not None:
            models["predictor"] = last_layers(models["predictor"], num_predictor_layers)
        options = shape_of_tokens(models["x_encoder"], frame_size) | options
        # Given explicitly, because a composite config overwrites the attention of its parts.
        attention = {f"{name}_config": model.config._attn_implementation for name, model in models.items()}
        try:
            config = VLJEPAConfig(
                **{f"{name}_config": model.config for name, model in models.items()},
                attn_implementation=attention,
                **options,
            )
        except ValueError as error:
            raise UserError(one_line(error)) from None
        model = cls(config, **models)
        check_bidirectional(model.predictor)
        return model.to(dtype)


def merge_tokens(config: VLJEPAConfig, features: Tensor) -> Tensor:
    """[B, N, D_x] -> [B, N / (t h w), D_x t h w] for token_merge [t, h, w] (space to depth, as in Idefics 3).

    Raises UserError if the blocks do not divide the grid of tokens or the frames.
    """
    t, h, w = config.token_merge
    if t == h == w == 1:
        return features
    batch, count, dim = features.shape
    rows, columns = (1, 1) if config.pool_frames else config.visual_grid or (0, 0)
    if not rows or count % (rows * columns * t) or rows % h or columns % w:
        raise UserError(
            f"{count} visual tokens on a grid of {rows} x {columns} cannot be merged in blocks of {t} x {h} x {w}; "
            "set visual_grid to the rows and columns of one frame, and blocks that divide it and the frames."
        )
    blocks = features.reshape(batch, -1, t, rows // h, h, columns // w, w, dim)
    blocks = blocks.permute(0, 1, 3, 5, 2, 4, 6, 7)  # [B, T / t, rows / h, columns / w, t, h, w, D_x]
    return blocks.reshape(batch, count // (t * h * w), dim * t * h * w)


def _add_positions(tokens: Tensor, places: Tensor) -> Tensor:
    """Add the n embeddings of places [n, hidden] to each n of the tokens [C, N', hidden]. Raises UserError."""
    if tokens.shape[1] % len(places):
        raise UserError(f"{tokens.shape[1]} visual tokens do not fill a grid of {len(places)}; see visual_grid.")
    return (tokens.unflatten(1, (-1, len(places))) + places).flatten(1, 2)


def _no_grad_if_frozen(part: nn.Module) -> contextlib.AbstractContextManager[Any]:
    if any(weight.requires_grad for weight in part.parameters()):
        return contextlib.nullcontext()
    return torch.no_grad()


def _masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of [B, L, D] over the L places that the mask [B, L] keeps, in float32 -> [B, D]."""
    weight = mask[..., None].to(torch.float32)
    return ((states * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)).to(states.dtype)


def _check_vjepa2_clip(config: PreTrainedConfig, pixels: Tensor) -> None:
    frames, height, width = pixels.shape[1], *pixels.shape[3:]
    if (height, width) != (config.crop_size, config.crop_size):
        raise UserError(
            f"Frames of {height} x {width} for a V-JEPA 2 of crop_size {config.crop_size}: it would run, with "
            "wrong positions. Resize the frames, or set crop_size to their size."
        )
    if frames > 1 and frames % config.tubelet_size:
        raise UserError(
            f"{frames} frames for a V-JEPA 2 that reads them in groups of {config.tubelet_size}: it would drop the "
            "rest. Give a multiple."
        )


def _without_unused(model: PreTrainedModel) -> PreTrainedModel:
    """Drop modules that never run but would be saved: V-JEPA 2's own predictor (22M), the pooler of BERT and ViT."""
    if model.config.model_type == "vjepa2":
        model.predictor = None
    elif isinstance(getattr(model, "pooler", None), nn.Module) and list(model.pooler.parameters()):
        model.pooler = None
    return model
