"""Claims about pictures: turned, mirrored, transparent, with a palette, of 16 bits, and alike by every door."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llm_jepa.core.errors import UserError
from llm_jepa.stream.clips import read_clip
from llm_jepa.stream.opening import is_image, open_frames
from llm_jepa.stream.pixels import to_rgb

RED, GREEN = (200, 60, 30), (10, 160, 80)


def marked(height: int = 40, width: int = 64) -> np.ndarray:
    """Red with a green mark in the top left corner and half of one below it: no turn or mirror leaves it alike."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = RED
    image[:16, :16] = GREEN
    image[16:24, :8] = GREEN
    return image


def saved(image: Any, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, format, **options)
    return file.getvalue()


def by_every_door(content: bytes, folder: Path, suffix: str = ".png") -> np.ndarray:
    """The one picture of a file, which is the same as a path, as bytes, as a PIL image and in a list of images."""
    path = folder / f"picture{suffix}"
    path.write_bytes(content)
    (frame,) = open_frames(path)
    assert frame.time_s == 0 and frame.image.dtype == np.uint8 and frame.image.ndim == 3
    others = {
        "bytes": lambda: next(open_frames(content)).image,
        "PIL image": lambda: next(open_frames(Image.open(path))).image,
        "list": lambda: next(open_frames([Image.open(path)], native_fps=1)).image,
        "to_rgb": lambda: to_rgb(Image.open(path)),
        "clip": lambda: read_clip(path, 1)[0][0],
        "clip of bytes": lambda: read_clip(content, 1)[0][0],
        "array": lambda: next(open_frames(frame.image)).image,
    }
    for door, read in others.items():
        assert np.array_equal(read(), frame.image), door
    assert all(is_image(source) for source in (path, content, Image.open(path), frame.image))
    return frame.image


# EXIF 2.3, 4.6.4: the side of the picture that row 0 and column 0 of the file are on, as an array operation.
TURNS = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_stands_upright_by_every_door(tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    got = by_every_door(saved(marked(), format, exif=exif, **options), tmp_path, f".{format.lower()}")
    want = TURNS[orientation](marked())
    assert got.shape == want.shape and np.abs(got.astype(int) - want).max() < (16 if format == "JPEG" else 1)


def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    assert np.array_equal(by_every_door(saved(marked(), "PNG", exif=exif), tmp_path), marked())


def test_frames_that_lie_differently_in_their_files_have_one_size():
    """Two pictures of a phone, one of them turned: as shown, both are 40 high and 64 wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(np.ascontiguousarray(np.rot90(marked(), 1)), "PNG", exif=exif)
    for content in (turned, saved(np.rot90(marked(), 1), "TIFF", exif=exif)):
        images = [Image.fromarray(marked()), Image.open(io.BytesIO(content))]
        got = [frame.image for frame in open_frames(images, native_fps=1)]
        assert all(np.array_equal(image, marked()) for image in got)


def square(alpha: int) -> np.ndarray:
    """RGBA [8, 8, 4]: a black square on clear ground, whose hidden colour is not white."""
    image = np.zeros((8, 8, 4), np.uint8)
    image[..., 0] = 77
    image[2:6, 2:6] = (0, 0, 0, alpha)
    return image


@pytest.mark.parametrize(("alpha", "value"), [(255, 0), (51, 204), (0, 255)])
def test_transparency_is_laid_on_white(tmp_path, alpha, value):
    """Black of alpha a is 255 - a. A palette has an alpha for each colour; grey with alpha is grey."""
    want = np.full((8, 8, 3), 255, np.uint8)
    want[2:6, 2:6] = value
    rgba = square(alpha)
    for format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        assert np.array_equal(by_every_door(saved(rgba, format, **options), tmp_path, f".{format.lower()}"), want)
    assert np.array_equal(next(open_frames(rgba)).image, want)
    assert np.array_equal(next(open_frames([(0.0, rgba)])).image, want)
    grey = Image.merge("LA", [Image.fromarray(rgba[..., 1]), Image.fromarray(rgba[..., 3])])
    assert np.array_equal(by_every_door(saved(grey, "PNG"), tmp_path), want)
    palette = Image.fromarray((rgba[..., 3] == alpha).astype(np.uint8) if alpha else np.ones((8, 8), np.uint8), "L")
    palette = palette.convert("P")
    palette.putpalette([77, 0, 0, 0, 0, 0])
    got = by_every_door(saved(palette, "PNG", transparency=bytes([0, alpha])), tmp_path)
    assert np.array_equal(got, want)


def test_a_clear_colour_of_a_picture_without_alpha_is_white(tmp_path):
    """PNG's tRNS, of grey, of colours and of a palette."""
    image = marked()
    want = np.where((image == GREEN).all(axis=-1, keepdims=True), 255, image).astype(np.uint8)
    assert np.array_equal(by_every_door(saved(image, "PNG", transparency=GREEN), tmp_path), want)
    grey = image[..., 0]
    want = np.repeat(np.where(grey == 10, 255, grey)[..., None], 3, axis=2).astype(np.uint8)
    assert np.array_equal(by_every_door(saved(grey, "PNG", transparency=10), tmp_path), want)


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF"])
def test_a_palette_holds_numbers_of_colours(tmp_path, format):
    image = Image.fromarray((marked()[..., 1] == GREEN[1]).astype(np.uint8), "L").convert("P")
    image.putpalette([*RED, *GREEN])
    content = saved(image, format)
    got = next(open_frames(content)).image if format == "GIF" else by_every_door(content, tmp_path)
    assert np.array_equal(got, marked())


def test_sixteen_bits_are_their_high_byte_in_grey_as_in_colour(tmp_path):
    """257 k is k, exactly; 3000 is 11 of 255, and is not clipped to white. A TIFF may count from white."""
    values = np.array([[0, 257 * 9, 257 * 200, 65535, 3000]] * 3, np.uint16)
    want = np.repeat(np.array([[0, 9, 200, 255, 11]] * 3, np.uint8)[..., None], 3, axis=2)
    for format in ("PNG", "TIFF"):
        assert np.array_equal(by_every_door(saved(values, format), tmp_path, f".{format.lower()}"), want)
    inverted = saved(values, "TIFF", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(inverted)).tag_v2[262] == 0, "not counted from white: this test would prove nothing"
    assert np.array_equal(by_every_door(inverted, tmp_path, ".tif"), 255 - want)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_inks_are_colours(tmp_path, format):
    """Cyan 255 leaves no red; black 128 leaves half of the light."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:8, :, 0], inks[8:, :, 3] = 255, 128
    got = by_every_door(saved(Image.fromarray(inks, "CMYK"), format), tmp_path, f".{format.lower()}")
    assert np.abs(got[2, 2].astype(int) - [0, 255, 255]).max() < 4 and np.abs(got[13, 2].astype(int) - 127).max() < 4


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_without_a_white_are_refused(kind):
    with pytest.raises(UserError, match="does not say which value is white"):
        to_rgb(Image.fromarray(np.full((8, 8), 3000, kind)))


def test_pages_of_a_document_are_no_film(tmp_path):
    pages = [Image.fromarray(marked())] * 2
    with pytest.raises(UserError, match="2 pages"):
        open_frames(saved(pages[0], "TIFF", save_all=True, append_images=pages[1:]))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_an_animated_picture_is_a_film_by_every_door(tmp_path, format):
    """Its durations are its times; one of 0 is 0.1 s, as browsers show it. A clear first half is white."""
    images = [np.full((8, 8, 4), 255, np.uint8) for _ in range(4)]
    for k, image in enumerate(images):
        image[..., :3] = 60 * k
        image[:4, :, 3] = 0
    pictures = [Image.fromarray(image) for image in images]
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {"disposal": 2 if format == "GIF" else 1}
    durations = [100, 500, 0, 40]
    content = saved(
        pictures[0], format, save_all=True, append_images=pictures[1:], duration=durations, blend=0, **options
    )
    path = tmp_path / f"a.{format.lower()}"
    path.write_bytes(content)
    for source in (path, content, Image.open(path)):
        got = list(open_frames(source))
        assert [frame.time_s for frame in got] == pytest.approx([0, 0.1, 0.6, 0.7]), source
        assert [int(frame.image[6, 0, 0]) for frame in got] == [0, 60, 120, 180]
        assert all((frame.image[:4] == 255).all() for frame in got)
        assert np.array_equal(read_clip(source, 1)[0][0], got[1].image)  # of 0.74 s, the middle is at 0.37 s
    assert not any(is_image(source) for source in (path, content, Image.open(path)))
