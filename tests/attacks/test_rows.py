"""Claim: hostile rows, media, texts, answers, options, and recipe keys end in one line, in bounded time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from eval.faults import options, rows
from eval.faults.inputs import Input
from tests.attacks.inputs import faults_of

SAMPLE = 4  # every fourth input by default
# Keys whose names reach another program or a service; an optimizer or a compiler of its own is not tried.
SLOW_KEYS = ("lm torch_compile", "vl torch_compile")


def some(shared: Path) -> Iterator[Input]:
    """A few of each kind. Of the numbers that no key takes: each key about once in five, each number about evenly."""
    yield from islice(rows.inputs(shared), 0, None, SAMPLE)
    yield from islice(options.options(shared), 3, None, 29)
    yield from islice(all_keys(shared), 5, None, 71)


def all_keys(shared: Path) -> Iterator[Input]:
    return (given for given in options.keys(shared) if not given.name.startswith(SLOW_KEYS))


def test_some_hostile_rows_media_texts_answers_options_and_keys(tmp_path):
    faults = faults_of(some, tmp_path, at_least=150)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("inputs", "at_least"),
    [(rows.inputs, 350), (options.options, 500), (all_keys, 2000)],
    ids=["rows", "options", "keys"],
)
def test_all_of_them(inputs, at_least, tmp_path):
    faults = faults_of(inputs, tmp_path, at_least=at_least)
    assert not faults, "\n".join(faults)
