"""What happens in ShapeStream: how things move, and the plans of clips and streams, scene by scene.

The kind of an event is the most specific one: if a thing that moves left overtakes another closely, the kind is "pass".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .scenes import (
    LEAD,
    MAX_SCENES,
    PASS_GAP,
    SLOPE,
    Colour,
    PlacedThing,
    Point,
    Scene,
    draw_ground,
    draw_things,
    fits,
    generator,
    is_clear,
    is_pass,
    moved,
    newcomer,
    pick,
    scatter,
    shuffled,
    touching_distance,
    uniform,
    visible,
)
from .texts import KINDS, Event, Thing, actors_of, held_out

FPS = 8
NUM_FRAMES = 16  # of a clip: two seconds

# Lengths are fractions of the frame's side.
RADIUS_LIMITS = (0.065, 0.18)  # of a thing that shrinks or grows: at 64 pixels a smaller star is a blot
GROWTH = (1.6, 1.9)
TRAVEL = (0.25, 0.45)
APPROACH = 0.12  # the least path before a hit
PUSH = (0.15, 0.25)
CONTACT = (0.5, 0.6)  # of the duration of a hit: long enough for a frame of any event of 5 or more to show it
OVERLAP = 0.008  # at a hit: half a pixel of 64, so that no seam of ground shows between the two
TURN = (180, 270)  # degrees: 13 to 34 a frame, while a star looks the same after 72
NUM_BLINKS = 3
TRIES_PER_ACTOR = 4
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # y points down


class Action(NamedTuple):
    """Something that can happen in `scene`; `changed(p)` gives the things by index that differ at progress p <= 1."""

    kind: str
    scene: Scene
    actor: int
    patient: int | None
    changed: Callable[[float], dict[int, PlacedThing]]

    def at(self, progress: float) -> Scene:
        changed = self.changed(progress)
        return tuple(changed.get(index, thing) for index, thing in enumerate(self.scene))

    def event(self, start: int, end: int) -> Event:
        """The event if it covers the frames from `start` up to, but not including, `end`."""
        patient = None if self.patient is None else self.scene[self.patient].thing
        return Event(self.kind, start / FPS, end / FPS, self.scene[self.actor].thing, patient)


class ClipPlan(NamedTuple):
    """scenes: one for each of the `NUM_FRAMES` frames. ground: colour of the background."""

    event: Event
    scenes: list[Scene]
    ground: Colour


class StreamPlan(NamedTuple):
    """events: in order and without gaps. scenes: one for each frame."""

    events: tuple[Event, ...]
    scenes: list[Scene]
    ground: Colour


def plan_clip(seed: int, split: str, kind: str | None) -> ClipPlan:
    """One event of two seconds; its kind is drawn if `kind` is None."""
    rng = generator("clip", split, seed)
    # Drawn even if the kind is given: the clip of a kind is the clip that happens to have it.
    drawn = pick(rng, KINDS if split != "compose" else KINDS[:-1])
    kind = kind or drawn
    ground, num_things = draw_ground(rng), 1 + int(3 * rng.random())
    start, end = 1 + int(3 * rng.random()), 13 + int(3 * rng.random())
    if kind == "idle":
        scene = scatter(rng, draw_things(rng, num_things))
        return ClipPlan(Event("idle", 0.0, NUM_FRAMES / FPS), [scene] * NUM_FRAMES, ground)
    if kind in ("hit", "pass", "vanish"):
        num_things = max(num_things, 2)
    allowed = [thing for thing in actors_of(kind) if held_out(thing, kind) == (split == "compose")]
    action = stage(rng, kind, num_things, allowed)
    scenes = [action.scene] * start + unfold(action, end - start)
    return ClipPlan(action.event(start, end), scenes + scenes[-1:] * (NUM_FRAMES - end), ground)


def plan_stream(
    seed: int, split: str, num_frames: int, gap: tuple[float, float], duration: tuple[float, float], num_things: int
) -> StreamPlan:
    """Rests and events in turn, until the next event would not end within `num_frames`."""
    rng = generator("stream", split, seed)
    ground, scene = draw_ground(rng), scatter(rng, draw_things(rng, num_things))
    events: list[Event] = []
    scenes: list[Scene] = []
    uses: Counter[str] = Counter()  # of each kind
    frame = 0
    while True:
        start = frame + round(uniform(rng, gap) * FPS)
        end = start + round(uniform(rng, duration) * FPS)
        if end > num_frames:
            break
        frame = start
        action = _next_action(rng, scene, uses, num_things, split)
        if action is None:  # no event fits, so the rest goes on
            continue
        events += [Event("idle", len(scenes) / FPS, start / FPS), action.event(start, end)]
        scenes += [scene] * (start - len(scenes)) + unfold(action, end - start)
        scene, frame = visible(scenes[-1]), end
        uses[action.kind] += 1
    if len(scenes) < num_frames:
        events.append(Event("idle", len(scenes) / FPS, num_frames / FPS))
        scenes += [scene] * (num_frames - len(scenes))
    return StreamPlan(tuple(events), scenes, ground)


def stage(rng: np.random.Generator, kind: str, num_things: int, allowed: Sequence[Thing]) -> Action:
    """An event of this kind in a new scene; scenes are drawn until one has room for it. allowed: possible actors."""
    actor = pick(rng, allowed)
    for _ in range(MAX_SCENES):
        scene = scatter(rng, draw_things(rng, num_things, actor), hide_first=kind == "appear")
        if action := _plan(rng, scene, kind, 0):
            return action
    raise AssertionError(f"no scene of {num_things} things in {MAX_SCENES} has room for {actor} to {kind}")


def unfold(action: Action, num_frames: int) -> list[Scene]:
    return [action.at((frame + 1) / num_frames) for frame in range(num_frames)]


def _next_action(
    rng: np.random.Generator, scene: Scene, uses: Counter[str], num_things: int, split: str
) -> Action | None:
    """An event that fits into the scene: the kinds used least come first, their actors in random order."""
    for kind in sorted(shuffled(rng, KINDS[:-1]), key=lambda kind: uses[kind]):
        allowed = [thing for thing in actors_of(kind) if split == "test" or not held_out(thing, kind)]
        candidates = shuffled(rng, range(len(scene)))
        stage_scene = scene
        if kind == "appear":
            arrival = newcomer(rng, scene, allowed) if len(scene) < num_things else None
            if arrival is None:
                continue
            stage_scene, candidates = (*scene, arrival), [len(scene)]
        for actor in candidates:
            if stage_scene[actor].thing not in allowed:
                continue
            for _ in range(TRIES_PER_ACTOR):
                if action := _plan(rng, stage_scene, kind, actor):
                    return action
    return None


def _plan(rng: np.random.Generator, scene: Scene, kind: str, index: int) -> Action | None:
    """One attempt to let thing `index` do this; None if there is no room."""
    if kind in DIRECTIONS:
        return _plan_move(rng, scene, kind, index)
    if kind in ("grow", "shrink"):
        return _plan_growth(rng, scene, kind, index)
    if kind in ("hit", "pass"):
        plan = {"hit": _plan_hit, "pass": _plan_pass}[kind]
        for other in shuffled(rng, range(len(scene))):
            if other != index and (action := plan(rng, scene, index, other)):
                return action
        return None
    actor = scene[index]
    if kind == "appear":
        return _alone(kind, scene, index, lambda p: actor._replace(opacity=p))
    if kind == "vanish":
        if len(scene) == 1:  # the scene would be empty
            return None
        return _alone(kind, scene, index, lambda p: actor._replace(opacity=1 - p))
    if kind == "spin":
        turn = math.radians(uniform(rng, TURN)) * pick(rng, (-1, 1))
        return _alone(kind, scene, index, lambda p: actor._replace(angle=actor.angle + turn * p))
    assert kind == "flash"  # off in every second of 2 * NUM_BLINKS phases; on in the last frame
    return _alone(
        kind, scene, index, lambda p: actor._replace(opacity=float(p == 1 or int(2 * NUM_BLINKS * p) % 2 == 0))
    )


def _alone(kind: str, scene: Scene, index: int, at: Callable[[float], PlacedThing]) -> Action:
    """An action in which only thing `index` changes; `at(p)` is the thing at progress p."""
    return Action(kind, scene, index, None, lambda progress: {index: at(progress)})


def _travel(kind: str, scene: Scene, index: int, patient: int | None, goal: Point) -> Action:
    return Action(kind, scene, index, patient, lambda progress: {index: moved(scene[index], goal, progress)})


def _plan_move(rng: np.random.Generator, scene: Scene, kind: str, index: int) -> Action | None:
    actor = scene[index]
    forward, sideways = uniform(rng, TRAVEL), SLOPE * uniform(rng, (-1, 1))
    dx, dy = DIRECTIONS[kind]
    goal = actor.x + forward * (dx - sideways * dy), actor.y + forward * (dy + sideways * dx)
    if not is_clear(scene, index, goal):
        return None
    return _travel(kind, scene, index, None, goal)


def _plan_growth(rng: np.random.Generator, scene: Scene, kind: str, index: int) -> Action | None:
    actor, factor = scene[index], uniform(rng, GROWTH)
    final = actor.radius * factor if kind == "grow" else actor.radius / factor
    largest = actor._replace(radius=max(final, actor.radius))
    if not RADIUS_LIMITS[0] <= final <= RADIUS_LIMITS[1] or not fits(scene, index, largest):
        return None
    return _alone(kind, scene, index, lambda p: actor._replace(radius=actor.radius + (final - actor.radius) * p))


def _plan_hit(rng: np.random.Generator, scene: Scene, index: int, other: int) -> Action | None:
    """The actor goes straight at the patient's centre until they touch; then the patient goes on in the same line."""
    actor, patient = scene[index], scene[other]
    dx, dy = patient.x - actor.x, patient.y - actor.y
    if min(abs(dx), abs(dy)) > SLOPE * max(abs(dx), abs(dy)):
        return None
    distance, push = math.sqrt(dx * dx + dy * dy), uniform(rng, PUSH)
    touching = touching_distance(actor, patient, dx / distance, dy / distance) - OVERLAP
    if distance - touching < APPROACH:
        return None
    reached, pushed = (distance - touching) / distance, (distance + push) / distance
    contact = actor.x + reached * dx, actor.y + reached * dy
    goal = actor.x + pushed * dx, actor.y + pushed * dy
    if not is_clear(scene, index, contact, but=other) or not is_clear(scene, other, goal, but=index):
        return None

    def changed(progress: float) -> dict[int, PlacedThing]:
        before = min(1.0, progress / CONTACT[0])  # of the actor's path
        after = max(0.0, (progress - CONTACT[1]) / (1 - CONTACT[1]))  # of the patient's path
        return {index: moved(actor, contact, before), other: moved(patient, goal, after)}

    return Action("hit", scene, index, other, changed)


def _plan_pass(rng: np.random.Generator, scene: Scene, index: int, other: int) -> Action | None:
    """The actor goes along an axis, tilted so that its path leaves a narrow gap to the patient."""
    actor, patient = scene[index], scene[other]
    for dx, dy in shuffled(rng, DIRECTIONS.values()):
        ahead = (patient.x - actor.x) * dx + (patient.y - actor.y) * dy
        aside = (patient.y - actor.y) * dx - (patient.x - actor.x) * dy
        if ahead < LEAD:
            continue
        gap = uniform(rng, PASS_GAP)
        slope = (aside - math.copysign(actor.reach + patient.reach + gap, aside)) / ahead
        forward = ahead + LEAD * uniform(rng, (1, 2))
        goal = actor.x + forward * (dx - slope * dy), actor.y + forward * (dy + slope * dx)
        if abs(slope) <= SLOPE and is_clear(scene, index, goal, but=other) and is_pass(actor, goal, patient):
            return _travel("pass", scene, index, other, goal)
    return None
