"""Spider: SQL from questions, graded by running both queries (Yu et al. 2018, arXiv:1809.08887)."""

from __future__ import annotations

import atexit
import difflib
import functools
import re
from dataclasses import replace
from pathlib import Path

from llm_jepa import UserError

from .. import graders
from ..graders import Grade
from ..graders.sql import Databases
from .questions import LLM_JEPA, Data, Group, Task, left_out, read_questions

_DB_ID = re.compile(r"For db_id:\[(.+?)\]")


def load(source: str) -> Data:
    """Questions of a folder, or of a file in it; the folder must also hold Spider's `database` folder.

    `extra`: db_id, databases. Lines whose gold query fails are left out with a warning: two of Spider's 8,034 are not
    valid SQLite (ORDER BY before INTERSECT).
    """
    folder = Path(source)
    if folder.is_file():
        folder = folder.parent
    root = folder / "database"
    if not root.is_dir():
        raise UserError(
            f"{folder} has no folder `database` with Spider's SQLite files; without them no query can run. "
            "Unpack spider_data.zip (yale-lily.github.io/spider) there."
        )
    data = read_questions(
        source,
        "spider",
        system="Convert natural language to SQL.",
        columns=("db_id", "question", "query"),
        ask=lambda row: (f"For db_id:[{row['db_id']}]\n\n{row['question']}", row["query"]),
        extra=lambda user, _: {"db_id": _db_id(user), "databases": str(root)},
        split="dev",
    )
    file = next(iter(data.sha256))
    usable, faults = [], []
    for group in data.groups:
        where = f"{file}, row {int(group.id) + 1}"
        db_id = group.extra["db_id"]
        _check_database(root, db_id, where)
        result = _databases(str(root)).run(db_id, group.answer)
        if result.status == "ok":
            usable.append(group)
        else:
            faults.append(f"{where}: the gold query fails on {db_id}, {result.status}: {result.detail}")
    if not usable:
        raise UserError(f"No gold query of {source} runs ({faults[0]}); are these the databases of these questions?")
    return replace(data, groups=tuple(usable), unusable=data.unusable + left_out(faults, len(data.groups)))


def _db_id(user: str) -> str:
    """The database that the question names. Raises ValueError if there is none."""
    match = _DB_ID.search(user)
    if match is None:
        raise ValueError("the question names no database (`For db_id:[...]`)")
    return match[1]


def _check_database(root: Path, db_id: str, where: str) -> None:
    """Raises UserError if the database is missing. The folder is at fault then, not the row, so no row is left out."""
    if (root / db_id / f"{db_id}.sqlite").is_file():
        return
    names = sorted(path.name for path in root.iterdir())[:1000]
    message = f"{where}: no database {db_id!r} in {root.name}"
    for near in difflib.get_close_matches(db_id, names, n=1):
        message += f"; is it {near!r}?"
    raise UserError(message)


@functools.cache
def _databases(root: str) -> Databases:
    """One child process for each folder runs the queries until this process exits."""
    databases = Databases(root)
    atexit.register(databases.close)
    return databases


def _grade(group: Group, text: str, stopped: bool) -> Grade:
    databases = _databases(group.extra["databases"])
    return graders.sql_execution(databases.grade(group.extra["db_id"], group.answer, text), stopped)


TASK = Task(
    "spider",
    load,
    _grade,
    metric="execution",
    max_new_tokens=128,
    published=f"{LLM_JEPA}, table 13), Llama-3.2-1B, its own random split: 47.52 +- 2.44 (SFT), 50.55 +- 2.08",
    trap="compares the output of the sqlite3 program and ignores its errors: a query that fails equals an empty "
    "result, and without the databases everything is right; row order always counts; queries may write; 72 % of its "
    "test queries are in train. Spider's test-suite evaluation takes the columns in any order and runs several "
    "databases; this one compares columns by position, on one database",
)
