"""Execution match of SQL: does an answer return the rows that the gold query returns? (Spider, Yu et al. 2018)

    with Databases("spider/database") as databases:
        grade = databases.grade("concert_singer", gold, answer)

A model wrote the answer, so it runs as hostile input: in a child process that cannot write files, on a read-only
connection that allows only SELECT, the tables of the schema and the functions listed in sql_child.py, with limits on
time, memory, rows and cells. The child serves many queries and is replaced if it is killed or dies.

Traps of the published evaluator (galilai-group/llm-jepa, evaluate.py), which pipes both queries through the sqlite3
command line:
  a missing database or a failing query prints nothing, and two empty outputs are equal;
  `.shell` in an answer runs a command, and DROP changes the database for all later answers;
  the order of rows counts even if the gold does not ask for one.
Here a missing database or a failing gold is a `UserError`, and a failing answer is wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from llm_jepa import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

CHILD = Path(__file__).with_name("sql_child.py").resolve()
MAX_SQL_BYTES = 10_000  # Spider's longest gold has 577. Also small enough for a pipe's buffer: writing never blocks
WALL_MARGIN_S = 30.0  # for starting the child on a machine that gives it a tenth of a core
STATUSES = ("ok", "error", "denied", "timeout", "too_large", "invalid")
DB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

# SQLite's tokens. An unterminated string, name or comment reaches to the end, as in SQLite. Group 1: space, comments.
TOKEN = re.compile(
    r"""((?:[ \t\n\f\r\ufeff]|--[^\n]*|/\*(?s:.*?)(?:\*/|\Z))+)"""
    r"""|'(?:[^']|'')*+'?|"(?:[^"]|"")*+"?|`(?:[^`]|``)*+`?|\[[^\]]*\]?|[\w$\x80-\U0010ffff]+|(?s:.)""",
    re.ASCII,
)
# Reading the clock, by the literal argument 'now' or without an argument. 'no' || 'w' gets past, but gains nothing.
NOW = re.compile(
    r"""\b(?:date|time|datetime|julianday|unixepoch) \( (?:['"]now['"]|\))"""
    r"""|\bstrftime \( (?:'[^']*'|"[^"]*") (?:, ['"]now['"]|\))"""
)


class Result(NamedTuple):
    """The outcome of a query. `status`:

    ok         it ran; `columns` and `rows` are set (cells: int, float, str, bytes or None)
    error      SQLite rejects it: syntax, an unknown table or column, integer overflow
    denied     it does something that no answer needs: it writes, or uses PRAGMA, the schema table, a recursive CTE, the
               current time, or a function that is not in FUNCTIONS
    timeout    it needs more than `seconds` of processor time
    too_large  more rows, bytes or memory than allowed, or a cell above 100 kB
    invalid    not one statement of readable text: empty, two statements, NUL, a lone surrogate, above 10 kB
    """

    status: str
    columns: int = 0
    rows: tuple[tuple[Any, ...], ...] = ()
    detail: str = ""


class SqlGrade(NamedTuple):
    correct: bool
    status: str  # the answer's, as in Result
    detail: str  # why it is wrong; empty if correct
    answer_key: str  # equal iff the results are the same, or both fail with the same status and message


class Databases:
    """Runs SQL on `root/<db_id>/<db_id>.sqlite`, one query at a time. Not for two threads at once.

    Args:
        seconds: processor time of a query. A busy machine does not change a grade; only a query that is still not back
            after 10 x seconds + 30 on the wall clock is killed regardless.
        max_rows, max_bytes: of a result, as JSON. The gold must fit, too.

    Raises UserError if the `resource` module or the folder is missing.
    """

    def __init__(self, root: str | Path, *, seconds: float = 5.0, max_rows: int = 100_000, max_bytes: int = 16 << 20):
        if resource is None:
            raise UserError("SQL answers run in a child process with resource limits, which needs Linux; use Linux.")
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise UserError(f"{root} is not a folder; it must hold the databases as <db_id>/<db_id>.sqlite.")
        self.limits = {"seconds": seconds, "max_rows": max_rows, "max_bytes": max_bytes}
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Databases:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child. A later query starts another."""
        child, self._child = self._child, None
        if child:
            with child:  # closes the pipes and waits
                child.kill()

    def run(self, db_id: str, sql: str) -> Result:
        """The rows of one query. Only white space at its ends and a trailing semicolon are removed; a code fence is a
        syntax error.

        Never raises because of the content of `sql`. Raises UserError for a database that is missing, outside the
        root or damaged.
        """
        path = self._path(db_id)
        if refusal := _refusal(sql):
            return refusal
        uri = f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1"
        sql = sql.strip().rstrip("; \t\n\f\r")  # strip() as generation does, so that golds lose what answers lose
        request = json.dumps({"uri": uri, "sql": sql, **self.limits}, ensure_ascii=False).encode() + b"\n"
        # If the child was killed from outside (out of memory, an operator), the query is not at fault: try once more.
        result = self._ask(request) or self._ask(request) or Result("error", detail="the process running it died twice")
        if result.status == "unreadable":
            raise UserError(
                f"{path} cannot be read ({result.detail}); no answer can be graded on it. Replace the file."
            )
        return result

    def grade(self, db_id: str, gold: str, answer: str) -> SqlGrade:
        """Does `answer` return the rows of `gold`, by `same_rows`? In order if `gold` orders its result.

        A gold that returns no row is matched by any answer that runs, has as many columns and returns none.
        Raises UserError if the gold fails, whatever the answer is, and whenever `run` does.
        """
        expected = self.run(db_id, gold)
        if expected.status != "ok":
            raise UserError(
                f"The gold query of database {db_id} fails ({expected.status}: {expected.detail}), so no answer can be "
                f"graded against it: {gold!r}. Correct or remove the line."
            )
        ordered = is_ordered(gold)
        result = self.run(db_id, answer)
        correct = result.status == "ok" and same_rows(expected, result, ordered=ordered)
        detail = result.detail
        content: Any = result
        if result.status == "ok":
            content = [result.columns, *_canonical(result, ordered)]
            if not correct:
                shape, of_gold = (f"{len(r.rows)} x {r.columns}" for r in (result, expected))
                how = "rows x columns, ordered" if ordered else "rows x columns"
                detail = f"other rows: {shape}, gold {of_gold} ({how})"
        return SqlGrade(correct, result.status, detail, hashlib.sha256(repr(content).encode()).hexdigest())

    def _path(self, db_id: str) -> Path:
        if not (isinstance(db_id, str) and DB_ID.fullmatch(db_id)):
            raise UserError(f"{str(db_id)[:80]!r} is not a database id. Use at most 64 letters, digits, _ and -.")
        path = (self.root / db_id / f"{db_id}.sqlite").resolve()
        if not path.is_relative_to(self.root):
            raise UserError(f"Database {db_id} is a link to a file outside {self.root}; copy the file there.")
        if not path.is_file():
            raise UserError(f"Database {db_id} is missing: there is no file {path}.")
        for suffix in ("-wal", "-journal"):
            journal = path.with_name(path.name + suffix)
            if journal.is_file() and journal.stat().st_size:  # immutable=1 would ignore it and silently read old rows
                raise UserError(f"{journal} holds changes that are not in the database yet; open and close it once.")
        return path

    def _ask(self, request: bytes) -> Result | None:
        """The child's answer or a time-out; None if it died or its reply is malformed.

        The child is ended unless it gave a well-formed reply.
        """
        try:
            if self._child is None:
                self._child = _start()
            assert self._child.stdin and self._child.stdout
            try:
                os.write(self._child.stdin.fileno(), request)
            except BrokenPipeError:
                self.close()
                return None
            timeout = Result("timeout", detail=f"over {self.limits['seconds']:g} s")
            deadline = time.monotonic() + 10 * self.limits["seconds"] + WALL_MARGIN_S
            poll = select.poll()
            poll.register(self._child.stdout, select.POLLIN)
            line = bytearray()
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not poll.poll(1000 * left):
                    self.close()
                    return timeout
                part = os.read(self._child.stdout.fileno(), 1 << 20)
                line += part
                if not part or len(line) > self.limits["max_bytes"] + self.limits["max_rows"] + 10_000:
                    child = self._child
                    self.close()
                    return timeout if child.returncode == -signal.SIGPROF else None
        except BaseException:  # Ctrl-C: the next query must not read the reply to this one
            self.close()
            raise
        try:
            # Plain data only: code that took over the child can lie about rows, but it cannot run anything here.
            status, columns, detail, rows = json.loads(line, object_hook=lambda blob: bytes.fromhex(blob["hex"]))
            if status not in (*STATUSES, "unreadable") or any(len(row) != columns for row in rows):
                raise ValueError
            detail = "".join(c if c.isprintable() else "?" for c in detail[:200])
            return Result(status, columns, tuple(map(tuple, rows)), detail)
        except (ValueError, TypeError, KeyError, RecursionError):
            self.close()
            return None


def same_rows(gold: Result, answer: Result, *, ordered: bool) -> bool:
    """Compare two results as lists of rows (`ordered`), or as multisets.

    Columns are compared by position and number, not by name; duplicates count. NULL equals NULL, and 3 equals 3.0;
    neither equals '3'. Text and blob differ. Floats are compared at 9 decimals or 12 digits, whichever is coarser, but
    never coarser than a unit: this forgives summing in another order, but not a wrong sum.

    `ordered` compares the whole order, also of rows that tie in ORDER BY. SQLite's order of ties depends on its plan,
    so a right answer that breaks ties in another way counts as wrong, as it does in Spider's test-suite evaluation
    (Zhong et al. 2020). That evaluation accepts the columns in any order; this one does not.
    Raises ValueError if the gold failed; an answer that failed is False.
    """
    if gold.status != "ok":
        raise ValueError(f"the gold query failed ({gold.status}: {gold.detail}); nothing can be right")
    return (
        answer.status == "ok"
        and gold.columns == answer.columns
        and len(gold.rows) == len(answer.rows)
        and _canonical(gold, ordered) == _canonical(answer, ordered)
    )


def is_ordered(sql: str) -> bool:
    """Does the outermost query order its rows?

    ORDER BY at the end of a UNION counts. In brackets (a subquery, OVER, an aggregate), in a string, a quoted name or a
    comment it does not.
    """
    depth, previous = 0, ""
    for token in _tokens(sql):
        depth += (token == "(") - (token == ")")
        if depth == 0 and previous == "order" and token == "by":
            return True
        previous = token
    return False


def _tokens(sql: str) -> Iterator[str]:
    """Lower-cased tokens without space and comments."""
    return (match[0].lower() for match in TOKEN.finditer(sql) if match[1] is None)


def _refusal(sql: str) -> Result | None:
    """The outcome of a query that must not reach SQLite; None if it may.

    These are texts that SQLite would misread, and the two requests that bypass its authorizer: EXPLAIN and the clock.
    """
    if not isinstance(sql, str) or "\0" in sql or re.search(r"[\ud800-\udfff]", sql):
        return Result("invalid", detail="not readable text (NUL or a lone surrogate)")
    if len(sql.encode()) > MAX_SQL_BYTES:
        return Result("invalid", detail=f"longer than {MAX_SQL_BYTES} bytes")
    tokens = list(_tokens(sql))
    while tokens and tokens[-1] == ";":
        tokens.pop()
    if not tokens:
        return Result("invalid", detail="no statement")
    if ";" in tokens:
        return Result("invalid", detail="more than one statement")
    if tokens[0] == "explain":
        return Result("denied", detail="not allowed: EXPLAIN")
    if NOW.search(" ".join(tokens)):
        return Result("denied", detail="not allowed: the current time")
    return None


def _canonical(result: Result, ordered: bool) -> list[str]:
    """One text per row, equal iff the rows are equal; sorted if the order does not count."""
    rows = [repr(tuple(map(_rounded, row))) for row in result.rows]
    return rows if ordered else sorted(rows)


def _rounded(cell: Any) -> Any:
    """A cell as `same_rows` compares it: floats are rounded, and whole ones become ints."""
    if not isinstance(cell, float) or not math.isfinite(cell):
        return cell
    if cell == 0:
        return 0
    digits_before_point = math.floor(math.log10(abs(cell))) + 1
    number = round(cell, min(9, max(0, 12 - digits_before_point)))
    return int(number) if number.is_integer() else number


def _start() -> subprocess.Popen[bytes]:
    # A new process instead of a fork, which would copy the locks of torch's threads. -I -S: neither PYTHON* variables
    # nor site-packages nor this folder may change what the child imports. -B: it cannot write files, so no bytecode.
    # TZ: 'localtime' must not depend on the machine.
    passed_on = [name for name in ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd="/",
        env={**{name: os.environ[name] for name in passed_on}, "TZ": "UTC"},
        start_new_session=True,  # Ctrl-C is the parent's business
    )
