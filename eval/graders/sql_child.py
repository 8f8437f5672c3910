"""The child process of `eval.graders.sql`: runs queries that a model wrote.

`eval.graders.sql` starts this file as a script, so it imports only the standard library. It reads requests and writes
replies, each one line of JSON.
"""

from __future__ import annotations

import json
import resource
import signal
import sqlite3
import sys
import time

# instr() and replace() are one opcode, which the process cannot interrupt: 0.1 s at 100 kB, minutes at 1 MB.
MAX_CELL_BYTES = 100_000
HEAP_BYTES, ADDRESS_SPACE_BYTES = 256 << 20, 1 << 30
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
# (memory for nothing), load_extension(), sqlite_version() and the like (they reveal the machine), JSON and full-text
# search. Spider's 8,034 golds use count, avg, sum, max and min.
FUNCTIONS = frozenset(
    """count sum total avg min max group_concat string_agg
    abs round sign ceil ceiling floor trunc mod pow power sqrt exp ln log log10 log2 pi
    length octet_length lower upper trim ltrim rtrim substr substring replace instr concat concat_ws like glob
    printf format char unicode hex quote ifnull nullif coalesce iif if typeof likely unlikely likelihood
    date time datetime julianday unixepoch strftime
    row_number rank dense_rank percent_rank cume_dist ntile lag lead first_value last_value nth_value""".split()  # noqa: SIM905 (one name a line reads worse)
)
UNREADABLE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}
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
        # Second line of defence: the kernel ends an opcode that does not return.
        signal.setitimer(signal.ITIMER_PROF, 1.5 * request["seconds"] + 0.2)
        reply = _answer(**request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(uri: str, sql: str, seconds: float, max_rows: int, max_bytes: int) -> str:
    """Run a query; the reply is JSON [status, columns, detail, rows].

    Each query gets a new connection, so that it cannot leave anything for the next one.
    """
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
            # A column must belong to a table of the file. Without a column (`count(*)`) SQLite asks about CTEs as well;
            # only their names distinguish them from table-valued functions and the schema table.
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
        if not columns:  # REINDEX without an index does not call the authorizer
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
