"""Every sentence means one thing; the hold-out is that of version 1."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest

from llm_jepa.core.errors import UserError
from llm_jepa.synthetic.shapestream import COLOURS, KINDS, SHAPES, THINGS, VERSION, Event, captions, held_out, slots

from .helpers import ACTED, every_event

PINNED_LEFT = ["blue triangle", "green circle", "orange circle", "purple square", "yellow triangle"]
PINNED_TRIPLES = "ad3baabee60be3bc"


def without_things(text):
    """A caption with its noun phrases cut out, so that phrases can be compared."""
    for colour, shape in THINGS:
        for name in (f"{colour} {shape}", f"the {shape} that is {colour}"):
            text = text.replace(name, "X")
    return " ".join(word for word in text.split() if word not in ("the", "a", "an", "one"))


def test_shapes_and_colours_are_those_of_the_captions():
    assert len(COLOURS) == 6 and len(SHAPES) == 4 and len(THINGS) == 24 and len(KINDS) == 13


def test_every_caption_of_the_grammar_means_one_thing_and_is_read_back():
    """10 x 24 actors x 40 + 2 x 552 pairs x 40 + 10 = 53,770 sentences; with two meanings of one, fewer."""
    said = [(caption, event) for event in every_event() for caption in captions(event, wordings="all")]
    assert len(said) == len({caption for caption, _ in said}) == 53770
    for caption, event in said:
        assert slots(caption) == (event.kind, event.actor, event.patient)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("the red circle moves left", ("left", ("red", "circle"), None)),
        ("an orange star is rotating", ("spin", ("orange", "star"), None)),
        ("The square that is blue  becomes invisible.", ("vanish", ("blue", "square"), None)),
        ("one green triangle is hit by the purple star", ("hit", ("purple", "star"), ("green", "triangle"))),
        ("a green triangle hits the purple star", ("hit", ("green", "triangle"), ("purple", "star"))),
        ("the star that is red is overtaken by the blue star", ("pass", ("blue", "star"), ("red", "star"))),
        ("nothing happens", ("idle", None, None)),
        ("a orange star is rotating", None),
        ("the red circle", None),
        ("the red circle moves left right", None),
        ("the circle moves left", None),
        ("the red circle hits one blue star", None),
        ("the red circle hits the red circle", None),
        ("", None),
    ],
)
def test_slots_by_hand(text, meaning):
    assert slots(text) == meaning


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_wordings_are_disjoint_from_those_of_training(kind):
    """As sentences and as phrases, of any kind: a held-out phrase of one kind is no training phrase of another."""
    event = next(event for event in every_event() if event.kind == kind)
    train, held = captions(event), captions(event, wordings="held_out")
    forms = 1 if kind == "idle" else 4
    assert (len(set(train)), len(set(held))) == (8 * forms, 2 * forms)
    assert captions(event, wordings="train") == train and captions(event, wordings="all") == train + held
    assert len({without_things(text) for text in held}) == 2
    trained = {without_things(text) for other in every_event() for text in captions(other)}
    assert not trained & {without_things(text) for text in held}
    assert len(trained) == 8 * len(KINDS)


def test_subject_forms_and_passives_by_hand():
    event = Event("hit", 0, 1, ("orange", "star"), ("red", "square"))
    assert captions(event)[:4] == [
        "the orange star hits the red square",
        "an orange star hits the red square",
        "the star that is orange hits the red square",
        "one orange star hits the red square",
    ]
    assert "the square that is red is hit by the orange star" in captions(event)
    assert "a red square is hit by the orange star" in captions(event)


@pytest.mark.parametrize(
    "event",
    [
        Event("left", 0, 1),
        Event("left", 0, 1, ("red", "star"), ("blue", "star")),
        Event("hit", 0, 1, ("red", "star")),
        Event("hit", 0, 1, None, ("red", "star")),
        Event("idle", 0, 1, ("red", "star")),
        Event("jump", 0, 1, ("red", "star")),
    ],
)
def test_an_event_that_is_none_has_no_captions(event):
    with pytest.raises(UserError):
        captions(event)


def test_a_fifth_of_the_actors_of_each_kind_is_held_out_and_all_colours_and_shapes_remain():
    for kind in ACTED:
        possible = [thing for thing in THINGS if kind != "spin" or thing[1] != "circle"]
        kept = [thing for thing in THINGS if held_out(thing, kind)]
        trained = [thing for thing in possible if thing not in kept]
        assert len(kept) == (4 if kind == "spin" else 5) and set(kept) <= set(possible)
        assert len({colour for colour, _ in kept}) == len(kept)
        assert max(Counter(shape for _, shape in kept).values()) <= 2
        assert {colour for colour, _ in trained} == set(COLOURS)
        assert {shape for _, shape in trained} == {shape for _, shape in possible}
    assert not any(held_out(thing, "idle") for thing in THINGS)
    with pytest.raises(UserError, match="jump"):
        held_out(("red", "star"), "jump")


def test_the_held_out_triples_are_those_of_version_1():
    """Published figures are on these. A change of the hash or the names needs another VERSION."""
    triples = sorted((*thing, kind) for kind in ACTED for thing in THINGS if held_out(thing, kind))
    assert VERSION == 1 and len(triples) == 59
    assert [f"{colour} {shape}" for colour, shape, kind in triples if kind == "left"] == PINNED_LEFT
    assert hashlib.sha256(json.dumps(triples).encode()).hexdigest()[:16] == PINNED_TRIPLES
