"""The clips of a streamed run: a row is read when its step comes, and its film by the process that trains on it.

RowStream -> ClipStream (rows of one clip together) -> EndlessRows of UnreadItems -> ClipCollator -> tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import IterableDataset
from transformers.utils import logging

from ..core.errors import UserError
from ..core.row_files import JSON_SUFFIXES, LIMITS, RowLimits, row_suffix
from ..core.source_files import files_of, names_files
from ..core.sources import RowStream, stream_of, stream_rows, undecoded
from ..core.streaming import EndlessRows, Prepared
from ..stream.opening import is_image
from .arguments import VLJEPATrainingArguments
from .data import KEYS, Clip, UnreadItem, clip_key, clip_of, clip_of_row, draw_pairs

logger = logging.get_logger(__name__)
WINDOW = 1000  # clips; what is checked on all clips of a data set is checked on the first clips of a stream


class _Part(NamedTuple):
    """rows: of one place.  folder: to which paths are relative; None if rows hold their films themselves."""

    rows: RowStream
    folder: Path | None


class _Group(NamedTuple):
    """(place, row) of the rows of one clip.  passes: how often the source was read before."""

    passes: int
    folder: Path | None
    rows: list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class ClipStream:
    """Clips that are read one after the other, again in each pass. Rows of a clip that follow each other are one clip.

    Made by `stream_clips` or `clips_of`.
    """

    name: str
    parts: tuple[_Part, ...]
    shuffle_buffer: int = 0
    files_sha256: str | None = None  # of the names and sizes of the files; None if they are not known

    def rows(self, passes: int) -> Iterator[tuple[str, _Group]]:
        """(place of the first row, rows of one clip)."""
        for part in self.parts:
            for _, group in groupby(part.rows.rows(passes), key=lambda placed: _film_of(placed[1])):
                rows = list(group)
                yield rows[0][0], _Group(passes, part.folder, rows)

    @cached_property
    def first(self) -> list[Clip]:
        """The first clips; says which columns are not read.

        Raises UserError if there are none, and like `data.clip_of_row`.
        """
        read = [group for _, group in islice(self.rows(0), WINDOW)]
        if not read:
            raise UserError(f"{self.name} holds no rows.")
        tables = [row for group in read if group.folder is None for _, row in group.rows]
        unread = sorted({name for row in tables for name in row} - set(KEYS))
        logger.warning(
            f"Streaming {self.name}: the kinds of clips and the number of their targets are those of its first "
            f"{len(read)} clips. Later ones are checked when their step comes."
            + (f" Columns that are not read: {', '.join(unread[:20])}." if unread else "")
        )
        return [_clip(group) for group in read]


def stream_clips(
    source: str | Sequence[str],
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    limits: RowLimits = LIMITS,
    shuffle_buffer: int = 0,
) -> ClipStream:
    """The clips of manifests, of Parquet files, or of a Hub data set.

    Args:
        source: a manifest as `data.read_clips` reads it; or a Parquet file, a folder of these, or a Hub id, whose
            columns are the keys of a manifest, with the content of the files in `video` or `image`. A glob or a list of
            files is read in its order.
        split, config, revision, limits, shuffle_buffer: as of `core.sources.stream_rows`.

    Raises UserError for a source that cannot be read. A clip that cannot be used is an error when it is reached.
    """
    options: dict[str, Any] = {"split": split, "config": config, "revision": revision, "limits": limits}
    rows = stream_rows(source, **options)
    sources = [source] if isinstance(source, str) else list(source)
    files = (
        []
        if Path(sources[0]).is_dir() or not names_files(sources[0])
        else [p for one in sources for p in files_of(one)]
    )
    if other := next((path for path in files if row_suffix(path) not in (*JSON_SUFFIXES, ".parquet")), None):
        raise UserError(f"{other} is no manifest of clips; write them as .jsonl or .parquet.")
    if files and row_suffix(files[0]) in JSON_SUFFIXES:
        parts = tuple(_Part(stream_rows(str(path), **options), path.parent) for path in files)
    else:
        parts = (_Part(rows, None),)
    return ClipStream(rows.name, parts, shuffle_buffer, rows.files_sha256)


def clips_of(rows: IterableDataset) -> ClipStream:
    """A data set of `datasets` as a stream of clips. It is shuffled if its owner called its `shuffle`."""
    stream = stream_of(undecoded(rows))
    return ClipStream(stream.name, (_Part(stream, None),))


def endless_clips(stream: ClipStream, args: VLJEPATrainingArguments, num_frames: int) -> EndlessRows:
    """The training data of a run. Its order depends on data_seed, or else on seed; the pairs drawn on seed."""
    seed = args.seed if args.data_seed is None else args.data_seed
    prepare = _DrawnClips(num_frames, args.pairs_per_clip, args.seed, is_image(stream.first[0].video))
    return EndlessRows(stream, prepare, shuffle_buffer=stream.shuffle_buffer, seed=seed)


def known_clips(clips: Sequence[Clip] | ClipStream) -> Sequence[Clip]:
    """The clips of a list; of a stream, the first ones."""
    return clips.first if isinstance(clips, ClipStream) else clips


@dataclass(frozen=True)
class _DrawnClips:
    """Rows of a clip -> the clip with the pairs that this pass draws of it, as `ClipDataset` would in that epoch."""

    num_frames: int
    pairs_per_clip: int
    seed: int
    are_images: bool  # the first clips

    def __call__(self, place: str, index: int, group: _Group) -> Prepared:
        clip = _clip(group)
        if self.num_frames > 1 and is_image(clip.video) != self.are_images:
            kinds = ("a video", "images") if self.are_images else ("an image", "videos")
            raise UserError(
                f"{place} is {kinds[0]} among {kinds[1]}: a batch cannot hold both; train on the images in a separate "
                "stage, before the videos."
            )
        pairs = draw_pairs(clip, self.pairs_per_clip, f"{self.seed} {group.passes} {index}")
        return Prepared(UnreadItem(pairs, clip_key(clip), clip, place, self.num_frames))


def _film_of(row: Mapping[str, Any]) -> Any:
    """Equal for rows of one file and time span."""
    media = row.get("video") or row.get("image")
    is_file = isinstance(media, (str, bytes, dict))  # arrays and pictures have no cheap equality
    return (media, row.get("start_s"), row.get("end_s")) if is_file else object()


def _clip(group: _Group) -> Clip:
    """Raises UserError for a row without a file or a target, or with wrong times; it names the place of this row."""
    if group.folder is None:
        clips = [_clip_of_table(row, place) for place, row in group.rows]
    else:
        clips = [clip_of_row(row, group.folder, place) for place, row in group.rows]
    pairs = dict.fromkeys(pair for clip in clips for pair in clip.pairs)
    return Clip(clips[0].video, tuple(pairs), clips[0].start_s, clips[0].end_s)


def _clip_of_table(row: Mapping[str, Any], place: str) -> Clip:
    """A row with typed columns: those it does not use are None, and a file is its bytes or {"bytes", "path"}."""
    row = {name: value for name, value in row.items() if name in KEYS and value is not None}
    media = row.get("video", row.get("image"))
    if isinstance(media, dict):
        media = media.get("bytes")
    if media is None or isinstance(media, str):
        raise UserError(
            f"{place} needs 'video' or 'image' with the content of a file; paths are read from manifests (.jsonl)."
        )
    return clip_of(row, media, place)
