"""Read rows from JSON and CSV files exactly as they are written.

The type of a value depends on its own row alone: an int stays an int, a key that a row lacks stays absent, and the
order of keys stays. CSV has no types, so each cell is a text, and an empty cell is missing (None).

Files are UTF-8, with or without a byte order mark, and may be compressed (.gz, .bz2, .xz, .zst).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

from .errors import UserError, first_line

try:
    import zstandard  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # only .zst files need it
    zstandard = None

Row = dict[str, Any]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
if zstandard is not None:
    _READ_ERRORS += (zstandard.ZstdError,)
_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # how JSON spells half of a character outside the first 65,536


def row_suffix(name: str | Path) -> str:
    """The suffix that says what a file holds: ".jsonl" of `rows.jsonl` and of `rows.jsonl.gz`."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED_SUFFIXES else path.suffix.lower()


def rows_of_file(path: str | Path) -> Iterator[tuple[str, Row]]:
    """(place, row) for each row of a JSON, JSON-lines, CSV, or TSV file; the place names file and line, for messages.

    Raises UserError, which names the place, for anything that is not a row, and for a file without rows.
    """
    path = Path(path)
    delimiter = DELIMITERS.get(row_suffix(path))
    count = 0
    for place, row in json_rows(path) if delimiter is None else _csv_rows(path, delimiter):
        count += 1
        yield place, row
    if not count:
        raise UserError(f"The data file {path} {'holds no rows' if path.stat().st_size else 'is empty'}.")


def json_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """(place, row) for each row of a file that holds one JSON object a line, or one array of objects.

    Raises UserError for a file that cannot be read or holds anything else. An empty file has no rows.
    """
    path = Path(path)
    with _unpacked(path) as file:
        lines = (line for line in enumerate(file, start=1) if line[1].strip().removeprefix(_BOM))
        first, opening = next(lines, (0, b""))
        if opening.removeprefix(_BOM).lstrip().startswith(b"["):
            text = b"".join([opening, *(line for _, line in lines)])
            found: Any = _parsed(text.removeprefix(_BOM), str(path))
            for number, row in enumerate(found, start=1):
                place = f"{path}, row {number} of the array"
                yield place, _object(row, place)
        elif first:
            opening = opening.removeprefix(_BOM) if first == 1 else opening
            for number, line in chain([(first, opening)], lines):
                place = f"{path}, line {number}"
                yield place, _object(_parsed(line, place), place)


def _parsed(text: bytes, place: str) -> Any:
    try:
        value = _decode(text.decode("utf-8"))
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{place} holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character, so no tokenizer "
            "reads it; write both halves, or the character itself."
        ) from None
    except RecursionError:
        raise UserError(f"{place} is nested too deep to be read.") from None
    except ValueError as error:  # UnicodeDecodeError is one
        reason = first_line(error)
        if isinstance(error, json.JSONDecodeError) and "\n" not in text.decode("utf-8").strip():
            reason = f"{error.msg} at column {error.pos + 1}"  # the parser counts lines from the start of this text
        raise UserError(f"{place} is not JSON in UTF-8: {reason}.") from None
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    """Python's own reader would keep the last value of a key that occurs twice, silently."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return row


_decode = json.JSONDecoder(object_pairs_hook=_without_duplicates).decode  # made once: half the time of json.loads


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place} must hold a JSON object, found {type(value).__name__}.")
    return value


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    header: list[str] | None = None
    for place, cells in _csv_cells(path, delimiter):
        if header is None:
            header = _header(cells, place)
            continue
        if len(cells) > len(header):
            raise UserError(f"{place} has {len(cells)} cells, the header has {len(header)}; quote texts with commas.")
        cells += [""] * (len(header) - len(cells))
        yield place, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _csv_cells(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of each record that is not a blank line."""
    csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, is less than a long document
    with _unpacked(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        # strict: a quote that never closes would otherwise take the rest of the file for one cell.
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        while True:
            place = f"{path}, line {reader.line_num + 1}"  # a record with line breaks is named by its first line
            try:
                cells = next(reader, None)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text: {error}. Save the file as UTF-8.") from None
            except csv.Error as error:
                raise UserError(f"{place} is not CSV: {error}.") from None
            if cells is None:
                return
            if cells:
                yield place, cells


def _header(cells: list[str], place: str) -> list[str]:
    names = [name or f"Unnamed: {index}" for index, name in enumerate(cells)]  # as pandas and `datasets` name it
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{place}: the header has two columns {twice!r}; rename one.")
    return names


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file of bytes, and unpack it if it is compressed. Errors of reading become UserError."""
    try:
        with _open(path) as file:
            yield file
    except _READ_ERRORS as error:
        raise UserError(f"Cannot read {path}: {first_line(error)}. Is the file complete, may you read it?") from None


def _open(path: Path) -> Any:
    """The first bytes tell how a file is compressed, because a file of a cache has no suffix."""
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if start.startswith(b"BZh"):
        return bz2.open(path)
    if start.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(path)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        if zstandard is None:
            raise UserError(f"{path} is compressed with Zstandard; to read it: pip install zstandard")
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True))
    return open(path, "rb")
