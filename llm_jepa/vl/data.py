"""Clips with their (query, target) pairs, and the batches a VL-JEPA step takes.

A row is one clip and everything that is asked about it: a caption is a target without a query, an answer is a target
with one. The x_encoder is most of a step's cost and does not see the query, so a batch holds each of its clips once,
however many pairs of it are drawn; and each of its target texts once.
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
from torch import Tensor
from torch.utils.data import Dataset

from ..core.errors import UserError
from ..core.files import file_sha256
from ..stream.clips import read_clip
from ..stream.frames import Limits
from ..stream.opening import IMAGE_SUFFIXES
from .features import FeatureCache
from .processing import VLJEPAProcessor


class Pair(NamedTuple):
    """query: None asks nothing (the query-free stage). target: the text whose embedding is predicted."""

    query: str | None
    target: str


@dataclass(frozen=True)
class Clip:
    """video: a path of a video or an image, or the frames [T, H, W, 3] uint8 ([H, W, 3]: an image).
    start_s, end_s: which part of a file."""

    video: Any
    pairs: tuple[Pair, ...]
    start_s: float | None = None
    end_s: float | None = None


class ClipDataset(Dataset):
    """Item i: clip i and up to `pairs_per_clip` of its pairs, others in every epoch.

    Which ones depends on (seed, epoch, i) alone, so a resumed run draws what the uninterrupted one would have drawn.
    They have different queries: two captions of a clip under one query have one prediction and would be negatives of
    each other. And each query is as likely as another, so that 24 wordings of a caption do not drown one question; but
    where several are drawn, the clip's first query, its caption as a rule, is one of them, so that 20 questions do not
    drown the caption.

    features: the visual features [clips, N, D_x] where they are known already; then no video is read. A `FeatureCache`,
    or a tensor.
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
        if not len(clips):
            raise UserError("There are no clips.")
        for index, clip in enumerate(clips):
            if not clip.pairs:
                raise UserError(f"Clip {index} has no target: give it a pair of a query (or none) and a target text.")
        images = sum(_is_image(clip.video) for clip in clips)
        if images and images < len(clips) and num_frames > 1:
            raise UserError(
                f"{images} images among {len(clips) - images} videos: a batch cannot hold both; train on the images "
                "in a stage of their own, before the videos."
            )
        if pairs_per_clip < 1:
            raise UserError(f"pairs_per_clip={pairs_per_clip} must be 1 or more.")
        self.clips, self.num_frames, self.pairs_per_clip, self.seed = clips, num_frames, pairs_per_clip, seed
        if features is not None and len(features) != len(clips):
            raise UserError(f"{len(features)} visual features for {len(clips)} clips; give one for each.")
        self.limits, self.features = limits or Limits(), features
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"clip": index, "pairs": self.draw(index), "source": self}

    def draw(self, index: int) -> list[Pair]:
        """At most `pairs_per_clip` pairs, each of another query, in the order of the clip."""
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        targets: dict[str | None, list[str]] = {}
        for query, target in self.clips[index].pairs:
            targets.setdefault(query, []).append(target)
        first, *others = targets
        always, others = ([first], others) if self.pairs_per_clip > 1 else ([], [first, *others])
        chosen = {*always, *rng.sample(others, min(self.pairs_per_clip - len(always), len(others)))}
        return [Pair(query, rng.choice(targets[query])) for query in targets if query in chosen]

    def frames(self, index: int) -> Any:
        """[T, H, W, 3] uint8 of clip i, at most num_frames of it; [1, H, W, 3] of an image. Raises UserError."""
        clip = self.clips[index]
        if not isinstance(clip.video, (str, Path)):
            return clip.video[None] if _is_image(clip.video) else clip.video
        count = 1 if _is_image(clip.video) else self.num_frames
        return read_clip(str(clip.video), count, start_s=clip.start_s, end_s=clip.end_s, limits=self.limits)[0]

    def identity(self) -> Iterator[bytes]:
        """What the pixels of each clip are, without decoding them: content of arrays; path, size and time of files."""
        for clip in self.clips:
            if isinstance(clip.video, (str, Path)):
                stat = Path(clip.video).stat()
                what = f"{clip.video} {stat.st_size} {stat.st_mtime_ns} {clip.start_s} {clip.end_s} {self.num_frames}"
                yield what.encode()
            else:
                frames = np.asarray(clip.video)
                yield str(frames.shape).encode() + hashlib.sha256(frames.tobytes()).digest()


@dataclass(frozen=True)
class ClipCollator:
    """Items of a `ClipDataset` -> what `VLJEPAModel.forward` takes, and `target_key` [B] for the loss.

    pixel_values_videos [C, T, 3, H, W] or visual_features [C, N, D_x], C clips; query_ids, query_mask [B, Q] and
    clip_of_pair [B], B pairs; target_ids, target_mask [U, L] or target_features [U, D_y], and target_of_pair [B], U
    distinct texts.

    texts: pooled states of a frozen y_encoder, by text.
    """

    processor: VLJEPAProcessor
    texts: Mapping[str, Tensor] | None = None

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [(row, pair) for row, item in enumerate(items) for pair in item["pairs"]]
        texts = list(dict.fromkeys(pair.target for _, pair in pairs))
        place = {text: i for i, text in enumerate(texts)}
        batch: dict[str, Tensor] = {}
        if self.texts is not None and all(text in self.texts for text in texts):  # not so for clips given to `evaluate`
            batch["target_features"] = torch.stack([self.texts[text] for text in texts])
        else:
            batch |= self.processor(target=texts)
        if any(pair.query for _, pair in pairs):
            batch |= self.processor(query=[pair.query or "" for _, pair in pairs])
        source = items[0]["source"]
        if source.features is not None:
            batch["visual_features"] = source.features[[item["clip"] for item in items]]
        else:
            batch |= self.processor(videos=[source.frames(item["clip"]) for item in items])
        batch["clip_of_pair"] = torch.tensor([row for row, _ in pairs])
        batch["target_of_pair"] = torch.tensor([place[pair.target] for _, pair in pairs])
        batch["target_key"] = torch.tensor([text_key(text) for text in texts])[batch["target_of_pair"]]
        return batch


def is_text(text: Any) -> bool:
    """Neither blank nor with half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    return isinstance(text, str) and bool(text.strip()) and not re.search("[\ud800-\udfff]", text)


def _is_image(video: Any) -> bool:
    if isinstance(video, (str, Path)):
        return Path(video).suffix.lower() in IMAGE_SUFFIXES
    return getattr(video, "ndim", 4) == 3


def clips_sha256(clips: Sequence[Clip]) -> str:
    """Hash of the texts and of the files' contents, wherever they lie."""
    digest, seen = hashlib.sha256(), {}
    for clip in clips:
        if clip.video not in seen:
            seen[clip.video] = file_sha256(clip.video)
        digest.update(json.dumps([seen[clip.video], clip.start_s, clip.end_s, clip.pairs]).encode())
    return digest.hexdigest()


def text_key(text: str) -> int:
    """63 bits, equal for equal texts on every rank and machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_clips(path: str | Path) -> list[Clip]:
    """A JSON-lines manifest -> clips. Rows of one file and time span become one clip, in the order of the first.

    A line is {"video" or "image": path relative to the manifest, "target": text or [texts], "query": text or absent,
    "start_s", "end_s": optional}. Raises UserError with the line for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No manifest at {path}; it holds one JSON object a line, with 'video' and 'target'.")
    found: dict[tuple[str, float | None, float | None], list[Pair]] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise UserError(f"{where} is not JSON in UTF-8: {error}.") from None
            if not isinstance(row, dict):
                raise UserError(f"{where} must hold a JSON object, found {type(row).__name__}.")
            known = {"video", "image", "target", "query", "start_s", "end_s"}
            if unknown := sorted(set(row) - known):
                raise UserError(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
            media = row.get("video", row.get("image"))
            targets = row.get("target")
            targets = [targets] if isinstance(targets, str) else targets
            query = None if row.get("query") == "" else row.get("query")  # both ask nothing
            texts = targets if isinstance(targets, list) else [None]
            good = all(is_text(text) for text in texts) and (query is None or is_text(query))
            if not isinstance(media, str) or not targets or not good:
                raise UserError(f"{where} needs 'video' (a path) and 'target' (a text or texts); 'query' is a text.")
            if "video" in row and "image" in row:
                raise UserError(f"{where} has a 'video' and an 'image'; a row is one of them.")
            span = [row.get("start_s"), row.get("end_s")]
            if not all(time is None or isinstance(time, (int, float)) and time >= 0 for time in span):
                raise UserError(f"{where}: start_s and end_s are seconds from the start of the video.")
            if row.get("end_s") is not None and (row.get("start_s") or 0) >= row["end_s"]:
                raise UserError(f"{where}: start_s={row.get('start_s')} is not before end_s={row['end_s']}.")
            file_name = path.parent / media
            if not file_name.is_file():
                raise UserError(f"{where} names {media}, which is no file beside the manifest.")
            found.setdefault((str(file_name), span[0], span[1]), []).extend(Pair(query, target) for target in targets)
    if not found:
        raise UserError(f"The manifest {path} holds no rows.")
    return [Clip(video, tuple(dict.fromkeys(pairs)), start, end) for (video, start, end), pairs in found.items()]
