"""Claims about endless rows: the order, the passes, and that a stream goes on behind any position."""

from __future__ import annotations

from random import Random

import pytest

from llm_jepa.core.errors import UserError
from llm_jepa.core.streaming import POSITION, EndlessRows, Position, Prepared, StreamCollator, shuffled


class Numbers:
    name = "numbers"

    def __init__(self, count):
        self.count, self.reads = count, []

    def rows(self, passes):
        self.reads.append(passes)
        for number in range(self.count):
            yield f"number {number}", number


def even(place, index, row):
    """Leaves odd numbers out; numbers that divide by 4 are cut."""
    assert place == f"number {row}" and index == row
    return Prepared(None) if row % 2 else Prepared(row, row % 4 == 0)


def stream(count=10, prepare=lambda place, index, row: Prepared(row), buffer=0, seed=0):
    return EndlessRows(Numbers(count), prepare, shuffle_buffer=buffer, seed=seed)


def take(rows, count):
    return [streamed for _, streamed in zip(range(count), rows, strict=False)]


def test_without_a_buffer_the_order_is_that_of_the_source_again_and_again():
    assert [row.item for row in take(stream(3), 8)] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_positions_count_passes_and_what_was_left_out():
    """Of 0..4: 0 (cut), 2, 4 (cut) are given, 1 and 3 are left out."""
    rows = take(stream(5, even), 4)
    assert [row.item for row in rows] == [0, 2, 4, 0]
    assert rows[2].position == Position(passes=0, read=5, total=5, cut=2, left_out=2)
    assert rows[3].position == Position(passes=1, read=1, total=6, cut=3, left_out=2)
    assert str(rows[3].position) == (
        "4 streamed (3 of them cut to max_length; 2 more left out, longer than max_length; pass 2 over the source)"
    )


@pytest.mark.parametrize("buffer", [1, 3, 100])
def test_each_pass_of_a_shuffled_stream_has_every_row_once_in_its_own_order(buffer):
    rows = [row.item for row in take(stream(20, buffer=buffer), 40)]
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20))
    if buffer > 1:
        assert rows[:20] != list(range(20)) and rows[:20] != rows[20:]
    assert rows == [row.item for row in take(stream(20, buffer=buffer), 40)]
    assert buffer == 1 or rows != [row.item for row in take(stream(20, buffer=buffer, seed=1), 40)]


def test_a_buffer_holds_no_more_rows_than_it_says():
    """The first row that comes out is one of the first 3, and only 4 have been read by then."""
    read = []
    items = shuffled((read.append(i) or i for i in range(100)), 3, Random(0))
    assert next(items) in (0, 1, 2) and read == [0, 1, 2, 3]


@pytest.mark.parametrize("buffer", [0, 4])
@pytest.mark.parametrize("prepare", [even, lambda place, index, row: Prepared(row)])
def test_a_stream_goes_on_behind_every_position(buffer, prepare):
    """Over the end of the source, with rows that are left out; nothing before the position is prepared again."""
    whole = take(stream(10, prepare, buffer), 25)
    for count in range(1, 25):
        prepared = []

        def noted(place, index, row, into=prepared):
            into.append(row)
            return prepare(place, index, row)

        rest = stream(10, noted, buffer)
        rest.begin_at(whole[count - 1].position, skipped=2)
        rows = take(rest, 2 + 25 - count)
        assert rows[:2] == [None, None]
        assert rows[2:] == whole[count:], count
        assert rest.source.reads[0] == whole[count - 1].position.passes, "finished passes are not read again"
        assert len(prepared) == whole[-1].position.total - whole[count - 1].position.total


def test_a_source_that_gives_nothing_is_refused_and_not_read_forever():
    with pytest.raises(UserError, match="numbers gives no row to train on: it holds none"):
        next(iter(stream(0)))
    with pytest.raises(UserError, match="all 4 are longer than max_length"):
        next(iter(stream(4, lambda *row: Prepared(None))))


def test_a_source_that_has_become_shorter_is_refused():
    rows = stream(3)
    rows.begin_at(Position(passes=0, read=5, total=5), skipped=0)
    with pytest.raises(UserError, match="has 3 rows, and the checkpoint was saved after 5"):
        next(iter(rows))


def test_a_batch_carries_the_position_of_its_last_row():
    rows = take(stream(5), 3)
    collate = StreamCollator(lambda items: {"items": items})
    assert collate(rows) == {"items": [0, 1, 2], POSITION: rows[2].position}
    assert collate([None, None]) == {}
