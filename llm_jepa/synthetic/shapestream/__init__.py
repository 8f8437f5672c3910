"""ShapeStream: a procedural video world in which every caption, event boundary and answer is known exactly.

One to three plain shapes move on a pale ground; one event happens at a time.

    clip            two seconds with one event
    stream          minutes of events with rests between them
    stream_windows  windows of a stream with the event that each shows
    captions        every sentence that describes an event; `slots` reads such a sentence back
    write_clips     clips as mp4 files and a manifest to train on

Everything follows from (VERSION, split, seed): no file, no network, no global state.

    things   6 colours x 4 shapes; no two things of one scene share a colour
    kinds    left right up down grow shrink appear vanish spin flash   (an actor)
             hit pass                                                  (an actor and a patient)
             idle                                                      (nothing)
    texts    10 phrases of each kind; if there is an actor, also in 4 forms of the subject

Two things are kept from training, so that two kinds of generalisation can be measured separately:

    wordings      the last two phrases of each kind (`captions(event, wordings="held_out")`)
    compositions  a fifth of the (colour, shape, kind) triples of actors, by a hash (`held_out`). Split "compose" holds
                  only these, splits "train" and "test" none of them; a stream of split "test" may hold any

Rules keep the labels true. Gaps are between the circles that hold the things, in sides of the frame. Things stay
`scenes.MARGIN` apart whatever happens, except the two of a hit, which touch. If a thing that moves overtakes another
within `scenes.PASS_GAP`, the kind is "pass"; any other thing that it is level with is `scenes.CLEAR_GAP` away or more.
Every path leads left, right, up or down to within 14 degrees, also that of a hit or a pass: the kind is the most
specific one.

Before reporting results on ShapeStream, note two things. A single frame gives something away: a path needs room, so a
thing that will go left tends to start on the right; one that will grow is not large, one that will shrink is not
small. And captions name the event, not the bystanders, so a caption fits many clips: compare it with all clips of an
equal `Event` (kind, actor, patient), not with its own only.
"""

from .events import FPS, NUM_FRAMES
from .pictures import NOISE_SIGMA, OUTLINE, Frames, write_video
from .questions import COUNTS, PLACES, YES_NO, Question
from .samples import (
    IDLE_OVERLAP,
    MIN_EVENT_S,
    MIN_SIZE,
    STREAM_SPLITS,
    Clip,
    Stream,
    clip,
    stream,
    stream_windows,
    write_clips,
)
from .scenes import SPLITS
from .texts import (
    COLOURS,
    KINDS,
    NUM_HELD_OUT,
    NUM_ROLES,
    PHRASES,
    SHAPES,
    SUBJECT_FORMS,
    THINGS,
    VERSION,
    WORDINGS,
    Event,
    Thing,
    captions,
    held_out,
    slots,
)

__all__ = [
    "COLOURS",
    "COUNTS",
    "FPS",
    "IDLE_OVERLAP",
    "KINDS",
    "MIN_EVENT_S",
    "MIN_SIZE",
    "NOISE_SIGMA",
    "NUM_FRAMES",
    "NUM_HELD_OUT",
    "NUM_ROLES",
    "OUTLINE",
    "PHRASES",
    "PLACES",
    "SHAPES",
    "SPLITS",
    "STREAM_SPLITS",
    "SUBJECT_FORMS",
    "THINGS",
    "VERSION",
    "WORDINGS",
    "YES_NO",
    "Clip",
    "Event",
    "Frames",
    "Question",
    "Stream",
    "Thing",
    "captions",
    "clip",
    "held_out",
    "slots",
    "stream",
    "stream_windows",
    "write_clips",
    "write_video",
]
