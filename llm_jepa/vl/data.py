"""Clips with their (query, target) pairs, and the batches of a VL-JEPA step.

A row is one clip with everything that is asked about it: a caption is a target without a query, an answer is a target
with one. The x_encoder is most of a step's cost and does not see the query. So a batch holds each of its clips once,
however many pairs of it are drawn, and each of its target texts once.

    ClipDataset[i] -> ClipItem (frames or features of clip i, and the pairs drawn of it) -> ClipCollator -> tensors

Clips that are read while training goes on are in `streaming`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..core.errors import UserError
from ..core.files import file_sha256, text_key
from ..core.row_files import LIMITS, RowLimits, json_rows
from ..stream.clips import read_clip
from ..stream.frames import Limits
from ..stream.opening import is_image
from ..stream.pixels import to_rgb
from .features import FeatureCache
from .keys import manifests
from .processing import VLJEPAProcessor

MAX_PATH = 4096  # characters; Linux opens no longer one
KEYS = ("video", "image", "target", "query", "start_s", "end_s")  # of a row
MAX_SECONDS = 1e9  # of a clip's start and end; no film lasts 30 years


class Pair(NamedTuple):
    """A question about a clip, and its answer.

    Args:
        query: None asks nothing (the query-free stage).
        target: the text whose embedding is predicted.
    """

    query: str | None
    target: str


@dataclass(frozen=True)
class Clip:
    """A video or an image with its pairs.

    Args:
        video: a path, the content of a file (bytes), a PIL image, or frames [T, H, W, 3] uint8 ([H, W, 3] for an
            image).
        start_s, end_s: the part of a file to use, in the seconds that a player shows; None for its start and end.
    """

    video: Any
    pairs: tuple[Pair, ...]
    start_s: float | None = None
    end_s: float | None = None


class ClipItem(NamedTuple):
    """A clip of a batch: the pairs drawn of it, and its features [N, D_x] or else its frames [T, H, W, 3] uint8.

    clip_key: equal for equal clips, see `ClipDataset.clip_key`.
    """

    pairs: list[Pair]
    clip_key: int
    frames: Any = None
    features: Tensor | None = None


@dataclass(frozen=True)
class UnreadItem:
    """A `ClipItem` whose film is not read yet. place: of its row, for messages."""

    pairs: list[Pair]
    clip_key: int
    clip: Clip
    place: str
    num_frames: int

    def read(self) -> ClipItem:
        """Raises UserError for a film that cannot be read."""
        try:
            return ClipItem(self.pairs, self.clip_key, frames=read_frames(self.clip, self.num_frames, Limits()))
        except UserError as error:
            raise UserError(f"{self.place}: {error}") from None


def clip_key(clip: Clip) -> int:
    """Equal for clips that look the same: by path and times of a file, or by content."""
    if isinstance(clip.video, (str, Path)):
        return text_key(f"{Path(clip.video).resolve()} {clip.start_s or 0.0} {clip.end_s}")
    if isinstance(clip.video, bytes):
        return text_key(f"{_content(clip.video)} {clip.start_s or 0.0} {clip.end_s}")
    return text_key(_content(clip.video))


def draw_pairs(clip: Clip, count: int, seed: str) -> list[Pair]:
    """At most `count` pairs, each of another query, in the order of the clip. `ClipDataset` says which."""
    rng = random.Random(seed)
    targets: dict[str | None, list[str]] = {}
    for query, target in clip.pairs:
        targets.setdefault(query, []).append(target)
    others = list(targets)
    chosen: set[str | None] = set()
    if count > 1:
        chosen.add(others.pop(0))
    chosen.update(rng.sample(others, min(count - len(chosen), len(others))))
    return [Pair(query, rng.choice(targets[query])) for query in targets if query in chosen]


def read_frames(clip: Clip, num_frames: int, limits: Limits) -> Any:
    """[T, H, W, 3] uint8, at most num_frames of a file; [1, H, W, 3] of an image. Raises UserError."""
    if isinstance(clip.video, (str, Path, bytes, Image.Image)):
        count = 1 if is_image(clip.video) else num_frames
        return read_clip(clip.video, count, start_s=clip.start_s, end_s=clip.end_s, limits=limits)[0]
    return to_rgb(clip.video)[None] if is_image(clip.video) else clip.video


class ClipDataset(Dataset):
    """Item i: clip i and up to `pairs_per_clip` of its pairs, drawn anew in every epoch.

    The draw depends on (seed, epoch, i) alone, so a resumed run draws the same pairs as an uninterrupted one.

    - Drawn pairs have different queries. Two captions of a clip under one query have one prediction, so they would be
      negatives of each other.
    - Each query is equally likely, however many targets it has: 24 wordings of a caption do not crowd out one question.
    - If several pairs are drawn, the clip's first query (usually its caption) is one of them, so that 20 questions do
      not crowd out the caption.

    Args:
        features: visual features [clips, N, D_x] that are known already, as a `FeatureCache` or a tensor; then no video
            is read.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        *,
        num_frames: int,
        pairs_per_clip: int = 1,
        seed: int = 0,
        limits: Limits | None = None,
        features: FeatureCache | Tensor | None = None,
    ) -> None:
        _check_clips(clips, num_frames)
        if pairs_per_clip < 1:
            raise UserError(f"pairs_per_clip={pairs_per_clip} must be 1 or more.")
        if features is not None and len(features) != len(clips):
            raise UserError(f"{len(features)} visual features for {len(clips)} clips; give one for each.")
        self.clips, self.num_frames, self.pairs_per_clip, self.seed = clips, num_frames, pairs_per_clip, seed
        self.limits, self.features = limits or Limits(), features
        self.epoch = 0
        self._keys: dict[int, int] = {}  # by index

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> ClipItem:
        pairs, key = self.draw(index), self.clip_key(index)
        if self.features is not None:
            return ClipItem(pairs, key, features=self.features[[index]][0])
        return ClipItem(pairs, key, frames=self.frames(index))

    def clip_key(self, index: int) -> int:
        """Equal for clips that look the same: by features that the caller gives, or else as in `clip_key`.

        Two items may hold one clip, and a prediction cannot differ between them.
        """
        if index not in self._keys:
            clip = self.clips[index]
            # Features that the caller gives decide alone, because no video is read.
            if isinstance(self.features, Tensor) or (clip.video is None and self.features is not None):
                self._keys[index] = text_key(_content(self.features[[index]]))
            else:
                self._keys[index] = clip_key(clip)
        return self._keys[index]

    def draw(self, index: int) -> list[Pair]:
        """The pairs of clip i in this epoch."""
        return draw_pairs(self.clips[index], self.pairs_per_clip, f"{self.seed} {self.epoch} {index}")

    def frames(self, index: int) -> Any:
        """[T, H, W, 3] uint8 of clip i, as `read_frames` gives them."""
        return read_frames(self.clips[index], self.num_frames, self.limits)

    def identity(self) -> Iterator[bytes]:
        """Bytes that determine the pixels of each clip: pixels if it is in memory; path, size and time of a file."""
        for index, clip in enumerate(self.clips):
            part = f"{clip.start_s} {clip.end_s} {self.num_frames}"
            if isinstance(clip.video, (str, Path)):
                stat = Path(clip.video).stat()
                yield f"{clip.video} {stat.st_size} {stat.st_mtime_ns} {part}".encode()
            elif isinstance(clip.video, bytes):
                yield part.encode() + hashlib.sha256(clip.video).digest()
            else:  # through `to_rgb`, because equal numbers under two palettes are two pictures
                pixels = np.stack([to_rgb(frame) for frame in self.frames(index)])
                if is_image(clip.video):
                    pixels = pixels[0]
                yield str(pixels.shape).encode() + hashlib.sha256(pixels.tobytes()).digest()


@dataclass(frozen=True)
class ClipCollator:
    """Items of a `ClipDataset` or of a stream -> the inputs of `VLJEPAModel.forward`, and the keys [B] for the loss.

    For C clips, B pairs and U distinct target texts:

        pixel_values_videos [C, T, 3, H, W] or visual_features [C, N, D_x]
        query_ids, query_mask [B, Q], left out if no pair has a query
        target_ids, target_mask [U, L] or target_features [U, D_y]
        clip_of_pair, target_of_pair [B]: row of the clip and of the target text of each pair
        target_key, context_key [B]: equal for equal target texts, and for equal clips with equal queries

    texts: pooled states of a frozen y_encoder, by text.
    """

    processor: VLJEPAProcessor
    texts: Mapping[str, Tensor] | None = None

    def __call__(self, drawn: Sequence[ClipItem | UnreadItem]) -> dict[str, Tensor]:
        items = [item.read() if isinstance(item, UnreadItem) else item for item in drawn]
        clip_of_pair = [row for row, item in enumerate(items) for _ in item.pairs]
        pairs = [pair for item in items for pair in item.pairs]
        texts = list(dict.fromkeys(pair.target for pair in pairs))
        row_of_text = {text: row for row, text in enumerate(texts)}
        target_of_pair = torch.tensor([row_of_text[pair.target] for pair in pairs])  # [B]
        batch = self._targets(texts)
        if any(pair.query for pair in pairs):
            batch |= self.processor(query=[pair.query or "" for pair in pairs])
        batch |= self._vision(items)
        batch["clip_of_pair"] = torch.tensor(clip_of_pair)  # [B]
        batch["target_of_pair"] = target_of_pair
        batch["target_key"] = torch.tensor([text_key(text.strip()) for text in texts])[target_of_pair]
        batch["context_key"] = torch.tensor([_context_key(item, pair) for item in items for pair in item.pairs])
        return batch

    def _targets(self, texts: list[str]) -> dict[str, Tensor]:
        # `evaluate` may be given clips with texts that the trainer did not know when it pooled its own.
        if self.texts is not None and all(text in self.texts for text in texts):
            return {"target_features": torch.stack([self.texts[text] for text in texts])}  # [U, D_y]
        return dict(self.processor(target=texts))

    def _vision(self, items: Sequence[ClipItem]) -> dict[str, Tensor]:
        features = [item.features for item in items if item.features is not None]
        if features:  # a data set has features of all its clips, or of none
            return {"visual_features": torch.stack(features)}  # [C, N, D_x]
        return dict(self.processor(videos=[item.frames for item in items]))


def _context_key(item: ClipItem, pair: Pair) -> int:
    """Equal for equal clips with equal queries. White space around a query does not count."""
    return text_key(f"{item.clip_key} {(pair.query or '').strip()}")


def _content(values: Any) -> str:
    """Equal for equal arrays or tensors: shape, type, and hash of the bytes."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().contiguous().view(torch.uint8).numpy()  # numpy has no bfloat16
    array = np.asarray(values)
    return f"{array.shape} {array.dtype} {hashlib.sha256(array.tobytes()).hexdigest()}"


def is_text(text: Any) -> bool:
    """Not blank, and without half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    return isinstance(text, str) and bool(text.strip()) and not re.search("[\ud800-\udfff]", text)


def clips_sha256(clips: Sequence[Clip]) -> str:
    """Hash of the texts and of the files' contents; it does not depend on the files' folder."""
    digest, seen = hashlib.sha256(), {}
    for clip in clips:
        if clip.video not in seen:
            seen[clip.video] = file_sha256(clip.video)
        digest.update(json.dumps([seen[clip.video], clip.start_s, clip.end_s, clip.pairs]).encode())
    return digest.hexdigest()


def read_clips(source: str | Path | Sequence[str], limits: RowLimits = LIMITS) -> list[Clip]:
    """Read clips from JSON-lines manifests. Rows of one file and time span become one clip, in the order of the first.

    source: a manifest, a glob, or a list of both.  limits: of each manifest.

    A line is {"video" or "image": path relative to the manifest, "target": text or [texts], "query": text or absent,
    "start_s", "end_s": optional}. Raises UserError with the line for anything else.
    """
    pairs_of: dict[tuple[str, float | None, float | None], list[Pair]] = {}  # by file, start and end
    for path in manifests(source):
        count = 0
        for place, row in json_rows(path, limits):
            clip = clip_of_row(row, path.parent, place)
            pairs_of.setdefault((clip.video, clip.start_s, clip.end_s), []).extend(clip.pairs)
            count += 1
        if not count:
            raise UserError(f"The manifest {path} holds no rows.")
    return [Clip(video, tuple(dict.fromkeys(pairs)), start, end) for (video, start, end), pairs in pairs_of.items()]


def clip_of_row(row: Mapping[str, Any], folder: Path, place: str) -> Clip:
    """A row of a manifest as a clip with the pairs of this row.

    Args:
        folder: to which a path is relative.
        place: file and line, for messages.

    Raises UserError for a row without a file or a target, or with unknown keys or wrong times.
    """
    if unknown := sorted(set(row) - set(KEYS)):
        names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise UserError(f"{place} has unknown keys {names}; known are {', '.join(sorted(KEYS))}.")
    media = row.get("video", row.get("image"))
    if not isinstance(media, str):
        raise UserError(f"{place} needs 'video' or 'image', the path of a file.")
    if "\0" in media or len(media) > MAX_PATH or not (folder / media).is_file():
        raise UserError(f"{place} names {media[:200]!r}, but there is no such file next to the manifest.")
    return clip_of(row, str(folder / media), place)


def clip_of(row: Mapping[str, Any], video: Any, place: str) -> Clip:
    """A row whose film or picture is `video`, as a clip. Raises UserError for wrong texts and times."""
    targets = row.get("target")
    if isinstance(targets, str):
        targets = [targets]
    query = row.get("query")
    if query == "":  # asks nothing, as an absent query does
        query = None
    are_texts = isinstance(targets, list) and all(is_text(text) for text in targets)
    if not targets or not are_texts or not (query is None or is_text(query)):
        raise UserError(f"{place} needs a 'target' (a text or texts); 'query' is a text.")
    if "video" in row and "image" in row:
        raise UserError(f"{place} has a 'video' and an 'image'; keep one of them.")
    start, end = row.get("start_s"), row.get("end_s")
    for time in (start, end):
        if time is not None and (type(time) not in (int, float) or not 0 <= time <= MAX_SECONDS):
            raise UserError(f"{place}: start_s and end_s are seconds from the start of the video.")
    if end is not None and (start or 0) >= end:
        raise UserError(f"{place}: start_s={start} is not before end_s={end}.")
    return Clip(video, tuple(Pair(query, target) for target in targets), start, end)


def _check_clips(clips: Sequence[Clip], num_frames: int) -> None:
    if not len(clips):
        raise UserError("There are no clips; give one or more.")
    for index, clip in enumerate(clips):
        if not clip.pairs:
            raise UserError(f"Clip {index} has no target: give it a pair of a query (or none) and a target text.")
    images = sum(is_image(clip.video) for clip in clips)
    if images and images < len(clips) and num_frames > 1:
        raise UserError(
            f"{images} images among {len(clips) - images} videos: a batch cannot hold both; train on the images "
            "in a separate stage, before the videos."
        )
