"""Scenes of ShapeStream: things on the unit square, the room between them, and the chance that draws them.

Lengths are fractions of the frame's side; x points right and y points down. Gaps are between the circles that hold the
things. Only `Generator.random` is drawn here: NumPy may change how its other draws come from the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .texts import COLOURS, SHAPES, VERSION, Thing

SPLITS = ("train", "test", "compose")
# One generator for each of these. So the noise, the picture's size and the questions do not change the events.
PURPOSES = ("clip", "clip noise", "clip questions", "stream", "stream noise")

MARGIN = 0.045  # three pixels of 64
EDGE = 0.02  # to the frame: one pixel
RADII = (0.08, 0.14)  # of a new thing
SLOPE = 0.25  # sideways per forward: 14 degrees off an axis at most
PASS_GAP = (0.05, 0.14)
CLEAR_GAP = 0.35  # two and a half times the widest pass
LEVEL = 0.06  # a thing is also level with a path if it is this little before its start or behind its end
LEAD = 0.12  # a pass begins this far before the patient's centre and ends this far behind it

# A random scene has room for an event of a given kind in one of 1 to 45 cases (measured; a hit among three things is
# the rarest): 2,000 failures in a row happen with a probability of 1e-20.
MAX_SCENES = 2000
MAX_SPOTS = 30

# Corners of a thing of radius 1. The areas are similar (2.4 to 3.1), so that the shape says nothing about growth.
NUM_CIRCLE_CORNERS = 32
CORNER_DISTANCES = {"circle": (1.0,), "square": (1.2,), "triangle": (1.36,), "star": (1.42, 0.62)}
NUM_CORNERS = {"circle": NUM_CIRCLE_CORNERS, "square": 4, "triangle": 3, "star": 10}
FIRST_CORNER = {"circle": 0.0, "square": -math.pi / 4, "triangle": -math.pi / 2, "star": -math.pi / 2}
REACH = {shape: max(distances) for shape, distances in CORNER_DISTANCES.items()}

T = TypeVar("T")
Point = tuple[float, float]
Colour = tuple[int, int, int]


class PlacedThing(NamedTuple):
    """A thing somewhere in the frame. radius: before the factors of `CORNER_DISTANCES`. angle: in radians."""

    thing: Thing
    x: float
    y: float
    radius: float
    angle: float = 0.0
    opacity: float = 1.0

    @property
    def reach(self) -> float:
        """Radius of the circle that holds the thing at any angle."""
        return self.radius * REACH[self.thing[1]]


Scene = tuple[PlacedThing, ...]


class Encounter(NamedTuple):
    """How a straight path passes a thing.

    before, after: lengths of the path before and after the point where it is level with the thing; negative if it
    never is. gap: the least distance between the two circles.
    """

    before: float
    after: float
    gap: float


# --- Chance -----------------------------------------------------------------------------------------------------------


def generator(purpose: str, split: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([VERSION, PURPOSES.index(purpose), SPLITS.index(split), seed])


def uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(len(items) * rng.random())]


def shuffled(rng: np.random.Generator, items: Iterable[T]) -> list[T]:
    return [item for _, _, item in sorted((rng.random(), place, item) for place, item in enumerate(items))]


# --- Drawing a scene --------------------------------------------------------------------------------------------------


def draw_ground(rng: np.random.Generator) -> Colour:
    red, green, blue = (222 + int(24 * rng.random()) for _ in range(3))
    return red, green, blue


def draw_things(rng: np.random.Generator, number: int, first: Thing | None = None) -> list[Thing]:
    """Things of distinct colours; `first` is one of them if given."""
    colours = shuffled(rng, COLOURS)
    chosen = [] if first is None else [first]
    for colour in colours:
        if first is None or colour != first[0]:
            chosen.append((colour, pick(rng, SHAPES)))
    return chosen[:number]


def scatter(rng: np.random.Generator, things: Sequence[Thing], *, hide_first: bool = False) -> Scene:
    """Put things down at random, apart from each other. hide_first: the first one takes its room but is not visible."""
    for _ in range(MAX_SCENES):
        scene: Scene = ()
        for thing in things:
            placed = place(rng, scene, thing)
            if placed is None:
                break
            scene += (placed,)
        else:
            if hide_first:
                return scene[0]._replace(opacity=0.0), *scene[1:]
            return scene
    raise AssertionError(f"no room for {things} in {MAX_SCENES} scenes")


def place(rng: np.random.Generator, scene: Scene, thing: Thing) -> PlacedThing | None:
    """The thing at a free spot of the scene, or None if no spot was found."""
    radius = uniform(rng, RADII)
    edge = radius * REACH[thing[1]] + EDGE
    for _ in range(MAX_SPOTS):
        placed = PlacedThing(thing, uniform(rng, (edge, 1 - edge)), uniform(rng, (edge, 1 - edge)), radius)
        if fits(scene, None, placed):
            return placed
    return None


def newcomer(rng: np.random.Generator, scene: Scene, allowed: Iterable[Thing]) -> PlacedThing | None:
    """A thing of a colour that is not in the scene, at a free spot and not yet visible."""
    colours = {present.thing[0] for present in scene}
    things = [thing for thing in allowed if thing[0] not in colours]
    if not things:
        return None
    placed = place(rng, scene, pick(rng, things))
    return placed and placed._replace(opacity=0.0)


def moved(thing: PlacedThing, goal: Point, progress: float) -> PlacedThing:
    return thing._replace(
        x=thing.x + (goal[0] - thing.x) * progress,
        y=thing.y + (goal[1] - thing.y) * progress,
    )


def visible(scene: Scene) -> Scene:
    return tuple(thing for thing in scene if thing.opacity > 0)


# --- Room -------------------------------------------------------------------------------------------------------------


def is_clear(scene: Scene, index: int, goal: Point, *, but: int | None = None) -> bool:
    """Whether thing `index` can go straight to `goal` within the frame, keep `MARGIN` and overtake no thing closely.

    but: index of a thing that is not looked at.
    """
    mover = scene[index]
    if not in_frame(mover._replace(x=goal[0], y=goal[1])):
        return False
    for other, thing in enumerate(scene):
        if other in (index, but):
            continue
        before, after, gap = encounter(mover, goal, thing)
        overtakes = min(before, after) > -LEVEL and gap < CLEAR_GAP
        if gap < MARGIN or overtakes:
            return False
    return True


def is_pass(mover: PlacedThing, goal: Point, other: PlacedThing) -> bool:
    before, after, gap = encounter(mover, goal, other)
    return PASS_GAP[0] <= gap <= PASS_GAP[1] and min(before, after) >= LEAD


def encounter(mover: PlacedThing, goal: Point, other: PlacedThing) -> Encounter:
    path_x, path_y = goal[0] - mover.x, goal[1] - mover.y
    to_x, to_y = other.x - mover.x, other.y - mover.y
    path = math.sqrt(path_x * path_x + path_y * path_y)
    before = (to_x * path_x + to_y * path_y) / path
    nearest = min(path, max(0.0, before)) / path
    away_x, away_y = to_x - nearest * path_x, to_y - nearest * path_y
    distance = math.sqrt(away_x * away_x + away_y * away_y)
    return Encounter(before, path - before, distance - mover.reach - other.reach)


def fits(scene: Scene, index: int | None, thing: PlacedThing) -> bool:
    """Whether `thing` is in the frame and apart from every thing of the scene but `index`, which it replaces."""
    if not in_frame(thing):
        return False
    for other_index, other in enumerate(scene):
        distance = math.sqrt((thing.x - other.x) ** 2 + (thing.y - other.y) ** 2)
        if other_index != index and distance < thing.reach + other.reach + MARGIN:
            return False
    return True


def in_frame(thing: PlacedThing) -> bool:
    low, high = thing.reach + EDGE, 1 - thing.reach - EDGE
    return low <= thing.x <= high and low <= thing.y <= high


def touching_distance(near: PlacedThing, far: PlacedThing, dx: float, dy: float) -> float:
    """Distance of the centres at which `near`, coming along the unit vector (dx, dy), first touches `far`.

    Seen along that direction, two outlines touch where the front of one and the back of the other leave the least
    room. Both are piecewise linear across the direction, so the least room is level with a corner of one of them.
    """
    axes = np.array([[dx, -dy], [dy, dx]])
    front, back = outline(near) @ axes, outline(far) @ axes  # [corners, (along, across)]
    levels = np.concatenate([front[:, 1], back[:, 1]])
    return float((_foremost(front, levels) + _foremost(back * (-1.0, 1.0), levels)).max())


def outline(thing: PlacedThing) -> NDArray[np.float64]:
    """Corners about the centre, [corners, 2]."""
    turn = thing.angle
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return thing.radius * _unit_outline(thing.thing[1]) @ rotation


def _foremost(polygon: NDArray[np.float64], levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest first coordinate of a polygon [corners, 2] at each value of the second one; -inf if out of reach."""
    following = np.roll(polygon, -1, axis=0)
    # An edge along the direction divides by zero. It can be left out: its neighbours end where it does.
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (levels[:, None] - polygon[:, 1]) / (following[:, 1] - polygon[:, 1])  # [levels, edges]
        along = polygon[:, 0] + share * (following[:, 0] - polygon[:, 0])
        return np.where((share >= 0) & (share <= 1), along, -np.inf).max(axis=1)


@functools.cache
def _unit_outline(shape: str) -> NDArray[np.float64]:
    distances, number = CORNER_DISTANCES[shape], NUM_CORNERS[shape]
    corners = []
    for corner in range(number):
        angle = FIRST_CORNER[shape] + 2 * math.pi * corner / number
        distance = distances[corner % len(distances)]
        corners.append((distance * math.cos(angle), distance * math.sin(angle)))
    return np.array(corners)
