"""Read the rows of a source (files, folders, the Hub) as a `datasets.Dataset`.

`datasets` infers one type for a column from all of its rows: it makes 1 a 1.0 next to 0.5, fills keys that only other
rows have with None, and reads the text "5" as a number next to a number. Here, JSON and CSV files are read by
`core.row_files`, and each value is kept as it is written. Parquet and Arrow files have types of their own.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import (
    Audio,
    BuilderConfig,
    Dataset,
    DatasetInfo,
    Features,
    Image,
    IterableDataset,
    Value,
    Video,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.features.features import register_feature
from transformers.utils import logging

from .errors import UserError, first_line
from .row_files import (
    DELIMITERS,
    LIMITS,
    MAX_RATIO,
    Row,
    RowLimits,
    row_suffix,
    rows_of_file,
)
from .source_files import FILE_SUFFIXES, TABLE_SUFFIXES, files_of, names_files

logger = logging.get_logger(__name__)
KNOWN_BUILDERS = {"json", "csv", "parquet", "arrow", "text", "cache"}  # of a folder or a Hub id; none reads pickles
MEDIA = (Audio, Image, Video)  # columns whose values are files
CHUNK = 10_000  # rows
MAX_COLUMNS = 1000
MOST_TABLE_BYTES = 2**28  # that a table of any size may unpack to
_encode = json.JSONEncoder(ensure_ascii=False).encode


def read_rows(
    source: str | Sequence[str],
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    limits: RowLimits = LIMITS,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """The rows of one or more files, of a folder, or of a Hub data set.

    Args:
        source: a file, a glob (its files in the order of their names), a list of both, a folder that `save_to_disk`
            wrote, a folder of data files, or a Hub id.
        split: of a folder or of a Hub data set; files and a saved `Dataset` have none.
        config, revision: of a Hub data set.
        limits: how much the source may hold.
        columns: our name of a column -> its name in the source; a column that had the first name is left out.

    Raises UserError for a source that cannot be read, holds more than the limits, or lacks one of the columns.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if len(sources) == 1 and Path(sources[0]).is_dir():
        rows = _rows_of_folder(Path(sources[0]), split, limits)
    elif len(sources) == 1 and not names_files(sources[0]):
        rows = _rows_of_hub(sources[0], split, config, revision)
    else:
        rows = _rows_of_files([path for one in sources for path in files_of(one)], limits)
    name = ", ".join(sources)
    limits.check_count(name, len(rows))
    return _renamed(rows, columns, name) if columns else rows


@dataclass(frozen=True)
class RowStream:
    """The rows of a source, read again in each pass.

    Args:
        name: of the source, for messages.
        read: passes -> (place, row) of each row; passes counts how often the source was read before.
        columns: as of `read_rows`.
        shuffle_buffer: rows that are held in memory in order to shuffle them; 0 for the order of the source.
        files_sha256: of the names and sizes of the files; None if they are not known.
    """

    name: str
    read: Callable[[int], Iterator[tuple[str, Row]]]
    columns: Mapping[str, str] | None = None
    shuffle_buffer: int = 0
    files_sha256: str | None = None

    def rows(self, passes: int) -> Iterator[tuple[str, Row]]:
        """(place, row) of each row, with its columns under our names."""
        for place, row in self.read(passes):
            yield place, _renamed_row(row, self.columns) if self.columns else row

    def first(self, count: int) -> Dataset:
        """The first rows of the source. Raises UserError if there are none, or if they lack one of the columns."""
        rows = _dataset((place, _json_values(row)) for place, row in islice(self.read(0), count))
        if not len(rows):
            raise UserError(f"{self.name} holds no rows.")
        return _renamed(rows, self.columns, self.name) if self.columns else rows


def stream_rows(
    source: str | Sequence[str],
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    limits: RowLimits = LIMITS,
    columns: Mapping[str, str] | None = None,
    shuffle_buffer: int = 0,
) -> RowStream:
    """The rows of `read_rows`, in the same order, read one after the other; `max_rows` does not limit their number.

    Raises UserError for a source that cannot be read. A row that cannot be read is an error when it is reached.
    """
    sources = [source] if isinstance(source, str) else list(source)
    name, is_one = ", ".join(sources), len(sources) == 1
    if is_one and Path(name).is_dir():
        paths = _files_of_folder(Path(name), split)
    elif is_one and not names_files(name):
        builder = _builder(name, config, revision)
        files = _sha256_of_names(map(str, (builder.config.data_files or {}).get(split, [])))  # these name their commit
        return RowStream(name, partial(_stream_of_hub, name, split, config, revision), columns, shuffle_buffer, files)
    else:
        paths = [path for one in sources for path in files_of(one)]
    _kind_of_files(paths)
    files = _sha256_of_names(f"{path.name} {path.stat().st_size}" for path in paths)
    read = partial(_stream_of_files, tuple(paths), replace(limits, max_rows=sys.maxsize))
    return RowStream(name, read, columns, shuffle_buffer, files)


def stream_of(rows: IterableDataset) -> RowStream:
    """A data set of `datasets` as a stream. It is shuffled if its owner called its `shuffle`."""
    return RowStream("train_dataset", partial(_rows_of_iterable, rows))


def _rows_of_iterable(rows: IterableDataset, passes: int) -> Iterator[tuple[str, Row]]:
    rows.set_epoch(passes)  # another order of a data set that is shuffled
    for index, row in enumerate(rows):
        yield f"row {index}", row


def _renamed_row(row: Row, columns: Mapping[str, str]) -> Row:
    ours = {theirs: name for name, theirs in columns.items()}
    return {ours.get(key, key): value for key, value in row.items() if key in ours or key not in columns}


def _json_values(row: Row) -> Row:
    """The row as JSON can write it. A table also holds dates and bytes, in columns that nothing reads."""
    values: Row = json.loads(json.dumps(row, default=str))
    return values


def _sha256_of_names(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _stream_of_files(paths: Sequence[Path], limits: RowLimits, passes: int) -> Iterator[tuple[str, Row]]:
    for path in paths:
        yield from _rows_of_table(path, limits) if _is_table(path) else rows_of_file(path, limits)


def _stream_of_hub(
    source: str, split: str, config: str | None, revision: str | None, passes: int
) -> Iterator[tuple[str, Row]]:
    try:
        rows = undecoded(load_dataset(source, config, split=split, revision=revision, streaming=True))
        for index, row in enumerate(rows):
            yield f"{source}, row {index}", row
    except UserError:
        raise
    except Exception as error:  # network, permission, missing split
        raise UserError(f"Cannot read the data set {source!r} (split {split}): {first_line(error)}") from None


def undecoded(rows: IterableDataset) -> IterableDataset:
    """The rows with the files of their pictures, films and sounds as {"bytes", "path"}."""
    if rows.features is None or not any(isinstance(feature, MEDIA) for feature in rows.features.values()):
        return rows
    return rows.decode(False)


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    """The files of a split. Raises UserError for a folder that cannot be read file by file."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        raise UserError(f"{folder} was written by save_to_disk, which is read without streaming; set streaming: false.")
    builder = _builder(str(folder))
    files = builder.config.data_files or {}
    _check_split(folder, split, files)
    paths = [Path(name) for name in files[split]]
    if _has_options(builder.config, paths):
        raise UserError(f"The README of {folder} says how its files are read; to stream them, name the files.")
    return paths


def _renamed(rows: Dataset, columns: Mapping[str, str], name: str) -> Dataset:
    missing = [column for column in columns.values() if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{name} has no column {', '.join(map(repr, missing))}, which `columns` names; it has "
            f"{', '.join(rows.column_names[:20])}."
        )
    replaced = [column for column in columns if column in rows.column_names and column not in columns.values()]
    if replaced:
        logger.warning(f"`columns` takes the place of the column {', '.join(replaced)} of {name}, which is not read.")
    return rows.remove_columns(replaced).rename_columns({theirs: ours for ours, theirs in columns.items()})


def data_sha256(dataset: Dataset | None) -> str | None:
    """A hash of the rows, the same for a file and for the Hub; None without rows."""
    if dataset is None:
        return None
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())  # dates, bytes
    return digest.hexdigest()


# -- files ------------------------------------------------------------------------------------------------------------


def _kind_of_files(paths: Sequence[Path]) -> str | None:
    """The builder of tables, None of other files. Raises UserError if they cannot be read together."""
    for path in paths:
        if row_suffix(path) not in FILE_SUFFIXES or (path.suffix != row_suffix(path) and _is_table(path)):
            raise UserError(
                f"{path} is not a .jsonl, .json, .csv or .parquet file (a .gz of the first three is read too); "
                "convert it or name one."
            )
    kinds = {TABLE_SUFFIXES.get(row_suffix(path)) for path in paths}
    if len(kinds) > 1:
        table = next(path for path in paths if _is_table(path))
        raise UserError(f"{table} cannot be read together with files of another kind; convert them to one kind.")
    return kinds.pop()


def _rows_of_files(paths: Sequence[Path], limits: RowLimits) -> Dataset:
    kind = _kind_of_files(paths)
    if kind is None:
        return _dataset(one for path in paths for one in rows_of_file(path, limits))
    names = [str(path) for path in paths]
    try:
        for path in paths:
            _check_table(path, limits)
        return load_dataset(kind, data_files=[glob.escape(name) for name in names], split="train")
    except UserError:
        raise
    except Exception as error:  # datasets wraps parser errors in its own and in pyarrow's
        raise UserError(f"Cannot read {', '.join(names)}: {first_line(error.__cause__ or error)}") from None


def _is_table(path: Path) -> bool:
    return row_suffix(path) in TABLE_SUFFIXES


def _check_table(path: Path, limits: RowLimits) -> None:
    """Raises UserError for a table of more rows or bytes than a file of its size can honestly hold."""
    if row_suffix(path) == ".parquet":
        with pq.ParquetFile(path) as table:
            limits.check_count(str(path), table.metadata.num_rows)
    for _ in _checked_batches(path, limits):
        pass


def _rows_of_table(path: Path, limits: RowLimits) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row, with the types that `datasets` gives its columns; media as in `undecoded`."""
    count = 0
    try:
        for batch in _checked_batches(path, limits):
            features = Features.from_arrow_schema(batch.schema)
            features = Features({name: _undecoded_feature(feature) for name, feature in features.items()})
            for row in batch.to_pylist():
                yield f"{path}, row {count}", features.decode_example(row)
                count += 1
    except UserError:
        raise
    except Exception as error:  # pyarrow has many
        raise UserError(f"Cannot read {path}: {first_line(error)}") from None
    if not count:
        raise UserError(f"The data file {path} holds no rows.")


def _undecoded_feature(feature: Any) -> Any:
    return replace(feature, decode=False) if isinstance(feature, MEDIA) else feature


def _checked_batches(path: Path, limits: RowLimits) -> Iterator[Any]:
    """The record batches of a table. Raises UserError for a row beyond the limits.

    A table that repeats a value stores it once: 16 kB can be 3,000,000 rows, or rows of 1 GB.
    """
    most, rows, size = max(MOST_TABLE_BYTES, MAX_RATIO * path.stat().st_size), 0, 0
    for packed in _batches(path):
        batch = _without_dictionaries(packed)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        limits.check_count(str(path), rows)
        if limits.max_row_bytes < batch.nbytes < most:
            for index in range(batch.num_rows):
                limits.check_size(f"{path}, row {rows - batch.num_rows + index}", batch.slice(index, 1).nbytes)
        if size > most:
            raise UserError(
                f"{path} unpacks to more than {most} bytes, over {MAX_RATIO} times its size; write its rows as JSON "
                "lines if you trust it."
            )
        yield batch


def _without_dictionaries(batch: Any) -> Any:
    """The batch with every value in its place. `datasets` makes the same of it, for all rows at once."""
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns
    ]
    plain = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
    return plain.replace_schema_metadata(batch.schema.metadata)  # the types of `datasets`


def _batches(path: Path) -> Iterator[Any]:
    """The record batches of a Parquet or an Arrow file, which is a file or a stream of Arrow's format."""
    if row_suffix(path) == ".parquet":
        with pq.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=100)
        return
    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
            return
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


# -- folders and the Hub ----------------------------------------------------------------------------------------------


def _rows_of_folder(folder: Path, split: str, limits: RowLimits) -> Dataset:
    """A folder that `save_to_disk` wrote, or a folder of data files as it would be on the Hub."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_rows(folder, split)
    builder = _builder(str(folder))
    files = builder.config.data_files or {}
    _check_split(folder, split, files)
    paths = [Path(name) for name in files[split]]
    if any(row_suffix(path) not in FILE_SUFFIXES for path in paths) or _has_options(builder.config, paths):
        return _load_dataset(str(folder), split=split)  # the folder's README says how its files are read
    return _rows_of_files(paths, limits)


def _saved_rows(folder: Path, split: str) -> Dataset:
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # pyarrow, json and datasets each have their own for a damaged folder
        raise UserError(f"Cannot read the saved data set {folder}: {first_line(error)}") from None
    if isinstance(saved, Dataset):
        return saved.with_format(None)
    _check_split(folder, split, saved)
    return saved[split].with_format(None)


def _check_split(folder: Path, split: str, splits: Iterable[str]) -> None:
    names = list(map(str, splits))
    if split not in names:
        raise UserError(f"{folder} has no split {split!r}; it has {', '.join(names)}. Name one of these, or a file.")


def _has_options(config: Any, paths: Sequence[Path]) -> bool:
    """Whether the folder's README sets more than where its files are: a separator, a field, column types."""
    default = type(config)(name=config.name, data_files=config.data_files)
    where = {item.name for item in dataclasses.fields(BuilderConfig)} | {"sep"}
    options = [item.name for item in dataclasses.fields(config) if item.name not in where]
    if any(getattr(config, name) != getattr(default, name) for name in options):
        return True
    return any(getattr(config, "sep", None) != DELIMITERS.get(row_suffix(path)) for path in paths)


def _rows_of_hub(source: str, split: str, config: str | None, revision: str | None) -> Dataset:
    _builder(source, config, revision)
    return _load_dataset(source, config, split=split, revision=revision)


def _builder(source: str, config: str | None = None, revision: str | None = None) -> Any:
    """The builder that `datasets` chooses for a folder or a Hub id. Raises UserError unless it reads rows."""
    try:
        builder = load_dataset_builder(source, config, revision=revision)
    except Exception as error:  # network, permission, an empty folder: the user can fix all of them
        raise UserError(f"Cannot load the data set {source!r}: {first_line(error)}") from None
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in KNOWN_BUILDERS:
        raise UserError(f"{source} holds {kind} files; rows are read from {', '.join(sorted(KNOWN_BUILDERS))} files.")
    return builder


def _load_dataset(source: str, config: str | None = None, *, split: str, revision: str | None = None) -> Dataset:
    try:
        return load_dataset(source, config, split=split, revision=revision)
    except Exception as error:  # network, permission, missing split
        raise UserError(f"Cannot load the data set {source!r} (split {split}): {first_line(error)}") from None


# -- rows as columns --------------------------------------------------------------------------------------------------


@dataclass
class JsonValues:
    """The type of a column of any values: each is stored as JSON text and read back equal.

    `datasets.Json` is not exact: it reads every third float with an error in the last place, a stored text "5" as the
    number 5, and no integer of more than 64 bits.
    """

    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "object"
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="llm_jepa.JsonValues", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else _encode(value)

    def decode_example(self, text: str | None, token_per_repo_id: Any = None) -> Any:
        return None if text is None else json.loads(text)


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "'register_feature' is experimental")
    register_feature(JsonValues, "llm_jepa.JsonValues")


class _JsonText(str):
    """A value that is encoded already."""


def _dataset(rows: Iterable[tuple[str, Row]]) -> Dataset:
    """(place, row) as a data set.

    A column that holds one type of plain values has this type; every other column is of `JsonValues`. Raises UserError
    for more than MAX_COLUMNS keys, because every row has a value for every key.
    """
    columns: dict[str, list[Any]] = {}
    count = 0
    for count, (place, row) in enumerate(rows, start=1):
        if len(row) > MAX_COLUMNS:
            raise _too_many_keys(place, len(row))
        for key, value in row.items():
            column = columns.get(key)
            if column is None:
                column = columns[key] = [None] * (count - 1)
            if isinstance(value, (dict, list)):  # encoded at once: as text it takes a fifth of the memory
                value = _JsonText(_encode(value))
            column.append(value)
        if len(columns) > MAX_COLUMNS:
            raise _too_many_keys(f"{place} and the rows before it", len(columns))
        if len(row) < len(columns):
            for column in columns.values():
                if len(column) < count:
                    column.append(None)
    arrays, features = {}, {}
    for name in list(columns):
        column = columns.pop(name)
        features[name] = _feature_of(column)
        if isinstance(features[name], JsonValues):
            encode = features[name].encode_example
            column = [value if isinstance(value, _JsonText) else encode(value) for value in column]
        arrays[name] = _in_chunks(column, features[name]())
    return Dataset(pa.table(arrays), info=DatasetInfo(features=Features(features)))


def _too_many_keys(place: str, count: int) -> UserError:
    return UserError(
        f"{place}: there are {count} different keys, and the limit is {MAX_COLUMNS}; remove those that are not used."
    )


def _feature_of(column: list[Any]) -> Any:
    types = {type(value) for value in column} - {type(None)}
    if not types:
        return Value("null")
    if types == {str}:
        return Value("string")
    if types == {bool}:
        return Value("bool")
    if types == {float}:
        return Value("float64")
    if types == {int} and all(value is None or -(2**63) <= value < 2**63 for value in column):
        return Value("int64")
    return JsonValues()


def _in_chunks(column: list[Any], arrow_type: Any) -> Any:
    """An Arrow column, in chunks because one Arrow array of texts holds at most 2 GiB."""
    chunks = [pa.array(column[start : start + CHUNK], arrow_type) for start in range(0, len(column), CHUNK)]
    return pa.chunked_array(chunks, arrow_type)
