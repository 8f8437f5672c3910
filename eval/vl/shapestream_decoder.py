"""The y_decoder of the ShapeStream checkpoint: trained on every caption of the world, and measured on test clips.

    python -m eval.vl.shapestream_decoder --model runs/shapestream [--out FILE]

It is small (a GPT-2 of two layers of 64), and is saved into the model's folder. A text is right if its kind of event,
its actor and its patient are those of the clip. The nearest caption of the memory is measured beside it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_jepa.cli import main as llm_jepa
from llm_jepa.core.files import write_json
from llm_jepa.synthetic import shapestream as world
from llm_jepa.vl import VLJEPA

from ..command import ArgumentParser, check_writable, one_line_errors, seed_number, whole
from ..provenance import environment, weights_sha256
from .selective_decoding import every_caption
from .shapestream_figures import FIRST_MEASURED, QUERY, SIZE, encode, predict

SHAPE = {"layers": 2, "hidden_size": 64, "vocab_size": 512}


def share_right(texts: Sequence[str], clips: Sequence[world.Clip]) -> float:
    """The share of texts that name the event of their clip: its kind, actor and patient."""
    events = [(clip.event.kind, clip.event.actor, clip.event.patient) for clip in clips]
    return float(np.mean([world.slots(text) == event for text, event in zip(texts, events, strict=True)]))


def parse(argv: Sequence[str] | None) -> Any:
    parser = ArgumentParser(prog="python -m eval.vl.shapestream_decoder", description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a VL-JEPA trained on ShapeStream")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--steps", type=whole(1), default=2000)
    parser.add_argument("--test-clips", type=whole(1), default=3000)
    parser.add_argument("--seed", type=seed_number, default=0)
    return parser.parse_args(argv)


@one_line_errors("eval.vl.shapestream_decoder")
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    check_writable(options.out)
    torch.set_num_threads(1)
    captions = every_caption()
    settings = {"steps": options.steps, "seed": options.seed, **SHAPE}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "captions.txt"
        texts.write_text("\n".join(captions) + "\n", encoding="utf-8")
        if code := llm_jepa(["train-decoder", str(options.model), "--texts", str(texts), *words]):
            return code
    model = VLJEPA.from_pretrained(options.model)
    memory = model.y_decoder.memory
    assert memory is not None
    clips = [world.clip(FIRST_MEASURED + i, split="test", size=SIZE) for i in range(options.test_clips)]
    features = encode(model, [clip.frames for clip in clips])
    predicted = predict(model, features, list(range(len(clips))), [QUERY] * len(clips))  # [clips, D]
    own = model.decode(model.embed_texts(captions))
    result = {
        "summary": {
            "right_written": share_right([decoded.text for decoded in model.decode(predicted)], clips),
            "right_nearest": share_right([decoded.text for decoded in memory.nearest(predicted)], clips),
            "own_captions_written": float(np.mean([d.text == text for d, text in zip(own, captions, strict=True)])),
        },
        "captions": len(captions),
        "settings": {**settings, "test_clips": options.test_clips},
        "weights_sha256": weights_sha256(options.model),
        "decoder_sha256": weights_sha256(options.model / "y_decoder"),
        "world_version": world.VERSION,
        "environment": environment(),
    }
    if options.out:
        write_json(options.out, result)
    print(json.dumps(result["summary"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
