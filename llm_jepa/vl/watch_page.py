"""What `watch` saw as one HTML page for a person: film, curve and captions on one axis of time, nothing to fetch.

`Timeline` collects while the stream runs and keeps no more for hours than for minutes; `write_report` makes the page.
Captions, the query and the source are somebody else's text: all of it is escaped, and the page's own policy lets no
script run but the one below, and load nothing at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.files import write_whole
from ..stream.decoder import Caption
from ..stream.frames import Frame

MAX_THUMBNAILS = 400  # of 4 to 8 kB each: 2 to 4 MB of page
THUMBNAIL_PX = 160
MAX_POINTS = 4000
BLOCK_PX = 120  # the median caption is as wide before anybody zooms: three or four short words a line
MAX_SCALE = 40  # pixels a second to begin with, for streams of short scenes


class Timeline:
    """Thumbnails and the curve of a stream, thinned as it grows: half as many, twice as far apart.

    thumbnails: (seconds, JPEG), one per second at first, at most MAX_THUMBNAILS.
    distances: (seconds, ||z - z before||) of neighbouring windows, fewer than MAX_POINTS. Of those that fall together
        the largest is kept, so a peak stays as high.
    """

    def __init__(self) -> None:
        self.thumbnails: list[tuple[float, bytes]] = []
        self.distances: list[tuple[float, float]] = []
        self._every_s = 1.0
        self._next_s = -math.inf
        self._previous: tuple[float, NDArray[np.float32]] | None = None
        self._per_point = 1
        self._waiting: list[tuple[float, float]] = []  # of the point that is not full yet

    def add_frame(self, frame: Frame) -> None:
        """A frame, later than the one before. Most are not kept."""
        if frame.time_s < self._next_s:
            return
        first = self.thumbnails[0][0] if self.thumbnails else frame.time_s
        self.thumbnails.append((frame.time_s, _jpeg(frame.image)))
        if len(self.thumbnails) > MAX_THUMBNAILS:
            self.thumbnails, self._every_s = self.thumbnails[::2], 2 * self._every_s
        self._next_s = first + (math.floor((frame.time_s - first) / self._every_s + 1e-6) + 1) * self._every_s

    def add_window(self, time_s: float, embedding: NDArray[np.float32]) -> None:
        """The embedding [D] of the window with its centre at `time_s`."""
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
    """One self-contained page at `path`, complete from the moment it is there.

    Args:
        source, query, details: any text; details is what else the summary says.
        captions: in order. Provisional ones are left out: the final one of the same scene is there.
        seconds: of video.
    """
    final = [caption for caption in captions if caption.final]
    times = [t for t, _ in timeline.thumbnails] + [t for t, _ in timeline.distances]
    start_s = min([*times, *(c.start_s for c in final)], default=0.0)
    length_s = max([start_s + seconds, *times, *(c.end_s for c in final)]) - start_s
    length_s = max(length_s, 1.0)
    saved = f"{num_windows / num_decodes:.1f} times fewer than one per window" if num_decodes else "nothing to decode"
    facts = [
        (f"{num_decodes} of {num_windows}", f"decoded {num_decodes} of {num_windows} windows: {saved}"),
        (clock(seconds), "of video"),
        (str(len(final)), "scene" if len(final) == 1 else "scenes"),
    ]
    colours = {text: index for index, text in enumerate(dict.fromkeys(one_line(c.text) for c in final))}
    script = _SCRIPT.strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    median = statistics.median(c.end_s - c.start_s for c in final) if final else length_s
    scale = min(BLOCK_PX / max(median, 1e-3), MAX_SCALE)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(source)} · llm-jepa watch</title>
<style>{_STYLE.strip()}</style>
</head>
<body>
<header>
<h1><bdi>{_text(source)}</bdi></h1>
<p class="query">{f"<bdi>{_text(query)}</bdi>" if query else "no query"}</p>
<dl>{"".join(f"<div><dt>{big}</dt><dd>{small}</dd></div>" for big, small in facts)}</dl>
{f'<p class="details">{_text(details)}</p>' if details else ""}
</header>
<main>
<div class="overview" title="the whole stream; click to go there">{_overview(final, colours, start_s, length_s)}\
<i class="view"></i></div>
<div class="tools"><label>zoom <input type="range" id="zoom" min="0" max="100" step="0.5"></label>
<button id="fit">fit</button><output id="time"></output></div>
<div class="scroll" tabindex="0"><div class="lane" data-start="{start_s:.3f}" data-seconds="{length_s:.3f}" \
data-scale="{scale:.3f}" style="--seconds:{length_s:.3f};--px:{scale:.3f}">
<div class="ticks"></div>
<div class="strip">{_film(timeline)}</div>
{_curve(timeline, final, start_s, length_s)}
<div class="blocks">{_blocks(final, colours, start_s)}</div>
<i class="cursor" hidden></i>
</div></div>
<p class="legend">film · distance between the embeddings of neighbouring windows, largest \
{max((d for _, d in timeline.distances), default=0.0):.3f}, dashed: where a scene ends · captions</p>
<div class="now" hidden><img alt=""><p></p></div>
<ol class="captions">{_list(final, colours)}</ol>
</main>
<script>{script}</script>
</body>
</html>
"""
    write_whole(path, page)


def clock(seconds: float) -> str:
    """12.5 -> 00:12.5, one hour and more -> 1:00:12.5. Tenths, rounded to the nearest."""
    tenths = round(abs(seconds) * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    shown = f"{minutes:02d}:{rest // 10:02d}.{rest % 10}"
    return ("-" if seconds < 0 and tenths else "") + (f"{hours}:{shown}" if hours else shown)


def one_line(text: str) -> str:
    """A stranger's text on one line, without control characters: no line breaks, terminal escapes, bidi overrides or
    lone surrogates."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    small = Image.fromarray(image)
    height = max(1, round(image.shape[0] * THUMBNAIL_PX / image.shape[1]))
    # Small pictures are enlarged without smoothing, so that their pixels stay what the model saw.
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


def _text(text: str) -> str:
    return html.escape(one_line(text), quote=True)


def _score(caption: Caption) -> str:
    return "" if caption.score is None else f"{caption.score:.2f}"


def _span(caption: Caption) -> str:
    return f"{clock(caption.start_s)}–{clock(caption.end_s)}"


def _hue(text: str, colours: dict[str, int]) -> float:
    """One per text, so that what comes back is seen to; the golden angle keeps neighbours apart."""
    return (25 + 137.508 * colours[one_line(text)]) % 360


def _film(timeline: Timeline) -> str:
    return "".join(
        f'<img data-t="{t:.3f}" alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
        for t, jpeg in timeline.thumbnails
    )


def _curve(timeline: Timeline, final: Sequence[Caption], start_s: float, length_s: float) -> str:
    """In seconds by 0..100, stretched to the lane by the browser: zooming needs no redrawing."""
    top = max((d for _, d in timeline.distances), default=0.0) or 1.0
    points = [(t - start_s, 100 - 94 * d / top) for t, d in timeline.distances]
    line = " ".join(f"{x:.2f},{y:.1f}" for x, y in points)
    area = f"{points[0][0]:.2f},100 {line} {points[-1][0]:.2f},100" if points else ""
    cuts = "".join(
        f'<line class="cut" x1="{c.start_s - start_s:.2f}" x2="{c.start_s - start_s:.2f}" y1="0" y2="100"/>'
        for c in final[1:]
    )
    return (
        f'<svg class="curve" viewBox="0 0 {length_s:.3f} 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<polygon points="{area}"/><polyline points="{line}"/>{cuts}</svg>'
    )


def _blocks(final: Sequence[Caption], colours: dict[str, int], start_s: float) -> str:
    return "".join(
        f'<button class="block" data-i="{i}" data-start="{c.start_s:.3f}" data-end="{c.end_s:.3f}" '
        f'title="{_text(f"{_span(c)}  {c.text}  {_score(c)}")}" '
        f'style="--h:{_hue(c.text, colours):.0f};--at:{c.start_s - start_s:.3f};--for:{c.end_s - c.start_s:.3f}">'
        f"<bdi>{_text(c.text)}</bdi></button>"
        for i, c in enumerate(final)
    )


def _overview(final: Sequence[Caption], colours: dict[str, int], start_s: float, length_s: float) -> str:
    return "".join(
        f'<b style="--h:{_hue(c.text, colours):.0f};left:{100 * (c.start_s - start_s) / length_s:.3f}%;'
        f'width:{100 * (c.end_s - c.start_s) / length_s:.3f}%"></b>'
        for c in final
    )


def _list(final: Sequence[Caption], colours: dict[str, int]) -> str:
    return "".join(
        f'<li data-i="{i}" style="--h:{_hue(c.text, colours):.0f}"><span class="when">{_span(c)}</span>'
        f'<span class="said"><bdi>{_text(c.text)}</bdi></span><span class="score">{_score(c)}</span></li>'
        for i, c in enumerate(final)
    )


_STYLE = re.sub(
    r"\n\s*",
    "\n",
    """
    :root { color-scheme: light dark; --back: #fbfaf7; --ink: #1d1d1f; --soft: #6d6d72; --line: #dcdad3; --card: #fff;
      --light: 86%; --sat: 62%; --on: #16161a; --curve: #5b5bd6; }
    @media (prefers-color-scheme: dark) { :root { --back: #131316; --ink: #ececf0; --soft: #9a9aa4; --line: #2c2c33;
      --card: #1c1c21; --light: 30%; --sat: 42%; --on: #f2f2f5; --curve: #9d9dff; } }
    * { box-sizing: border-box; }
    body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 84rem; background: var(--back); color: var(--ink);
      font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "Open Sans", sans-serif; }
    h1 { margin: 0; font-size: 1.5rem; letter-spacing: -0.01em; overflow-wrap: anywhere; }
    .query { margin: 0.15rem 0 1rem; color: var(--soft); font-style: italic; }
    .details, .legend { color: var(--soft); font-size: 0.85rem; margin: 0.4rem 0 1rem; }
    dl { display: flex; flex-wrap: wrap; gap: 0.6rem 2.2rem; margin: 0 0 0.8rem; }
    dt { font-size: 1.7rem; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
    dd { margin: 0; color: var(--soft); font-size: 0.85rem; }
    .overview { position: relative; height: 18px; border-radius: 6px; overflow: hidden; background: var(--line);
      cursor: pointer; margin-top: 1.2rem; }
    .overview b { position: absolute; top: 0; bottom: 0; background: hsl(var(--h) var(--sat) 58%);
      box-shadow: inset 1px 0 var(--back); }
    .overview .view { position: absolute; top: 0; bottom: 0; border: 2px solid var(--ink); border-radius: 6px;
      pointer-events: none; }
    .tools { display: flex; gap: 1rem; align-items: center; margin: 0.6rem 0; color: var(--soft); font-size: 0.85rem; }
    .tools label { display: flex; gap: 0.5rem; align-items: center; }
    .tools button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
      border-radius: 6px; padding: 0.1rem 0.7rem; cursor: pointer; }
    output { margin-left: auto; font-variant-numeric: tabular-nums; }
    .scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
      scrollbar-width: thin; }
    .lane { position: relative; width: calc(var(--seconds) * var(--px) * 1px); min-width: 100%; }
    .ticks { position: relative; height: 24px; font-size: 11px; color: var(--soft);
      font-variant-numeric: tabular-nums; }
    .ticks span { position: absolute; bottom: 2px; padding-left: 4px; border-left: 1px solid var(--soft);
      line-height: 1.2; white-space: nowrap; }
    .strip { position: relative; height: 92px; background: #000; overflow: hidden; }
    .strip img { position: absolute; top: 3px; height: 86px; border-radius: 3px; }
    .curve { display: block; width: 100%; height: 90px; overflow: visible; }
    .curve polygon { fill: var(--curve); opacity: 0.16; }
    .curve polyline { fill: none; stroke: var(--curve); stroke-width: 1.5; stroke-linejoin: round;
      vector-effect: non-scaling-stroke; }
    .curve.dense .cut { display: none; }
    .curve .cut { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; vector-effect: non-scaling-stroke; }
    .blocks { position: relative; height: 104px; }
    .block { position: absolute; top: 0; bottom: 6px; left: calc(var(--at) * var(--px) * 1px);
      width: calc(var(--for) * var(--px) * 1px); padding: 5px 6px; overflow: hidden; text-align: left; font: inherit;
      font-size: 12.5px; line-height: 1.25; overflow-wrap: anywhere; color: var(--on); cursor: pointer;
      background: hsl(var(--h) var(--sat) var(--light)); border: 0; border-left: 2px solid var(--card);
      border-radius: 7px; display: flex; align-items: flex-start; justify-content: flex-start; }
    .block.thin { padding: 5px 0; justify-content: center; } .block.thin bdi { writing-mode: vertical-rl;
      font-size: 11px; white-space: nowrap; max-height: 100%; overflow: hidden; text-overflow: ellipsis; }
    .block.bare { border: 0; }
    .block.bare bdi { display: none; }
    .block.on, .block:focus-visible { outline: 2px solid var(--ink); outline-offset: -2px; z-index: 2; }
    .cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--ink); pointer-events: none; }
    .now { display: flex; gap: 1rem; align-items: center; min-height: 108px; }
    .now[hidden] { display: none; }
    .now img { width: 192px; height: 108px; object-fit: contain; border-radius: 8px; background: #000; }
    .now p { margin: 0; font-size: 1.25rem; }
    .now small { display: block; color: var(--soft); font-size: 0.85rem; font-variant-numeric: tabular-nums; }
    .captions { list-style: none; margin: 1.2rem 0 0; padding: 0; }
    .captions li { display: grid; grid-template-columns: 10.5rem 1fr 3rem; gap: 0.8rem; padding: 0.32rem 0.7rem;
      border-left: 5px solid hsl(var(--h) var(--sat) 58%); border-radius: 4px; cursor: pointer; margin-bottom: 3px; }
    .captions li.on { background: hsl(var(--h) var(--sat) var(--light)); color: var(--on); }
    .when, .score { color: var(--soft); font-variant-numeric: tabular-nums; } .on .when, .on .score { color: inherit; }
    .score { text-align: right; } .said { overflow-wrap: anywhere; }
    @media (max-width: 40rem) { .captions li { grid-template-columns: 1fr 3rem; } .when { grid-column: 1 / -1; } }
    """,
)

_SCRIPT = """
"use strict";
const all = (selector) => [...document.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);
const lane = one(".lane"), view = one(".scroll"), zoom = one("#zoom"), cursor = one(".cursor"), now = one(".now");
const start = +lane.dataset.start, seconds = +lane.dataset.seconds;
const film = all(".strip img"), blocks = all(".block"), items = all(".captions li");
let scale = 1;  // pixels a second
const fit = () => view.clientWidth / seconds;
const most = () => Math.max(160, 4 * fit());
const pad = (number) => String(number).padStart(2, "0");
function clock(t, digits) {
  const tenths = Math.round(t * 10), s = Math.floor(tenths / 10) % 60, m = Math.floor(tenths / 600);
  const hours = m >= 60 ? Math.floor(m / 60) + ":" : "";
  return hours + pad(m % 60) + ":" + pad(s) + (digits ? "." + tenths % 10 : "");
}
function ticks() {
  const every = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200].find((s) => s * scale >= 72) || 14400;
  const marks = [];
  for (let t = Math.ceil(start / every) * every; t <= start + seconds; t += every) {
    const mark = document.createElement("span");
    mark.textContent = clock(t, false);
    mark.style.left = (t - start) * scale + "px";
    if ((start + seconds - t) * scale > 40) marks.push(mark);
  }
  one(".ticks").replaceChildren(...marks);
}
function show(wanted) {  // keeps the moment in the middle where it is
  const middle = (view.scrollLeft + view.clientWidth / 2) / scale;
  scale = Math.min(Math.max(wanted, fit()), most());
  lane.style.setProperty("--px", scale);
  zoom.value = 100 * Math.log(scale / fit()) / Math.log(most() / fit());
  let until = 0;
  for (const picture of film) {  // whole ones, each at its time, none over another
    const x = (picture.dataset.t - start) * scale;
    picture.hidden = x < until - 0.5;
    if (picture.hidden) continue;
    picture.style.left = x + "px";
    until = x + 88 * picture.naturalWidth / picture.naturalHeight;
  }
  one(".curve").classList.toggle("dense", scale * seconds < 5 * blocks.length);
  for (const block of blocks) {
    const width = (block.dataset.end - block.dataset.start) * scale;
    block.classList.toggle("thin", width < 56);
    block.classList.toggle("bare", width < 15);
  }
  ticks();
  view.scrollLeft = middle * scale - view.clientWidth / 2;
  moved();
}
function moved() {
  const frame = one(".view").style, whole = lane.offsetWidth;
  frame.left = 100 * view.scrollLeft / whole + "%";
  frame.width = 100 * view.clientWidth / whole + "%";
}
function light(i, t) {
  for (const list of [blocks, items]) list.forEach((node) => node.classList.toggle("on", +node.dataset.i === i));
  now.hidden = i < 0;
  if (i < 0) return;
  const block = blocks[i], moment = t === undefined ? (+block.dataset.start + +block.dataset.end) / 2 : t;
  let near = null;
  for (const picture of film) if (!near || +picture.dataset.t <= moment) near = picture;
  if (near) now.querySelector("img").src = near.src;
  const text = now.querySelector("p"), about = document.createElement("small");
  const score = items[i].querySelector(".score").textContent;
  about.textContent = items[i].querySelector(".when").textContent + (score ? " \\u00b7 score " + score : "");
  text.replaceChildren(block.textContent, about);
}
function go(i) {
  const middle = (+blocks[i].dataset.start + +blocks[i].dataset.end) / 2 - start;
  view.scrollTo({ left: middle * scale - view.clientWidth / 2, behavior: "smooth" });
  light(i);
}
lane.addEventListener("mousemove", (event) => {
  const x = event.clientX - lane.getBoundingClientRect().left, t = start + x / scale;
  cursor.hidden = false;
  cursor.style.left = x + "px";
  one("#time").textContent = clock(t, true);
  light(blocks.findIndex((block) => +block.dataset.start <= t && t < +block.dataset.end), t);
});
lane.addEventListener("mouseleave", () => { cursor.hidden = true; });
blocks.forEach((block, i) => {
  block.addEventListener("focus", () => light(i));
  block.addEventListener("click", () => {
    light(i);
    items[i].scrollIntoView({ block: "nearest", behavior: "smooth" });
  });
});
items.forEach((item, i) => item.addEventListener("click", () => go(i)));
view.addEventListener("scroll", moved);
one(".overview").addEventListener("click", (event) => {
  const box = event.currentTarget.getBoundingClientRect();
  view.scrollLeft = (event.clientX - box.left) / box.width * lane.offsetWidth - view.clientWidth / 2;
});
zoom.addEventListener("input", () => show(fit() * (most() / fit()) ** (zoom.value / 100)));
one("#fit").addEventListener("click", () => show(0));
addEventListener("resize", () => show(scale));
addEventListener("load", () => {  // pictures have no width before
  show(+lane.dataset.scale);
  view.scrollLeft = 0;
  light(blocks.length ? 0 : -1);
});
"""
