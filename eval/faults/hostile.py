"""Hostile inputs: everything that a stranger may have written. Each must be refused in one line or be harmless.

The lists are functions `inputs(shared)` of the modules in this folder (see `inputs.Input`), and the SQL and regular
expressions in tests/attacks/*.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pkgutil
import sqlite3
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from .cases import EXECUTED, HUNG, LOST, SILENT, SKIPPED, SURVIVED, TRACEBACK, WROTE, Case, Outcome
from .inputs import Input, outcome

ATTACKS = Path(__file__).parents[2] / "tests" / "attacks"
LARGEST = 300  # inputs of a list; of a longer list, every n-th
VERDICT = {
    "hung": HUNG, "executed": EXECUTED, "wrote": WROTE, "traceback": TRACEBACK, "died": TRACEBACK, "accepted": SILENT,
}  # fmt: skip
PARTS = 4  # of a list, so that two workers end together
SCHEMA = """
CREATE TABLE singer
    (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, age INTEGER, country TEXT, rating REAL, photo BLOB);
CREATE INDEX singer_age ON singer (age);
CREATE VIEW adult AS SELECT name, age FROM singer WHERE age >= 18;
CREATE TABLE number (n INTEGER);
"""


def cases(work: Path, *, seed: int, quick: bool) -> Iterator[Case]:
    for module in lists():
        kind = f"hostile {module.replace('_', ' ')}"
        for part in range(1 if quick else PARTS):
            yield Case(kind, f"part {part + 1}", try_inputs, (module, part, PARTS, 5 if quick else LARGEST), 1200)
    yield Case("hostile SQL", "all", try_sql, (20 if quick else 1,), 600)
    yield Case("hostile regexes", "all", try_regexes, (20 if quick else 1,), 600)


def lists() -> list[str]:
    """The modules of this folder that have a list of inputs."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    texts = {name: (Path(__file__).parent / f"{name}.py").read_text() for name in names}
    return sorted(name for name, text in texts.items() if "\ndef inputs(" in text)


def try_inputs(folder: Path, module: str, part: int, parts: int, largest: int) -> list[tuple[str, Outcome]]:
    """Try a part of a list, one input after the other, each in a forked process with limits."""
    shared = folder / "shared"
    shared.mkdir()
    given: list[Input] = list(import_module(f"{__package__}.{module}").inputs(shared))
    given = given[:: math.ceil(len(given) / largest)][part::parts]
    return [(each.name, _judge(each, outcome(each, folder / f"{number:04d}"))) for number, each in enumerate(given)]


def _judge(given: Input, found: Any) -> Outcome:
    wrong = found.fault(given)
    return Outcome(SURVIVED) if wrong is None else Outcome(VERDICT.get(found.kind, LOST), wrong)


# -- answers that a grader runs ---------------------------------------------------------------------------------------


def _attacks(name: str) -> list[dict[str, Any]] | None:
    path = ATTACKS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None


def try_sql(folder: Path, every: int) -> list[tuple[str, Outcome]] | Outcome:
    """Run hostile SQL as the grader does. Nothing may change, and no file may appear."""
    from ..graders.sql import Databases, resource

    attacks = _attacks("sql")
    if attacks is None or resource is None:
        return Outcome(SKIPPED, "tests/attacks of the repository and resource limits (Linux) are needed")
    root, elsewhere, here = folder / "databases", folder / "elsewhere", folder / "here"
    for path in (elsewhere, here):
        path.mkdir()
    os.chdir(here)
    singers = [(i, f"n{i}", 15 + i % 7, ("FR", "US", "NL")[i % 3], i / 3, b"\0\xff") for i in range(1, 31)]
    make_database(root / "shop" / "shop.sqlite", singers)
    before, results = _state(root), []
    with Databases(root, seconds=0.25) as databases:
        for attack in attacks[::every]:
            found = databases.run("shop", attack["sql"].replace("ELSEWHERE", str(elsewhere)))
            wanted = attack["expected"]
            is_right = found.status in ([wanted] if isinstance(wanted, str) else wanted) and found.detail.isprintable()
            verdict = Outcome(SURVIVED) if is_right else Outcome(LOST, f"{found.status}: {found.detail}")
            if _state(root) != before or list(elsewhere.iterdir()) or list(here.iterdir()):
                verdict = Outcome(WROTE, "a file has changed")
                before = _state(root)
            results.append((attack["name"], verdict))
        rows = databases.run("shop", "SELECT count(*), min(name) FROM singer").rows
    results.append(("a good query afterwards", Outcome(SURVIVED if rows == ((30, "n1"),) else LOST, str(rows))))
    return results


def make_database(path: Path, singers: list[tuple[Any, ...]], *, numbers: int = 2000) -> None:
    """A database of SCHEMA with these rows and the numbers below `numbers`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    connection.executemany("INSERT INTO singer VALUES (?, ?, ?, ?, ?, ?)", singers)
    connection.executemany("INSERT INTO number VALUES (?)", [(n,) for n in range(numbers)])
    connection.commit()
    connection.close()


def _state(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def try_regexes(folder: Path, every: int) -> list[tuple[str, Outcome]] | Outcome:
    """Compare hostile regular expressions as the grader does. Each must end in the verdict that it should."""
    from ..graders.regexes import equivalent

    attacks = _attacks("regexes")
    if attacks is None:
        return Outcome(SKIPPED, "tests/attacks of the repository is needed")
    results = []
    for attack in attacks[::every]:
        regex = attack["regex"] * attack.get("times", 1)
        found = equivalent(regex, attack.get("other", regex), limit_s=60)
        is_right = found.status == attack["expected"]
        results.append((attack["name"], Outcome(SURVIVED) if is_right else Outcome(LOST, f"{found.status}")))
    return results
