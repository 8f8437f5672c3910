"""Claims about the SQL grader: hostile SQL changes nothing and stops nothing, and only the gold's rows are right."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from functools import reduce
from operator import add
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.faults.hostile import make_database
from eval.graders import sql, sql_child
from eval.graders.sql import Databases, Result, is_ordered, same_rows
from llm_jepa import UserError
from tests.properties import examples

pytestmark = pytest.mark.skipif(sql.resource is None, reason="needs resource limits (Linux)")
ATTACKS = [json.loads(line) for line in (Path(__file__).parents[1] / "attacks" / "sql.jsonl").read_text().splitlines()]
SPIDER = Path(__file__).parents[3] / "shared" / "data" / "spider"
# Heavy, but finite: 0.3 s of processor time on a slow core.
HEAVY = "SELECT count(*) FROM number a, number b WHERE a.n + b.n > 0"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two databases: `shop` with 30 singers (10 of each country, ages 15 to 21), `zoo` with one."""
    root = tmp_path_factory.mktemp("databases")
    singers = [(i, f"n{i}", 15 + i % 7, ("FR", "US", "NL")[i % 3], i / 3, b"\0\xff") for i in range(1, 31)]
    make_database(root / "shop" / "shop.sqlite", singers)
    make_database(root / "zoo" / "zoo.sqlite", [(1, "Ape", 3, None, 0.5, None)])
    return root


@pytest.fixture(scope="module")
def databases(root):
    with Databases(root, seconds=20) as databases:
        yield databases


def files_under(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


# Attacks


def test_attacks_change_nothing_and_stop_nothing(root, tmp_path, tmp_path_factory, monkeypatch):
    """Each of the 198 ends in the status it should; then every byte is as before, no file is new in any folder that a
    relative or absolute path of an attack could mean, and the same child, or its successor, answers a good query."""
    assert len(ATTACKS) >= 65 and len({attack["name"] for attack in ATTACKS}) == len(ATTACKS)
    monkeypatch.chdir(tmp_path)
    before = files_under(root)
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # what an absolute path means
    folders = {folder: set(os.listdir(folder)) for folder in ("/", os.path.dirname(sql.__file__))}
    wrong = {}
    with Databases(root, seconds=0.25) as databases:
        for attack in ATTACKS:
            expected = [attack["expected"]] if isinstance(attack["expected"], str) else attack["expected"]
            result = databases.run("shop", attack["sql"].replace("ELSEWHERE", str(elsewhere)))
            if result.status not in expected or not result.detail.isprintable() or len(result.detail) > 200:
                wrong[attack["name"]] = (result.status, result.detail, expected)
        assert databases.run("shop", "SELECT count(*), min(name) FROM singer").rows == ((30, "n1"),)
    assert wrong == {}
    assert files_under(root) == before
    assert os.listdir(tmp_path) == [] and os.listdir(elsewhere) == []
    assert {folder: set(os.listdir(folder)) for folder in folders} == folders


def test_a_sort_above_the_heap_limit_runs_out_of_memory_and_not_the_machine(databases):
    """4,000 texts of 90 kB: 360 MB to sort, 256 MB to have."""
    wide = "SELECT printf('%.90000c', 'a') || a.n AS x FROM number a, (SELECT 1 UNION SELECT 2)"
    result = databases.run("shop", f"SELECT length(x) FROM ({wide} ORDER BY 1) LIMIT 1")
    assert (result.status, result.detail) == ("too_large", "out of memory")


def test_100_kb_of_sql_and_what_is_no_text_are_invalid(databases):
    for text in ("SELECT 1" + " " * 100_000, "SELECT '" + "\U0001f600" * 2_500 + "'", None, 3, b"SELECT 1"):
        assert databases.run("shop", text).status == "invalid"
    assert databases.run("shop", "SELECT 1" + " " * (10_000 - 8)).rows == ((1,),)


def test_the_child_has_limits_and_none_of_the_parent_s_secrets(root, monkeypatch):
    if not Path("/proc/self/limits").exists():
        pytest.skip("no /proc")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Databases(root) as databases:
        databases.run("shop", "SELECT 1")
        process = Path(f"/proc/{databases._child.pid}")
        limits = dict(re.findall(r"^Max (.+?) {2,}(\S+ +\S+)", (process / "limits").read_text(), re.MULTILINE))
        assert {name: limits[name].split() for name in ("file size", "core file size", "processes")} == {
            "file size": ["0", "0"],
            "core file size": ["0", "0"],
            "processes": ["0", "0"],
        }
        assert int(limits["address space"].split()[1]) <= 1 << 30 and int(limits["open files"].split()[1]) <= 16
        assert b"hf_secret" not in (process / "environ").read_bytes()


def test_local_time_is_utc_wherever_the_machine_stands(root, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    with Databases(root) as databases:
        row = databases.run("shop", "SELECT datetime('2020-07-01 12:00', 'localtime')").rows[0]
    assert row == ("2020-07-01 12:00:00",)


def test_database_ids_that_leave_the_root_are_refused(root, databases, tmp_path):
    make_database(tmp_path / "outside" / "outside.sqlite", [])
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "filelink").mkdir()
    (root / "filelink" / "filelink.sqlite").symlink_to(tmp_path / "outside" / "outside.sqlite")
    (tmp_path / "outside" / "linked.sqlite").write_bytes((tmp_path / "outside" / "outside.sqlite").read_bytes())
    (root / "folder" / "folder.sqlite").mkdir(parents=True)
    bad = [
        "../shop",
        "/etc/passwd",
        str(root / "shop"),
        "shop/../zoo",
        "shop\0",
        "shop\n",
        "",
        ".",
        "..",
        "-x",
        "a" * 300,
    ]
    bad += ["shop.sqlite", "shop?mode=rwc", "%2e%2e", "shop#", "sh op", "é", "\ud800", "C:\\x", "~", None, 7]
    for db_id in (*bad, "linked", "filelink", "folder", "nowhere"):
        with pytest.raises(UserError, match="not a database id|outside|missing") as raised:
            databases.run(db_id, "SELECT 1")
        assert len(str(raised.value)) < 500


def damaged():
    def page(data, at, value):
        return data[:at] + value + data[at + len(value) :]

    return {
        "empty": lambda data: b"",
        "text": lambda data: b"CREATE TABLE singer (id);\n" * 100,
        "header only": lambda data: data[:100],
        "magic only": lambda data: data[:16] + bytes(len(data) - 16),
        "cut in the schema": lambda data: data[:600],
        "schema page of noise": lambda data: page(data, 100, bytes(range(256)) * 15),
        "page size 0": lambda data: page(data, 16, b"\0\0"),
        "schema text": lambda data: data.replace(b"CREATE TABLE", b"CREATE TABEL"),
    }


@pytest.mark.parametrize("damage", damaged())
def test_a_damaged_database_is_the_evaluator_s_fault(root, tmp_path, damage):
    """Never a pass, not even for an answer that is the gold."""
    data = damaged()[damage]((root / "shop" / "shop.sqlite").read_bytes())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.sqlite").write_bytes(data)
    with Databases(tmp_path) as databases, pytest.raises(UserError, match="cannot be read"):
        databases.grade("bad", "SELECT count(*) FROM singer", "SELECT count(*) FROM singer")


def test_every_damaged_page_gives_rows_or_a_user_error(root, tmp_path):
    """Noise in one page after the other: nothing but a UserError is raised, and the child's death is not one."""
    data = (root / "shop" / "shop.sqlite").read_bytes()
    path = tmp_path / "bad" / "bad.sqlite"
    path.parent.mkdir()
    seen = set()
    with Databases(tmp_path) as databases:
        for start in range(0, len(data), 4096):
            path.write_bytes(
                data[:start] + bytes((i * 37 + start // 4096) % 256 for i in range(4096)) + data[start + 4096 :]
            )
            for query in (
                "SELECT * FROM singer",
                "SELECT sum(n) FROM number",
                "SELECT name FROM singer WHERE age = 16",
            ):
                try:
                    result = databases.run("bad", query)
                    assert "died" not in result.detail
                    seen.add(result.status)
                except UserError:
                    seen.add("user error")
    assert {"ok", "user error"} <= seen


def test_changes_beside_the_database_are_not_read_past(root, tmp_path):
    """A file in WAL mode whose last writer did not close: immutable=1 would show the rows before, without a word."""
    path = tmp_path / "open" / "open.sqlite"
    make_database(path, [])
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO number VALUES (1)")
    writer.commit()
    with Databases(tmp_path) as databases:
        with pytest.raises(UserError, match="open.sqlite-wal holds changes"):
            databases.run("open", "SELECT 1")
        writer.close()
        assert databases.run("open", "SELECT count(*) FROM number").rows == ((2001,),)


# The child


def test_a_child_killed_between_queries_is_replaced(root):
    with Databases(root) as databases:
        databases.run("shop", "SELECT 1")
        first = databases._child
        os.kill(first.pid, signal.SIGKILL)
        assert databases.run("zoo", "SELECT name FROM singer").rows == (("Ape",),)
        assert databases._child.pid != first.pid


def test_a_child_killed_within_a_query_is_no_fault_of_the_query(root):
    with Databases(root, seconds=20) as databases:
        databases.run("shop", "SELECT 1")
        first = databases._child
        killer = threading.Timer(0.05, os.kill, (first.pid, signal.SIGKILL))
        killer.start()
        result = databases.run("shop", HEAVY)
        killer.join()
        assert result.rows == ((2000 * 2000 - 1,),) and databases._child.pid != first.pid


def test_a_child_that_stands_still_is_a_time_out_and_is_replaced(root, monkeypatch):
    with Databases(root, seconds=0.1) as databases:
        databases.run("shop", "SELECT 1")
        first = databases._child
        os.kill(first.pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(sql, "WALL_MARGIN_S", 0)
            assert databases.run("shop", "SELECT 1") == Result("timeout", detail="over 0.1 s")
        assert first.returncode == -signal.SIGKILL
        assert databases.run("shop", "SELECT 2").rows == ((2,),)


def test_an_interrupted_query_s_reply_is_not_taken_for_the_next_one_s(root):
    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Databases(root, seconds=20) as databases:
            databases.run("shop", "SELECT 1")
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupted):
                databases.run("shop", HEAVY)
            assert databases.run("shop", "SELECT 'next'").rows == (("next",),)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    "reply",
    [
        b"'nonsense\\n'",
        b"'[' * 100000 + '\\n'",
        b'\'["ok", 2, "", [[1]]]\\n\'',
        b'\'["passed", 1, "", [[1]]]\\n\'',
        b'\'["ok", 1, "", [[{"__reduce__": 1}]]]\\n\'',
        b'\'["ok", 1, "", [[1]]]\\n["ok", 1, "", [[1]]]\\n\'',
        b"'x' * 10**7",
    ],
)
def test_a_child_that_was_taken_over_can_only_fail(root, monkeypatch, reply):
    """Replies of another program in the child's place: no exception, and no gold that passes."""

    def stand_in():
        program = b"import sys; sys.stdin.readline(); print(" + reply + b", end='', flush=True); sys.stdin.readline()"
        return subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, bufsize=0)

    monkeypatch.setattr(sql, "_start", stand_in)
    with Databases(root, max_rows=10, max_bytes=1000) as databases:
        assert databases.run("shop", "SELECT 1") == Result("error", detail="the process running it died twice")
        with pytest.raises(UserError, match="gold query of database shop fails"):
            databases.grade("shop", "SELECT 1", "SELECT 1")


def test_no_child_is_left_behind(root):
    with Databases(root) as databases:
        databases.run("shop", "SELECT 1")
        child = databases._child
        assert child.poll() is None
    assert child.returncode is not None and child.stdin.closed and child.stdout.closed
    forgotten = Databases(root)
    forgotten.run("shop", "SELECT 1")
    child = forgotten._child
    child.stdin.close()  # as when the parent dies
    assert child.wait(timeout=30) == 0
    forgotten.close()


def test_where_there_are_no_limits_there_is_no_grader(root, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        Databases(tmp_path / "nothing")
    monkeypatch.setattr(sql, "resource", None)
    with pytest.raises(UserError, match="needs Linux"):
        Databases(root)


def test_two_databases_in_turn(databases):
    query = "SELECT count(*) FROM singer"
    assert [databases.run(db, query).rows for db in ("shop", "zoo") * 3] == [((30,),), ((1,),)] * 3


def test_caps_hold_to_the_row_the_byte_and_the_cell(root, databases):
    """7 rows may be, 8 may not. As JSON a row [0] is 3 bytes, so 5 of them are 15."""
    with Databases(root, max_rows=7) as capped:
        assert len(capped.run("shop", "SELECT n FROM number LIMIT 7").rows) == 7
        assert capped.run("shop", "SELECT n FROM number LIMIT 8").status == "too_large"
    with Databases(root, max_bytes=15) as capped:
        assert len(capped.run("shop", "SELECT 0 FROM number LIMIT 5").rows) == 5
        assert capped.run("shop", "SELECT 0 FROM number LIMIT 6").status == "too_large"
    half = "printf('%.50000c', 'a')"
    assert len(databases.run("shop", f"SELECT {half} || {half}").rows[0][0]) == 100_000
    assert databases.run("shop", f"SELECT {half} || {half} || 'a'").status == "too_large"


CELLS = [0, -1, 2**63 - 1, -(2**63), 0.1, -1e-300, 1e308, math.inf, None, "", "é\n\0'", "\udcff", b"", b"\0\xff"]


def test_cells_cross_the_pipe_unchanged(tmp_path):
    """Every type and edge, NaN excepted (SQLite stores NULL); text that is not UTF-8 byte for byte."""
    path = tmp_path / "cells" / "cells.sqlite"
    make_database(path, [])
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE cell (x)")
    for cell in CELLS:
        text = cell.encode("utf-8", "surrogateescape") if isinstance(cell, str) else None
        connection.execute(
            "INSERT INTO cell VALUES (CAST(? AS TEXT))" if text is not None else "INSERT INTO cell VALUES (?)",
            (text if text is not None else cell,),
        )
    connection.commit()
    connection.close()
    with Databases(tmp_path) as databases:
        cells = [cell for (cell,) in databases.run("cells", "SELECT x FROM cell ORDER BY rowid").rows]
    assert cells == CELLS and [type(cell) for cell in cells] == [type(cell) for cell in CELLS]


def test_what_answers_may_do_they_can_do(databases):
    """No false alarm: joins, views, CTEs, windows, double-quoted text (Spider's golds use it), dates, rowid, VALUES."""
    right = {
        "SELECT count(*) FROM adult": 16,
        "WITH old AS (SELECT * FROM singer WHERE age > 20) SELECT count(*) FROM old": 4,
        "WITH a AS (SELECT 1 x), b AS (SELECT * FROM a) SELECT count(*) FROM b JOIN a": 1,
        "SELECT max(r) FROM (SELECT rank() OVER (ORDER BY age) r FROM singer)": 27,
        'SELECT count(*) FROM singer WHERE country = "FR"': 10,
        "SELECT strftime('%Y', '2020-05-01') - 20": 2000,
        "SELECT count(*) FROM singer WHERE country = 'now' OR name = 'date('": 0,
        "SELECT max(rowid) FROM Singer AS T1": 30,
        "SELECT count(*) FROM (SELECT age FROM singer INTERSECT SELECT n FROM number) WHERE age BETWEEN 16 AND 18": 3,
        "VALUES (5)": 5,
        "SELECT iif(round(avg(rating), 2) = 5.17, 1, 0) FROM singer": 1,
        "SELECT CAST(length(photo) AS TEXT) = '2' FROM singer WHERE name LIKE 'n_' AND id IN (3)": 1,
        " \n SELECT 7 ; ;\t\n": 7,
        "SELECT 8; -- done": 8,
    }
    assert {query: databases.run("shop", query) for query in right} == {
        query: Result("ok", 1, ((value,),)) for query, value in right.items()
    }


# Comparison


def rows(*rows, columns=None):
    return Result("ok", len(rows[0]) if columns is None else columns, tuple(rows))


@pytest.mark.parametrize(
    ("gold", "answer", "unordered", "ordered"),
    [
        (rows((1, "a"), (2, "b")), rows((2, "b"), (1, "a")), True, False),
        (rows((1,), (1,), (2,)), rows((1,), (2,), (2,)), False, False),  # duplicates count
        (rows((1,), (1,)), rows((1,)), False, False),
        (rows((1, 2)), rows((2, 1)), False, False),  # columns by position
        (rows((1, "a"), (2, "b")), rows((1, "b"), (2, "a")), False, False),  # the same columns, other rows
        (rows((3,)), rows((3.0,)), True, True),
        (rows((3,)), rows(("3",)), False, False),
        (rows((3.5,)), rows(("3.5",)), False, False),
        (rows((None,)), rows((None,)), True, True),
        (rows((None,)), rows((0,)), False, False),
        (rows((None,)), rows(("None",)), False, False),
        (rows(("",)), rows((None,)), False, False),
        (rows((b"a",)), rows(("a",)), False, False),
        (rows((b"a\0",)), rows((b"a\0",)), True, True),
        (rows(("a",)), rows(("A",)), False, False),
        (rows((0.1 + 0.2,)), rows((0.3,)), True, True),
        (rows((0.1 + 0.2 - 0.3,)), rows((0,)), True, True),  # 5.6e-17
        (rows((-0.0,)), rows((0,)), True, True),
        (rows((1e15 / 3,)), rows((1e15 / 3 - 0.125,)), True, True),  # below the 12th digit
        (rows((1.000001,)), rows((1.0,)), False, False),
        (rows((123456.78,)), rows((123456.79,)), False, False),
        (rows((2**53 + 1,)), rows((2**53,)), False, False),  # equal as floats
        (rows((123456789012345,)), rows((123456789012345.0,)), True, True),  # above 12 digits, but whole
        (rows((123456789012345,)), rows((123456789012346.0,)), False, False),
        (rows((math.inf,)), rows((-math.inf,)), False, False),
        (rows((math.inf,)), rows((math.inf,)), True, True),
        (rows((math.inf,)), rows(("inf",)), False, False),
        (rows(("a', 'b",)), rows(("a", "b")), False, False),
        (rows(("a\nb",), ("c",)), rows(("a",), ("b\nc",)), False, False),
        (rows(columns=2), rows(columns=2), True, True),
        (rows(columns=2), rows(columns=1), False, False),  # no row, but another shape
        (rows(columns=1), rows((1,)), False, False),
        (rows((1,)), Result("error", 1, ((1,),)), False, False),
    ],
)
def test_same_rows_worked_by_hand(gold, answer, unordered, ordered):
    assert same_rows(gold, answer, ordered=False) is unordered
    assert same_rows(gold, answer, ordered=True) is ordered
    if answer.status == "ok":
        assert same_rows(answer, gold, ordered=False) is unordered


def test_a_failed_gold_is_matched_by_nothing():
    for status in sql.STATUSES[1:]:
        with pytest.raises(ValueError, match="the gold query failed"):
            same_rows(Result(status), Result(status), ordered=False)


def equal_cells(one, other):
    """Another way to say when cells are equal, for numbers apart enough not to meet a rounding edge."""
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return one == other or abs(one - other) < 1e-10
    return type(one) is type(other) and one == other


def matched(gold, answer):
    """Multiset equality by striking out one row after the other."""
    left = list(answer)
    for row in gold:
        for candidate in left:
            if all(map(equal_cells, row, candidate)):
                left.remove(candidate)
                break
        else:
            return False
    return not left


cells = st.sampled_from([0, 1, 2, 1.0, 0.5, 0.5 + 1e-13, 2.0, "1", "a", "", None, b"a", b""])
tables = st.integers(1, 2).flatmap(
    lambda width: st.tuples(*[st.lists(st.tuples(*[cells] * width), max_size=4).map(tuple)] * 2)
)


@examples(300)
@given(tables, st.randoms(use_true_random=False))
def test_same_rows_agrees_with_striking_out(pair, random):
    gold, answer = pair
    width = len((gold or answer or ((1,),))[0])
    shuffled = tuple(random.sample(gold, len(gold)))
    for other in (answer, shuffled):
        assert same_rows(Result("ok", width, gold), Result("ok", width, other), ordered=False) == matched(gold, other)
        in_order = len(gold) == len(other) and all(
            all(map(equal_cells, *pair)) for pair in zip(gold, other, strict=True)
        )
        assert same_rows(Result("ok", width, gold), Result("ok", width, other), ordered=True) == in_order


@examples(100)
@given(st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_sums_in_another_order_are_the_same_and_other_sums_are_not(units, random):
    """Numbers of 4 decimals below 10^5. Their sums stay below 10^7 and are compared to 5 decimals; 30 additions err by
    30 x 2^-31 = 1.4e-8 at most, far from the edge half way between two multiples of 0.0001."""
    numbers = [unit / 10_000 for unit in units]
    one = reduce(add, numbers)
    other = reduce(add, random.sample(numbers, len(numbers)))
    assert same_rows(rows((one,)), rows((other,)), ordered=True)
    assert not same_rows(rows((one,)), rows((other + 0.0001,)), ordered=True)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n\tby a desc limit 3;", True),
        ("SELECT a FROM t ORDER/* x */BY a", True),
        ("SELECT a FROM t ORDER -- x\n BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("WITH x AS (SELECT 1) SELECT * FROM x ORDER BY 1", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a) ORDER BY a", True),
        ("SELECT ')' FROM t ORDER BY 1", True),
        ('SELECT "(" FROM t ORDER BY 1', True),
        ("SELECT [(] FROM t ORDER BY 1", True),
        ("SELECT a /* ( */ FROM t ORDER BY 1", True),
        ("SELECT 'it''s (' FROM t ORDER BY 1", True),
        ("SELECT a FROM t", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)", False),
        ("SELECT a FROM t WHERE a = (SELECT b FROM u ORDER BY b LIMIT 1)", False),
        ("WITH x AS (SELECT 1 ORDER BY 1) SELECT * FROM x", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("SELECT sum(a) OVER w FROM t WINDOW w AS (PARTITION BY b ORDER BY a)", False),
        ("SELECT group_concat(a ORDER BY b) FROM t", False),
        ("SELECT 'x' FROM t WHERE a = 'ORDER BY a'", False),
        ('SELECT "order by" FROM t', False),
        ("SELECT [order by] , `order by` FROM t", False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT a FROM t /* ORDER BY a */", False),
        ("SELECT a FROM t /* ORDER BY a", False),
        ("SELECT a FROM t WHERE b = 'it''s ORDER BY", False),
        ("SELECT border, byte FROM t GROUP BY a", False),
        ("SELECT a FROM t WHERE reorder BY", False),
        ('SELECT a AS "order" FROM t GROUP BY a', False),
        ("", False),
    ],
)
def test_is_ordered_worked_by_hand(query, expected):
    assert is_ordered(query) is expected


noise = st.sampled_from(
    ["a", "'order by'", '"order by ("', "`)`", "[(order by]", "-- order by )\n", "/* ( order by */", "''"]
)
bracket = st.recursive(
    noise, lambda inner: st.lists(inner | st.just("ORDER BY b"), max_size=3).map(lambda x: f"({' '.join(x)})")
)


@examples(200)
@given(st.lists(noise | bracket, max_size=6), st.booleans(), st.data())
def test_only_an_order_by_outside_every_bracket_orders(pieces, ordered, data):
    if ordered:
        words = data.draw(st.sampled_from(["ORDER BY", "order  by", "Order/* ) */By", "ORDER--(\nBY"]))
        pieces.insert(data.draw(st.integers(0, len(pieces))), words)
    assert is_ordered("SELECT " + " ".join(pieces)) is ordered


def golds():
    for path in sorted(SPIDER.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            yield json.loads(line)["messages"][-1]["content"]


@pytest.mark.skipif(not SPIDER.is_dir(), reason="no Spider data")
def test_spider_s_golds_use_allowed_functions_and_order_where_they_say():
    """Oracle: cut out strings, then innermost brackets until none is left; what is ordered still says so. Looking for
    "order by" anywhere would be wrong on 20 of the 4,525."""
    unique = set(golds())
    assert len(unique) == 4525
    disagree, ordered = [], 0
    for gold in unique:
        plain = re.sub(r"'(?:[^']|'')*'|\"[^\"]*\"", "x", gold.lower())
        names = set(re.findall(r"(\w+)\s*\(", plain)) - {"in", "from", "distinct", "by", "between"}
        assert names <= sql_child.FUNCTIONS, gold
        assert sql._refusal(gold) is None, gold
        while "(" in plain:
            plain = re.sub(r"\([^()]*\)", "x", plain)
        ordered += "order by" in plain
        if ("order by" in plain) != is_ordered(gold):
            disagree.append(gold)
    assert disagree == [] and ordered == 1043


# Grades


def test_grades_worked_by_hand(databases):
    gold = "SELECT country, count(*) FROM singer WHERE age > 15 GROUP BY country"
    right = databases.grade(
        "shop",
        gold,
        "SELECT c, n FROM (SELECT country c, count(*) * 1.0 n FROM singer WHERE 15 < age GROUP BY 1) ORDER BY n DESC;",
    )
    assert (right.correct, right.status, right.detail) == (True, "ok", "")
    wrong = databases.grade("shop", gold, "SELECT country FROM singer WHERE age > 15")
    assert (wrong.correct, wrong.status) == (False, "ok")
    assert wrong.detail == "other rows: 26 x 1, gold 3 x 2 (rows x columns)"
    ordered = "SELECT name FROM singer WHERE id < 4 ORDER BY id DESC"
    assert databases.grade("shop", ordered, "SELECT name FROM singer WHERE id < 4 ORDER BY -id").correct
    backward = databases.grade("shop", ordered, "SELECT name FROM singer WHERE id < 4 ORDER BY id")
    assert not backward.correct and backward.detail.endswith("(rows x columns, ordered)")
    assert databases.grade(
        "shop", ordered.removesuffix(" ORDER BY id DESC"), "SELECT name FROM singer WHERE id < 4 ORDER BY -id"
    ).correct


def test_nothing_printed_is_not_a_match(databases):
    """The published evaluator's trap: its stdout is empty for a failing query and for a gold without rows alike."""
    empty = "SELECT name FROM singer WHERE age > 900"
    assert databases.grade("shop", empty, "SELECT country FROM singer WHERE id < 0").correct
    for answer in ("SELEC name", "SELECT nothing FROM singer", "", "DROP TABLE singer", "SELECT 1; SELECT 2", "\0"):
        grade = databases.grade("shop", empty, answer)
        assert not grade.correct and grade.status != "ok" and grade.detail
    assert not databases.grade("shop", empty, "SELECT name, age FROM singer WHERE age > 900").correct


@pytest.mark.parametrize(
    "gold", ["SELECT nothing FROM singer", "", "DROP TABLE singer", "SELECT 1; SELECT 2", "SELECT random()"]
)
def test_a_gold_that_fails_is_told_and_never_matched(databases, gold):
    with pytest.raises(UserError, match="gold query of database shop fails"):
        databases.grade("shop", gold, gold)


def test_a_gold_that_needs_too_long_or_too_much_is_told(root):
    with Databases(root, seconds=0.05, max_rows=5) as databases:
        for gold in ("SELECT count(*) FROM number a, number b, number c", "SELECT * FROM number"):
            with pytest.raises(UserError, match="timeout|too_large"):
                databases.grade("shop", gold, gold)


def test_a_missing_database_makes_nothing_right(databases):
    with pytest.raises(UserError, match="Database nowhere is missing"):
        databases.grade("nowhere", "SELECT 1", "SELECT 1")


def test_answer_keys_are_equal_where_results_are(databases):
    """Consistency counts equal keys: other SQL with the same rows has the same, other rows or failures have not."""

    def key(answer, gold="SELECT id FROM singer WHERE id < 3"):
        return databases.grade("shop", gold, answer).answer_key

    same = [
        "SELECT id FROM singer WHERE id < 3",
        "SELECT id * 1.0 AS x FROM singer WHERE id <= 2 ORDER BY -id",
        "VALUES (2), (1)",
    ]
    assert len({key(answer) for answer in same}) == 1
    different = ["SELECT 1", "SELECT '1'", "SELECT 1, 1", "SELECT 1 UNION ALL SELECT 1", "SELECT NULL", "SELECT x'31'"]
    different += [
        "SELECT 1 WHERE 0",
        "SELECT 1, 1 WHERE 0",
        "SELECT a FROM singer",
        "SELECT b FROM singer",
        "DELETE FROM singer",
        "",
    ]
    keys = [key(answer) for answer in (*same[:1], *different)]
    assert len(set(keys)) == len(keys) and all(re.fullmatch(r"[0-9a-f]{64}", key) for key in keys)
    assert key("SELECT a FROM singer") == key("SELECT a  FROM singer")  # the same message
    up, down = "SELECT id FROM singer WHERE id < 3 ORDER BY id", "SELECT id FROM singer WHERE id < 3 ORDER BY -id"
    assert key(up) == key(down) and key(up, gold=up) != key(down, gold=up)


def test_time_outs_look_alike_whoever_ends_the_query(root):
    """Ended by the progress handler, or by the kernel where that is not called: one key, or consistency were luck."""
    opcode = next(attack["sql"] for attack in ATTACKS if attack["name"] == "doubling of CTEs")
    with Databases(root, seconds=0.1) as databases:
        loop = databases.grade("shop", "SELECT 1", "SELECT count(*) FROM number a, number b, number c")
        child = databases._child
        kernel = databases.grade("shop", "SELECT 1", opcode)
        assert child.returncode == -signal.SIGPROF
    assert loop.status == "timeout" and loop == kernel


def test_time_outs_count_processor_time(root):
    """While the child is stopped for longer than the limit, in mid-query, the query's clock stands still, too."""
    with Databases(root, seconds=1.5) as databases:
        databases.run("shop", "SELECT 1")
        pid = databases._child.pid
        timers = [
            threading.Timer(0.05, os.kill, (pid, signal.SIGSTOP)),
            threading.Timer(1.8, os.kill, (pid, signal.SIGCONT)),
        ]
        for timer in timers:
            timer.start()
        result = databases.run("shop", HEAVY)
        for timer in timers:
            timer.join()
        assert result.status == "ok" and databases._child.pid == pid
