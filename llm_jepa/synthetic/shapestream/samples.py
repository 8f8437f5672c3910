"""Clips and streams of ShapeStream: frames, events and questions put together."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import UserError
from ...core.files import write_json_lines
from .events import FPS, NUM_FRAMES, plan_clip, plan_stream
from .pictures import Frames, add_noise, render, write_video
from .questions import COUNTS, Question, ask
from .scenes import SPLITS, generator, visible
from .texts import KINDS, Event, Thing, captions, check_choice

STREAM_SPLITS = ("train", "test")
MIN_EVENT_S = 0.75  # six frames: fewer would not show every blink
IDLE_OVERLAP = 2  # a window with at most this many frames of an event still counts as idle
MIN_SIZE = 32


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


def clip(seed: int, *, split: str = "train", kind: str | None = None, size: int = 64) -> Clip:
    """Two seconds with one event, or with none (kind "idle", from 0 to 2 s).

    Everything but the frames is the same for every `size`, and `clip(s, split=p)` is the same as the call that also
    names the kind of event it has. The clips of two splits have nothing in common, equal seeds or not.

    Args:
        seed: >= 0; clips of different seeds are drawn independently of each other.
        split: "train" and "test" have the triples that `held_out` allows, "compose" has only the others.
        kind: of the event; drawn evenly from `KINDS` if None, for "compose" without "idle", which has no actor.
        size: H = W in pixels, 32 or more.

    Raises UserError for a split, kind, seed or size that does not exist, and if Pillow is missing.
    """
    check_choice("split", split, SPLITS)
    _check_seed(seed)
    _check_size(size)
    if kind is not None:
        check_choice("kind", kind, KINDS)
    event, scenes, ground = plan_clip(seed, split, kind)
    frames = render(scenes, ground, size)
    add_noise(frames, generator("clip noise", split, seed))
    questions = ask(generator("clip questions", split, seed), event, scenes[-1])
    return Clip(frames, event, tuple(sorted(thing.thing for thing in visible(scenes[-1]))), questions)


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

    A scene of `num_objects` things continues from event to event; after a thing vanished, a new one can appear. Of the
    kinds that fit into the scene, the next one is the kind that this stream has used least.

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
    check_choice("split", split, STREAM_SPLITS)
    _check_seed(seed)
    _check_size(size)
    if not 1 / FPS <= seconds < math.inf:
        raise UserError(f"seconds={seconds}: a frame takes {1 / FPS}; ask for that or more")
    _check_range("gap", gap, 1 / FPS)
    _check_range("duration", duration, MIN_EVENT_S)
    if not 1 <= num_objects <= len(COUNTS):
        raise UserError(f"num_objects={num_objects}: a scene holds 1 to {len(COUNTS)} things")
    events, scenes, ground = plan_stream(seed, split, round(seconds * FPS), gap, duration, num_objects)
    frames = render(scenes, ground, size)
    add_noise(frames, generator("stream noise", split, seed))
    return Stream(frames, events, FPS)


def stream_windows(stream: Stream, *, num_frames: int = NUM_FRAMES, stride: int = 8) -> list[tuple[int, Event | None]]:
    """The windows of `num_frames` frames that start every `stride` frames, each with the event that it shows.

    A window shows an event if it holds at least half of it. Of two such events it shows the one with more frames in
    the window, then the earlier one. If there is none and the window holds at most two frames of any event, it shows
    its longest rest. Every other window has None: it is ambiguous, not a training example, and neither right nor wrong.

    Frames after the last whole window are left out.

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
    return [
        (first, _event_shown(stream, first, first + num_frames)) for first in range(0, total - num_frames + 1, stride)
    ]


def write_clips(folder: str | os.PathLike[str], count: int, *, split: str = "train") -> Path:
    """Write `count` clips as mp4 files under `folder`/`split`/, and the manifest `folder`/`split`.jsonl.

    Returns the path of the manifest. A row has "video", "query" and "target" (one text, or all captions in trained
    wordings), as VL-JEPA's trainer reads them. Raises UserError as `write_video`.
    """
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(count):
        sample, name = clip(seed, split=split), f"{split}/{seed:05d}.mp4"
        write_video(folder / name, sample.frames, FPS)
        rows.append({"video": name, "query": "what happens in the video?", "target": captions(sample.event)})
        for question in sample.questions:
            rows.append({"video": name, "query": question.question, "target": question.answer})
    manifest = folder / f"{split}.jsonl"
    write_json_lines(manifest, rows)
    return manifest


def _event_shown(stream: Stream, first: int, end: int) -> Event | None:
    """The event of the stream that the frames `first` to `end` (exclusive) show; see `stream_windows`."""
    shown: list[tuple[Event, int]] = []  # with their frames in the window
    rests: list[tuple[Event, int]] = []
    is_idle = True
    for event in stream.events:
        event_first, event_end = round(event.start_s * stream.fps), round(event.end_s * stream.fps)
        frames = min(event_end, end) - max(event_first, first)
        if frames <= 0:
            continue
        if event.kind == "idle":
            rests.append((event, frames))
            continue
        is_idle = is_idle and frames <= IDLE_OVERLAP
        if 2 * frames >= event_end - event_first:
            shown.append((event, frames))
    if not shown and is_idle:
        shown = rests
    if not shown:
        return None
    return max(shown, key=lambda pair: pair[1])[0]  # of equal ones, the first


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"seed={seed}: seeds are 0 or more")


def _check_size(size: int) -> None:
    if size < MIN_SIZE:
        raise UserError(f"size={size}: a small thing cannot be recognised below {MIN_SIZE} pixels a side; ask for more")


def _check_range(name: str, bounds: tuple[float, float], least: float) -> None:
    if not least <= bounds[0] <= bounds[1] < math.inf:
        raise UserError(f"{name}={bounds}: give the shortest and the longest in seconds, {least} or more")
