"""Resuming after a crash: which run a folder belongs to, and which of its checkpoints are complete.

`run.json` names the run. Each checkpoint gets a manifest (size and SHA-256 of every file), which is written last. A run
never resumes from a checkpoint whose manifest is missing or does not fit.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import file_sha256, write_json

MANIFEST = "manifest.json"
RUN_FILE = "run.json"


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


def find_resume(output_dir: str | Path, run: dict[str, Any], *, resume: str | None) -> str | None:
    """The checkpoint to continue from, or None for a fresh start. Writes nothing.

    Args:
        run: the identity of the run (resolved recipe, data hashes), plain JSON. RUN_FILE must hold the same to resume.
        resume: None, "true" (the newest complete checkpoint) or a checkpoint folder.

    Raises UserError if the folder holds anything else, or nothing to resume from.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; choose another output_dir.")
    if resume is None:
        _check_is_free(folder)
        return None
    _check_is_same_run(folder, run)
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


def _check_is_free(folder: Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if (folder / RUN_FILE).exists():
        raise UserError(
            f"output_dir {folder} holds a run already; continue it with --resume_from_checkpoint true, or choose "
            "another output_dir."
        )
    raise UserError(f"output_dir {folder} is not empty and holds no run of ours; choose another output_dir.")


def _check_is_same_run(folder: Path, run: dict[str, Any]) -> None:
    try:
        before = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"output_dir {folder} has no {RUN_FILE}, so there is no run to resume; "
            "leave out --resume_from_checkpoint to start one."
        ) from None
    changed = sorted(key for key in {*before, *run} if before.get(key) != run.get(key))
    if changed:
        examples = "; ".join(f"{key}: {before.get(key)!r} -> {run.get(key)!r}" for key in changed[:3])
        raise UserError(
            f"Cannot resume {folder}: the run has changed in {len(changed)} place(s) ({examples}). "
            "Put them back, or start a new run in another output_dir."
        )
