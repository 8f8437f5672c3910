"""Small videos whose frames say their number, and ways to read them without hanging."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings

from llm_jepa.stream.opening import open_frames

SMALL = settings(max_examples=60, deadline=None)

CONTAINERS = {  # format: codecs of picture and sound
    "mp4": ("libx264", "aac"),
    "mov": ("libx264", "aac"),
    "matroska": ("libx264", "aac"),
    "webm": ("libvpx", "libopus"),
    "mpegts": ("libx264", "aac"),
    "flv": ("libx264", "aac"),
    "avi": ("mpeg4", "mp2"),
}


def grey(number: int, height: int = 64, width: int = 64) -> np.ndarray:
    """A picture that says its number, through any codec."""
    return np.full((height, width, 3), 8 * number + 4, np.uint8)


def number_of(image: np.ndarray) -> int:
    return round((float(image.mean()) - 4) / 8)


def write(
    file: Any, images: list[np.ndarray], *, rate: int = 8, codec: str = "libx264", format: str | None = None,
    pix_fmt: str = "yuv420p", pts: list[int] | None = None,
    movflags: str = "", **options: str,
) -> Any:  # fmt: skip
    """`pts` in units of 1/rate. An mp4 has its index at the end, unless movflags="faststart"."""
    import av

    with av.open(file, "w", format=format, options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, options
        stream.codec_context.time_base = Fraction(1, rate)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def encoded(images: list[np.ndarray], format: str, **options: Any) -> bytes:
    return write(io.BytesIO(), images, format=format, **options).getvalue()


def film_with_sound(format: str, start_s: float) -> bytes:
    """1 s of film at 8 a second, `start_s` after its sound begins, and 5 s of silence."""
    import av

    codec, sound_codec = CONTAINERS[format]
    packets: list[Any] = []
    file, per_packet = io.BytesIO(), 960 if sound_codec == "libopus" else 1024
    with av.open(file, "w", format=format) as container:
        film = container.add_stream(codec, rate=8)
        film.width = film.height = 64
        film.pix_fmt, film.codec_context.time_base = "yuv420p", Fraction(1, 8)
        sound = container.add_stream(sound_codec, rate=48000, layout="mono")
        for k in range(8):
            frame = av.VideoFrame.from_ndarray(grey(k), "rgb24")
            frame.pts, frame.time_base = round(8 * start_s) + k, Fraction(1, 8)
            packets += film.encode(frame)
        for k in range(250):
            shape, kind = ((1, per_packet), "flt" if sound_codec == "libopus" else "fltp")
            noise = av.AudioFrame.from_ndarray(np.zeros(shape, np.float32), kind, "mono")
            noise.sample_rate, noise.pts, noise.time_base = 48000, k * per_packet, Fraction(1, 48000)
            packets += sound.encode(noise)
        for packet in sorted([*packets, *film.encode(), *sound.encode()], key=lambda p: float(p.dts * p.time_base)):
            container.mux(packet)
    return file.getvalue()


def good(format: str = "mp4") -> bytes:
    return encoded([grey(k) for k in range(8)], format)


def read(source: Any, **options: Any) -> tuple[list[float], list[int]]:
    with open_frames(source, **options) as frames:
        got = list(frames)
    return [frame.time_s for frame in got], [number_of(frame.image) for frame in got]


def finishes(work: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """The result or exception of `work`, or a failure if it hangs: a test must not hang with it."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, work()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert outcome, "it hangs"
    good, value = outcome[0]
    if not good:
        raise value
    return value


def feed(path: Path, data: bytes) -> threading.Thread:
    def run() -> None:
        with contextlib.suppress(BrokenPipeError), open(path, "wb") as pipe:
            for at in range(0, len(data), 1000):
                pipe.write(data[at : at + 1000])
                pipe.flush()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
