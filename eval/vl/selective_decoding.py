"""How many decodes does a stream need? Quality against decodes on ShapeStream, for four ways to choose the segments.

    python -m eval.vl.selective_decoding --model runs/shapestream [--out FILE --plot FILE]

Windows of two seconds, one every half second, are embedded with one query. Four ways cut them into segments:

    online      WardSegmenter as in `llm-jepa watch`, which knows only the past; one decode per closed segment
    offline     segment_offline: Ward agglomeration into N segments, the paper's protocol (section 4.6)
    uniform     N equal stretches of time, the baseline
    oracle      the true boundaries

The core of each segment is decoded: the mean without its first and last window (`mean_curves` has the plain mean, as in
the paper). The text is the nearest caption of the grammar in trained wordings. Each event, rests included, is compared
with the decode nearest in time to its middle. The score is the share of its slots (kind, actor, patient) that are
right. Sensitivities are those of `SENSITIVITIES`, N those of `COUNTS`. The report shows sensitivity 1.0, the default.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from llm_jepa.core.files import write_json, written_whole
from llm_jepa.stream.decoder import Caption
from llm_jepa.stream.segments import boundary_f1, segment_at
from llm_jepa.synthetic import shapestream as world
from llm_jepa.vl import (
    VLJEPA,
    MemoryProjection,
    Segment,
    SelectiveDecoder,
    WardSegmenter,
    segment_offline,
    segment_uniform,
)
from llm_jepa.vl.watch import MIN_DURATION

from ..command import ArgumentParser, check_writable, number, one_line_errors, require, seed_number, whole
from ..provenance import environment, weights_sha256
from .shapestream_figures import QUERY, SIZE

STRIDE = 4  # frames: half a second
SENSITIVITIES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
COUNTS = (4, 8, 12, 16, 20, 24, 28, 36, 48, 60, 80, 100, 120, 160, 200, 237)
GAPS = {"sparse": (4.0, 12.0), "dense": (1.0, 3.0)}
TOLERANCE_S = 1.0
SHORTEST_S = MIN_DURATION * world.NUM_FRAMES / world.FPS  # the same as in `llm-jepa watch`
LATEST_S = 6.0  # a caption later than this after the start of an event does not count


class Embedded(NamedTuple):
    """A stream and the embeddings of its windows."""

    stream: world.Stream
    starts_s: np.ndarray  # [T] of the windows
    embeddings: np.ndarray  # [T, D]

    @property
    def times_s(self) -> np.ndarray:
        """[T] middles of the windows."""
        return self.starts_s + world.NUM_FRAMES / world.FPS / 2

    @property
    def boundaries_s(self) -> list[float]:
        """The ends of events, without those in the first and last second: no window has its middle there."""
        return [event.end_s for event in self.stream.events[:-1] if self.times_s[0] < event.end_s < self.times_s[-1]]


def embedded(model: VLJEPA, seed: int, gap: tuple[float, float], seconds: float) -> Embedded:
    stream = world.stream(seed, split="test", seconds=seconds, gap=gap, size=SIZE)
    starts = np.arange(0, len(stream.frames) - world.NUM_FRAMES + 1, STRIDE)
    windows = [stream.frames[at : at + world.NUM_FRAMES] for at in starts]
    return Embedded(stream, starts / world.FPS, model.embed(windows, QUERY).numpy())


def grammar(model: VLJEPA) -> MemoryProjection:
    """A memory of `every_caption`."""
    texts = every_caption()
    return MemoryProjection(model.embed_texts(texts), texts)


def every_caption() -> tuple[str, ...]:
    """A caption in trained wording of every possible event."""
    events = []
    for kind in world.KINDS:
        roles = world.NUM_ROLES[kind]
        for actor in world.THINGS if roles else (None,):
            for patient in _patients(actor) if roles == 2 else [None]:
                events.append(world.Event(kind, 0.0, 1.0, actor, patient))
    return tuple(world.captions(event)[0] for event in events)


def _patients(actor: world.Thing | None) -> list[world.Thing | None]:
    """The things that an actor can meet: those of another colour."""
    return [thing for thing in world.THINGS if actor and thing[0] != actor[0]]


def quality(stream: Embedded, segments: Sequence[Segment], memory: MemoryProjection, *, of: str) -> tuple[float, float]:
    """(share of right slots, share of right kinds) over events. An event gets the decode nearest to its middle.

    of: the field of `Segment` that is decoded.
    """
    captions = memory.nearest(torch.from_numpy(np.stack([getattr(segment, of) for segment in segments])))
    middles = np.array([(segment.start_s + segment.end_s) / 2 for segment in segments])
    slots, kinds = [], []
    for event in stream.stream.events:
        nearest = int(np.abs(middles - (event.start_s + event.end_s) / 2).argmin())
        kind, actor, patient = world.slots(captions[nearest].text) or (None, None, None)
        right = [kind == event.kind, actor == event.actor, patient == event.patient]
        num_slots = 1 + world.NUM_ROLES[event.kind]
        slots.append(sum(right[:num_slots]) / num_slots if right[0] else 0.0)
        kinds.append(right[0])
    return float(np.mean(slots)), float(np.mean(kinds))


def online(
    embeddings: np.ndarray, times_s: np.ndarray, sensitivity: float = 1.0, *, min_duration_s: float = SHORTEST_S
) -> list[Segment]:
    """The segments that WardSegmenter closes, as the windows come."""
    segmenter = WardSegmenter(sensitivity=sensitivity, min_duration_s=min_duration_s)
    pushed = [segmenter.push(z, float(t)) for z, t in zip(embeddings, times_s, strict=True)]
    return [segment for segment in [*pushed, segmenter.flush()] if segment is not None]


def curve(
    streams: Sequence[Embedded],
    memory: MemoryProjection,
    choose: Callable[[Embedded, Any], list[Segment]],
    knobs: Any,
    of: str = "core_embedding",
) -> list[dict[str, float]]:
    """One point for each knob: means over streams. choose: (stream, knob) -> segments."""
    points = []
    for knob in knobs:
        rows = []
        for stream in streams:
            segments = choose(stream, knob)
            cuts = [segment.end_s for segment in segments[:-1]]
            f1 = boundary_f1(cuts, stream.boundaries_s, tolerance_s=TOLERANCE_S).f1
            rows.append((len(segments), *quality(stream, segments, memory, of=of), f1))
        decodes, slots, kinds, f1 = np.mean(rows, axis=0)
        points.append(
            {"knob": knob, "decodes": decodes, "slot_accuracy": slots, "kind_accuracy": kinds, "boundary_f1": f1}
        )
    return points


def decodes_for(points: Sequence[dict[str, float]], wanted: float) -> float | None:
    """The fewest decodes at which a curve reaches an accuracy, or None.

    The curve is made monotone, and its points are joined by lines.
    """
    best_decodes, best = 0.0, 0.0
    for point in sorted(points, key=lambda point: point["decodes"]):
        if point["slot_accuracy"] >= wanted:
            share = (wanted - best) / (point["slot_accuracy"] - best)
            return best_decodes + share * (point["decodes"] - best_decodes)
        if point["slot_accuracy"] > best:
            best_decodes, best = point["decodes"], point["slot_accuracy"]
    return None


def latency(streams: Sequence[Embedded], memory: MemoryProjection) -> dict[str, float]:
    """Seconds from the start of an event to its first caption, and to its first caption of the right kind.

    Rests are left out. Captions count that are emitted after the start, within LATEST_S. Also the share of events that
    get a caption of the right kind.
    """
    first, right, num_events, num_decodes = [], [], 0, 0
    for stream in streams:
        captions, decodes = _captions_online(stream, memory)
        num_decodes += decodes
        for event in stream.stream.events:
            if event.kind == "idle":
                continue
            num_events += 1
            emitted, emitted_right = _captions_of(event, captions)
            if emitted:
                first.append(emitted[0] - event.start_s)
            if emitted_right:
                right.append(emitted_right[0] - event.start_s)
    return {
        "events": num_events,
        "decodes_with_provisional_captions": num_decodes / len(streams),
        "seconds_to_first_caption": float(np.mean(first)),
        "share_with_a_right_caption": len(right) / num_events,
        "seconds_to_right_caption_median": float(np.median(right)),
        "seconds_to_right_caption_90": float(np.quantile(right, 0.9)),
    }


def _captions_online(stream: Embedded, memory: MemoryProjection) -> tuple[list[Caption], int]:
    """(captions in the order in which `llm-jepa watch` would emit them, number of decodes)."""

    def decode(embedding: np.ndarray) -> tuple[str, float]:
        return tuple(memory.nearest(torch.tensor(embedding)[None])[0])  # type: ignore[return-value]

    decoder = SelectiveDecoder(lambda z: z, decode, WardSegmenter(min_duration_s=SHORTEST_S))
    captions: list[Caption] = []
    for z, start in zip(stream.embeddings, stream.starts_s, strict=True):
        captions += decoder.step(z, float(start), float(start) + world.NUM_FRAMES / world.FPS)
    captions += decoder.finish()
    return captions, decoder.num_decodes


def _captions_of(event: world.Event, captions: Sequence[Caption]) -> tuple[list[float], list[float]]:
    """(times at which the captions of an event are emitted, the same of the captions with the right kind)."""
    emitted, right = [], []
    for caption in captions:
        in_time = event.start_s < caption.emitted_s <= event.start_s + LATEST_S
        if not in_time or caption.end_s <= event.start_s:
            continue
        emitted.append(caption.emitted_s)
        slots = world.slots(caption.text)
        if slots and slots[0] == event.kind:
            right.append(caption.emitted_s)
    return emitted, right


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw slot accuracy against decodes, a panel for each density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(11, 4), sharey=True)
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        for way, points in result["curves"].items():
            xs, ys = [p["decodes"] for p in points], [p["slot_accuracy"] for p in points]
            style = {"marker": "*", "markersize": 14, "linestyle": ""} if way == "oracle" else {"marker": "o"}
            axis.plot(xs, ys, label=way, **style)
        axis.set_xscale("log")
        axis.set_xlabel(f"decodes per {result['seconds']:.0f} s stream")
        axis.set_title(f"{name} ({result['events']:.0f} events and rests per stream)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("slot accuracy of the nearest decode")
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120)


def measure(streams: Sequence[Embedded], memory: MemoryProjection, seconds: float) -> dict[str, Any]:
    """The curves of the four ways on streams of one density, and the figures that are read from them."""
    counts = [count for count in COUNTS if count <= min(len(stream.starts_s) for stream in streams)]
    ways: dict[str, tuple[Any, Any]] = {
        "online": (lambda s, sensitivity: online(s.embeddings, s.times_s, sensitivity), SENSITIVITIES),
        "offline": (lambda s, n: segment_offline(s.embeddings, s.times_s, num_segments=n), counts),
        "uniform": (lambda s, n: segment_uniform(s.embeddings, s.times_s, num_segments=n), counts),
        "oracle": (lambda s, _: segment_at(s.embeddings, s.times_s, boundaries_s=s.boundaries_s), [0]),
    }
    curves = {way: curve(streams, memory, choose, knobs) for way, (choose, knobs) in ways.items()}
    mean_curves = {way: curve(streams, memory, *ways[way], of="embedding") for way in ways}
    default = next(point for point in curves["online"] if point["knob"] == 1.0)
    # Uniform may decode the core or the plain mean of a segment, whichever is better for it.
    best_uniform = []
    for pair in zip(curves["uniform"], mean_curves["uniform"], strict=True):
        best_uniform.append(max(pair, key=lambda point: point["slot_accuracy"]))
    uniform = decodes_for(best_uniform, default["slot_accuracy"])
    oracle = curves["oracle"][0]
    return {
        "curves": curves,
        "mean_curves": mean_curves,
        "seconds": seconds,
        "events": float(np.mean([len(stream.stream.events) for stream in streams])),
        "online": default,
        "uniform_decodes_at_equal_quality": uniform,
        "uniform_never_reaches_it": uniform is None,
        # A stream has no more windows than the last count. If uniform never reaches the quality, this is a lower bound.
        "uniform_over_online": (uniform or counts[-1]) / default["decodes"],
        "offline_decodes_at_equal_quality": decodes_for(curves["offline"], default["slot_accuracy"]),
        "online_over_oracle_decodes": default["decodes"] / oracle["decodes"],
        "latency": latency(streams, memory),
    }


def summarize(results: dict[str, Any]) -> dict[str, float]:
    sparse = results["sparse"]
    return {
        "uniform_over_online": sparse["uniform_over_online"],
        "online_over_oracle_decodes": sparse["online_over_oracle_decodes"],
        "online_slot_accuracy": sparse["online"]["slot_accuracy"],
        "oracle_slot_accuracy": sparse["curves"]["oracle"][0]["slot_accuracy"],
        "online_boundary_f1": sparse["online"]["boundary_f1"],
        "dense_uniform_over_online": results["dense"]["uniform_over_online"],
    }


@one_line_errors("eval.vl.selective_decoding")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="a model of eval.vl.shapestream")
    parser.add_argument(
        "--streams", type=whole(1), default=24, help="streams of each density; with 12 the ratio is noisy"
    )
    parser.add_argument("--seconds", type=number(1, 86_400), default=120)
    parser.add_argument("--first-seed", type=seed_number, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG file for the curves")
    options = parser.parse_args(argv)
    check_writable(options.out, options.plot)
    if options.plot:
        require("matplotlib")
    torch.set_num_threads(1)
    model = VLJEPA.from_pretrained(options.model)
    memory = grammar(model)
    seeds = range(options.first_seed, options.first_seed + options.streams)
    results: dict[str, Any] = {}
    for name, gap in GAPS.items():
        streams = [embedded(model, seed, gap, options.seconds) for seed in seeds]
        results[name] = measure(streams, memory, options.seconds)
    summary = summarize(results)
    result = {
        "summary": summary,
        **results,
        "settings": {"streams": options.streams, "seconds": options.seconds, "first_seed": options.first_seed},
        "weights_sha256": weights_sha256(options.model),
        "world_version": world.VERSION,
        "environment": environment(),
    }
    if options.out:
        write_json(options.out, result)
    if options.plot:
        draw(results, options.plot)
    for name in GAPS:
        figures = {key: value for key, value in results[name].items() if "curves" not in key}
        print(name, json.dumps(figures, indent=1, default=float))
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
