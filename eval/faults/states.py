"""What SIGKILL leaves at every moment of a call: copies of a folder before each of its file events.

SIGKILL leaves the files as they are at that moment. So one call copies its folder before every file event, and each
copy is a killed call. A file that was being written at that moment is also cut to its half.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path

from llm_jepa.core.checkpoint import RUN_FILE

EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


def watch(folder: Path, states: Path) -> None:
    """From now on, copy `folder` to states/0000, 0001, ... before each file event of this process in it.

    Use it in a child process: the hook cannot be taken away. Raises AssertionError there if a file is written in place,
    outside of a stage.
    """
    count, inside = 0, str(folder) + os.sep
    lock, copying = threading.Lock(), threading.local()  # saves are published by a thread

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        is_write = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if hasattr(copying, "now") or not (event in EVENTS or is_write) or isinstance(arguments[0], int):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if not path.startswith(inside):
            return
        file = os.path.relpath(path, folder) if event == "open" else ""
        # RUN_FILE is opened to lock it
        assert file in ("", RUN_FILE) or ".stage-" in file, f"{file} is written in place"
        with lock:
            copying.now = True
            _copy(folder, states / f"{count:04d}")
            (states / f"{count:04d}.txt").write_text(file)
            count += 1
            del copying.now

    sys.addaudithook(hook)


def _copy(folder: Path, state: Path) -> None:
    """Copy the folder of a run. Code that is not Python, in another thread, may rename a file meanwhile."""
    for _ in range(10):
        try:
            shutil.copytree(folder, state, symlinks=True)
            return
        except (shutil.Error, FileNotFoundError):
            shutil.rmtree(state)
    raise RuntimeError(f"{folder} changes all the time")


def add_torn_files(states: Path) -> None:
    """Between two events a file was written: the state after half of it. safetensors writes under a hidden name."""
    names = sorted(path.name for path in states.iterdir() if path.is_dir())
    for before, after in zip(names, names[1:], strict=False):
        opened = (states / f"{before}.txt").read_text()
        new = _files(states / after) - _files(states / before)
        for file in sorted(new | ({Path(opened)} if opened else set())):
            whole = states / after / file
            if not whole.is_file() or not whole.stat().st_size or ".stage-" not in str(file):
                continue  # a file outside a stage was renamed
            torn = states / f"{before}-{'-'.join(file.parts[-3:])}"
            shutil.copytree(states / after, torn, symlinks=True)
            half = whole.read_bytes()[: whole.stat().st_size // 2]
            (torn / file).unlink()  # it may be a hard link
            (torn / file).write_bytes(half)
            if file.suffix == ".safetensors":
                (torn / file).rename(torn / file.with_name(".tmpAb12Cd"))
    for path in states.glob("*.txt"):
        path.unlink()


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
