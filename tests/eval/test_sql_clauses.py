"""Exact set match: what may differ between two queries, and what may not."""

from __future__ import annotations

import pytest

pytest.importorskip("sqlglot")

from eval import graders
from eval.graders.sql_clauses import MAX_CHARACTERS, clauses

SAME = {
    "case and space": ("SELECT  Name FROM Singer", "select name from singer;"),
    "values": ("SELECT a FROM t WHERE b = 'x' AND c > 3", 'SELECT a FROM t WHERE b = "y" AND c > -4'),
    "order of columns": ("SELECT a, b FROM t", "SELECT b, a FROM t"),
    "order of conditions": (
        "SELECT a FROM t WHERE b = 1 AND c = 2 AND d = 3",
        "SELECT a FROM t WHERE d=1 AND b=1 AND c=1",
    ),
    "order of alternatives": ("SELECT a FROM t WHERE b = 1 OR c = 2", "SELECT a FROM t WHERE c = 2 OR b = 1"),
    "aliases": (
        "SELECT T1.a FROM x AS T1 JOIN y AS T2 ON T1.i = T2.j WHERE T2.c = 1",
        "SELECT u.a FROM y AS v JOIN x AS u ON v.j = u.i WHERE v.c = 2",
    ),
    "a table that needs no name": ("SELECT t.a FROM t WHERE t.b > 1", "SELECT a FROM t WHERE b > 1"),
    "inside another query": (
        "SELECT a FROM t WHERE b NOT IN (SELECT s.b FROM s)",
        "SELECT a FROM t WHERE b NOT IN (SELECT b FROM s)",
    ),
    "the other way round": ("SELECT a FROM t WHERE b > 1", "SELECT a FROM t WHERE 1 < b"),
    "union": ("SELECT a FROM t UNION SELECT b FROM u", "SELECT b FROM u UNION SELECT a FROM t"),
    "ascending": ("SELECT a FROM t ORDER BY a", "SELECT a FROM t ORDER BY a ASC"),
}
OTHER = {
    "column": ("SELECT a FROM t", "SELECT b FROM t"),
    "table": ("SELECT a FROM t", "SELECT a FROM s"),
    "aggregate": ("SELECT max(a) FROM t", "SELECT min(a) FROM t"),
    "distinct": ("SELECT DISTINCT a FROM t", "SELECT a FROM t"),
    "distinct inside": ("SELECT count(DISTINCT a) FROM t", "SELECT count(a) FROM t"),
    "comparison": ("SELECT a FROM t WHERE b > 1", "SELECT a FROM t WHERE b < 1"),
    "and for or": ("SELECT a FROM t WHERE b = 1 AND c = 2", "SELECT a FROM t WHERE b = 1 OR c = 2"),
    "negation": ("SELECT a FROM t WHERE b IN (SELECT c FROM s)", "SELECT a FROM t WHERE b NOT IN (SELECT c FROM s)"),
    "direction": ("SELECT a FROM t ORDER BY b DESC", "SELECT a FROM t ORDER BY b"),
    "order of sorting": ("SELECT a FROM t ORDER BY b, c", "SELECT a FROM t ORDER BY c, b"),
    "limit": ("SELECT a FROM t ORDER BY b LIMIT 1", "SELECT a FROM t ORDER BY b"),
    "group": ("SELECT a FROM t GROUP BY a", "SELECT a FROM t"),
    "having": ("SELECT a FROM t GROUP BY a HAVING count(*) > 1", "SELECT a FROM t GROUP BY a"),
    "except is not symmetric": ("SELECT a FROM t EXCEPT SELECT b FROM u", "SELECT b FROM u EXCEPT SELECT a FROM t"),
    "difference is not symmetric": ("SELECT a - b FROM t", "SELECT b - a FROM t"),
    "union all": ("SELECT a FROM t UNION ALL SELECT b FROM u", "SELECT a FROM t UNION SELECT b FROM u"),
    "tables of two": (
        "SELECT T1.a FROM x AS T1 JOIN y AS T2 ON T1.i = T2.i",
        "SELECT T2.a FROM x AS T1 JOIN y AS T2 ON T1.i = T2.i",
    ),
    "column of the outer query": (
        "SELECT a FROM t WHERE EXISTS (SELECT b FROM s WHERE s.c = t.c)",
        "SELECT a FROM t WHERE EXISTS (SELECT b FROM s WHERE s.c = s.c)",
    ),
}


@pytest.mark.parametrize("pair", SAME.values(), ids=SAME)
def test_queries_with_the_same_clauses_are_equal(pair):
    gold, answer = pair
    assert clauses(gold) is not None and clauses(gold) == clauses(answer)
    assert graders.sql_sets(gold, answer, True).scores["equivalent"] == 1


@pytest.mark.parametrize("pair", OTHER.values(), ids=OTHER)
def test_queries_with_other_clauses_are_not(pair):
    assert None not in map(clauses, pair) and clauses(pair[0]) != clauses(pair[1])


@pytest.mark.parametrize(
    "text",
    ["", "SELECT", "no SQL at all, just words", "DROP TABLE t", "SELECT 1; SELECT 2", "(" * 900 + ")" * 900]
    + ["SELECT " + "a," * MAX_CHARACTERS + "a FROM t"],
    ids=["empty", "unfinished", "words", "drop", "two", "nested", "long"],
)
def test_other_text_is_no_query_and_never_right(text):
    assert clauses(text) is None
    grade = graders.sql_sets(text, text, False)
    assert grade.scores["equivalent"] == 0 and grade.scores["invalid"] == 1
