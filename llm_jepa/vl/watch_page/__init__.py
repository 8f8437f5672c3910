"""A stream that `watch` has seen as one HTML page: pictures, curve and captions on one axis of time.

`Timeline` collects while the stream runs, in a size that does not grow with it; `write_report` renders
`page.html.jinja` with `page.css` and `page.js` inside, so the page fetches nothing. Captions, the query and the source
are texts of strangers: the template escapes all of them, and the page's own policy allows no script but page.js and no
loading at all.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from ...core.files import write_whole
from ...stream.decoder import Caption
from ...stream.frames import Frame

MAX_THUMBNAILS = 400  # of 4 to 8 kB each: 2 to 4 MB of page
THUMBNAIL_PX = 160
MAX_POINTS = 4000
BLOCK_PX = 120  # width of the median caption before any zoom: three or four short words a line
MAX_SCALE = 40  # pixels a second at the start, for streams of short scenes


class Timeline:
    """Thumbnails and the curve of a stream. As it grows they are thinned: half as many, twice as far apart.

    thumbnails: (seconds, JPEG), one per second at first, at most MAX_THUMBNAILS.
    distances: (seconds, ||z - z before||) of neighbouring windows, fewer than MAX_POINTS. Thinning keeps the larger of
        two neighbours, so a peak keeps its height.
    """

    def __init__(self) -> None:
        self.thumbnails: list[tuple[float, bytes]] = []
        self.distances: list[tuple[float, float]] = []
        self._every_s = 1.0
        self._next_s = -math.inf
        self._previous: tuple[float, NDArray[np.float32]] | None = None
        self._per_point = 1
        self._waiting: list[tuple[float, float]] = []  # distances of the point that is not complete yet

    @property
    def largest_distance(self) -> float:
        return max((distance for _, distance in self.distances), default=0.0)

    def add_frame(self, frame: Frame) -> None:
        """Keep the frame if a thumbnail is due. Frames come in the order of time."""
        if frame.time_s < self._next_s:
            return
        first = self.thumbnails[0][0] if self.thumbnails else frame.time_s
        self.thumbnails.append((frame.time_s, _jpeg(frame.image)))
        if len(self.thumbnails) > MAX_THUMBNAILS:
            self.thumbnails, self._every_s = self.thumbnails[::2], 2 * self._every_s
        self._next_s = first + (math.floor((frame.time_s - first) / self._every_s + 1e-6) + 1) * self._every_s

    def add_window(self, time_s: float, embedding: NDArray[np.float32]) -> None:
        """Add the embedding [D] of the window whose centre is at `time_s`."""
        if self._previous is not None:
            before_s, before = self._previous
            self._waiting.append(((before_s + time_s) / 2, float(np.linalg.norm(embedding - before))))
        self._previous = time_s, embedding
        if len(self._waiting) == self._per_point:
            self.distances.append(_peak(self._waiting))
            self._waiting = []
        if len(self.distances) == MAX_POINTS:  # an even number
            pairs = zip(self.distances[::2], self.distances[1::2], strict=True)
            self.distances, self._per_point = [_peak(pair) for pair in pairs], 2 * self._per_point


def write_report(
    path: str | Path,
    *,
    source: str,
    query: str,
    captions: Sequence[Caption],
    timeline: Timeline,
    num_windows: int,
    num_decodes: int,
    seconds: float,
    details: str = "",
) -> None:
    """Write one self-contained page to `path`; it is complete from the moment it is there.

    Args:
        source, query, details: any text; `details` is added to the summary.
        captions: in order. Provisional ones are left out, because the final one of the same scene is there.
        seconds: of video.
    """
    final = [caption for caption in captions if caption.final]
    start_s, length_s = _axis(final, timeline, seconds)
    durations = [caption.end_s - caption.start_s for caption in final] or [length_s]
    curve_line, curve_area = _curve(timeline, start_s)
    script = _asset("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_asset("page.html.jinja")).render(
        source=one_line(source),
        query=one_line(query),
        details=one_line(details),
        facts=_facts(num_windows, num_decodes, seconds, len(final)),
        scenes=_scenes(final, start_s, length_s),
        thumbnails=[(time_s, base64.b64encode(jpeg).decode()) for time_s, jpeg in timeline.thumbnails],
        curve_line=curve_line,
        curve_area=curve_area,
        largest=timeline.largest_distance,
        start_s=start_s,
        length_s=length_s,
        scale=min(BLOCK_PX / max(statistics.median(durations), 1e-3), MAX_SCALE),
        style=_asset("page.css"),
        script=script,
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_whole(path, page + "\n")


def clock(seconds: float) -> str:
    """12.5 -> 00:12.5, one hour and more -> 1:00:12.5. Tenths, rounded to the nearest."""
    tenths = round(abs(seconds) * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    digits = f"{minutes:02d}:{rest // 10:02d}.{rest % 10}"
    if hours:
        digits = f"{hours}:{digits}"
    return f"-{digits}" if seconds < 0 and tenths else digits


def one_line(text: str) -> str:
    """A stranger's text on one line, without line breaks, terminal escapes, bidi overrides and lone surrogates."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@dataclass(frozen=True)
class _Scene:
    """A final caption as the template shows it. `offset_s` counts from the start of the axis."""

    text: str
    title: str
    span: str
    score: str
    hue: float
    start_s: float
    end_s: float
    offset_s: float
    length_s: float
    left_percent: float
    width_percent: float


def _scenes(final: Sequence[Caption], start_s: float, length_s: float) -> list[_Scene]:
    numbers: dict[str, int] = {}  # text -> in which order the texts came up
    scenes = []
    for caption in final:
        text = one_line(caption.text)
        number = numbers.setdefault(text, len(numbers))
        span = f"{clock(caption.start_s)}–{clock(caption.end_s)}"
        score = "" if caption.score is None else f"{caption.score:.2f}"
        offset_s, duration_s = caption.start_s - start_s, caption.end_s - caption.start_s
        scenes.append(
            _Scene(
                text=text,
                title=one_line(f"{span} {text} {score}"),
                span=span,
                score=score,
                # One hue per text, so that a scene that comes back is recognised. The golden angle keeps neighbours
                # apart.
                hue=(25 + 137.508 * number) % 360,
                start_s=caption.start_s,
                end_s=caption.end_s,
                offset_s=offset_s,
                length_s=duration_s,
                left_percent=100 * offset_s / length_s,
                width_percent=100 * duration_s / length_s,
            )
        )
    return scenes


def _facts(num_windows: int, num_decodes: int, seconds: float, num_scenes: int) -> list[tuple[str, str]]:
    """The large numbers at the top of the page, each with its meaning."""
    saved = "nothing to decode"
    if num_decodes:
        saved = f"{num_windows / num_decodes:.1f} times fewer than one per window"
    return [
        (f"{num_decodes} of {num_windows}", f"decoded {num_decodes} of {num_windows} windows: {saved}"),
        (clock(seconds), "of video"),
        (str(num_scenes), "scene" if num_scenes == 1 else "scenes"),
    ]


def _axis(final: Sequence[Caption], timeline: Timeline, seconds: float) -> tuple[float, float]:
    """Start and length in seconds, so that all pictures, points and captions are on it. At least 1 s long."""
    times = [time_s for time_s, _ in timeline.thumbnails] + [time_s for time_s, _ in timeline.distances]
    start_s = min([*times, *(caption.start_s for caption in final)], default=0.0)
    end_s = max([start_s + seconds, *times, *(caption.end_s for caption in final)])
    return start_s, max(end_s - start_s, 1.0)


def _curve(timeline: Timeline, start_s: float) -> tuple[str, str]:
    """SVG points of the curve and of the area under it; y from 6 at the largest distance to 100 at none."""
    top = timeline.largest_distance or 1.0
    points = [(time_s - start_s, 100 - 94 * distance / top) for time_s, distance in timeline.distances]
    if not points:
        return "", ""
    line = " ".join(f"{x:.2f},{y:.1f}" for x, y in points)
    return line, f"{points[0][0]:.2f},100 {line} {points[-1][0]:.2f},100"


def _asset(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8").strip()


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    small = Image.fromarray(image)
    height = max(1, round(image.shape[0] * THUMBNAIL_PX / image.shape[1]))
    # Small pictures are enlarged without smoothing, so that they show the pixels that the model saw.
    enlarged = image.shape[1] < THUMBNAIL_PX
    small = small.resize(
        (THUMBNAIL_PX, min(height, 2 * THUMBNAIL_PX)),
        Image.Resampling.NEAREST if enlarged else Image.Resampling.BILINEAR,
    )
    file = io.BytesIO()
    small.save(file, "JPEG", quality=70)
    return file.getvalue()


def _peak(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return max(points, key=lambda point: point[1])
