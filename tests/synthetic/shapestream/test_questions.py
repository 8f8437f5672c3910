"""Answers follow from the pixels, and candidates do not reveal them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from llm_jepa.synthetic.shapestream import COLOURS, KINDS, PHRASES, THINGS, Event, captions, clip, slots
from llm_jepa.synthetic.shapestream.questions import ask
from llm_jepa.synthetic.shapestream.scenes import generator

from .helpers import centre, changed_colours, mask, planned, separation


def read_thing(text):
    """The (colour, shape) named in a text, in order."""
    return [t for _, t in sorted((text.find(f"{c} {s}"), (c, s)) for c, s in THINGS if f"{c} {s}" in text)]


def seen_shape(pixels):
    """By the strongest of the harmonics 3, 4 and 5 of its outline; a circle has none."""
    y, x = np.argwhere(pixels).mean(axis=0)
    steps = np.arange(0, len(pixels), 0.5)
    profile = []
    for angle in np.radians(np.arange(0, 360, 3)):
        along = np.stack([y + steps * np.sin(angle), x + steps * np.cos(angle)]).round().astype(int)
        along = along[:, (along >= 0).all(axis=0) & (along < len(pixels)).all(axis=0)]
        profile.append(steps[np.flatnonzero(pixels[along[0], along[1]]).max()])
    strength = np.abs(np.fft.rfft(profile))[[3, 4, 5]] / np.sum(profile)
    return "circle" if strength.max() < 0.02 else ("triangle", "square", "star")[strength.argmax()]


def test_answers_follow_from_the_frames():
    """Every question of 65 clips is answered again from pixels, the kind of the event and the text of the question."""
    asked = Counter()
    for seed in range(65):
        sample = clip(seed, kind=KINDS[seed % 13], size=128)
        last, event = sample.frames[-1], sample.event
        masks = {colour: mask(last, colour) for colour in COLOURS}
        seen = {colour: seen_shape(pixels) for colour, pixels in masks.items() if pixels.sum() > 40}
        assert sample.objects == tuple(sorted(seen.items()))
        place = {colour: centre(masks[colour]) for colour in seen}
        for question in sample.questions:
            asked[question.kind] += 1
            text, named = question.question, read_thing(question.question)
            assert question.answer in question.candidates
            assert len(set(question.candidates)) == len(question.candidates)
            if question.kind == "colour":
                expected = event.actor[0]
            elif question.kind == "shape":
                expected = event.actor[1]
            elif question.kind == "what":
                expected = PHRASES[event.kind][0].replace("{A}", "it").replace("{B}", "another object")
                assert named == [event.actor]
            elif question.kind == "who_first":
                changed = [changed_colours(sample.frames[0], [frame]) for frame in sample.frames]
                (first,) = next(colours for colours in changed if colours)
                expected = f"the {first} {seen[first]}"
            elif question.kind == "touch":
                gaps = [separation(*(mask(frame[::2, ::2], c) for c, _ in named)) for frame in sample.frames]
                expected = "yes" if min(gaps) < 0.05 else "no"
                assert len(named) == 2
            elif question.kind == "count":
                expected = {1: "one", 2: "two", 3: "three"}[len(seen)]
            elif question.kind == "presence":
                ((colour, shape),) = named
                expected = "yes" if seen.get(colour) == shape else "no"
            elif question.kind == "shape_of":
                expected = seen[text.split()[4]]
            elif question.kind == "colour_of":
                (expected,) = (colour for colour, shape in seen.items() if shape == text.split()[4])
            else:
                assert question.kind == "where"
                ((colour, _),) = named
                x, y = place[colour]
                assert min(abs(x - 0.5), abs(y - 0.5)) > 0.06
                expected = f"at the {'bottom' if y > 0.5 else 'top'} {'right' if x > 0.5 else 'left'}"
            assert question.answer == expected, (seed, question)
    assert set(asked) == {"colour", "shape", "what", "who_first", "touch", "count", "shape_of", "colour_of", "presence",
                          "where"}  # fmt: skip
    assert asked["count"] == 65 and asked["shape_of"] > 100
    assert asked["colour"] == asked["shape"] == 50 and asked["touch"] == asked["who_first"] == 10
    assert asked["what"] == 60


def questions(seeds):
    for seed in seeds:
        event, scenes, _ = planned(seed, "train", None)
        rng = generator("clip questions", "train", seed)
        things = [o.thing for o in scenes[-1] if o.opacity > 0]
        for question in ask(rng, event, scenes[-1]):
            yield event, things, question


def test_yes_and_no_are_balanced_and_half_of_the_noes_are_hard():
    """1,000 clips: 5 sd of a share of 0.5 are 0.08, 4 sd of one of 500 noes 0.09. Hard: it shares a colour or shape."""
    answers = {"presence": Counter(), "touch": Counter()}
    noes = Counter()
    for _, things, question in questions(range(1000)):
        if question.kind in answers:
            answers[question.kind][question.answer] += 1
        if question.kind == "presence" and question.answer == "no":
            ((colour, shape),) = read_thing(question.question)
            assert (colour, shape) not in things
            noes[colour in {c for c, _ in things}, shape in {s for _, s in things}] += 1
    for kind, counts in answers.items():
        total = counts.total()
        assert counts["yes"] / total == pytest.approx(0.5, abs=2.5 / np.sqrt(total)), kind
    total = noes.total()
    assert noes[False, False] / total == pytest.approx(0.5, abs=0.09)
    assert (noes[True, False] + noes[True, True]) / total == pytest.approx(0.25, abs=0.08)
    assert noes[False, True] / total == pytest.approx(0.25, abs=0.08)


def test_candidates_do_not_tell_the_answer():
    """Their number is that of the docstring and their order is fixed, or alphabetical where it is about two things."""
    num = {"colour": 6, "shape": 4, "what": 12, "who_first": 2, "touch": 2, "count": 3, "presence": 2, "where": 4,
           "shape_of": 4, "colour_of": 6}  # fmt: skip
    orders: dict[str, set] = {}
    places: dict[str, Counter] = {}
    for event, _, question in questions(range(900)):
        assert len(question.candidates) == num[question.kind]
        orders.setdefault(question.kind, set()).add(question.candidates)
        places.setdefault(question.kind, Counter())[question.candidates.index(question.answer)] += 1
        if question.kind == "who_first":
            assert question.candidates == tuple(sorted(question.candidates))
            assert {f"the {c} {s}" for c, s in (event.actor, event.patient)} == set(question.candidates)
        if question.kind == "touch":
            assert read_thing(question.question)[0][0] == min(event.actor[0], event.patient[0])
    assert all(len(found) == 1 for kind, found in orders.items() if kind != "who_first")
    for kind, counts in places.items():
        assert len(counts) == num[kind] and max(counts.values()) < 1.7 * counts.total() / num[kind], kind


def test_what_candidates_are_training_wordings_of_all_kinds_with_an_actor():
    (question,) = (q for q in clip(0, kind="pass").questions if q.kind == "what")
    red, blue = ("red", "square"), ("blue", "star")
    acting = [kind for kind in KINDS if kind != "idle"]
    for kind, text in zip(acting, question.candidates, strict=True):
        said = text.replace("it", "the red square", 1).replace("another object", "the blue star")
        patient = blue if kind in ("hit", "pass") else None
        assert slots(said) == (kind, red, patient)
        assert said in captions(Event(kind, 0, 1, red, patient))
