"""Execution match of SQL: does an answer return the rows that the gold query returns? (Spider, Yu et al. 2018)

    with Databases("spider/database") as databases:
        grade = databases.grade("concert_singer", gold, answer)

The answer was written by a model, so it is run as hostile input: in a child process that can write no file, on a
read-only connection where all but SELECT, the tables of the schema and the functions below is denied, with limits on
time, memory, rows and cells. The child is kept between queries and replaced when it is killed or dies.

Traps of the published evaluator (galilai-group/llm-jepa, evaluate.py), which pipes both queries through the sqlite3
command line: a missing database or a query that fails prints nothing, and nothing equals nothing; `.shell` in an answer
runs a command, DROP changes the database for all later answers; the order of rows counts where none was asked for.
Here a missing database or a failing gold is a `UserError`, a failing answer is wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if __name__ != "__main__":  # the child runs this file alone: it needs neither the package nor what that imports
    from llm_jepa import UserError

MAX_SQL_BYTES = 10_000  # Spider's longest gold: 577. Also small enough for a pipe's buffer: writing never blocks
# instr() and replace() are one opcode, which nothing inside the process can stop: 0.1 s at 100 kB, minutes at 1 MB.
MAX_CELL_BYTES = 100_000
HEAP_BYTES, ADDRESS_SPACE_BYTES = 256 << 20, 1 << 30
WALL_MARGIN_S = 30.0  # starting the child, and a machine that gives it a tenth of a core
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_CELL_BYTES,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 250_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
PRAGMAS = ("query_only=ON", "trusted_schema=OFF", "cell_size_check=ON", "temp_store=MEMORY", "mmap_size=0")
# Left out on purpose: random() and CURRENT_DATE (a grade must not depend on the day), randomblob() and zeroblob()
# (memory for nothing), load_extension(), what tells about the machine (sqlite_version), JSON and full-text search.
# Spider's 8,034 golds use count, avg, sum, max and min.
FUNCTIONS = frozenset(
    """count sum total avg min max group_concat string_agg
    abs round sign ceil ceiling floor trunc mod pow power sqrt exp ln log log10 log2 pi
    length octet_length lower upper trim ltrim rtrim substr substring replace instr concat concat_ws like glob
    printf format char unicode hex quote ifnull nullif coalesce iif if typeof likely unlikely likelihood
    date time datetime julianday unixepoch strftime
    row_number rank dense_rank percent_rank cume_dist ntile lag lead first_value last_value nth_value""".split()  # noqa: SIM905 (one name a line reads worse)
)
STATUSES = ("ok", "error", "denied", "timeout", "too_large", "invalid")
UNREADABLE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}
DB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

# SQLite's tokens. An unterminated string, name or comment reaches to the end, as in SQLite. [1] is space and comments.
TOKEN = re.compile(
    r"""((?:[ \t\n\f\r\ufeff]|--[^\n]*|/\*(?s:.*?)(?:\*/|\Z))+)"""
    r"""|'(?:[^']|'')*+'?|"(?:[^"]|"")*+"?|`(?:[^`]|``)*+`?|\[[^\]]*\]?|[\w$\x80-\U0010ffff]+|(?s:.)""",
    re.ASCII,
)
# The clock, as a literal first argument or none. 'no' || 'w' gets past; it wins nothing.
NOW = re.compile(
    r"""\b(?:date|time|datetime|julianday|unixepoch) \( (?:['"]now['"]|\))"""
    r"""|\bstrftime \( (?:'[^']*'|"[^"]*") (?:, ['"]now['"]|\))"""
)


class Result(NamedTuple):
    """What a query did. `status`:

    ok         it ran; `columns` and `rows` are set (cells: int, float, str, bytes or None)
    error      SQLite rejects it: syntax, an unknown table or column, integer overflow
    denied     it asks for what no answer needs: to write, PRAGMA, the schema table, a recursive CTE, any function not
               in FUNCTIONS, the current time
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

    Raises UserError where the `resource` module or the folder is missing.
    """

    def __init__(self, root: str | Path, *, seconds: float = 5.0, max_rows: int = 100_000, max_bytes: int = 16 << 20):
        if resource is None:
            raise UserError(
                "SQL answers run in a child process with resource limits, which needs Linux; this is not it."
            )
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
        """Ends the child. A later query starts another."""
        child, self._child = self._child, None
        if child:
            with child:  # closes the pipes and waits
                child.kill()

    def run(self, db_id: str, sql: str) -> Result:
        """Rows of one query. Only a trailing semicolon and white space are taken off; a code fence is a syntax error.

        Never raises for anything that stands in `sql`. Raises UserError for a database that is missing, outside the
        root or damaged.
        """
        path = self._path(db_id)
        if refused := _refusal(sql):
            return refused
        uri = f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1"
        sql = sql.rstrip("; \t\n\f\r")
        request = json.dumps({"uri": uri, "sql": sql, **self.limits}, ensure_ascii=False).encode() + b"\n"
        # A child that was killed from outside (out of memory, an operator) is no fault of the query: try once more.
        result = self._ask(request) or self._ask(request) or Result("error", detail="the process running it died twice")
        if result.status == "unreadable":
            raise UserError(
                f"{path} cannot be read ({result.detail}); no answer can be graded on it. Replace the file."
            )
        return result

    def grade(self, db_id: str, gold: str, answer: str) -> SqlGrade:
        """Does `answer` return the rows of `gold`, by `same_rows`? In order if `gold` orders its result.

        A gold that returns no row is matched by any answer that runs, has as many columns and returns none.
        Raises UserError if the gold fails, whatever the answer is, and where `run` does.
        """
        expected = self.run(db_id, gold)
        if expected.status != "ok":
            raise UserError(
                f"The gold query of database {db_id} fails ({expected.status}: {expected.detail}), so no answer can be "
                f"graded against it: {gold!r}. Mend or remove the line."
            )
        ordered = is_ordered(gold)
        result = self.run(db_id, answer)
        correct = result.status == "ok" and same_rows(expected, result, ordered=ordered)
        detail = result.detail
        if result.status == "ok" and not correct:
            shapes = [f"{len(r.rows)} x {r.columns}" for r in (result, expected)]
            detail = f"other rows: {shapes[0]}, gold {shapes[1]} (rows x columns{', ordered' if ordered else ''})"
        content = [result.columns, *_canonical(result, ordered)] if result.status == "ok" else result
        return SqlGrade(correct, result.status, detail, hashlib.sha256(repr(content).encode()).hexdigest())

    def _path(self, db_id: str) -> Path:
        if not (isinstance(db_id, str) and DB_ID.fullmatch(db_id)):
            raise UserError(f"{str(db_id)[:80]!r} is no database id: letters, digits, _ and -, at most 64.")
        path = (self.root / db_id / f"{db_id}.sqlite").resolve()
        if not path.is_relative_to(self.root):
            raise UserError(f"Database {db_id} lies outside {self.root}, behind a link; copy it there.")
        if not path.is_file():
            raise UserError(f"Database {db_id} is missing: there is no file {path}.")
        for suffix in ("-wal", "-journal"):
            journal = path.with_name(path.name + suffix)
            if journal.is_file() and journal.stat().st_size:  # immutable=1 would read past it: old rows, no word
                raise UserError(f"{journal} holds changes that are not in the database yet; open and close it once.")
        return path

    def _ask(self, request: bytes) -> Result | None:
        """The child's answer, or a time-out; None if it died or talks nonsense. The child survives only an answer."""
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
        except BaseException:  # Ctrl-C: the reply to this query must not be taken for the next one's
            self.close()
            raise
        try:
            # Plain data only: whatever took over the child can lie about rows, it cannot run anything here.
            status, columns, detail, rows = json.loads(line, object_hook=lambda blob: bytes.fromhex(blob["hex"]))
            if status not in (*STATUSES, "unreadable") or any(len(row) != columns for row in rows):
                raise ValueError
            detail = "".join(c if c.isprintable() else "?" for c in detail[:200])
            return Result(status, columns, tuple(map(tuple, rows)), detail)
        except (ValueError, TypeError, KeyError, RecursionError):
            self.close()
            return None


def same_rows(gold: Result, answer: Result, *, ordered: bool) -> bool:
    """Are two results equal as lists of rows (`ordered`), or as multisets?

    Columns are compared by position and number, not by name; duplicates count. NULL equals NULL, 3 equals 3.0, neither
    equals '3'; text and blob differ. Floats count to 9 decimals and 12 digits, whichever is coarser, but never to less
    than a unit: summing in another order is forgiven, a wrong sum is not.

    `ordered` asks for the whole list, also among rows that tie in ORDER BY: there SQLite's order depends on its plan,
    so a right answer that breaks ties in another way counts as wrong, as it does in Spider's test-suite evaluation
    (Zhong et al. 2020). That evaluation accepts the columns in any order; this does not.
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
    """Does the outermost query order its rows? ORDER BY in brackets (a subquery, OVER, an aggregate), in a string, a
    quoted name or a comment does not count; at the end of a UNION it does."""
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
    """What SQLite never sees: text it would misread, and the two things that its authorizer is not asked about."""
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
    """One text per row, equal iff the rows are; sorted where order does not count."""
    rows = [repr(tuple(_rounded(cell) if isinstance(cell, float) else cell for cell in row)) for row in result.rows]
    return rows if ordered else sorted(rows)


def _rounded(number: float) -> float | int:
    if not math.isfinite(number):
        return number
    digits_before_point = math.floor(math.log10(abs(number))) + 1 if number else 0
    number = round(number, min(9, max(0, 12 - digits_before_point)))
    return int(number) if number.is_integer() else number


def _start() -> subprocess.Popen[bytes]:
    # -I: no PYTHON* variables, and eval/ is not on the path (its statistics.py would stand in for the library's).
    # A new process, not a fork: a fork copies torch's threads' locks. TZ: 'localtime' must not depend on the machine.
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd="/",
        env={**kept, "TZ": "UTC"},
        start_new_session=True,  # Ctrl-C is the parent's business
    )


# From here on: what runs in the child.

ACTIONS = {
    getattr(sqlite3, f"SQLITE_{name}"): name
    for name in ("READ", "FUNCTION", "RECURSIVE", "PRAGMA", "ATTACH", "TRANSACTION", "INSERT", "UPDATE", "DELETE")
}


def _serve() -> None:
    for limit, value in (
        (resource.RLIMIT_AS, ADDRESS_SPACE_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sqlite3.connect(":memory:").execute(f"PRAGMA hard_heap_limit={HEAP_BYTES}")  # of the process
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # Second line of defence: an opcode that does not come back is ended by the kernel.
        signal.setitimer(signal.ITIMER_PROF, 1.5 * request["seconds"] + 0.2)
        reply = _answer(**request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(uri: str, sql: str, seconds: float, max_rows: int, max_bytes: int) -> str:
    """JSON [status, columns, detail, rows]. A new connection for each query: none can leave anything for the next."""
    deadline = time.process_time() + seconds
    tables: set[str] = set()
    denied: list[str] = []

    def authorize(action: int, first: str | None, second: str | None, database: str | None, _: str | None) -> int:
        if action == sqlite3.SQLITE_SELECT:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ:
            name = (first or "").lower()
            # A column must belong to a table of the file. Without a column (`count(*)`) CTEs are asked about as well,
            # and only their names tell them from table-valued functions and the schema table.
            known = name in tables if second else name not in modules
            if known and database in ("main", None) and not name.startswith("sqlite_"):
                return sqlite3.SQLITE_OK
        denied.append(" ".join(filter(None, (ACTIONS.get(action, f"authorizer action {action}"), first, second))))
        return sqlite3.SQLITE_DENY

    def encode(cell: bytes) -> dict[str, str]:
        return {"hex": cell.hex()}

    to_json = json.JSONEncoder(default=encode, separators=(",", ":")).encode
    columns, rows, size = 0, [], 0
    status, detail = "ok", ""
    connection = None
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, cached_statements=0)
        for limit, value in LIMITS.items():
            connection.setlimit(limit, value)
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        connection.set_progress_handler(lambda: time.process_time() > deadline, 1000)
        modules = {name.lower() for (name,) in connection.execute("PRAGMA module_list")}
        listing = connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        tables.update(name.lower() for (name,) in listing)
        if not tables:
            return to_json(["unreadable", 0, "it holds no table", []])
        connection.set_authorizer(authorize)
        cursor = connection.execute(sql)
        columns = len(cursor.description or ())
        if not columns:  # REINDEX without an index asks nobody
            status, detail = "denied", "not allowed: a statement that returns no rows"
        for row in cursor:
            rows.append(to_json(row))
            size += len(rows[-1])
            if len(rows) > max_rows or size > max_bytes:
                status, detail = "too_large", f"over {max_rows} rows or {max_bytes} bytes"
                break
    except MemoryError:
        status, detail = "too_large", "out of memory"
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        status, detail = "error", str(error)
        if code in UNREADABLE:
            status = "unreadable"
        elif denied:
            status, detail = "denied", f"not allowed: {denied[0]}"
        elif code == sqlite3.SQLITE_INTERRUPT:
            status, detail = "timeout", f"over {seconds:g} s"
        elif code == sqlite3.SQLITE_TOOBIG:
            status = "too_large"
    finally:
        if connection:
            connection.close()
    if status != "ok":
        columns, rows = 0, []
    return f'["{status}",{columns},{to_json(detail)},[{",".join(rows)}]]'


if __name__ == "__main__":
    _serve()
