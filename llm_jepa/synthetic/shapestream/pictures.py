"""Scenes of ShapeStream as pixels, and pixels as video files."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...core.errors import UserError
from ...core.files import written_whole
from .scenes import Colour, PlacedThing, Scene, outline, visible
from .texts import COLOURS

if TYPE_CHECKING:
    from PIL import ImageDraw

Frames: TypeAlias = NDArray[np.uint8]  # [T, H, W, 3]

OUTLINE = (30, 30, 30)
NOISE_SIGMA = 3.0
NOISE_FRAMES = 16  # drawn at a time, so that a long stream needs little memory


def render(scenes: Sequence[Scene], ground: Colour, size: int) -> Frames:
    """[T, size, size, 3] without noise. Drawn at twice the size and then averaged; an unchanged scene is drawn once.

    Raises UserError if Pillow is missing.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise UserError('drawing frames needs Pillow: pip install "llm-jepa[vl]"') from error
    frames = np.empty((len(scenes), size, size, 3), np.uint8)
    side, before = 2 * size, None
    for frame, scene in enumerate(scenes):
        if scene == before:
            frames[frame] = frames[frame - 1]
            continue
        before = scene
        picture = Image.new("RGB", (side, side), ground)
        draw = ImageDraw.Draw(picture)
        for thing in visible(scene):
            _draw_thing(draw, thing, ground, side)
        frames[frame] = np.asarray(picture.reduce(2))
    return frames


def add_noise(frames: Frames, rng: np.random.Generator) -> None:
    """Add independent rounded Gaussian noise in place. A table of its 256 quantiles is 5 times as fast as normals."""
    table = noise_table()
    for first in range(0, len(frames), NOISE_FRAMES):
        chunk = frames[first : first + NOISE_FRAMES]
        chunk += table[rng.integers(0, 256, chunk.shape, np.uint8)]


@functools.cache
def noise_table() -> NDArray[np.uint8]:
    """Quantiles (i + 1/2) / 256 of the noise, [256]; negative ones modulo 256, as the sum is."""
    normal = NormalDist(0, NOISE_SIGMA)
    return np.array([round(normal.inv_cdf((level + 0.5) / 256)) % 256 for level in range(256)], np.uint8)


def write_video(path: str | os.PathLike[str], frames: Frames, fps: float) -> None:
    """Write uint8 [T, H, W, 3] as H.264 to `path` (.mp4, .mkv ...), which is complete from the moment it is there.

    The video is lossy (crf 18): what is decoded differs from `frames` by a few levels.

    Raises UserError if PyAV is missing, for other shapes, no frames, or an odd H or W, which H.264 in its common form
    (yuv420p) cannot hold.
    """
    try:
        import av
    except ImportError as error:
        raise UserError('writing video needs PyAV: pip install "llm-jepa[vl]"') from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise UserError(f"frames are {frames.dtype} {list(frames.shape)}; a video is uint8 [T, H, W, 3] with T >= 1")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"frames of {height} x {width} pixels: H.264 needs an even height and width")
    with written_whole(path) as temporary, av.open(str(temporary), "w") as container:
        video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(video.encode())


def _draw_thing(draw: ImageDraw.ImageDraw, thing: PlacedThing, ground: Colour, side: int) -> None:
    colour, shape = thing.thing
    fill = _blend(ground, COLOURS[colour], thing.opacity)
    line = _blend(ground, OUTLINE, thing.opacity)
    if shape == "circle":
        x, y, radius = thing.x * side, thing.y * side, thing.radius * side
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=line)
    else:
        corners = (outline(thing) + (thing.x, thing.y)) * side
        draw.polygon(corners.ravel().tolist(), fill=fill, outline=line)


def _blend(ground: Colour, colour: Colour, opacity: float) -> Colour:
    red, green, blue = (round(under + (over - under) * opacity) for under, over in zip(ground, colour, strict=True))
    return red, green, blue
