"""Every key of ours that a recipe of `family: vl` can hold: the parts, the clips, the training. Needs no library.

`arguments.VLJEPATrainingArguments` adds the keys of transformers.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.errors import UserError
from ..core.row_files import LIMITS, RowLimits, check_regular
from ..core.signals import seconds_of
from ..core.source_files import files_of
from ..core.values import (
    check_counts_steps,
    check_fixed,
    check_ranges,
    check_stream,
    check_streamed_data,
    check_used,
    check_validation,
)

MAX_FRAMES = 65_536  # of a clip
# The options that a recipe may set, each described once: here, for `VLModelArguments` and `VLJEPAConfig`.
HELP = {
    "shared_dim": "Size D of predicted and target embeddings (paper: 1536).",
    "num_frames": "Frames of a clip; longer clips are sampled down to it uniformly. 1 for images.",
    "token_merge": "[t, h, w]: merge each t x h x w block of visual tokens into one, their channels side by side, "
    "before the projection. [1, 1, 1]: every token goes to the predictor (paper).",
    "pool_frames": "Replace the visual tokens of each frame (tubelet) by their mean, as image classifiers do.",
    "grid_positions": "Add to each (merged) visual token a learnt embedding of its place on the grid. For CNNs, whose "
    "features do not encode their position; V-JEPA 2's do. The predictor adds the order in time.",
    "motion_dim": "Width of an MLP over the differences between the frames that token_merge merges. "
    "0 = linear projection only (paper).",
    "y_pooling": "How the y_encoder's states become one vector: the mean over real tokens, the first or the last real "
    "token. The paper does not say; similar models take the mean.",
    "project_targets": "Map the y_encoder linearly to the shared space. false: its own space is the shared space, and "
    "shared_dim must be its size.",
    "max_query_tokens": "Longer queries are refused (paper: 512).",
    "max_target_tokens": "Longer targets are refused (paper: 512).",
    "default_query": "The query if none is given: in retrieval, classification and captions. The paper has such a "
    "prompt and does not print it.",
    "temperature": "Temperature of info_nce: the value at which learning starts, or the fixed value. Not in the paper; "
    "0.07 is CLIP's start.",
}

# Options of TrainingArguments that must keep these values, and why.
FIXED = (
    ("remove_unused_columns", False, "the collator reads clips"),
    ("logging_nan_inf_filter", False, "it hides the NaN that should stop the run"),
    ("label_smoothing_factor", 0.0, "there are no labels"),
    ("dataloader_persistent_workers", False, "workers would draw the pairs of the first epoch in every epoch"),
    ("auto_find_batch_size", False, "it restarts mid-run with weights already moved"),
    ("trust_remote_code", False, "code from a checkpoint is never run"),
    ("hub_token", None, "it would be written to disk in clear; log in with `hf auth login`"),
    ("use_liger_kernel", False, "it replaces the loss of language models, and there is none here"),
    ("torch_compile", False, "it is not tested with clips of changing size"),
)


@dataclass
class VLModelArguments:
    """> The parts of a new model, or a trained model to continue with."""

    vl_model: str | None = field(
        default=None, metadata={"help": "A trained VL-JEPA to continue with (folder or Hub id), instead of the parts."}
    )
    x_encoder: str | dict | None = field(
        default=None,
        metadata={"help": "Vision encoder: a Hub id or folder, or a config with model_type for random weights."},
    )
    predictor: str | dict | None = field(
        default=None, metadata={"help": "Causal LM whose layers predict, made bidirectional; or a config."}
    )
    y_encoder: str | dict | None = field(default=None, metadata={"help": "Text encoder of the targets; or a config."})
    x_encoder_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit."})
    predictor_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit."})
    y_encoder_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit."})
    num_predictor_layers: int | None = field(
        default=None, metadata={"help": "Keep this many last layers of the predictor (paper: 8 of 16); null: all."}
    )
    shared_dim: int = field(default=1536, metadata={"help": HELP["shared_dim"]})
    num_frames: int | None = field(
        default=None, metadata={"help": HELP["num_frames"] + " null: 16, or the number of vl_model."}
    )
    frame_size: int | None = field(
        default=None,
        metadata={
            "help": "For an x_encoder with random weights: frames are resized to this many pixels a side and scaled to "
            "mean and std 0.5."
        },
    )
    token_merge: list[int] | None = field(default=None, metadata={"help": HELP["token_merge"] + " null: [1, 1, 1]."})
    pool_frames: bool = field(default=False, metadata={"help": HELP["pool_frames"]})
    grid_positions: bool = field(default=False, metadata={"help": HELP["grid_positions"]})
    motion_dim: int = field(default=0, metadata={"help": HELP["motion_dim"]})
    y_pooling: Literal["mean", "first", "last"] | None = field(
        default=None, metadata={"help": HELP["y_pooling"] + " null: as the y_encoder's folder says, else mean."}
    )
    project_targets: bool = field(default=True, metadata={"help": HELP["project_targets"]})
    max_query_tokens: int = field(default=512, metadata={"help": HELP["max_query_tokens"]})
    max_target_tokens: int = field(default=512, metadata={"help": HELP["max_target_tokens"]})
    default_query: str = field(default="What happens in the video?", metadata={"help": HELP["default_query"]})
    temperature: float = field(default=0.07, metadata={"help": HELP["temperature"]})
    tokenizer_vocab_size: int = field(
        default=4096,
        metadata={
            "help": "For a predictor or y_encoder with random weights: size of a BPE trained on the rows' texts."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            (
                ("num_frames", 1, MAX_FRAMES, "1 is an image"),
                ("frame_size", 1, 2**14, "it counts pixels a side"),
                ("num_predictor_layers", 1, 10**4, "null keeps all"),
                ("shared_dim", 1, 2**20, "the paper has 1536"),
                ("motion_dim", 0, 2**20, "0 is off"),
                ("max_query_tokens", 1, 2**31, "it counts tokens"),
                ("max_target_tokens", 1, 2**31, "it counts tokens"),
                ("tokenizer_vocab_size", 257, 10**7, "256 bytes and the special tokens"),
            ),
        )
        parts = {name: getattr(self, name) for name in ("x_encoder", "predictor", "y_encoder")}
        if self.vl_model is not None:
            for name, option in type(self).__dataclass_fields__.items():
                if name not in ("vl_model", "num_frames") and getattr(self, name) != option.default:
                    raise UserError(
                        f"{name} belongs to a new model, and vl_model names a trained one; remove one of them."
                    )
            return
        missing = [name for name, part in parts.items() if part is None]
        if missing:
            raise UserError(f"The recipe names no {missing[0]}; a VL-JEPA needs x_encoder, predictor and y_encoder.")
        for name, part in parts.items():
            if isinstance(part, dict) and "model_type" not in part:
                raise UserError(f"{name} has no model_type; add one, e.g. model_type: llama.")
            if isinstance(part, dict) and getattr(self, f"{name}_revision") is not None:
                raise UserError(f"{name}_revision would be ignored: {name} is a config, not a checkpoint; remove it.")
        if (self.frame_size is not None) != isinstance(self.x_encoder, dict):
            raise UserError(
                "frame_size goes with an x_encoder of random weights: set it for such an x_encoder, and leave it out "
                "for a checkpoint, which brings its own."
            )


@dataclass
class VLDataArguments:
    """> Which clips to train on: a JSON-lines manifest of {"video" or "image", "query", "target"}."""

    train_data: str | list[str] = field(
        metadata={
            "help": "Manifest (.jsonl) of clips, a glob or a list of these. With streaming, also Parquet files, a "
            "folder of them, or a Hub dataset id, with the content of the clips."
        }
    )
    validation_data: str | list[str] | None = field(
        default=None, metadata={"help": "Manifests for validation; they are read whole."}
    )
    validation_rows: int = field(
        default=0, metadata={"help": "Without validation_data: clips held out of train_data, drawn with data_seed."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the rows while training goes on, for data that fit no disk or memory. Needs max_steps; a "
            "stream that ends begins again."
        },
    )
    shuffle_buffer: int = field(
        default=0,
        metadata={
            "help": "With streaming: clips held in memory, of which a random one comes next; as paths, or with their "
            "content if the rows hold it. 0: the order of the files."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of a folder or Hub dataset to train on."})
    max_rows: int = field(
        default=LIMITS.max_rows, metadata={"help": "Refuse data of more rows; a small file can unpack to any number."}
    )
    max_row_bytes: int = field(
        default=LIMITS.max_row_bytes,
        metadata={"help": "Refuse a longer line of JSON, or a larger row of a table, with its film."},
    )

    def __post_init__(self) -> None:
        check_validation(self)
        check_streamed_data(self)
        names = ("dataset_config", "dataset_revision", "train_split")
        check_used(self, [(name, self.streaming, "streaming: true") for name in names])

    @property
    def limits(self) -> RowLimits:
        """How much a manifest may hold."""
        return RowLimits(self.max_rows, self.max_row_bytes)


@dataclass
class VLJEPAKeys:
    """> The loss, and which parts learn."""

    objective: Literal["info_nce", "cosine", "l2", "mse", "smooth_l1"] = field(
        default="info_nce", metadata={"help": "Distance between predicted and target embedding (paper: info_nce)."}
    )
    learn_temperature: bool = field(
        default=True, metadata={"help": "Learn the temperature of info_nce (CLIP's way; the paper does not say)."}
    )
    regularizer: Literal["vicreg", "sigreg"] | None = field(
        default=None,
        metadata={"help": "Anti-collapse term on each side. The paper names it but reports no result."},
    )
    regularizer_weight: float = field(default=1.0, metadata={"help": "Its weight relative to the distance."})
    y_encoder_lr_factor: float = field(
        default=0.05,
        metadata={"help": "Learning rate of the y_encoder relative to the others' (paper: 0.05); 0 freezes it."},
    )
    x_encoder_trainable_layers: int = field(
        default=0,
        metadata={"help": "Train this many last blocks of the x_encoder. 0 freezes it (paper), -1 trains all."},
    )
    pairs_per_clip: int = field(
        default=1,
        metadata={"help": "(query, target) pairs drawn from each clip of a batch; they share its visual tokens."},
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for the visual features of a frozen x_encoder, computed once. null: every epoch."},
    )
    diagnostics_pairs: int = field(
        default=512, metadata={"help": "Validation pairs whose geometry is measured at every evaluation; 0 for none."}
    )
    stop_after: str | None = field(
        default=None,
        metadata={"help": "Time from the start of training, as 2h or 1h30m: then save a checkpoint and exit with 75."},
    )

    # Other defaults than the parent's.
    learning_rate: float = field(default=5e-5, metadata={"help": "The paper's pretraining: 5e-5, constant."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: the collator reads clips."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: it hides the NaN that should stop the run."}
    )

    def check(self) -> None:
        """Raises UserError for values that cannot be right, and for inherited options that our loss would ignore.

        The inherited keys must be attributes too.
        """
        check_ranges(
            self,
            (
                ("regularizer_weight", 0, 1e6, "0 is none"),
                ("y_encoder_lr_factor", 0, 1e6, "0 freezes it"),
                ("pairs_per_clip", 1, 10**6, "each clip has a pair"),
                ("x_encoder_trainable_layers", -1, 10**6, "-1 trains all"),
                ("diagnostics_pairs", 0, math.inf, "0 is off"),
                ("neftune_noise_alpha", 0, 0, "no embedding of tokens is trained with noise"),
            ),
        )
        check_fixed(self, FIXED)
        if self.feature_cache is not None and self.x_encoder_trainable_layers:
            raise UserError(
                "feature_cache keeps the features of a frozen x_encoder, and x_encoder_trainable_layers trains it; "
                "remove one of them."
            )
        check_used(
            self,
            (
                ("learn_temperature", self.objective == "info_nce", "objective: info_nce"),
                ("regularizer_weight", self.regularizer is not None, "a regularizer"),
            ),
        )
        if self.stop_after is not None:
            seconds_of(self.stop_after)


def check_together(
    model: VLModelArguments, data: VLDataArguments, training: VLJEPAKeys, given: Mapping[str, Any]
) -> None:
    """Refuse a temperature that the objective would ignore, and what does not go with streaming. Raises UserError."""
    if training.objective != "info_nce" and model.temperature != VLModelArguments.temperature:
        raise UserError(
            f"temperature: {model.temperature} would be ignored: it belongs to objective: info_nce; remove it."
        )
    if data.streaming:
        check_streamed_training(training)
        check_counts_steps(given)


def check_streamed_training(training: Any) -> None:
    """Raises UserError for training options that need to know all clips."""
    check_stream(training)
    if training.feature_cache is not None:
        raise UserError(
            "feature_cache holds the features of all clips, which streaming: true does not know; remove it."
        )


def manifests(source: str | Path | Sequence[str]) -> list[Path]:
    """The manifests of a path, a glob, or a list of both. Raises UserError if one is not there."""
    found: list[Path] = []
    for one in [str(source)] if isinstance(source, (str, Path)) else source:
        if glob.has_magic(one) and not Path(one).exists():
            found += files_of(one)
            continue
        check_regular(Path(one))
        if not Path(one).is_file():
            raise UserError(
                f"No manifest at {one}; it holds one JSON object a line, with 'video' and 'target'. (A folder or a Hub "
                "data set is read with streaming: true.)"
            )
        found.append(Path(one))
    return found
