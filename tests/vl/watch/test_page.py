"""Claims about the page of `llm-jepa watch`: it shows what was seen, and obeys no text of a stranger."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llm_jepa.stream.decoder import Caption
from llm_jepa.stream.frames import Frame
from llm_jepa.vl import watch_page as report
from llm_jepa.vl.watch import watch
from llm_jepa.vl.watch_page import Timeline, clock, one_line, write_report
from tests.vl.watch.rooms import picture, rooms


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, css=None):
        return [attrs for name, attrs in self.tags if name == tag and css in (None, attrs.get("class"))]


def page(tmp_path, *, source="film.mp4", query="why?", captions=(), timeline=None, **options):
    numbers = {"num_windows": 40, "num_decodes": 4, "seconds": 20.0, **options}
    path = tmp_path / "report.html"
    write_report(path, source=source, query=query, captions=captions, timeline=timeline or Timeline(), **numbers)
    return path.read_text(encoding="utf-8")


EVIL = "</script></style></title><script>alert(1)</script><img src=x onerror=alert(1)>\" onclick='alert(2)' \u202e&amp;"


def test_no_text_of_a_stranger_becomes_markup(tmp_path):
    captions = [Caption(0, 5, 6, EVIL, 0.5, True), Caption(5, 9, 9, "plain", None, True)]
    harmless = Page(
        page(tmp_path, source="a", query="b", captions=[Caption(0, 5, 6, "c", 0.5, True), captions[1]], details="d")
    )
    text = page(tmp_path, source=EVIL, query=EVIL, captions=captions, details=EVIL)
    found = Page(text)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in harmless.tags]
    assert [set(attrs) for _, attrs in found.tags] == [set(attrs) for _, attrs in harmless.tags]
    assert "\u202e" not in text
    assert sum(one_line(EVIL) in word for word in found.words) == 6, "title, heading, query, details, block, list"
    assert one_line(EVIL) in found.all("button", "block")[0]["title"]


def test_a_page_needs_nothing_from_outside_and_runs_its_own_script_only(model, tmp_path):
    timeline = Timeline()
    result = watch(model, rooms(30), timeline=timeline)
    text = page(tmp_path, captions=result.captions, timeline=timeline)
    found = Page(text)
    for _, attrs in found.tags:
        assert not {"href", "srcset", "data", "action"} & set(attrs)
        assert attrs.get("src", "data:").startswith("data:")
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    policy = next(attrs["content"] for attrs in found.all("meta") if "http-equiv" in attrs)
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_film_curve_cuts_and_captions_share_one_axis(model, tmp_path):
    timeline = Timeline()
    frames = [Frame(100 + frame.time_s, frame.image) for frame in rooms(30)]  # a stream whose time starts at 100 s
    result = watch(model, frames, timeline=timeline)
    found = Page(page(tmp_path, captions=result.captions, timeline=timeline, seconds=result.seconds))
    assert result.captions[0].start_s == 100 and len(result.captions) == 4
    lane = found.all("div", "lane")[0]
    assert (float(lane["data-start"]), float(lane["data-seconds"])) == (100, 29.5)
    assert [float(attrs["data-t"]) for attrs in found.all("img") if "data-t" in attrs] == [100 + s for s in range(30)]
    starts = [float(attrs["data-start"]) for attrs in found.all("button", "block")]
    assert starts == pytest.approx([c.start_s for c in result.captions])
    cuts = [float(attrs["x1"]) for attrs in found.all("line", "cut")]
    assert cuts == pytest.approx([c.start_s - 100 for c in result.captions[1:]])
    for attrs, caption in zip(found.all("button", "block"), result.captions, strict=True):
        style = dict(part.split(":") for part in attrs["style"].split(";"))
        assert float(style["--at"]) == pytest.approx(caption.start_s - 100, abs=1e-3)
        assert float(style["--for"]) == pytest.approx(caption.end_s - caption.start_s, abs=1e-3)
    points = [tuple(map(float, p.split(","))) for p in found.all("polyline")[0]["points"].split()]
    assert len(points) == len(timeline.distances) == result.num_windows - 1
    assert points[0][0] == pytest.approx(1.0), "between the centres 0.75 and 1.25 of the first two windows"
    highest = min(points, key=lambda point: point[1])
    assert highest[1] == pytest.approx(6) and min(abs(highest[0] - cut) for cut in (7, 14, 21, 28)) <= 1


def test_the_curve_is_the_distance_of_neighbouring_windows():
    timeline = Timeline()
    for t, z in ((1, [0, 0]), (2, [3, 4]), (4, [3, 5])):
        timeline.add_window(t, np.array(z, np.float32))
    assert timeline.distances == [(1.5, 5.0), (3.0, 1.0)]


def test_a_day_takes_no_more_room_than_an_hour(tmp_path):
    """86 400 frames and 172 800 windows; the one jump among them is still in the curve, as high as it was."""
    timeline, image = Timeline(), picture(1, np.random.default_rng(0), 64)
    z, jump = np.zeros(2, np.float32), np.array([0.75, 0], np.float32)
    for k in range(86_400):
        timeline.add_frame(Frame(k, image))
        assert len(timeline.thumbnails) <= report.MAX_THUMBNAILS
    for k in range(172_800):
        timeline.add_window(k / 2, z if k < 100_001 else jump)
        assert len(timeline.distances) < report.MAX_POINTS
    assert max(timeline.distances, key=lambda point: point[1]) == (50_000.25, 0.75)
    times = [t for t, _ in timeline.thumbnails]
    assert len(times) > report.MAX_THUMBNAILS / 2 and set(np.diff(times)) == {256}, "a second, doubled eight times"
    captions = [Caption(30 * k, 30 * k + 30, 30 * k + 31, f"scene {k}", 0.5, True) for k in range(2880)]
    assert len(page(tmp_path, captions=captions, timeline=timeline, seconds=86_400)) < 4_000_000


def test_thumbnails_are_small_pictures_of_the_frames(model):
    timeline = Timeline()
    for k, (height, width) in enumerate([(90, 320), (32, 32), (900, 30)]):
        timeline.add_frame(Frame(k, np.full((height, width, 3), (200, 40, 90), np.uint8)))
    images = [Image.open(io.BytesIO(jpeg)) for _, jpeg in timeline.thumbnails]
    assert [(image.format, image.size) for image in images] == [
        ("JPEG", (160, 45)), ("JPEG", (160, 160)), ("JPEG", (160, 320)),
    ]  # fmt: skip
    assert np.abs(np.asarray(images[0], int) - (200, 40, 90)).max() <= 4


def test_provisional_captions_are_left_out_and_one_text_has_one_colour(tmp_path):
    captions = [
        Caption(0, 3, 4, "one", 0.5, False), Caption(0, 5, 6, "one", 0.5, True), Caption(5, 9, 9, "two", None, True),
        Caption(9, 20, 20, "one", 0.25, True),
    ]  # fmt: skip
    found = Page(page(tmp_path, captions=captions))
    hues = [re.search("--h:(\\d+)", attrs["style"])[1] for attrs in found.all("button", "block")]
    assert hues[0] == hues[2] != hues[1] and len(hues) == 3 == len(found.all("li"))
    assert "decoded 4 of 40 windows: 10.0 times fewer than one per window" in found.words
    assert {"0.25", "00:09.0–00:20.0"} <= set(found.words)


def test_a_page_without_anything_is_still_a_page(tmp_path):
    text = page(tmp_path, query="", num_windows=0, num_decodes=0, seconds=0.0)
    assert "decoded 0 of 0 windows: nothing to decode" in text and "no query" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"], "no temporary file stays"


def test_times_are_shown_as_a_clock():
    assert [clock(s) for s in (0, 12.5, 59.96, 61, 3599.97, 3661.25)] == [
        "00:00.0", "00:12.5", "01:00.0", "01:01.0", "1:00:00.0", "1:01:01.2",
    ]  # fmt: skip
