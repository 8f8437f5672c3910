"""What a task is made of, and the reader of its rows.

A group is one meaning in k wordings with one gold answer. Benchmarks with one wording have groups of one.
"""

from __future__ import annotations

import difflib
import glob
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.core.files import file_sha256
from llm_jepa.core.row_files import PACKED_SUFFIXES, row_suffix
from llm_jepa.lm import FILE_SUFFIXES, Prompt, data_sha256, format_of, parse_row, read_rows, with_kwargs

from ..graders import Grade

LLM_JEPA = "LLM-JEPA (arXiv:2509.14252"  # of published figures; the table follows


@dataclass(frozen=True)
class Group:
    """One meaning: its wordings, and the answer that all of them ask for.

    If `extra` has `choices`, the answer is the likeliest of these; otherwise it is generated.
    """

    id: str
    prompts: tuple[Prompt, ...]
    wordings: tuple[str, ...]  # a name for each prompt
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    groups: tuple[Group, ...]
    sha256: dict[str, str]  # of each file that was read, or of the rows if the source is a Hub id
    dropped: int = 0  # left out because they are in the training data
    unusable: int = 0  # left out, with a warning, because they cannot be graded (see `left_out`)


@dataclass(frozen=True)
class Task:
    """`load` and `grade` raise UserError for data that cannot be used."""

    name: str
    load: Callable[[str], Data]
    grade: Callable[[Group, str, bool], Grade]  # (group, text of the answer, whether it ended by itself)
    metric: str  # the primary one
    max_new_tokens: int
    published: str  # figure and source, for orientation
    trap: str  # of the evaluator that made it


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: `; did you mean 'x'?`, or all known words."""
    known = list(known)
    for near in difflib.get_close_matches(word, known, n=1, cutoff=0.5):
        return f"; did you mean {near!r}?"
    return f"; known: {', '.join(known)}."


def turns_of(prompt: Prompt) -> str | list[dict[str, Any]]:
    """The text or the messages of a prompt."""
    return prompt["prompt"] if isinstance(prompt, dict) else prompt


def last_text(prompt: Prompt) -> str:
    """A plain prompt, or the content of the last message of a conversation."""
    turns = turns_of(prompt)
    return turns if isinstance(turns, str) else str(turns[-1]["content"])


def read(source: str, name: str, split: str, config: str | None = None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(rows, hashes) of a file, a glob, the test file in a folder, a folder of `datasets`, or a Hub data set."""
    path = Path(source)
    if path.is_dir():
        path = _file_in(path, name, split) or path
    elif _is_missing(source):
        raise UserError(f"There is no data at {source}; give a file, a folder, or a Hub id such as owner/name.")
    try:
        rows = read_rows(str(path), split=split, config=config)
    except UserError as error:
        if not path.is_dir():
            raise
        stems, suffixes = ", ".join(_stems(name, split)), ", ".join(FILE_SUFFIXES)
        raise UserError(
            f"{path} holds no {name} data: looked for {stems} as {suffixes}; name the file itself if it has another "
            f"name. As a folder of `datasets`: {error}"
        ) from None
    hashes = {path.name: file_sha256(path)} if path.is_file() else {source: str(data_sha256(rows))}
    return list(rows), hashes


def _is_missing(source: str) -> bool:
    """Whether a source is neither a file, nor names one, nor can be a Hub id."""
    if Path(source).exists() or glob.has_magic(source) or row_suffix(source) in FILE_SUFFIXES:
        return False
    return Path(source).is_absolute() or source.startswith(".") or source.count("/") != 1


def _stems(name: str, split: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((f"{name}_{split}", f"{name}_test", split, "test", name)))


def _file_in(folder: Path, name: str, split: str) -> Path | None:
    """The file of a task in a folder. A compressed one comes after the plain ones."""
    for packed in ("", *PACKED_SUFFIXES):
        for stem in _stems(name, split):
            for suffix in FILE_SUFFIXES:
                path = folder / f"{stem}{suffix}{packed}"
                if path.is_file():
                    return path
    return None


def read_questions(
    source: str,
    name: str,
    *,
    system: str,
    columns: Sequence[str],
    ask: Callable[[dict[str, Any]], tuple[str, str]],
    extra: Callable[[str, str], dict[str, Any]],
    split: str = "test",
    config: str | None = None,
) -> Data:
    """Groups of one wording.

    Rows in a format of training (`messages`, prompt and completion, Alpaca, ShareGPT) are used as they are. From the
    raw columns of a Hub data set, the same prompts are built.

    Args:
        system: the system message of prompts that are built.
        columns: the raw columns that `ask` needs.
        ask: (user turn, answer) of a row of raw columns.
        extra: the `extra` of a group, from (user turn, answer).

    `ask` and `extra` raise ValueError for a row that cannot be graded. Such rows are left out (see `left_out`).
    """
    rows, hashes = read(source, name, split, config)
    groups: list[Group] = []
    faults: list[str] = []
    for index, row in enumerate(rows):
        where = f"{next(iter(hashes))}, row {index + 1}"
        try:
            if _is_training_row(row):
                example = parse_row(row, where)
                prompt = with_kwargs(example.prompt, example.render_kwargs)
                answer = last_text(example.completion)
            else:
                _check_columns(row, columns, name, where)
                user, answer = ask(row)
                prompt = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            if not isinstance(answer, str) or not answer.strip():
                raise ValueError(f"the answer is {answer!r}, not a text")
            details = extra(last_text(prompt), answer)
        except UserError as error:  # it names the row already
            faults.append(str(error))
        except ValueError as error:
            faults.append(f"{where}: {error}")
        else:
            groups.append(Group(str(index), (prompt,), ("0",), answer, details))
    return Data(tuple(groups), hashes, unusable=left_out(faults, len(rows)))


def _is_training_row(row: dict[str, Any]) -> bool:
    has_both = {"prompt", "completion"} <= set(row)
    return has_both or row.get("messages") is not None or format_of(row) in ("Alpaca", "ShareGPT")


def left_out(faults: Sequence[str], num_rows: int) -> int:
    """The number of rows that cannot be graded, after a warning that has it. One such row must not block a file.

    Raises UserError if no other row is left: then the file is at fault.
    """
    if not faults:
        return 0
    if len(faults) == num_rows:
        raise UserError(f"None of {num_rows} rows can be graded; the first: {faults[0]}")
    warnings.warn(
        f"{len(faults)} of {num_rows} rows cannot be graded and are left out; the first: {faults[0]}", stacklevel=4
    )
    return len(faults)


def _check_columns(row: dict[str, Any], columns: Sequence[str], name: str, where: str) -> None:
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise UserError(
            f"{where} has the columns {sorted(row)}, {name} needs 'messages' or {', '.join(columns)} "
            f"(missing: {', '.join(missing)})."
        )
