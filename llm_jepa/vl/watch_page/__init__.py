"""A stream that `watch` has seen as one HTML page: what happened, when, how sure that is, and what it cost.

`Timeline` collects while the stream runs, in a size that does not grow with it; `write_report` renders
`page.html.jinja` with `page.css` and `page.js` inside, so the page fetches nothing but the film. Captions, labels, the
query and the names of film and model are texts of strangers: the template escapes all of them, and the page's own
policy allows no script but page.js, and no loading but a film beside the page. No absolute path is in the page.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

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


class ScoreScale(NamedTuple):
    """What scores are, and below which one a caption is marked as weak. The limits are ours, not calibrated."""

    meaning: str
    weak_below: float
    reason: str


COSINE = ScoreScale(
    "cosine between what was seen and the nearest known text", 0.71,
    "the text accounts for less than half of what was seen (cosine² < 1/2)",
)  # fmt: skip
PROBABILITY = ScoreScale(
    "geometric mean probability of its words", 0.5, "a word of the text was, in the mean, less likely than not"
)


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
    film: str | None = None,
    no_film: str = "",
    scale: ScoreScale | None = None,
    table: Sequence[tuple[str, Sequence[str]]] = (),
) -> None:
    """Write one self-contained page to `path`; it is complete from the moment it is there.

    Args:
        source, query, details: any text; `details` is added to the cost.
        captions: in order. Provisional ones are left out, because the final one of the same scene is there. Equal
            neighbours become one.
        seconds: of video.
        film: its address relative to the page, of `film_link`; then the page plays it.
        no_film: otherwise one line that says why not.
        scale: of the scores; without one no caption is marked as weak.
        table: rows of a name and its values: model, date, settings, labels.
    """
    final = [caption for caption in captions if caption.final]
    merged = merge_equal(final)
    start_s, length_s = _axis(final, timeline, seconds)
    durations = [caption.end_s - caption.start_s for caption, _ in merged] or [length_s]
    curve_line, curve_area = _curve(timeline, start_s)
    script = _asset("page.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_asset("page.html.jinja")).render(
        source=one_line(source),
        query=one_line(query),
        details=one_line(details),
        facts=_facts(num_windows, num_decodes, seconds, len(final)),
        scenes=_scenes(merged, start_s, length_s, scale),
        cuts=[caption.start_s - start_s for caption in final[1:]],
        scores=scale,
        film=film,
        no_film=one_line(no_film),
        table=[(name, [one_line(value) for value in values]) for name, values in table],
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


def merge_equal(final: Sequence[Caption]) -> list[tuple[Caption, int]]:
    """Neighbours of the same text as one caption, with the number of scenes in it.

    Its score is the mean of theirs, weighted by duration; None if one of them has none, or one that is not finite.
    """
    merged: list[tuple[Caption, int]] = []
    for caption in final:
        if caption.score is not None and not math.isfinite(caption.score):
            caption = replace(caption, score=None)
        if not merged or one_line(merged[-1][0].text) != one_line(caption.text):
            merged.append((caption, 1))
            continue
        before, count = merged[-1]
        score = None
        if before.score is not None and caption.score is not None:
            lengths = before.end_s - before.start_s, caption.end_s - caption.start_s
            score = float(np.average([before.score, caption.score], weights=np.maximum(lengths, 1e-9)))
        merged[-1] = replace(caption, start_s=before.start_s, score=score), count + 1
    return merged


def film_link(report: str | Path, film: str | Path) -> str | None:
    """The address of a film relative to the folder of the report, percent-encoded.

    None if the two have only the root of the file system in common: such an address would spell out an absolute path,
    and would break as soon as either is moved.
    """
    folder, file = os.path.abspath(Path(report).parent), os.path.abspath(film)
    try:
        common = os.path.commonpath([folder, file])
    except ValueError:  # two drives
        return None
    if os.path.dirname(common) == common:
        return None
    return quote(Path(os.path.relpath(file, folder)).as_posix())


def film_name(source: str) -> str:
    """The name of a source without its folder, and without the password and parameters of an address."""
    if source == "-":
        return "standard input"
    if "://" in source:
        try:
            address = urlsplit(source)
            return one_line(Path(address.path).name or address.hostname or "stream")
        except ValueError:
            return "stream"
    if source.startswith(("webcam:", "lavfi:")):
        return one_line(source)
    return one_line(Path(source).name)


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
    """A caption as the template shows it. `offset_s` counts from the start of the axis.

    note: how many scenes it is, if several.  score_percent: of the scale from 0 to 1.
    """

    text: str
    title: str
    span: str
    note: str
    score: str
    score_percent: float
    is_weak: bool
    hue: float
    start_s: float
    end_s: float
    offset_s: float
    length_s: float
    left_percent: float
    width_percent: float


def _scenes(
    merged: Sequence[tuple[Caption, int]], start_s: float, length_s: float, scale: ScoreScale | None
) -> list[_Scene]:
    numbers: dict[str, int] = {}  # text -> in which order the texts came up
    scenes = []
    for caption, count in merged:
        text = one_line(caption.text)
        number = numbers.setdefault(text, len(numbers))
        span = f"{clock(caption.start_s)}–{clock(caption.end_s)}"
        score = "" if caption.score is None else f"{caption.score:.2f}"
        is_weak = scale is not None and caption.score is not None and caption.score < scale.weak_below
        note = f"{count} scenes" if count > 1 else ""
        offset_s, duration_s = caption.start_s - start_s, caption.end_s - caption.start_s
        scenes.append(
            _Scene(
                text=text,
                title=one_line(f"{span} {text} {score}{' weak' if is_weak else ''}"),
                span=span,
                note=note,
                score=score,
                score_percent=100 * min(max(caption.score or 0.0, 0.0), 1.0),
                is_weak=is_weak,
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
