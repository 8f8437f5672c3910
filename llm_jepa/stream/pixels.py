"""Pixels of a picture as a viewer shows them: upright, in RGB, with square pixels, on a white ground.

A file says how its numbers become a picture. Each of these facts is used here and nowhere else:

| fact | in a picture | in a film |
|---|---|---|
| turned or mirrored | EXIF orientation | display matrix, in quarter turns |
| shape of a pixel | not used, as viewers do | sample aspect ratio: the shorter side is stretched |
| transparency | alpha, or a clear colour: on white | alpha: on white |
| palette, CMYK, 16-bit grey | as 8-bit RGB | as 8-bit RGB |
| matrix and range of colours | Pillow | PyAV, from the version on that `decoding` asks for |

Colour profiles (ICC) and the curves of HDR are not applied.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..core.errors import UserError

if TYPE_CHECKING:
    from av import VideoFrame

GROUND = 255  # white, as a browser shows a transparent picture or film

Picture = Image.Image | np.ndarray


@dataclass(frozen=True, eq=False)
class CodedFrame:
    """A decoded frame of a film that is not converted yet, and the facts about it that its container states.

    pixel_aspect: width of a pixel / its height.  duration_s: 0 if unknown.
    """

    frame: VideoFrame
    pixel_aspect: Fraction = Fraction(1)
    duration_s: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as shown."""
        width, height = self._stretched()
        return (height, width) if orientation(self.frame).transposed else (width, height)

    def _stretched(self) -> tuple[int, int]:
        """(width, height) with square pixels, not turned yet. Players enlarge one side, too: no detail is lost."""
        width, height, aspect = self.frame.width, self.frame.height, self.pixel_aspect
        return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))

    def to_rgb(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        if _has_alpha(self.frame):
            image = _on_ground(self.frame.to_ndarray(format="rgba"))
        else:
            image = self.frame.to_ndarray(format="rgb24")
        stretched = self._stretched()
        if stretched != (self.frame.width, self.frame.height):
            image = np.asarray(Image.fromarray(image).resize(stretched, Image.Resampling.BICUBIC))
        return orientation(self.frame).upright(image)


class Orientation(NamedTuple):
    """How to turn a picture: exchange rows and columns, then mirror left and right, then top and bottom.

    exact: False if the film asks for another angle than a quarter turn; then the nearest one is taken.
    """

    transposed: bool = False
    mirror_x: bool = False
    mirror_y: bool = False
    exact: bool = True

    def upright(self, image: np.ndarray) -> np.ndarray:
        """[H, W, 3] as shown, contiguous."""
        if self.transposed:
            image = image.swapaxes(0, 1)
        if self.mirror_x:
            image = image[:, ::-1]
        if self.mirror_y:
            image = image[::-1]
        return np.ascontiguousarray(image)


def orientation(frame: VideoFrame) -> Orientation:
    """The display matrix of a frame; none leaves the picture as it is.

    The matrix (a b u, c d v, x y w) takes a point of the picture to x' = a x + c y, y' = b x + d y, with y down
    (ISO/IEC 14496-12, tkhd). PyAV's `rotation` is its angle alone: to it a mirrored picture is a turned one.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return Orientation()
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side_data))
    straight, crossed = abs(a) + abs(d), abs(b) + abs(c)
    exact = min(straight, crossed) <= 0.02 * max(straight, crossed)  # a degree
    if crossed > straight:
        return Orientation(True, c < 0, b < 0, exact)
    return Orientation(False, a < 0, d < 0, exact)


def size_of(picture: Picture | CodedFrame) -> tuple[int, int]:
    """(width, height) as shown."""
    if isinstance(picture, np.ndarray):
        return picture.shape[1], picture.shape[0]
    if isinstance(picture, Image.Image) and _exif_orientation(picture) >= 5:  # 5 to 8 exchange rows and columns
        return picture.height, picture.width
    return picture.size


def to_rgb(picture: Any) -> np.ndarray:
    """uint8 [H, W, 3], as shown, of a PIL image, of a grey, RGB or RGBA uint8 array, or of a `CodedFrame`.

    Raises UserError for an image of more than 16 bits a channel or of real numbers, and for other arrays.
    """
    if isinstance(picture, Image.Image):
        return _from_pil(picture)
    if isinstance(picture, CodedFrame):
        return picture.to_rgb()
    image = np.asarray(picture)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[-1] not in (3, 4) or image.dtype != np.uint8:
        raise UserError(
            f"A frame is {image.dtype} of shape {image.shape}; give PIL images, or uint8 arrays [height, width, 3]."
        )
    return _on_ground(image) if image.shape[-1] == 4 else image


def upright(image: Image.Image) -> Image.Image:
    """A PIL image turned as its EXIF orientation says. What is upright stays so if it is turned again."""
    if _exif_orientation(image) == 1:
        return image
    turned = ImageOps.exif_transpose(image)
    assert turned is not None  # only in_place gives None
    return turned


def _exif_orientation(image: Image.Image) -> int:
    """1 to 8 (EXIF 2.3, 4.6.4). 1 is upright, and stands for anything else that a file may say."""
    if image.format == "TIFF":
        image.load()  # Pillow turns a TIFF while it loads it, and only then forgets the tag
    number = image.getexif().get(ExifTags.Base.Orientation, 1)
    return number if number in range(1, 9) else 1


def _from_pil(image: Image.Image) -> np.ndarray:
    try:
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        image = upright(image)
        if image.mode.startswith("I;16"):
            return np.repeat(_eight_bits(np.asarray(image), tags)[..., None], 3, axis=2)
        if image.mode.startswith(("I", "F")):  # PIL would clip its values at 255: nearly white
            raise UserError(
                f"An image of mode {image.mode} does not say which value is white. Convert it to 8-bit RGB."
            )
        if image.has_transparency_data or image.mode in ("La", "RGBa"):
            return _on_ground(np.asarray(image.convert("RGBA")))
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"An image cannot be read ({error}). Save it again as PNG.") from error


def _eight_bits(values: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """uint8 [H, W] of 16-bit grey [H, W]: the high byte, as Pillow takes it of 16-bit colours.

    tags: of a TIFF, which may use fewer than 16 bits, and may count from white.
    """
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    grey = (values >> (bits - 8)).astype(np.uint8)
    return 255 - grey if tags.get(262, 1) == 0 else grey  # PhotometricInterpretation 0: white is zero


def _has_alpha(frame: VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _on_ground(rgba: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4], not premultiplied -> [H, W, 3] on the ground; what is opaque keeps its values."""
    alpha = rgba[..., 3:].astype(np.uint16)
    rgb = rgba[..., :3]
    if (alpha == 255).all():
        return np.ascontiguousarray(rgb)
    return ((rgb * alpha + GROUND * (255 - alpha) + 127) // 255).astype(np.uint8)
