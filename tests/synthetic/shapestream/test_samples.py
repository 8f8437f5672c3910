"""Clips, streams and windows follow from their arguments; values that cannot work are refused."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

from llm_jepa.core.errors import UserError
from llm_jepa.synthetic.shapestream import (
    FPS,
    NUM_FRAMES,
    Event,
    Stream,
    captions,
    clip,
    stream,
    stream_windows,
    write_video,
)

from .helpers import plan_stream


def test_a_clip_follows_from_its_arguments_alone():
    np.random.seed(0)
    first = clip(11)
    np.random.seed(1)
    clip(12)
    again = clip(11)
    assert (first.frames == again.frames).all()
    assert (first.event, first.objects, first.questions) == (again.event, again.objects, again.questions)
    assert (clip(11, kind=first.event.kind).frames == first.frames).all()
    assert not (clip(12).frames == first.frames).all()
    assert first.frames.dtype == np.uint8 and first.frames.shape == (NUM_FRAMES, 64, 64, 3)


def test_size_changes_the_frames_only():
    small, large = clip(4, kind="hit"), clip(4, kind="hit", size=128)
    assert large.frames.shape == (NUM_FRAMES, 128, 128, 3)
    assert (small.event, small.objects, small.questions) == (large.event, large.objects, large.questions)
    shrunk = large.frames.reshape(NUM_FRAMES, 64, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(shrunk - small.frames).mean() < 5


def test_a_stream_is_its_arguments_and_its_plan():
    one, again = stream(3, seconds=20, gap=(1, 3)), stream(3, seconds=20, gap=(1, 3))
    assert (one.frames == again.frames).all() and one.events == again.events
    assert one.events == plan_stream(3, seconds=20, gap=(1, 3))[0]
    assert one.frames.shape == (160, 64, 64, 3) and one.frames.dtype == np.uint8 and one.fps == FPS
    assert one.events != stream(3, seconds=20, gap=(1, 3), split="test").events


# --- Windows ----------------------------------------------------------------------------------------------------------


def bare_stream(*spans):
    """A stream without pictures; spans are (kind, number of frames)."""
    events, frame = [], 0
    for kind, length in spans:
        actor = None if kind == "idle" else ("red", "star")
        events.append(Event(kind, frame / FPS, (frame + length) / FPS, actor))
        frame += length
    return Stream(np.zeros((frame, 2, 2, 3), np.uint8), tuple(events), FPS)


def test_windows_by_hand():
    """40 frames: rest 0-20, left 20-30, rest 30-40; windows of 16 every 2."""
    sample = bare_stream(("idle", 20), ("left", 10), ("idle", 10))
    rest, left, _ = sample.events
    windows = stream_windows(sample, num_frames=16, stride=2)
    assert [first for first, _ in windows] == list(range(0, 25, 2))
    # Overlap with left: 0 0 0 2 | 4 | 6 8 10 10 10 10 8 6
    assert [event for _, event in windows] == [rest] * 4 + [None] + [left] * 8


def test_exactly_half_of_an_event_is_enough_and_three_frames_are_not_rest():
    sample = bare_stream(("idle", 16), ("left", 10), ("idle", 20))
    shown = {first: event and event.kind for first, event in stream_windows(sample, stride=1)}
    assert [shown[first] for first in (2, 3, 4, 5)] == ["idle", None, None, "left"]  # 2, 3, 4 and 5 of 10 frames
    assert [shown[first] for first in (21, 22, 23, 24)] == ["left", None, None, "idle"]  # 5, 4, 3 and 2


def test_of_two_events_the_one_with_more_frames_in_the_window():
    """Not the one with the larger share of itself: 8 of 16 beat 6 of 6."""
    sample = bare_stream(("up", 6), ("idle", 2), ("left", 16), ("idle", 1))
    assert stream_windows(sample)[0][1].kind == "left"
    sample = bare_stream(("up", 8), ("left", 8), ("idle", 1))
    assert stream_windows(sample)[0][1].kind == "up"  # a tie: the earlier one


def test_the_rest_of_a_window_is_the_longest_one_in_it():
    sample = bare_stream(("idle", 3), ("left", 1), ("idle", 12))
    assert stream_windows(sample, num_frames=16)[0][1].kind == "left"
    sample = bare_stream(("left", 20), ("idle", 14), ("up", 20))
    windows = dict(stream_windows(sample, stride=1))
    assert windows[18] == windows[20] == sample.events[1] and windows[17] is None


@pytest.mark.parametrize("gap", [(4, 12), (1, 3)])
def test_windows_of_a_stream_keep_what_they_promise(gap):
    sample = stream(1, gap=gap)
    windows = stream_windows(sample)
    assert [first for first, _ in windows] == list(range(0, 960 - 16 + 1, 8))
    labels = np.array([0] * 960)
    for number, event in enumerate(sample.events):
        labels[round(event.start_s * FPS) : round(event.end_s * FPS)] = number
    for first, event in windows:
        seen = Counter(labels[first : first + 16].tolist())
        busy = {n: count for n, count in seen.items() if sample.events[n].kind != "idle"}
        if event is None:
            assert max(busy.values()) > 2
        elif event.kind == "idle":
            assert max(busy.values(), default=0) <= 2
        else:
            number = sample.events.index(event)
            assert 2 * busy[number] >= (labels == number).sum()
    kinds = Counter("none" if e is None else "idle" if e.kind == "idle" else "event" for _, e in windows)
    assert kinds["event"] > 15 and kinds["none"] < len(windows) / 4
    assert (kinds["idle"] > kinds["event"]) == (gap == (4, 12))


@pytest.mark.parametrize("options", [{"num_frames": 4}, {"num_frames": 41}, {"stride": 0}])
def test_windows_that_cannot_be(options):
    with pytest.raises(UserError):
        stream_windows(bare_stream(("idle", 40)), **options)


# --- At the edge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: clip(-1), "seed=-1"),
        (lambda: clip(0, split="validation"), "validation"),
        (lambda: clip(0, kind="jump"), "jump"),
        (lambda: clip(0, size=16), "size=16"),
        (lambda: captions(Event("idle", 0, 1), wordings="test"), "test"),
        (lambda: stream(0, split="compose"), "compose"),
        (lambda: stream(-1), "seed=-1"),
        (lambda: stream(0, size=16), "size=16"),
        (lambda: stream(0, seconds=0), "seconds=0"),
        (lambda: stream(0, seconds=float("nan")), "seconds=nan"),
        (lambda: stream(0, gap=(0, 3)), "gap"),
        (lambda: stream(0, gap=(3, 1)), "gap"),
        (lambda: stream(0, duration=(0.5, 1.0)), "duration"),
        (lambda: stream(0, duration=(1.0, float("nan"))), "duration"),
        (lambda: stream(0, num_objects=0), "num_objects=0"),
        (lambda: stream(0, num_objects=4), "num_objects=4"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r'pip install "llm-jepa\[vl\]"'):
        write_video(tmp_path / "a.mp4", np.zeros((2, 64, 64, 3), np.uint8), FPS)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r'pip install "llm-jepa\[vl\]"'):
        clip(0)
