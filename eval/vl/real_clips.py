"""Where do the scenes of real clips end? Segmenters compared with hand-annotated boundaries.

    python -m eval.vl.real_clips --data DIR --text-encoder FOLDER [--out FILE]

DIR holds clips/ (videos and segments.json), coco_open_256/ and mobilenet_v2/. Four frames a second go one by one
through the model of eval.vl.coco_photos, which is trained on all of its photos. Two kinds of embedding are cut into
segments: the predicted text embeddings, and the visual features. There are three ways to cut: offline and uniformly
into the annotated number of segments, and online, without that number. Annotated boundaries are exact to about 0.3 s;
the tolerance is 1 s.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.core.json_files import read_json
from llm_jepa.stream.segments import boundary_f1
from llm_jepa.vl import VLJEPA, Segment, open_frames, segment_offline, segment_uniform

from ..command import ArgumentParser, check_writable, one_line_errors, seed_number, whole
from ..provenance import environment
from .coco_photos import build, class_rows, encode_images, load_photos, train_predictor
from .selective_decoding import online

FPS, TOLERANCE_S = 4.0, 1.0
SHORTEST_S = 1.0  # of a scene. A single frame shows one scene only; a window can show two
SUMMED_UP = ("predicted text, offline", "visual features, offline", "predicted text, online", "uniform")


def cut(model: VLJEPA, path: Path, num_segments: int) -> tuple[dict[str, list[Segment]], dict[str, Any]]:
    """(the segments of a clip by each way, facts about the clip)."""
    with open_frames(path, fps=FPS) as source:
        frames = list(source)
    times = np.array([frame.time_s for frame in frames])
    features = encode_images(model, (frame.image for frame in frames))  # [T, 1, 1280]
    with torch.no_grad():
        predicted = F.normalize(model.model.predict(features), dim=-1).numpy()  # [T, D]
    visual = F.normalize(features.flatten(1), dim=-1).numpy()
    segments = {
        "predicted text, offline": segment_offline(predicted, times, num_segments=num_segments),
        "visual features, offline": segment_offline(visual, times, num_segments=num_segments),
        "predicted text, online": online(predicted, times, min_duration_s=SHORTEST_S),
        "visual features, online": online(visual, times, min_duration_s=SHORTEST_S),
        "uniform": segment_uniform(visual, times, num_segments=num_segments),
    }
    return segments, {"seconds": float(times[-1]), "frames": len(frames), "segments": num_segments}


def measure(model: VLJEPA, folder: Path) -> dict[str, dict[str, Any]]:
    """Boundary F1 of every way, by clip. A clip whose video is missing is left out with a warning."""
    annotated = read_json(folder / "segments.json", {"videos": (dict, list)})["videos"]
    clips: dict[str, dict[str, Any]] = {}
    for name, scenes in annotated.items():
        if not (folder / name).is_file():
            print(f"{name} is annotated, but {folder / name} is missing: left out", file=sys.stderr)
            continue
        by_way, clips[name] = cut(model, folder / name, len(scenes))
        boundaries = [scene["t1"] for scene in scenes[:-1]]
        for way, segments in by_way.items():
            ends = [segment.end_s for segment in segments[:-1]]
            score = boundary_f1(ends, boundaries, tolerance_s=TOLERANCE_S)
            clips[name][way] = {"f1": score.f1, "segments": len(segments)}
    return clips


def mean_f1(clips: dict[str, dict[str, Any]], way: str) -> float:
    return float(np.mean([clip[way]["f1"] for clip in clips.values()]))


@one_line_errors("eval.vl.real_clips")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with clips/, coco_open_256/, mobilenet_v2/")
    parser.add_argument("--text-encoder", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--steps", type=whole(1), default=300)
    parser.add_argument("--seed", type=seed_number, default=0)
    options = parser.parse_args(argv)
    check_writable(options.out)
    segments_sha256 = file_sha256(options.data / "clips" / "segments.json")  # before the training
    torch.set_num_threads(1)
    model = build(options.data, options.text_encoder, seed=options.seed)
    photos = load_photos(options.data)
    features = encode_images(model, photos.images)
    weights, names = class_rows(options.data)
    train_predictor(model, features, photos.captions, weights, names, seed=options.seed, steps=options.steps)
    clips = measure(model, options.data / "clips")
    summary = {way: mean_f1(clips, way) for way in SUMMED_UP}
    result = {
        "summary": summary,
        "clips": clips,
        "fps": FPS,
        "tolerance_s": TOLERANCE_S,
        "settings": {"steps": options.steps, "seed": options.seed},
        "segments_sha256": segments_sha256,
        "environment": environment(),
    }
    if options.out:
        write_json(options.out, result)
    print(json.dumps({"summary": summary, "clips": clips}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
