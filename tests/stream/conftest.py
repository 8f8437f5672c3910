"""Fixtures of more than one file of tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.stream.movies import grey, write


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """24 frames, 8 a second, frame k is grey k."""
    return Path(write(str(tmp_path / "video.mp4"), [grey(k) for k in range(24)]))


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no FIFOs here")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"
