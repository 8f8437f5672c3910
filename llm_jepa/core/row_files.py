"""Read rows from JSON and CSV files exactly as they are written.

The type of a value depends on its own row alone: an int stays an int, a key that a row lacks stays absent, and the
order of keys stays. CSV has no types, so each cell is a text, and an empty cell is missing (None).

Files are UTF-8, with or without a byte order mark, and may be compressed (.gz, .bz2, .xz, .zst).
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from .errors import UserError, first_line
from .json_files import LONE_SURROGATE

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
CHUNK = 2**20  # bytes
MAX_RATIO = 200  # of unpacked to packed bytes
_NOT_WHITE = re.compile(r"[^ \t\n\r]")
_GZ, _BZ2, _XZ, _ZST = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"  # how a packed file begins
_BOM = b"\xef\xbb\xbf"


def row_suffix(name: str | Path) -> str:
    """The suffix that says what a file holds: ".jsonl" of `rows.jsonl` and of `rows.jsonl.gz`."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED_SUFFIXES else path.suffix.lower()


@dataclass(frozen=True)
class RowLimits:
    """How much the rows of a source may hold. A small file can unpack to more rows than any disk holds.

    Memory and time of a run grow with both numbers. Raise them if the rows are what you want.
    """

    max_rows: int = 2_000_000
    max_row_bytes: int = 2 * 2**20  # of a line of JSON; of a record of CSV in characters

    def check_count(self, place: str, count: int, kind: str = "rows") -> None:
        """Raises UserError for more rows than `max_rows`. place: which file, for the message."""
        if count > self.max_rows:
            raise UserError(
                f"{place} has {count} {kind} or more, and the limit is max_rows: {self.max_rows}; raise max_rows in "
                "the recipe, or use a part of them."
            )

    def check_size(self, place: str, size: int) -> None:
        """Raises UserError for a row of more bytes than `max_row_bytes`."""
        if size > self.max_row_bytes:
            raise UserError(
                f"{place} has {size} bytes or more, and the limit is max_row_bytes: {self.max_row_bytes}; raise "
                "max_row_bytes in the recipe, or split the row."
            )


LIMITS = RowLimits()


def rows_of_file(path: str | Path, limits: RowLimits = LIMITS) -> Iterator[tuple[str, Row]]:
    """(place, row) for each row of a JSON, JSON-lines, CSV, or TSV file; the place names file and line, for messages.

    Raises UserError, which names the place, for anything that is not a row, for a file without rows, and for rows
    beyond the limits.
    """
    path = Path(path)
    delimiter = DELIMITERS.get(row_suffix(path))
    count = 0
    for place, row in json_rows(path, limits) if delimiter is None else _csv_rows(path, delimiter, limits):
        count += 1
        yield place, row
    if not count:
        raise UserError(f"The data file {path} {'holds no rows' if path.stat().st_size else 'is empty'}.")


def json_rows(path: str | Path, limits: RowLimits = LIMITS) -> Iterator[tuple[str, Row]]:
    """(place, row) for each row of a file that holds one JSON object a line, or one array of objects.

    Raises UserError for a file that cannot be read or holds anything else, and for rows beyond the limits. An empty
    file has no rows.
    """
    path = Path(path)
    with _unpacked(path) as file:
        lines = enumerate(_lines(file, limits.max_row_bytes), start=1)
        number, opening = 0, b""
        for number, opening in lines:
            limits.check_count(str(path), number, "lines")
            if opening.strip().removeprefix(_BOM):
                break
        else:
            return
        if number == 1:
            opening = opening.removeprefix(_BOM)
        if opening.lstrip().startswith(b"["):
            rows = _rows_of_array(path, chain([opening], iter(lambda: file.read(CHUNK), b"")), limits)
        else:
            rows = _rows_of_lines(path, chain([(number, opening)], lines), limits)
        for count, (place, row) in enumerate(rows, start=1):
            limits.check_count(str(path), count)
            yield place, row


def text_lines(path: str | Path, limits: RowLimits = LIMITS) -> Iterator[str]:
    """The lines of a text file that are not blank, without white space around them.

    Raises UserError for a file that cannot be read or is not UTF-8, and for lines beyond the limits.
    """
    path = Path(path)
    with _unpacked(path) as file:
        for number, line in enumerate(_lines(file, limits.max_row_bytes), start=1):
            place = f"{path}, line {number}"
            limits.check_size(place, len(line.rstrip(b"\r\n")))
            limits.check_count(str(path), number, "lines")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{place} is not UTF-8: {error}. Save the file as UTF-8.") from None
            if text:
                yield text


def _lines(file: IO[bytes], longest: int) -> Iterator[bytes]:
    """The lines of a file. Of a line that is longer, the first part has more than `longest` bytes."""
    while line := file.readline(longest + 2):
        yield line


def _rows_of_lines(path: Path, lines: Iterable[tuple[int, bytes]], limits: RowLimits) -> Iterator[tuple[str, Row]]:
    for number, line in lines:
        limits.check_count(str(path), number, "lines")  # a small packed file can hold any number of blank ones
        if line.strip():
            place = f"{path}, line {number}"
            limits.check_size(place, len(line.rstrip(b"\r\n")))
            yield place, _object(_parsed(line, place), place)


def _rows_of_array(path: Path, pieces: Iterator[bytes], limits: RowLimits) -> Iterator[tuple[str, Row]]:
    """Holds only a part of the text, because the objects of a whole file take many times its memory."""
    text = _ArrayText(path, pieces, limits)
    text.take("[")
    number = 1
    if not text.take("]"):
        while True:
            place = f"{path}, row {number} of the array"
            yield place, text.row(place)
            if text.take("]"):
                break
            if not text.take(","):
                raise UserError(f"{path} is not JSON in UTF-8: no comma and no end of the array after row {number}.")
            number += 1
    if text.next():
        raise UserError(f"{path} is not JSON in UTF-8: something follows the array.")


class _ArrayText:
    """The text of a JSON array. It holds enough of it for a row of any allowed size."""

    def __init__(self, path: Path, pieces: Iterator[bytes], limits: RowLimits) -> None:
        self._path, self._pieces, self._limits = path, pieces, limits
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at, self._is_whole = "", 0, False

    def take(self, mark: str) -> bool:
        """Whether the next character is `mark`; then it is read."""
        if self.next() != mark:
            return False
        self._at += 1
        return True

    def next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._fill(1)
            match = _NOT_WHITE.search(self._text, self._at)
            self._at = len(self._text) if match is None else match.start()
            if match is not None or self._is_whole:
                return self._text[self._at : self._at + 1]

    def row(self, place: str) -> Row:
        """Read one object. Raises UserError for anything else, and for an object that is too large."""
        first = self.next()
        self._fill(self._limits.max_row_bytes + 2)
        start, text = self._at, self._text
        try:
            value, self._at = _decoder.raw_decode(text, start)
            _refuse_half_characters(text[start : self._at], value)
        except (ValueError, RecursionError) as error:
            is_cut = not self._is_whole and getattr(error, "pos", 0) > len(text) - 10
            if first == "{" and (is_cut or str(error).startswith("Unterminated string")):
                self._limits.check_size(place, len(text) - start)
            raise _fault(error, place) from None
        self._limits.check_size(place, self._at - start)
        return _object(value, place)

    def _fill(self, count: int) -> None:
        """Read until there are `count` more characters, or all."""
        if len(self._text) - self._at >= count or self._is_whole:
            return
        parts, size = [self._text[self._at :]], len(self._text) - self._at
        while size < 2 * count and not self._is_whole:
            piece = next(self._pieces, b"")
            self._is_whole = not piece
            try:
                parts.append(self._decode(piece, final=self._is_whole))
            except UnicodeDecodeError as error:
                raise UserError(f"{self._path} is not JSON in UTF-8: {error.reason}.") from None
            size += len(parts[-1])
        self._text, self._at = "".join(parts), 0


def _parsed(line: bytes, place: str) -> Any:
    try:
        text = line.decode("utf-8")
        value = _decoder.decode(text)
        _refuse_half_characters(text, value)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _fault(error, place, one_line=b"\n" not in line.strip()) from None
    return value


def _refuse_half_characters(text: str, value: Any) -> None:
    if "\\u" in text and LONE_SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError


def _fault(error: Exception, place: str, *, one_line: bool = False) -> UserError:
    """Why the text at `place` is not a value. one_line: the parser counts lines from the start of this text."""
    if isinstance(error, UnicodeEncodeError):
        return UserError(
            f"{place} holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character, so no tokenizer "
            "reads it; write both halves, or the character itself."
        )
    if isinstance(error, RecursionError):
        return UserError(f"{place} is nested too deep to be read.")
    reason = first_line(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.pos + 1}" if one_line else error.msg
    return UserError(f"{place} is not JSON in UTF-8: {reason}.")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    """Python's own reader would keep the last value of a key that occurs twice, silently."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = _first_repeated(key for key, _ in pairs)
        raise ValueError(f"the key {twice[:80]!r} occurs twice in one object")
    return row


def _first_repeated(names: Iterable[str]) -> str:
    return next(name for name, count in Counter(names).items() if count > 1)


_decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates)  # made once: half the time of json.loads


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place} must hold a JSON object, found {type(value).__name__}.")
    return value


def _csv_rows(path: Path, delimiter: str, limits: RowLimits) -> Iterator[tuple[str, Row]]:
    header: list[str] | None = None
    for count, (place, cells) in enumerate(_csv_cells(path, delimiter, limits)):
        if header is None:
            header = _header(cells, place)
            continue
        limits.check_count(str(path), count)
        if len(cells) > len(header):
            raise UserError(f"{place} has {len(cells)} cells, the header has {len(header)}; quote texts with commas.")
        cells += [""] * (len(header) - len(cells))
        yield place, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _csv_cells(path: Path, delimiter: str, limits: RowLimits) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of each record that is not a blank line."""
    csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, is less than a long document
    with _unpacked(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        size, place = 0, ""

        def lines() -> Iterator[str]:
            nonlocal size
            while line := text.readline(limits.max_row_bytes + 1):
                size += len(line)
                limits.check_size(place, size)
                yield line

        # strict: a quote that never closes would otherwise take the rest of the file for one cell.
        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        while True:
            place, size = f"{path}, line {reader.line_num + 1}", 0  # a record with line breaks is named by its first
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
        raise UserError(f"{place}: the header has two columns {_first_repeated(names)[:80]!r}; rename one.")
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
    check_regular(path)
    with open(path, "rb") as file:
        start = file.read(6)
    if not start.startswith((_GZ, _BZ2, _XZ, _ZST)):
        return open(path, "rb")
    return io.BufferedReader(_Unpacking(_packed(path, start), path), buffer_size=2**17)


def _packed(path: Path, start: bytes) -> Any:
    if start.startswith(_GZ):
        return gzip.open(path)
    if start.startswith(_BZ2):
        return bz2.open(path)
    if start.startswith(_XZ):
        return lzma.open(path)
    if zstandard is None:
        raise UserError(f"{path} is compressed with Zstandard; to read it: pip install zstandard")
    return zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True)


class _Unpacking(io.RawIOBase):
    """The bytes of a packed file, as many as a file of texts can honestly hold. Raises UserError beyond that."""

    def __init__(self, packed: Any, path: Path) -> None:
        self._packed, self._path, self._count = packed, path, 0
        self._limit = most_unpacked(path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._packed.read(len(buffer))
        self._count += len(piece)
        if self._count > self._limit:
            raise UserError(
                f"{self._path} unpacks to more than {self._limit} bytes, over {MAX_RATIO} times its size, which no "
                "file of texts does; if you trust it, unpack it yourself."
            )
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._packed.close()
        super().close()


def most_unpacked(size: int) -> int:
    """How many bytes a packed file of `size` bytes may unpack to. Rows that are all alike pack at 100 to 1."""
    return max(2**26, MAX_RATIO * size)


def check_regular(path: Path) -> None:
    """Raises UserError for a device, a pipe or a socket: reading one may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a device, a pipe or a socket, not a file; write its contents into a file first.")
