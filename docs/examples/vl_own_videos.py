"""VL-JEPA on your own videos: a manifest, a short training, and a label for each clip.

    python docs/examples/vl_own_videos.py                                 # draws eight films, trains tiny parts
    python docs/examples/vl_own_videos.py manifest.jsonl --steps 2000

A line of the manifest is {"video": PATH, "target": TEXT}. Needs the extra: pip install "llm-jepa[vl]".
All parts have random weights here, so that nothing is downloaded. With real ones, write their Hub ids instead of the
configs.
"""

import argparse
import json
from pathlib import Path

import av
import numpy as np

from llm_jepa.cli import main
from llm_jepa.core.strict_yaml import dump_yaml
from llm_jepa.vl import VLJEPA
from llm_jepa.vl.data import read_clips

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("manifest", nargs="?", type=Path, help="a .jsonl file")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path("runs/examples/vl"))
options = parser.parse_args()


def draw(path: Path, colour: tuple[int, int, int], *, to_the_right: bool) -> None:
    """A square that moves on a black ground, for a second."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for step in range(8):
            picture = np.zeros((32, 32, 3), dtype=np.uint8)
            left = 3 * step if to_the_right else 21 - 3 * step
            picture[12:20, left : left + 8] = colour
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())


options.out.mkdir(parents=True, exist_ok=True)
if options.manifest is None:
    options.manifest = options.out / "clips.jsonl"
    lines = []
    for name, colour in COLOURS.items():
        for direction in ("right", "left"):
            film = options.out / f"{name}_{direction}.mp4"
            draw(film, colour, to_the_right=direction == "right")
            lines.append({"video": film.name, "target": f"the {name} square moves to the {direction}"})
    options.manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))

recipe = {
    "family": "vl",
    "x_encoder": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
                  "layer_type": "basic"},
    "predictor": {"model_type": "llama", **WIDTH, "num_hidden_layers": 1, "initializer_range": 0.09},
    "y_encoder": {"model_type": "bert", **WIDTH, "num_hidden_layers": 1, "initializer_range": 0.09},
    "shared_dim": 64,
    "num_frames": 4,
    "frame_size": 32,
    "token_merge": [4, 1, 1],
    "grid_positions": True,
    "tokenizer_vocab_size": 320,
    "train_data": str(options.manifest),
    "x_encoder_trainable_layers": -1,
    "y_encoder_lr_factor": 1.0,
    "per_device_train_batch_size": 4,
    "learning_rate": 2.0e-3,
    "max_steps": options.steps,
    "logging_steps": 10,
    "save_steps": options.steps,
    "use_cpu": True,  # remove it on a machine with a GPU
    "output_dir": str(options.out / "model"),
}  # fmt: skip
path = options.out / "recipe.yaml"
path.write_text(dump_yaml(recipe))
if code := main(["train", str(path)]):
    raise SystemExit(code)

clips = read_clips(options.manifest)
labels = sorted({pair.target for clip in clips for pair in clip.pairs})
model = VLJEPA.from_pretrained(str(options.out / "model"), device="cpu")
for clip in clips:
    ranked = model.classify(clip.video, labels)
    print(f"{Path(clip.video).name:20s} {ranked}"[:120])
