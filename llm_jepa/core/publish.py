"""One way to publish a folder: files are written into a private stage, listed in a manifest, and renamed.

    stage = make_stage(folder)           files are written into stage / NAME
    seal(stage / NAME)                   every file is flushed to disk, and the manifest lists it
    publish(stage / NAME, folder / NAME) one rename; or publish_into, for a folder that holds other files too

A kill at any moment leaves the folder as it was or as it shall be. `broken` tells which. The stage of a killed process
stays until `remove_leftovers`.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from .files import STAGE, file_sha256, flush, make_stage, write_json
from .json_files import read_json

MANIFEST = "manifest.json"
MOVING = "moving"  # name of a folder in a stage whose files are being moved out of the stage
# Written by earlier versions, and by safetensors before 0.8 ended a file: run.123.tmp.json, .tmpAb12Cd
OLD_LEFTOVER = re.compile(r".+\.\d+\.tmp(\.\w+)?|\.tmp\w{6}")


class Work(threading.Thread):
    """A call in a thread. The end of the process does not wait for it, unlike for those of `concurrent.futures`."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """Wait for its end, and raise what it raised."""
        self.join()
        if self._error is not None:
            raise self._error


def seal(folder: str | Path, *, run: str | None = None) -> None:
    """Flush every file of a folder to disk, then write its manifest: the size and SHA-256 of each file.

    run: the name of the training run that the folder belongs to.
    """
    folder = Path(folder)
    names = sorted(_files_of(folder) - {MANIFEST})
    paths = [folder / name for name in names]

    def flush_all() -> None:
        for path in paths:
            flush(path)

    flushing = Work(flush_all)
    flushing.start()
    files = {name: _entry(path) for name, path in zip(names, paths, strict=True)}
    flushing.finish()
    write_json(folder / MANIFEST, {"files": files} | ({"run": run} if run is not None else {}))
    for path in sorted(path for path in folder.rglob("*") if path.is_dir()):
        flush(path)
    flush(folder)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The files that a manifest lists -> their size and SHA-256. None if there is no manifest of that form."""
    try:
        files = read_json(Path(folder) / MANIFEST, {"files": dict})["files"]
    except (OSError, ValueError):
        return None
    is_valid = all(_is_entry(name, entry) for name, entry in files.items())
    return files if is_valid else None


def run_of(folder: str | Path) -> str | None:
    """The `run` with which a folder was sealed; None if it was sealed without."""
    try:
        run = read_json(Path(folder) / MANIFEST).get("run")
    except (OSError, ValueError):
        return None
    return run if isinstance(run, str) else None


def broken(
    folder: str | Path,
    *,
    required: Callable[[set[str]], str | None],
    may_change: Collection[str] = (),
    is_shared: bool = False,
) -> str | None:
    """Why a folder is not what was sealed, or None if it is: its files are those of the manifest and no others.

    Args:
        required: the listed names -> what is missing among them in words, or None. A manifest can be forged or of
            another kind of folder.
        may_change: names of files that only have to be there.
        is_shared: the folder holds other files, too; these are not looked at.
    """
    folder = Path(folder)
    files = read_manifest(folder)
    if files is None:
        return f"it has no readable {MANIFEST}: the save was cut short"
    reason = required(set(files))
    if reason is not None:
        return reason
    if not is_shared and (others := _files_of(folder) - set(files) - {MANIFEST}):
        return f"{min(others)} is not in its {MANIFEST}"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if name in may_change:
            continue
        if path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
            return f"{name} is damaged"
    return None


def publish(staged: Path, target: Path) -> None:
    """Rename a sealed folder to `target`, which must be on the same file system. A folder of that name is replaced."""
    if os.path.lexists(target):
        os.rename(target, staged.with_name(f"{target.name}.replaced"))  # removed with the stage
    os.rename(staged, target)
    flush(target.parent)


@contextmanager
def published(target: str | Path) -> Iterator[Path]:
    """A folder to fill. When the block ends it is sealed and becomes `target`; if the block fails, nothing is left.

    A folder that exists keeps its other files. If `target` is a link, the link is replaced and not followed.
    """
    target = Path(target).absolute()
    is_shared = target.is_dir() and not target.is_symlink()
    home = target if is_shared else target.parent
    home.mkdir(parents=True, exist_ok=True)
    stage = make_stage(home)
    try:
        staged = stage / target.name
        staged.mkdir()
        yield staged
        seal(staged)
        if is_shared:
            publish_into(staged, target)
        else:
            publish(staged, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def damage_of(folder: str | Path) -> str | None:
    """Why a folder that `published` has made is not complete; None if it is, or if it has no manifest.

    Other files in the folder are not looked at. Earlier versions wrote no manifest.
    """
    folder = Path(folder)
    if is_cut_move(folder):
        return "it was only written in part"
    if not os.path.lexists(folder / MANIFEST):
        return None
    return broken(folder, required=lambda names: None, is_shared=True)


def publish_into(staged: Path, folder: Path) -> None:
    """Move the files of a sealed folder into one that holds other files, too. The manifest comes last.

    Until then the folder has no manifest, and `is_cut_move` is true of it if the process was killed. `remove_leftovers`
    takes back what it had moved.

    Raises OSError if a link is in the place of one of its folders.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    flush(folder)
    staged = staged.rename(staged.with_name(MOVING))
    folders = {folder}
    for name in sorted(_files_of(staged) - {MANIFEST}):
        target = folder / name
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            if (folder / parent).is_symlink():
                raise OSError(f"{folder / parent} is a link; a model is not written through links. Remove it.")
            (folder / parent).mkdir(exist_ok=True)
        os.replace(staged / name, target)
        folders.add(target.parent)
    for changed in sorted(folders):
        flush(changed)
    os.replace(staged / MANIFEST, folder / MANIFEST)
    flush(folder)


def is_cut_move(folder: str | Path) -> bool:
    """Whether files in the folder are those that a killed `publish_into` had moved, and not all of them."""
    return not (Path(folder) / MANIFEST).exists() and any(Path(folder).glob(f"{STAGE}*/{MOVING}/{MANIFEST}"))


def leftovers(folder: str | Path, *, min_age_s: float = 0) -> list[Path]:
    """What killed processes left in a folder: stages and, from earlier versions, temporary files."""
    if not os.path.isdir(folder):
        return []
    found = []
    for path in sorted(Path(folder).iterdir()):
        is_stage = path.name.startswith(STAGE) and path.is_dir()
        is_old = not min_age_s or time.time() - path.lstat().st_mtime >= min_age_s
        if (is_stage or OLD_LEFTOVER.fullmatch(path.name)) and is_old and not path.is_symlink():
            found.append(path)
    return found


def remove_leftovers(folder: str | Path, *, min_age_s: float = 0) -> int:
    """Remove the leftovers of killed processes and return their number.

    min_age_s: leave what has changed since; other processes may write to the folder.

    Files that a killed `publish_into` had moved are removed, too, since the folder has no manifest of them.
    """
    folder = Path(folder)
    paths = leftovers(folder, min_age_s=min_age_s)
    for path in paths:
        if not path.is_dir():
            path.unlink()
            continue
        if not (folder / MANIFEST).exists():
            for name in read_manifest(path / MOVING) or {}:
                _remove_file(folder, name)
        shutil.rmtree(path)
    return len(paths)


def _remove_file(folder: Path, name: str) -> None:
    """Remove folder/name, but nothing behind a link."""
    parents = PurePosixPath(name).parents[:-1]
    if not any((folder / parent).is_symlink() for parent in parents):
        (folder / name).unlink(missing_ok=True)


def _files_of(folder: Path) -> set[str]:
    """The names of all files under a folder, links included, relative to it. Folders behind links are not entered.

    Hidden files are left out: nothing reads them, and network file systems and desktops make some.
    """
    names = [path.relative_to(folder) for path in _walk(folder)]
    return {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)}


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        yield from (Path(parent) / name for name in (*files, *links))


def _is_entry(name: str, entry: Any) -> bool:
    path = PurePosixPath(name)
    # str(path): a name that only the file system reads as another's, such as a/ or ./a, would not be among its files.
    is_inside = name == str(path) != "." and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    if not is_inside or not isinstance(entry, dict):
        return False
    size, sha256 = entry.get("bytes"), entry.get("sha256")
    return type(size) is int and size >= 0 and isinstance(sha256, str)
