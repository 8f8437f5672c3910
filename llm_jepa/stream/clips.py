"""A fixed number of frames of a video, or of a part of it, for training and for questions about a whole clip."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable

import numpy as np

from ..core.errors import UserError
from .frames import EARLY_S, Limits, RawFrame
from .opening import Source, open_frames
from .pixels import CodedFrame, to_rgb


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

    Uniform in time: the part is cut into `num_frames` equal segments, and the picture on the screen at the centre of
    each is taken. For a film of constant rate these are the frames that `sample_frames` names. Otherwise a picture that
    stays longer is taken more often, as `watch` sees it; the first one may be older than `start_s`. A warning tells if
    a film of constant rate has too few frames and some repeat.

    The source is read twice: first to count its frames, then to fetch the chosen ones. Only these are converted to RGB
    and held in memory.

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
        times, film_end_s = _times(frames.raw_frames(), end)
        num_in_part = int((times >= start).sum())
        chosen = _on_screen(times, start, min(end, film_end_s), num_frames)  # [T]
        if not len(chosen):
            raise UserError(f"{frames.name}: no frame from {start_s} s to {end_s} s. Give a part the video has.")
    if num_in_part < num_frames and _has_constant_rate(times):  # otherwise stills are meant to repeat
        warnings.warn(f"{frames.name}: {num_in_part} frames for {num_frames}: some repeat.", stacklevel=2)

    # Close the second reading through its iterator: FrameSource.close would repeat the warnings of the first one.
    again = open_frames(source, native_fps=native_fps, live=False, limits=limits)
    with contextlib.closing(again.raw_frames()) as raw_frames:
        images = _images_at(set(chosen.tolist()), raw_frames)
    if len(images) < len(set(chosen.tolist())):
        raise UserError(f"{frames.name}: changed while it was read. Read it again when it is complete.")
    return np.stack([images[int(index)] for index in chosen]), times[chosen]


def _times(raw_frames: Iterable[RawFrame], end_s: float) -> tuple[np.ndarray, float]:
    """Times [N] of the frames before `end_s`, and when the last of them leaves the screen."""
    times: list[float] = []
    duration_s = 0.0
    for time_s, picture in raw_frames:
        if time_s >= end_s:
            return np.array(times), time_s
        times.append(time_s)
        duration_s = picture.duration_s if isinstance(picture, CodedFrame) else 0.0
    if not duration_s and len(times) > 1:  # a list of pictures does not say: the last stays as long as others
        duration_s = float(np.median(np.diff(times)))
    return np.array(times), times[-1] + duration_s if times else -math.inf


def _on_screen(times: np.ndarray, start_s: float, end_s: float, num_frames: int) -> np.ndarray:
    """Indices [num_frames] into `times` [N], uniform in time over start_s <= time < end_s. [0] if nothing is shown."""
    first = int(np.searchsorted(times, start_s))
    if first < len(times) and _has_constant_rate(times):
        # By numbers, because times are rounded: mkv's to 1 ms, and centres often fall on the edge between two frames.
        return first + sample_frames(len(times) - first, num_frames)
    if not len(times) or start_s >= end_s:
        return np.empty(0, np.int64)
    start_s = max(start_s, float(times[0]))
    centres = start_s + (2 * np.arange(num_frames) + 1) * (end_s - start_s) / (2 * num_frames)  # [T]
    return np.searchsorted(times, centres + EARLY_S, side="right") - 1


def _has_constant_rate(times: np.ndarray) -> bool:
    """Whether each frame is within half a frame of its place on an even grid; closer, its time does not matter."""
    if len(times) < 3:
        return True
    step = (times[-1] - times[0]) / (len(times) - 1)
    return bool(np.abs(times - times[0] - step * np.arange(len(times))).max() <= step / 2)


def _images_at(indices: set[int], raw_frames: Iterable[RawFrame]) -> dict[int, np.ndarray]:
    """Index -> uint8 [H, W, 3]. Fewer if the source has become shorter. Stops after the last index."""
    images: dict[int, np.ndarray] = {}
    for index, (_, picture) in enumerate(raw_frames):
        if index in indices:
            images[index] = to_rgb(picture)
        if len(images) == len(indices):
            break
    return images
