"""Caption a video or a camera while it runs; decode text only when the scene changes.

    frames -> window of T frames every `stride_s` -> SlidingEncoder -> WardSegmenter: the scene goes on | it ended here
                                                                     nothing decoded  | VLJEPA.decode -> Caption

`watch` is the whole loop, `Watcher` one stream of it; `watch_command` is `llm-jepa watch`. Captions are append-only.
"""

from __future__ import annotations

import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.errors import UserError
from ..core.signals import SCHEDULER, Stopped, end_at_once, handled
from ..stream.decoder import Caption, SelectiveDecoder
from ..stream.frames import Frame, FrameSource, StreamClock, Window, held, windows, without_leaps
from ..stream.segments import WardSegmenter
from .watch_page import Timeline, one_line

if TYPE_CHECKING:  # they import torch, and `llm-jepa --help` should not
    from .inference import VLJEPA

WINDOW_S = 2.0
# Shortest scene, in windows. While a change passes through a window, its embeddings belong to neither scene. With half
# a window this passage becomes a scene. Simulated, 2 s of window every 0.5 s: 1.9 cuts at a hard cut with 1/2, 0.94
# with 3/4; boundary F1 0.96 and 0.99 if rests and events of 1-1.8 s alternate.
MIN_DURATION = 0.75
MAX_FAILURES = 16  # windows in a row that the model refuses: then the fault is not in the windows
PROVISIONAL_AFTER_S = 1.0  # of a scene, before it gets a provisional caption


@dataclass(frozen=True, eq=False)
class WatchResult:
    """The captions of a stream, and figures about it.

    captions: the final ones. They cover the stream without a gap, from the start of its first window to the end of its
        last one. Between two scenes, the edge is in the time of window centres.
    query: the query that was used.
    num_windows: windows embedded.  num_decodes: texts decoded, at most one a scene, two if it had a provisional one.
    seconds: of video, from the first frame to the last.  wall_s: wall-clock time.
    lost: kind -> count of frames and windows that were skipped or changed; no zeros.
    interrupted: ended by Ctrl-C or another signal.
    error: the error that ended the stream early, if any. `watch` raises it only if no window was seen before it.
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
        return ", ".join([f"{rate:.1f} windows/s", *(f"{count} {kind}" for kind, count in self.lost.items())])

    @property
    def summary(self) -> str:
        decoded = f"decoded {self.num_decodes} of {self.num_windows} windows"
        return f"{decoded}, {self.seconds:.1f} s of video, {self.details}"


def default_fps(num_frames: int, stride_s: float) -> float:
    """The rate at which a window of `num_frames` lasts 2 s: our choice, because no model says how fast its clips were.

    At least one new frame per stride, for models of one or two frames.
    """
    return max(num_frames / WINDOW_S, 1 / stride_s)


@dataclass(frozen=True)
class WatchSettings:
    """All numbers of a `Watcher`, without open defaults; `resolve` makes them. For the meaning see `watch`."""

    query: str
    num_frames: int
    fps: float
    stride_s: float
    threshold: float | None
    sensitivity: float
    min_duration_s: float
    provisional: bool
    max_seconds: float | None

    @classmethod
    def resolve(
        cls,
        model: VLJEPA,
        *,
        query: str | None = None,
        stride_s: float = 0.5,
        fps: float | None = None,
        threshold: float | None = None,
        sensitivity: float = 1.0,
        min_duration_s: float | None = None,
        provisional: bool = False,
        max_seconds: float | None = None,
    ) -> WatchSettings:
        """Fill in the defaults that depend on the model. Raises UserError for numbers out of range."""
        if max_seconds is not None and not max_seconds > 0:
            raise UserError(f"max_seconds={max_seconds} must be a number of seconds > 0.")
        if not (0 < stride_s < math.inf and (fps is None or 0 < fps < math.inf)):
            raise UserError(f"stride_s={stride_s} and fps={fps} must be finite numbers > 0.")
        config = model.model.config
        if query is None:
            query = config.default_query
        if fps is None:
            fps = default_fps(config.num_frames, stride_s)
        if min_duration_s is None:
            min_duration_s = MIN_DURATION * config.num_frames / fps
        return cls(
            query, config.num_frames, fps, stride_s, threshold, sensitivity, min_duration_s, provisional, max_seconds
        )

    def segmenter(self) -> WardSegmenter:
        """A fresh segmenter. Raises UserError for numbers out of range."""
        window_s = self.num_frames / self.fps
        try:
            return WardSegmenter(
                block=max(3, round(window_s / self.stride_s)),
                threshold=self.threshold,
                sensitivity=self.sensitivity,
                min_duration_s=self.min_duration_s,
            )
        except ValueError as error:
            raise UserError(str(error)) from None


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
    """Caption a stream until it ends, `max_seconds` have passed, or Ctrl-C, which ends the stream and returns.

    Args:
        model: with a y_decoder. Its `num_frames` are the frames of a window.
        frames: a `FrameSource`, which the caller closes, or frames in the order of time.
        query: None uses the model's `default_query`; "" means no query.
        stride_s: between two windows, in seconds of the stream.
        fps: of the frames in a window, `default_fps` if None. If a film (a `FrameSource` that is not live) has no new
            frame for longer than 1/fps, the one on the screen is repeated: windows are uniform in time, as clips are.
        threshold, sensitivity: as in `WardSegmenter`. Its block is window / stride, 3 or more.
        min_duration_s: as in `WardSegmenter`, MIN_DURATION windows if None.
        provisional: also caption a scene that has lasted 1 s, before it is over.
        max_seconds: of the stream, from its first frame.
        on_caption: called with each caption as soon as it is known, also with provisional ones.
        timeline: collects the pictures and the curve that `write_report` shows.

    A bad frame does not end the stream. A frame that is not uint8 [H, W, 3] or does not follow the frame before is
    skipped, a frame of another size is resized to that of the first, and a window that the model cannot embed is
    skipped; `lost` and a warning count them. `FrameSource` handles images whose decoding fails.

    Raises UserError for numbers out of range, for a model without a y_decoder, and for a stream without any window. An
    error of the model is raised if it comes with the first window; after MAX_FAILURES in a row it ends the stream and
    is the result's `error`.
    """
    settings = WatchSettings.resolve(
        model, query=query, stride_s=stride_s, fps=fps, threshold=threshold, sensitivity=sensitivity,
        min_duration_s=min_duration_s, provisional=provisional, max_seconds=max_seconds,
    )  # fmt: skip
    return Watcher(model, settings, on_caption=on_caption, timeline=timeline).watch(frames)


class ModelError(Exception):
    """The model could not embed a window; `reason` says why."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Watcher:
    """One stream through a model: `embed` every window, `decode` once a scene, collect `captions`.

    Raises UserError for a model without a y_decoder: before the first frame, not at the first caption.
    """

    def __init__(
        self,
        model: VLJEPA,
        settings: WatchSettings,
        *,
        on_caption: Callable[[Caption], None] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        _ = model.y_decoder  # raises if there is none
        self.captions: list[Caption] = []  # the final ones
        self.num_skipped = 0  # windows that the model could not embed
        self._failures_in_a_row = 0
        self._model, self._settings = model, settings
        self._on_caption, self._timeline = on_caption, timeline
        from .sliding import SlidingEncoder

        self._encoder = SlidingEncoder(model, settings.query)
        self._ready: NDArray[np.float32] | None = None  # embedding of the window whose step comes
        self._decoder = SelectiveDecoder(
            self.embed,
            self.decode,
            settings.segmenter(),
            provisional_after_s=PROVISIONAL_AFTER_S if settings.provisional else None,
            whole_windows=True,
        )

    def watch(self, frames: Iterable[Frame]) -> WatchResult:
        """As the function `watch`. Once only: a second stream needs a new Watcher."""
        settings, decoder, started = self._settings, self._decoder, time.monotonic()
        with _Signals() as signals:
            usable = _UsableFrames(frames, signals, settings.max_seconds, self._timeline)
            # A film of variable rate shows a still once. Here, as in a training clip, it lasts as long as it is shown.
            is_film = isinstance(frames, FrameSource) and not frames.live
            shown = held(usable, fps=settings.fps) if is_film else usable
            stream = windows(shown, num_frames=settings.num_frames, stride_s=settings.stride_s, fps=settings.fps)
            at_once = self._encoder.at_once if is_film else 1  # a camera's windows come one by one
            while not signals.came and (batch := list(islice(stream, at_once))):  # a still may be many batches
                try:
                    self.steps(batch)
                except ModelError as error:
                    usable.error = error.reason
                    break
            self.finish()
        if not decoder.num_windows and not signals.came:
            raise usable.error or UserError("No frames: the stream ended before it began.")
        return WatchResult(
            captions=tuple(self.captions),
            query=settings.query,
            num_windows=decoder.num_windows,
            num_decodes=decoder.num_decodes,
            seconds=usable.seconds,
            wall_s=time.monotonic() - started,
            lost=self._losses(frames, usable),
            interrupted=signals.came,
            error=usable.error,
        )

    def steps(self, batch: Sequence[Window]) -> None:
        """`step` for each of these windows, which are embedded together."""
        ready: Sequence[NDArray[np.float32] | None] = [None] * len(batch)
        if len(batch) > 1:
            with suppress(ModelError):  # then each is embedded alone, which shows which one it is
                ready = self._embed(batch)
        for window, self._ready in zip(batch, ready, strict=True):
            self.step(window)

    def step(self, window: Window) -> None:
        """Embed a window and emit the captions that it completes. A window that cannot be embedded is skipped.

        Raises ModelError after MAX_FAILURES windows in a row, and the model's own error for the first window: it would
        recur on every window.
        """
        # A frame lasts until the next one, so a window of one frame has a duration, too.
        end_s = max(window.end_s, window.start_s + 1 / self._settings.fps)
        try:
            captions = self._decoder.step(window, window.start_s, end_s)
        except ModelError as error:
            self.num_skipped += 1
            self._failures_in_a_row += 1
            if not self._decoder.num_windows:
                raise _about_the_video(error.reason, window) from error.reason
            if self._failures_in_a_row == MAX_FAILURES:
                raise
            return
        self._failures_in_a_row = 0
        self._emit(captions)

    def finish(self) -> None:
        """Emit the caption of the scene that the end of the stream closes, if there is one."""
        self._emit(self._decoder.finish())

    @property
    def num_windows(self) -> int:
        """Windows embedded so far."""
        return self._decoder.num_windows

    @property
    def num_decodes(self) -> int:
        """Texts decoded so far."""
        return self._decoder.num_decodes

    def embed(self, window: Window) -> NDArray[np.float32]:
        """[D], finite. Raises ModelError."""
        z, self._ready = self._ready, None
        if z is None:
            (z,) = self._embed([window])
        if not np.isfinite(z).all():
            raise ModelError(ValueError(f"The embedding of the window at {window.start_s:.1f} s is not finite."))
        if self._timeline is not None:
            self._timeline.add_window((window.start_s + window.end_s) / 2, z)
        return z

    def _embed(self, batch: Sequence[Window]) -> list[NDArray[np.float32]]:
        """[D] of each window. Raises ModelError."""
        try:
            return list(self._encoder(batch).cpu().numpy())
        except (ValueError, RuntimeError) as error:
            raise ModelError(error) from error

    def decode(self, embedding: NDArray[np.float32]) -> tuple[str, float]:
        """[D] -> text and score."""
        import torch

        decoded = self._model.decode(torch.tensor(embedding)[None])[0]
        return decoded.text, decoded.score

    def _emit(self, captions: Iterable[Caption]) -> None:
        for caption in captions:
            if caption.final:
                self.captions.append(caption)
            if self._on_caption is not None:
                self._on_caption(caption)

    def _losses(self, frames: Iterable[Frame], usable: _UsableFrames) -> dict[str, int]:
        """Kind -> count, without zeros. Warns of those that the source has not warned of already."""
        lost = _without_zeros({**usable.lost, "windows skipped": self.num_skipped})
        if lost:
            counts = ", ".join(f"{count} {kind}" for kind, count in lost.items())
            warnings.warn(f"watch: {counts}.", stacklevel=4)
        if isinstance(frames, FrameSource):
            lost |= {
                "frames dropped": frames.dropped,
                "corrupt": frames.corrupt,
                "out of order": frames.unordered,
                "clock resets": frames.clock_resets,
            }
        return _without_zeros(lost)


def to_srt(captions: Sequence[Caption]) -> str:
    """SubRip of the final captions: 1, HH:MM:SS,mmm --> HH:MM:SS,mmm, the text on one line, an empty line."""
    entries = []
    for number, caption in enumerate([c for c in captions if c.final], start=1):
        start, end = (round(1000 * max(t, 0.0)) for t in (caption.start_s, caption.end_s))
        text = one_line(caption.text).replace("-->", "->")  # a reader would take a line with an arrow for times
        times = f"{_srt_time(start)} --> {_srt_time(max(end, start + 1))}"
        entries.append(f"{number}\n{times}\n{text or '(no text)'}\n")
    return "\n".join(entries)


def _srt_time(milliseconds: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d},{rest:03d}"


def to_json(caption: Caption, query: str) -> str:
    """One line of JSON, keys in a fixed order; a score that is not finite is null."""
    score = caption.score
    if score is not None:
        score = round(score, 4) if math.isfinite(score) else None
    event = {
        "start_s": round(caption.start_s, 3),
        "end_s": round(caption.end_s, 3),
        "emitted_s": round(caption.emitted_s, 3),
        "text": caption.text,
        "score": score,
        "final": caption.final,
        "query": query,
    }
    return json.dumps(event)  # ASCII: some readers take U+2028 for the end of a line


# -- the stream ------------------------------------------------------------------------------------------------------


class _Signals:
    """Ends a stream at Ctrl-C, SIGTERM or SIGUSR1 without losing a caption.

    The first one interrupts a wait for a frame at once. At any other time it is remembered until the current window is
    done. A second one ends the process, as usual: it raises KeyboardInterrupt, or `Stopped`.

    It is always remembered, because FFmpeg swallows an exception that is raised while it waits in a read of ours.
    """

    def __init__(self) -> None:
        self.came = self.waiting = False
        self._stack = ExitStack()

    def __enter__(self) -> _Signals:
        # not if somebody else handles it, or ignores it as nohup does
        usual = (signal.default_int_handler, signal.SIG_DFL, end_at_once)
        numbers = [number for number in (signal.SIGINT, *SCHEDULER) if signal.getsignal(number) in usual]
        self._stack.enter_context(handled(numbers, self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _handle(self, number: int, frame: Any) -> None:
        again, waiting = self.came, self.waiting
        self.came, self.waiting = True, False
        if (waiting or again) and number == signal.SIGINT:
            raise KeyboardInterrupt
        if waiting or again:
            raise Stopped(number)


class _UsableFrames:
    """The frames that fit into windows. Ends at the end of the stream, at an error in it, and at a signal.

    seconds: from the first frame to the last.  lost: kind -> count.  error: that ended the stream.
    """

    def __init__(
        self, frames: Iterable[Frame], signals: _Signals, max_seconds: float | None, timeline: Timeline | None
    ) -> None:
        if not isinstance(frames, FrameSource):  # a FrameSource has done this already
            frames = without_leaps(frames, lambda frame: frame.time_s, self._skip)
        self._frames, self._signals = iter(frames), signals
        self._max_seconds, self._timeline = max_seconds, timeline
        self._clock = StreamClock()
        self._shape: tuple[int, ...] | None = None  # [H, W, 3] of the first frame
        self._first_s = self._last_s = 0.0
        self.lost = {"frames resized": 0, "frames skipped": 0}
        self.error: Exception | None = None

    @property
    def seconds(self) -> float:
        return self._last_s - self._first_s

    def __iter__(self) -> Iterator[Frame]:
        while (frame := self._next()) is not None:
            # For a FrameSource this order is given; a frame of yours may have any time.
            if not _is_picture(frame.image) or self._clock.place(frame.time_s) is None:
                self._skip()
                continue
            if self._shape is None:
                self._shape, self._first_s = frame.image.shape, frame.time_s
            if self._max_seconds is not None and frame.time_s - self._first_s >= self._max_seconds:
                return
            self._last_s = frame.time_s
            frame = self._resized(frame, self._shape)
            if self._timeline is not None:
                self._timeline.add_frame(frame)
            yield frame

    def _resized(self, frame: Frame, shape: tuple[int, ...]) -> Frame:
        if frame.image.shape == shape:
            return frame
        self.lost["frames resized"] += 1
        height, width = shape[:2]
        return Frame(frame.time_s, np.asarray(Image.fromarray(frame.image).resize((width, height))))

    def _skip(self) -> None:
        self.lost["frames skipped"] += 1

    def _next(self) -> Frame | None:
        if self._signals.came:
            return None
        try:
            self._signals.waiting = True
            frame = next(self._frames, None)
            self._signals.waiting = False
            return frame
        except (KeyboardInterrupt, Stopped):
            self._signals.came = True
        except Exception as error:  # the stream broke off, and its captions so far are still worth having
            self.error = error
        self._signals.waiting = False
        return None


def _about_the_video(reason: Exception, window: Window) -> Exception:
    """The error for the first window. A ValueError means that the video does not fit the model."""
    if isinstance(reason, UserError) or not isinstance(reason, ValueError):
        return reason
    count, (height, width) = len(window.images), window.images[0].shape[:2]
    return UserError(f"The model does not take {count} frames of {width}x{height}: {reason}")


def _is_picture(image: Any) -> bool:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        return False
    return image.ndim == 3 and image.shape[2] == 3 and image.size > 0


def _without_zeros(counts: Mapping[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if count}
