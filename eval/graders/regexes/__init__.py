r"""Do two regexes of NL-RX (Locascio et al. 2016) denote the same language? Exact, and safe on whatever a model writes.

The published evaluators compare strings (LLM-JEPA) or automata of dk.brics (Locascio et al.). To the first, `[ab]` and
`a|b` differ; the second reads `\b` as the letter b. Python's `re` does not help: it silently takes `&` and `~` for
literals, and it backtracks for hours on `(a+)+b`.

Method:
  The derivative of an expression by a letter denotes the rests of lines that may follow that letter (Brzozowski 1964,
  with `&` and `~`). If expressions are simplified and hash-consed, each has finitely many derivatives. They are the
  states of its automaton.
  Letters that no class distinguishes are read once (minterms; Owens et al. 2009).
  Two languages are compared by bisimulation with union-find (Hopcroft & Karp 1971). The key of a language is the hash
  of its minimal automaton (Hopcroft 1971).
  `\b` depends on the characters on both sides. So a state is an expression *and* whether a word character was read
  last (location-based derivatives; Moseley et al. 2023).

Dialect, loosest first. A regex must match the whole line.
  `r|s` union, a missing side is the empty string; `r&s` intersection; `rs` concatenation
  `r*  r+  r?  r{m}  r{m,}  r{m,n}  r{,n}` (0 to n); they stack: `a+?` is `(a+)?`, since there is no lazy form
  `~r` complement; it binds tighter than `*`, as in dk.brics: `~a*` is `(~a)*`
  `(r)  ()  .  [a-z_]  [^a-z]  \d \w \s \D \W \S` alone or in a class; `\b` and `\B` outside classes
  `\` makes a character literal, unless it is an ASCII letter or digit. All others are literal, also `^ $ @ # " < >`.
Alphabet: every code point that a `str` can hold. Word, digit and space mean the ASCII ones, as in Java and `re.ASCII`:
`\d` is `[0-9]`, so no verdict depends on a version of Unicode. The computation has fewer letters and is still exact: if
neither a class nor `\b` distinguishes two characters, exchanging them never changes whether a line matches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .alphabet import Alphabet
from .automata import minimal_automaton, shortest_difference
from .expressions import Expressions, RegexError
from .parser import parse

__all__ = ["Language", "RegexError", "Verdict", "equivalent", "language", "matches"]


@dataclass(frozen=True)
class Verdict:
    """`counterexample` is a shortest line that exactly one of the two matches, if they differ; `detail` says why."""

    status: Literal["equal", "different", "invalid", "limit"]
    counterexample: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Language:
    """A canonical form: two regexes of the same language have equal ones.

    `key` is a SHA-256 of the minimal automaton: equal iff the languages are, in every process and Python version.
    `num_states` counts the states of that automaton, including the dead one.
    """

    key: str
    num_states: int
    is_empty: bool
    is_everything: bool


def equivalent(gold: str, answer: str, *, limit_s: float = 2.0) -> Verdict:
    r"""Decide whether two regexes match the same lines.

    Never raises. If one of them cannot be decided, `detail` says which and why.

    Args:
        limit_s: CPU seconds of this thread.
    """
    expressions = Expressions(Alphabet(gold, answer), limit_s)
    at_fault = "gold: "
    try:
        gold_root = parse(gold, expressions)
        at_fault = "answer: "
        answer_root = parse(answer, expressions)
        at_fault = ""
        line = shortest_difference(expressions, gold_root, answer_root)
    except RegexError as error:
        return Verdict(error.status, detail=at_fault + str(error))
    if line is None:
        return Verdict("equal")
    winner = "gold" if expressions.matches(gold_root, line) else "answer"
    return Verdict("different", line, f"only the {winner} matches {ascii(line)}")


@lru_cache(maxsize=8192)  # golds and popular answers repeat; errors are not cached
def language(regex: str, *, limit_s: float = 2.0) -> Language:
    """The language of a regex in canonical form. Raises RegexError if it is not of the dialect or meets a bound."""
    expressions = Expressions(Alphabet(regex), limit_s)
    automaton = minimal_automaton(expressions, parse(regex, expressions))
    verdicts = {accepts for accepts, _ in automaton}
    return Language(
        key=hashlib.sha256(repr(automaton).encode()).hexdigest(),
        num_states=len(automaton),
        is_empty=True not in verdicts,
        is_everything=False not in verdicts,
    )


def matches(regex: str, text: str, *, limit_s: float = 2.0) -> bool:
    """Whether `regex` matches all of `text`. Raises RegexError as `language` does."""
    expressions = Expressions(Alphabet(regex), limit_s)
    return expressions.matches(parse(regex, expressions), text)
