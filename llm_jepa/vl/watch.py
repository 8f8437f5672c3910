"""`llm-jepa watch`: a video or a camera in, captions out, and text decoded only where the scene changes.

    frames -> window of T frames every `stride_s` -> VLJEPA.embed -> WardSegmenter: the scene goes on | it ended here
                                                                     nothing decoded  | VLJEPA.decode -> Caption

`watch` is the loop; `watch_command` is the command around it. Captions are append-only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.errors import UserError
from ..stream.decoder import Caption, SelectiveDecoder
from ..stream.frames import Frame, FrameSource, Window, windows, without_leaps
from ..stream.segments import WardSegmenter
from .watch_page import Timeline, one_line

if TYPE_CHECKING:  # they import torch, and `llm-jepa --help` should not
    from .inference import VLJEPA

WINDOW_S = 2.0
# Shortest scene, in windows. While a change passes through a window its embeddings are neither scene's: with half a
# window that passage becomes a scene of its own. Simulated, 2 s of window every 0.5 s: 1.9 cuts at a hard cut with 1/2,
# 0.94 with 3/4; boundary F1 0.96 and 0.99 where rests and events of 1-1.8 s alternate.
MIN_DURATION = 0.75
MAX_FAILURES = 16  # windows in a row that the model refuses: then it is not the windows


@dataclass(frozen=True, eq=False)
class WatchResult:
    """What a stream came to.

    captions: the final ones. They cover the stream without a gap: from the start of its first window to the end of its
        last one, and between two scenes from centre to centre of windows.
    query: what was asked.
    num_windows: embedded.  num_decodes: texts written, at most one per scene, two where it had a provisional one.
    seconds: of video, from the first frame to the last.  wall_s: what that took.
    lost: what -> how often, of frames and windows that were not seen as they are; no zeros.
    interrupted: ended by Ctrl-C.
    error: what ended the stream early, if anything did: `watch` raises it only where no window was seen before.
    """

    captions: tuple[Caption, ...]
    query: str
    num_windows: int
    num_decodes: int
    seconds: float
    wall_s: float
    lost: Mapping[str, int]
    interrupted: bool
    error: Exception | None

    @property
    def details(self) -> str:
        rate = self.num_windows / self.wall_s if self.wall_s > 0 else 0.0
        return ", ".join([f"{rate:.1f} windows/s", *(f"{count} {what}" for what, count in self.lost.items())])

    @property
    def summary(self) -> str:
        decoded = f"decoded {self.num_decodes} of {self.num_windows} windows"
        return f"{decoded}, {self.seconds:.1f} s of video, {self.details}"


def default_fps(num_frames: int, stride_s: float) -> float:
    """The rate at which a window of `num_frames` lasts 2 s: a choice, for no model says how fast its clips were.

    At least one new frame per stride, for models of one or two frames.
    """
    return max(num_frames / WINDOW_S, 1 / stride_s)


def watch(
    model: VLJEPA,
    frames: Iterable[Frame],
    *,
    query: str | None = None,
    stride_s: float = 0.5,
    fps: float | None = None,
    threshold: float | None = None,
    sensitivity: float = 1.0,
    min_duration_s: float | None = None,
    provisional: bool = False,
    max_seconds: float | None = None,
    on_caption: Callable[[Caption], None] | None = None,
    timeline: Timeline | None = None,
) -> WatchResult:
    """Caption a stream until it ends, `max_seconds` have passed, or Ctrl-C: that ends the stream and returns.

    Args:
        model: with a y_decoder; windows are of its `num_frames`.
        frames: a `FrameSource`, which the caller closes, or frames in the order of time.
        query: None asks the model's `default_query`; "" asks nothing.
        stride_s: between two windows, in seconds of the stream.
        fps: of the frames in a window, `default_fps` if None.
        threshold, sensitivity: as in `WardSegmenter`, whose block is window / stride, 3 or more.
        min_duration_s: the same, MIN_DURATION windows if None.
        provisional: say something of a scene that has lasted 1 s, before it is over.
        max_seconds: of the stream, from its first frame.
        on_caption: called with each caption at the moment it is known, provisional ones too.
        timeline: collects what `write_report` shows.

    One bad frame ends nothing: what is no uint8 [H, W, 3] or not after the frame before is left out, a frame of another
    size is resized to that of the first, a window the model cannot embed is left out; `lost` and a warning count them.
    Images whose decoding fails are the business of `FrameSource`.

    Raises UserError for numbers out of range, without a y_decoder, and for a stream that gives no window at all; what
    the model raises for the first window, or for MAX_FAILURES in a row.
    """
    import torch

    if max_seconds is not None and not max_seconds > 0:
        raise UserError(f"max_seconds={max_seconds} must be a number of seconds > 0.")
    if not (0 < stride_s < math.inf and (fps is None or 0 < fps < math.inf)):
        raise UserError(f"stride_s={stride_s} and fps={fps} must be finite numbers > 0.")
    _ = model.y_decoder  # raises if there is none: before the first frame, not at the first caption
    num_frames = model.model.config.num_frames
    fps = default_fps(num_frames, stride_s) if fps is None else fps
    query = model.model.config.default_query if query is None else query
    window_s = num_frames / fps
    block = max(3, round(window_s / stride_s))
    min_duration_s = MIN_DURATION * window_s if min_duration_s is None else min_duration_s
    try:
        segmenter = WardSegmenter(
            block=block, threshold=threshold, sensitivity=sensitivity, min_duration_s=min_duration_s
        )
    except ValueError as error:
        raise UserError(str(error)) from None

    def embed(window: Window) -> NDArray[np.float32]:
        try:
            z = model.embed([window.frames], query)[0].cpu().numpy()
        except (ValueError, RuntimeError) as error:
            raise _Unusable(error) from error
        if not np.isfinite(z).all():
            raise _Unusable(ValueError(f"The embedding of the window at {window.start_s:.1f} s is not finite."))
        if timeline is not None:
            timeline.add_window((window.start_s + window.end_s) / 2, z)
        return z

    def decode(embedding: NDArray[np.float32]) -> tuple[str, float]:
        found = model.decode(torch.tensor(embedding)[None])[0]
        return found.text, found.score

    decoder = SelectiveDecoder(embed, decode, segmenter, provisional_after_s=1.0 if provisional else None)
    captions: list[Caption] = []

    def say(caption: Caption) -> None:
        if caption.final:
            captions.append(caption)
        if on_caption is not None:
            on_caption(caption)

    started, failures, skipped_windows = time.monotonic(), 0, 0
    opening: tuple[float, float] | None = None  # start and centre of the first window
    end_s = 0.0
    with _CtrlC() as ctrl_c:
        usable = _Usable(frames, ctrl_c, max_seconds, timeline)
        for window in windows(usable, num_frames=num_frames, stride_s=stride_s, fps=fps):
            # A frame is there until the next one: so a window of one frame lasts, too.
            window_end_s = max(window.end_s, window.start_s + 1 / fps)
            try:
                found = decoder.step(window, window.start_s, window_end_s)
            except _Unusable as error:
                failures, skipped_windows = failures + 1, skipped_windows + 1
                if not decoder.num_windows:
                    raise _of_the_first(error.reason, window) from error.reason
                if failures < MAX_FAILURES:
                    continue
                usable.error = error.reason
                break
            failures, end_s = 0, window_end_s
            centre_s = (window.start_s + window_end_s) / 2
            opening = opening or (window.start_s, centre_s)
            for caption in found:
                say(_from_the_start(caption, *opening))
        if opening is not None:
            for caption in decoder.finish():
                say(dataclasses.replace(_from_the_start(caption, *opening), end_s=end_s))
    if opening is None and not ctrl_c.asked:
        raise usable.error or UserError("No frames: the stream ended before it began.")
    lost = {**usable.lost, "windows skipped": skipped_windows}
    if own := {what: count for what, count in lost.items() if count}:
        warnings.warn("watch: " + ", ".join(f"{count} {what}" for what, count in own.items()) + ".", stacklevel=2)
    if isinstance(frames, FrameSource):
        lost |= {
            "frames dropped": frames.dropped,
            "corrupt": frames.corrupt,
            "out of order": frames.unordered,
            "clock resets": frames.clock_resets,
        }
    return WatchResult(
        tuple(captions),
        query,
        decoder.num_windows,
        decoder.num_decodes,
        usable.seconds,
        time.monotonic() - started,
        {what: count for what, count in lost.items() if count},
        ctrl_c.asked,
        usable.error,
    )


def to_srt(captions: Sequence[Caption]) -> str:
    """SubRip of the final captions: 1, HH:MM:SS,mmm --> HH:MM:SS,mmm, the text on one line, an empty line."""
    entries = []
    for number, caption in enumerate([c for c in captions if c.final], start=1):
        start, end = (round(1000 * max(t, 0.0)) for t in (caption.start_s, caption.end_s))
        text = one_line(caption.text).replace("-->", "->") or "(no text)"  # an arrow would be read as a line of times
        entries.append(f"{number}\n{_srt_time(start)} --> {_srt_time(max(end, start + 1))}\n{text}\n")
    return "\n".join(entries)


def to_json(caption: Caption, query: str) -> str:
    """One line. Keys in a fixed order; a score that is no number is null."""
    score = caption.score if caption.score is not None and math.isfinite(caption.score) else None
    event = {
        "start_s": round(caption.start_s, 3),
        "end_s": round(caption.end_s, 3),
        "emitted_s": round(caption.emitted_s, 3),
        "text": caption.text,
        "score": None if score is None else round(score, 4),
        "final": caption.final,
        "query": query,
    }
    return json.dumps(event)  # ASCII: some readers of lines take U+2028 for the end of one


def _srt_time(milliseconds: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d},{rest:03d}"


# -- the stream ------------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """A window that could not be embedded."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _CtrlC:
    """Ctrl-C ends the wait for a frame at once and is otherwise remembered until the window at hand is done, so that no
    scene is lost between its end and its caption. A second Ctrl-C is Python's own.

    Remembered in any case: FFmpeg, waiting in a read of ours, swallows the exception.
    """

    def __init__(self) -> None:
        self.asked = self.waiting = False
        self._installed = False

    def __enter__(self) -> _CtrlC:
        # Not where somebody else handles it, or ignores it as nohup does.
        if threading.current_thread() is threading.main_thread():
            self._installed = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            if self._installed:
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, *_: object) -> None:
        again, waiting = self.asked, self.waiting
        self.asked, self.waiting = True, False
        if waiting or again:
            raise KeyboardInterrupt


class _Usable:
    """The frames a window can be made of. Ends at the end of the stream, at an error in it, and at Ctrl-C."""

    def __init__(
        self, frames: Iterable[Frame], ctrl_c: _CtrlC, max_seconds: float | None, timeline: Timeline | None
    ) -> None:
        checked = frames if isinstance(frames, FrameSource) else without_leaps(frames, lambda f: f.time_s, self._skip)
        self._frames, self._ctrl_c = iter(checked), ctrl_c
        self._max_seconds, self._timeline = max_seconds, timeline
        self._first: Frame | None = None
        self._last_s = -math.inf
        self.lost = {"frames resized": 0, "frames skipped": 0}
        self.error: Exception | None = None

    @property
    def seconds(self) -> float:
        return 0.0 if self._first is None else self._last_s - self._first.time_s

    def __iter__(self) -> Iterator[Frame]:
        while (frame := self._next()) is not None:
            if not (_is_picture(frame.image) and self._last_s < frame.time_s < math.inf):
                self._skip()
                continue
            first = self._first = self._first or frame
            if self._max_seconds is not None and frame.time_s - first.time_s >= self._max_seconds:
                return
            if frame.image.shape != first.image.shape:
                self.lost["frames resized"] += 1
                height, width = first.image.shape[:2]
                frame = Frame(frame.time_s, np.asarray(Image.fromarray(frame.image).resize((width, height))))
            self._last_s = frame.time_s
            if self._timeline is not None:
                self._timeline.add_frame(frame)
            yield frame

    def _skip(self) -> None:
        self.lost["frames skipped"] += 1

    def _next(self) -> Frame | None:
        if self._ctrl_c.asked:
            return None
        try:
            self._ctrl_c.waiting = True
            frame = next(self._frames, None)
            self._ctrl_c.waiting = False
            return frame
        except KeyboardInterrupt:
            self._ctrl_c.asked = True
        except Exception as error:  # a stream that broke off: what was seen of it is still worth its captions
            self.error = error
        self._ctrl_c.waiting = False
        return None


def _of_the_first(reason: Exception, window: Window) -> Exception:
    """What the model does to the first window it would do to all: a ValueError is about the video it was given."""
    if isinstance(reason, UserError) or not isinstance(reason, ValueError):
        return reason
    count, height, width = window.frames.shape[:3]
    return UserError(f"The model does not take {count} frames of {width}x{height}: {reason}")


def _is_picture(image: Any) -> bool:
    return (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size > 0
    )


def _from_the_start(caption: Caption, start_s: float, centre_s: float) -> Caption:
    """A segmenter starts at the centre of its first window; the first scene was there from its start."""
    return dataclasses.replace(caption, start_s=start_s) if caption.start_s == centre_s else caption
