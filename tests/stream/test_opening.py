"""Claims about opening sources: which frames arrive, in which colours, and what happens to sources that lie or stop."""

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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llm_jepa.core.errors import UserError
from llm_jepa.stream import decoding, opening
from llm_jepa.stream.frames import Limits
from llm_jepa.stream.opening import open_frames
from tests.stream.movies import encoded, feed, finishes, good, grey, number_of, read, write

av = pytest.importorskip("av")


# -- files ------------------------------------------------------------------------------------------------------------


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
    assert times == pytest.approx([k / 8 for k in range(6)]) and numbers == list(range(6))


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


def test_an_image_that_does_not_say_which_value_is_white_is_refused_not_clipped(tmp_path):
    for kind in (np.int32, np.float32):
        Image.fromarray(np.full((8, 8), 3000, kind)).save(tmp_path / "a.tiff")
        with pytest.raises(UserError, match="8-bit"):
            list(open_frames(tmp_path / "a.tiff"))


def test_lavfi_is_the_same_camera_every_time():
    source = "lavfi:testsrc=size=64x48:rate=4:duration=2"
    first, second = (list(open_frames(source)) for _ in range(2))
    assert [frame.time_s for frame in first] == [k / 4 for k in range(8)]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0].image, first[-1].image) and first[0].image.shape == (48, 64, 3)


# -- images in memory -------------------------------------------------------------------------------------------------


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
        [(0.0, np.zeros((4, 6, 5), np.uint8))],
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


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_a_rate_is_a_positive_number(fps):
    with pytest.raises(UserError, match="fps"):
        open_frames("lavfi:testsrc", fps=fps)


# -- pipes and the network --------------------------------------------------------------------------------------------


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
        while seen != frames._reading.num_read:  # until the thread has used up what there is, and waits
            seen = frames._reading.num_read
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
    monkeypatch.setattr(opening, "_FORMATS", "concat,mpegts")
    assert read("part.ts")[1] == list(range(8))
    with pytest.raises(UserError):
        read("list.ffconcat")


def test_passwords_do_not_reach_the_message():
    with pytest.raises(UserError) as raised:
        open_frames("rtsp://admin:secret@127.0.0.1:9/cam")
    assert "secret" not in str(raised.value) and "127.0.0.1:9/cam" in str(raised.value)


# -- damage and hostility ---------------------------------------------------------------------------------------------


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
        frames._raw = ((widths.append(frame.frame.width), (stamp, frame))[1] for stamp, frame in raw)
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


def test_a_pyav_that_reads_colours_wrong_is_refused(video, monkeypatch):
    """The version that is asked for is the one that is installed with the package."""
    for version in ("16.1.0", "17.0.1"):
        monkeypatch.setattr(av, "__version__", version)
        with pytest.raises(UserError, match=f"PyAV {version} reads the colours of films wrong"):
            open_frames(video)
    floor = ".".join(map(str, decoding._PYAV))
    assert f'"av>={floor},' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_without_pyav_the_line_to_install_it(video, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r'pip install "llm-jepa\[vl\]"'):
        open_frames(video)
