"""Writing files whole, and hashes of files and texts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_key(text: str) -> int:
    """63 bits of SHA-256: equal for equal texts on every rank and machine, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to. It replaces `path` when the block ends, and is removed if the block fails.

    A reader sees the old file or the new one, never half of it. The process id keeps two runs apart, and the suffix
    stays because some writers choose the format by it.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON with sorted keys, whole and flushed to disk. Makes the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, open(temporary, "w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: str | Path, text: str) -> None:
    """Write a text as UTF-8 with Unix line ends, whole."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
