"""A tiny model and a camera that is carried from one room into the next."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator

import numpy as np
import torch
from transformers import BertConfig, LlamaConfig, ViTConfig, ViTImageProcessorPil, set_seed

from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.stream.frames import Frame
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.modeling import VLJEPAModel
from llm_jepa.vl.processing import VLJEPAProcessor
from llm_jepa.vl.sliding import SlidingEncoder
from llm_jepa.vl.watch_command import add_arguments, run
from llm_jepa.vl.y_decoder import MemoryProjection, YDecoder, fingerprint

TEXTS = ("a red room", "a green room", "a blue room", "nothing at all")
FPS = 2.0  # of the tiny model: 4 frames are a window of 2 s


def build(num_frames=4):
    set_seed(0)
    tokenizer = train_tokenizer([{"prompt": text, "completion": text} for text in TEXTS], 320)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    model = VLJEPAModel.from_parts(
        ViTConfig(image_size=32, patch_size=16, initializer_range=0.1, **small),
        LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.1, **small),
        BertConfig(vocab_size=len(tokenizer), initializer_range=0.1, **small),
        shared_dim=24,
        num_frames=num_frames,
    )
    frames = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return model, VLJEPAProcessor(frames, tokenizer, tokenizer, num_frames=num_frames)


def with_texts(model, processor, texts=TEXTS):
    use = VLJEPA(model, processor)
    memory = MemoryProjection(use.embed_texts(texts), tuple(texts))
    return VLJEPA(model, processor, y_decoder=YDecoder(fingerprint(model), memory))


def picture(index, rng, size=32):
    """Room `index`, with the noise of a camera."""
    colour = np.random.default_rng(100 + index).integers(30, 226, (4, 4, 3)).repeat(size // 4, 0).repeat(size // 4, 1)
    return np.clip(colour + rng.normal(0, 2, colour.shape), 0, 255).astype(np.uint8)


def rooms(seconds, *, every_s=7.0, rate=FPS, size=32) -> Iterator[Frame]:
    """A new room every `every_s` seconds; the noise of a frame does not depend on how many follow."""
    for k in range(round(seconds * rate)):
        yield Frame(k / rate, picture(int(k / rate // every_s), np.random.default_rng(k), size))


def video(path, seconds, *, every_s=7.0, size=64, rate=4, **options):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height = stream.width = size
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "10", **options}
        for frame in rooms(seconds, every_s=every_s, rate=rate, size=size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.image, "rgb24")))
        container.mux(stream.encode())
    return path


def command(*words):
    parser = argparse.ArgumentParser(prog="llm-jepa watch", allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


def events(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[0]["header"], [line for line in lines if "text" in line], lines[-1].get("summary")


def calls(monkeypatch, owner, name):
    """The arguments of every call of a method, which still does what it did."""
    seen, original = [], getattr(owner, name)

    def spy(self, *args, **options):
        seen.append(args)
        return original(self, *args, **options)

    monkeypatch.setattr(owner, name, spy)
    return seen


def windows_embedded(monkeypatch, before=lambda index: None, after=lambda index, z: z):
    """A list that grows by the arguments of each batch of windows that is embedded.

    before: is called with the number of each window, and may raise.  after: with its number and embedding, which it may
    change.
    """
    batches, original, count = [], SlidingEncoder.__call__, itertools.count()

    def spy(self, batch):
        numbers = [next(count) for _ in batch]
        for number in numbers:
            before(number)
        batches.append(batch)
        return torch.stack([after(number, z) for number, z in zip(numbers, original(self, batch), strict=True)])

    monkeypatch.setattr(SlidingEncoder, "__call__", spy)
    return batches


def srt(path):
    """[(start ms, end ms, text)], every line accounted for."""
    blocks = path.read_text(encoding="utf-8").removesuffix("\n").split("\n\n")
    found = []
    for number, block in enumerate(blocks, start=1):
        index, times, text = block.split("\n")
        match = re.fullmatch(r"(\d\d):(\d\d):(\d\d),(\d{3}) --> (\d\d):(\d\d):(\d\d),(\d{3})", times)
        assert index == str(number) and match and text
        h, m, s, ms, h2, m2, s2, ms2 = map(int, match.groups())
        found.append(((h * 60 + m) * 60_000 + s * 1000 + ms, (h2 * 60 + m2) * 60_000 + s2 * 1000 + ms2, text))
    assert all(a < b for a, b, _ in found) and all(a[1] <= b[0] for a, b in zip(found, found[1:], strict=False))
    return found
