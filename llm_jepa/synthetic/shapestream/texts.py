"""The words of ShapeStream: things, kinds of events, the sentences for them, and what is kept from training."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.errors import UserError

# Part of every seed and of the hash of the hold-out: a change of the world is a change of the data.
VERSION = 1

Thing = tuple[str, str]  # (colour, shape)
Meaning = tuple[str, Thing | None, Thing | None]  # (kind, actor, patient)

# All channels are in 9..246, and so are those of the ground and the outline: noise of at most 9 levels cannot wrap.
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 70),
    "blue": (40, 90, 214),
    "yellow": (238, 205, 40),
    "purple": (140, 60, 180),
    "orange": (240, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "star")
THINGS: tuple[Thing, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

# The last NUM_HELD_OUT phrases of a kind are never training text. Rare words ("twirls", "dwindles") come before them:
# whether a sentence encoder knows such words is a question about the encoder. {A} acts, {B} is acted upon.
# fmt: off
PHRASES: dict[str, tuple[str, ...]] = {
    "left": (
        "{A} moves left", "{A} slides to the left", "{A} goes toward the left side", "{A} drifts leftward",
        "{A} shifts left", "{A} glides leftward", "{A} is moving to the left", "{A} runs left",
        "{A} heads left", "{A} travels to the left",
    ),
    "right": (
        "{A} moves right", "{A} slides to the right", "{A} goes toward the right side", "{A} drifts rightward",
        "{A} shifts right", "{A} glides rightward", "{A} is moving to the right", "{A} runs right",
        "{A} heads right", "{A} travels to the right",
    ),
    "up": (
        "{A} moves up", "{A} slides upward", "{A} goes toward the top", "{A} rises", "{A} shifts up",
        "{A} glides upward", "{A} is moving up", "{A} ascends",
        "{A} heads upward", "{A} climbs to a higher place",
    ),
    "down": (
        "{A} moves down", "{A} slides downward", "{A} goes toward the bottom", "{A} sinks", "{A} shifts down",
        "{A} glides downward", "{A} is moving down", "{A} descends",
        "{A} heads downward", "{A} drops to a lower place",
    ),
    "grow": (
        "{A} grows", "{A} gets bigger", "{A} becomes larger", "{A} expands", "{A} enlarges", "{A} inflates",
        "{A} is growing", "{A} gets large",
        "{A} increases in size", "{A} swells",
    ),
    "shrink": (
        "{A} shrinks", "{A} gets smaller", "{A} dwindles", "{A} contracts", "{A} diminishes", "{A} deflates",
        "{A} is shrinking", "{A} gets small",
        "{A} decreases in size", "{A} becomes smaller",
    ),
    "appear": (
        "{A} appears", "{A} shows up", "{A} comes into view", "{A} fades in", "{A} pops up", "{A} emerges",
        "{A} can be seen all of a sudden", "{A} arrives",
        "{A} becomes visible", "{A} enters the scene",
    ),
    "vanish": (
        "{A} vanishes", "{A} disappears", "{A} goes out of view", "{A} fades away", "{A} goes away", "{A} dissolves",
        "{A} can no longer be seen", "{A} departs",
        "{A} becomes invisible", "{A} leaves the scene",
    ),
    "spin": (
        "{A} spins", "{A} rotates", "{A} twirls", "{A} is rotating", "{A} whirls", "{A} pivots", "{A} is spinning",
        "{A} swivels",
        "{A} revolves on the spot", "{A} turns around in place",
    ),
    "flash": (
        "{A} flashes", "{A} blinks", "{A} flickers on and off", "{A} is blinking", "{A} twinkles", "{A} strobes",
        "{A} is flashing", "{A} flickers",
        "{A} keeps flashing", "{A} goes off and on again and again",
    ),
    "hit": (
        "{A} hits {B}", "{A} bumps into {B}", "{A} pushes {B} away", "{B} is hit by {A}", "{A} strikes {B}",
        "{A} crashes into {B}", "{B} is struck by {A}", "{A} knocks into {B}",
        "{A} collides with {B}", "{B} is knocked away by {A}",
    ),
    "pass": (
        "{A} passes {B}", "{A} moves past {B}", "{B} is overtaken by {A}", "{B} is passed by {A}",
        "{A} overtakes {B}", "{A} travels past {B}", "{A} is passing {B}", "{A} glides past {B}",
        "{A} slides past {B} without touching it", "{A} goes by {B}",
    ),
    "idle": (
        "nothing moves", "everything stays still", "the scene does not change", "all objects are at rest",
        "there is no motion", "the picture is frozen", "not a thing changes", "everything is still",
        "nothing happens", "no object is moving",
    ),
}
# fmt: on
NUM_HELD_OUT = 2
KINDS = tuple(PHRASES)
NUM_ROLES = {kind: sum(role in phrases[0] for role in ("{A}", "{B}")) for kind, phrases in PHRASES.items()}
SUBJECT_FORMS = (
    "the {colour} {shape}",
    "{an} {colour} {shape}",
    "the {shape} that is {colour}",
    "one {colour} {shape}",
)
WORDINGS = {"train": slice(None, -NUM_HELD_OUT), "held_out": slice(-NUM_HELD_OUT, None), "all": slice(None)}


@dataclass(frozen=True)
class Event:
    """One event from `start_s` to `end_s`, in seconds. `actor` and `patient` are things, or None if the kind has none.

    At `FPS` the event covers the frames start_s * FPS up to, but not including, end_s * FPS: the first of them shows
    the first change and the last one the final state.
    """

    kind: str
    start_s: float
    end_s: float
    actor: Thing | None = None
    patient: Thing | None = None


def captions(event: Event, *, wordings: str = "train") -> list[str]:
    """Every sentence of the grammar that describes `event`, all distinct and in a fixed order.

    Phrases times forms of the grammatical subject, which is the patient in a passive: 16 sentences for "train" (4 if
    idle), 8 for "held_out" (2), and both for "all". The first one is the plainest.

    Raises UserError for unknown wordings or kind, and for an event that lacks an actor or patient or has one too many.
    """
    check_choice("wordings", wordings, tuple(WORDINGS))
    check_choice("kind", event.kind, KINDS)
    things = {"{A}": event.actor, "{B}": event.patient}
    present = [thing is not None for thing in things.values()]
    if present != [role < NUM_ROLES[event.kind] for role in range(2)]:
        raise UserError(
            f"kind={event.kind!r} has {NUM_ROLES[event.kind]} of (actor, patient); this event has "
            f"actor={event.actor} and patient={event.patient}"
        )
    sentences = []
    for phrase in PHRASES[event.kind][WORDINGS[wordings]]:
        subject = things.get(phrase[:3])
        for form in SUBJECT_FORMS if subject else SUBJECT_FORMS[:1]:
            sentence = phrase
            for role, thing in things.items():
                if thing:
                    sentence = sentence.replace(role, name_of(thing, form if thing == subject else SUBJECT_FORMS[0]))
            sentences.append(sentence)
    return sentences


def slots(text: str) -> Meaning | None:
    """(kind, actor, patient) of a sentence of the grammar, in any wording; None for any other text.

    The exact inverse of `captions`. Case, repeated spaces and a final full stop do not matter.
    """
    return _sentences().get(" ".join(text.lower().split()).removesuffix(".").rstrip())


def held_out(thing: Thing, kind: str) -> bool:
    """Whether `thing` as the actor of `kind` is kept from training: a fifth of each kind's actors, by sha256.

    5 of 24 things, of "spin" 4 of the 18 that are not circles: 59 of 282 triples. The actors of a kind are taken in
    the order of their hashes, but each colour once and each shape twice at most. So the training data still show every
    colour and shape with the kind, and the held-out actors are varied. False for "idle" and for circles that spin.

    Raises UserError for an unknown kind.
    """
    check_choice("kind", kind, KINDS)
    return thing in _held_out_actors(kind)


def actors_of(kind: str) -> tuple[Thing, ...]:
    """The things that can do this; none for "idle"."""
    if NUM_ROLES[kind] == 0:
        return ()
    if kind == "spin":
        return tuple(thing for thing in THINGS if thing[1] != "circle")  # a turned circle looks the same
    return THINGS


def name_of(thing: Thing, form: str = SUBJECT_FORMS[0]) -> str:
    colour, shape = thing
    return form.format(an="an" if colour[0] in "aeiou" else "a", colour=colour, shape=shape)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises UserError for a value that is not one of `choices`."""
    if value not in choices:
        raise UserError(f"{name}={value!r} does not exist here; use one of {', '.join(choices)}")


@functools.cache
def _held_out_actors(kind: str) -> tuple[Thing, ...]:
    actors = actors_of(kind)
    chosen: list[Thing] = []
    for thing in sorted(actors, key=lambda thing: _hash_of(thing, kind)):
        colours, shapes = [colour for colour, _ in chosen], [shape for _, shape in chosen]
        if len(chosen) < round(len(actors) / 5) and thing[0] not in colours and shapes.count(thing[1]) < 2:
            chosen.append(thing)
    return tuple(chosen)


def _hash_of(thing: Thing, kind: str) -> bytes:
    return hashlib.sha256(f"{VERSION} {' '.join(thing)} {kind}".encode()).digest()


@functools.cache
def _sentences() -> dict[str, Meaning]:
    """Every sentence of the grammar (53,770) with its meaning. A table is an inverse that needs no parser."""
    table: dict[str, Meaning] = {}
    for kind in KINDS:
        for actor, patient in _roles_of(kind):
            for sentence in captions(Event(kind, 0, 0, actor, patient), wordings="all"):
                table[sentence] = (kind, actor, patient)
    return table


def _roles_of(kind: str) -> list[tuple[Thing | None, Thing | None]]:
    """Every (actor, patient) that the grammar can give to this kind."""
    if NUM_ROLES[kind] == 0:
        return [(None, None)]
    if NUM_ROLES[kind] == 1:
        return [(actor, None) for actor in THINGS]
    return [(actor, patient) for actor in THINGS for patient in THINGS if actor != patient]
