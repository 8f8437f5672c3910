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
