"""The tiny model, its folder and a film, built once for each file of tests."""

from __future__ import annotations

import signal

import pytest

from llm_jepa.vl.inference import VLJEPA
from tests.vl.watch.rooms import build, video, with_texts


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """As at a terminal. Parallel test workers and jobs in the background start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def model():
    return with_texts(*build())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The same without a y_decoder."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    VLJEPA(model.model, model.processor).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """24 s, a new room at 7, 14 and 21 s."""
    return video(tmp_path_factory.mktemp("film") / "rooms.mp4", 24)
