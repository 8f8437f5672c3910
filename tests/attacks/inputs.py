"""Run a list of hostile inputs (`eval.faults.inputs`) from a process that may fork, and tell which fail."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from eval.faults.inputs import Input, outcomes
from tests.ranks import start


def faults_of(
    inputs: Callable[[Path], Iterator[Input]],
    folder: Path,
    *,
    at_least: int,
    names: str = "",
    every: int = 1,
    **limits: Any,
) -> list[str]:
    """What is wrong with the outcomes of all inputs, in words.

    Args:
        inputs: a function at the top of a module: inputs(shared folder) -> its inputs.
        at_least: the number of inputs that there must be.
        names: only inputs whose name begins with it.
        every: 2 takes each second of them, and all that must be accepted.
        limits: `seconds` and `megabytes` of each input.
    """
    process = start(_run_all, inputs, folder, names, every, limits)
    process.join()
    assert process.exitcode == 0
    result = json.loads((folder / "faults.json").read_text())
    assert result["count"] >= at_least, result["count"]
    return result["faults"]


def _run_all(
    inputs: Callable[[Path], Iterator[Input]], folder: Path, names: str, every: int, limits: dict[str, Any]
) -> None:
    shared = folder / "shared"
    shared.mkdir()
    given = [each for each in inputs(shared) if each.name.startswith(names)]
    given = [each for number, each in enumerate(given) if number % every == 0 or each.says is None]
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    assert len({each.name for each in given}) == len(given), "two inputs have one name"
    faults = [outcome.fault(each) for each, outcome in outcomes(given, folder / "inputs", **limits)]
    result = {"count": len(given), "faults": [fault for fault in faults if fault is not None]}
    (folder / "faults.json").write_text(json.dumps(result))
