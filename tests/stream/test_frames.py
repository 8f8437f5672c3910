"""Claims about frames: which arrive, when, in which colours, and what happens to sources that lie or stop."""

from __future__ import annotations

import contextlib
import http.server
import io
import math
import os
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import llm_jepa.stream.frames as video_module
from llm_jepa.core.errors import UserError
from llm_jepa.stream.frames import Frame, Limits, open_frames, read_clip, sample_frames, windows, without_leaps

av = pytest.importorskip("av")

SMALL = settings(max_examples=60, deadline=None)


def grey(number: int, height: int = 64, width: int = 64) -> np.ndarray:
    """A picture that says its number, through any codec."""
    return np.full((height, width, 3), 8 * number + 4, np.uint8)


def number_of(image: np.ndarray) -> int:
    return round((float(image.mean()) - 4) / 8)


def write(
    file: Any, images: list[np.ndarray], *, rate: int = 8, codec: str = "libx264", format: str | None = None,
    pix_fmt: str = "yuv420p", pts: list[int] | None = None,
    movflags: str = "", **options: str,
) -> Any:  # fmt: skip
    """`pts` in units of 1/rate. An mp4 has its index at the end, unless movflags="faststart"."""
    with av.open(file, "w", format=format, options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, options
        stream.codec_context.time_base = Fraction(1, rate)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def encoded(images: list[np.ndarray], format: str, **options: Any) -> bytes:
    return write(io.BytesIO(), images, format=format, **options).getvalue()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """24 frames, 8 a second, frame k is grey k."""
    return Path(write(str(tmp_path / "video.mp4"), [grey(k) for k in range(24)]))


def read(source: Any, **options: Any) -> tuple[list[float], list[int]]:
    with open_frames(source, **options) as frames:
        got = list(frames)
    return [frame.time_s for frame in got], [number_of(frame.image) for frame in got]


def finishes(work: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """The result or exception of `work`, or a failure if it hangs: a test must not hang with it."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, work()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert outcome, "it hangs"
    good, value = outcome[0]
    if not good:
        raise value
    return value


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mp4", "mpeg4"), ("a.mkv", "libx264"), ("a.avi", "libx264"), ("a.ts", "libx264")],
)
def test_every_frame_of_a_file_arrives_once_in_order_with_its_pts_from_zero(tmp_path, name, codec):
    """B-frames are decoded in another order than shown; avi holds no pts; mpegts starts at another time than 0."""
    path = write(str(tmp_path / name), [grey(k) for k in range(24)], codec=codec)
    times, numbers = read(path)
    assert times == pytest.approx([k / 8 for k in range(24)], abs=1e-4)
    assert numbers == list(range(24))


def test_a_file_whose_index_is_far_behind_its_frames(tmp_path):
    """Noise does not compress: 16 frames are 400 kB, and the index comes after them."""
    images = list(np.random.default_rng(0).integers(0, 256, (16, 128, 128, 3), np.uint8))
    path = Path(write(str(tmp_path / "a.mp4"), images, qp="0"))
    data = path.read_bytes()
    assert data.index(b"moov") > 300_000
    assert len(read(path)[0]) == 16


def test_a_stream_without_pts_runs_at_its_declared_rate(tmp_path):
    path = tmp_path / "a.h264"
    path.write_bytes(encoded([grey(k) for k in range(6)], "h264"))
    times, numbers = read(path)
    assert times == pytest.approx([k / 25 for k in range(6)]) and numbers == list(range(6))


def test_uneven_pts_are_kept(tmp_path):
    pts = [0, 1, 2, 7, 8, 30]
    times, numbers = read(write(str(tmp_path / "a.mp4"), [grey(k) for k in range(6)], rate=10, pts=pts))
    assert times == pytest.approx([0, 0.1, 0.2, 0.7, 0.8, 3.0]) and numbers == [0, 1, 2, 3, 4, 5]


def test_odd_sizes_and_colours(tmp_path):
    """Left red, right blue, the lower rows green: R, G, B in this order, rows from the top; 37 high, 51 wide."""
    image = np.zeros((37, 51, 3), np.uint8)
    image[:, :25, 0], image[:, 25:, 2] = 200, 150
    image[30:] = (0, 100, 0)
    path = write(str(tmp_path / "a.mp4"), [image] * 3, pix_fmt="yuv444p", crf="1")
    with open_frames(path) as frames:
        got = next(frames).image
    assert got.shape == (37, 51, 3) and got.dtype == np.uint8
    for row, column in ((5, 5), (5, 45), (34, 5), (34, 45)):
        assert got[row, column].astype(int) == pytest.approx(image[row, column].astype(int), abs=6)


@pytest.mark.parametrize(("matrix", "turn"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_phone_videos_are_turned_upright(tmp_path, matrix, turn):
    """tkhd matrix (a b c d): x' = a x + c y, y' = b x + d y, y down (ISO/IEC 14496-12). (0 1 -1 0) takes right to
    down: a quarter turn clockwise, np.rot90 by -1."""
    image = np.full((48, 64, 3), 20, np.uint8)
    image[:16, :16] = 230  # the mark in the top left corner
    data = bytearray(encoded([image] * 4, "mp4"))
    at = data.index(b"tkhd") + 44
    a, b, c, d = (65536 * value for value in matrix)
    data[at : at + 20] = struct.pack(">5i", a, b, 0, c, d)
    (tmp_path / "a.mp4").write_bytes(data)
    with open_frames(tmp_path / "a.mp4") as frames:
        got = next(frames).image
    want = np.rot90(image, turn)
    assert got.shape == want.shape and np.abs(got.astype(int) - want).max() < 40
    assert got.flags.c_contiguous


def test_a_still_image_is_one_frame_at_zero_and_upright(tmp_path):
    """EXIF orientation 6: turn by 90 degrees clockwise, so the mark goes from top left to top right."""
    image = np.full((40, 64, 3), 20, np.uint8)
    image[:16, :16] = (230, 100, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(image).save(tmp_path / "named.mp4", format="PNG")
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    (frame,) = open_frames(tmp_path / "a.png")
    assert frame.time_s == 0 and np.array_equal(frame.image, np.rot90(image, -1))
    (frame,) = open_frames(tmp_path / "named.mp4")
    assert np.array_equal(frame.image, image)
    (frame,) = open_frames(str(tmp_path / "grey.png"))
    assert np.array_equal(frame.image, np.stack([image[..., 0]] * 3, axis=-1))


def test_a_16_bit_image_is_refused_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="8-bit"):
        list(open_frames(tmp_path / "a.png"))


def test_lavfi_is_the_same_camera_every_time():
    source = "lavfi:testsrc=size=64x48:rate=4:duration=2"
    first, second = (list(open_frames(source)) for _ in range(2))
    assert [frame.time_s for frame in first] == [k / 4 for k in range(8)]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0].image, first[-1].image) and first[0].image.shape == (48, 64, 3)


# -- images in memory -----------------------------------------------------------------------------------------------


def test_arrays_lists_pairs_and_single_images():
    clip = np.stack([grey(k, 4, 6) for k in range(3)])
    assert read(clip, native_fps=2) == ([0, 0.5, 1.0], [0, 1, 2])
    assert read(list(clip), native_fps=2) == ([0, 0.5, 1.0], [0, 1, 2])
    assert read((Image.fromarray(image) for image in clip), native_fps=4) == ([0, 0.25, 0.5], [0, 1, 2])
    assert read([(5.0, clip[0]), (np.float32(5.5), Image.fromarray(clip[1]))]) == ([5.0, 5.5], [0, 1])
    assert read(clip[1]) == ([0], [1])
    assert read(Image.fromarray(clip[2])) == ([0], [2])


@pytest.mark.parametrize(
    "source",
    [
        [grey(0)],
        np.zeros((2, 4, 6, 3), np.uint8),
        np.zeros((2, 4, 6, 3), np.float32),
        np.zeros((4, 6), np.uint8),
        [(0.0, np.zeros((4, 6, 4), np.uint8))],
        [(0.0, "a.png")],
        [(math.nan, grey(0))],
        [("0", grey(0))],
        [],
        iter(()),
        3,
        None,
    ],
)
def test_what_is_no_timed_image_is_refused(source):
    """The arrays of uint8 lack native_fps."""
    with pytest.raises(UserError):
        list(open_frames(source))


def test_times_and_a_rate_contradict_each_other(video):
    for source in (video, [(0.0, grey(0))]):
        with pytest.raises(UserError, match="native_fps"):
            list(open_frames(source, native_fps=8))


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


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_a_rate_is_a_positive_number(fps):
    with pytest.raises(UserError, match="fps"):
        open_frames("lavfi:testsrc", fps=fps)


# -- fewer frames a second ------------------------------------------------------------------------------------------


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


# -- live -----------------------------------------------------------------------------------------------------------


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


# -- pipes and the network ------------------------------------------------------------------------------------------


def feed(path: Path, data: bytes) -> threading.Thread:
    def run() -> None:
        with contextlib.suppress(BrokenPipeError), open(path, "wb") as pipe:
            for at in range(0, len(data), 1000):
                pipe.write(data[at : at + 1000])
                pipe.flush()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no FIFOs here")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.mark.parametrize("live", [False, True])
def test_mpegts_through_a_fifo(fifo, live):
    """Every frame unless live; live, the last one at least."""
    feeder = feed(fifo, encoded([grey(k) for k in range(24)], "mpegts"))
    times, numbers = finishes(lambda: read(fifo, live=live))
    feeder.join(20)
    assert times == pytest.approx([number / 8 for number in numbers], abs=1e-4)
    assert numbers[-1] == 23 and numbers == sorted(set(numbers))
    if not live:
        assert numbers == list(range(24))


def test_standard_input_from_a_pipe_and_from_a_file(video, monkeypatch):
    data = encoded([grey(k) for k in range(5)], "matroska")
    ends = os.pipe()
    os.write(ends[1], data)
    os.close(ends[1])
    for fd, count in ((ends[0], 5), (os.open(video, os.O_RDONLY), 24)):
        with open(fd, "rb") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert finishes(lambda: read("-"))[1] == list(range(count))


@pytest.mark.parametrize("writers", [0, 1])
def test_a_pipe_that_stays_silent_ends_in_an_error(fifo, writers):
    with contextlib.ExitStack() as stack:
        for _ in range(writers):
            stack.callback(os.close, os.open(fifo, os.O_RDWR))
        with pytest.raises(UserError, match="max_decode_s"):
            finishes(lambda: open_frames(fifo, limits=Limits(max_decode_s=0.2)))


def test_a_server_that_stays_silent_ends_in_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(UserError):
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.mp4"
        finishes(lambda: open_frames(url, limits=Limits(max_decode_s=0.2)))


def test_a_silent_pipe_can_be_closed(fifo):
    """The reading thread waits for bytes that never come; close does not wait for max_decode_s."""
    with open(os.open(fifo, os.O_RDWR), "wb", buffering=0) as pipe:
        data = encoded([grey(k) for k in range(24)], "mpegts")
        threading.Thread(target=partial(pipe.write, data), daemon=True).start()
        frames = finishes(lambda: open_frames(fifo, live=True, limits=Limits(max_decode_s=60)))
        finishes(lambda: next(frames))
        seen = 0
        while seen != frames._read:  # until the thread has used up what there is, and waits
            seen = frames._read
            time.sleep(0.2)
        finishes(frames.close)
        frames._thread.join(10)
        assert not frames._thread.is_alive()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_url_is_read_and_its_playlist_may_name_no_file(tmp_path, server, video):
    write(str(tmp_path / "part.ts"), [grey(k) for k in range(8)])
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
    (tmp_path / "good.m3u8").write_text(f"{head}part.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "bad.m3u8").write_text(f"{head}file://{tmp_path}/part.ts\n#EXT-X-ENDLIST\n")
    assert finishes(lambda: read(f"{server}/video.mp4"))[1] == list(range(24))
    assert finishes(lambda: read(f"{server}/good.m3u8"))[1] == list(range(8))
    for name in ("bad.m3u8", "missing.mp4"):
        with pytest.raises(UserError):
            finishes(partial(read, f"{server}/{name}"))


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.ffconcat"])
def test_a_local_playlist_opens_no_other_file(tmp_path, monkeypatch, name):
    """FFmpeg by itself would follow it: the file it names is good, and is found from the current folder."""
    monkeypatch.chdir(tmp_path)
    write("part.ts", [grey(k) for k in range(8)])
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", "part.ts", "#EXT-X-ENDLIST"]
    Path(name).write_text("\n".join(["ffconcat version 1.0", "file part.ts"] if "concat" in name else lines) + "\n")
    if name != "list.mp4":  # newer FFmpeg itself wants a playlist to be called one
        with av.open(name) as container:
            assert sum(1 for _ in container.decode(video=0)) == 8, "not a playlist: this test would prove nothing"
    with pytest.raises(UserError, match="playlists"):
        read(name)


def test_either_lock_alone_holds_a_playlist(tmp_path, monkeypatch):
    """No protocol to open anything with, even if the format were let in; and no formats but those of the list."""
    monkeypatch.chdir(tmp_path)
    write("part.ts", [grey(k) for k in range(8)])
    Path("list.ffconcat").write_text("ffconcat version 1.0\nfile part.ts\n")
    Image.fromarray(grey(1)).save("a.ppm")  # FFmpeg would read it
    with pytest.raises(UserError):
        read("a.ppm")
    monkeypatch.setattr(video_module, "_FORMATS", "concat,mpegts")
    assert read("part.ts")[1] == list(range(8))
    with pytest.raises(UserError):
        read("list.ffconcat")


def test_passwords_do_not_reach_the_message():
    with pytest.raises(UserError) as raised:
        open_frames("rtsp://admin:secret@127.0.0.1:9/cam")
    assert "secret" not in str(raised.value) and "127.0.0.1:9/cam" in str(raised.value)


# -- damage and hostility -------------------------------------------------------------------------------------------


def test_damage_in_the_middle_costs_frames_there_and_is_counted(tmp_path):
    """Every frame is a key frame, so that the others can be told apart; the lengths inside frames 10 to 12 are lost."""
    data = bytearray(encoded([grey(k) for k in range(24)], "mp4", g="1", bf="0"))
    packets = []
    with av.open(io.BytesIO(bytes(data))) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for at, size in packets[10:13]:
        data[at : at + size] = b"\xff" * size
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.warns(UserWarning, match="skipped 3 corrupt"), open_frames(tmp_path / "a.mp4") as frames:
        got = [(frame.time_s, number_of(frame.image)) for frame in frames]
    assert frames.corrupt == 3
    assert got == [(k / 8, k) for k in range(24) if k not in (10, 11, 12)]


def test_a_file_cut_off_delivers_what_it_has_and_warns(tmp_path):
    """The index comes first, so that the frames before the cut can be read."""
    video = write(str(tmp_path / "video.mp4"), [grey(k) for k in range(24)], movflags="faststart")
    data = Path(video).read_bytes()
    with av.open(video) as container:
        half = sorted(packet.pos for packet in container.demux(video=0) if packet.size)[12]
    (tmp_path / "cut.mp4").write_bytes(data[:half])
    with pytest.warns(UserWarning, match="says it has 24 frames"):
        _, numbers = read(tmp_path / "cut.mp4")
    assert 9 <= len(numbers) <= 12 and numbers == sorted(numbers)


def test_frames_that_change_size_are_refused(tmp_path):
    parts = [encoded([grey(k, size, size) for k in range(6)], "h264") for size in (64, 128)]
    (tmp_path / "a.h264").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match="128x128 after 64x64"):
        read(tmp_path / "a.h264")


@pytest.mark.parametrize(("size", "decoded"), [(80, 80), (512, 64)])
def test_a_stream_that_grows_past_the_limit_is_refused(tmp_path, size, decoded):
    """80 x 80 = 6400 > 5000 is decoded, and goes no further. 512 x 512 > 2 * 5000 + 2^16: not even that."""
    parts = [encoded([grey(k, side, side) for k in range(6)], "h264") for side in (64, size)]
    (tmp_path / "a.h264").write_bytes(b"".join(parts))
    widths = []
    with open_frames(tmp_path / "a.h264", limits=Limits(max_pixels=5000)) as frames:
        raw = frames._raw
        frames._raw = ((widths.append(frame.width), (stamp, frame))[1] for stamp, frame in raw)
        with pytest.raises(UserError, match=f"{size}x{size} are over the limit of 5000 pixels"):
            list(frames)
    assert max(widths) == decoded


def test_a_packet_of_four_gigabytes_that_is_not_there_is_passed_over(tmp_path):
    """In IVF (12 bytes of length and pts before each packet) such a header stands between packets 4 and 5."""
    data = encoded([grey(k) for k in range(12)], "ivf", codec="libvpx")
    at = 32
    for _ in range(5):
        at += 12 + struct.unpack_from("<I", data, at)[0]
    (tmp_path / "a.ivf").write_bytes(data[:at] + struct.pack("<IQ", 2**32 - 1, 5) + data[at:])
    with pytest.warns(UserWarning, match="skipped 1 corrupt"):
        assert read(tmp_path / "a.ivf")[1] == list(range(12))


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
        frames._since -= 5  # between opening and the first frame
        numbers = []
        for frame in frames:
            numbers.append(number_of(frame.image))
            frames._since -= 5
    assert numbers == list(range(24))


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_limits_are_positive(value):
    with pytest.raises(UserError, match="max_pixels"):
        Limits(max_pixels=value)


def png(width: int, height: int) -> bytes:
    """The header of a picture of this size, and no picture."""
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def noise(data: bytes) -> bytes:
    """The index and nothing it speaks of."""
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    assert start < end
    return data[:start] + b"\xa5" * (end - start) + data[end:]


def webp() -> bytes:
    file = io.BytesIO()
    pictures = [Image.fromarray(grey(k, 8, 8)) for k in range(3)]
    pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def good(format: str = "mp4") -> bytes:
    return encoded([grey(k) for k in range(8)], format)


HOSTILE_FILES: dict[str, Callable[[], bytes]] = {
    "empty.mp4": lambda: b"",
    "text.mp4": lambda: b"Dear reader,\n" * 400,
    "zeros.mp4": lambda: bytes(100_000),
    "random.mkv": lambda: np.random.default_rng(0).bytes(100_000),
    "cut.mp4": lambda: good()[:600],
    "index_cut.mkv": lambda: good("matroska")[:200],
    "noise.mp4": lambda: noise(good()),
    "sound.mp4": sound,
    "bomb.png": lambda: png(60_000, 60_000),
    "wide.png": lambda: png(100_000, 100),
    "nothing_in_it.png": lambda: png(64, 64),
    "half.jpg": lambda: png(64, 64)[:40],
    "animated.webp": webp,
    "photo.heic": lambda: struct.pack(">I", 24) + b"ftypheic" + bytes(400),
    "page.html": lambda: b"<html><body>404</body></html>",
    "sdp.mp4": lambda: b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "script.avs": lambda: b'DirectShowSource("/etc/passwd")\n',
    "subtitle.srt": lambda: b"1\n00:00:00,000 --> 00:00:09,000\nhello\n\n",
}
HOSTILE_NAMES = [
    "missing.mp4", "two\nlines.mp4", ".", "nul\0byte.mp4", "", "/dev/zero", "frames%03d.png", "x" * 5000,
    "concat:video.mp4|video.mp4", "subfile,,start,0,end,9,,:video.mp4", "file:video.mp4", "file:///etc/passwd",
    "data://text/plain,x", "http://127.0.0.1:9/x.mp4", "http://127.0.0.1:9/ x", "gopher://127.0.0.1/",
    "webcam:977", "webcam:", "webcam:../../etc/passwd", "lavfi:", "lavfi:movie=video.mp4", "lavfi:testsrc=nonsense=1",
    "lavfi:testsrc,drawtext=textfile=video.mp4", "lavfi:color=size=60000x60000", "lavfi:color=s=60000_60000",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*corrupt")
@pytest.mark.parametrize("name", [*HOSTILE_FILES, *HOSTILE_NAMES], ids=lambda name: ascii(name[:30]))
def test_hostile_sources_end_in_one_line(tmp_path, monkeypatch, video, name):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(grey(1)).save("frames001.png")  # a pattern that FFmpeg would expand
    if name in HOSTILE_FILES:
        Path(name).write_bytes(HOSTILE_FILES[name]())
    with pytest.raises(UserError) as raised:
        finishes(lambda: read(name))
    message = str(raised.value)
    assert "\n" not in message and len(message) > 40 and message.count(". ") >= 1, "says what, why and what to do"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty.mp4", "the file is empty"),
        ("photo.heic", "HEIC"),
        ("wide.png", "100000x100 are over the limit"),
        ("noise.mp4", "no frame of it"),
        ("sound.mp4", "no video stream"),
        ("file:///etc/passwd", "plain path"),
        ("lavfi:testsrc,drawtext=textfile=a", "test pattern"),
        ("lavfi:color=s=60000_60000", "60000x60000 are over the limit"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*corrupt")
def test_the_message_names_the_cause(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    if name in HOSTILE_FILES:
        Path(name).write_bytes(HOSTILE_FILES[name]())
    with pytest.raises(UserError, match=says):
        read(name)


def test_a_decoder_gets_no_more_than_twice_the_limit(tmp_path):
    """The container says 64 x 64 where the stream holds 512 x 512."""
    data = bytearray(encoded([grey(k, 512, 512) for k in range(4)], "mp4"))
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    assert struct.unpack(">HH", data[at : at + 4]) == (512, 512)
    data[at : at + 4] = struct.pack(">HH", 64, 64)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(UserError, match="512x512 are over"):
        read(tmp_path / "a.mp4", limits=Limits(max_pixels=10_000))


def test_without_pyav_the_line_to_install_it(video, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r'pip install "llm-jepa\[vl\]"'):
        open_frames(video)


# -- clips ----------------------------------------------------------------------------------------------------------


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
    converted, real = [], video_module._rgb
    monkeypatch.setattr(video_module, "_rgb", lambda raw: converted.append(raw.time) or real(raw))
    read_clip(video, 3)
    assert converted == [4 / 8, 12 / 8, 20 / 8]


# -- windows --------------------------------------------------------------------------------------------------------


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
