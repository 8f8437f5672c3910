"""Training rows that are read while training goes on: an endless stream with a shuffle buffer and an exact resume.

Trainer skips the batches that a resumed run has seen, which is exact only within one epoch. So the stream never ends:
if the source does, it is read again, and the whole run is one epoch. Each row comes with its `Position`. A checkpoint
holds the position of its last row. A resumed run reads the source again up to there, but prepares no row again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol, TypeVar

from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.utils import logging

from .errors import UserError
from .files import write_json
from .json_files import read_json
from .stopping import StoppableTrainer

logger = logging.get_logger(__name__)

POSITION_FILE = "stream.json"  # in a checkpoint
POSITION = "stream_position"  # key of a batch until the trainer has read it
T = TypeVar("T")


class Position(NamedTuple):
    """How far a stream has been read, up to and including one row.

    passes: times that the source has been read to its end.
    read: rows of the present pass, in the order in which they are given.
    total: rows of all passes. left_out of them were not given, and cut of those given lost their end.
    """

    passes: int = 0
    read: int = 0
    total: int = 0
    cut: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        """For the card and the end of a run."""
        notes = [f"{self.cut} of them cut to max_length"] if self.cut else []
        notes += [f"{self.left_out} more left out, longer than max_length"] if self.left_out else []
        if self.passes:
            notes.append(f"pass {self.passes + 1} over the source")
        text = f"{self.total - self.left_out} streamed"
        return f"{text} ({'; '.join(notes)})" if notes else text


class Source(Protocol):
    """Rows that can be read again and again."""

    @property
    def name(self) -> str: ...
    def rows(self, passes: int) -> Iterator[tuple[str, Any]]:
        """(place, row) of each row; passes: how often it was read before."""


class Prepared(NamedTuple):
    """item: what is trained on; None if the row is left out.  is_cut: whether it lost its end."""

    item: Any
    is_cut: bool = False


class Streamed(NamedTuple):
    item: Any
    position: Position


class EndlessRows(IterableDataset):
    """The rows of a source, prepared one by one, again and again.

    Args:
        prepare: (place, index of the row in the source, row) -> what is trained on.
        shuffle_buffer: rows that are held in memory, of which a random one comes next; 0 for the order of the source.
            Each pass has another order, which depends on (seed, pass) alone.

    Raises UserError while it is read: for a row that cannot be used, and if a whole pass gives no row.
    """

    def __init__(
        self, source: Source, prepare: Callable[[str, int, Any], Prepared], *, shuffle_buffer: int = 0, seed: int = 0
    ) -> None:
        self.source, self.prepare, self.shuffle_buffer, self.seed = source, prepare, shuffle_buffer, seed
        self.begin_at(Position(), skipped=0)

    def begin_at(self, position: Position, *, skipped: int) -> None:
        """Begin behind `position`, after as many times None as Trainer will skip rows."""
        self._start, self._skipped = position, skipped

    def __iter__(self) -> Iterator[Streamed | None]:
        worker = get_worker_info()
        assert worker is None or worker.num_workers == 1, "every worker would give every row"
        yield from [None] * self._skipped
        passes, seen, total, cut, left_out = self._start
        while True:
            read = given = 0
            for place, index, row in self._rows_of_pass(passes):
                read += 1
                if read <= seen:
                    continue
                total += 1
                item, is_cut = self.prepare(place, index, row)
                if item is None:
                    left_out += 1
                    continue
                given += 1
                cut += is_cut
                yield Streamed(item, Position(passes, read, total, cut, left_out))
            if read < seen:
                raise UserError(
                    f"{self.source.name} has {read} rows, and the checkpoint was saved after {seen} of them: the data "
                    "have changed. Put them back, or start a new run in another output_dir."
                )
            if not given and not seen:
                why = f"all {read} are longer than max_length" if read else "it holds none"
                raise UserError(f"{self.source.name} gives no row to train on: {why}.")
            passes, seen = passes + 1, 0

    def _rows_of_pass(self, passes: int) -> Iterator[tuple[str, int, Any]]:
        rows = ((place, index, row) for index, (place, row) in enumerate(self.source.rows(passes)))
        if not self.shuffle_buffer:
            return rows
        return shuffled(rows, self.shuffle_buffer, Random(f"{self.seed} {passes}"))


def shuffled(items: Iterable[T], size: int, random: Random) -> Iterator[T]:
    """The items in another order. Holds `size` of them, and gives a random one of these for each that it reads."""
    held: list[T] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        place = random.randrange(size)
        yield held[place]
        held[place] = item
    random.shuffle(held)
    yield from held


class StreamCollator:
    """The collator of a family for the rows of `EndlessRows`. A batch carries the position of its last row."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Streamed | None]) -> dict[str, Any]:
        streamed = [row for row in rows if row is not None]
        if not streamed:
            return {}  # Trainer skips it
        assert len(streamed) == len(rows), "a batch is skipped as a whole"
        return {**self.collate([row.item for row in streamed]), POSITION: streamed[-1].position}


class StreamingTrainer(StoppableTrainer):
    """A trainer that also trains on `EndlessRows`. Nothing changes for other data sets."""

    data_collator: Any
    position = Position()  # of the last row that this rank has trained on
    _continued: str | None = None  # the checkpoint that this run resumes from

    @property
    def is_streaming(self) -> bool:
        return isinstance(self.train_dataset, EndlessRows)

    def get_train_dataloader(self) -> DataLoader:
        if not self.is_streaming:
            return super().get_train_dataloader()
        # Else Accelerate cuts a batch to as many rows as it has items, and a row of a tensor need not be an item.
        self.accelerator.dataloader_config.dispatch_batches = False
        collator = self.data_collator
        self.data_collator = StreamCollator(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Called once by a run that resumes, before training begins."""
        super()._load_optimizer_and_scheduler(checkpoint)
        self._continued = checkpoint

    def begin_stream(self, step: int) -> None:
        """Let the stream begin behind the last row of the checkpoint that this run resumes from. step: of it."""
        folder, self._continued = self._continued, None
        if not self.is_streaming:
            return
        args = self.args
        if folder is None or args.ignore_data_skip:
            self.position = Position()
            self.train_dataset.begin_at(self.position, skipped=0)
            return
        self.read_position(folder)
        batches = step * args.gradient_accumulation_steps  # of each rank
        self.train_dataset.begin_at(
            self.position, skipped=batches * args.per_device_train_batch_size * self.accelerator.num_processes
        )

    def read_position(self, folder: str | Path) -> None:
        """Take the position of a checkpoint for the own one."""
        if not self.is_streaming:
            return
        path = Path(folder) / POSITION_FILE
        if not path.is_file():
            raise UserError(f"{folder} has no {POSITION_FILE}, so nobody knows which rows come next; start a new run.")
        values = read_json(path, dict.fromkeys(Position._fields, int))
        self.position = Position(*(values[name] for name in Position._fields))

    def take_position(self, batches: Sequence[dict[str, Any]]) -> None:
        """Take the positions out of the batches of a step, and say if the source has begun again."""
        before = self.position
        for batch in batches:
            self.position = batch.pop(POSITION, self.position)
        now = self.position
        if now.passes > before.passes and self.is_world_process_zero():
            logger.warning(
                f"The training stream ended after {(now.total - now.read) // now.passes} rows. It began again "
                f"(pass {now.passes + 1}), at step {self.state.global_step + 1} of {self.state.max_steps}."
            )

    def last_position(self) -> Position:
        """That of the last row of all ranks. Collective."""
        if self.args.world_size == 1:
            return self.position
        return Position(*max(map(tuple, gather_object([tuple(self.position)]))))

    def save_more(self, folder: Path) -> None:
        super().save_more(folder)
        if self.is_streaming:
            position = self.last_position()
            if self.args.should_save:
                write_json(folder / POSITION_FILE, position._asdict())

    def end_stream(self) -> None:
        """Say what was read. Collective."""
        if not self.is_streaming:
            return
        self.position = self.last_position()
        if self.is_world_process_zero():
            logger.warning(f"Rows of the training stream: {self.position}.")
