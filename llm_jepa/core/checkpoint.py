"""Resuming after a crash: which run a folder belongs to, and which of its checkpoints are complete.

`run.json` names the run. Each checkpoint gets a manifest (size and SHA-256 of every file), which is written last. A run
never resumes from a checkpoint whose manifest is missing or does not fit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import UserError
from .files import file_sha256, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
RUN_FILE = "run.json"
CONTENTS = "contents"  # in RUN_FILE: key -> hash of the folder, file or Hub repository that the key names
SAVED = ("checkpoint-*", "*.safetensors", "config.json", "README.md", "adapter")  # what training leaves in a folder
LENGTHS = {"max_steps", "num_train_epochs"}


def seal(folder: str | Path) -> None:
    """Flush every file of a checkpoint to disk, then write its manifest."""
    folder = Path(folder)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(folder / MANIFEST, {"files": files})


def fault(folder: str | Path) -> str | None:
    """Why a checkpoint cannot be used, or None if it is complete."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"it has no readable {MANIFEST}: the save was cut short"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
            return f"{name} is damaged"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint-N folders in `output_dir`, newest step first."""
    if not os.path.isdir(output_dir):
        return []
    folders = [p for p in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(folders, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def newest_complete(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that `fault` accepts, or None."""
    return next((path for path in checkpoints(output_dir) if fault(path) is None), None)


def newest_sealed(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that has a manifest, or None. Reads no weights, unlike `newest_complete`."""
    return next((path for path in checkpoints(output_dir) if (path / MANIFEST).is_file()), None)


def find_resume(
    output_dir: str | Path,
    run: dict[str, Any],
    *,
    resume: str | None,
    may_change: Collection[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    further: str = "start a new run from its model",
) -> str | None:
    """The checkpoint to continue from, or None for a fresh start. Writes nothing.

    Args:
        run: the identity of the run (resolved recipe, data hashes), plain JSON. RUN_FILE must hold the same to resume.
        resume: None, "true" (the newest complete checkpoint) or a checkpoint folder.
        may_change: keys that are not compared; earlier versions wrote some of them.
        defaults: the value of keys that an identity may leave out.
        further: how to train a finished model for more steps, in words.

    Raises UserError if the folder holds anything else, or nothing to resume from.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; choose another output_dir.")
    if _is_held(folder):
        raise UserError(f"Another process trains in {folder} now; wait until it ends, or choose another output_dir.")
    if resume is None:
        _check_is_free(folder)
        return None
    before = {key: value for key, value in _read_run(folder).items() if key not in may_change}
    if _has_saved_nothing(folder) and resume.lower() == "true":
        print(f"{folder} has no checkpoint yet: starting at step 0.")
        return None
    _check_is_same_run(folder, before, run, defaults, further)
    if resume.lower() != "true":
        reason = fault(resume) if Path(resume).is_dir() else "there is no such folder"
        if reason:
            raise UserError(f"Cannot resume from {resume}: {reason}.")
        return resume
    candidates = checkpoints(folder)
    if not candidates:
        print(f"{folder} has no checkpoint yet: starting at step 0.")
        return None
    newest = newest_complete(folder)
    if newest is None:
        raise UserError(
            f"No checkpoint in {folder} is complete ({fault(candidates[0])}); start a new run in another output_dir."
        )
    damaged = [path.name for path in candidates[: candidates.index(newest)]]
    if damaged:
        print(f"Skipped {len(damaged)} damaged checkpoint(s): {', '.join(damaged)}.")
    return str(newest)


def hold(folder: str | Path) -> int | None:
    """Lock RUN_FILE as long as the returned file descriptor is open. None if the system has no such locks."""
    if fcntl is None:
        return None
    descriptor = os.open(Path(folder) / RUN_FILE, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks, or a process that looks at this moment
        os.close(descriptor)
        return None
    return descriptor


def _is_held(folder: Path) -> bool:
    """Whether another process has called `hold`. Several processes may ask at once."""
    if fcntl is None or not (folder / RUN_FILE).is_file():
        return False
    with open(folder / RUN_FILE, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _has_saved_nothing(folder: Path) -> bool:
    """Whether a run has claimed the folder and ended before it saved anything."""
    return not any(any(folder.glob(pattern)) for pattern in SAVED)


def _check_is_free(folder: Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RUN_FILE).exists():
        raise UserError(f"output_dir {folder} is not empty and holds no run of ours; choose another output_dir.")
    if not _has_saved_nothing(folder):
        raise UserError(
            f"output_dir {folder} holds a run already; continue it with --resume_from_checkpoint true, or choose "
            "another output_dir."
        )


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"output_dir {folder} has no {RUN_FILE}, so there is no run to resume; "
            "leave out --resume_from_checkpoint to start one."
        ) from None
    return run


def _check_is_same_run(
    folder: Path, before: dict[str, Any], run: dict[str, Any], defaults: Mapping[str, Any], further: str
) -> None:
    changed = _changes(before, run, defaults)
    if not changed:
        return
    examples = "; ".join(list(changed.values())[:3])
    if changed.keys() <= LENGTHS:
        if not (folder / "config.json").is_file():
            further = "start a new run in another output_dir"
        raise UserError(
            f"Cannot resume {folder}: the run has changed ({examples}). The learning rate and other schedules depend "
            f"on its length from the first step on, so a longer run is another run. Put it back, or {further}."
        )
    raise UserError(
        f"Cannot resume {folder}: the run has changed in {len(changed)} place(s) ({examples}). "
        "Put them back, or start a new run in another output_dir."
    )


def _changes(before: dict[str, Any], run: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """key -> how it differs between two identities.

    Where a key names a folder, a file or a Hub repository, `CONTENTS` has its hash. If both identities have the hash,
    it decides, and not the name. Runs of earlier versions have no hash.
    """
    before, run = dict(before), dict(run)
    hashes, hashes_now = before.pop(CONTENTS, {}), run.pop(CONTENTS, {})
    changes = {}
    for key in sorted({*before, *run}):
        old, new = before.get(key, defaults.get(key)), run.get(key, defaults.get(key))
        if hashes.get(key) and hashes_now.get(key):
            if hashes[key] != hashes_now[key]:
                changes[key] = f"{key}: {old!r} -> {new!r}" if old != new else f"{key}: the files of {new!r} differ"
        elif old != new:
            changes[key] = f"{key}: {old!r} -> {new!r}"
    return changes
