"""Frames of a film and their times, by PyAV. `opening` decides what FFmpeg may open, and how.

A container states when a film starts, how fast it runs, which of its pictures are a film, and how they are shown.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from .frames import RawFrame, Reading
from .pixels import CodedFrame, orientation

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

_PYAV = (17, 1)  # 16 and older read BT.709 and colours of full range as BT.601 of limited range; 17.0 crashes
_MAX_DEMUX_FAILURES = 16  # a demuxer finds its way again within a few tries, or repeats the error without end
_DEFAULT_RATE = 25  # frames a second of a raw stream that does not say; FFmpeg's
# FFmpeg's own decoders of these two leave the transparency out.
_DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def open_container(
    file: Any,
    reading: Reading,
    format: str | None = None,
    *,
    options: dict[str, str] | None = None,
    advice: str,
) -> Iterator[RawFrame]:
    """The frames of a film, in the order of decoding, with their times as a player shows them.

    file: an address or device that FFmpeg opens, or an object with `read` and perhaps `seek`.
    advice: what the source is or should be, and what to do, if FFmpeg cannot open it.

    Raises UserError here or while iterating.
    """
    try:
        import av
    except ImportError as error:
        raise UserError('Reading video needs PyAV: pip install "llm-jepa[vl]"') from error
    if tuple(int(number) for number in av.__version__.split(".")[:2]) < _PYAV:
        raise UserError(
            f'PyAV {av.__version__} reads the colours of films wrong: pip install "llm-jepa[vl]" updates it.'
        )
    # More than the limit, because codecs round widths and heights up, to 64 and more.
    allocation = {"max_pixels": str(2 * reading.limits.max_pixels + 2**16)}
    timeout = reading.limits.max_decode_s if isinstance(file, str) else None
    try:
        container = av.open(file, format=format, options={**(options or {}), **allocation}, timeout=timeout)
    except (av.error.FFmpegError, UnicodeError) as error:
        raise UserError(f"{reading.name}: cannot be opened ({reason(error)}). {advice}") from error
    reading.resources.callback(container.close)
    stream = _film(container, reading.name)
    reading.check_pixels(stream.codec_context.width, stream.codec_context.height)
    codec = _decoder(stream, reading)
    codec.options = allocation
    return _decode(container, stream, codec, reading)


def reason(error: Exception) -> str:
    """What the system or FFmpeg says, without its numbers."""
    return getattr(error, "strerror", None) or str(error)


def _film(container: InputContainer, name: str) -> VideoStream:
    """The stream to read. A cover and the thumbnails of chapters are pictures beside a sound or a film, not films."""
    films = [stream for stream in container.streams.video if not _is_cover(stream)]
    films = [stream for stream in films if stream.codec_context is not None]
    if films:
        best = container.streams.best("video")
        return next((stream for stream in films if stream is best), films[0])
    if any(_is_cover(stream) for stream in container.streams.video):
        raise UserError(f"{name}: a sound with a cover picture, not a film. Give a film, or the picture as a file.")
    raise UserError(f"{name}: no video stream that can be decoded. Give a file with a picture.")


def _is_cover(stream: VideoStream) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails))


def _decoder(stream: VideoStream, reading: Reading) -> VideoCodecContext:
    from av import CodecContext

    codec = stream.codec_context
    if stream.metadata.get("alpha_mode") != "1" or codec.name not in _DECODERS_WITH_ALPHA:
        return codec
    try:
        return CodecContext.create(_DECODERS_WITH_ALPHA[codec.name], "r")
    except ValueError:  # PyAV was built without it
        reading.remarks.append("its transparency is not read: this PyAV has no libvpx. Install PyAV's own wheel.")
        return codec


class _Times:
    """Time and duration of each frame, in seconds since the start of the file.

    The file starts where its first stream does, sound or picture: players count from there. A time before 0 is the
    lead-in of a sound decoder, which is not played. A live source starts with its first frame.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, *, live: bool) -> None:
        # For avi FFmpeg makes pts up, in the wrong order with B-frames.
        self._has_pts = container.format.name != "avi"
        # `average_rate` of a raw stream is 25, whatever it says itself.
        self._step = 1 / Fraction(stream.guessed_rate or stream.average_rate or _DEFAULT_RATE)
        self._own_start, self._start = (None, None) if live else _starts(container, stream)
        self._end: Fraction | None = None
        if self._own_start is not None and self._has_pts and stream.duration and stream.time_base:
            self._end = self._own_start + stream.duration * stream.time_base
        self._origin: Fraction | None = None
        self._next = Fraction(0)

    def of(self, frame: VideoFrame) -> tuple[Fraction, Fraction]:
        ticks, unit = frame.pts if self._has_pts else frame.dts, frame.time_base
        duration = frame.duration * unit if frame.duration and unit else self._step
        stamp = self._next if ticks is None or unit is None else ticks * unit
        self._next = stamp + duration
        if self._origin is None:
            self._origin = self._origin_of(stamp)
        if self._end is not None and stamp < self._end:  # with B-frames, mp4 has the duration of another frame here
            duration = min(duration, self._end - stamp)
        return stamp - self._origin, duration

    def _origin_of(self, stamp: Fraction) -> Fraction:
        if self._start is None or self._own_start is None:
            return stamp
        if not self._has_pts:  # dts have another origin than the starts
            return stamp - (self._own_start - self._start)
        return min(max(self._start, Fraction(0)), stamp)


def _starts(container: InputContainer, stream: VideoStream) -> tuple[Fraction | None, Fraction | None]:
    """When the film and when the file starts; None if it does not say. Exact, where `container.start_time` is in µs."""

    def start(stream: Any) -> Fraction | None:
        if stream.start_time is None or stream.time_base is None:
            return None
        return stream.start_time * stream.time_base

    played = [*container.streams.audio, *(film for film in container.streams.video if not _is_cover(film))]
    known = [at for at in map(start, played) if at is not None]
    return start(stream), min(known, default=None)


def _decode(
    container: InputContainer, stream: VideoStream, codec: VideoCodecContext, reading: Reading
) -> Iterator[RawFrame]:
    """Frames and their times. A frame that cannot be decoded is skipped and counted."""
    import av

    num_declared = stream.frames
    times = _Times(container, stream, live=reading.live)
    pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
    found = False
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
            if not found:
                _remark(frame, reading)
            found = True
            time_s, duration_s = times.of(frame)
            yield float(time_s), CodedFrame(frame, pixel_aspect, float(duration_s))
            reading.start_waiting()
    if reading.closing.is_set():
        return
    if not found:
        raise UserError(f"{reading.name}: no frame of it can be decoded. Check that it plays; encode it again.")
    num_found = reading.num_read + reading.num_corrupt
    if num_declared and num_found < 0.9 * num_declared:  # a little less is how trimming by an edit list looks
        warnings.warn(
            f"{reading.name}: says it has {num_declared} frames, {num_found} were found: cut off, or trimmed without "
            "encoding it again.",
            stacklevel=2,
        )


def _remark(frame: VideoFrame, reading: Reading) -> None:
    """Note the facts of a film that are not obeyed."""
    if not orientation(frame).exact:
        reading.remarks.append("it is shown at an angle; turned by the nearest quarter turn instead.")
    if frame.interlaced_frame:
        reading.remarks.append(
            "interlaced: both fields of a frame are shown at once, so what moves looks combed. Deinterlace it first."
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
                f"{reading.name}: the stream broke off after {reading.num_read} frames ({reason(error)}). Check the "
                "sender and open it again."
            ) from error
        else:
            if packet is None:
                return
            failures = 0
            yield packet
            continue
        packets = container.demux(stream)  # after an error the old iterator is at its end
