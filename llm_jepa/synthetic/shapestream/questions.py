"""Questions about a clip of ShapeStream, with their answers and candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scenes import PlacedThing, Scene, pick, visible
from .texts import COLOURS, KINDS, NUM_ROLES, PHRASES, SHAPES, SUBJECT_FORMS, THINGS, Event, Thing, name_of

YES_NO = ("yes", "no")
COUNTS = ("one", "two", "three")
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")
OFF_CENTRE = 0.08  # there is no question about the place of a thing that is closer to a centre line


@dataclass(frozen=True)
class Question:
    """A question about a clip; `answer` is one of `candidates`, whose order does not depend on it.

    About the event:

        what           12 candidates; events with an actor
        colour, shape  6 and 4; events with an actor only
        who_first      2; hit and pass
        touch          2; hit and pass

    About the scene at the end:

        count          3

    About each thing in it:

        shape_of       4
        colour_of      6; if no other thing has its shape
        presence       2; as often of an absent thing
        where          4; if the thing is clearly in one quarter
    """

    kind: str
    question: str
    answer: str
    candidates: tuple[str, ...]


def ask(rng: np.random.Generator, event: Event, scene: Scene) -> tuple[Question, ...]:
    """Every question about the event and about its last scene. Only the absent things are drawn by chance."""
    present = visible(scene)
    questions = _about_event(event)
    questions.append(Question("count", "how many objects are visible at the end?", COUNTS[len(present) - 1], COUNTS))
    for thing in present:
        questions += _about_thing(rng, thing, present)
    return tuple(dict.fromkeys(questions))  # without repetition: an absent thing may have been drawn twice


def _about_event(event: Event) -> list[Question]:
    if event.actor is None:
        return []
    actor = name_of(event.actor)
    does = {kind: PHRASES[kind][0].format(A="it", B="another object") for kind in KINDS if NUM_ROLES[kind]}
    questions = [Question("what", f"what does {actor} do?", does[event.kind], tuple(does.values()))]
    if event.patient is None:
        colour, shape = event.actor
        questions += [
            Question("colour", "what colour is the object that changes?", colour, tuple(COLOURS)),
            Question("shape", "what shape is the object that changes?", shape, SHAPES),
        ]
    else:
        first, second = sorted((actor, name_of(event.patient)))  # by name, so that the order does not reveal the actor
        touch = YES_NO[event.kind != "hit"]
        questions += [
            Question("who_first", "which object moves first?", actor, (first, second)),
            Question("touch", f"do {first} and {second} touch?", touch, YES_NO),
        ]
    return questions


def _about_thing(rng: np.random.Generator, thing: PlacedThing, present: Scene) -> list[Question]:
    colour, shape = thing.thing
    questions = [Question("shape_of", f"what shape is the {colour} object at the end?", shape, SHAPES)]
    if [other.thing[1] for other in present].count(shape) == 1:
        questions.append(Question("colour_of", f"what colour is the {shape} at the end?", colour, tuple(COLOURS)))
    for answer, shown in (("yes", thing.thing), ("no", _absent(rng, present))):
        name = name_of(shown, SUBJECT_FORMS[1])
        questions.append(Question("presence", f"is there {name} at the end?", answer, YES_NO))
    if min(abs(thing.x - 0.5), abs(thing.y - 0.5)) >= OFF_CENTRE:
        place = PLACES[2 * (thing.y > 0.5) + (thing.x > 0.5)]
        questions.append(Question("where", f"where is {name_of(thing.thing)} at the end?", place, PLACES))
    return questions


def _absent(rng: np.random.Generator, present: Sequence[PlacedThing]) -> Thing:
    """A thing that is not in the scene, for a question whose answer is no.

    Half of these things share a colour or a shape with one that is in the scene. Otherwise one attribute would reveal
    every answer. Things of one scene have distinct colours, so a thing that shares a colour is surely absent.
    """
    things = [thing.thing for thing in present]
    colours, shapes = {thing[0] for thing in things}, {thing[1] for thing in things}
    choices = {
        "colour": [thing for thing in THINGS if thing[0] in colours and thing not in things],
        "shape": [thing for thing in THINGS if thing[0] not in colours and thing[1] in shapes],
        "nothing": [thing for thing in THINGS if thing[0] not in colours and thing[1] not in shapes],
    }
    return pick(rng, choices[pick(rng, ("colour", "shape", "nothing", "nothing"))])
