"""Streams: films with gaps, repeated and backward time stamps, corrupt frames, another size, or no end.

`llm-jepa watch` captions what can be read and says what was lost, or one line says what is wrong. Captions are in the
order of time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from .cases import LOST, SILENT, SURVIVED, Case, Outcome
from .runs import command, ended_badly, is_one_line, undisturbed

RATE, SECONDS = 8, 12
PACKET = 188  # bytes of an MPEG transport stream


def _film(path: Path, *, seconds: int = SECONDS, size: int = 64, first: int = 0, container: str = "mpegts") -> bytes:
    """Pictures that change their colour every third second, with time stamps from `first` seconds on."""
    import av
    import numpy as np

    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream("libx264", rate=RATE)
        stream.width = stream.height = size
        stream.pix_fmt, stream.options = "yuv420p", {"g": "8", "bf": "0"}
        stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(seconds * RATE):
            colour = 40 + 60 * (number // (3 * RATE) % 4)
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), colour, np.uint8), "rgb24")
            frame.pts, frame.time_base = number + first * RATE, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path.read_bytes()


def _packets(data: bytes, share_from: float, share_to: float) -> bytes:
    count = len(data) // PACKET
    return data[int(share_from * count) * PACKET : int(share_to * count) * PACKET]


def _corrupt(data: bytes, share: float, seed: int) -> bytes:
    """Noise in a share of the packets, behind their headers."""
    draw, changed = random.Random(seed), bytearray(data)
    for start in range(4 * PACKET, len(data) - PACKET, PACKET):
        if draw.random() < share:
            changed[start + 8 : start + PACKET] = draw.randbytes(PACKET - 8)
    return bytes(changed)


# name -> the film's bytes, from a path to write to
FILMS: dict[str, Callable[[Path], bytes]] = {
    "a gap in the middle": lambda path: (lambda d: _packets(d, 0, 0.4) + _packets(d, 0.6, 1))(_film(path)),
    "a gap of an hour": lambda path: _film(path, seconds=4) + _film(path, seconds=4, first=3600),
    "the same time stamps twice": lambda path: (lambda data: data + data)(_film(path, seconds=4)),
    "time stamps that go back": lambda path: _film(path, seconds=4, first=100) + _film(path, seconds=4),
    "a packet repeated": lambda path: (lambda d: _packets(d, 0, 0.5) + _packets(d, 0.4, 1))(_film(path)),
    **{
        f"corrupt packets, {share}, seed {seed}": lambda path, share=share, seed=seed: _corrupt(  # type: ignore[misc]
            _film(path), share, seed
        )
        for share in (0.1, 0.5)
        for seed in range(3)
    },
    "another size in the middle": lambda path: _film(path, seconds=4) + _film(path, seconds=4, size=96, first=4),
    "an end in the middle of a packet": lambda path: _film(path)[: -PACKET * 20 - 77],
    "an end in the middle of a window": lambda path: _film(path, seconds=1),
    "one frame": lambda path: _packets(_film(path, seconds=1), 0, 0.5),
    "no frame": lambda path: _film(path)[: 3 * PACKET],
    "no byte": lambda path: b"",
    "a torn mp4": lambda path: (lambda data: data[: len(data) // 2])(_film(path, container="mp4")),
    "an mp4 of zeros": lambda path: bytes(len(_film(path, container="mp4"))),
}


def cases(work: Path, *, seed: int, quick: bool) -> Iterator[Case]:
    model = undisturbed("vl", work).whole
    for name in list(FILMS)[:: 5 if quick else 1]:
        yield Case("stream", name, watch_film, (model, name))


def watch_film(folder: Path, model: Path, name: str) -> Outcome:
    film = folder / "film"
    film.write_bytes(FILMS[name](folder / "film.tmp"))
    words = ["watch", str(model), str(film), "--labels", "number 0,number 1", "--jsonl", "events.jsonl"]
    said = command([*words, "--stride", "0.5"], folder)
    bad = ended_badly(said)
    if bad is not None:
        return bad
    if said.code != 0:
        return Outcome(SURVIVED) if is_one_line(said) else Outcome(LOST, f"exit {said.code}: {said.err[-300:]}")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    captions = [event for event in events if event.get("final")]
    ends = [time for event in captions for time in (event["start_s"], event["end_s"])]
    if ends != sorted(ends):
        return Outcome(SILENT, f"captions are not in the order of time: {ends}")
    summary = next((event["summary"] for event in events if "summary" in event), None)
    if summary is None:
        return Outcome(LOST, "no summary was written")
    if captions and not summary["num_windows"]:
        return Outcome(SILENT, "a caption of no window")
    is_said = summary["lost"] or summary["error"] or "lost" in said.out + said.err
    # Packets before the first whole key frame are never seen as frames: captions then begin later.
    if name.startswith("corrupt") and captions and not is_said and ends[-1] - ends[0] > summary["seconds"] + 1:
        return Outcome(SILENT, f"captions of {ends[-1] - ends[0]:.1f} s, frames of {summary['seconds']:.1f} s")
    return Outcome(SURVIVED)
