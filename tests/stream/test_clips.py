"""Claims about clips: which frames of a video they hold, and what they cost."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jepa.core.errors import UserError
from llm_jepa.stream import clips
from llm_jepa.stream.clips import read_clip, sample_frames
from llm_jepa.stream.opening import open_frames
from tests.stream.movies import SMALL, feed, finishes, good, grey, number_of

pytest.importorskip("av")


def test_samples_are_the_centres_of_equal_segments():
    """10 / 4 = 2.5 a segment: centres 1.25, 3.75, 6.25, 8.75. 3 / 7: 0.21, 0.64, 1.07, 1.5, 1.93, 2.36, 2.79."""
    assert sample_frames(10, 4).tolist() == [1, 3, 6, 8]
    assert sample_frames(3, 7).tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert sample_frames(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert sample_frames(9, 1).tolist() == [4]
    for numbers in ((0, 1), (1, 0), (-1, 3)):
        with pytest.raises(UserError):
            sample_frames(*numbers)


@SMALL
@given(available=st.integers(1, 10**6), count=st.integers(1, 200))
def test_samples_repeat_only_when_there_are_too_few(available, count):
    """And mirror: the segment i from the left is the segment i from the right, up to the rounding of a centre."""
    indices = sample_frames(available, count)
    assert len(indices) == count and indices[0] >= 0 and indices[-1] < available
    assert (np.diff(indices) >= (1 if available >= count else 0)).all()
    assert np.abs(indices + indices[::-1] - (available - 1)).max() <= 1


def test_a_clip_has_the_frames_the_samples_name(video):
    frames, times = read_clip(video, 4)  # 24 / 4: centres 3, 9, 15, 21
    assert frames.shape == (4, 64, 64, 3) and frames.dtype == np.uint8
    assert [number_of(image) for image in frames] == [3, 9, 15, 21]
    assert times.tolist() == [3 / 8, 9 / 8, 15 / 8, 21 / 8]


def test_a_part_of_a_clip_begins_at_its_start_and_ends_before_its_end(video):
    """0.5 <= k / 8 < 1.5: frames 4 to 11."""
    frames, times = read_clip(video, 8, start_s=0.5, end_s=1.5)
    assert [number_of(image) for image in frames] == list(range(4, 12)) and times[0] == 0.5
    frames, _ = read_clip(video, 2, start_s=2.0)  # 16 to 23: centres 18, 22
    assert [number_of(image) for image in frames] == [18, 22]
    for start, end in ((5, 6), (1, 1), (2, 1), (math.nan, 1)):
        with pytest.raises(UserError):
            read_clip(video, 2, start_s=start, end_s=end)


def test_a_clip_of_too_few_frames_repeats_and_warns():
    with pytest.warns(UserWarning, match="3 frames for 7"):
        frames, times = read_clip(np.stack([grey(k, 4, 4) for k in range(3)]), 7, native_fps=2)
    assert [number_of(image) for image in frames] == [0, 0, 1, 1, 1, 2, 2] and times[-1] == 1.0


def test_a_clip_needs_a_source_that_can_be_read_twice(fifo):
    feed(fifo, good("mpegts"))
    for source in (fifo, iter([(0.0, grey(0))]), open_frames([(0.0, grey(0))])):
        with pytest.raises(UserError, match="twice"):
            finishes(partial(read_clip, source, 2))


def test_a_clip_warns_once_of_what_is_corrupt():
    pairs = [(t, grey(k)) for k, t in enumerate([0.0, 1.0, 1.0, 2.0])]
    with pytest.warns(UserWarning) as warned:
        frames, _ = read_clip(pairs, 3)
    assert len(warned) == 1 and [number_of(image) for image in frames] == [0, 1, 3]


def test_a_clip_converts_the_frames_it_returns_and_no_other(video, monkeypatch):
    """They are all it holds. 24 / 3: centres 4, 12, 20."""
    converted, real = [], clips.to_rgb
    monkeypatch.setattr(clips, "to_rgb", lambda raw: converted.append(raw.frame.time) or real(raw))
    read_clip(video, 3)
    assert converted == [4 / 8, 12 / 8, 20 / 8]
