"""`VLJEPAConfig`: the three parts of a VL-JEPA, the space they share, and the shape of a clip."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .keys import MAX_FRAMES

MIN_TEMPERATURE = 0.01  # CLIP's floor (logit scale 100): below it a learnt temperature runs away


@strict
class VLJEPAConfig(PreTrainedConfig):
    """Configuration of `VLJEPAModel`  (VL-JEPA, arXiv:2512.10942v2, section 3.1).

    Args:
        x_encoder_config: of V-JEPA 2 (encodes the clip as a whole) or of an image encoder (encodes each frame alone).
        predictor_config: of the decoder layers that become the predictor, made bidirectional (`is_causal=False`).
        y_encoder_config: of the text encoder of the targets.
        visual_dim: size of a visual token from the x_encoder; None takes it from `x_encoder_config`.
        visual_grid: [height, width] of the tokens of one frame (of one tubelet, for V-JEPA 2), for `token_merge`.
        revisions: part -> {"name", "revision"} that `from_parts` loaded.
        shared_dim ... temperature: see `HELP` of `keys.py`.

    Why motion_dim: a linear projection can detect translation but not rotation from an arbitrary starting angle; this
    MLP can. It ignores anything static.
    """

    model_type = "vl_jepa"
    sub_configs_defaults = {
        "x_encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="vjepa2"),
        "predictor_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "y_encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="gemma3_text"),
    }

    x_encoder_config: Any = None  # a config, a dict of one, or None: transformers makes configs of them
    predictor_config: Any = None
    y_encoder_config: Any = None
    shared_dim: int = 1536
    visual_dim: Any = None  # int
    visual_grid: list[int] | None = None
    pool_frames: bool = False
    token_merge: list[int] = field(default_factory=lambda: [1, 1, 1])
    grid_positions: bool = False
    motion_dim: int = 0
    num_frames: int = 16
    y_pooling: Literal["mean", "first", "last"] = "mean"
    project_targets: bool = True
    max_query_tokens: int = 512
    max_target_tokens: int = 512
    default_query: str = "What happens in the video?"
    temperature: float = 0.07
    revisions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.predictor_config.is_causal = False  # every token sees every other one (section 3.1)
        if self.visual_dim is None:
            self.visual_dim = _visual_dim(self.x_encoder_config)
        problem = self._problem()
        if problem:
            raise ValueError(problem)

    def _problem(self) -> str | None:
        if self.shared_dim < 1 or self.num_frames < 1 or self.max_query_tokens < 1 or self.max_target_tokens < 1:
            return "shared_dim, num_frames, max_query_tokens and max_target_tokens must be 1 or more."
        if self.num_frames > MAX_FRAMES:
            return f"num_frames={self.num_frames}: a clip has {MAX_FRAMES:,} frames at most."
        if not self.temperature >= MIN_TEMPERATURE:
            return f"temperature={self.temperature} must be {MIN_TEMPERATURE} or more; CLIP starts at 0.07."
        if self.y_pooling not in ("mean", "first", "last"):  # `strict` does not read annotations that are strings
            return f"y_pooling={self.y_pooling!r} is unknown; choose mean, first or last."
        if len(self.token_merge) != 3 or min(self.token_merge) < 1:
            return f"token_merge={self.token_merge} must be three numbers of 1 or more: frames, rows, columns."
        grid = self.visual_grid
        if grid is not None and not (isinstance(grid, list) and len(grid) == 2 and all(type(n) is int for n in grid)):
            return f"visual_grid={grid!r} must be two numbers: rows and columns of the tokens of a frame."
        if self.pool_frames and self.token_merge[1:] != [1, 1]:
            return f"token_merge={self.token_merge} merges rows and columns, and pool_frames leaves none; use one."
        if self.grid_positions and (self.visual_grid is None or self.pool_frames):
            return "grid_positions needs the tokens of a frame on a grid: set visual_grid, and pool_frames to false."
        if not isinstance(self.revisions, dict) or not all(isinstance(part, dict) for part in self.revisions.values()):
            return "revisions must give each part a name and a revision."
        if self.motion_dim < 0:
            return f"motion_dim={self.motion_dim} must be 0 or more."
        if self.motion_dim and self.token_merge[0] == 1:
            return (
                f"motion_dim={self.motion_dim} needs several frames in one token, and token_merge={self.token_merge} "
                "puts one into each; raise its first number, or set motion_dim to 0."
            )
        y_dim = self.y_encoder_config.hidden_size
        if not self.project_targets and self.shared_dim != y_dim:
            return (
                f"shared_dim={self.shared_dim} is not the y_encoder's {y_dim}: without project_targets targets are its "
                f"own states; set shared_dim={y_dim}, or project_targets=True."
            )
        return None

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The predictor's, because the predictor reads the query."""
        return self.predictor_config


def _visual_dim(config: PreTrainedConfig) -> int:
    if getattr(config, "hidden_size", None):
        return int(config.hidden_size)
    if getattr(config, "hidden_sizes", None):
        return int(config.hidden_sizes[-1])
    raise ValueError(f"The config of {config.model_type} does not say how large its features are; give visual_dim.")
