"""Claims about the page of a VL-JEPA: it shows what `watch` and `answer` give, and every error is one line of it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytest.importorskip("gradio")
pytest.importorskip("av")

from llm_jepa.demo import vl
from llm_jepa.stream.opening import open_frames
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.watch import WatchSettings, watch
from tests.vl.watch.rooms import FPS, build, video, with_texts

EVIL = "<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} @children \u202e"


@pytest.fixture(scope="module")
def model():
    return with_texts(*build())


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """24 s, a new room at 7, 14 and 21 s."""
    return str(video(tmp_path_factory.mktemp("film") / "rooms.mp4", 24))


def test_the_page_shows_the_captions_and_counts_of_watch(model, film):
    film_on_page = vl.Watching(model, WatchSettings.resolve(model, provisional=True))
    counts = [film_on_page.num_windows for _ in film_on_page.run(film)]
    with open_frames(film, fps=FPS) as frames:
        result = watch(model, frames, provisional=True)
    assert counts == list(range(1, 46)), "one step a window, so the page can show it"
    scores = [caption.score for caption in result.captions]  # `watch` predicts the windows of a film in batches
    assert [caption.score for caption in film_on_page.captions] == pytest.approx(scores, abs=1e-6)
    on_page = [replace(caption, score=0) for caption in film_on_page.captions]
    assert on_page == [replace(caption, score=0) for caption in result.captions] and len(on_page) == 4
    assert (film_on_page.num_windows, film_on_page.num_decodes) == (result.num_windows, result.num_decodes)
    assert film_on_page.num_saved == 45 - result.num_decodes > 0


def test_captions_come_while_the_film_runs_and_the_last_page_is_complete(model, film, monkeypatch):
    monkeypatch.setattr(vl, "EVERY_S", 0.0)
    first, *pages, last = vl.watching(model, film, "", "", 1.0)
    assert "Opening" in first and len(pages) == 45
    captions = [page.count("<li ") for page in pages]
    assert captions[0] <= 1 and captions == sorted(captions) and captions[-1] == last.count("<li ") == 4
    assert any("…</em>" in page for page in pages) and "…</em>" not in last, "provisional ones are replaced"
    saved = re.search(r"<b>(\d+)</b><small>decodes saved", last)[1]
    decoded = re.search(r"<b>(\d+) of 45</b><small>windows decoded", last)[1]
    assert int(saved) + int(decoded) == 45
    assert last.count('class="cut"') == 3 and len(re.search('polyline points="([^"]*)"', last)[1].split()) == 44


def test_labels_caption_and_no_text_of_a_stranger_becomes_markup(model, film):
    *_, last = vl.watching(VLJEPA(model.model, model.processor), film, "", EVIL, 1.0)
    assert "&lt;img src=x" in last and "<img" not in last
    assert not set("${}@`\u202e") & set(last)
    reply = vl.answer(model, film, "", EVIL, None, None)
    assert "&lt;img src=x" in reply and not set("${}@`\u202e") & set(reply)


def test_an_answer_ranks_the_candidates_as_the_model_does(model, film):
    texts = ["a red room", "a green room", "nothing at all"]
    for question, ranked in (
        ("which room?", model.answer(film, "which room?", texts)),
        (" ", model.classify(film, texts)),
    ):
        reply = vl.answer(model, film, question, "\n".join(["", *texts, texts[0]]), None, None)
        assert re.findall(r"<span(?: class=first)?>([a-z ]+)</span>", reply) == [match.text for match in ranked]
        assert re.findall(r"<span>(-?[\d.]+)</span>", reply) == [f"{match.score:.2f}" for match in ranked]
    part = vl.answer(model, film, "", "a red room", 7.5, 13.0)
    assert "a red room" in part and part != vl.answer(model, film, "", "a red room", 0.0, 6.5)


def test_errors_are_one_line_without_a_path_of_this_machine(model, film, tmp_path):
    (tmp_path / "film.mp4").write_text("this is not a film")
    long = video(tmp_path / "long.mp4", 603, rate=1, size=16)
    cases = [
        (list(vl.watching(model, None, "", "", 1.0))[-1], "There is no film yet"),
        (list(vl.watching(model, str(tmp_path / "film.mp4"), "", "", 1.0))[-1], "film.mp4: cannot be opened"),
        (list(vl.watching(VLJEPA(model.model, model.processor), film, "", "", 1.0))[-1], "no y_decoder"),
        (list(vl.watching(model, film, "", "\n".join(map(str, range(101))), 1.0))[-1], "101 labels; give at most 100"),
        (list(vl.watching(model, film, "why " * 100, "", 1.0))[-1], "more than 300 characters"),
        (vl.answer(model, film, "", "", None, None), "one candidate answer a line"),
        (vl.answer(model, film, "", "a", 30.0, None), "no frame from 30"),
        (vl.answer(model, str(tmp_path / "film.mp4"), "", "a", None, None), "film.mp4: cannot be opened"),
        (vl.answer(model, str(long), "", "a", None, None), "longer than 600 s"),
    ]
    for page, message in cases:
        assert page.count('role="alert"') == 1 and message in page, message
        assert str(tmp_path) not in page and "\n" not in page.strip()


def test_a_film_that_breaks_off_keeps_what_was_seen(model, tmp_path):
    """Raw H.264 of 64 x 64, then of 128 x 128, which no stream may do."""
    parts = [video(tmp_path / f"{size}.h264", 12, size=size, rate=25).read_bytes() for size in (64, 128)]
    (tmp_path / "a.h264").write_bytes(b"".join(parts))
    *_, last = vl.watching(model, str(tmp_path / "a.h264"), "", "", 1.0)
    assert "128x128" in last and 'role="alert"' in last and "decodes saved" in last
