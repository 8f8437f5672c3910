"""Plans and pixels of ShapeStream, for the tests."""

from __future__ import annotations

import itertools

import numpy as np

from llm_jepa.synthetic.shapestream import COLOURS, FPS, KINDS, THINGS, Event
from llm_jepa.synthetic.shapestream import events as plans

ONE_ACTOR = KINDS[:10]
ACTED = KINDS[:12]
AXIS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def every_event():
    """One event for each meaning of the grammar: 10 x 24 with an actor, 2 x 24 x 23 with two things, 1 without."""
    for kind in KINDS:
        if kind == "idle":
            yield Event(kind, 0, 1)
        elif kind in ONE_ACTOR:
            yield from (Event(kind, 0, 1, actor) for actor in THINGS)
        else:
            yield from (Event(kind, 0, 1, *pair) for pair in itertools.permutations(THINGS, 2))


def planned(seed, split, kind):
    return plans.plan_clip(seed, split, kind)


def plan_stream(seed, split="train", seconds=120, gap=(4, 12), duration=(1.0, 1.8), num_objects=3):
    return plans.plan_stream(seed, split, seconds * FPS, gap, duration, num_objects)


def mask(frame, colour):
    """Pixels of a colour: 35 levels off at most, when the two most alike, yellow and orange, are 76 apart."""
    return ((frame.astype(int) - COLOURS[colour]) ** 2).sum(axis=-1) < 35**2


def centre(pixels):
    return np.argwhere(pixels).mean(axis=0)[::-1] / len(pixels)  # (x, y), as fractions of the side


def separation(one, other):
    """Least distance between two masks, as a fraction of the side."""
    a, b = np.argwhere(one), np.argwhere(other)
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1)).min() / len(one)


def changed_colours(before, during):
    """Colours whose pixels are others in some frame; an edge pixel may fall in and out of a mask by the noise."""
    changed = set()
    for colour in COLOURS:
        old = mask(before, colour)
        if any((old ^ mask(frame, colour)).sum() > 0.15 * old.sum() + 4 for frame in during):
            changed.add(colour)
    return changed


def assert_shows(event, before, during):
    """That the frames of an event, and the last one before it, show what the event says."""
    if event.kind == "idle":
        everything = np.concatenate([before[None], during]).astype(int)
        assert (everything.max(axis=0) - everything.min(axis=0)).max() <= 18
        return
    colour, after = event.actor[0], during[-1]
    then, now = mask(before, colour), mask(after, colour)
    assert changed_colours(before, during) == {colour} | ({event.patient[0]} if event.kind == "hit" else set())
    areas = [mask(frame, colour).sum() for frame in during]
    if event.kind in AXIS:
        path = centre(now) - centre(then)
        forward, sideways = path @ AXIS[event.kind], abs(path @ AXIS[event.kind][::-1])
        assert 0.23 < forward < 0.47 and sideways < 0.27 * forward
    if event.kind in ("grow", "shrink"):
        ratio = now.sum() / then.sum()
        assert ratio > 1.9 if event.kind == "grow" else ratio < 1 / 1.9
        assert all((b - a) * (1 if event.kind == "grow" else -1) > -8 for a, b in itertools.pairwise(areas))
        assert np.abs(centre(now) - centre(then)).max() < 0.02
    if event.kind == "appear":
        assert not then.any() and now.sum() > 40
    if event.kind == "vanish":
        assert then.sum() > 20 and not now.any()
    if event.kind == "spin":
        assert np.ptp(areas) < 0.3 * then.sum() and np.abs(centre(now) - centre(then)).max() < 0.03
    if event.kind == "flash":
        shown = [area > 0 for area in areas]
        assert shown[-1] and sum(a and not b for a, b in itertools.pairwise([True, *shown])) == 3
        assert {0 if not area else int(abs(area - then.sum()) < 0.2 * then.sum() + 4) for area in areas} == {0, 1}
    if event.kind in ("hit", "pass"):
        other = event.patient[0]
        gaps = [separation(mask(frame, colour), mask(frame, other)) for frame in during]
        path = centre(now) - centre(then)
        pushed = centre(mask(after, other)) - centre(mask(before, other))
        to_other = centre(mask(before, other)) - centre(then)
    if event.kind == "hit":
        assert min(gaps) < 0.07 < gaps[-1], "4 pixels at most, of which 2 are outline; a pass has 5 or more"
        assert 0.13 < np.linalg.norm(pushed) < 0.27
        assert pushed @ path > 0.97 * np.linalg.norm(pushed) * np.linalg.norm(path)
        moved = {c: [bool(changed_colours(before, [frame]) & {c}) for frame in during] for c in (colour, other)}
        assert moved[colour].index(True) < moved[other].index(True), "the actor moves first"
    if event.kind == "pass":
        assert min(gaps) > 0.07 and np.abs(pushed).max() < 0.02
        level = to_other @ path / np.linalg.norm(path)
        assert 0.1 < level < np.linalg.norm(path) - 0.1, "level with the patient on the way, not at its ends"
