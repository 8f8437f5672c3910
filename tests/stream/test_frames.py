"""Claims about frames of a source: which are delivered, when, at what cost, and what a window of them holds."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jepa.core.errors import UserError
from llm_jepa.stream.frames import Frame, Limits, held, windows, without_leaps
from llm_jepa.stream.opening import open_frames
from tests.stream.movies import SMALL, finishes, grey, number_of, read, write

av = pytest.importorskip("av")


# -- order in time ----------------------------------------------------------------------------------------------------


def test_times_that_do_not_grow_are_skipped_and_counted():
    pairs = [(t, grey(k)) for k, t in enumerate([0.0, 1.0, 1.0, 0.5, 2.0, -9.0, 3.0])]
    with pytest.warns(UserWarning, match="skipped 3 frames"), open_frames(pairs) as frames:
        assert [number_of(frame.image) for frame in frames] == [0, 1, 4, 6]
    assert frames.unordered == 3


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ([0, 1, 1e6, 2, 3], [0, 1, 3, 4]),  # one wrong time stamp
        ([0, 1, 1e9, 1e6, 2, 3], [0, 1, 4, 5]),  # two of them
        ([0, 1, 500, 501, 502], [0, 1, 2, 3, 4]),  # a pause
        ([0, 120, 240, 360, 361], [0, 1, 2, 3, 4]),  # slides
        ([0, 1, 1e6], [0, 1]),  # at the end nothing follows it
        ([0, 1, math.inf, 2], [0, 1, 3]),
    ],
)
def test_a_time_that_leaps_is_believed_when_the_next_one_follows(times, kept):
    skipped = []
    found = list(without_leaps(enumerate(times), lambda item: item[1], lambda: skipped.append(1)))
    assert [number for number, _ in found] == kept
    assert len(skipped) == len(times) - len(kept)


def test_one_leaping_frame_of_a_source_costs_that_frame():
    pairs = [(1e6 if k == 3 else k / 8, grey(k)) for k in range(12)]
    with pytest.warns(UserWarning, match="skipped 1 frames"), open_frames(pairs) as frames:
        assert [number_of(frame.image) for frame in frames] == [k for k in range(12) if k != 3]


# -- fewer frames a second --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [24, 12, 8, 6, 1])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_rate_that_divides_the_native_one_takes_every_nth_frame(tmp_path, name, fps):
    """24 a second: mkv rounds to 1 ms, so that frame 1 lies at 0.042 and frame 2 at 0.083 instead of 0.0833."""
    path = write(str(tmp_path / name), [grey(k) for k in range(30)], rate=24)
    assert read(path, fps=fps)[1] == list(range(0, 30, 24 // fps))


def test_sampling_never_repeats_a_frame(video):
    assert read(video, fps=100) == read(video)


def test_a_frame_may_be_a_millisecond_early_and_no_more():
    """At 10 a second: 0.0985 is too early for the slot at 0.1, 0.1992 is not for that at 0.2."""
    times = [0.0, 0.0985, 0.1, 0.1992, 0.2]
    assert read([(t, grey(0, 2, 2)) for t in times], fps=10)[0] == [0.0, 0.1, 0.1992]


TIMES = st.lists(st.integers(1, 400), min_size=1, max_size=60).map(
    lambda gaps: [0.37 + sum(gaps[:k]) / 100 for k in range(len(gaps))]
)


@SMALL
@given(times=TIMES, fps=st.sampled_from([0.2, 0.5, 1, 3, 7, 12.5, 30]))
def test_frame_k_is_the_first_at_or_after_k_over_fps(times, fps):
    """By looking for each k in the whole list; one frame may be the first for several k."""
    tolerance = min(1e-3, 0.1 / fps)
    wanted = set()
    for k in range(math.ceil((times[-1] - times[0]) * fps) + 2):
        wanted |= set([t for t in times if (t - times[0] + tolerance) * fps >= k][:1])
    assert read([(t, grey(0, 2, 2)) for t in times], fps=fps)[0] == sorted(wanted)


def test_a_still_is_held_until_the_next_frame():
    """At 2 a second: 0.3 s is between two slots, 2.1 s fills slot 4, so slots 1, 2 and 3 repeat what was shown."""
    got = list(held(stream([0.0, 0.3, 2.1, 2.5]), fps=2))
    assert [(frame.time_s, number_of(frame.image)) for frame in got] == [
        (0.0, 0), (0.3, 1), (0.5, 1), (1.0, 1), (1.5, 1), (2.1, 2), (2.5, 3),
    ]  # fmt: skip


def test_a_film_without_stills_is_not_changed_and_a_long_gap_is_not_filled():
    for rate in (8, 25, 29.97):
        frames = stream([k / rate for k in range(100)])
        assert list(held(frames, fps=8)) == frames
    frames = stream([0.0, 0.5, 61.0, 61.5])
    assert list(held(frames, fps=2)) == frames


# -- live -------------------------------------------------------------------------------------------------------------


def test_of_a_live_source_the_newest_frame_wins():
    """The camera shows 0; while the consumer is busy it shows 1, 2 and 3; then 4. The consumer sees 0, 3, 4."""
    shown, busy, fetched = threading.Event(), threading.Event(), threading.Event()

    def camera() -> Iterator[tuple[float, np.ndarray]]:
        yield 0.0, grey(0)
        busy.wait(20)
        for k in (1, 2, 3):
            yield float(k), grey(k)
        shown.set()
        fetched.wait(20)
        yield 4.0, grey(4)

    with open_frames(camera(), live=True) as frames:
        assert number_of(next(frames).image) == 0
        busy.set()
        assert shown.wait(20)
        assert number_of(next(frames).image) == 3
        fetched.set()
        assert [number_of(frame.image) for frame in frames] == [4]
    assert frames.dropped == 2


def test_a_frame_between_the_samples_does_not_replace_one_that_is_due():
    """At 1 a second 0.4 and 0.8 are nobody's frames: they are neither delivered nor dropped."""
    shown = threading.Event()

    def camera() -> Iterator[tuple[float, np.ndarray]]:
        for k, t in enumerate((0.0, 0.4, 0.8)):
            yield t, grey(k)
        shown.set()

    with open_frames(camera(), live=True, fps=1) as frames:
        frame = next(frames)
        assert shown.wait(20) and number_of(frame.image) == 0
        assert list(frames) == [] and frames.dropped == 0


def test_what_breaks_in_the_thread_is_raised_where_frames_are_asked_for():
    def camera() -> Iterator[tuple[float, np.ndarray]]:
        yield 0.0, grey(0)
        raise KeyError("unplugged")

    with open_frames(camera(), live=True) as frames, pytest.raises(KeyError, match="unplugged"):
        list(frames)


def test_a_live_clock_that_restarts_goes_on():
    """10, 11, then a new clock 0, 1, 2: after 11 comes what the wall clock says, then 1 s and 2 s more."""
    times = [10.0, 11.0, 0.0, 1.0, 2.0]
    taken = threading.Semaphore(1)

    def camera() -> Iterator[tuple[float, np.ndarray]]:
        for k, t in enumerate(times):
            taken.acquire(timeout=20)
            yield t, grey(k)

    got = []
    with open_frames(camera(), live=True) as frames:
        for frame in frames:
            got.append(frame.time_s)
            taken.release()
    assert frames.clock_resets == 1 and frames.dropped == frames.unordered == 0
    assert got[:2] == [10, 11] and got[2] > 11
    assert np.diff(got[2:]) == pytest.approx([1, 1])


def test_closing_ends_the_thread_and_the_iteration():
    """Endless and paced to real time; the consumer in another thread is waiting for the next frame."""
    frames = open_frames("lavfi:testsrc=size=32x32:rate=20", live=True)
    started = threading.Event()

    def consume() -> None:
        for _ in frames:
            started.set()

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    assert started.wait(20)
    finishes(frames.close)
    consumer.join(20)
    assert not consumer.is_alive() and frames._thread is not None and not frames._thread.is_alive()
    assert list(frames) == []
    frames.close()


def test_closing_wakes_a_consumer_whose_source_is_silent():
    released, waiting = threading.Event(), threading.Event()

    def camera() -> Iterator[tuple[float, np.ndarray]]:
        yield 0.0, grey(0)
        waiting.set()
        released.wait(20)

    frames = open_frames(camera(), live=True)
    consumer = threading.Thread(target=lambda: list(frames), daemon=True)
    consumer.start()
    assert waiting.wait(20)
    finishes(frames.close)
    consumer.join(10)
    assert not consumer.is_alive()
    released.set()


def test_a_live_test_pattern_is_paced():
    """4 frames, 0.1 s apart: the last comes 0.3 s after the first at the earliest, and none is dropped."""
    start = time.monotonic()
    with open_frames("lavfi:testsrc=size=32x32:rate=10:duration=0.4", live=True) as frames:
        assert list(frames)[-1].time_s == pytest.approx(0.3)
    assert time.monotonic() - start > 0.25


def test_an_unfinished_file_closes_and_gives_its_descriptor_back(video):
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    with open_frames(video) as frames:
        next(frames)
    assert list(frames) == []
    list(open_frames(video))
    with pytest.raises(UserError):
        open_frames(video, limits=Limits(max_pixels=100))
    assert before == (set(os.listdir("/proc/self/fd")) if before else before)


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(max_pixels=64 * 64 - 1), "64x64 are over"),
        (Limits(max_frames=23), "more than 23 frames"),
        (Limits(max_seconds=2.874), "longer than 2.874 s"),
        (Limits(max_decode_s=1e-9), "no frame for 1e-09 s"),
    ],
)
def test_limits(video, limits, match):
    with pytest.raises(UserError, match=match):
        read(video, limits=limits)


def test_the_decoder_is_watched_where_we_do_not_read_for_it():
    with pytest.raises(UserError, match="no frame for 1e-09 s"):
        read("lavfi:testsrc", limits=Limits(max_decode_s=1e-9, max_frames=50))


def test_limits_are_inclusive_and_live_sources_have_none_on_their_length(video):
    assert len(read(video, limits=Limits(max_pixels=64 * 64, max_frames=24, max_seconds=2.875))[0]) == 24
    pairs = [(0.0, grey(0)), (1e9, grey(1)), (1e9 + 1, grey(2))]
    for limits in (None, Limits(max_seconds=None)):
        with open_frames(pairs, live=limits is None, limits=limits) as frames:
            assert list(frames)[-1].time_s == 1e9 + 1
    with pytest.raises(UserError, match="max_seconds"):
        read(pairs)


def test_the_time_the_consumer_takes_is_not_the_decoders(video):
    """A pause ten times max_decode_s after each of the first frames."""
    with open_frames(video, limits=Limits(max_decode_s=0.5)) as frames:
        frames._reading.waiting_since -= 5  # between opening and the first frame
        numbers = []
        for frame in frames:
            numbers.append(number_of(frame.image))
            frames._reading.waiting_since -= 5
    assert numbers == list(range(24))


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_limits_are_positive(value):
    with pytest.raises(UserError, match="max_pixels"):
        Limits(max_pixels=value)


# -- windows ----------------------------------------------------------------------------------------------------------


def stream(times: list[float]) -> list[Frame]:
    return [Frame(t, grey(k % 31, 2, 2)) for k, t in enumerate(times)]


def content(window: Any) -> tuple[float, float, list[int]]:
    return window.start_s, window.end_s, [number_of(image) for image in window.frames]


def test_windows_by_hand():
    """Frames at 0, 0.25, ..., 2.25, used at 2 a second: numbers 0, 2, 4, 6, 8. Windows of 3 every second from 1.0."""
    got = [content(w) for w in windows(stream([k / 4 for k in range(10)]), num_frames=3, stride_s=1.0, fps=2)]
    assert got == [(0.0, 1.0, [0, 2, 4]), (1.0, 2.0, [4, 6, 8])]


def test_windows_of_sampled_frames_are_windows_at_that_rate(video):
    """Sampling twice at the same rate is sampling once."""
    pairs = []
    for fps in (None, 2):
        with open_frames(video, fps=fps) as frames:
            pairs.append([content(w) for w in windows(frames, num_frames=2, stride_s=0.5, fps=2)])
    assert pairs[0] == pairs[1] and [numbers for *_, numbers in pairs[0]] == [
        [0, 4],
        [4, 8],
        [8, 12],
        [12, 16],
        [16, 20],
    ]


def test_a_stream_shorter_than_a_window_is_filled_with_its_last_frame():
    (window,) = windows(stream([0.0, 0.5]), num_frames=4, stride_s=1.0)
    assert content(window) == (0.0, 0.5, [0, 1, 1, 1])
    assert list(windows([], num_frames=4, stride_s=1.0)) == []


def test_windows_are_their_own_copies():
    frames = stream([0.0, 1.0, 2.0])
    first = next(windows(frames, num_frames=2, stride_s=1.0))
    frames[1].image[:] = 0
    assert content(first)[2] == [0, 1]


@SMALL
@given(
    times=TIMES,
    num_frames=st.integers(1, 5),
    stride_s=st.sampled_from([0.1, 0.5, 1.0, 3.0]),
    fps=st.sampled_from([None, 0.5, 2.0, 10.0]),
    cut=st.integers(0, 60),
)
def test_windows_are_what_the_whole_list_says_and_the_future_changes_none(times, num_frames, stride_s, fps, cut):
    def due(values: list[float], period_s: float) -> list[float]:
        tolerance = min(1e-3, period_s / 10)
        found = []
        for k in range(math.ceil((values[-1] - values[0]) / period_s) + 2):
            found += [t for t in values if (t - values[0] + tolerance) / period_s >= k][:1]
        return sorted(set(found))

    options: dict[str, Any] = {"num_frames": num_frames, "stride_s": stride_s, "fps": fps}
    got = [content(w) for w in windows(stream(times), **options)]
    used = times if fps is None else due(times, 1 / fps)
    if len(used) >= num_frames:
        ends = due(used[num_frames - 1 :], stride_s)
        wanted = [used[used.index(end) + 1 - num_frames : used.index(end) + 1] for end in ends]
        assert got == [(w[0], w[-1], [times.index(t) % 31 for t in w]) for w in wanted]
        before = [content(w) for w in windows(stream(times[:cut]), **options)]
        if len([t for t in used if t in times[:cut]]) >= num_frames:
            assert before == got[: len(before)]
            assert all(end > times[cut - 1] for _, end, _ in got[len(before) :])
    else:
        assert [len(numbers) for *_, numbers in got] == [num_frames]


def test_windows_hold_no_more_than_one_window():
    alive: list[weakref.ref] = []
    most = 0

    def endless() -> Iterator[Frame]:
        nonlocal most
        for k in range(300):
            frame = Frame(k / 10, grey(0, 2, 2))
            alive.append(weakref.ref(frame))
            most = max(most, sum(ref() is not None for ref in alive))
            yield frame
            del frame

    assert sum(1 for _ in windows(endless(), num_frames=4, stride_s=0.5)) == 60
    assert most <= 6


@pytest.mark.parametrize(
    "options",
    [{"num_frames": 0}, {"stride_s": 0}, {"stride_s": math.nan}, {"stride_s": math.inf}, {"fps": 0}, {"fps": -1.0}],
)
def test_windows_refuse_at_once_what_is_not_positive(options):
    with pytest.raises(UserError):
        windows([], **{"num_frames": 2, "stride_s": 1.0, **options})
