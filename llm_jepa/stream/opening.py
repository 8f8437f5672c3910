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
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..core.errors import UserError
from .decoding import open_container, reason
from .frames import FrameSource, Limits, RawFrame, Reading, source_name
from .pixels import Picture

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}  # a GIF moves, so it is a video
Source = str | Path | bytes | Picture | Iterable[Picture] | Iterable[tuple[float, Picture]]

# Containers that hold their own data. Not hls, concat, dash, sdp, image2: they are lists of other things to open.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,nut,ivf,mxf,dv,h264,hevc,m4v,mjpeg,obu,yuv4mpegpipe"
)
_SCHEMES = {"http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "tcp", "srt"}
_LIVE_SCHEMES = _SCHEMES - {"http", "https"}
_NETWORK = "http,https,httpproxy,tls,tcp,udp,rtp,srtp,rtmp,rtmps,srt,crypto,data"  # crypto and data: encrypted HLS
# Single sources, none of which reads a file. A chain of filters is refused, because `movie=` in it would read one.
_LAVFI = re.compile(r"(testsrc2?|color|smpte(hd)?bars|rgbtestsrc|yuvtestsrc|gradients|mandelbrot)(=[\w=:./#-]*)?")
_STILLS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_MAY_BE_ANIMATED = {".png", ".webp"}
_ANIMATIONS = ("PNG", "WEBP", "GIF")  # of Pillow's formats, those whose pictures follow each other in time
# Browsers, and FFmpeg for GIF, take a shorter duration for none, and show such a picture for 0.1 s.
_SHORTEST_S, _NO_DURATION_S = 0.02, 0.1
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
        b"..."                   the content of such a file
        "-"                      standard input: mpegts, matroska, raw h264, ...
        "https://...", "rtsp://..."  a URL; playlists may name network addresses but no files
        "webcam:0"               /dev/video0, AVFoundation device 0; on Windows the device's name
        "lavfi:testsrc=rate=8"   a generated test pattern, endless without duration=
        uint8 [T, H, W, 3]       an array, or a list or iterator of PIL images or uint8 [H, W, 3]; needs native_fps
        (seconds, image), ...    an iterable of pairs; its times are kept as they are
        one image                one frame at 0 s; an animated PIL image (GIF, PNG, WebP) is a film

    Args:
        fps: deliver the first frame at or after k/fps for k = 0, 1, ... counted from the first frame (1 ms early
            counts: mkv rounds its pts). A frame is never delivered twice; an fps above the source's changes nothing.
        native_fps: frames a second of images that come without times.
        live: True: a thread reads, the newest frame waits in a queue of one, older ones are `dropped`. False: every
            frame is delivered and the source waits for the consumer. None: True for cameras and rtsp, rtmp, rtp, udp,
            tcp and srt; False for everything else, including http and pipes. A live lavfi source runs in real time.
        limits: default `Limits()`; for live sources without the limits on frames and seconds.

    Times are seconds since the start of the file, as a player counts: if the sound starts 3 s before the picture, the
    first frame is at 3 s. They are pts; in a stream without any (raw h264) they follow from its rate. A live source
    starts with its first frame. Frames whose time goes back or repeats are skipped, and so is a frame that leaps ahead
    by more than 60 s if the next one does not follow it (`unordered`). Live sources are the exception: if their clock
    goes back by more than 1 s, it has restarted, and time goes on by the wall clock (`clock_resets`). A source whose
    frames change size ends in a UserError, because no window could hold them.

    Frames are what a viewer shows: `pixels` says how they are turned and mirrored, stretched to square pixels, and laid
    on white where they are transparent. A file of a sound with a cover picture is not a film, and is refused.

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
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_file(BytesIO(source), BytesIO(source), reading)
    if not isinstance(source, str):
        return _open_pictures(source, native_fps, reading)
    if source == "-":
        return Opened(_open_bytes(_standard_input(reading), reading), replayable=False)
    if source.startswith("webcam:"):
        return Opened(_open_webcam(source.removeprefix("webcam:"), reading), replayable=False)
    if source.startswith("lavfi:"):
        return Opened(_open_lavfi(source.removeprefix("lavfi:"), reading), replayable=True)
    if re.match(r"[A-Za-z][\w+.-]+://", source):
        return Opened(_open_url(source, reading), replayable=False)
    return _open_path(source, reading)


# -- images in memory -----------------------------------------------------------------------------------------------


def _open_pictures(source: Any, native_fps: float | None, reading: Reading) -> Opened:
    if isinstance(source, Image.Image) and is_animated(source) and native_fps is None:
        return Opened(_pictures_of(source, reading), replayable=True)
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
        return item.dtype == np.uint8 and item.ndim == 3 and item.shape[2] in (3, 4)
    return isinstance(item, Image.Image)


def is_animated(image: Image.Image) -> bool:
    """Whether a PIL image is a film: a GIF, PNG or WebP of several pictures. The pages of a TIFF are not."""
    return image.format in _ANIMATIONS and getattr(image, "is_animated", False)


def _pictures_of(image: Image.Image, reading: Reading) -> Iterator[RawFrame]:
    """The pictures of an animated image, at the times that its durations give. Leaves it at the picture it was at."""
    before = image.tell()
    milliseconds = 0.0
    try:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            if number == 0 and image.info.get("default_image"):  # of a PNG: for viewers that do not animate
                continue
            image.load()
            yield milliseconds / 1000, image.copy()
            duration = image.info.get("duration") or 0
            milliseconds += duration if duration >= 1000 * _SHORTEST_S else 1000 * _NO_DURATION_S
            reading.start_waiting()
        image.seek(before)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{reading.name}: picture {reading.num_read} cannot be read ({error}). Save it again, or as a video."
        ) from error


# -- files and pipes ------------------------------------------------------------------------------------------------


def _open_path(path: str | Path, reading: Reading) -> Opened:
    try:
        file = reading.resources.enter_context(FileIO(path, opener=_open_without_waiting))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{reading.name}: cannot be opened ({reason(error)}). Give the path of a video or an image; "
            "protocols such as concat: are not opened."
        ) from error
    about = os.fstat(file.fileno())
    if stat.S_ISFIFO(about.st_mode):
        return Opened(_open_bytes(_Pipe(file, reading), reading), replayable=False)
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{reading.name}: neither a file nor a pipe. Give one of them, or webcam:0.")
    return _open_file(path, file, reading)


def _open_file(source: Any, file: FileIO | BytesIO, reading: Reading) -> Opened:
    """A video or an image in a regular file. source: a path or file of the same content, for Pillow."""
    head = file.read(512)
    file.seek(0)
    if not head:
        raise UserError(f"{reading.name}: the file is empty. Copy or record it again.")
    # FFmpeg would decode one tile of such a picture and take it for a video.
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"avif"):
        raise UserError(f"{reading.name}: HEIC and AVIF images are not supported. Convert it to JPEG or PNG.")
    image = _open_image(source, reading)
    if image is None:
        return Opened(_open_bytes(_SeekableFile(file, reading), reading, head), replayable=True)
    if is_animated(image):
        return Opened(_pictures_of(image, reading), replayable=True)
    return Opened(iter([(0.0, image)]), replayable=True)


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a FIFO even if it has no writer yet, so that `_Pipe` can wait for one and give up after a time."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _open_image(source: Any, reading: Reading) -> Image.Image | None:
    """The image in a file, still or animated; None if Pillow does not take it for one."""
    try:
        image = Image.open(source, formats=_STILLS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter under -W error
        raise UserError(f"{reading.name}: {error} Scale the image down.") from error
    except (OSError, SyntaxError, ValueError):
        return None
    reading.resources.callback(image.close)
    reading.check_pixels(*image.size)
    num_pages = getattr(image, "n_frames", 1)
    if image.format == "TIFF" and num_pages > 1:
        raise UserError(f"{reading.name}: an image of {num_pages} pages. Save the page that you mean as a file.")
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{reading.name}: the image cannot be read ({error}). Save it again as PNG.") from error
    return image


def is_image(source: Source) -> bool:
    """Whether a source is one picture and not a film: files by their content, but JPEG, BMP and TIFF by their name.

    What cannot be opened counts as its name says; opening it says what is wrong.
    """
    content: str | Path | BytesIO
    if isinstance(source, Image.Image):
        return not is_animated(source)
    if isinstance(source, (str, Path)):
        suffix = Path(source).suffix.lower()
        if suffix not in IMAGE_SUFFIXES or suffix not in _MAY_BE_ANIMATED:
            return suffix in IMAGE_SUFFIXES
        content, by_name = source, True
    elif isinstance(source, (bytes, bytearray, memoryview)):
        content, by_name = BytesIO(source), False
    else:
        return getattr(source, "ndim", 4) == 3
    try:
        with Image.open(content, formats=_STILLS) as image:
            return not is_animated(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return by_name


def _open_bytes(reader: _Pipe, reading: Reading, head: bytes | None = None) -> Iterator[RawFrame]:
    """A film that is read here for FFmpeg. head: its first bytes, if they can be seen without taking them."""
    if head is None:
        advice = "Send a complete video that needs no seeking, such as mpegts or matroska."
    else:
        advice = f"It {_looks_like(head)}. Give a complete video or image file."
    options = {"protocol_whitelist": "none", "format_whitelist": _FORMATS}
    return open_container(reader, reading, options=options, advice=advice)


_MAGIC = {
    b"%PDF": "is a PDF document",
    b"PK\3\4": "is a zip archive",
    b"\x1f\x8b": "is compressed (gzip)",
    b"ID3": "is a sound (mp3)",
    b"\xff\xfb": "is a sound (mp3)",
    b"fLaC": "is a sound (flac)",
    b"8BPS": "is a Photoshop document",
    b"#EXTM3U": "is a playlist, and playlists on disk are not followed",
    b"ffconcat": "is a list of files, and playlists on disk are not followed",
    b"<": "is a page or document of text, perhaps the message of a server",
}


def _looks_like(head: bytes) -> str:
    """What a file is that is not a video, in words that follow "it"."""
    for magic, kind in _MAGIC.items():
        if head.lstrip().startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "is a sound (wav)"
    if b"\0" not in head and head.isascii():
        return "is a text"
    return "is damaged, incomplete, or of a format that is not read"


class _Pipe:
    """A pipe in the form that PyAV reads. Waiting for data ends when the source is closed or `max_decode_s` is over."""

    def __init__(self, file: Any, reading: Reading) -> None:
        self._file, self._reading = file, reading

    def read(self, size: int) -> bytes:
        while not self._reading.closing.is_set():
            self._reading.check_stall()
            if self._has_data():
                return self._file.read(size) or b""
        return b""

    def _has_data(self) -> bool:
        return os.name == "nt" or bool(select.select([self._file], [], [], 0.1)[0])  # Windows cannot select on pipes


class _SeekableFile(_Pipe):
    """A file, which is always ready and can be searched: the index of many containers is at the end."""

    def _has_data(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _standard_input(reading: Reading) -> _Pipe:
    file = FileIO(sys.stdin.fileno(), closefd=False)
    is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    return _SeekableFile(file, reading) if is_regular else _Pipe(file, reading)


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
    advice = "Check the address, the network and the sender. It must be a video, not a page that shows one."
    return open_container(url, reading, options=options, advice=advice)


def _open_webcam(device: str, reading: Reading) -> Iterator[RawFrame]:
    is_number = device.isdecimal()
    advice = (
        "It is a camera of this machine: plug it in, close programs that use it, and allow this one to use it. "
        "Linux lists cameras as /dev/video*; a machine without one can be given a video file."
    )
    if sys.platform.startswith("linux") and (is_number or device.startswith("/dev/video")):
        path = f"/dev/video{device}" if is_number else device
        return open_container(path, reading, "video4linux2", advice=advice)
    if sys.platform == "darwin" and is_number:
        # few cameras accept AVFoundation's own default rate
        return open_container(device, reading, "avfoundation", options={"framerate": "30"}, advice=advice)
    if sys.platform == "win32" and device and not is_number:
        return open_container(f"video={device}", reading, "dshow", advice=advice)
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
    return open_container(graph, reading, "lavfi", advice="It is a test pattern: check its options, name=value:...")
