"""What SIGKILL leaves at every moment of a call: copies of a folder before each of its file events.

SIGKILL leaves the files as they are at that moment. So one call copies its folder before every file event, and each
copy is a killed call. A file that was being written at that moment is also cut to its half.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def record(call: Callable[[], object], folder: str, states: str) -> None:
    """Call `call`, and copy `folder` to states/0000, 0001, ... before each file event in it. Use it in a child process:
    the hook cannot be taken away.

    run.json is opened to lock it; every other file must be written in a stage.
    """
    count, lock, copying = 0, threading.Lock(), threading.local()  # saves are published by a thread

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        opens_to_write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if hasattr(copying, "now") or not (event in EVENTS or opens_to_write):
            return
        if not str(arguments[0]).startswith(folder + "/"):
            return
        file = os.path.relpath(arguments[0], folder) if event == "open" else ""
        assert file in ("", "run.json") or ".stage-" in file, f"{file} is written in place"
        with lock:
            copying.now = True
            shutil.copytree(folder, f"{states}/{count:04d}", symlinks=True)
            Path(states, f"{count:04d}.txt").write_text(file)
            count += 1
            del copying.now

    sys.addaudithook(hook)
    call()


def add_torn_files(states: Path) -> None:
    """Between two events a file was written: the state after half of it. safetensors writes under a hidden name."""
    names = sorted(path.name for path in states.iterdir() if path.is_dir())
    for before, after in zip(names, names[1:], strict=False):
        opened = Path(states, f"{before}.txt").read_text()
        new = _files(states / after) - _files(states / before)
        for file in sorted(new | ({Path(opened)} if opened else set())):
            whole = states / after / file
            if not whole.is_file() or not whole.stat().st_size or ".stage-" not in str(file):
                continue  # a file outside a stage was renamed
            torn = states / f"{before}-{'-'.join(file.parts[-3:])}"
            shutil.copytree(states / after, torn, symlinks=True)
            half = whole.read_bytes()[: whole.stat().st_size // 2]
            (torn / file).write_bytes(half)
            if file.suffix == ".safetensors":
                (torn / file).rename(torn / file.with_name(".tmpAb12Cd"))
    for path in states.glob("*.txt"):
        path.unlink()


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
