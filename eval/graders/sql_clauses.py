"""Exact set match of two SQL queries: the same clauses, in any order, whatever the values and aliases are.

After Yu et al. 2018 (arXiv:1809.08887, section 4.2), for data whose databases cannot be had. Where this differs from
their evaluator: it knows no schema, so in a query of several tables a column without its table equals only a column
without its table; and it compares the conditions of joins, which theirs ignores.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

MAX_CHARACTERS = 4000  # of an answer: parsing is recursive
SYMMETRIC = (exp.EQ, exp.NEQ, exp.Add, exp.Mul, exp.Union, exp.Intersect)


@lru_cache(maxsize=8192)
def clauses(sql: str) -> str | None:
    """The query in one spelling: equal for queries with the same sets of clauses. None if it is not one SQL query."""
    if len(sql) > MAX_CHARACTERS:
        return None
    try:
        statements = sqlglot.parse(sql, dialect="sqlite")
        if len(statements) != 1 or not isinstance(statements[0], exp.Query):
            return None
        if any(not select.expressions for select in statements[0].find_all(exp.Select)):
            return None
        return _spelling(statements[0], {})
    except (SqlglotError, RecursionError):
        return None


def _spelling(node: exp.Expr, tables: dict[str, str]) -> str:
    """tables: real names of the aliases in scope; of "", the name of the table that stands alone in the query."""
    if isinstance(node, exp.Select):
        return _select(node, tables)
    if isinstance(node, exp.Connector):
        return _joined(type(node).__name__, (_spelling(part, tables) for part in node.flatten()))
    if isinstance(node, exp.Column):
        if node.this.args.get("quoted") and not node.table:  # SQLite reads "x" as a text where no column has the name
            return "value"
        table = tables.get(node.table.lower(), node.table.lower()) if node.table else ""
        return f"{'' if table == tables.get('') else table}.{node.name.lower()}"
    if isinstance(node, (exp.Literal, exp.Boolean, exp.Null)):
        return "value"
    if isinstance(node, exp.Neg) and isinstance(node.this, exp.Literal):
        return "value"
    if isinstance(node, exp.Table):
        return node.name.lower()
    if isinstance(node, (exp.Paren, exp.Alias, exp.TableAlias)):
        return _spelling(node.this, tables)
    if isinstance(node, (exp.GT, exp.GTE)):  # a > b is b < a
        name = {"GT": "LT", "GTE": "LTE"}[type(node).__name__]
        return f"{name}({_spelling(node.expression, tables)},{_spelling(node.this, tables)})"
    parts = [_spelling(part, tables) for part in node.iter_expressions()]
    if isinstance(node, SYMMETRIC):
        parts.sort()
    flags = [f"{name}={value}" for name, value in sorted(node.args.items()) if isinstance(value, (str, bool)) and value]
    return f"{type(node).__name__}({','.join([*parts, *flags])})"


def _select(node: exp.Select, outer: dict[str, str]) -> str:
    sources = [part.this for part in (node.args.get("from_"), *(node.args.get("joins") or ())) if part is not None]
    plain = [source for source in sources if isinstance(source, exp.Table)]
    tables = {alias: name for alias, name in outer.items() if alias}  # a query inside another may name its tables
    tables |= {source.alias_or_name.lower(): source.name.lower() for source in plain}
    if len(sources) == len(plain) == 1:
        tables[""] = plain[0].name.lower()

    def of(parts: Iterable[exp.Expr]) -> list[str]:
        return [_spelling(part, tables) for part in parts]

    conditions = [join.args["on"] for join in node.args.get("joins") or () if join.args.get("on")]
    where, having = node.args.get("where"), node.args.get("having")
    group, order = node.args.get("group"), node.args.get("order")
    clauses = [
        _joined("distinct select" if node.args.get("distinct") else "select", of(node.expressions)),
        _joined("from", of(sources)),
        _joined("on", of(part for on in conditions for part in _conjuncts(on))),
        _joined("where", of(_conjuncts(where.this)) if where else ()),
        _joined("group", of(group.expressions) if group else ()),
        _joined("having", of(_conjuncts(having.this)) if having else ()),
        f"order({','.join(of(order.expressions)) if order else ''})",
        "limit" if node.args.get("limit") else "",
    ]
    return "; ".join(clauses)


def _conjuncts(condition: exp.Expr) -> Iterable[exp.Expr]:
    return condition.flatten() if isinstance(condition, exp.And) else (condition,)


def _joined(name: str, parts: Iterable[str]) -> str:
    return f"{name}({','.join(sorted(parts))})"
