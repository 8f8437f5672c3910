"""Frames from anywhere: files, images, URLs, cameras, pipes, arrays -> `Frame(time_s, RGB)`; then clips and windows.

    with open_frames("talk.mp4", fps=2) as frames:          # every half second, nothing dropped
        for window in windows(frames, num_frames=8, stride_s=1.0): ...

Time is the stream's own (pts), in seconds since its first frame, and strictly increasing. What cannot be delivered is
counted: `corrupt`, `unordered`, `dropped`, `clock_resets`; the first two also end in a warning.

A video is hostile input. Local files and pipes reach FFmpeg as bytes read here, with no protocol to open anything else
and only container formats that hold their own data: a playlist renamed to .mp4 can name a file or a URL, but not have
it read. FFmpeg itself is C code that parses the bytes: for files from strangers run it in a sandbox.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import re
import select
import stat
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from ..core.errors import UserError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

Picture = Image.Image | np.ndarray
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}  # files that are one frame; a GIF moves, and is a video
Source = str | Path | Picture | Iterable[Picture] | Iterable[tuple[float, Picture]]

# Containers that hold their own data. Not hls, concat, dash, sdp, image2: they are lists of other things to open.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,nut,ivf,mxf,dv,h264,hevc,m4v,mjpeg,obu,yuv4mpegpipe"
)
_SCHEMES = {"http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "tcp", "srt"}
_LIVE_SCHEMES = _SCHEMES - {"http", "https"}
_NETWORK = "http,https,httpproxy,tls,tcp,udp,rtp,srtp,rtmp,rtmps,srt,crypto,data"  # crypto and data: encrypted HLS
# Single sources, none of which reads a file; no chain of filters, where `movie=` would.
_LAVFI = re.compile(r"(testsrc2?|color|smpte(hd)?bars|rgbtestsrc|yuvtestsrc|gradients|mandelbrot)(=[\w=:./#-]*)?")
_STILLS = ("PNG", "JPEG", "WEBP", "BMP")
_LEAP_S = 60.0  # ahead of the frame before: believed when the next frame follows
_CLOCK_RESET_S = 1.0  # a live clock that goes back further than this was restarted; less is disorder

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Frame:
    """`time_s`: seconds since the first frame of the stream. `image`: uint8 [H, W, 3], RGB, upright."""

    time_s: float
    image: np.ndarray


@dataclass(frozen=True, eq=False)
class Window:
    """`frames`: uint8 [T, H, W, 3]. `start_s` and `end_s`: times of its first and of its last frame."""

    start_s: float
    end_s: float
    frames: np.ndarray


@dataclass(frozen=True)
class Limits:
    """What a source may cost before it is refused with a UserError; None = no limit.

    Args:
        max_pixels: of one frame, checked before it is converted to RGB. A decoder may not allocate more than about
            twice it.
        max_frames: frames decoded, before sub-sampling. A million: 9 hours at 30 a second.
        max_seconds: of the stream's own time. 6 hours.
        max_decode_s: wall-clock seconds spent waiting and decoding between one decoded frame and the next, the
            consumer's time not counted. It is looked at between packets and reads; one call of a decoder, bounded by
            max_pixels, is not interrupted.
    """

    max_pixels: int = 4096 * 2304
    max_frames: int | None = 1_000_000
    max_seconds: float | None = 6 * 3600.0
    max_decode_s: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UserError(f"Limits({name}={value}) must be > 0; None takes the limit off frames and seconds.")


_LIVE_LIMITS = Limits(max_frames=None, max_seconds=None)


def open_frames(
    source: Source,
    *,
    fps: float | None = None,
    native_fps: float | None = None,
    live: bool | None = None,
    limits: Limits | None = None,
) -> FrameSource:
    """Open a source of frames; iterate it once, and close it or use `with`.

    Sources:
        "clip.mp4", Path         a video, or a still image (one frame at 0 s); a FIFO is read as a pipe
        "-"                      standard input: mpegts, matroska, raw h264, ...
        "https://...", "rtsp://..."  a URL; playlists may name network addresses but no files
        "webcam:0"               /dev/video0, AVFoundation device 0; on Windows the device's name
        "lavfi:testsrc=rate=8"   a generated test pattern, endless without duration=
        uint8 [T, H, W, 3]       an array, or a list or iterator of PIL images or uint8 [H, W, 3]; needs native_fps
        (seconds, image), ...    an iterable of pairs; its times are kept as they are
        one image                one frame at 0 s

    Args:
        fps: deliver the first frame at or after k/fps for k = 0, 1, ... counted from the first frame (1 ms early
            counts: mkv rounds its pts). A frame is never delivered twice; an fps above the source's changes nothing.
        native_fps: frames a second of images that come without times.
        live: True: a thread reads, the newest frame waits in a queue of one, older ones are `dropped`. False: every
            frame is delivered and the source waits for the consumer. None: True for cameras and rtsp, rtmp, rtp, udp,
            tcp and srt; False for all else, http and pipes included. A live lavfi source is paced to real time.
        limits: `Limits()`; for live sources without the limits on frames and seconds.

    Times are pts; where a stream has none (raw h264), its declared rate. Wall clock enters once: a live clock that
    goes back by more than 1 s was restarted and goes on from the time that passed (`clock_resets`). Frames that go
    back otherwise, repeat a time, or leap ahead by more than 60 s with none to follow, are skipped (`unordered`).
    Frames that change size end in a UserError: no window could hold them. Phone videos are turned upright in steps of
    90 degrees; mirroring is not undone. Stills follow
    their EXIF orientation.

    A frame whose decoding fails is skipped (`corrupt`); one whose damage the decoder conceals is delivered.

    Raises UserError here or while iterating for what cannot be read.
    """
    for name, rate in (("fps", fps), ("native_fps", native_fps)):
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise UserError(f"{name}={rate} must be a number of frames a second > 0.")
    if isinstance(source, (str, Path)) and native_fps is not None:
        raise UserError(f"native_fps={native_fps} is for images without times; {source_name(str(source))} has its own.")
    if live is None:
        scheme = source.partition(":")[0].lower() if isinstance(source, str) else ""
        live = scheme in _LIVE_SCHEMES | {"webcam"}
    frames = FrameSource(source_name(source), fps=fps, live=live, limits=limits or (_LIVE_LIMITS if live else Limits()))
    try:
        frames._open(source, native_fps)
    except BaseException:
        frames.close()
        raise
    return frames


class FrameSource:
    """Iterator of Frame and context manager, made by `open_frames`.

    `close` ends a live source's thread: at once, but for a network read or an iterable of yours in mid-wait. That
    thread is left to end by itself (a network read after `max_decode_s`), and closes what it holds.

    Counters: corrupt, unordered (skipped, both warned of at the end), dropped (live, replaced by a newer frame),
    clock_resets (live).
    """

    def __init__(self, name: str, *, fps: float | None, live: bool, limits: Limits) -> None:
        self.corrupt = self.unordered = self.dropped = self.clock_resets = 0
        self._name, self._live, self._limits = name, live, limits
        self._grid = _Grid(1 / fps) if fps else None
        self._replayable = False
        self._declared = self._read = 0  # frames the file says it has; frames it had
        self._since = time.monotonic()  # when the source last delivered or the consumer last asked
        self._closing = threading.Event()
        self._resources = contextlib.ExitStack()
        self._newest = threading.Condition()
        self._thread: threading.Thread | None = None
        self._raw: Iterator[tuple[float, Any]] = iter(())
        self._frames = self._deliver()

    def __iter__(self) -> FrameSource:
        return self

    def __next__(self) -> Frame:
        if self._closing.is_set():
            raise StopIteration
        return next(self._frames)

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the device, file or connection. May be called twice, and for a live source from another thread."""
        if self._closing.is_set():
            return
        self._closing.set()
        with self._newest:
            self._newest.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        if self._thread is None or not self._thread.is_alive():
            self._resources.close()
        self._warn()

    # -- from raw pictures to frames ------------------------------------------------------------------------------

    def _deliver(self) -> Iterator[Frame]:
        for time_s, raw in self._latest() if self._live else self._picked():
            yield Frame(time_s, _rgb(raw))
        self.close()

    def _picked(self) -> Iterator[tuple[float, Any]]:
        """What is in order, within the limits and due at `fps`, not yet converted to RGB."""
        first = last = size = None
        offset, arrived = 0.0, time.monotonic()
        try:
            for stamp, raw in without_leaps(self._counted(), lambda item: item[0], self._skip_unordered):
                if self._closing.is_set():
                    return
                number = self._read - 1
                self._check_pixels(*_size(raw))
                if size is not None and size != _size(raw):
                    raise UserError(
                        f"{self._name}: frame {number} is {_size(raw)[0]}x{_size(raw)[1]} after {size[0]}x{size[1]}; "
                        "frames must keep their size. Re-encode the video, or set the camera or stream to one size."
                    )
                size = _size(raw)
                time_s, now = stamp + offset, time.monotonic()
                if self._live and last is not None and time_s < last - _CLOCK_RESET_S:
                    self.clock_resets += 1
                    time_s = last + max(now - arrived, 1e-3)
                    offset = time_s - stamp
                if last is not None and time_s <= last:
                    self._skip_unordered()
                    continue
                first = time_s if first is None else first
                last, arrived = time_s, now
                self._check_length(number, time_s - first)
                if self._grid is None or self._grid.due(time_s):
                    yield time_s, raw
        finally:
            self._resources.close()

    def _counted(self) -> Iterator[tuple[float, Any]]:
        for item in self._raw:
            self._read += 1
            yield item

    def _skip_unordered(self) -> None:
        self.unordered += 1

    def _latest(self) -> Iterator[tuple[float, Any]]:
        """The same from a thread of its own, which never waits: a frame that was not fetched is replaced."""
        slot: list[tuple[float, Any]] = []
        failure: list[BaseException] = []
        done = False

        def read() -> None:
            nonlocal done
            try:
                for item in self._picked():
                    with self._newest:
                        self.dropped += len(slot)
                        slot[:] = [item]
                        self._newest.notify_all()
            except BaseException as error:  # raised again where the frames are asked for
                failure.append(error)
            finally:
                with self._newest:
                    done = True
                    self._newest.notify_all()

        self._thread = threading.Thread(target=read, name=f"frames of {self._name}", daemon=True)
        self._thread.start()
        while True:
            with self._newest:
                self._newest.wait_for(lambda: slot or done or self._closing.is_set())
                if self._closing.is_set() or not slot:
                    break
                item = slot.pop()
            yield item
        if failure and not self._closing.is_set():
            raise failure[0]

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self._limits.max_pixels:
            raise UserError(
                f"{self._name}: frames of {width}x{height} are over the limit of {self._limits.max_pixels} pixels. "
                "Scale the video down, or raise Limits(max_pixels)."
            )

    def _check_length(self, number: int, seconds: float) -> None:
        limits = self._limits
        if limits.max_frames is not None and number >= limits.max_frames:
            raise UserError(f"{self._name}: more than {limits.max_frames} frames. Cut it, or raise Limits(max_frames).")
        if limits.max_seconds is not None and seconds > limits.max_seconds:
            raise UserError(
                f"{self._name}: longer than {limits.max_seconds:g} s. Cut it, or raise Limits(max_seconds)."
            )

    def _check_stall(self) -> None:
        if time.monotonic() - self._since > self._limits.max_decode_s:
            raise UserError(
                f"{self._name}: no frame for {self._limits.max_decode_s:g} s (frame {self._read}). Check the sender or "
                "the file, or raise Limits(max_decode_s)."
            )

    def _warn(self) -> None:
        if self.corrupt:
            warnings.warn(f"{self._name}: skipped {self.corrupt} corrupt frames or packets.", stacklevel=3)
        if self.unordered:
            warnings.warn(
                f"{self._name}: skipped {self.unordered} frames whose time was not after the one before or leapt.",
                stacklevel=3,
            )

    # -- from a source to raw pictures ----------------------------------------------------------------------------

    def _open(self, source: Source, native_fps: float | None) -> None:
        if isinstance(source, str) and source == "-":
            self._open_bytes(FileIO(sys.stdin.fileno(), closefd=False))
        elif isinstance(source, str) and source.startswith("webcam:"):
            self._open_webcam(source.removeprefix("webcam:"))
        elif isinstance(source, str) and source.startswith("lavfi:"):
            self._open_lavfi(source.removeprefix("lavfi:"))
            self._replayable = True
        elif isinstance(source, str) and re.match(r"[A-Za-z][\w+.-]+://", source):
            scheme = source.partition(":")[0].lower()
            if scheme not in _SCHEMES or re.search(r"[\s\x00-\x1f]", source):
                raise UserError(
                    f"{self._name}: this URL is not opened. Give a file as a plain path, or a URL without spaces of "
                    f"{', '.join(sorted(_SCHEMES))}."
                )
            # UDP, the default of rtsp, loses packets, and with them pieces of pictures.
            self._open_av(source, options={"protocol_whitelist": _NETWORK, "rtsp_transport": "tcp"})
        elif isinstance(source, (str, Path)):
            self._open_path(source)
        else:
            if isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.ndim == 3):
                source, native_fps = [source], native_fps or 1.0
            if not isinstance(source, Iterable):
                raise UserError(f"{self._name}: not a source of frames. Give a path, a URL, an array or an iterable.")
            self._raw = self._pictures(source, native_fps)
            self._replayable = isinstance(source, (np.ndarray, Sequence))

    def _open_path(self, path: str | Path) -> None:
        try:
            file = self._resources.enter_context(FileIO(path, opener=_open_without_waiting))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._name}: cannot be opened ({_reason(error)}). Give the path of a video or an image; "
                "protocols such as concat: are not opened."
            ) from error
        about = os.fstat(file.fileno())
        if stat.S_ISFIFO(about.st_mode):
            return self._open_bytes(file)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{self._name}: neither a file nor a pipe. Give one of them, or webcam:0.")
        self._replayable = True
        if about.st_size == 0:
            raise UserError(f"{self._name}: the file is empty. Copy or record it again.")
        head = file.read(16)
        file.seek(0)
        # FFmpeg would decode one tile of such a picture and call it a video.
        if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"avif"):
            raise UserError(f"{self._name}: HEIC and AVIF images are not read. Convert it to JPEG or PNG.")
        if not self._open_still(path):
            self._open_bytes(file)

    def _open_still(self, path: str | Path) -> bool:
        try:
            image = Image.open(path, formats=_STILLS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter under -W error
            raise UserError(f"{self._name}: {error} Scale the image down.") from error
        except (OSError, SyntaxError, ValueError):
            return False
        self._resources.callback(image.close)
        self._check_pixels(*image.size)
        if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
            raise UserError(f"{self._name}: an animated image. Convert it to a video, mp4 for example.")
        try:
            self._raw = iter([(0.0, ImageOps.exif_transpose(image))])
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{self._name}: the image cannot be read ({error}). Save it again as PNG.") from error
        return True

    def _open_bytes(self, file: FileIO) -> None:
        reader = _SeekableBytes if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else _Bytes
        options = {"protocol_whitelist": "none", "format_whitelist": _FORMATS}
        self._open_av(reader(file, self), options=options)

    def _open_webcam(self, device: str) -> None:
        number = device.isdecimal()
        if sys.platform.startswith("linux") and (number or device.startswith("/dev/video")):
            self._open_av(f"/dev/video{device}" if number else device, "video4linux2")
        elif sys.platform == "darwin" and number:
            self._open_av(device, "avfoundation", options={"framerate": "30"})  # its own default suits few cameras
        elif sys.platform == "win32" and device and not number:
            self._open_av(f"video={device}", "dshow")
        else:
            raise UserError(
                f"{self._name}: no such camera on {sys.platform}. Linux and macOS count them (webcam:0), Windows "
                "names them (webcam:Integrated Camera)."
            )

    def _open_lavfi(self, graph: str) -> None:
        if not _LAVFI.fullmatch(graph):
            raise UserError(
                f"{self._name}: not one of FFmpeg's test patterns with its options. Give for example "
                "lavfi:testsrc=size=320x240:rate=8:duration=5, without further filters."
            )
        for width, height in re.findall(r"(\d+)[^\d=:/](\d+)", graph):  # it would be drawn before we could measure it
            self._check_pixels(int(width), int(height))
        self._open_av(f"{graph},realtime" if self._live else graph, "lavfi")

    def _open_av(self, file: Any, format: str | None = None, *, options: dict[str, str] | None = None) -> None:
        try:
            import av
        except ImportError as error:
            raise UserError('Reading video needs PyAV: pip install "llm-jepa[vl]"') from error
        # More than the limit: codecs round widths and heights up, to 64 and more.
        allocation = {"max_pixels": str(2 * self._limits.max_pixels + 2**16)}
        wait = None if isinstance(file, _Bytes) else self._limits.max_decode_s
        try:
            container = av.open(file, format=format, options={**(options or {}), **allocation}, timeout=wait)
        except (av.error.FFmpegError, UnicodeError) as error:
            raise UserError(
                f"{self._name}: FFmpeg cannot open it ({_reason(error)}). Give a complete video file or stream; "
                "playlists on disk are not followed."
            ) from error
        self._resources.callback(container.close)
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise UserError(f"{self._name}: no video stream that can be decoded. Give a file with a picture.")
        self._check_pixels(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = allocation
        self._declared = stream.frames
        self._raw = self._decode(container, stream)

    def _decode(self, container: InputContainer, stream: VideoStream) -> Iterator[tuple[float, VideoFrame]]:
        """Frames and their times, what cannot be decoded counted and skipped."""
        import av

        without_pts = container.format.name == "avi"  # FFmpeg makes them up, in the wrong order with B-frames
        step = 1 / Fraction(stream.average_rate or 25)
        origin: Fraction | None = None
        stamp = Fraction(0)
        packets, failures = container.demux(stream), 0
        codec = stream.codec_context
        self._since = time.monotonic()
        while True:
            self._check_stall()
            try:
                packet = next(packets, None)
            except av.error.BlockingIOError:  # a camera with no new picture yet
                time.sleep(0.005)
                packets = container.demux(stream)
                continue
            except (av.error.InvalidDataError, av.error.MemoryError):  # the latter: a packet that says it is 4 GB
                # A demuxer finds its way again, or it repeats the error for ever: 16 are enough to tell.
                failures += 1
                self.corrupt += failures == 1
                if failures == 16:
                    break
                packets = container.demux(stream)
                continue
            except av.error.FFmpegError as error:
                raise UserError(
                    f"{self._name}: the stream broke off after {self._read} frames ({_reason(error)}). Check the "
                    "sender and open it again."
                ) from error
            if packet is None:
                break
            failures = 0
            try:
                decoded = codec.decode(packet)
            except av.error.FFmpegError:
                self._check_pixels(codec.width, codec.height)
                self.corrupt += 1
                continue
            for frame in decoded:
                if frame.is_corrupt:
                    self.corrupt += 1
                    continue
                ticks = frame.dts if without_pts else frame.pts
                base = frame.time_base
                stamp = stamp + step if ticks is None or base is None else ticks * base
                origin = stamp if origin is None else origin
                yield float(stamp - origin), frame
                self._since = time.monotonic()
        if self._closing.is_set():
            return
        if origin is None:
            raise UserError(f"{self._name}: no frame of it can be decoded. Check that it plays; encode it again.")
        found = self._read + self.corrupt
        if self._declared and found < 0.9 * self._declared:  # a little less is how trimming by an edit list looks
            warnings.warn(
                f"{self._name}: says it has {self._declared} frames, {found} were found: cut off, or trimmed without "
                "encoding it again.",
                stacklevel=2,
            )

    def _pictures(self, source: Any, native_fps: float | None) -> Iterator[tuple[float, Picture]]:
        """Times and images of an image, an array, or an iterable of images or of (seconds, image); each is checked."""
        number = -1
        for number, item in enumerate(source):
            if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], numbers.Real):
                seconds, item = float(item[0]), item[1]
                if native_fps is not None or not math.isfinite(seconds):
                    raise UserError(
                        f"{self._name}: frame {number} has the time {seconds} and native_fps={native_fps}. Give finite "
                        "times, or images alone and native_fps."
                    )
            elif native_fps is None:
                raise UserError(f"{self._name}: images without times. Give native_fps, or (seconds, image) pairs.")
            else:
                seconds = number / native_fps
            if not isinstance(item, Image.Image) and not (
                isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3
            ):
                what = f"{item.dtype} {list(item.shape)}" if isinstance(item, np.ndarray) else type(item).__name__
                raise UserError(f"{self._name}: frame {number} is {what}; give PIL images or uint8 arrays [H, W, 3].")
            yield seconds, item
        if number < 0:
            raise UserError(f"{self._name}: no frames. Give at least one.")


class _Bytes:
    """A pipe as FFmpeg reads it: a wait for data ends when the source is closed, and by `max_decode_s`."""

    def __init__(self, file: FileIO, source: FrameSource) -> None:
        self._file, self._source = file, source

    def read(self, size: int) -> bytes:
        while not self._source._closing.is_set():
            self._source._check_stall()
            if os.name == "nt" or select.select([self._file], [], [], 0.1)[0]:  # Windows selects no pipes
                return self._file.read(size) or b""
        return b""


class _SeekableBytes(_Bytes):
    """The same of a file, which is always ready; FFmpeg jumps to the index at its end."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _Grid:
    """Which times are the first at or after a multiple of `period_s`, counted from the first time?"""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._tolerance_s = min(1e-3, period_s / 10)  # containers round times, mkv to 1 ms
        self._origin: float | None = None
        self._next = 0

    def due(self, time_s: float) -> bool:
        if self._origin is None:
            self._origin = time_s
        position = (time_s - self._origin + self._tolerance_s) / self._period_s
        if position < self._next:
            return False
        self._next = math.floor(position) + 1  # multiples passed without a frame are passed for good
        return True


def sample_frames(num_available: int, num_frames: int) -> np.ndarray:
    """Indices [num_frames] int64, uniform over `num_available`: the centres of that many equal segments.

    floor((i + 1/2) * num_available / num_frames). VL-JEPA samples "uniformly" and does not say how; centres are the
    usual choice without randomness, and two clips share no bias to their first frame. With fewer frames than asked
    for, indices repeat.

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

    Reads the source twice, first to count (decoding, but converting nothing to RGB), then for the frames: memory is
    that of the T frames. Which ones: `sample_frames`. Warns when there are fewer than asked for and they repeat.

    Raises UserError for a source that cannot be read twice (pipe, camera, URL, iterator), for a part without frames,
    and for all that `open_frames` refuses.
    """
    start = -math.inf if start_s is None else start_s
    end = math.inf if end_s is None else end_s
    if not start < end or num_frames < 1:
        raise UserError(f"No clip of {num_frames} frames from {start_s} s to {end_s} s: give >= 1 frames, start < end.")

    def part(frames: FrameSource) -> Iterator[tuple[float, Any]]:
        for time_s, raw in frames._picked():
            if time_s >= end:
                return
            if time_s >= start:
                yield time_s, raw

    with open_frames(source, native_fps=native_fps, live=False, limits=limits) as frames:
        if not frames._replayable:
            raise UserError(
                f"{frames._name}: a clip needs a source that can be read twice: a file, an array or a list. Save the "
                "stream to a file, or use windows()."
            )
        available = np.array([time_s for time_s, _ in part(frames)])
        if not len(available):
            raise UserError(f"{frames._name}: no frame from {start_s} s to {end_s} s. Give a part the video has.")
    chosen = sample_frames(len(available), num_frames)
    if len(available) < num_frames:
        warnings.warn(f"{frames._name}: {len(available)} frames for {num_frames}: some repeat.", stacklevel=2)
    images: dict[int, np.ndarray] = {}
    again = open_frames(source, native_fps=native_fps, live=False, limits=limits)
    with contextlib.closing(again._resources):  # not again.close(), which would repeat the warnings
        for index, (_, raw) in enumerate(part(again)):
            if index in chosen:
                images[index] = _rgb(raw)
            if index == chosen[-1]:
                break
    if len(images) < len(set(chosen.tolist())):
        raise UserError(f"{frames._name}: changed while it was read. Read it again when it is complete.")
    return np.stack([images[int(index)] for index in chosen]), available[chosen]


def windows(frames: Iterable[Frame], *, num_frames: int, stride_s: float, fps: float | None = None) -> Iterator[Window]:
    """The last `num_frames` frames, every `stride_s` seconds of stream time.

    The first window comes with frame number `num_frames`; then each with the first frame at or after a multiple of
    `stride_s` from there. It is made of what has arrived: more stream changes no window that is out. Frames after the
    last due time are in no window. A stream shorter than one window gives one, its last frame repeated, at its end.
    Holds `num_frames` frames.

    Args:
        fps: use the first frame at or after k/fps only, as in `open_frames`; None uses every frame. Where frames are
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
        last.append(frame)
        if len(last) == num_frames and stride.due(frame.time_s):
            yield _window(list(last))
    if 0 < len(last) < num_frames:
        yield _window([*last, *[last[-1]] * (num_frames - len(last))])


def _window(frames: list[Frame]) -> Window:
    return Window(frames[0].time_s, frames[-1].time_s, np.stack([frame.image for frame in frames]))


def _size(raw: Any) -> tuple[int, int]:
    """(width, height), of a video before it is turned upright."""
    if isinstance(raw, np.ndarray):
        return raw.shape[1], raw.shape[0]
    if isinstance(raw, Image.Image):
        return raw.size
    return raw.width, raw.height


def _rgb(raw: Any) -> np.ndarray:
    """uint8 [H, W, 3], upright."""
    if isinstance(raw, np.ndarray):
        return raw
    if isinstance(raw, Image.Image):
        if raw.mode.startswith(("I", "F")):  # PIL would clip its values at 255: nearly white
            raise UserError(f"An image of mode {raw.mode} has more than 8 bits a channel. Convert it to 8-bit RGB.")
        return np.asarray(raw.convert("RGB"))
    image = raw.to_ndarray(format="rgb24")
    # `rotation` is how far the picture is to be turned counter-clockwise, in degrees; np.rot90 turns the same way.
    return np.ascontiguousarray(np.rot90(image, round(raw.rotation / 90))) if raw.rotation else image


def without_leaps(items: Iterable[T], time_of: Callable[[T], float], skip: Callable[[], None]) -> Iterator[T]:
    """The items, less those whose time leaps ahead by more than 60 s without the next one following.

    Of one wrong time stamp all that comes after would be in the past. So an item that leaps waits for the next one;
    at the end of the stream it waits in vain. `skip` is called for each that is left out.
    """
    last, held = math.nan, None
    for item in items:
        if held is not None:
            if time_of(item) >= time_of(held):
                last = time_of(held)
                yield held
            else:
                skip()
            held = None
        if time_of(item) > last + _LEAP_S:
            held = item
            continue
        last = time_of(item) if math.isfinite(time_of(item)) else last
        yield item
    if held is not None:
        skip()


def source_name(source: Any) -> str:
    """A name for messages, one line; a URL without its password."""
    if not isinstance(source, (str, Path)):
        return type(source).__name__
    return re.sub(r"[\x00-\x1f]", "?", re.sub(r"//[^/]*@", "//***@", str(source)))[:300]


def _open_without_waiting(path: str, flags: int) -> int:
    """A FIFO opens before it has a writer: the wait is ours, with an end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
