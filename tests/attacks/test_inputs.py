"""Claim: the watcher of hostile inputs sees each kind of outcome."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from eval.faults import inputs as kinds
from eval.faults.inputs import Input, canary, outcomes
from llm_jepa.core.errors import UserError
from tests.ranks import start


def _call(function):
    """An input whose command is `function(folder)`."""
    return lambda folder: lambda: function(folder)


def _refuse(folder: Path) -> None:
    raise UserError("a reason\nin two lines")


def _through_a_link(folder: Path) -> None:
    (folder / "work" / "link").symlink_to(folder / "stdout")
    (folder / "work" / "link").write_text("x")


def _write(folder: Path) -> None:
    (folder / "work" / "out").write_text("mine")


def _turn(folder: Path) -> None:
    while True:
        pass


EXPECTED = {
    kinds.ACCEPTED: _call(_write),
    kinds.ONE_LINE: _call(_refuse),
    kinds.TRACEBACK: _call(lambda folder: 1 / 0),
    kinds.DIED: _call(lambda folder: os.abort()),
    kinds.HUNG: _call(_turn),
    kinds.EXECUTED: _call(lambda folder: subprocess.run(["touch", str(canary(folder))])),
    kinds.WROTE: _call(_through_a_link),
    kinds.RAW: _call(lambda folder: print("\x1b[2J")),
    "waits": _call(lambda folder: time.sleep(1000)),
    "memory": _call(lambda folder: bytearray(10**9) and None),
    "words": lambda folder: ["generate", "--no-such-option"],
}


def _cases(shared: Path) -> Iterator[Input]:
    for name, make in EXPECTED.items():
        yield Input(name, make)


def _see(folder: Path) -> None:
    for given, outcome in outcomes(_cases(folder), folder, seconds=1, megabytes=500):
        with open(folder / "seen", "a") as file:
            file.write(f"{given.name} {outcome.kind}\n")


def test_each_kind_is_seen(tmp_path):
    process = start(_see, tmp_path)
    process.join()
    seen = dict(line.split() for line in (tmp_path / "seen").read_text().splitlines())
    assert seen == {name: name for name in EXPECTED} | {
        "waits": kinds.HUNG, "memory": kinds.TRACEBACK, "words": kinds.ONE_LINE,
    }  # fmt: skip


def test_what_must_happen():
    line = kinds.Outcome(kinds.ONE_LINE, 2, 0.1, "", "a warning\nllm-jepa: error: model.safetensors is torn\n")
    assert line.fault(Input("a", list, says="model.safetensors is torn")) is None
    assert "does not say" in line.fault(Input("a", list, says="a warning"))
    assert "one_line" in line.fault(Input("a", list))
