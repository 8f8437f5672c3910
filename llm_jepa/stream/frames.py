"""Frames, windows of frames, and the iterator that delivers them in order, within limits, at the rate asked for.

    with open_frames("talk.mp4", fps=2) as frames:          # every half second, nothing dropped
        for window in windows(frames, num_frames=8, stride_s=1.0): ...

`opening.open_frames` makes a `FrameSource` of a file, an image, a URL, a camera, a pipe or an array.

Time is the stream's own (pts), in seconds since the start of the file as a player counts them, and strictly increasing.
Skipped frames are counted: `corrupt`, `unordered`, `dropped`, `clock_resets`; the first two also end in a warning.
Shape legend: T frames, H and W pixels.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ..core.errors import UserError
from .pixels import CodedFrame, Picture, size_of, to_rgb

RawFrame = tuple[float, Picture | CodedFrame]  # seconds, and a picture that is not converted to RGB yet

EARLY_S = 1e-3  # a frame that is so much too early still counts: containers round times, mkv to 1 ms
_LEAP_S = 60.0  # a time further ahead than this is believed only if the next frame follows it
_CLOCK_RESET_S = 1.0  # a live clock that goes back further than this has restarted; less is disorder

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Frame:
    """`time_s`: seconds since the start of the file, as a player shows them. `image`: uint8 [H, W, 3], as `to_rgb`."""

    time_s: float
    image: np.ndarray


@dataclass(frozen=True, eq=False)
class Window:
    """`start_s` and `end_s`: times of its first and of its last frame.

    images: uint8 [H, W, 3] of each frame, a copy of what came in. Neighbouring windows share these arrays.
    """

    start_s: float
    end_s: float
    images: tuple[np.ndarray, ...]

    @cached_property
    def frames(self) -> np.ndarray:
        """uint8 [T, H, W, 3]"""
        return np.stack(self.images)


@dataclass(frozen=True)
class Limits:
    """How much a source may cost before it is refused with a UserError; None = no limit.

    Args:
        max_pixels: of one frame, checked before it is converted to RGB. A decoder may not allocate more than about
            twice as many.
        max_frames: frames decoded, before sub-sampling. A million: 9 hours at 30 a second.
        max_seconds: of the stream's own time. 6 hours.
        max_decode_s: wall-clock seconds of waiting and decoding between one decoded frame and the next, without the
            consumer's time. It is checked between packets and reads. A single call of a decoder is not interrupted;
            max_pixels bounds it.
    """

    max_pixels: int = 4096 * 2304
    max_frames: int | None = 1_000_000
    max_seconds: float | None = 6 * 3600.0
    max_decode_s: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UserError(f"Limits({name}={value}) must be > 0; None removes the limit on frames and seconds.")


class Reading:
    """The state that an opener and its `FrameSource` share: limits, counters, the stall clock, resources to close."""

    def __init__(self, name: str, *, live: bool, limits: Limits) -> None:
        self.name, self.live, self.limits = name, live, limits
        self.num_read = 0  # frames that the opener delivered
        self.num_corrupt = 0  # frames and packets that it could not decode
        self.remarks: list[str] = []  # facts of the file that are not obeyed; each is a warning at the end
        self.closing = threading.Event()
        self.resources = contextlib.ExitStack()
        self.waiting_since = time.monotonic()

    def start_waiting(self) -> None:
        """Start the stall clock again: the source has delivered and the consumer is back."""
        self.waiting_since = time.monotonic()

    def check_stall(self) -> None:
        if time.monotonic() - self.waiting_since > self.limits.max_decode_s:
            raise UserError(
                f"{self.name}: no frame for {self.limits.max_decode_s:g} s (frame {self.num_read}). Check the sender "
                "or the file, or raise Limits(max_decode_s)."
            )

    def check_pixels(self, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            raise UserError(
                f"{self.name}: frames of {width}x{height} are over the limit of {self.limits.max_pixels} pixels. "
                "Scale the video down, or raise Limits(max_pixels)."
            )

    def check_length(self, seconds: float) -> None:
        limits = self.limits
        if limits.max_frames is not None and self.num_read > limits.max_frames:
            raise UserError(f"{self.name}: more than {limits.max_frames} frames. Cut it, or raise Limits(max_frames).")
        if limits.max_seconds is not None and seconds > limits.max_seconds:
            raise UserError(f"{self.name}: longer than {limits.max_seconds:g} s. Cut it, or raise Limits(max_seconds).")


class FrameSource:
    """Iterator of `Frame` and context manager, made by `open_frames`.

    `close` ends a live source's thread at once, unless it waits in a network read or in an iterable of yours. Such a
    thread is left behind: it ends after the wait (a network read after `max_decode_s`) and closes what it holds.

    name: of the source, for messages.
    live: newer frames replace those that are not fetched in time.
    replayable: opening the source again gives the same frames.
    corrupt, unordered: frames skipped; a warning at the end counts them.
    dropped: frames of a live source that a newer one replaced.
    clock_resets: of a live source.
    """

    def __init__(self, reading: Reading, raw: Iterator[RawFrame], *, fps: float | None, replayable: bool) -> None:
        self.replayable = replayable
        self.unordered = self.dropped = 0
        self._reading, self._raw = reading, raw
        self._clock = StreamClock(restarts=reading.live)
        self._grid = _Grid(1 / fps) if fps else None
        self._newest = threading.Condition()
        self._thread: threading.Thread | None = None
        self._frames = self._deliver()

    @property
    def name(self) -> str:
        return self._reading.name

    @property
    def live(self) -> bool:
        return self._reading.live

    @property
    def corrupt(self) -> int:
        return self._reading.num_corrupt

    @property
    def clock_resets(self) -> int:
        return self._clock.resets

    def __iter__(self) -> FrameSource:
        return self

    def __next__(self) -> Frame:
        if self._reading.closing.is_set():
            raise StopIteration
        return next(self._frames)

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the device, file or connection. May be called twice, and for a live source from another thread."""
        reading = self._reading
        if reading.closing.is_set():
            return
        reading.closing.set()
        with self._newest:
            self._newest.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        if self._thread is None or not self._thread.is_alive():
            reading.resources.close()
        self._warn()

    def raw_frames(self) -> Generator[RawFrame, None, None]:
        """(seconds, picture) of the frames due at `fps`, in order and within the limits, without the cost of RGB.

        Use either this or the source's own iteration: both consume it. Closing this iterator frees the device, file or
        connection, and gives no warning.
        """
        reading, first_s, size = self._reading, None, None
        try:
            for stamp, picture in without_leaps(self._counted(), lambda item: item[0], self._skip_unordered):
                if reading.closing.is_set():
                    return
                size = self._checked_size(picture, size)
                time_s = self._clock.place(stamp)
                if time_s is None:
                    self._skip_unordered()
                    continue
                if first_s is None:
                    first_s = time_s
                reading.check_length(time_s - first_s)
                if self._grid is None or self._grid.due(time_s):
                    yield time_s, picture
        finally:
            reading.resources.close()

    def _deliver(self) -> Iterator[Frame]:
        raw_frames = self._latest() if self._reading.live else self.raw_frames()
        for time_s, picture in raw_frames:
            yield Frame(time_s, to_rgb(picture))
        self.close()

    def _counted(self) -> Iterator[RawFrame]:
        for item in self._raw:
            self._reading.num_read += 1
            yield item

    def _skip_unordered(self) -> None:
        self.unordered += 1

    def _checked_size(self, picture: Picture | CodedFrame, before: tuple[int, int] | None) -> tuple[int, int]:
        width, height = size_of(picture)
        self._reading.check_pixels(width, height)
        if before is not None and before != (width, height):
            raise UserError(
                f"{self.name}: frame {self._reading.num_read - 1} is {width}x{height} after {before[0]}x{before[1]}; "
                "frames must keep their size. Re-encode the video, or set the camera or stream to one size."
            )
        return width, height

    def _latest(self) -> Iterator[RawFrame]:
        """`raw_frames`, read in a thread that never waits for the consumer: a newer frame replaces an unfetched one."""
        slot: list[RawFrame] = []  # a queue of one
        failure: list[BaseException] = []
        done = False

        def read() -> None:
            nonlocal done
            try:
                for item in self.raw_frames():
                    with self._newest:
                        self.dropped += len(slot)
                        slot[:] = [item]
                        self._newest.notify_all()
            except BaseException as error:  # raised again in the consumer's thread
                failure.append(error)
            finally:
                with self._newest:
                    done = True
                    self._newest.notify_all()

        self._thread = threading.Thread(target=read, name=f"frames of {self.name}", daemon=True)
        self._thread.start()
        closing = self._reading.closing
        while True:
            with self._newest:
                self._newest.wait_for(lambda: slot or done or closing.is_set())
                if closing.is_set() or not slot:
                    break
                item = slot.pop()
            yield item  # outside the lock: the thread must not wait for the consumer
        if failure and not closing.is_set():
            raise failure[0]

    def _warn(self) -> None:
        for remark in self._reading.remarks:
            warnings.warn(f"{self.name}: {remark}", stacklevel=3)
        if self.corrupt:
            warnings.warn(f"{self.name}: skipped {self.corrupt} corrupt frames or packets.", stacklevel=3)
        if self.unordered:
            warnings.warn(
                f"{self.name}: skipped {self.unordered} frames whose time went back, repeated, or leapt ahead by more "
                f"than {_LEAP_S:g} s.",
                stacklevel=3,
            )


def windows(frames: Iterable[Frame], *, num_frames: int, stride_s: float, fps: float | None = None) -> Iterator[Window]:
    """The last `num_frames` frames, every `stride_s` seconds of stream time.

    The first window is complete with frame number `num_frames`. The next ones follow with the first frame at or after
    each multiple of `stride_s` from there. A window holds only frames that have arrived, so later frames never change
    one. Frames after the last due time are in no window. A stream shorter than one window gives a single window, filled
    up with its last frame. Holds `num_frames` frames in memory.

    Args:
        fps: use the first frame at or after k/fps only, as in `open_frames`; None uses every frame. If frames are
            missing, a window reaches further back.

    Raises UserError for numbers that are not positive.
    """
    if not num_frames >= 1 or not 0 < stride_s < math.inf or not (fps is None or 0 < fps < math.inf):
        raise UserError(f"windows(num_frames={num_frames}, stride_s={stride_s}, fps={fps}): all must be > 0.")
    return _windows(frames, num_frames, _Grid(stride_s), _Grid(1 / fps) if fps else None)


def _windows(frames: Iterable[Frame], num_frames: int, stride: _Grid, rate: _Grid | None) -> Iterator[Window]:
    last: deque[Frame] = deque(maxlen=num_frames)
    for frame in frames:
        if rate is not None and not rate.due(frame.time_s):
            continue
        last.append(Frame(frame.time_s, frame.image.copy()))
        if len(last) == num_frames and stride.due(frame.time_s):
            yield _window(list(last))
    if 0 < len(last) < num_frames:
        yield _window([*last, *[last[-1]] * (num_frames - len(last))])


def _window(frames: list[Frame]) -> Window:
    return Window(frames[0].time_s, frames[-1].time_s, tuple(frame.image for frame in frames))


def held(frames: Iterable[Frame], *, fps: float) -> Iterator[Frame]:
    """The frames, with one on the screen repeated at each k/fps that passes before the next one comes.

    A still of 7 s then is as many frames as 7 s of motion, as `read_clip` samples it. Nothing is repeated for more than
    60 s: after such a gap the film goes on. Not for live sources: to repeat what a slow consumer has missed would make
    it slower still.
    """
    origin_s, last, slot = 0.0, None, 0
    tolerance_s = min(EARLY_S, 0.1 / fps)
    for frame in frames:
        if last is None:
            origin_s = frame.time_s
        next_slot = math.floor((frame.time_s - origin_s + tolerance_s) * fps)
        if last is not None and frame.time_s - last.time_s <= _LEAP_S:
            for k in range(slot + 1, next_slot):
                yield Frame(origin_s + k / fps, last.image)
        yield frame
        last, slot = frame, next_slot


class _Grid:
    """Tells which times are the first at or after a multiple of `period_s`, counted from the first time."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._tolerance_s = min(EARLY_S, period_s / 10)
        self._origin: float | None = None
        self._next = 0

    def due(self, time_s: float) -> bool:
        if self._origin is None:
            self._origin = time_s
        position = (time_s - self._origin + self._tolerance_s) / self._period_s
        if position < self._next:
            return False
        self._next = math.floor(position) + 1  # a multiple that passed without a frame is not made up for
        return True


class StreamClock:
    """Makes strictly increasing times of time stamps.

    restarts: a stamp that goes back by more than 1 s is a live clock that has restarted. Stream time then goes on by
        the wall-clock time that has passed since. Without `restarts` such a stamp is out of order like any other.
    """

    def __init__(self, *, restarts: bool = False) -> None:
        self.resets = 0
        self._restarts = restarts
        self._last_s = -math.inf
        self._last_placed = time.monotonic()
        self._offset_s = 0.0

    def place(self, stamp: float) -> float | None:
        """The stream time of a frame; None if it does not follow the frame before or is not finite."""
        now = time.monotonic()
        time_s = stamp + self._offset_s
        if self._restarts and time_s < self._last_s - _CLOCK_RESET_S:
            self.resets += 1
            time_s = self._last_s + max(now - self._last_placed, 1e-3)
            self._offset_s = time_s - stamp
        if not self._last_s < time_s < math.inf:  # also refuses NaN
            return None
        self._last_s, self._last_placed = time_s, now
        return time_s


def without_leaps(items: Iterable[T], time_of: Callable[[T], float], skip: Callable[[], None]) -> Iterator[T]:
    """The items, without those whose time is more than 60 s ahead of the one before and of the one after.

    One time stamp too far ahead would make all later frames look late. Such an item is held until the next one
    confirms the jump, and dropped if the next one does not or the stream ends first. `skip` is called for each drop.
    """
    last_s = math.nan  # no comparison with NaN is true, so the first item is never held
    held: T | None = None
    for item in items:
        time_s = time_of(item)
        if held is not None:
            if time_s >= time_of(held):
                last_s = time_of(held)
                yield held
            else:
                skip()
            held = None
        if time_s > last_s + _LEAP_S:
            held = item
            continue
        if math.isfinite(time_s):
            last_s = time_s
        yield item
    if held is not None:
        skip()


def source_name(source: Any) -> str:
    """A name for messages, one line; a URL without its password."""
    if not isinstance(source, (str, Path)):
        return type(source).__name__
    return re.sub(r"[\x00-\x1f]", "?", re.sub(r"//[^/]*@", "//***@", str(source)))[:300]
