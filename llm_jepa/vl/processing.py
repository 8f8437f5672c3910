"""`VLJEPAProcessor`: clips, queries and target texts -> the tensors of `VLJEPAModel`. Needs Pillow, no torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.processing_utils import ProcessorMixin

from ..core import untrusted
from ..core.errors import UserError
from ..core.json_files import read_json
from ..core.safetensors_files import find_file
from ..stream.clips import sample_frames
from ..stream.frames import to_rgb
from .configuration import VLJEPAConfig

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")  # one is enough
Frames = Any  # [T, H, W, 3] uint8 array or tensor, or a list of T PIL images or [H, W, 3] arrays


class VLJEPAProcessor(ProcessorMixin):
    """Image processor for frames, the predictor's tokenizer for queries, and the y_encoder's tokenizer for targets.

    Args:
        image_processor: resizes, crops and normalises one frame with PIL, see `frame_processor`.
        tokenizer: of the predictor; queries.
        target_tokenizer: of the y_encoder; targets, labels, candidate answers.
        num_frames: longer clips are sampled down to this many frames, uniformly.
        frames_multiple: numbers of frames that are not a multiple are refused, because V-JEPA 2 would drop the rest.
        max_query_tokens, max_target_tokens: longer texts are refused, never truncated.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        target_tokenizer: Any,
        num_frames: int = 16,
        frames_multiple: int = 1,
        max_query_tokens: int = 512,
        max_target_tokens: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, target_tokenizer)
        self.num_frames, self.frames_multiple = num_frames, frames_multiple
        self.max_query_tokens, self.max_target_tokens = max_query_tokens, max_target_tokens
        for each in (tokenizer, target_tokenizer):
            each.padding_side = "right"
            if each.pad_token is None:
                each.pad_token = each.eos_token

    def __call__(
        self,
        videos: Sequence[Frames] | None = None,
        query: str | Sequence[str] | None = None,
        target: str | Sequence[str] | None = None,
        images: Sequence[Any] | None = None,
    ) -> BatchFeature:
        """Turn clips and texts into tensors, those that are given.

        videos or images -> pixel_values_videos [B, T, 3, H, W]; query -> query_ids, query_mask [B, Q];
        target -> target_ids, target_mask [B, L].

        Args:
            videos: B clips of equally many frames after sampling.
            images: B single images instead; each is a clip of one frame (V-JEPA 2 repeats it, as the paper does).

        Raises UserError for a value that is not a clip, clips of different lengths, and texts beyond their limit.
        """
        batch: dict[str, Tensor] = {}
        if images is not None:
            if videos is not None:
                raise UserError("Give videos or images, not both in one batch: their numbers of frames differ.")
            batch["pixel_values_videos"] = self._pixels([[image] for image in images])
        elif videos is not None:
            batch["pixel_values_videos"] = self._pixels([self._clip(frames, i) for i, frames in enumerate(videos)])
        for name, texts, tokenizer, limit in (
            ("query", query, self.tokenizer, self.max_query_tokens),
            ("target", target, self.target_tokenizer, self.max_target_tokens),
        ):
            if texts is not None:
                texts = [texts] if isinstance(texts, str) else list(texts)
                batch[f"{name}_ids"], batch[f"{name}_mask"] = _tokens(name, texts, tokenizer, limit)
        return BatchFeature(batch)

    def _clip(self, frames: Frames, index: int) -> Any:
        """At most num_frames frames of a clip. Raises UserError for a value that is not a clip, and names `index`."""
        shape = getattr(frames, "shape", None)
        if shape is not None and (len(shape) != 4 or shape[-1] != 3):
            kind = "an image" if len(shape) == 3 else "not a clip"
            raise UserError(
                f"Clip {index} has the shape {tuple(shape)}, which is {kind}: give [frames, height, width, 3], or "
                "single images as images=."
            )
        if shape is None and not isinstance(frames, (list, tuple)):
            raise UserError(
                f"Clip {index} is a {type(frames).__name__}: give an array [frames, height, width, 3] or a list of "
                "images; read files with llm_jepa.stream.clips.read_clip, and give single images as images=."
            )
        if not len(frames):
            raise UserError(f"Clip {index} has no frames.")
        if len(frames) > self.num_frames:
            chosen = sample_frames(len(frames), self.num_frames)
            frames = frames[chosen] if shape is not None else [frames[i] for i in chosen]
        if len(frames) > 1 and len(frames) % self.frames_multiple:
            raise UserError(
                f"Clip {index} has {len(frames)} frames; the x_encoder takes multiples of {self.frames_multiple}, and "
                f"up to {self.num_frames}."
            )
        return frames

    def _pixels(self, clips: Sequence[Any]) -> Tensor:
        """B clips of T frames -> [B, T, 3, H, W] float32."""
        if not clips:
            raise UserError("There are no clips and no images in this batch; give one or more.")
        lengths = sorted({len(clip) for clip in clips})
        if len(lengths) != 1:
            raise UserError(
                f"Clips of {lengths[0]} and of {lengths[-1]} frames cannot share a batch; sample equally many of each."
            )
        frames = [to_rgb(frame) for clip in clips for frame in clip]
        processor = self.image_processor
        if processor.do_resize or getattr(processor, "do_center_crop", False):
            pixels = processor(frames, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        else:  # no frame is resized or cropped: as one array this is 20 times faster
            values = np.stack(frames).astype(np.float32)  # [B T, H, W, 3]
            if processor.do_rescale:
                values *= processor.rescale_factor
            if processor.do_normalize:
                values = (values - np.float32(processor.image_mean)) / np.float32(processor.image_std)
            pixels = torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()  # [B T, 3, H, W]
        return pixels.reshape(len(clips), lengths[0], *pixels.shape[-3:])

    @classmethod
    def from_parts(
        cls, config: VLJEPAConfig, *, image_processor: Any = None, tokenizer: Any = None, target_tokenizer: Any = None
    ) -> VLJEPAProcessor:
        """The processor of a model. Each piece is used as given, or loaded from the Hub id or folder of its part.

        Raises UserError for a piece that was not given and cannot be found.
        """

        def piece(name: str, part: str, given: Any, load: Any) -> Any:
            if given is not None and not isinstance(given, str):
                return given
            if given:
                return load(given, None)
            source = config.revisions.get(part, {})
            if source.get("name") is None:
                raise UserError(f"The {part} has random weights and no name: give the processor its {name}.")
            return load(source["name"], source.get("revision"))

        def load_tokenizer(source: str, revision: str | None) -> Any:
            return untrusted.load_tokenizer(source, revision=revision)

        x = config.x_encoder_config
        return cls(
            piece("image_processor", "x_encoder", image_processor, frame_processor),
            piece("tokenizer", "predictor", tokenizer, load_tokenizer),
            piece("target_tokenizer", "y_encoder", target_tokenizer, load_tokenizer),
            num_frames=config.num_frames,
            frames_multiple=x.tubelet_size if x.model_type == "vjepa2" else 1,
            max_query_tokens=config.max_query_tokens,
            max_target_tokens=config.max_target_tokens,
        )


def frame_processor(source: str, revision: str | None = None) -> Any:
    """The PIL image processor of an x_encoder, from its preprocessor_config.json (or video_preprocessor_config.json).

    V-JEPA 2 ships a video processor that needs torchvision. Here a PIL processor does the same to each frame: resize
    the shorter side to crop_size * 256 / 224, crop the centre, normalise. Raises UserError if there is none.
    """
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        with untrusted.loading("an image processor", source):
            path = find_file(source, name, revision=revision)
            settings = {} if path is None else read_json(path)
        if "VideoProcessor" not in str(settings.get("video_processor_type", settings.get("image_processor_type", ""))):
            continue
        untrusted.check_image_files(source, revision=revision)
        crop = settings.get("crop_size", 256)
        if isinstance(crop, dict):
            crop = crop.get("height")
        if type(crop) is not int or crop < 1:
            raise UserError(f"{path}: crop_size is {settings['crop_size']!r}; a number of pixels is needed.")
        return vjepa2_frames(
            crop,
            image_mean=settings.get("image_mean", IMAGENET_DEFAULT_MEAN),
            image_std=settings.get("image_std", IMAGENET_DEFAULT_STD),
        )
    return untrusted.load_image_processor(source, revision=revision)


def load_processor(folder: str) -> VLJEPAProcessor:
    """The processor of a saved VL-JEPA. Raises UserError."""
    with untrusted.loading("a VL-JEPA", folder):
        untrusted.check_image_files(folder)
        # Without its files, or with a torn one, transformers silently takes the tokenizer of the queries for targets.
        if not (
            Path(folder, "target_tokenizer", "tokenizer_config.json").is_file()
            and any(Path(folder, "target_tokenizer", name).is_file() for name in VOCABULARIES)
        ):
            raise UserError(f"{folder} has no whole target_tokenizer; take a whole copy.")
        for subfolder in ("", "target_tokenizer"):
            untrusted.check_tokenizer(folder, subfolder=subfolder)
        return VLJEPAProcessor.from_pretrained(folder, trust_remote_code=False)


def vjepa2_frames(crop_size: int = 256, **options: Any) -> Any:
    """A PIL image processor that treats a frame as V-JEPA 2's video processor does."""
    from transformers import VideoMAEImageProcessorPil

    return VideoMAEImageProcessorPil(
        size={"shortest_edge": int(crop_size * 256 / 224)},
        crop_size={"height": crop_size, "width": crop_size},
        resample=PILImageResampling.BILINEAR,
        **{"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD, **options},
    )


def _tokens(name: str, texts: list[str], tokenizer: Any, limit: int) -> tuple[Tensor, Tensor]:
    """ids and mask [B, L] of texts, padded on the right. Raises UserError for a text that is too long or not a text."""
    if not texts:
        raise UserError(f"There is no {name} in this batch; give one or more texts.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{name} {index} is {type(text).__name__}, not text.")
        if name == "target" and not text.strip():
            raise UserError(f"{name} {index} is empty, and has no embedding; remove it.")
    # An empty query has no token, not even the tokenizer's first one. Otherwise an embedding of "" would depend on the
    # rest of its batch.
    rows = [ids if text else [] for ids, text in zip(tokenizer(texts)["input_ids"], texts, strict=True)]
    longest = max(len(row) for row in rows)
    if longest > limit:
        index = next(i for i, row in enumerate(rows) if len(row) == longest)
        raise UserError(
            f"{name} {index} has {longest} tokens, the limit is {limit}; shorten it: {texts[index][:60]!r}..."
        )
    ids = torch.full((len(texts), longest), tokenizer.pad_token_id or 0)  # [B, L]
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return ids, mask
