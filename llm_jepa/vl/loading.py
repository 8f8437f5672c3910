"""Build the model, processor and clips of a VL-JEPA recipe."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, set_seed

from ..core.errors import UserError
from ..core.random_weights import config_of
from ..core.tokenizer import train_bpe
from .data import Clip, read_clips
from .inference import VLJEPA
from .keys import VLDataArguments, VLModelArguments
from .modeling import VLJEPAModel
from .processing import VLJEPAProcessor
from .streaming import ClipStream, known_clips, stream_clips


def load_clips(data: VLDataArguments, *, seed: int) -> tuple[list[Clip] | ClipStream, list[Clip]]:
    """(train, validation). Clips held out for validation are drawn with `seed` and leave the training set."""
    validation = [] if data.validation_data is None else read_clips(data.validation_data, data.limits)
    if data.streaming:
        stream = stream_clips(
            data.train_data,
            split=data.train_split,
            config=data.dataset_config,
            revision=data.dataset_revision,
            limits=data.limits,
            shuffle_buffer=data.shuffle_buffer,
        )
        return stream, validation
    train = read_clips(data.train_data, data.limits)
    if data.validation_data is not None:
        return train, validation
    if data.validation_rows >= len(train):
        raise UserError(
            f"validation_rows={data.validation_rows} leaves nothing of the {len(train)} clips of {data.train_data}; "
            "set a smaller number."
        )
    held = set(random.Random(seed).sample(range(len(train)), data.validation_rows))
    return [c for i, c in enumerate(train) if i not in held], [train[i] for i in sorted(held)]


def load_vl_model(
    args: VLModelArguments, clips: Sequence[Clip] | ClipStream, *, seed: int
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """Load or build the model of a recipe and its processor.

    Parts with random weights get a tokenizer that is trained on the texts of the clips (of a stream, the first ones).
    """
    if args.vl_model is not None:
        trained = VLJEPA.from_pretrained(args.vl_model, device="cpu")
        if args.num_frames is not None:  # the stages of the paper: 1, then 8, then 32
            trained.model.config.num_frames = trained.processor.num_frames = args.num_frames
        return trained.model.float(), trained.processor
    set_seed(seed)
    pieces: dict[str, Any] = {}  # of the processor, for parts with random weights
    vocab_size = 0
    if isinstance(args.predictor, dict) or isinstance(args.y_encoder, dict):
        tokenizer = train_bpe(_texts_of(known_clips(clips), args.default_query), args.tokenizer_vocab_size)
        vocab_size = len(tokenizer)
        if isinstance(args.predictor, dict):
            pieces["tokenizer"] = tokenizer
        if isinstance(args.y_encoder, dict):
            pieces["target_tokenizer"] = tokenizer
    options: dict[str, Any] = {}
    if args.y_pooling is not None:
        options["y_pooling"] = args.y_pooling
    parts: dict[str, Any] = {
        "x_encoder": _part("x_encoder", args.x_encoder, _size_of_frames(args)),
        "predictor": _part("predictor", args.predictor, {"vocab_size": vocab_size}),
        "y_encoder": _part("y_encoder", args.y_encoder, {"vocab_size": vocab_size}),
    }
    revisions = {name: getattr(args, f"{name}_revision") for name in parts}
    model = VLJEPAModel.from_parts(
        **parts,
        num_predictor_layers=args.num_predictor_layers,
        frame_size=args.frame_size,
        revisions={name: revision for name, revision in revisions.items() if revision is not None},
        shared_dim=args.shared_dim,
        num_frames=16 if args.num_frames is None else args.num_frames,
        token_merge=args.token_merge or [1, 1, 1],
        grid_positions=args.grid_positions,
        motion_dim=args.motion_dim,
        pool_frames=args.pool_frames,
        project_targets=args.project_targets,
        max_query_tokens=args.max_query_tokens,
        max_target_tokens=args.max_target_tokens,
        default_query=args.default_query,
        temperature=args.temperature,
        **options,
    )
    if args.frame_size is not None:
        pieces["image_processor"] = plain_frames(args.frame_size)
    return model, VLJEPAProcessor.from_parts(model.config, **pieces)


def plain_frames(size: int) -> Any:
    """An image processor that resizes to size x size and scales to -1..1, for an x_encoder with random weights."""
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _texts_of(clips: Sequence[Clip], default_query: str) -> list[str]:
    """The texts to train a tokenizer on, two for each pair. A pair without a query counts its target twice."""
    texts: list[str] = []
    for clip in clips:
        for query, target in clip.pairs:
            texts += [query or target, target]
    return [*texts, default_query, default_query]


def _size_of_frames(args: VLModelArguments) -> dict[str, Any]:
    """The option of an x_encoder's config that frame_size sets; positions and grid of tokens follow from it."""
    if not isinstance(args.x_encoder, dict):
        return {}
    return {"crop_size" if args.x_encoder["model_type"] == "vjepa2" else "image_size": args.frame_size}


def _part(name: str, part: str | dict[str, Any] | None, more: dict[str, Any]) -> str | PreTrainedConfig:
    """A config from the keys of a recipe, or a name unchanged. Raises UserError for keys that the config lacks.

    more: options that the recipe sets elsewhere.
    """
    if not isinstance(part, dict):
        return str(part)
    if clash := sorted(key for key in more if part.get(key, more[key]) != more[key]):
        raise UserError(f"{name}: {clash[0]}={part[clash[0]]} must be {more[clash[0]]} here; leave it out.")
    return config_of(part, what=name, **more)
