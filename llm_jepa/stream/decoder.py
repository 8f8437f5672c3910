"""Selective decoding: every window of a stream is embedded, but text is decoded only once or twice a scene.

`segments.WardSegmenter` cuts the stream of embeddings into scenes; `SelectiveDecoder` puts a model on both sides of it.
D: embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .segments import Segment, WardSegmenter


@dataclass(frozen=True)
class Caption:
    """The text for a scene. Captions are append-only: a final one follows a provisional one and does not change it.

    start_s, end_s: of the scene, as `SelectiveDecoder` says; of a provisional caption, of the part seen so far.
    emitted_s: the end of the newest window at that moment.
    score: the decoder's, None if it gives none.
    final: the scene is over.
    """

    start_s: float
    end_s: float
    emitted_s: float
    text: str
    score: float | None
    final: bool


class _Answer(NamedTuple):
    """A decoded text and the embedding [D] it was decoded from."""

    embedding: NDArray[np.float32]
    text: str
    score: float | None


class SelectiveDecoder:
    """Windows in, captions out: every window is embedded, and text is decoded only for scenes.

    Once a scene has lasted `provisional_after_s`, it gets a provisional caption of its mean so far. When it closes, it
    gets a final caption of its core (the paper: of its mean or midpoint). If these two embeddings have a cosine of
    `reuse_cosine` or more, the final caption repeats the provisional text without a decode. So a scene costs one or two
    decodes, and a still scene costs one.

    Args:
        embed: window -> [D]. A window may be any object.
        decode: [D] float32 -> text, or (text, score).
        segmenter: a fresh `WardSegmenter`, or an object with its `push`, `flush` and `open`.
        provisional_after_s: None for no provisional captions. Then there is one decode per segment, as in the paper.
        reuse_cosine: above 1, every final caption is decoded.
        whole_windows: captions cover the stream from the start of its first window to the end of its last. By default
            they have the edges of their segments: the first starts and the last ends at the centre of a window.

    `num_windows` and `num_decodes` count the calls of `embed` and `decode` that returned.
    """

    def __init__(
        self,
        embed: Callable[[Any], ArrayLike],
        decode: Callable[[NDArray[np.float32]], str | tuple[str, float]],
        segmenter: WardSegmenter,
        *,
        provisional_after_s: float | None = 1.0,
        reuse_cosine: float = 0.99,
        whole_windows: bool = False,
    ) -> None:
        if provisional_after_s is not None and not provisional_after_s >= 0:
            raise ValueError(f"provisional_after_s={provisional_after_s} must be >= 0 s, or None for none.")
        self._embed, self._decode, self._segmenter = embed, decode, segmenter
        self._provisional_after_s, self._reuse_cosine = provisional_after_s, reuse_cosine
        self._whole_windows = whole_windows
        self._stream_start_s: float | None = None  # until the first scene is over
        self._now_s = math.nan  # until the first window
        self._provisional: _Answer | None = None  # of the open segment
        self.num_windows = 0
        self.num_decodes = 0

    def step(self, window: Any, start_s: float, end_s: float) -> list[Caption]:
        """Take the window from `start_s` to `end_s`; return the captions that are known now, mostly none.

        Raises ValueError for a window without duration, and as `WardSegmenter.push`.
        """
        if not end_s > start_s:
            raise ValueError(f"A window from {start_s} to {end_s} s has no duration; give its start and its end.")
        embedding = self._embed(window)  # [D]
        self.num_windows += 1
        closed = self._segmenter.push(embedding, (start_s + end_s) / 2)
        if self._whole_windows and math.isnan(self._now_s):
            self._stream_start_s = start_s
        self._now_s = end_s
        captions = []
        if closed is not None:
            captions.append(self._final(closed, closed.end_s))
        running = self._segmenter.open
        if running is not None and self._is_provisional_due(running):
            answer = self._provisional = self._answer(running.embedding)
            captions.append(self._caption(running, running.end_s, answer, final=False))
        return captions

    def finish(self) -> list[Caption]:
        """The final caption of the scene that the end of the stream closes; empty if there is none."""
        closed = self._segmenter.flush()
        if closed is None:
            return []
        return [self._final(closed, self._now_s if self._whole_windows else closed.end_s)]

    def _is_provisional_due(self, running: Segment) -> bool:
        if self._provisional_after_s is None or self._provisional is not None:
            return False
        return running.end_s - running.start_s >= self._provisional_after_s

    def _final(self, segment: Segment, end_s: float) -> Caption:
        answer, self._provisional = self._provisional, None
        if answer is None or not _cosine(answer.embedding, segment.core_embedding) >= self._reuse_cosine:
            answer = self._answer(segment.core_embedding)
        caption = self._caption(segment, end_s, answer, final=True)
        self._stream_start_s = None
        return caption

    def _caption(self, segment: Segment, end_s: float, answer: _Answer, *, final: bool) -> Caption:
        start_s = segment.start_s if self._stream_start_s is None else self._stream_start_s
        return Caption(start_s, end_s, self._now_s, answer.text, answer.score, final)

    def _answer(self, embedding: NDArray[np.float32]) -> _Answer:
        decoded = self._decode(embedding)
        self.num_decodes += 1
        if isinstance(decoded, str):
            return _Answer(embedding, decoded, None)
        text, score = decoded
        return _Answer(embedding, text, score)


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """0 if one of the two vectors [D] is 0."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    if length == 0:
        return 0.0
    return float(x @ y) / length
