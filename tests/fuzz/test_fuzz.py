"""Claim: no bytes make a reader or a grader fail in another way than with UserError, nor answer wrongly."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from tests.fuzz import corpus
from tests.ranks import start

ROOT = Path(__file__).parents[2]
NAMES = sorted(corpus.WORDS)


def test_every_target_has_a_corpus():
    from tests.fuzz.targets import MAKE

    assert NAMES == sorted(MAKE) == sorted(path.stem for path in corpus.FOLDER.iterdir())
    assert all(len(corpus.read(name)) >= 5 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_and_200_mutations(name, tmp_path):
    """In a process of its own: some recipe keys set environment variables."""
    process = start(_try, name, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "result").read_text() == f"{len(corpus.read(name)) + 200} tried"


def _try(name: str, folder: Path) -> None:
    from tests.fuzz.targets import make

    logging.disable(logging.WARNING)
    (folder / "work").mkdir()
    os.chdir(folder)
    target, count = make(name, folder / "work"), 0
    for data in [*corpus.read(name), *corpus.mutations(name, 200)]:
        try:
            target(data)
        except Exception:
            (folder / "result").write_text(f"{data!r}\n{traceback.format_exc()}")
            return
        count += 1
    (folder / "result").write_text(f"{count} tried")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason='needs atheris: pip install -e ".[fuzz]"')
@pytest.mark.parametrize("name", NAMES)
def test_ten_minutes(name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "tests.fuzz", name, "--seconds", "600"]
    process = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
