"""Which files a source of rows names. Asked before a library is imported, and again before the rows are read."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError
from .row_files import DELIMITERS, JSON_SUFFIXES, check_regular, row_suffix

TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}  # -> the builder of `datasets`
FILE_SUFFIXES = (*JSON_SUFFIXES, *DELIMITERS, *TABLE_SUFFIXES)


def check_source(source: str | Sequence[str]) -> None:
    """Raises UserError if a source names files and one of them is not there."""
    sources = [source] if isinstance(source, str) else list(source)
    if len(sources) == 1 and (Path(sources[0]).is_dir() or not names_files(sources[0])):
        return
    for one in sources:
        files_of(one)


def names_files(source: str) -> bool:
    """False for what can only be a Hub id: `owner/name` or `name`."""
    path = Path(source)
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    return looks_local or path.exists() or glob.has_magic(source) or row_suffix(source) in FILE_SUFFIXES


def files_of(source: str) -> list[Path]:
    """The files of a path or a glob. Raises UserError if there is none."""
    path = Path(source)
    check_regular(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise UserError(f"{source} is a folder; name it alone, or the files in it ({path / '*.jsonl'}).")
    if not glob.has_magic(source):
        raise UserError(f"No data file at {source}; check the path (it is relative to the current folder).")
    paths = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]
    if not paths:
        raise UserError(f"No file matches {source}; check the pattern (it is relative to the current folder).")
    return paths
