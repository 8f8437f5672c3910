"""ShapeStream: a procedural video world in which every caption, event boundary and answer is known exactly.

One to three plain shapes lie on a pale ground; one thing happens at a time. `clip` makes two seconds with one event,
`stream` minutes of events with rests between them, `captions` all sentences that say what an event is, and `slots`
reads such a sentence back. Everything follows from (VERSION, split, seed): no file, no network, no global state.

    things   6 colours x 4 shapes; no two things of one scene share a colour
    kinds    left right up down grow shrink appear vanish spin flash   (an actor)
             hit pass                                                  (an actor and a patient)
             idle                                                      (nothing)
    texts    10 phrases of each kind; one with an actor or two also in 4 forms of its subject

What is kept from training, so that two kinds of generalisation can be told apart:

    wordings      the last two phrases of each kind (`captions(event, wordings="held_out")`)
    compositions  a fifth of the (colour, shape, kind) triples of actors, by a hash (`held_out`): split "compose" holds
                  only these, splits "train" and "test" none of them; a stream of split "test" may hold any

The rules that keep a label true (gaps are between the circles that hold the things, in sides of the frame): things stay
`MARGIN` apart whatever happens, but for the two of a hit, which touch. A thing that moves either overtakes one other
thing within `PASS_GAP`, and then the kind is "pass", or it is level with nothing that is within `CLEAR_GAP`. Every path
leads left, right, up or down to within 14 degrees, that of a hit or a pass too: the kind is the most specific one.

Who reports figures on this world should know what a single frame gives away. A path needs room, so a thing that will
go left tends to start on the right; one that will grow is not large, one that will shrink is not small. Captions
name the event, not the bystanders, so a caption has many right clips: compare it with all clips of an equal `Event`
(kind, actor, patient), not with its own only.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# Part of every seed and of the hash of the hold-out: a change of the world is a change of the data.
VERSION = 1
FPS = 8
NUM_FRAMES = 16  # of a clip: two seconds

Thing = tuple[str, str]  # (colour, shape)
Frames = NDArray[np.uint8]

# All channels lie in 9..246, as do the ground and the outline: adding noise of at most 9 levels cannot wrap around.
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

# The last NUM_HELD_OUT phrases of a kind are never training text. Rare words ("twirls", "dwindles") stand before them:
# whether a sentence encoder knows those is a question about the encoder. {A} does it, {B} has it done to it.
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

SPLITS = ("train", "test", "compose")
STREAM_SPLITS = ("train", "test")
# One generator for each of these, so that the noise, the picture's size and the questions leave the events alone.
PURPOSES = ("clip", "clip noise", "clip questions", "stream", "stream noise")

# Geometry, as fractions of the frame's side.
MARGIN = 0.045  # three pixels of 64
EDGE = 0.02  # to the frame: one pixel
RADII = (0.08, 0.14)  # of a new thing
RADIUS_LIMITS = (0.065, 0.18)  # of one that shrinks or grows: at 64 pixels a smaller star is a blot
GROWTH = (1.6, 1.9)
TRAVEL = (0.25, 0.45)
SLOPE = 0.25  # sideways per forward: 14 degrees off an axis at most
PASS_GAP = (0.05, 0.14)
CLEAR_GAP = 0.35  # two and a half times the widest pass
LEVEL = 0.06  # a thing so little before the start of a path or behind its end is level with it, too
LEAD = 0.12  # a pass begins that far before the patient's centre and ends that far behind it
APPROACH = 0.12  # at least, before a hit
PUSH = (0.15, 0.25)
CONTACT = (0.5, 0.6)  # of the duration of a hit: long enough for a frame of any event of 5 or more to show it
OVERLAP = 0.008  # at a hit: half a pixel of 64, so that no seam of ground shows between the two
TURN = (180, 270)  # degrees: 13 to 34 a frame, while a star looks the same after 72
NUM_BLINKS = 3

NOISE_SIGMA = 3.0
MIN_EVENT_S = 0.75  # six frames: fewer would not show every blink
IDLE_OVERLAP = 2  # frames of an event that a window may hold and still be called idle
MIN_SIZE = 32

# A random scene has room for an event of a given kind in one of 1 to 45 cases (measured; a hit among three things is
# the rarest): 2,000 failures in a row happen with a probability of 1e-20.
MAX_SCENES = 2000
MAX_SPOTS = 30
TRIES_PER_ACTOR = 4

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # y points down
OUTLINE = (30, 30, 30)
# Corners of a thing of radius 1. The areas are alike (2.4 to 3.1), so that the shape says nothing about growth.
NUM_CIRCLE_CORNERS = 32
CORNER_DISTANCES = {"circle": (1.0,), "square": (1.2,), "triangle": (1.36,), "star": (1.42, 0.62)}
NUM_CORNERS = {"circle": NUM_CIRCLE_CORNERS, "square": 4, "triangle": 3, "star": 10}
FIRST_CORNER = {"circle": 0.0, "square": -math.pi / 4, "triangle": -math.pi / 2, "star": -math.pi / 2}
REACH = {shape: max(distances) for shape, distances in CORNER_DISTANCES.items()}

YES_NO = ("yes", "no")
COUNTS = ("one", "two", "three")
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")
OFF_CENTRE = 0.08  # a thing closer to a centre line is not asked for its place

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """What happens from `start_s` to `end_s`, in seconds. `actor` and `patient` are things or None, as the kind needs.

    At `FPS` the event covers the frames start_s * FPS up to, but not including, end_s * FPS: the first of them shows
    the first change and the last one the final state.
    """

    kind: str
    start_s: float
    end_s: float
    actor: Thing | None = None
    patient: Thing | None = None


@dataclass(frozen=True)
class Question:
    """A question about a clip; `answer` is one of `candidates`, whose order does not depend on it.

    Kinds: what (12 candidates; of events with an actor), colour and shape (6 and 4; with an actor only), who_first and
    touch (2; of hit and pass). Of the scene at the end: count (3), and of each thing in it shape_of (4), colour_of (6;
    its shape is the only one of its kind), presence (2; as often of an absent thing) and, where the answer is clear,
    where (4).
    """

    kind: str
    question: str
    answer: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Clip:
    """frames: uint8 [16, H, W, 3] at `FPS`. objects: the things visible in the last frame, sorted."""

    frames: Frames
    event: Event
    objects: tuple[Thing, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, eq=False)
class Stream:
    """frames: uint8 [T, H, W, 3]. events: in order and without gaps from 0 to T / fps seconds; rests are "idle"."""

    frames: Frames
    events: tuple[Event, ...]
    fps: int


class _Object(NamedTuple):
    thing: Thing
    x: float
    y: float
    radius: float
    angle: float = 0.0
    opacity: float = 1.0

    @property
    def reach(self) -> float:
        """Radius of the circle that holds it, however it is turned."""
        return self.radius * REACH[self.thing[1]]


Scene = tuple[_Object, ...]


class _Action(NamedTuple):
    """Something that can happen in `scene`; `changed(p)` gives the objects by index that differ at progress p <= 1."""

    kind: str
    scene: Scene
    actor: int
    patient: int | None
    changed: Callable[[float], dict[int, _Object]]

    def at(self, progress: float) -> Scene:
        changed = self.changed(progress)
        return tuple(changed.get(index, thing) for index, thing in enumerate(self.scene))

    def event(self, start: int, end: int) -> Event:
        """The event if it covers the frames from `start` up to, but not including, `end`."""
        patient = None if self.patient is None else self.scene[self.patient].thing
        return Event(self.kind, start / FPS, end / FPS, self.scene[self.actor].thing, patient)


def clip(seed: int, *, split: str = "train", kind: str | None = None, size: int = 64) -> Clip:
    """Two seconds with one event, or with none (kind "idle"), which lasts from 0 to 2 s.

    Everything but the frames is the same for every `size`, and `clip(s, split=p)` is the same as the call that also
    names the kind of event it has. The clips of two splits have nothing in common, equal seeds or not.

    Args:
        seed: >= 0; clips of different seeds are drawn independently of each other.
        split: "train" and "test" have the triples that `held_out` allows, "compose" has only the others.
        kind: what happens; drawn evenly from `KINDS` if None, for "compose" without "idle": that has no actor.
        size: H = W in pixels, 32 or more.

    Raises UserError for a split, kind, seed or size that does not exist, and if Pillow is missing.
    """
    _check_choice("split", split, SPLITS)
    _check_seed(seed)
    _check_size(size)
    if kind is not None:
        _check_choice("kind", kind, KINDS)
    event, scenes, ground = _plan_clip(seed, split, kind)
    frames = _render(scenes, ground, size)
    _add_noise(frames, _generator("clip noise", split, seed))
    questions = _questions(_generator("clip questions", split, seed), event, scenes[-1])
    return Clip(frames, event, tuple(sorted(thing.thing for thing in _visible(scenes[-1]))), questions)


def stream(
    seed: int,
    *,
    split: str = "train",
    seconds: float = 120,
    gap: tuple[float, float] = (4, 12),
    duration: tuple[float, float] = (1.0, 1.8),
    size: int = 64,
    num_objects: int = 3,
) -> Stream:
    """A long video of one scene: a rest, an event, a rest, an event ... Every event ends before the stream does.

    A scene of `num_objects` things lives on from event to event; what vanishes makes room for a new thing to appear.
    Of the kinds that fit into the scene, the one that this stream has used least is next.

    Args:
        seed: >= 0; streams and clips of equal seeds have nothing in common.
        split: "train" has no triple that is `held_out`; "test" may have any.
        seconds: length; rounded to frames.
        gap: shortest and longest rest in seconds, 1 / FPS or more. (1, 3) is the dense control: there, decoding at
            changes has little to gain over decoding at regular times.
        duration: shortest and longest event in seconds, 0.75 or more.
        size: H = W in pixels, 32 or more.
        num_objects: things at the start and at most, 1 to 3; one alone neither vanishes, hits nor passes.

    Raises UserError for a value that cannot work, and if Pillow is missing.
    """
    _check_choice("split", split, STREAM_SPLITS)
    _check_seed(seed)
    _check_size(size)
    if not 1 / FPS <= seconds < math.inf:
        raise UserError(f"seconds={seconds}: a frame takes {1 / FPS}; ask for that or more")
    _check_range("gap", gap, 1 / FPS)
    _check_range("duration", duration, MIN_EVENT_S)
    if not 1 <= num_objects <= len(COUNTS):
        raise UserError(f"num_objects={num_objects}: a scene holds 1 to {len(COUNTS)} things")
    events, scenes, ground = _plan_stream(seed, split, round(seconds * FPS), gap, duration, num_objects)
    frames = _render(scenes, ground, size)
    _add_noise(frames, _generator("stream noise", split, seed))
    return Stream(frames, events, FPS)


def stream_windows(stream: Stream, *, num_frames: int = NUM_FRAMES, stride: int = 8) -> list[tuple[int, Event | None]]:
    """The windows of `num_frames` frames that start every `stride` frames, each with the event that it shows.

    That is an event of the stream at least half of which lies in the window (of two such, the one with more frames in
    it, then the earlier one); failing that, the longest rest in the window if every event overlaps it by two frames
    at most. Everything else is None, ambiguous: no training example, and neither right nor wrong.

    Frames after the last whole window are in none.

    Raises UserError for a window that is longer than the stream or shorter than five frames, which two frames of an
    event would fill, and for stride < 1.
    """
    total = len(stream.frames)
    if not 2 * IDLE_OVERLAP < num_frames <= total:
        raise UserError(
            f"num_frames={num_frames}: a window needs {2 * IDLE_OVERLAP + 1} frames or more, and the stream has {total}"
        )
    if stride < 1:
        raise UserError(f"stride={stride}: windows must advance by 1 frame or more")
    spans = [(event, round(event.start_s * stream.fps), round(event.end_s * stream.fps)) for event in stream.events]
    windows: list[tuple[int, Event | None]] = []
    for first in range(0, total - num_frames + 1, stride):
        inside = [(event, min(end, first + num_frames) - max(start, first), end - start) for event, start, end in spans]
        busy = [(event, seen, length) for event, seen, length in inside if event.kind != "idle" and seen > 0]
        shown = [(event, seen) for event, seen, length in busy if 2 * seen >= length]
        if not shown and all(seen <= IDLE_OVERLAP for _, seen, _ in busy):
            shown = [(event, seen) for event, seen, _ in inside if event.kind == "idle" and seen > 0]
        windows.append((first, max(shown, key=lambda pair: pair[1])[0] if shown else None))
    return windows


def held_out(thing: Thing, kind: str) -> bool:
    """Whether `thing` as the actor of `kind` is kept from training: a fifth of each kind's actors, by sha256.

    5 of 24 things, of "spin" 4 of the 18 that are not circles: 59 of 282 triples. The actors of a kind are taken in
    the order of their hashes, but each colour once and each shape twice at most, so that all colours and shapes are
    left to learn the kind from, and what is tested is varied. False for "idle" and for circles that spin.

    Raises UserError for an unknown kind.
    """
    _check_choice("kind", kind, KINDS)
    return thing in _held_out_actors(kind)


def captions(event: Event, *, wordings: str = "train") -> list[str]:
    """Every sentence of the grammar that says what `event` is, all distinct and in a fixed order.

    Phrases times forms of the grammatical subject, which is the patient in a passive: 16 sentences for "train" (4 if
    idle), 8 for "held_out" (2), and both for "all". The first one is the plainest.

    Raises UserError for unknown wordings or kind, and for an event whose actor or patient is missing or too many.
    """
    _check_choice("wordings", wordings, tuple(WORDINGS))
    _check_choice("kind", event.kind, KINDS)
    things = {"{A}": event.actor, "{B}": event.patient}
    if [thing is not None for thing in things.values()] != [role < NUM_ROLES[event.kind] for role in range(2)]:
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
                    sentence = sentence.replace(role, _name(thing, form if thing == subject else SUBJECT_FORMS[0]))
            sentences.append(sentence)
    return sentences


def slots(text: str) -> tuple[str, Thing | None, Thing | None] | None:
    """(kind, actor, patient) of a sentence of the grammar, in any wording; None if it is not one.

    The exact inverse of `captions`. Case, repeated spaces and a final full stop do not matter.
    """
    return _sentences().get(" ".join(text.lower().split()).removesuffix(".").rstrip())


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
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")  # the suffix names the container
    try:
        with av.open(str(temporary), "w") as container:
            video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            for frame in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(video.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_clips(folder: str | os.PathLike[str], count: int, *, split: str = "train") -> Path:
    """`count` clips as mp4 files under `folder`/`split`/, and the manifest `folder`/`split`.jsonl, whose path it is.

    A row has "video", "query" and "target" (one text, or all captions in trained wordings), as VL-JEPA's trainer reads
    them. Raises UserError as `write_video`.
    """
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(count):
        sample, name = clip(seed, split=split), f"{split}/{seed:05d}.mp4"
        write_video(folder / name, sample.frames, FPS)
        rows.append({"video": name, "query": "what happens in the video?", "target": captions(sample.event)})
        rows += [{"video": name, "query": asked.question, "target": asked.answer} for asked in sample.questions]
    manifest = folder / f"{split}.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: a sheet of clips and some streams to look at, clips to train on; exit 2 for a wrong value."""
    parser = _Parser(prog="python -m llm_jepa.synthetic.shapestream", description="Write samples of ShapeStream.")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if missing")
    parser.add_argument("--clips", type=int, default=26, metavar="N", help="clips on the sheet (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=1, metavar="N", help="streams of 120 s (default: %(default)s)")
    parser.add_argument("--train", type=int, default=0, metavar="N", help="training clips, as mp4, and train.jsonl")
    parser.add_argument("--test", type=int, default=0, metavar="N", help="test clips, as mp4, and test.jsonl")
    given = parser.parse_args(argv)
    folder = Path(given.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if given.clips > 0:
            sheet = folder / "clips.png"
            _contact_sheet([clip(index, kind=KINDS[index % len(KINDS)]) for index in range(given.clips)]).save(sheet)
            print(f"{sheet}: {given.clips} clips")
        events = {}
        for seed in range(given.streams):
            sample, video = stream(seed), folder / f"stream_{seed}.mp4"
            write_video(video, sample.frames, sample.fps)
            events[video.name] = [_described(event) for event in sample.events]
            print(f"{video}: {len(sample.events)} events")
        if events:
            (folder / "events.json").write_text(json.dumps(events, indent=1) + "\n", encoding="utf-8")
        for split, count in (("train", given.train), ("test", given.test)):
            if count > 0:
                print(f"{write_clips(folder, count, split=split)}: {count} clips")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Without the usage text that argparse puts ahead of it: one line says it.
        self.exit(2, f"{self.prog}: error: {message}\n")


# --- What happens -----------------------------------------------------------------------------------------------------


def _plan_clip(seed: int, split: str, kind: str | None) -> tuple[Event, list[Scene], tuple[int, int, int]]:
    """The event, the scene in each frame and the colour of the ground."""
    rng = _generator("clip", split, seed)
    drawn = _pick(rng, KINDS if split != "compose" else KINDS[:-1])
    kind = kind or drawn
    ground, num_objects = _ground(rng), 1 + int(3 * rng.random())
    start, end = 1 + int(3 * rng.random()), 13 + int(3 * rng.random())
    if kind == "idle":
        scene = _scatter(rng, _things(rng, num_objects))
        return Event("idle", 0.0, NUM_FRAMES / FPS), [scene] * NUM_FRAMES, ground
    if kind in ("hit", "pass", "vanish"):
        num_objects = max(num_objects, 2)
    action = _stage(rng, kind, num_objects, lambda actor: held_out(actor, kind) == (split == "compose"))
    scenes = [action.scene] * start + _unfold(action, end - start)
    return action.event(start, end), scenes + scenes[-1:] * (NUM_FRAMES - end), ground


def _plan_stream(
    seed: int, split: str, num_frames: int, gap: tuple[float, float], duration: tuple[float, float], num_objects: int
) -> tuple[tuple[Event, ...], list[Scene], tuple[int, int, int]]:
    """As `_plan_clip`, with events that tile the time."""
    rng = _generator("stream", split, seed)
    ground, scene = _ground(rng), _scatter(rng, _things(rng, num_objects))
    events: list[Event] = []
    scenes: list[Scene] = []
    used: Counter[str] = Counter()
    frame = 0
    while True:
        start = frame + round(_uniform(rng, gap) * FPS)
        end = start + round(_uniform(rng, duration) * FPS)
        if end > num_frames:
            break
        frame = start
        action = _next_action(rng, scene, used, num_objects, split)
        if action is None:  # nothing fits: the rest goes on
            continue
        events += [Event("idle", len(scenes) / FPS, start / FPS), action.event(start, end)]
        scenes += [scene] * (start - len(scenes)) + _unfold(action, end - start)
        scene, frame = _visible(scenes[-1]), end
        used[action.kind] += 1
    if len(scenes) < num_frames:
        events.append(Event("idle", len(scenes) / FPS, num_frames / FPS))
        scenes += [scene] * (num_frames - len(scenes))
    return tuple(events), scenes, ground


def _next_action(
    rng: np.random.Generator, scene: Scene, used: Counter[str], num_objects: int, split: str
) -> _Action | None:
    """Something that fits into the scene: the kinds used least first, their actors in random order."""
    for kind in sorted(_shuffled(rng, KINDS[:-1]), key=lambda kind: used[kind]):
        allowed = [thing for thing in _actors(kind) if split == "test" or not held_out(thing, kind)]
        stage, actors = scene, _shuffled(rng, range(len(scene)))
        if kind == "appear":
            newcomer = _newcomer(rng, scene, allowed) if len(scene) < num_objects else None
            stage, actors = (*scene, *([newcomer] if newcomer else [])), [len(scene)] if newcomer else []
        for actor in actors:
            if stage[actor].thing in allowed:
                for _ in range(TRIES_PER_ACTOR):
                    if action := _plan(rng, stage, kind, actor):
                        return action
    return None


def _stage(rng: np.random.Generator, kind: str, num_objects: int, allowed: Callable[[Thing], bool]) -> _Action:
    """An event of this kind in a new scene, by drawing scenes until there is room for it."""
    actor = _pick(rng, [thing for thing in _actors(kind) if allowed(thing)])
    for _ in range(MAX_SCENES):
        scene = _scatter(rng, _things(rng, num_objects, actor), hide_first=kind == "appear")
        if action := _plan(rng, scene, kind, 0):
            return action
    raise AssertionError(f"no scene of {num_objects} things in {MAX_SCENES} has room for {actor} to {kind}")


def _unfold(action: _Action, num_frames: int) -> list[Scene]:
    return [action.at((frame + 1) / num_frames) for frame in range(num_frames)]


def _plan(rng: np.random.Generator, scene: Scene, kind: str, index: int) -> _Action | None:
    """One try to let object `index` do this; None if there is no room."""
    actor = scene[index]

    def action(at: Callable[[float], _Object]) -> _Action:
        return _Action(kind, scene, index, None, lambda progress: {index: at(progress)})

    if kind in DIRECTIONS:
        forward, sideways = _uniform(rng, TRAVEL), SLOPE * _uniform(rng, (-1, 1))
        dx, dy = DIRECTIONS[kind]
        goal = actor.x + forward * (dx - sideways * dy), actor.y + forward * (dy + sideways * dx)
        return _travel(kind, scene, index, None, goal) if _is_clear(scene, index, goal) else None
    if kind in ("grow", "shrink"):
        factor = _uniform(rng, GROWTH)
        final = actor.radius * factor if kind == "grow" else actor.radius / factor
        largest = actor._replace(radius=max(final, actor.radius))
        if not RADIUS_LIMITS[0] <= final <= RADIUS_LIMITS[1] or not _fits(scene, index, largest):
            return None
        return action(lambda p: actor._replace(radius=actor.radius + (final - actor.radius) * p))
    if kind == "appear":
        return action(lambda p: actor._replace(opacity=p))
    if kind == "vanish":
        return action(lambda p: actor._replace(opacity=1 - p)) if len(scene) > 1 else None
    if kind == "spin":
        turn = math.radians(_uniform(rng, TURN)) * _pick(rng, (-1, 1))
        return action(lambda p: actor._replace(angle=actor.angle + turn * p))
    if kind == "flash":  # off in every second of 2 * NUM_BLINKS phases; on in the last frame
        return action(lambda p: actor._replace(opacity=float(p == 1 or int(2 * NUM_BLINKS * p) % 2 == 0)))
    plan = {"hit": _plan_hit, "pass": _plan_pass}[kind]
    for other in _shuffled(rng, range(len(scene))):
        if other != index and (found := plan(rng, scene, index, other)):
            return found
    return None


def _travel(kind: str, scene: Scene, index: int, patient: int | None, goal: tuple[float, float]) -> _Action:
    return _Action(kind, scene, index, patient, lambda progress: {index: _moved(scene[index], goal, progress)})


def _plan_hit(rng: np.random.Generator, scene: Scene, index: int, other: int) -> _Action | None:
    """The actor goes straight at the patient's centre until they touch; then the patient goes on in the same line."""
    actor, patient = scene[index], scene[other]
    dx, dy = patient.x - actor.x, patient.y - actor.y
    if min(abs(dx), abs(dy)) > SLOPE * max(abs(dx), abs(dy)):
        return None
    distance, push = math.sqrt(dx * dx + dy * dy), _uniform(rng, PUSH)
    touching = _touching_distance(actor, patient, dx / distance, dy / distance) - OVERLAP
    if distance - touching < APPROACH:
        return None
    reached, pushed = (distance - touching) / distance, (distance + push) / distance
    contact = actor.x + reached * dx, actor.y + reached * dy
    goal = actor.x + pushed * dx, actor.y + pushed * dy
    if not _is_clear(scene, index, contact, but=other) or not _is_clear(scene, other, goal, but=index):
        return None
    return _Action(
        "hit",
        scene,
        index,
        other,
        lambda p: {
            index: _moved(actor, contact, min(1.0, p / CONTACT[0])),
            other: _moved(patient, goal, max(0.0, (p - CONTACT[1]) / (1 - CONTACT[1]))),
        },
    )


def _plan_pass(rng: np.random.Generator, scene: Scene, index: int, other: int) -> _Action | None:
    """The actor goes along an axis, tilted so that its path leaves a narrow gap to the patient."""
    actor, patient = scene[index], scene[other]
    for dx, dy in _shuffled(rng, DIRECTIONS.values()):
        ahead = (patient.x - actor.x) * dx + (patient.y - actor.y) * dy
        aside = (patient.y - actor.y) * dx - (patient.x - actor.x) * dy
        if ahead < LEAD:
            continue
        gap = _uniform(rng, PASS_GAP)
        slope = (aside - math.copysign(actor.reach + patient.reach + gap, aside)) / ahead
        forward = ahead + LEAD * _uniform(rng, (1, 2))
        goal = actor.x + forward * (dx - slope * dy), actor.y + forward * (dy + slope * dx)
        if abs(slope) <= SLOPE and _is_clear(scene, index, goal, but=other) and _is_pass(actor, goal, patient):
            return _travel("pass", scene, index, other, goal)
    return None


# --- Room -------------------------------------------------------------------------------------------------------------


def _is_clear(scene: Scene, index: int, goal: tuple[float, float], *, but: int | None = None) -> bool:
    """Object `index` can go straight to `goal` in the frame, meets nobody and overtakes nobody closely; `but` aside."""
    mover = scene[index]
    if not _in_frame(mover._replace(x=goal[0], y=goal[1])):
        return False
    for other, thing in enumerate(scene):
        if other in (index, but):
            continue
        before, after, gap = _encounter(mover, goal, thing)
        if gap < MARGIN or (min(before, after) > -LEVEL and gap < CLEAR_GAP):
            return False
    return True


def _is_pass(mover: _Object, goal: tuple[float, float], other: _Object) -> bool:
    before, after, gap = _encounter(mover, goal, other)
    return PASS_GAP[0] <= gap <= PASS_GAP[1] and min(before, after) >= LEAD


def _encounter(mover: _Object, goal: tuple[float, float], other: _Object) -> tuple[float, float, float]:
    """Lengths of the path to `goal` before and after it is level with `other` (< 0: it never is), and the least gap."""
    path_x, path_y = goal[0] - mover.x, goal[1] - mover.y
    to_x, to_y = other.x - mover.x, other.y - mover.y
    path = math.sqrt(path_x * path_x + path_y * path_y)
    before = (to_x * path_x + to_y * path_y) / path
    nearest = min(path, max(0.0, before)) / path
    away_x, away_y = to_x - nearest * path_x, to_y - nearest * path_y
    return before, path - before, math.sqrt(away_x * away_x + away_y * away_y) - mover.reach - other.reach


def _fits(scene: Scene, index: int | None, thing: _Object) -> bool:
    """`thing` lies in the frame and apart from all of the scene but `index`, which it replaces."""
    return _in_frame(thing) and all(
        math.sqrt((thing.x - other.x) ** 2 + (thing.y - other.y) ** 2) >= thing.reach + other.reach + MARGIN
        for place, other in enumerate(scene)
        if place != index
    )


def _in_frame(thing: _Object) -> bool:
    low, high = thing.reach + EDGE, 1 - thing.reach - EDGE
    return low <= thing.x <= high and low <= thing.y <= high


def _touching_distance(near: _Object, far: _Object, dx: float, dy: float) -> float:
    """Distance of the centres at which `near`, coming along the unit vector (dx, dy), first touches `far`.

    Seen along that direction, two outlines touch where the front of one and the back of the other leave the least
    room. Both are piecewise linear across the direction, so that is level with a corner of one or the other.
    """
    axes = np.array([[dx, -dy], [dy, dx]])
    front, back = _outline(near) @ axes, _outline(far) @ axes  # [corners, (along, across)]
    levels = np.concatenate([front[:, 1], back[:, 1]])
    return float((_foremost(front, levels) + _foremost(back * (-1.0, 1.0), levels)).max())


def _foremost(outline: NDArray[np.float64], levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest first coordinate of a polygon [corners, 2] at each value of the second one; -inf beside it."""
    following = np.roll(outline, -1, axis=0)
    with np.errstate(
        divide="ignore", invalid="ignore"
    ):  # an edge along the direction: its neighbours end where it does
        share = (levels[:, None] - outline[:, 1]) / (following[:, 1] - outline[:, 1])
        along = outline[:, 0] + share * (following[:, 0] - outline[:, 0])
        return np.where((share >= 0) & (share <= 1), along, -np.inf).max(axis=1)


def _outline(thing: _Object) -> NDArray[np.float64]:
    """Corners about the centre, [corners, 2]."""
    shape, turn = thing.thing[1], thing.angle
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return thing.radius * _unit_outline(shape) @ rotation


@functools.cache
def _unit_outline(shape: str) -> NDArray[np.float64]:
    distances, number = CORNER_DISTANCES[shape], NUM_CORNERS[shape]
    angles = [FIRST_CORNER[shape] + 2 * math.pi * corner / number for corner in range(number)]
    return np.array(
        [
            (distances[corner % len(distances)] * math.cos(angle), distances[corner % len(distances)] * math.sin(angle))
            for corner, angle in enumerate(angles)
        ]
    )


# --- Scenes -----------------------------------------------------------------------------------------------------------


def _actors(kind: str) -> tuple[Thing, ...]:
    if NUM_ROLES[kind] == 0:
        return ()
    return tuple(thing for thing in THINGS if kind != "spin" or thing[1] != "circle")  # a turned circle looks the same


@functools.cache
def _held_out_actors(kind: str) -> tuple[Thing, ...]:
    actors = _actors(kind)
    taken: list[Thing] = []
    for thing in sorted(
        actors, key=lambda thing: hashlib.sha256(f"{VERSION} {' '.join(thing)} {kind}".encode()).digest()
    ):
        colours, shapes = [colour for colour, _ in taken], [shape for _, shape in taken]
        if len(taken) < round(len(actors) / 5) and thing[0] not in colours and shapes.count(thing[1]) < 2:
            taken.append(thing)
    return tuple(taken)


def _things(rng: np.random.Generator, number: int, first: Thing | None = None) -> list[Thing]:
    """Things of distinct colours."""
    colours = [colour for colour in _shuffled(rng, COLOURS) if first is None or colour != first[0]]
    others = [(colour, _pick(rng, SHAPES)) for colour in colours]
    return [*([first] if first else []), *others][:number]


def _scatter(rng: np.random.Generator, things: Sequence[Thing], *, hide_first: bool = False) -> Scene:
    """Put things down at random, apart from each other."""
    for _ in range(MAX_SCENES):
        scene: Scene = ()
        for thing in things:
            placed = _place(rng, scene, thing)
            if placed is None:
                break
            scene += (placed,)
        else:
            return (scene[0]._replace(opacity=0.0), *scene[1:]) if hide_first else scene
    raise AssertionError(f"no room for {things} in {MAX_SCENES} scenes")


def _place(rng: np.random.Generator, scene: Scene, thing: Thing) -> _Object | None:
    radius = _uniform(rng, RADII)
    edge = radius * REACH[thing[1]] + EDGE
    for _ in range(MAX_SPOTS):
        placed = _Object(thing, _uniform(rng, (edge, 1 - edge)), _uniform(rng, (edge, 1 - edge)), radius)
        if _fits(scene, None, placed):
            return placed
    return None


def _newcomer(rng: np.random.Generator, scene: Scene, allowed: Iterable[Thing]) -> _Object | None:
    """A thing of a colour that is not in the scene, at a free spot and not yet visible."""
    colours = {present.thing[0] for present in scene}
    things = [thing for thing in allowed if thing[0] not in colours]
    placed = _place(rng, scene, _pick(rng, things)) if things else None
    return placed and placed._replace(opacity=0.0)


def _moved(thing: _Object, goal: tuple[float, float], progress: float) -> _Object:
    return thing._replace(
        x=thing.x + (goal[0] - thing.x) * progress,
        y=thing.y + (goal[1] - thing.y) * progress,
    )


def _visible(scene: Scene) -> Scene:
    return tuple(thing for thing in scene if thing.opacity > 0)


def _ground(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (222 + int(24 * rng.random()) for _ in range(3))
    return red, green, blue


# --- Chance -----------------------------------------------------------------------------------------------------------
# Only `random` and, for the noise, bytes: NumPy may change how its other draws come from the same bits.


def _generator(purpose: str, split: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([VERSION, PURPOSES.index(purpose), SPLITS.index(split), seed])


def _uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(len(items) * rng.random())]


def _shuffled(rng: np.random.Generator, items: Iterable[T]) -> list[T]:
    return [item for _, _, item in sorted((rng.random(), place, item) for place, item in enumerate(items))]


# --- Pictures ---------------------------------------------------------------------------------------------------------


def _render(scenes: Sequence[Scene], ground: tuple[int, int, int], size: int) -> Frames:
    """[T, size, size, 3] without noise: drawn at twice the size, then averaged. A scene that lasts is drawn once."""
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
        for thing in _visible(scene):
            fill, line = (_blend(ground, colour, thing.opacity) for colour in (COLOURS[thing.thing[0]], OUTLINE))
            x, y, radius = thing.x * side, thing.y * side, thing.radius * side
            if thing.thing[1] == "circle":
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=line)
            else:
                draw.polygon(((_outline(thing) + (thing.x, thing.y)) * side).ravel().tolist(), fill=fill, outline=line)
        frames[frame] = np.asarray(picture.reduce(2))
    return frames


def _blend(ground: tuple[int, int, int], colour: tuple[int, int, int], opacity: float) -> tuple[int, int, int]:
    red, green, blue = (round(under + (over - under) * opacity) for under, over in zip(ground, colour, strict=True))
    return red, green, blue


def _add_noise(frames: Frames, rng: np.random.Generator) -> None:
    """Independent rounded Gaussian noise in place, from a table of its 256 quantiles: 5 times as fast as normals."""
    table = _noise_table()
    for first in range(0, len(frames), NUM_FRAMES):
        chunk = frames[first : first + NUM_FRAMES]
        chunk += table[rng.integers(0, 256, chunk.shape, np.uint8)]


@functools.cache
def _noise_table() -> NDArray[np.uint8]:
    """Quantiles (i + 1/2) / 256, negative ones modulo 256 as the sum is."""
    normal = NormalDist(0, NOISE_SIGMA)
    return np.array([round(normal.inv_cdf((level + 0.5) / 256)) % 256 for level in range(256)], np.uint8)


# --- Texts ------------------------------------------------------------------------------------------------------------


def _name(thing: Thing, form: str = SUBJECT_FORMS[0]) -> str:
    colour, shape = thing
    return form.format(an="an" if colour[0] in "aeiou" else "a", colour=colour, shape=shape)


@functools.cache
def _sentences() -> dict[str, tuple[str, Thing | None, Thing | None]]:
    """Every sentence of the grammar (33,000) with what it says. A table is an inverse that needs no parser."""
    meanings: list[tuple[str, Thing | None, Thing | None]] = []
    for kind in KINDS:
        if NUM_ROLES[kind] == 0:
            meanings.append((kind, None, None))
        elif NUM_ROLES[kind] == 1:
            meanings += [(kind, actor, None) for actor in THINGS]
        else:
            meanings += [(kind, actor, patient) for actor in THINGS for patient in THINGS if actor != patient]
    return {
        sentence: (kind, actor, patient)
        for kind, actor, patient in meanings
        for sentence in captions(Event(kind, 0, 0, actor, patient), wordings="all")
    }


def _questions(rng: np.random.Generator, event: Event, scene: Scene) -> tuple[Question, ...]:
    """All that can be asked about the event and about the last scene. Chance picks the absent things alone."""
    present = _visible(scene)
    questions: list[Question] = []
    if event.actor:
        does = {k: PHRASES[k][0].format(A="it", B="another object") for k in KINDS if NUM_ROLES[k]}
        asked = f"what does {_name(event.actor)} do?"
        questions.append(Question("what", asked, does[event.kind], tuple(does.values())))
    if event.actor and not event.patient:
        colour, shape = event.actor
        questions += [
            Question("colour", "what colour is the object that changes?", colour, tuple(COLOURS)),
            Question("shape", "what shape is the object that changes?", shape, SHAPES),
        ]
    if event.actor and event.patient:
        first, second = sorted((_name(event.actor), _name(event.patient)))  # an order that does not tell the actor
        touch = YES_NO[event.kind != "hit"]
        questions += [
            Question("who_first", "which object moves first?", _name(event.actor), (first, second)),
            Question("touch", f"do {first} and {second} touch?", touch, YES_NO),
        ]
    questions.append(
        Question("count", "how many objects are visible at the end?", COUNTS[len(present) - 1], COUNTS),
    )
    for thing in present:
        (colour, shape), name = thing.thing, _name(thing.thing)
        questions.append(Question("shape_of", f"what shape is the {colour} object at the end?", shape, SHAPES))
        if [other.thing[1] for other in present].count(shape) == 1:
            questions.append(Question("colour_of", f"what colour is the {shape} at the end?", colour, tuple(COLOURS)))
        for answer in YES_NO:
            asked = _name(thing.thing if answer == "yes" else _absent(rng, present), SUBJECT_FORMS[1])
            questions.append(Question("presence", f"is there {asked} at the end?", answer, YES_NO))
        if min(abs(thing.x - 0.5), abs(thing.y - 0.5)) >= OFF_CENTRE:
            place = PLACES[2 * (thing.y > 0.5) + (thing.x > 0.5)]
            questions.append(Question("where", f"where is {name} at the end?", place, PLACES))
    return tuple(dict.fromkeys(questions))  # an absent thing may have been asked for twice


def _absent(rng: np.random.Generator, present: Sequence[_Object]) -> Thing:
    """A thing to ask the presence of that is not there. Half of them share a colour or a shape with one that is.

    Without these, one attribute would tell all the answers. As colours are unique, such things are surely absent.
    """
    there = [thing.thing for thing in present]
    colours, shapes = {thing[0] for thing in there}, {thing[1] for thing in there}
    shares = {
        "colour": [thing for thing in THINGS if thing[0] in colours and thing not in there],
        "shape": [thing for thing in THINGS if thing[0] not in colours and thing[1] in shapes],
        "nothing": [thing for thing in THINGS if thing[0] not in colours and thing[1] not in shapes],
    }
    return _pick(rng, shares[_pick(rng, ("colour", "shape", "nothing", "nothing"))])


# --- For people to look at --------------------------------------------------------------------------------------------


def _contact_sheet(clips: Sequence[Clip]) -> Image.Image:
    """A picture with a row for each clip: its texts, then every second frame, twice as large."""
    from PIL import Image, ImageDraw

    text_width, zoom, line_height = 400, 2, 14
    side = clips[0].frames.shape[1] * zoom
    lines = [_sheet_lines(sample) for sample in clips]
    heights = [max(side, line_height * len(texts)) + 8 for texts in lines]
    sheet = Image.new("RGB", (text_width + (side + 2) * NUM_FRAMES // 2, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for sample, texts, height in zip(clips, lines, heights, strict=True):
        for place, (text, colour) in enumerate(texts):
            draw.text((6, top + 4 + place * line_height), text, fill=colour)
        for place, frame in enumerate(sample.frames[1::2]):
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (text_width + place * (side + 2), top + 4))
        top += height
    return sheet


def _sheet_lines(sample: Clip) -> list[tuple[str, str]]:
    event = sample.event
    held = captions(event, wordings="held_out")
    return [
        (f"{event.kind}  {event.start_s:.2f} to {event.end_s:.2f} s", "blue"),
        (captions(event)[0], "black"),
        (f"{held[-1]}  (held-out wording)", "black"),
        *((f"{question.question}  {question.answer}", "dimgray") for question in sample.questions),
    ]


def _described(event: Event) -> dict[str, Any]:
    return {**asdict(event), "caption": captions(event)[0]}


# --- What was asked for -----------------------------------------------------------------------------------------------


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name}={value!r} does not exist here; use one of {', '.join(choices)}")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"seed={seed}: seeds are 0 or more")


def _check_size(size: int) -> None:
    if size < MIN_SIZE:
        raise UserError(f"size={size}: a small thing is not to be recognised on less than {MIN_SIZE} pixels a side")


def _check_range(name: str, bounds: tuple[float, float], least: float) -> None:
    if not least <= bounds[0] <= bounds[1] < math.inf:
        raise UserError(f"{name}={bounds}: give the shortest and the longest in seconds, {least} or more")


if __name__ == "__main__":
    raise SystemExit(main())
