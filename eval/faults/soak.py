"""Does a long run grow, or leave anything behind?

    python -m eval.faults.soak [--steps N] [--only KIND ...] [--out FILE.json]

A tiny language model and a tiny VL-JEPA train for 10,000 steps, with a save and an evaluation every 100 steps. `watch`
reads 20,000 frames of a test pattern. Each is one command in one process, and this process looks at it four times a
second: resident memory, descriptors, threads, child processes. Afterwards its folder must hold the files of a short
run, and the folder for temporary files must be empty.

Growth is the median of the last tenth of the time over that of the second tenth. The first tenth is warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from llm_jepa.core.files import write_json
from llm_jepa.core.strict_yaml import dump_yaml
from llm_jepa.synthetic import nl_rx

from ..command import ArgumentParser, check_writable, one_line_errors, whole
from ..provenance import environment

KINDS = ("lm", "vl", "watch")
BOUND = 0.02  # of the growth of resident memory
EVERY = 100  # steps between two saves, and between two evaluations
FRAMES_A_STEP = 2  # `watch` reads 20,000 frames if the trainings have 10,000 steps
FRAMES_A_SECOND = 8
PAUSE_S = 0.25
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
COMMON = {
    "per_device_train_batch_size": 4, "learning_rate": 0.001, "use_cpu": True, "report_to": "none",
    "disable_tqdm": True, "diagnostics_pairs": 8, "validation_rows": 8, "load_best_model_at_end": True,
    "save_strategy": "steps", "eval_strategy": "steps", "save_steps": EVERY, "eval_steps": EVERY,
    "logging_steps": EVERY, "save_total_limit": 2,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "lm": {
        "family": "lm", "model_config": {"model_type": "llama", **SMALL, "num_key_value_heads": 2,
                                         "max_position_embeddings": 256, "attention_dropout": 0.1},
        "tokenizer_vocab_size": 320, "activation_checkpointing": False, "target_encoder": "ema", **COMMON,
    },
    "vl": {
        "family": "vl", "frame_size": 16, "num_frames": 1, "shared_dim": 8, "num_predictor_layers": 1,
        "tokenizer_vocab_size": 290, "x_encoder": {"model_type": "vit", **SMALL, "image_size": 16, "patch_size": 8},
        "predictor": {"model_type": "llama", **SMALL, "num_key_value_heads": 2},
        "y_encoder": {"model_type": "bert", **SMALL}, **COMMON,
    },
}  # fmt: skip


class Sample(NamedTuple):
    """What a process held at one moment."""

    memory: int  # resident, in bytes
    descriptors: int
    threads: int
    children: int


class Observed(NamedTuple):
    """What a command held while it ran, and what it left behind."""

    samples: list[Sample]
    seconds: float
    processes_left: int
    temporary_files_left: list[str]


def soak(kind: str, steps: int, work: Path) -> dict[str, Any]:
    """Run one kind in `work` -> its figures."""
    if kind == "watch":
        train("vl", EVERY, work / "short")
        return watch(work / "short" / "run", FRAMES_A_STEP * steps, work / "watch")
    observed = train(kind, steps, work / "long")
    train(kind, 3 * EVERY, work / "short")
    names, expected = (names_of(work / length / "run") for length in ("long", "short"))
    figures = {"steps": steps, "saves": steps // EVERY, "evaluations": steps // EVERY, **figures_of(observed)}
    return {**figures, "files": len(names), "other_files": sorted(names ^ expected)}


def train(kind: str, steps: int, folder: Path) -> Observed:
    """Train from step 0 to `steps`."""
    folder.mkdir()
    data = write_clips(folder) if kind == "vl" else write_rows(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_yaml({**RECIPES[kind], "train_data": str(data), "max_steps": steps}))
    words = ["train", str(recipe), "--output_dir", str(folder / "run")]
    return observe(words, folder, "run/checkpoint-*")


def watch(model: Path, frames: int, folder: Path) -> dict[str, Any]:
    """Caption a moving test pattern of so many frames."""
    folder.mkdir()
    source = f"lavfi:testsrc=size=64x48:rate={FRAMES_A_SECOND}"
    words = ["watch", str(model), source, "--labels", "number 0,number 1,number 2", "--stride", "0.25"]
    words += ["--max-seconds", str(frames / FRAMES_A_SECOND), "--jsonl", str(folder / "events.jsonl")]
    figures = figures_of(observe(words, folder, "events.jsonl"))
    events = len((folder / "events.jsonl").read_text().splitlines())
    return {"frames": frames, "events": events, **figures}


def write_rows(folder: Path) -> Path:
    """48 sentences and their regexes, in a file."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in nl_rx.generate(48, seed=3, wordings=(0, 1, 2, 3))))
    return path


def write_clips(folder: Path) -> Path:
    """48 pictures of noise with a text each, and the file that names them."""
    import numpy as np
    from PIL import Image

    draw, rows = np.random.default_rng(0), []
    for i in range(48):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "target": f"number {i % 5}"}) + "\n")
    path = folder / "clips.jsonl"
    path.write_text("".join(rows))
    return path


def observe(words: Sequence[str], folder: Path, first: str) -> Observed:
    """Run `llm-jepa WORDS` and look at its process until it ends.

    Args:
        first: a pattern of file names. The time counts from when there is one, so that loading is no part of it.

    Raises RuntimeError if the command fails.
    """
    temporary = folder / "temporary"
    temporary.mkdir()
    environ = {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torch")  # torch makes one cache for all runs of a user
    began = time.monotonic()
    samples: list[Sample] = []
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_jepa.cli", *words], stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **environ}, start_new_session=True,
        )  # fmt: skip
        try:
            looked_at = psutil.Process(process.pid)
            while process.poll() is None:
                if samples or any(folder.glob(first)):
                    samples += sample(looked_at)
                time.sleep(PAUSE_S)
        finally:
            process.kill()
    if process.returncode != 0:
        raise RuntimeError(f"{words[0]} ended with {process.returncode}: {(folder / 'output.txt').read_text()[-500:]}")
    left = [pid for pid in psutil.pids() if session_of(pid) == process.pid]
    return Observed(samples, time.monotonic() - began, len(left), sorted(path.name for path in temporary.iterdir()))


def sample(process: psutil.Process) -> list[Sample]:
    """One sample, or none if the process has just ended."""
    try:
        return [
            Sample(
                process.memory_info().rss, process.num_fds(), process.num_threads(),
                len(process.children(recursive=True)),
            )
        ]  # fmt: skip
    except psutil.Error:
        return []


def session_of(pid: int) -> int | None:
    """The session of a process; None if it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def figures_of(observed: Observed) -> dict[str, Any]:
    """Medians of the second and of the last tenth of the time, the growth of memory between them, and what is left.

    Raises RuntimeError if there are too few samples.
    """
    samples = observed.samples
    tenth = len(samples) // 10
    if not tenth:
        raise RuntimeError(f"It ended after {len(samples) * PAUSE_S} s; let it run for more --steps.")
    early, late = (
        Sample(*(int(statistics.median(column)) for column in zip(*part, strict=True)))
        for part in (samples[tenth : 2 * tenth], samples[-tenth:])
    )
    tenths = [statistics.median(one.memory for one in samples[i * tenth : (i + 1) * tenth]) for i in range(10)]
    return {
        "early": early._asdict(),
        "late": late._asdict(),
        "memory_growth": late.memory / early.memory - 1,
        "memory_of_each_tenth": tenths,
        "seconds": round(observed.seconds),
        "processes_left": observed.processes_left,
        "temporary_files_left": observed.temporary_files_left,
    }


def names_of(folder: Path) -> set[str]:
    """The names of all files under a folder. Checkpoints are numbered from the oldest, whatever their steps."""
    steps = sorted((int(path.name.split("-")[1]), path.name) for path in folder.glob("checkpoint-*"))
    numbers = {name: f"checkpoint {number}" for number, (_, name) in enumerate(steps)}
    names = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {str(Path(numbers.get(name.parts[0], name.parts[0]), *name.parts[1:])) for name in names}


def faults_of(figures: dict[str, Any]) -> list[str]:
    """What is not as promised, in words."""
    faults = []
    if figures["memory_growth"] >= BOUND:
        faults.append(f"memory grew by {100 * figures['memory_growth']:.1f} %")
    for name in ("descriptors", "threads", "children"):
        if figures["late"][name] > figures["early"][name]:
            faults.append(f"{name} grew from {figures['early'][name]} to {figures['late'][name]}")
    for name in ("processes_left", "temporary_files_left", "other_files"):
        if figures.get(name):
            faults.append(f"{name.replace('_', ' ')}: {figures[name]}")
    return faults


@one_line_errors("eval.faults.soak")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m eval.faults.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=whole(1), default=10_000, help="of each training (default: 10000)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="lm, vl, watch")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(argv)
    check_writable(options.out)
    result: dict[str, Any] = {"bound": BOUND, "kinds": {}, "faults": {}}
    for kind in options.only:
        with tempfile.TemporaryDirectory() as work:
            figures = soak(kind, options.steps, Path(work))
        result["kinds"][kind], result["faults"][kind] = figures, faults_of(figures)
        early, late = figures["early"], figures["late"]
        print(
            f"{kind}: {late['memory'] / 2**20:.0f} MiB ({100 * figures['memory_growth']:+.1f} %), "
            f"{late['descriptors']} descriptors (before: {early['descriptors']}), {late['threads']} threads "
            f"({early['threads']}), {figures['seconds']} s: {'; '.join(result['faults'][kind]) or 'as promised'}",
            flush=True,
        )
    result |= {"environment": environment(), "summary": {"faults": sum(map(len, result["faults"].values()))}}
    if options.out:
        write_json(options.out, result)
    return int(result["summary"]["faults"] > 0)


if __name__ == "__main__":
    sys.exit(main())
