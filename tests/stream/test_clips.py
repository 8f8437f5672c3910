"""Claims about clips: which frames of a video they hold, and what they cost."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llm_jepa.core.errors import UserError
from llm_jepa.stream import clips
from llm_jepa.stream.clips import read_clip, sample_frames
from llm_jepa.stream.frames import held, windows
from llm_jepa.stream.opening import open_frames
from tests.stream.movies import SMALL, feed, finishes, good, grey, number_of, write

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


STILLS = [0, 1, 2, 3, 11, 12, 13, 14, 15, 16, 30]  # eighths of a second: a still of 1 s, another of 1.75 s


def stills(kind: str, folder: Path) -> Any:
    """A film of variable rate: frame k is shown from STILLS[k] / 8 s on."""
    images = [grey(k) for k in range(len(STILLS))]
    if kind == "pairs":
        return [(at / 8, image) for at, image in zip(STILLS, images, strict=True)]
    if kind in ("gif", "png"):  # which count hundredths and thousandths of a second
        pictures = [Image.fromarray(image) for image in images]
        durations = [125 * int(gap) // 10 * 10 for gap in np.diff([*STILLS, 31])]
        path = folder / f"a.{kind}"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations)
        return path.read_bytes()
    codec = "libvpx" if kind == "webm" else "libx264"
    return write(str(folder / f"a.{kind}"), images, pts=STILLS, codec=codec)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "mov", "ts", "gif", "png", "pairs"])
def test_a_clip_of_variable_rate_is_uniform_in_time(tmp_path, kind):
    """0 to 3.7 s in 6 parts: at the centres 0.31, 0.93, 1.54, 2.16, 2.78, 3.39 s frames 2, 3, 5, 9, 9, 9 are shown.

    By number the 10 frames would give 0, 2, 4, 5, 7, 9.
    """
    source = stills(kind, tmp_path)
    images, times = read_clip(source, 6, end_s=3.7)
    assert [number_of(image) for image in images] == [2, 3, 5, 9, 9, 9]
    with open_frames(source) as frames:
        shown = [frame.time_s for frame in frames]
    assert times.tolist() == [shown[k] for k in (2, 3, 5, 9, 9, 9)]


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv"])
def test_the_last_frame_of_a_film_lasts_until_its_end(tmp_path, kind):
    """5.5 s in 6 parts: at the centres 0.46, 1.38, 2.29, 3.21, 4.13, 5.04 s. With B-frames, mp4 gives the last frame
    the duration of another one, which would make the film 2.75 s longer.
    """
    shown_from = [0, 1, 2, 3, 16, 17, 40, 41, 42, 43]  # eighths of a second
    b_frames = {"bf": "2", "b_strategy": "0", "sc_threshold": "0"}
    film = write(str(tmp_path / f"a.{kind}"), [grey(k) for k in range(10)], pts=shown_from, **b_frames)
    assert [number_of(image) for image in read_clip(film, 6)[0]] == [3, 3, 5, 5, 5, 6]


def test_a_clip_within_a_still_shows_it(tmp_path):
    """2.5 to 3.5 s: no frame begins there, and frame 9 is on the screen. After the film there is none."""
    source = stills("mp4", tmp_path)
    images, _ = read_clip(source, 3, start_s=2.5, end_s=3.5)
    assert [number_of(image) for image in images] == [9, 9, 9]
    with pytest.raises(UserError, match="no frame from 5 s to 6 s"):
        read_clip(source, 3, start_s=5, end_s=6)


def test_the_last_frame_of_a_list_lasts_as_long_as_others_do():
    """0, 0.1, 0.2 and 4 s; half of the gaps are 0.1 s. Of 4.1 s, the centres are 0.51, 1.54, 2.56 and 3.59 s."""
    uneven = [(0.0, grey(0)), (0.1, grey(1)), (0.2, grey(2)), (4.0, grey(3))]
    assert [number_of(image) for image in read_clip(uneven, 4)[0]] == [2, 2, 2, 2]
    assert [number_of(image) for image in read_clip(uneven, 41)[0]] == [0, 1, *[2] * 38, 3]


@SMALL
@given(
    rate=st.sampled_from([5, 8, 23.976, 25, 29.97, 30, 60]),
    count=st.integers(1, 90),
    digits=st.sampled_from([2, 3, 6]),
    num_frames=st.integers(1, 40),
    span=st.sampled_from([(None, None), (0.3, None), (None, 1.01), (0.25, 0.9)]),
)
def test_a_clip_of_constant_rate_is_sampled_by_number(rate, count, digits, num_frames, span):
    """However its times are rounded, from 1 us to 10 ms: the same frames as the index rule names."""
    times = [round(k / rate, digits) for k in range(count)]
    start, end = (-math.inf if span[0] is None else span[0]), (math.inf if span[1] is None else span[1])
    inside = [k for k, at in enumerate(times) if start <= at < end]
    if not inside:
        return
    found = clips._on_screen(np.array([at for at in times if at < end]), start, end, num_frames)
    assert found.tolist() == [inside[k] for k in sample_frames(len(inside), num_frames)]


def test_training_and_watching_see_a_film_alike(tmp_path):
    """Windows of 2 s at 4 a second, and clips of the same 2 s, whose centres are 1/8 s after the times of watch."""
    source = stills("mp4", tmp_path)
    with open_frames(source, fps=4) as frames:
        seen = list(windows(held(frames, fps=4), num_frames=8, stride_s=0.5, fps=4))
    assert [window.end_s for window in seen] == [1.75, 2.25, 2.75, 3.25, 3.75]
    differences = []
    for window in seen:
        clip, _ = read_clip(source, 8, start_s=window.start_s, end_s=window.start_s + 2)
        differences += [abs(number_of(a) - number_of(b)) for a, b in zip(window.frames, clip, strict=True)]
    assert max(differences) <= 1  # a window takes the first frame after a time, a clip the one on the screen


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
