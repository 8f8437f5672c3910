"""Claims about `watch`: what is decoded, which captions it emits, and what ends a stream."""

from __future__ import annotations

import contextlib
import json
import math
import signal

import numpy as np
import pytest
import torch

from llm_jepa.core.errors import UserError
from llm_jepa.stream.decoder import Caption, SelectiveDecoder
from llm_jepa.stream.frames import Frame, windows
from llm_jepa.stream.opening import open_frames
from llm_jepa.stream.segments import WardSegmenter
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.sliding import SlidingEncoder
from llm_jepa.vl.watch import MAX_FAILURES, default_fps, to_json, to_srt, watch
from tests.vl.watch.rooms import FPS, build, calls, picture, rooms, windows_embedded, with_texts

# -- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provisional", [False, True])
def test_watch_is_windows_embed_segment_decode(model, provisional):
    """The same four steps by hand. 2 s of window by 0.5 s of stride: a block of 4. Only the ends differ: a stream's
    first scene starts with its first window (0 s, not its centre 0.75), its last ends with the last one (29.5)."""
    segmenter = WardSegmenter(block=4, min_duration_s=1.5)
    by_hand = SelectiveDecoder(
        lambda window: model.embed([window.frames], "why?")[0].numpy(),
        lambda z: tuple(model.decode(torch.tensor(z)[None])[0]),
        segmenter,
        provisional_after_s=1.0 if provisional else None,
    )
    expected = []
    for window in windows(rooms(30), num_frames=4, stride_s=0.5, fps=2.0):
        expected += by_hand.step(window, window.start_s, window.end_s)
    expected += by_hand.finish()
    heard = []
    result = watch(model, rooms(30), query="why?", provisional=provisional, on_caption=heard.append)
    assert [(c.text, c.score, c.final, c.emitted_s) for c in heard] == [
        (c.text, c.score, c.final, c.emitted_s) for c in expected
    ]
    assert [c.start_s for c in heard if c.start_s] == [c.start_s for c in expected if c.start_s != 0.75]
    assert [c.end_s for c in heard[:-1]] == [c.end_s for c in expected[:-1]]
    assert heard[0].start_s == 0 and heard[-1].end_s == 29.5 != expected[-1].end_s
    assert result.captions == tuple(c for c in heard if c.final)
    assert (result.num_windows, result.num_decodes) == (by_hand.num_windows, by_hand.num_decodes)
    assert result.query == "why?" and result.seconds == 29.5 and not result.lost


def test_a_scene_is_found_for_every_room_and_they_cover_the_stream(model):
    captions = watch(model, rooms(35)).captions
    assert [c.start_s for c in captions[1:]] == pytest.approx([7, 14, 21, 28], abs=0.8)
    assert [c.end_s for c in captions[:-1]] == [c.start_s for c in captions[1:]]
    assert (captions[0].start_s, captions[-1].end_s) == (0, 34.5)


def test_a_film_that_leaves_out_what_repeats_is_the_same_film(model):
    """Screen recorders write a frame only when something changes. 24 s of four rooms: 48 frames, or 5 of them."""
    images = [picture(k // 14, np.random.default_rng(k // 14)) for k in range(48)]
    every = [(k / FPS, image) for k, image in enumerate(images)]
    changes = [every[k] for k in (0, 14, 28, 42, 47)]
    with open_frames(every, live=False) as all_frames, open_frames(changes, live=False) as few_frames:
        expected, found = watch(model, all_frames), watch(model, few_frames)
    assert len(expected.captions) == 4 and found.captions == expected.captions
    assert found.num_windows == expected.num_windows == 45


@pytest.mark.parametrize("provisional", [False, True])
def test_a_still_video_decodes_once(model, provisional):
    still = np.full((32, 32, 3), 90, np.uint8)
    result = watch(model, (Frame(k / 2, still) for k in range(80)), provisional=provisional)
    assert (result.num_decodes, result.num_windows, len(result.captions)) == (1, 77, 1)


def test_what_was_said_does_not_depend_on_what_follows(model):
    """20 s and 40 s of one stream: all events of the first but those of its end, in order, open the second."""
    short, long = [], []
    watch(model, rooms(20), provisional=True, on_caption=short.append)
    watch(model, rooms(40), provisional=True, on_caption=long.append)
    assert len([c for c in short if c.final]) >= 3
    assert short[:-1] == long[: len(short) - 1]
    last_s = short[-1].emitted_s
    assert [c for c in long if c.emitted_s <= last_s] == short[:-1], "nothing more was known at that time"


def test_the_options_reach_the_segmenter_the_windows_and_the_query(model, monkeypatch):
    asked, seen = calls(monkeypatch, SlidingEncoder, "__init__"), windows_embedded(monkeypatch)
    assert len(watch(model, rooms(30), threshold=1e9).captions) == 1
    assert asked[0][1] == "What happens in the video?" and len(seen) == 57
    assert len(watch(model, rooms(30), min_duration_s=12).captions) < len(watch(model, rooms(30)).captions)
    assert len(watch(model, rooms(30), sensitivity=1e-9).captions) == 1
    seen.clear()
    asked.clear()
    result = watch(model, rooms(30), stride_s=1.5, query="")
    assert result.query == "" and asked[0][1] == "" and len(seen) == 20 - 1
    seen.clear()
    fast = watch(model, rooms(10, rate=8), fps=4, max_seconds=6)
    assert fast.captions[-1].end_s == 5.75 and fast.seconds == 5.875, "of frames 0 .. 47 every second one is used"
    assert (seen[0][0].frames == np.stack([f.image for f in rooms(1, rate=8)][:8:2])).all()


def test_a_block_of_windows_is_one_window_long(model, monkeypatch):
    """A scene lasts 3/4 of a window or more."""
    blocks = []
    original = WardSegmenter.__init__
    monkeypatch.setattr(
        WardSegmenter,
        "__init__",
        lambda self, **o: (blocks.append((o["block"], o["min_duration_s"])), original(self, **o))[1],
    )
    for stride_s, fps in ((0.5, None), (0.25, 2), (2, None), (0.5, 8)):
        watch(model, rooms(3), stride_s=stride_s, fps=fps)
    assert blocks == [(4, 1.5), (8, 1.5), (3, 1.5), (3, 0.375)], "2 s / 0.5 s; at least 3"


@pytest.mark.parametrize(("num_frames", "stride_s", "fps"), [(16, 0.5, 8), (4, 0.5, 2), (1, 0.5, 2), (2, 0.25, 4)])
def test_a_window_lasts_two_seconds_if_it_has_frames_enough(num_frames, stride_s, fps):
    assert default_fps(num_frames, stride_s) == fps


def test_a_model_of_single_images_and_a_stream_of_one_image_work():
    images = with_texts(*build(num_frames=1))
    result = watch(images, rooms(14))
    assert (result.num_windows, len(result.captions)) == (28, 2)
    one = watch(images, rooms(0.5))
    assert [(c.start_s, c.end_s) for c in one.captions] == [(0, 0.5)]


def test_without_y_decoder_it_fails_before_the_first_frame(model):
    def frames():
        raise AssertionError("a frame was asked for")
        yield

    with pytest.raises(UserError, match="no y_decoder"):
        watch(VLJEPA(model.model, model.processor), frames())


@pytest.mark.parametrize("wrong", [{"stride_s": 0}, {"fps": math.nan}, {"max_seconds": -1}, {"sensitivity": 0}])
def test_numbers_out_of_range_are_refused(model, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        watch(model, rooms(3), **wrong)


# -- what must not end a stream --------------------------------------------------------------------------------------


def test_odd_frames_are_resized_or_left_out_and_counted(model):
    """Four frames of another size; one float, one grey, one without time, one from the far future, one that is late."""
    good = list(rooms(30))
    mixed = list(good)
    for k in range(10, 14):
        mixed[k] = Frame(good[k].time_s, good[k].image.repeat(2, 0).repeat(3, 1))
    mixed[20] = Frame(good[20].time_s, good[20].image.astype(np.float32))
    mixed[22] = Frame(good[22].time_s, good[22].image[..., 0])
    mixed[24] = Frame(math.nan, good[24].image)
    mixed[26] = Frame(1e308, good[26].image)
    mixed.insert(30, good[5])
    with pytest.warns(UserWarning, match="4 frames resized, 5 frames skipped"):
        result = watch(model, mixed)
    assert result.lost == {"frames resized": 4, "frames skipped": 5}
    assert [c.start_s for c in result.captions[1:]] == pytest.approx([7, 14, 21], abs=1.1)
    assert "4 frames resized" in result.summary


def test_a_window_that_cannot_be_embedded_is_left_out(model, monkeypatch):
    def before(index):
        if index in (8, 9):
            raise RuntimeError("out of memory")

    windows_embedded(monkeypatch, before, lambda index, z: z * math.nan if index == 20 else z)
    with pytest.warns(UserWarning, match="3 windows skipped"):
        result = watch(model, rooms(20))
    assert result.lost == {"windows skipped": 3} and result.num_windows == 37 - 3 and result.error is None
    assert len(result.captions) == 3


def test_of_the_windows_of_a_film_only_the_wrong_one_is_left_out(model, film, monkeypatch):
    """They are embedded together; then each alone shows which one it is."""
    original = SlidingEncoder.features

    def features(self, batch):
        if any(window.start_s == 5 for window in batch):
            raise RuntimeError("out of memory")
        return original(self, batch)

    monkeypatch.setattr(SlidingEncoder, "features", features)
    with open_frames(film, fps=FPS) as frames, pytest.warns(UserWarning, match="1 windows skipped"):
        result = watch(model, frames)
    assert result.lost == {"windows skipped": 1} and result.num_windows == 45 - 1 and len(result.captions) == 4


def test_a_model_that_refuses_every_window_ends_it(model, monkeypatch):
    """The first refusal is the answer; later ones only if there are MAX_FAILURES in a row, and captions stay."""
    working = [0]

    def before(index):
        working[0] -= 1
        if working[0] < 0:
            raise ValueError("image size")

    windows_embedded(monkeypatch, before)
    with pytest.raises(UserError, match="does not take 4 frames of 32x32: image size"):
        watch(model, rooms(20))
    working[0] = 20
    with pytest.warns(UserWarning, match=f"{MAX_FAILURES} windows skipped"):
        result = watch(model, rooms(30))
    assert str(result.error) == "image size" and result.num_windows == 20 and result.captions[-1].final


def test_a_stream_that_breaks_off_keeps_what_it_said(model):
    def frames():
        yield from rooms(20)
        raise UserError("the sender is gone")

    result = watch(model, frames())
    assert str(result.error) == "the sender is gone" and not result.interrupted
    assert result.captions == watch(model, rooms(20)).captions
    with pytest.raises(UserError, match="the sender is gone"):
        watch(model, (frame for frame in frames() if frame.time_s < 0))
    with pytest.raises(UserError, match="No frames"):
        watch(model, [])


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_in_the_middle_of_a_window_waits_for_its_caption(model, monkeypatch):
    """The signal comes while the window is embedded that closes the first scene, whose caption must not be lost."""
    complete = []
    watch(model, rooms(20), on_caption=complete.append)
    closing = round((complete[0].emitted_s - 1.5) / 0.5)  # window k ends at 1.5 + k/2 s

    def interrupt(index):
        if index == closing:
            signal.raise_signal(signal.SIGINT)

    windows_embedded(monkeypatch, interrupt)
    before = signal.getsignal(signal.SIGINT)
    result = watch(model, rooms(20))
    assert result.interrupted and result.num_windows == closing + 1
    assert result.captions[0] == complete[0] and len(result.captions) == 2
    assert result.captions[1].end_s == complete[0].emitted_s, "the open scene is captioned, too"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_the_wait_for_a_frame(model):
    class Stalled:
        def __init__(self):
            self.frames = rooms(20)
            self.asked = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.asked += 1
            if self.asked <= 30:
                return next(self.frames)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the wait went on")

    stalled = Stalled()
    result = watch(model, stalled)
    assert result.interrupted and result.error is None and result.seconds == 14.5 and stalled.asked == 31
    assert result.captions[-1].end_s == 14.5
    stalled.asked = 31
    nothing = watch(model, stalled)
    assert nothing.interrupted and nothing.summary.startswith("decoded 0 of 0 windows")


class Interrupting:
    """Frames, then a Ctrl-C that a library turned into nothing: the wait goes on, and so do the frames."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for k, frame in enumerate(rooms(40)):
            if k == self.count:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            yield frame


def test_a_ctrl_c_that_a_library_swallows_counts(model):
    """As FFmpeg does with exceptions in its reads."""
    result = watch(model, Interrupting(20))
    assert result.interrupted and result.seconds <= 10.5


def test_subtitles_and_events_are_valid_whatever_is_said():
    captions = [
        Caption(0, 1.5, 2, "a\n\n2\n00:00:01,000 --> 00:00:09,000\nb", None, True),
        Caption(0.2, 1.5, 2, "provisional", None, False),
        Caption(1.5, 1.5, 2, "\u2028", math.nan, True),
        Caption(3599.9996, 90_000.25, 4, "c\ud800", 0.123456, True),
    ]
    assert to_srt(captions) == (
        "1\n00:00:00,000 --> 00:00:01,500\na 2 00:00:01,000 -> 00:00:09,000 b\n\n"
        "2\n00:00:01,500 --> 00:00:01,501\n(no text)\n\n"
        "3\n01:00:00,000 --> 25:00:00,250\nc\n"
    )
    lines = [to_json(caption, "q\u2028?") for caption in captions]
    assert all(len(line.splitlines()) == 1 for line in lines)
    assert json.loads(lines[2])["score"] is None and json.loads(lines[2])["text"] == "\u2028"
    assert json.loads(lines[3]) == {
        "start_s": 3600.0, "end_s": 90000.25, "emitted_s": 4, "text": "c\ud800", "score": 0.1235, "final": True,
        "query": "q\u2028?",
    }  # fmt: skip
