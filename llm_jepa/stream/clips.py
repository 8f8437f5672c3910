"""A fixed number of frames of a video, or of a part of it, for training and for questions about a whole clip."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator

import numpy as np

from ..core.errors import UserError
from .frames import Limits, RawFrame, to_rgb
from .opening import Source, open_frames


def sample_frames(num_available: int, num_frames: int) -> np.ndarray:
    """Indices [num_frames] int64, uniform over `num_available`: the centres of that many equal segments.

    floor((i + 1/2) * num_available / num_frames). VL-JEPA samples "uniformly" and does not say how. Centres are the
    usual choice without randomness, and do not favour the first frame. Indices repeat if there are too few frames.

    Raises UserError unless both are >= 1.
    """
    if num_available < 1 or num_frames < 1:
        raise UserError(f"Cannot sample {num_frames} frames of {num_available}: both must be >= 1.")
    return (2 * np.arange(num_frames, dtype=np.int64) + 1) * num_available // (2 * num_frames)


def read_clip(
    source: Source,
    num_frames: int,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    native_fps: float | None = None,
    limits: Limits | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`num_frames` frames uniform over start_s <= time < end_s: uint8 [T, H, W, 3] and their times [T] in seconds.

    `sample_frames` chooses them; a warning tells if there are too few and some repeat. The source is read twice: first
    to count its frames, then to fetch the chosen ones. Only these are converted to RGB and held in memory.

    Raises UserError for a source that cannot be read twice (pipe, camera, URL, iterator), for a part without frames,
    and for everything that `open_frames` refuses.
    """
    start = -math.inf if start_s is None else start_s
    end = math.inf if end_s is None else end_s
    if not start < end or num_frames < 1:
        raise UserError(f"No clip of {num_frames} frames from {start_s} s to {end_s} s: give >= 1 frames, start < end.")

    with open_frames(source, native_fps=native_fps, live=False, limits=limits) as frames:
        if not frames.replayable:
            raise UserError(
                f"{frames.name}: a clip needs a source that can be read twice: a file, an array or a list. Save the "
                "stream to a file, or use windows()."
            )
        available = np.array([time_s for time_s, _ in _between(frames.raw_frames(), start, end)])
        if not len(available):
            raise UserError(f"{frames.name}: no frame from {start_s} s to {end_s} s. Give a part the video has.")
    chosen = sample_frames(len(available), num_frames)  # [T]
    if len(available) < num_frames:
        warnings.warn(f"{frames.name}: {len(available)} frames for {num_frames}: some repeat.", stacklevel=2)

    # Close the second reading through its iterator: FrameSource.close would repeat the warnings of the first one.
    again = open_frames(source, native_fps=native_fps, live=False, limits=limits)
    with contextlib.closing(again.raw_frames()) as raw_frames:
        images = _images_at(set(chosen.tolist()), _between(raw_frames, start, end))
    if len(images) < len(set(chosen.tolist())):
        raise UserError(f"{frames.name}: changed while it was read. Read it again when it is complete.")
    return np.stack([images[int(index)] for index in chosen]), available[chosen]


def _between(raw_frames: Iterable[RawFrame], start_s: float, end_s: float) -> Iterator[RawFrame]:
    for time_s, picture in raw_frames:
        if time_s >= end_s:
            return
        if time_s >= start_s:
            yield time_s, picture


def _images_at(indices: set[int], raw_frames: Iterable[RawFrame]) -> dict[int, np.ndarray]:
    """Index -> uint8 [H, W, 3]. Fewer if the source has become shorter. Stops after the last index."""
    images: dict[int, np.ndarray] = {}
    for index, (_, picture) in enumerate(raw_frames):
        if index in indices:
            images[index] = to_rgb(picture)
        if len(images) == len(indices):
            break
    return images
