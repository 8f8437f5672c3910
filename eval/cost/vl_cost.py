"""What VL-JEPA costs: training with and without cached features, and streams with and without selective decoding.

    python -m eval.vl_cost --quick            # under 45 s on two cores
    python -m eval.vl_cost --out FILE         # also at the paper's layer shapes; five minutes

- `cached_over_plain`: samples per second of a training loop that reads its visual features, over those of the same
  loop that runs the frozen encoder in every step. The ratio depends on the shapes, so it is reported with them.
- `decodes_uniform_over_selective`: decodes at a fixed rate over those of WardSegmenter, on sparse ShapeStream streams,
  for the same share of events whose nearest decode is right. No model is trained here. An ideal model is simulated:
  each kind of event in a frame is a random vector, and a window is the mean of its frames, with noise of NOISE times
  its length. eval/results/vl/selective_decoding-seed*.json has the ratio for trained models.
- `watched_over_embedded`: windows per second of `watch`, which encodes a frame once, over those of `VLJEPA.embed` on
  each window alone, if a window begins every quarter of a window. With V-JEPA 2 it is 1: it encodes windows as a whole.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    IJepaConfig,
    LlamaConfig,
    PreTrainedConfig,
    VJEPA2Config,
)

from llm_jepa import compare_pairs
from llm_jepa.core.files import write_json
from llm_jepa.core.tokenizer import train_bpe
from llm_jepa.stream.frames import Frame, windows
from llm_jepa.synthetic import shapestream as world
from llm_jepa.vl import (
    VLJEPA,
    PrefixDecoder,
    PrefixDecoderConfig,
    Segment,
    VLJEPAModel,
    VLJEPAProcessor,
    plain_frames,
    segment_uniform,
)
from llm_jepa.vl.sliding import AT_ONCE, SlidingEncoder

from ..command import ArgumentParser, check_writable, one_line_errors
from ..provenance import environment
from ..vl.selective_decoding import online

QUERY_TOKENS, TARGET_TOKENS = 8, 16
QUERY = "What happens in the video?"
NOISE, DIM = 0.3, 64  # of the simulated windows


@dataclass(frozen=True)
class Shape:
    """The shape of a model and of its clips. name: the same in words; batch: clips in a step."""

    name: str
    x_encoder: PreTrainedConfig
    predictor: PreTrainedConfig
    y_encoder: PreTrainedConfig
    num_frames: int
    size: int
    batch: int
    shared_dim: int
    merged_frames: int = 1  # frames that share a visual token

    def build(self) -> VLJEPAModel:
        return VLJEPAModel.from_parts(
            self.x_encoder, self.predictor, self.y_encoder, num_frames=self.num_frames, shared_dim=self.shared_dim,
            token_merge=[self.merged_frames, 1, 1],
        )  # fmt: skip


def small() -> Shape:
    return Shape(
        "I-JEPA ViT-B/16 at 64 px, 4 frames in pairs; predictor 2 x 512; y_encoder 2 x 128",
        IJepaConfig(image_size=64),
        LlamaConfig(
            hidden_size=512, num_hidden_layers=2, num_attention_heads=8, intermediate_size=1024, vocab_size=1000
        ),
        BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, vocab_size=1000),
        num_frames=4,
        size=64,
        batch=8,
        shared_dim=256,
        merged_frames=2,
    )


def paper() -> Shape:
    """The layers of the paper's parts.

    Clips are shorter (2 frames of 128 px: 64 tokens). Both sides of the ratio are linear in tokens, except attention.
    Vocabularies are cut to 1,000, because they are only looked up.
    """
    return Shape(
        "V-JEPA 2 ViT-L (24 x 1024), 2 frames at 128 px; predictor 8 Llama-3.2-1B layers; y_encoder 24 x 768 (300M)",
        VJEPA2Config(crop_size=128, frames_per_clip=2),
        LlamaConfig(
            hidden_size=2048, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
            intermediate_size=8192, vocab_size=1000,
        ),
        Gemma3TextConfig(
            hidden_size=768, num_hidden_layers=24, num_attention_heads=3, num_key_value_heads=1, head_dim=256,
            intermediate_size=1152, sliding_window=512, vocab_size=1000, use_bidirectional_attention=True,
        ),
        num_frames=2,
        size=128,
        batch=2,
        shared_dim=1536,
    )  # fmt: skip


def training(shape: Shape, repetitions: int) -> dict[str, Any]:
    """Time interleaved steps of the two loops. The ratio is the median over pairs of neighbouring steps."""
    torch.manual_seed(0)
    model = shape.build()
    model.x_encoder.requires_grad_(False)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4)  # Adam's two moments would double the memory of the large shape
    pixels = torch.randn(shape.batch, shape.num_frames, 3, shape.size, shape.size)
    query = torch.randint(0, 1000, (shape.batch, QUERY_TOKENS))
    target = torch.randint(0, 1000, (shape.batch, TARGET_TOKENS))
    features = model.encode_frames(pixels)

    def step(**vision: torch.Tensor) -> float:
        start = time.perf_counter()
        output = model(query_ids=query, target_ids=target, **vision)
        loss = compare_pairs(
            output.predicted, output.target, torch.arange(shape.batch), objective="info_nce",
            temperature=output.temperature,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        return time.perf_counter() - start

    plain, cached = [], []
    for repetition in range(repetitions + 1):
        times = step(pixel_values_videos=pixels), step(visual_features=features)
        if repetition:  # the first one is a warm-up
            plain.append(times[0])
            cached.append(times[1])
    ratios = [without / with_cache for without, with_cache in zip(plain, cached, strict=True)]
    return {
        "shape": shape.name,
        "visual_tokens": features.shape[1],
        "weights": {name: num_weights(part) for name, part in model.named_children()},
        "plain_samples_per_second": shape.batch / statistics.median(plain),
        "cached_samples_per_second": shape.batch / statistics.median(cached),
        "cached_over_plain": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "repetitions": repetitions,
    }


def sliding(shape: Shape, num_windows: int, repetitions: int) -> dict[str, Any]:
    """Time the windows of a film, one after the other, as `VLJEPA.embed` and as `watch` embed them."""
    torch.manual_seed(0)
    tokenizer = train_bpe([QUERY] * 2, 300)
    model = shape.build().eval()
    processor = VLJEPAProcessor.from_parts(
        model.config, image_processor=plain_frames(shape.size), tokenizer=tokenizer, target_tokenizer=tokenizer
    )
    use = VLJEPA(model, processor)
    count = shape.num_frames + (num_windows - 1) * shape.num_frames // 4
    pictures = np.random.default_rng(0).integers(0, 256, (count, shape.size, shape.size, 3), dtype=np.uint8)
    frames = (Frame(index / 4, picture) for index, picture in enumerate(pictures))
    film = list(windows(frames, num_frames=shape.num_frames, stride_s=shape.num_frames / 16))

    def embed() -> torch.Tensor:
        return torch.cat([use.embed([window.frames], QUERY) for window in film])

    def slide(at_once: int) -> torch.Tensor:
        encoder = SlidingEncoder(use, QUERY)
        return torch.cat([encoder(film[start : start + at_once]) for start in range(0, len(film), at_once)])

    ways = {"embed": embed, "camera": lambda: slide(1), "film": lambda: slide(AT_ONCE)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way()
            if repetition:  # the first one is a warm-up
                times[name].append(time.perf_counter() - start)
    ratios = {
        name: [one / other for one, other in zip(times["embed"], times[name], strict=True)]
        for name in ("camera", "film")
    }
    return {
        "shape": shape.name,
        "windows": len(film),
        "windows_per_second": {name: len(film) / statistics.median(taken) for name, taken in times.items()},
        "over_embedded": {name: statistics.median(ratio) for name, ratio in ratios.items()},
        "spread": {name: [min(ratio), max(ratio)] for name, ratio in ratios.items()},
        "largest_difference": max(float((found[name] - found["embed"]).abs().max()) for name in ratios),
        "repetitions": repetitions,
    }


def num_weights(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def seconds_of(work: Callable[[], Any], repetitions: int = 5) -> float:
    """The median seconds of a call, after one call to warm up."""
    work()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class SimulatedStream(NamedTuple):
    stream: world.Stream
    times_s: np.ndarray  # [T] middles of the windows
    embeddings: np.ndarray  # [T, D] of the windows
    codes: np.ndarray  # [N, D] of the events


def streaming(num_streams: int) -> dict[str, Any]:
    """Decodes of sparse streams, and the cost of a window and a decode with a small model."""
    streams = []
    for seed in range(num_streams):
        stream = world.stream(seed, split="test", size=32)
        streams.append(SimulatedStream(stream, *ideal_windows(stream, np.random.default_rng(seed))))
    num_windows = min(len(stream.times_s) for stream in streams)
    segments = [online(stream.embeddings, stream.times_s) for stream in streams]
    decodes = statistics.mean(map(len, segments))
    right = statistics.mean(
        share_right(stream.stream, cut, stream.codes) for stream, cut in zip(streams, segments, strict=True)
    )
    uniform = uniform_decodes_for(right, streams, num_windows)
    shape = small()
    window_s, decode_s = latencies(shape)
    return {
        "decodes_uniform_over_selective": uniform / decodes,
        "events_and_rests_said_right": right,
        "decodes_per_stream": decodes,
        "uniform_decodes_per_stream": uniform,
        "windows_per_stream": num_windows,
        "streams": num_streams,
        "model": shape.name + "; y_decoder GPT-2 3 x 192, 16 tokens",
        "window_latency_s": window_s,
        "decode_s": decode_s,
        "decoder_share_selective": decodes * decode_s / (num_windows * window_s + decodes * decode_s),
        "decoder_share_every_window": num_windows * decode_s / (num_windows * window_s + num_windows * decode_s),
    }


def uniform_decodes_for(right: float, streams: Sequence[SimulatedStream], windows: int) -> int:
    """The fewest uniform decodes a stream with at least this share right; `windows` if no number reaches it."""
    for number in range(1, windows + 1):
        shares = []
        for stream in streams:
            segments = segment_uniform(stream.embeddings, stream.times_s, num_segments=number)
            shares.append(share_right(stream.stream, segments, stream.codes))
        if statistics.mean(shares) >= right:
            return number
    return windows


def latencies(shape: Shape) -> tuple[float, float]:
    """(seconds to embed a window, seconds to decode a text of TARGET_TOKENS tokens), with random weights."""
    torch.manual_seed(0)
    model = shape.build().eval()
    lm = GPT2Config(n_embd=192, n_layer=3, n_head=3, vocab_size=4096, bos_token_id=0, eos_token_id=0)
    decoder = PrefixDecoder(PrefixDecoderConfig(lm_config=lm, embedding_dim=shape.shared_dim)).eval()
    pixels = torch.randn(1, shape.num_frames, 3, shape.size, shape.size)
    query = torch.randint(0, 1000, (1, QUERY_TOKENS))
    with torch.no_grad():
        window_s = seconds_of(lambda: model(pixel_values_videos=pixels, query_ids=query))
        prefix = decoder.prefix_of(torch.randn(1, shape.shared_dim))
        mask = torch.ones(prefix.shape[:2], dtype=torch.long)
        decode_s = seconds_of(
            lambda: decoder.lm.generate(
                inputs_embeds=prefix, attention_mask=mask, max_new_tokens=TARGET_TOKENS, min_new_tokens=TARGET_TOKENS,
                do_sample=False, pad_token_id=0,
            )
        )  # fmt: skip
    return window_s, decode_s


def ideal_windows(stream: world.Stream, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(middles of the windows in seconds [T], their embeddings [T, D], the vectors of the N events [N, D]).

    Equal events have equal vectors; all rests are equal.
    """
    meanings = [(event.kind, event.actor, event.patient) for event in stream.events]
    vectors = {}
    for meaning in dict.fromkeys(meanings):
        vector = rng.normal(size=DIM)
        vectors[meaning] = vector / np.linalg.norm(vector)
    codes = np.stack([vectors[meaning] for meaning in meanings])
    ends = [round(event.end_s * world.FPS) for event in stream.events]
    frames = codes[np.searchsorted(ends, np.arange(len(stream.frames)), side="right").clip(max=len(ends) - 1)]
    starts = np.arange(0, len(frames) - world.NUM_FRAMES + 1, 4)
    windows = np.stack([frames[at : at + world.NUM_FRAMES].mean(axis=0) for at in starts])
    noise = rng.normal(size=windows.shape) * NOISE / DIM**0.5
    return (starts + world.NUM_FRAMES / 2) / world.FPS, windows + noise, codes


def share_right(stream: world.Stream, segments: Sequence[Segment], codes: np.ndarray) -> float:
    """The share of events, rests included, that get the right vector.

    An event gets the vector that is nearest to the embedding of the segment nearest in time.
    """
    middles = np.array([(segment.start_s + segment.end_s) / 2 for segment in segments])
    similarity = np.stack([segment.core_embedding for segment in segments]) @ codes.T  # [segments, N]
    hits = []
    for code, event in zip(codes, stream.events, strict=True):
        nearest = np.abs(middles - (event.start_s + event.end_s) / 2).argmin()
        hits.append(np.array_equal(codes[similarity[nearest].argmax()], code))
    return float(np.mean(hits))


@one_line_errors("eval.vl_cost")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m eval.vl_cost", description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="only the small shape and two streams")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(argv)
    check_writable(options.out)
    shapes = [small()] if options.quick else [small(), paper()]
    results = [training(shape, 3 if options.quick or shape.batch < 8 else 7) for shape in shapes]
    watched = sliding(small(), 16 if options.quick else 32, 2 if options.quick else 7)
    stream = streaming(2 if options.quick else 12)
    summary = {
        "cached_over_plain": results[0]["cached_over_plain"],
        "decodes_uniform_over_selective": stream["decodes_uniform_over_selective"],
        "watched_over_embedded": watched["over_embedded"]["film"],
        "watched_live_over_embedded": watched["over_embedded"]["camera"],
    }
    if len(results) > 1:
        summary["cached_over_plain_paper_layers"] = results[1]["cached_over_plain"]
    result = {
        "summary": summary,
        "training": results,
        "watching": watched,
        "streaming": stream,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }
    if options.out:
        write_json(options.out, result)
    for row in results:
        low, high = row["spread"]
        print(
            f"{row['shape']}\n  plain {row['plain_samples_per_second']:.2f} samples/s, cached "
            f"{row['cached_samples_per_second']:.2f}: {row['cached_over_plain']:.2f} x ({low:.2f}-{high:.2f})"
        )
    print(json.dumps(watched, indent=1))
    print(json.dumps(stream, indent=1))
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
