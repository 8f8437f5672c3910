"""The tiny recipes on the real NL-RX:  python -m eval.experiments.tiny_nl_rx --data DIR [--seeds 0 1 2] [--jobs 2]

Three arms x two label protocols x seeds. Each run is trained by `llm-jepa train` and scored by `eval.run`, and has one
result file in eval/results/tiny_nl_rx/. A run whose file exists is not repeated, so you can stop and start again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..command import ArgumentParser, seed_number, whole

EVAL = __name__.partition(".")[0]  # the evaluation has another name in the wheel
RESULTS = Path(__file__).parents[1] / "results" / "tiny_nl_rx"
ARMS = {"sft": "nl-rx-synth-baseline", "info_nce": "nl-rx-synth", "cosine": "nl-rx-synth-cosine"}
PROTOCOLS = ("completion", "paper")


def one_run(cell: tuple[str, str, int], data: Path) -> str:
    """Train and score one (arm, protocol, seed), in processes of one thread each. Returns a line for the log."""
    arm, protocol, seed = cell
    name = f"{protocol}-{arm}-seed{seed}"
    out = RESULTS / f"{name}.json"
    if out.exists():
        return f"{name}: already there"
    folder = Path(tempfile.mkdtemp(prefix="tiny_nl_rx_")) / name
    train = [
        sys.executable, "-m", "llm_jepa.cli", "train", f"lm/tiny-llama/{ARMS[arm]}",
        "--train_data", str(data / "synth_train.jsonl"), "--output_dir", str(folder),
        "--label_protocol", protocol, "--seed", str(seed), "--disable_tqdm", "true",
    ]  # fmt: skip
    score = [sys.executable, "-m", f"{EVAL}.run", "--model", str(folder), "--data", str(data), "--out", str(out)]
    for command in (train, score):
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            return f"{name}: FAILED\n{done.stderr[-2000:]}"
    shutil.rmtree(folder.parent)
    return f"{name}:\n{done.stdout}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m eval.experiments.tiny_nl_rx", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with {synth,turk}_{train,test}.jsonl")
    parser.add_argument("--seeds", type=seed_number, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=whole(1, 1024), default=2, help="number of parallel runs, one core each")
    options = parser.parse_args(argv)
    cells = [(arm, protocol, seed) for seed in options.seeds for protocol in PROTOCOLS for arm in ARMS]
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for line in pool.map(lambda cell: one_run(cell, options.data), cells):
            print(line, flush=True)
            failed += "FAILED" in line
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
