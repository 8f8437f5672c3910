"""Where do the scenes of real clips end? Segmenters against hand-annotated boundaries.

    python -m eval.vl.real_clips --data DIR --text-encoder FOLDER [--out FILE]

DIR holds clips/ (videos and segments.json), coco_open_256/ and mobilenet_v2/. Frames, four a second, go one by one
through the model of eval.vl.coco_photos, trained on all of its photos; compared are the predicted text embeddings and
the visual features as they are, cut offline into as many segments as were annotated, online (which knows no number),
and uniformly. Annotated boundaries are good to about 0.3 s; the tolerance is 1 s.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.stream.opening import open_frames
from llm_jepa.stream.segments import (
    boundary_f1,
    segment_offline,
    segment_uniform,
)

from ..provenance import environment
from .coco_photos import build, class_rows, train_predictor
from .selective_decoding import online

FPS, TOLERANCE_S = 4.0, 1.0
SHORTEST_S = 1.0  # of a scene: a frame by itself, unlike a window, shows one scene alone


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with clips/, coco_open_256/, mobilenet_v2/")
    parser.add_argument("--text-encoder", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)

    used = build(options.data, options.text_encoder, seed=options.seed)
    folder = options.data / "coco_open_256"
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["file_name"])
    photos = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows]
    with torch.no_grad():
        features = torch.cat(
            [used.model.encode_frames(used.processor(images=[photo])["pixel_values_videos"]) for photo in photos]
        )
    weights, names = class_rows(options.data)
    captions = [row["captions"] for row in rows]
    train_predictor(used, features, captions, weights, names, seed=options.seed, steps=options.steps)

    annotated = json.loads((options.data / "clips" / "segments.json").read_text(encoding="utf-8"))["videos"]
    found: dict[str, Any] = {}
    for name, segments in annotated.items():
        path = options.data / "clips" / name
        if not path.is_file():
            print(f"{name} is annotated and not there: left out", file=sys.stderr)
            continue
        with open_frames(path, fps=FPS) as source:
            frames = list(source)
        times = np.array([frame.time_s for frame in frames])
        with torch.no_grad():
            seen = torch.cat(
                [used.model.encode_frames(used.processor(images=[f.image])["pixel_values_videos"]) for f in frames]
            )
            predicted = F.normalize(used.model.predict(seen), dim=-1).numpy()
        raw = F.normalize(seen.flatten(1), dim=-1).numpy()
        truth = [segment["t1"] for segment in segments[:-1]]
        ways = {
            "predicted text, offline": segment_offline(predicted, times, num_segments=len(segments)),
            "visual features, offline": segment_offline(raw, times, num_segments=len(segments)),
            "predicted text, online": online(predicted, times, min_duration_s=SHORTEST_S),
            "visual features, online": online(raw, times, min_duration_s=SHORTEST_S),
            "uniform": segment_uniform(raw, times, num_segments=len(segments)),
        }
        found[name] = {"seconds": float(times[-1]), "frames": len(frames), "segments": len(segments)}
        for way, cut in ways.items():
            score = boundary_f1([segment.end_s for segment in cut[:-1]], truth, tolerance_s=TOLERANCE_S)
            found[name][way] = {"f1": score.f1, "segments": len(cut)}
    ways_named = ["predicted text, offline", "visual features, offline", "predicted text, online", "uniform"]
    result = {
        "summary": {way: float(np.mean([clip[way]["f1"] for clip in found.values()])) for way in ways_named},
        "clips": found,
        "fps": FPS,
        "tolerance_s": TOLERANCE_S,
        "settings": {"steps": options.steps, "seed": options.seed},
        "segments_sha256": file_sha256(options.data / "clips" / "segments.json"),
        "environment": environment(),
    }
    if options.out:
        write_json(options.out, result)
    print(json.dumps({"summary": result["summary"], "clips": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
