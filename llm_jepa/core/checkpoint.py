"""Runs that can be trusted after a crash: which folder is whose, and which checkpoint in it is whole.

`run.json` names the run a folder belongs to. Each checkpoint gets a manifest (size and SHA-256 of every file) written
last; a checkpoint without one that verifies is never resumed from.
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
    """Flush every file to disk and write the manifest last."""
    folder = Path(folder)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(folder / MANIFEST, {"files": files})


def fault(folder: str | Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
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
    """checkpoint-N folders, newest step first."""
    if not os.path.isdir(output_dir):
        return []
    found = [p for p in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def newest_complete(output_dir: str | Path) -> Path | None:
    return next((path for path in checkpoints(output_dir) if fault(path) is None), None)


def find_resume(output_dir: str | Path, run: dict[str, Any], *, resume: str | None) -> str | None:
    """The checkpoint to continue from, or None for a fresh start. Writes nothing.

    Args:
        run: what the run is (resolved recipe, data hashes); plain JSON. Must be what RUN_FILE says on resume.
        resume: None, "true" (the newest whole checkpoint) or a checkpoint folder.

    Raises UserError if the folder holds something else, or nothing to resume from.
    """
    folder, file = Path(output_dir), Path(output_dir) / RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; choose another output_dir.")
    if resume is None:
        if folder.is_dir() and any(folder.iterdir()):
            what = "holds a run already" if file.exists() else "is not empty and holds no run of ours"
            again = "continue it with --resume_from_checkpoint true, or " if file.exists() else ""
            raise UserError(f"output_dir {folder} {what}; {again}choose another output_dir.")
        return None
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"output_dir {folder} has no {RUN_FILE}, so no run to resume; start a new one.") from None
    changed = sorted(key for key in {*before, *run} if before.get(key) != run.get(key))
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)!r} -> {run.get(key)!r}" for key in changed[:3])
        raise UserError(
            f"Cannot resume {folder}: the run has changed in {len(changed)} place(s) ({shown}). "
            "Put them back, or start a new run in another output_dir."
        )
    if resume.lower() != "true":
        why = fault(resume) if Path(resume).is_dir() else "there is no such folder"
        if why:
            raise UserError(f"Cannot resume from {resume}: {why}.")
        return resume
    found = checkpoints(folder)
    if not found:
        print(f"{folder} has no checkpoint yet: starting at step 0.")
        return None
    newest = newest_complete(folder)
    if newest is None:
        raise UserError(f"No checkpoint in {folder} is whole ({fault(found[0])}); start a new run elsewhere.")
    skipped = [path.name for path in found[: found.index(newest)]]
    if skipped:
        print(f"Skipped {len(skipped)} damaged checkpoint(s): {', '.join(skipped)}.")
    return str(newest)
