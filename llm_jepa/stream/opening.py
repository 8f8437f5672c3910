"""Opening a source of frames: one function for each kind of source.

A video is hostile input. Local files and pipes reach FFmpeg as bytes that are read here. FFmpeg gets no protocol to
open anything else, and only container formats that hold their own data: a playlist renamed to .mp4 can name a file or a
URL, but FFmpeg will not read it. FFmpeg itself is C code that parses the bytes, so run it in a sandbox for files from
strangers.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import select
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..core.errors import UserError
from .frames import FrameSource, Limits, Picture, RawFrame, Reading, source_name

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}  # files of one frame; a GIF moves, so it is a video
Source = str | Path | Picture | Iterable[Picture] | Iterable[tuple[float, Picture]]

# Containers that hold their own data. Not hls, concat, dash, sdp, image2: they are lists of other things to open.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,nut,ivf,mxf,dv,h264,hevc,m4v,mjpeg,obu,yuv4mpegpipe"
)
_SCHEMES = {"http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "tcp", "srt"}
_LIVE_SCHEMES = _SCHEMES - {"http", "https"}
_NETWORK = "http,https,httpproxy,tls,tcp,udp,rtp,srtp,rtmp,rtmps,srt,crypto,data"  # crypto and data: encrypted HLS
# Single sources, none of which reads a file. A chain of filters is refused, because `movie=` in it would read one.
_LAVFI = re.compile(r"(testsrc2?|color|smpte(hd)?bars|rgbtestsrc|yuvtestsrc|gradients|mandelbrot)(=[\w=:./#-]*)?")
_STILLS = ("PNG", "JPEG", "WEBP", "BMP")
_MAX_DEMUX_FAILURES = 16  # a demuxer finds its way again within a few tries, or repeats the error without end
_LIVE_LIMITS = Limits(max_frames=None, max_seconds=None)


class Opened(NamedTuple):
    """raw: (seconds, picture) in the order of decoding, unchecked.  replayable: opening it again gives the same."""

    raw: Iterator[RawFrame]
    replayable: bool


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
            tcp and srt; False for everything else, including http and pipes. A live lavfi source runs in real time.
        limits: default `Limits()`; for live sources without the limits on frames and seconds.

    Times are pts, or follow from the declared rate if a stream has none (raw h264). Frames whose time goes back or
    repeats are skipped, and so is a frame that leaps ahead by more than 60 s if the next one does not follow it
    (`unordered`). Live sources are the exception: if their clock goes back by more than 1 s, it has restarted, and time
    goes on by the wall clock (`clock_resets`). A source whose frames change size ends in a UserError, because no window
    could hold them. Phone videos are turned upright in steps of 90 degrees; mirroring is not undone. Stills follow
    their EXIF orientation.

    A frame whose decoding fails is skipped (`corrupt`); one whose damage the decoder conceals is delivered.

    Raises UserError here or while iterating for a source that cannot be read.
    """
    for name, rate in (("fps", fps), ("native_fps", native_fps)):
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise UserError(f"{name}={rate} must be a number of frames a second > 0.")
    if isinstance(source, (str, Path)) and native_fps is not None:
        raise UserError(f"native_fps={native_fps} is for images without times; {source_name(str(source))} has its own.")
    if live is None:
        live = isinstance(source, str) and source.partition(":")[0].lower() in _LIVE_SCHEMES | {"webcam"}
    if limits is None:
        limits = _LIVE_LIMITS if live else Limits()
    reading = Reading(source_name(source), live=live, limits=limits)
    try:
        raw, replayable = _open(source, native_fps, reading)
    except BaseException:
        reading.resources.close()
        raise
    return FrameSource(reading, raw, fps=fps, replayable=replayable)


def _open(source: Source, native_fps: float | None, reading: Reading) -> Opened:
    if isinstance(source, Path):
        return _open_path(source, reading)
    if not isinstance(source, str):
        return _open_pictures(source, native_fps, reading)
    if source == "-":
        return Opened(_open_bytes(FileIO(sys.stdin.fileno(), closefd=False), reading), replayable=False)
    if source.startswith("webcam:"):
        return Opened(_open_webcam(source.removeprefix("webcam:"), reading), replayable=False)
    if source.startswith("lavfi:"):
        return Opened(_open_lavfi(source.removeprefix("lavfi:"), reading), replayable=True)
    if re.match(r"[A-Za-z][\w+.-]+://", source):
        return Opened(_open_url(source, reading), replayable=False)
    return _open_path(source, reading)


# -- images in memory -----------------------------------------------------------------------------------------------


def _open_pictures(source: Any, native_fps: float | None, reading: Reading) -> Opened:
    if isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.ndim == 3):
        source, native_fps = [source], native_fps or 1.0  # one image; any rate puts it at 0 s
    if not isinstance(source, Iterable):
        raise UserError(f"{reading.name}: not a source of frames. Give a path, a URL, an array or an iterable.")
    return Opened(_pictures(source, native_fps, reading.name), isinstance(source, (np.ndarray, Sequence)))


def _pictures(source: Iterable[Any], native_fps: float | None, name: str) -> Iterator[RawFrame]:
    """Times and images of an array, or of an iterable of images or of (seconds, image); each is checked."""
    number = -1
    for number, item in enumerate(source):
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], numbers.Real):
            seconds, item = float(item[0]), item[1]
            if native_fps is not None or not math.isfinite(seconds):
                raise UserError(
                    f"{name}: frame {number} has the time {seconds} and native_fps={native_fps}. Give finite times, or "
                    "images alone and native_fps."
                )
        elif native_fps is None:
            raise UserError(f"{name}: images without times. Give native_fps, or (seconds, image) pairs.")
        else:
            seconds = number / native_fps
        if not _is_picture(item):
            kind = type(item).__name__
            if isinstance(item, np.ndarray):
                kind = f"{item.dtype} {list(item.shape)}"
            raise UserError(f"{name}: frame {number} is {kind}; give PIL images or uint8 arrays [H, W, 3].")
        yield seconds, item
    if number < 0:
        raise UserError(f"{name}: no frames. Give at least one.")


def _is_picture(item: Any) -> bool:
    if isinstance(item, np.ndarray):
        return item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] == 3
    return isinstance(item, Image.Image)


# -- files and pipes ------------------------------------------------------------------------------------------------


def _open_path(path: str | Path, reading: Reading) -> Opened:
    try:
        file = reading.resources.enter_context(FileIO(path, opener=_open_without_waiting))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{reading.name}: cannot be opened ({_reason(error)}). Give the path of a video or an image; "
            "protocols such as concat: are not opened."
        ) from error
    about = os.fstat(file.fileno())
    if stat.S_ISFIFO(about.st_mode):
        return Opened(_open_bytes(file, reading), replayable=False)
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{reading.name}: neither a file nor a pipe. Give one of them, or webcam:0.")
    if about.st_size == 0:
        raise UserError(f"{reading.name}: the file is empty. Copy or record it again.")
    head = file.read(16)
    file.seek(0)
    # FFmpeg would decode one tile of such a picture and take it for a video.
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"avif"):
        raise UserError(f"{reading.name}: HEIC and AVIF images are not supported. Convert it to JPEG or PNG.")
    still = _open_still(path, reading)
    if still is not None:
        return Opened(iter([(0.0, still)]), replayable=True)
    return Opened(_open_bytes(file, reading), replayable=True)


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a FIFO even if it has no writer yet, so that `_Pipe` can wait for one and give up after a time."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _open_still(path: str | Path, reading: Reading) -> Image.Image | None:
    """The image in a file, upright; None if Pillow does not take it for one."""
    try:
        image = Image.open(path, formats=_STILLS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter under -W error
        raise UserError(f"{reading.name}: {error} Scale the image down.") from error
    except (OSError, SyntaxError, ValueError):
        return None
    reading.resources.callback(image.close)
    reading.check_pixels(*image.size)
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise UserError(f"{reading.name}: an animated image. Convert it to a video, mp4 for example.")
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{reading.name}: the image cannot be read ({error}). Save it again as PNG.") from error


def _open_bytes(file: FileIO, reading: Reading) -> Iterator[RawFrame]:
    is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    reader = _SeekableFile(file, reading) if is_regular else _Pipe(file, reading)
    options = {"protocol_whitelist": "none", "format_whitelist": _FORMATS}
    return _open_container(reader, reading, options=options)


class _Pipe:
    """A pipe in the form that PyAV reads. Waiting for data ends when the source is closed or `max_decode_s` is over."""

    def __init__(self, file: FileIO, reading: Reading) -> None:
        self._file, self._reading = file, reading

    def read(self, size: int) -> bytes:
        while not self._reading.closing.is_set():
            self._reading.check_stall()
            if os.name == "nt" or select.select([self._file], [], [], 0.1)[0]:  # Windows cannot select on pipes
                return self._file.read(size) or b""
        return b""


class _SeekableFile(_Pipe):
    """A file, which is always ready and can be searched: the index of many containers is at the end."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


# -- the network, cameras and test patterns -------------------------------------------------------------------------


def _open_url(url: str, reading: Reading) -> Iterator[RawFrame]:
    scheme = url.partition(":")[0].lower()
    if scheme not in _SCHEMES or re.search(r"[\s\x00-\x1f]", url):
        raise UserError(
            f"{reading.name}: this URL is not supported. Give a file as a plain path, or a URL without spaces of "
            f"{', '.join(sorted(_SCHEMES))}."
        )
    # FFmpeg's default for rtsp is UDP, which loses packets and with them pieces of pictures.
    options = {"protocol_whitelist": _NETWORK, "rtsp_transport": "tcp"}
    return _open_container(url, reading, options=options)


def _open_webcam(device: str, reading: Reading) -> Iterator[RawFrame]:
    is_number = device.isdecimal()
    if sys.platform.startswith("linux") and (is_number or device.startswith("/dev/video")):
        path = f"/dev/video{device}" if is_number else device
        return _open_container(path, reading, "video4linux2")
    if sys.platform == "darwin" and is_number:
        # few cameras accept AVFoundation's own default rate
        return _open_container(device, reading, "avfoundation", options={"framerate": "30"})
    if sys.platform == "win32" and device and not is_number:
        return _open_container(f"video={device}", reading, "dshow")
    raise UserError(
        f"{reading.name}: no such camera on {sys.platform}. Linux and macOS number them (webcam:0), Windows "
        "names them (webcam:Integrated Camera)."
    )


def _open_lavfi(graph: str, reading: Reading) -> Iterator[RawFrame]:
    if not _LAVFI.fullmatch(graph):
        raise UserError(
            f"{reading.name}: not one of FFmpeg's test patterns with its options. Give for example "
            "lavfi:testsrc=size=320x240:rate=8:duration=5, without further filters."
        )
    for width, height in re.findall(r"(\d+)[^\d=:/](\d+)", graph):  # FFmpeg draws it before we can measure it
        reading.check_pixels(int(width), int(height))
    if reading.live:
        graph += ",realtime"
    return _open_container(graph, reading, "lavfi")


# -- decoding -------------------------------------------------------------------------------------------------------


def _open_container(
    file: str | _Pipe, reading: Reading, format: str | None = None, *, options: dict[str, str] | None = None
) -> Iterator[RawFrame]:
    try:
        import av
    except ImportError as error:
        raise UserError('Reading video needs PyAV: pip install "llm-jepa[vl]"') from error
    # More than the limit, because codecs round widths and heights up, to 64 and more.
    allocation = {"max_pixels": str(2 * reading.limits.max_pixels + 2**16)}
    timeout = None if isinstance(file, _Pipe) else reading.limits.max_decode_s
    try:
        container = av.open(file, format=format, options={**(options or {}), **allocation}, timeout=timeout)
    except (av.error.FFmpegError, UnicodeError) as error:
        raise UserError(
            f"{reading.name}: FFmpeg cannot open it ({_reason(error)}). Give a complete video file or stream; "
            "playlists on disk are not followed."
        ) from error
    reading.resources.callback(container.close)
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise UserError(f"{reading.name}: no video stream that can be decoded. Give a file with a picture.")
    reading.check_pixels(stream.codec_context.width, stream.codec_context.height)
    stream.codec_context.options = allocation
    return _decode(container, stream, reading)


def _decode(container: InputContainer, stream: VideoStream, reading: Reading) -> Iterator[RawFrame]:
    """Frames and their times. A frame that cannot be decoded is skipped and counted."""
    import av

    codec, num_declared = stream.codec_context, stream.frames
    has_pts = container.format.name != "avi"  # for avi FFmpeg makes them up, in the wrong order with B-frames
    step = 1 / Fraction(stream.average_rate or 25)
    origin: Fraction | None = None
    stamp = Fraction(0)
    reading.start_waiting()
    for packet in _packets(container, stream, reading):
        try:
            decoded = codec.decode(packet)
        except av.error.FFmpegError:
            reading.check_pixels(codec.width, codec.height)  # a stream that has grown past the limit fails like this
            reading.num_corrupt += 1
            continue
        for frame in decoded:
            if frame.is_corrupt:
                reading.num_corrupt += 1
                continue
            ticks, unit = frame.pts if has_pts else frame.dts, frame.time_base
            if ticks is None or unit is None:
                stamp += step
            else:
                stamp = ticks * unit
            if origin is None:
                origin = stamp
            yield float(stamp - origin), frame
            reading.start_waiting()
    if reading.closing.is_set():
        return
    if origin is None:
        raise UserError(f"{reading.name}: no frame of it can be decoded. Check that it plays; encode it again.")
    num_found = reading.num_read + reading.num_corrupt
    if num_declared and num_found < 0.9 * num_declared:  # a little less is how trimming by an edit list looks
        warnings.warn(
            f"{reading.name}: says it has {num_declared} frames, {num_found} were found: cut off, or trimmed without "
            "encoding it again.",
            stacklevel=2,
        )


def _packets(container: InputContainer, stream: VideoStream, reading: Reading) -> Iterator[Packet]:
    """The packets of a stream; damage between them is skipped, and counted once.

    Raises UserError if the stream breaks off or stalls.
    """
    import av

    packets, failures = container.demux(stream), 0
    while True:
        reading.check_stall()
        try:
            packet = next(packets, None)
        except av.error.BlockingIOError:  # a camera without a new picture yet
            time.sleep(0.005)
        except (av.error.InvalidDataError, av.error.MemoryError):  # the latter: a packet that claims to be 4 GB
            failures += 1
            if failures == 1:
                reading.num_corrupt += 1
            if failures == _MAX_DEMUX_FAILURES:
                return
        except av.error.FFmpegError as error:
            raise UserError(
                f"{reading.name}: the stream broke off after {reading.num_read} frames ({_reason(error)}). Check the "
                "sender and open it again."
            ) from error
        else:
            if packet is None:
                return
            failures = 0
            yield packet
            continue
        packets = container.demux(stream)  # after an error the old iterator is at its end


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
