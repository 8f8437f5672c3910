"""Fuzz one target.  python -m tests.fuzz TARGET [--seconds 600] [--keep] [--input FILE]

Exit code 1 if an input fails; it is written to the current folder, and `--input FILE` tries it alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz import corpus

ROOT = Path(__file__).parents[2]
LONGEST = 4096  # bytes of an input; longer ones are tried in tests/attacks
MOST_KEPT = 60  # inputs of a corpus


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz one target.")
    parser.add_argument("target", choices=sorted(corpus.WORDS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--keep", action="store_true", help="add to the corpus what reaches other code")
    parser.add_argument("--input", type=Path, help="try this file alone")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        return _fuzz(options, Path(scratch))


def _fuzz(options: argparse.Namespace, scratch: Path) -> int:
    inputs, work = scratch / "inputs", scratch / "work"
    inputs.mkdir()
    work.mkdir()
    for number, data in enumerate(corpus.read(options.target)):
        (inputs / str(number)).write_bytes(data)
    words = scratch / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in corpus.WORDS[options.target]))
    if options.input is not None:
        return _run(options.target, work, [str(options.input.resolve())])[0]
    code, output = _run(
        options.target, work,
        [f"-max_total_time={options.seconds}", f"-max_len={LONGEST}", f"-dict={words}", "-timeout=60",
         "-rss_limit_mb=4096", "-print_final_stats=1", "-artifact_prefix=./", str(inputs)],
    )  # fmt: skip
    count = re.search(r"number_of_executed_units: *(\d+)", output)
    executed = int(count[1]) if count else 0
    print(f"{options.target}: {executed:,} inputs in {options.seconds} s, {'a fault' if code else 'no fault'}")
    if options.keep and code == 0:
        _keep(options.target, inputs)
    return 1 if code or not executed else 0


def _run(target: str, work: Path, options: Sequence[str]) -> tuple[int, str]:
    """(exit code, output) of libFuzzer. Its messages are passed on if it fails."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    words = [sys.executable, "-m", "tests.fuzz.child", target, str(work), *options]
    process = subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace")
    if process.returncode:
        print((process.stdout + process.stderr)[-8000:], file=sys.stderr)
    return process.returncode, process.stdout + process.stderr


def _keep(target: str, inputs: Path) -> None:
    """Add the shortest inputs that libFuzzer kept because they reach other code."""
    seeds = corpus.read(target)
    found = sorted({path.read_bytes() for path in inputs.iterdir()} - set(seeds), key=lambda data: (len(data), data))
    corpus.write(target, [*seeds, *found[: max(0, MOST_KEPT - len(seeds))]])


def _escaped(word: str) -> str:
    """As libFuzzer reads it."""
    return "".join(f"\\x{byte:02X}" for byte in word.encode())


if __name__ == "__main__":
    sys.exit(main())
