"""Run a list of hostile inputs (`eval.faults.inputs`) from a process that may fork, and tell which fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from eval.faults.inputs import Input, outcomes
from tests.ranks import start


def faults_of(
    inputs: Callable[[Path], Iterator[Input]], folder: Path, *, at_least: int, names: str = "", **limits: Any
) -> list[str]:
    """What is wrong with the outcomes of all inputs, in words.

    Args:
        inputs: a function at the top of a module: inputs(shared folder) -> its inputs.
        at_least: the number of inputs that there must be.
        names: only inputs whose name begins with it.
        limits: `seconds` and `megabytes` of each input.
    """
    process = start(_run_all, inputs, folder, names, limits)
    process.join()
    assert process.exitcode == 0
    result = json.loads((folder / "faults.json").read_text())
    assert result["count"] >= at_least, result["count"]
    return result["faults"]


def _run_all(inputs: Callable[[Path], Iterator[Input]], folder: Path, names: str, limits: dict[str, Any]) -> None:
    shared = folder / "shared"
    shared.mkdir()
    given = [each for each in inputs(shared) if each.name.startswith(names)]
    assert len({each.name for each in given}) == len(given), "two inputs have one name"
    faults = [outcome.fault(each) for each, outcome in outcomes(given, folder / "inputs", **limits)]
    result = {"count": len(given), "faults": [fault for fault in faults if fault is not None]}
    (folder / "faults.json").write_text(json.dumps(result))
