"""Claims about films: each fact of a container is obeyed, and compared with what its own numbers or a standard say."""

from __future__ import annotations

import io
import struct
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llm_jepa.core.errors import UserError
from llm_jepa.stream.clips import read_clip
from llm_jepa.stream.frames import Limits
from llm_jepa.stream.opening import open_frames
from tests.stream.movies import CONTAINERS, encoded, film_with_sound, grey, number_of, read

av = pytest.importorskip("av")

# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "codec"),
    [
        *((name, codecs[0]) for name, codecs in CONTAINERS.items()),
        ("h264", "libx264"),
        ("m4v", "mpeg4"),
        ("gif", "gif"),
    ],
)
@pytest.mark.parametrize("rate", [10, 30])
def test_a_film_runs_at_its_rate_as_a_path_and_as_bytes(tmp_path, format, codec, rate):
    """The average rate of raw h264 is 25, whatever it says. GIF counts hundredths: 30 a second are 3, 3, 4 of them."""
    if format == "gif":
        images = [Image.fromarray(grey(k)) for k in range(20)]
        file = io.BytesIO()
        durations = [10 * (round(100 * (k + 1) / rate) - round(100 * k / rate)) for k in range(20)]
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations)
        content = file.getvalue()
    else:
        content = encoded([grey(k) for k in range(20)], format, codec=codec, rate=rate)
    (tmp_path / "film").write_bytes(content)
    times, numbers = read(tmp_path / "film")
    assert times == pytest.approx([k / rate for k in range(20)], abs=6e-3 if format == "gif" else 1e-3)
    assert numbers == list(range(20))
    assert read(content) == (times, numbers)
    images, clip_times = read_clip(content, 4)  # 20 / 4: centres 2, 7, 12, 17
    assert [number_of(image) for image in images] == [2, 7, 12, 17] and clip_times.tolist() == times[2::5]


@pytest.mark.parametrize("format", [name for name in CONTAINERS if name != "avi"])  # avi states no start
@pytest.mark.parametrize("start_s", [0.0, 3.0])
def test_times_are_the_players(format, start_s):
    """ffprobe's start of the frame less that of the format; a lead-in before 0 does not count."""
    content = film_with_sound(format, start_s)
    with av.open(io.BytesIO(content)) as container:
        pts = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
        expected = [at - max(container.start_time / 1e6, 0) for at in pts]
    times, numbers = read(content)
    assert times == pytest.approx(expected, abs=2e-6) and times[0] == pytest.approx(start_s, abs=0.03)
    assert numbers == list(range(8))
    images, found = read_clip(content, 2, start_s=start_s + 0.3, end_s=start_s + 0.8)  # frames 3 to 6
    assert [number_of(image) for image in images] == [4, 6] and found.tolist() == [times[4], times[6]]
    if start_s:
        with pytest.raises(UserError, match="no frame from 1.0 s to 2.0 s"):
            read_clip(content, 2, start_s=1.0, end_s=2.0)


def test_a_film_alone_starts_at_zero():
    """Without a sound before it, nothing is shown earlier."""
    content = encoded([grey(k) for k in range(4)], "matroska", pts=[24, 25, 26, 27])
    assert read(content)[0] == [0, 0.125, 0.25, 0.375]


# -- which stream is the film -----------------------------------------------------------------------------------------


def with_cover(format: str, film: bool) -> bytes:
    """A sound with a cover of 64 x 64, and perhaps a film of 32 x 32."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        sound = container.add_stream("aac", rate=48000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        if film:
            moving = container.add_stream("libx264", rate=8)
            moving.width = moving.height = 32
            moving.pix_fmt = "yuv420p"
        picture = av.VideoFrame.from_ndarray(grey(3), "rgb24").reformat(format="yuvj420p")
        container.mux([*cover.encode(picture), *cover.encode()])
        for k in range(40):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 48000, 1024 * k
            container.mux(sound.encode(silence))
        container.mux(sound.encode())
        if film:
            for k in range(8):
                container.mux(moving.encode(av.VideoFrame.from_ndarray(grey(k, 32, 32), "rgb24")))
            container.mux(moving.encode())
    return file.getvalue()


def test_a_cover_is_not_a_film():
    song = with_cover("mp4", film=False)
    with av.open(io.BytesIO(song)) as container:
        assert len(list(container.decode(video=0))) == 1, "no cover: this test would prove nothing"
    with pytest.raises(UserError, match="a sound with a cover picture, not a film. Give a film"):
        open_frames(song)
    with open_frames(with_cover("mp4", film=True)) as frames:
        got = list(frames)
    assert [number_of(frame.image) for frame in got] == list(range(8)) and got[0].image.shape == (32, 32, 3)


# -- how it is shown --------------------------------------------------------------------------------------------------


def marked() -> np.ndarray:
    image = np.full((48, 64, 3), 20, np.uint8)
    image[:16, :16] = 230
    image[16:32, :8] = 230
    return image


def with_matrix(*matrix: float) -> bytes:
    """Two frames in an mp4 whose header says the display matrix (a b c d)."""
    data = bytearray(encoded([marked()] * 2, "mp4"))
    at = data.index(b"tkhd") + 44
    a, b, c, d = (round(65536 * value) for value in matrix)
    data[at : at + 20] = struct.pack(">5i", a, b, 0, c, d)
    return bytes(data)


# (a b c d): x' = a x + c y, y' = b x + d y, with y down (ISO/IEC 14496-12).
MATRICES = {
    (1, 0, 0, 1): lambda image: image,
    (-1, 0, 0, 1): lambda image: image[:, ::-1],  # a front camera
    (1, 0, 0, -1): lambda image: image[::-1],
    (-1, 0, 0, -1): lambda image: image[::-1, ::-1],
    (0, 1, 1, 0): lambda image: image.swapaxes(0, 1),
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),  # a quarter turn clockwise: right goes down
    (0, -1, 1, 0): lambda image: np.rot90(image, 1),
    (0, -1, -1, 0): lambda image: image[::-1, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_film_is_turned_and_mirrored_as_its_display_matrix_says(matrix):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = list(open_frames(with_matrix(*matrix)))[0].image
    want = MATRICES[matrix](marked())
    assert got.shape == want.shape and np.abs(got.astype(int) - want).max() < 40 and got.flags.c_contiguous


def test_an_angle_between_quarter_turns_is_rounded_with_a_warning():
    c, s = np.cos(np.radians(30)), np.sin(np.radians(30))
    with pytest.warns(UserWarning, match="at an angle.*nearest quarter turn"):
        got = list(open_frames(with_matrix(c, s, -s, c)))[0].image
    assert np.abs(got.astype(int) - marked()).max() < 40


def with_pixels(format: str, aspect: Fraction) -> bytes:
    """A left half of 230 and a right half of 20: 32 high, 48 wide."""
    image = np.full((32, 48, 3), 20, np.uint8)
    image[:, :24] = 230
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream("libx264" if format != "avi" else "mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("format", ["mp4", "mov", "matroska", "avi", "mpegts", "h264"])
@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(2), (32, 96)), (Fraction(1, 2), (64, 48)), (Fraction(4, 3), (32, 64))]
)
def test_pixels_that_are_not_square_are_stretched(format, aspect, size):
    """The shorter side is: 48 x 2 = 96 wide, or 32 x 2 = 64 high. The edge stays in the middle."""
    content = with_pixels(format, aspect)
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].sample_aspect_ratio == aspect, "square: this test would prove nothing"
    got = list(open_frames(content))[0].image
    assert got.shape == (*size, 3)
    edge = size[1] // 2
    assert got[:, : edge - 4].min() > 200 and got[:, edge + 4 :].max() < 50
    assert read_clip(content, 1)[0].shape == (1, *size, 3)


def test_pixels_that_would_stretch_a_frame_past_the_limit_are_refused_before_it_is_converted():
    content = with_pixels("mp4", Fraction(16))
    with pytest.raises(UserError, match="768x32 are over the limit"):
        list(open_frames(content, limits=Limits(max_pixels=10_000)))


def translucent(codec: str, format: str, pix_fmt: str) -> bytes:
    """A red square of alpha 255, one of alpha 127 below it, on clear ground of another hidden colour."""
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., 2] = 120
    image[8:24, 16:48] = (200, 60, 30, 255)
    image[40:56, 16:48] = (200, 60, 30, 127)
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = pix_fmt
        if codec.startswith("libvpx"):
            stream.options = {"auto-alt-ref": "0", "crf": "4", "b": "2M"}
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgba").reformat(format=pix_fmt)))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    ("codec", "format", "pix_fmt"),
    [
        ("libvpx", "webm", "yuva420p"),
        ("libvpx-vp9", "webm", "yuva420p"),
        ("qtrle", "mov", "argb"),
        ("png", "mov", "rgba"),
        ("prores_ks", "mov", "yuva444p10le"),
        ("ffv1", "matroska", "bgra"),
    ],
)
def test_a_transparent_film_is_laid_on_white(codec, format, pix_fmt):
    """127 / 255 of the colour and 128 / 255 of white: (228, 158, 143)."""
    content = translucent(codec, format, pix_fmt)
    times, _ = read(content)
    assert times == pytest.approx([0, 0.125, 0.25], abs=1e-3)
    for frame in open_frames(content):
        for row, colour in ((2, (255, 255, 255)), (16, (200, 60, 30)), (48, (228, 158, 143))):
            assert frame.image[row, 32].astype(int) == pytest.approx(np.array(colour), abs=8), (codec, row)
    assert np.array_equal(read_clip(content, 3)[0][0], next(open_frames(content)).image)


# -- colours ----------------------------------------------------------------------------------------------------------

# Kr and Kb of the standards, and FFmpeg's numbers for them. A stream that says nothing is read as BT.601.
MATRIX = {"BT.709": (1, 0.2126, 0.0722), "BT.601": (6, 0.299, 0.114), "BT.601 (PAL)": (5, 0.299, 0.114),
          "BT.2020": (9, 0.2627, 0.0593), "SMPTE 240M": (7, 0.212, 0.087), "none": (2, 0.299, 0.114)}  # fmt: skip
RGB = (200, 60, 30)


def yuv(red: float, green: float, blue: float, kr: float, kb: float, *, full: bool) -> list[int]:
    """ITU-R BT.709-6, 3 and 4: luma, and the differences from it; 16 to 235 and 240, or 0 to 255."""
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    differences = [(blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)]
    if full:
        return [round(luma), *(round(128 + d) for d in differences)]
    return [round(16 + 219 / 255 * luma), *(round(128 + 224 / 255 * d) for d in differences)]


@pytest.mark.parametrize("format", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", MATRIX)
def test_colours_are_those_that_matrix_and_range_say(name, full, format):
    """PyAV before 17 reads all as BT.601 of limited range: BT.709's red is 188 instead of 200."""
    number, kr, kb = MATRIX[name]
    frame = av.VideoFrame(32, 32, "yuv444p")
    for plane, value in zip(frame.planes, yuv(*RGB, kr, kb, full=full), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    frame.colorspace, frame.color_range = number, 2 if full else 1
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.options = "yuv444p", {"qp": "0"}
        stream.codec_context.colorspace, stream.codec_context.color_range = number, 2 if full else 1
        container.mux([*stream.encode(frame), *stream.encode()])
    got = list(open_frames(file.getvalue()))[0].image
    assert got[16, 16].astype(int) == pytest.approx(np.array(RGB), abs=3)


def test_an_interlaced_film_says_so():
    content = encoded([grey(k) for k in range(4)], "mp4", **{"x264-params": "tff=1"})
    with av.open(io.BytesIO(content)) as container:
        assert next(container.decode(video=0)).interlaced_frame, "progressive: this test would prove nothing"
    with pytest.warns(UserWarning, match="interlaced.*Deinterlace it first") as warned:
        read_clip(content, 2)
    assert len(warned) == 1


# -- what cannot be opened says what it is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("webcam:977", "camera of this machine: plug it in"),
        ("http://127.0.0.1:9/a.mp4", "Check the address"),
        (b"%PDF-1.7 ...", "is a PDF document. Give a complete video or image file"),
        (b"PK\3\4" + bytes(99), "is a zip archive"),
        (b"ID3\4" + bytes(99), "is a sound"),
        (b"RIFF\0\0\0\0WAVEfmt " + bytes(99), "is a sound"),
        (b"<html><body>404</body></html>", "message of a server"),
        (b"#EXTM3U\n#EXTINF:1,\npart.ts\n", "playlists on disk are not followed"),
        (b"Dear reader,\n" * 40, "is a text"),
        (bytes(1000), "damaged, incomplete, or of a format that is not read"),
    ],
)
def test_a_source_that_cannot_be_opened_says_what_it_is_and_what_to_do(source, says, monkeypatch):
    if source == "webcam:977":
        monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(UserError, match=says) as raised:
        open_frames(source)
    message = str(raised.value)
    assert "\n" not in message and "Errno" not in message and message.endswith(".")
    assert isinstance(source, bytes) or "complete video" not in message


def test_a_path_of_a_container_and_its_bytes_are_one_film(tmp_path: Path):
    for format, (codec, _) in CONTAINERS.items():
        content = encoded([grey(k) for k in range(6)], format, codec=codec)
        (tmp_path / "film").write_bytes(content)
        frames: list[list[Any]] = [list(open_frames(source)) for source in (tmp_path / "film", content)]
        assert [f.time_s for f in frames[0]] == [f.time_s for f in frames[1]]
        assert all(np.array_equal(a.image, b.image) for a, b in zip(*frames, strict=True))
