"""Claims about the page of `llm-jepa watch`: it shows what was seen, and obeys no text of a stranger."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from llm_jepa.stream.decoder import Caption
from llm_jepa.stream.frames import Frame
from llm_jepa.vl import watch_page as report
from llm_jepa.vl.watch import watch
from llm_jepa.vl.watch_page import (
    ScoreScale,
    Timeline,
    clock,
    film_link,
    film_name,
    merge_equal,
    one_line,
    write_report,
)
from tests.chromium import browser, until
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
        tags = [attrs for name, attrs in self.tags if name == tag]
        return [attrs for attrs in tags if css is None or css in (attrs.get("class") or "").split()]


def page(tmp_path, *, source="film.mp4", query="why?", captions=(), timeline=None, **options):
    numbers = {"num_windows": 40, "num_decodes": 4, "seconds": 20.0, **options}
    path = tmp_path / "report.html"
    write_report(path, source=source, query=query, captions=captions, timeline=timeline or Timeline(), **numbers)
    return path.read_text(encoding="utf-8")


EVIL = "</script></style></title><script>alert(1)</script><img src=x onerror=alert(1)>\" onclick='alert(2)' \u202e&amp;"


def test_no_text_of_a_stranger_becomes_markup(tmp_path):
    captions = [Caption(0, 5, 6, EVIL, 0.5, True), Caption(5, 9, 9, "plain", None, True)]
    plain = [Caption(0, 5, 6, "c", 0.5, True), captions[1]]
    usual = {"table": [("labels", ["e", "f"])], "no_film": "g", "scale": report.COSINE}
    strange = {"table": [("labels", [EVIL, EVIL])], "no_film": EVIL, "scale": report.COSINE}
    harmless = Page(page(tmp_path, source="a", query="b", captions=plain, details="d", **usual))
    text = page(tmp_path, source=EVIL, query=EVIL, captions=captions, details=EVIL, **strange)
    found = Page(text)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in harmless.tags]
    assert [set(attrs) for _, attrs in found.tags] == [set(attrs) for _, attrs in harmless.tags]
    assert "\u202e" not in text
    places = "title, heading, query, details, block, list, two labels, the line without a film"
    assert sum(one_line(EVIL) in word for word in found.words) == 9, places
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
    captions = [replace(caption, text=f"room {k}") for k, caption in enumerate(result.captions)]  # the model says one
    found = Page(page(tmp_path, captions=captions, timeline=timeline, seconds=result.seconds))
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
    assert {"0.25", "00:09.0–00:20.0"} <= {word.strip() for word in found.words}


def test_equal_neighbours_are_one_caption_with_the_mean_score_of_its_seconds():
    """0.4 for 1 s and 0.8 for 3 s: 0.7. A text that comes back later is another caption."""
    captions = [
        Caption(0, 1, 2, "one", 0.4, True), Caption(1, 4, 5, " one\n", 0.8, True), Caption(4, 6, 7, "two", 0.5, True),
        Caption(6, 7, 8, "one", 0.9, True), Caption(7, 9, 9, "one", None, True), Caption(9, 12, 12, "one", 0.1, True),
    ]  # fmt: skip
    merged = merge_equal(captions)
    assert [(c.start_s, c.end_s, one_line(c.text), count) for c, count in merged] == [
        (0, 4, "one", 2), (4, 6, "two", 1), (6, 12, "one", 3),
    ]  # fmt: skip
    assert [c.score for c, _ in merged] == [pytest.approx(0.7), 0.5, None]
    assert merge_equal([Caption(0, 1, 2, "one", np.nan, True)])[0][0].score is None
    assert merge_equal([]) == []


def test_merged_captions_keep_the_cuts_of_their_scenes(tmp_path):
    captions = [Caption(4 * k, 4 * k + 4, 4 * k + 5, text, 0.9, True) for k, text in enumerate(["a", "a", "b"])]
    found = Page(page(tmp_path, captions=captions, seconds=12))
    assert [float(attrs["x1"]) for attrs in found.all("line", "cut")] == [4, 8]
    assert [(attrs["data-start"], attrs["data-end"]) for attrs in found.all("button", "block")] == [
        ("0.000", "8.000"), ("8.000", "12.000"),
    ]  # fmt: skip
    assert {"2 scenes", "00:00.0–00:08.0", "3"} <= set(found.words)


def test_a_caption_of_low_score_is_marked_and_the_scale_says_what_that_means(tmp_path):
    """Below 0.5 is weak, 0.5 is not; a caption without a score is not judged. The scale ends at 0 and 1."""
    scores = [0.9, 0.499, 0.5, None, -0.2, 1.2]
    captions = [Caption(k, k + 1, k + 2, f"c{k}", score, True) for k, score in enumerate(scores)]
    text = page(tmp_path, captions=captions, scale=ScoreScale("cosine of the nearest text", 0.5, "why"))
    found = Page(text)
    assert [attrs["data-i"] for attrs in found.all("li", "weak")] == ["1", "4"]
    assert [attrs["data-i"] for attrs in found.all("button", "weak")] == ["1", "4"]
    assert found.words.count("weak") == 2
    ticks = [re.search(r"left:([\d.]+)%", a["style"])[1] for a in found.all("i") if "style" in a]
    assert ticks == ["90.00", "49.90", "50.00", "0.00", "100.00"]
    words = " ".join(" ".join(found.words).split())
    assert "The score of each caption: cosine of the nearest text. Below 0.50 (hatched) it is weak: why." in words
    without = Page(page(tmp_path, captions=captions))
    assert not without.all("figure") and not without.all("li", "weak"), "nobody said what the scores are"
    assert not Page(page(tmp_path, captions=captions[3:4], scale=report.COSINE)).all("figure")


@pytest.mark.parametrize(
    ("report", "film", "link"),
    [
        ("out/r.html", "out/film.mp4", "film.mp4"),
        ("r.html", "films/a b.mp4", "films/a%20b.mp4"),
        ("out/day 1/r.html", "films/2 %?#.mp4", "../../films/2%20%25%3F%23.mp4"),
        ("r.html", "javascript:x.mp4", "javascript%3Ax.mp4"),
        ("r.html", '"><b>é.mp4', "%22%3E%3Cb%3E%C3%A9.mp4"),
        ("out/../r.html", "./film.mp4", "film.mp4"),
    ],
)
def test_the_film_is_found_from_the_page(report, film, link, tmp_path, monkeypatch):
    """From the folder of the page, wherever the command was started."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert film_link(report, film) == film_link(tmp_path / report, tmp_path / film) == link
    folder = (tmp_path / report).parent.resolve()
    assert (folder / unquote(link)).resolve() == (tmp_path / film).resolve()


def test_a_link_that_would_spell_out_an_absolute_path_is_none():
    assert film_link("/home/ann/r.html", "/data/film.mp4") is None
    assert film_link("/r.html", "/data/film.mp4") is None
    assert film_link("/home/ann/r.html", "/home/ann/films/film.mp4") == "films/film.mp4"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/ann/films/a.mp4", "a.mp4"), ("-", "standard input"), ("webcam:0", "webcam:0"),
        ("https://ann:word@host/films/a.mp4?token=1#x", "a.mp4"), ("rtsp://ann:word@camera:554/", "camera"),
        ("http://[x/a", "stream"), ("a\u202eb\n.mp4", "a b .mp4"),
    ],
)  # fmt: skip
def test_a_film_has_its_own_name_only(source, name):
    assert film_name(source) == name


def test_a_page_with_a_film_may_load_it_and_nothing_else(tmp_path):
    text = page(tmp_path, film="films/a.mp4", captions=[Caption(0, 1, 2, "a", 0.5, True)])
    found = Page(text)
    assert [attrs["src"] for attrs in found.all("video")] == ["films/a.mp4"]
    policy = next(attrs["content"] for attrs in found.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:; media-src 'self' file:; style-src")
    assert "video" not in [tag for tag, _ in Page(page(tmp_path, no_film="a camera")).tags]


def test_in_a_browser_a_caption_plays_the_film_from_there(film, tmp_path):
    """From the page's folder into that of the film. A film that was moved is told in one line."""
    captions = [Caption(7 * k, 7 * k + 7, 7 * k + 8, f"room {k}", 0.9, True) for k in range(3)]
    for name, link in (("here", film_link(tmp_path / "here.html", film)), ("gone", "gone.mp4")):
        text = page(tmp_path, captions=captions, film=link, no_film="")
        (tmp_path / f"{name}.html").write_text(text)
    with browser() as chromium:
        chromium.get((tmp_path / "here.html").as_uri())
        until(chromium, "document.querySelector('video').readyState >= 1")
        chromium.find_elements("css selector", ".captions li")[1].click()
        until(chromium, "document.querySelector('video').currentTime == 7")
        until(chromium, "document.querySelector('.now p').innerText.startsWith('room 1')")
        chromium.execute_script("document.querySelector('video').currentTime = 15")
        until(chromium, "document.querySelector('.captions li.on').innerText.includes('room 2')")
        chromium.get((tmp_path / "gone.html").as_uri())
        until(chromium, "document.querySelector('video').hidden && !document.querySelector('.nofilm').hidden")


def test_a_page_without_anything_is_still_a_page(tmp_path):
    text = page(tmp_path, query="", num_windows=0, num_decodes=0, seconds=0.0)
    assert "decoded 0 of 0 windows: nothing to decode" in text and "no query" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"], "no temporary file stays"


def test_times_are_shown_as_a_clock():
    assert [clock(s) for s in (0, 12.5, 59.96, 61, 3599.97, 3661.25)] == [
        "00:00.0", "00:12.5", "01:00.0", "01:01.0", "1:00:00.0", "1:01:01.2",
    ]  # fmt: skip
