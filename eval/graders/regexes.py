r"""Do two regexes of NL-RX (Locascio et al. 2016) denote the same language? Exact, and safe on whatever a model writes.

The published evaluators compare strings (LLM-JEPA) or automata of dk.brics (Locascio et al.): to the first, `[ab]` and
`a|b` differ; the second reads `\b` as the letter b. Python's `re` is no help: it takes `&` and `~` for literals without
a word, and backtracks for hours on `(a+)+b`.

Method: the derivative of an expression by a letter denotes what may follow that letter (Brzozowski 1964, with `&` and
`~`). Simplified and hash-consed, an expression has finitely many derivatives: the states of its automaton. Letters that
no class tells apart are read once (minterms; Owens et al. 2009). Equality is bisimulation with union-find (Hopcroft &
Karp 1971), a key the hash of the minimal automaton (Hopcroft 1971). `\b` looks at the characters beside it, so a state
is an expression *and* whether a word character was read last (location-based derivatives; Moseley et al. 2023).

Dialect, loosest first. A regex must match the whole line.
  `r|s` union, a missing side is the empty string; `r&s` intersection; `rs` concatenation
  `r*  r+  r?  r{m}  r{m,}  r{m,n}  r{,n}` (0 to n); they stack: `a+?` is `(a+)?`, there is no lazy form
  `~r` complement; it binds tighter than `*`, as in dk.brics: `~a*` is `(~a)*`
  `(r)  ()  .  [a-z_]  [^a-z]  \d \w \s \D \W \S` alone or in a class; `\b` and `\B` outside classes
  `\` makes any character literal that is no ASCII letter or digit. Others stand for themselves, also `^ $ @ # " < >`.
Alphabet: every code point that a `str` can hold. Word, digit and space mean the ASCII ones, as in Java and `re.ASCII`:
`\d` is `[0-9]`, and no verdict depends on a version of Unicode. The computation has fewer letters and is exact all the
same: exchanging two characters that no class, nor `\b`, tells apart never changes whether a line matches.
"""

from __future__ import annotations

import hashlib
import operator
import string
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from typing import Literal

from llm_jepa import UserError

# The longest gold has 54 characters, the largest automaton of one 161 states. Work counts operands of expressions, as
# they are built: unlike the deadline behind it, it gives the same verdict on a slow or busy machine.
MAX_LENGTH = 500  # characters of a regex
MAX_REPEAT = 200  # m and n of {m,n}
MAX_HEIGHT = 100  # of an expression as a tree; bounds `derivative`, the only recursion
MAX_STATES = 10_000
MAX_WORK = 500_000

State = tuple[int, bool]  # (expression, whether a word character was read last and the expression can tell)


class RegexError(UserError):
    """No verdict: the text is not of the dialect (status "invalid"), or a bound was met first ("limit")."""

    def __init__(self, status: Literal["invalid", "limit"], message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Verdict:
    """`counterexample` is a shortest line that exactly one of the two matches, if they differ; `detail` says why."""

    status: Literal["equal", "different", "invalid", "limit"]
    counterexample: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Language:
    """`key` is equal iff the languages are, in every process, Python and spelling (a SHA-256 of the minimal automaton);
    `num_states` counts the states of that automaton, the dead one included."""

    key: str
    num_states: int
    is_empty: bool
    is_everything: bool


def equivalent(gold: str, answer: str, *, limit_s: float = 2.0) -> Verdict:
    r"""Whether two regexes match the same lines. Never raises: where one has no verdict, `detail` says which and why.

    Args:
        limit_s: CPU seconds of this thread.
    """
    build = _Expressions(_Alphabet(gold, answer), limit_s)
    roots: list[int] = []
    try:
        for regex in (gold, answer):
            roots.append(_parsed(regex, build))
        line = _shortest_difference(build, *roots)
    except RegexError as error:
        return Verdict(error.status, detail=("gold: ", "answer: ", "")[len(roots)] + str(error))
    if line is None:
        return Verdict("equal")
    winner = "gold" if build.matches(roots[0], line) else "answer"
    return Verdict("different", line, f"only the {winner} matches {ascii(line)}")


@lru_cache(maxsize=8192)  # the same golds and the same popular answers come again and again; errors are not kept
def language(regex: str, *, limit_s: float = 2.0) -> Language:
    """What a regex denotes, in canonical form. Raises RegexError if it is not of the dialect or meets a bound."""
    build = _Expressions(_Alphabet(regex), limit_s)
    automaton = _minimal_automaton(build, _parsed(regex, build))
    verdicts = {accepts for accepts, _ in automaton}
    return Language(
        key=hashlib.sha256(repr(automaton).encode()).hexdigest(),
        num_states=len(automaton),
        is_empty=True not in verdicts,
        is_everything=False not in verdicts,
    )


def matches(regex: str, text: str, *, limit_s: float = 2.0) -> bool:
    """Whether `regex` matches all of `text`. Raises RegexError as `language` does."""
    build = _Expressions(_Alphabet(regex), limit_s)
    return build.matches(_parsed(regex, build), text)


# --- letters --------------------------------------------------------------------------------------------------------
def _mask(characters: str) -> int:
    return sum(1 << ord(c) for c in characters)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1


_DIGIT = _mask(string.digits)
_WORD = _mask(string.ascii_letters + string.digits + "_")
_SPACE = _mask(" \t\n\r\f\v")
_SHOWN_FIRST = string.ascii_lowercase + string.digits + string.ascii_uppercase + " _" + string.punctuation


class _Alphabet:
    """The letters: each ASCII character, and blocks of the other code points, cut at every one that a regex names.

    A set of letters is an int, bit i for letter i; letter i begins at code point starts[i]."""

    def __init__(self, *regexes: str):
        named = {ord(c) for regex in regexes for c in regex[:MAX_LENGTH] if not c.isascii()}
        self.starts = sorted({*range(129), *named, *(code + 1 for code in named)} - {0x110000})
        self.full = (1 << len(self.starts)) - 1

    def letter(self, character: str) -> int:
        return bisect_right(self.starts, ord(character)) - 1

    def between(self, first: str, last: str) -> int:
        return (2 << self.letter(last)) - (1 << self.letter(first))

    def example(self, letters: int) -> str:
        """A character of the set that reads well in a counterexample."""
        for character in _SHOWN_FIRST:
            if letters >> ord(character) & 1:
                return character
        letter = next(_bits(letters))
        return "\u00e9" if self.letter("\u00e9") == letter else chr(self.starts[letter])


# --- expressions ----------------------------------------------------------------------------------------------------
_EVERYWHERE = 0b1111  # the four places in a line that `\b` can tell apart: after and before a word character, or not
_AT_BOUNDARY = 0b0110


def _place(after_word: bool, before_word: bool) -> int:
    return 1 << (2 * after_word + before_word)


class _Expressions:
    """Hash-consed expressions: an int each, the same int for expressions that the simplifications show to be equal.

    nodes[e] is (kind, operands); nullable[e] the places where e matches the empty string; looks[e] whether it has a
    `\\b`; height[e] its height as a tree."""

    def __init__(self, alphabet: _Alphabet, limit_s: float):
        self.alphabet = alphabet
        self.limit_s, self.deadline = limit_s, time.thread_time() + limit_s
        self.work, self.next_look_at_clock = 0, 1000
        self.ids: dict[tuple[str, tuple[int, ...]], int] = {}
        self.nodes: list[tuple[str, tuple[int, ...]]] = []
        self.nullable: list[int] = []
        self.looks: list[bool] = []
        self.height: list[int] = []
        self.derivatives: dict[tuple[int, int, bool], int] = {}
        self.nothing = self.letters(0)
        self.empty = self._node("empty", (), (), _EVERYWHERE)
        self.everything = self.complement(self.nothing)

    def spend(self, amount: int) -> None:
        self.work += amount
        if self.work > MAX_WORK:
            raise RegexError("limit", f"not decided in {MAX_WORK:,} steps")
        if self.work >= self.next_look_at_clock:
            self.next_look_at_clock = self.work + 1000
            if time.thread_time() > self.deadline:
                raise RegexError("limit", f"not decided in {self.limit_s} s")

    def _node(self, kind: str, operands: tuple[int, ...], children: Sequence[int], nullable: int) -> int:
        self.spend(1 + len(operands))
        known = self.ids.get((kind, operands))
        if known is not None:
            return known
        height = 1 + max([self.height[child] for child in children], default=0)
        if height > MAX_HEIGHT:
            raise RegexError("limit", f"operators nested more than {MAX_HEIGHT} deep")
        self.ids[kind, operands] = number = len(self.nodes)
        self.nodes.append((kind, operands))
        self.nullable.append(nullable)
        self.looks.append(kind == "boundary" or any([self.looks[child] for child in children]))
        self.height.append(height)
        return number

    def letters(self, mask: int) -> int:
        return self._node("letters", (mask,), (), 0)

    def boundary(self) -> int:
        return self._node("boundary", (), (), _AT_BOUNDARY)

    def complement(self, part: int) -> int:
        kind, operands = self.nodes[part]
        return operands[0] if kind == "not" else self._node("not", (part,), (part,), _EVERYWHERE ^ self.nullable[part])

    def concat(self, parts: Iterable[int]) -> int:
        factors: list[int] = []
        for part in parts:
            kind, operands = self.nodes[part]
            for factor in operands if kind == "concat" else (part,):
                if factor == self.nothing:
                    return factor
                optional = self.nullable[factor] == _EVERYWHERE
                if factor == self.empty or (optional and factors and factors[-1] == self.everything):  # .*r = .*
                    continue
                if factor == self.everything:
                    while factors and self.nullable[factors[-1]] == _EVERYWHERE:  # r.* = .*
                        factors.pop()
                factors.append(factor)
        if len(factors) < 2:
            return factors[0] if factors else self.empty
        nullable = reduce(operator.and_, [self.nullable[factor] for factor in factors])
        return self._node("concat", tuple(factors), factors, nullable)

    def union(self, parts: Iterable[int]) -> int:
        return self._combine("or", parts, self.nothing, self.everything)

    def intersection(self, parts: Iterable[int]) -> int:
        return self._combine("and", parts, self.everything, self.nothing)

    def _combine(self, kind: str, parts: Iterable[int], unit: int, zero: int) -> int:
        """Up to associativity, commutativity and idempotence: without these the derivatives would never end."""
        join = operator.or_ if kind == "or" else operator.and_
        operands: set[int] = set()
        masks: list[int] = []
        for part in parts:
            its_kind, its_operands = self.nodes[part]
            for operand in its_operands if its_kind == kind else (part,):
                if operand == zero:
                    return zero
                if self.nodes[operand][0] == "letters" and operand != unit:
                    masks += self.nodes[operand][1]
                elif operand != unit:
                    operands.add(operand)
        if masks:
            operands.add(self.letters(reduce(join, masks)))
        nodes = [self.nodes[operand] for operand in operands]
        if zero in operands or any(its_kind == "not" and its[0] in operands for its_kind, its in nodes):
            return zero
        if len(operands) < 2:
            return operands.pop() if operands else unit
        ordered = tuple(sorted(operands))
        return self._node(kind, ordered, ordered, reduce(join, [self.nullable[operand] for operand in ordered]))

    def star(self, part: int) -> int:
        kind, operands = self.nodes[part]
        if kind == "star" or part == self.everything:
            return part
        if kind == "letters" and operands[0] == self.alphabet.full:
            return self.everything
        return self._node("star", (part,), (part,), _EVERYWHERE)

    def at_most(self, part: int, count: int) -> int:
        if count < 2:
            return self.union((self.empty, part)) if count else self.empty
        return self._node("at_most", (part, count), (part,), _EVERYWHERE)

    def repeat(self, part: int, least: int, most: int | None) -> int:
        """part{least,most}, or part{least,} if `most` is None."""
        if self.nullable[part] == _EVERYWHERE:  # r{m,n} = r{0,n}
            least = 0
        rest = self.star(part) if most is None else self.at_most(part, most - least)
        kind, operands = self.nodes[part]
        self.spend(least * len(operands) if kind == "concat" else least)  # before the memory is taken
        return self.concat([part] * least + [rest])

    def derivative(self, expression: int, letter: int, after_word: bool) -> int:
        """What may follow `letter` where `expression` begins with it; `after_word`: a word character stands before."""
        key = (expression, letter, after_word and self.looks[expression])
        known = self.derivatives.get(key)
        if known is not None:
            return known
        kind, operands = self.nodes[expression]
        if kind == "letters":
            result = self.empty if operands[0] >> letter & 1 else self.nothing
        elif kind == "concat":
            here = _place(after_word, self.is_word(letter))
            cases = []
            for index, factor in enumerate(operands):
                rest = self.derivative(factor, letter, after_word)
                if rest != self.nothing:
                    cases.append(self.concat((rest, *operands[index + 1 :])))
                if not self.nullable[factor] & here:
                    break
            result = self.union(cases)
        elif kind == "or":
            result = self.union([self.derivative(operand, letter, after_word) for operand in operands])
        elif kind == "and":
            result = self.intersection([self.derivative(operand, letter, after_word) for operand in operands])
        elif kind == "not":
            result = self.complement(self.derivative(operands[0], letter, after_word))
        elif kind == "star":
            result = self.concat((self.derivative(operands[0], letter, after_word), expression))
        elif kind == "at_most":
            part, count = operands
            result = self.concat((self.derivative(part, letter, after_word), self.at_most(part, count - 1)))
        else:  # "empty" and "boundary"
            result = self.nothing
        self.derivatives[key] = result
        return result

    @staticmethod
    def is_word(letter: int) -> bool:
        return bool(_WORD >> letter & 1)

    def step(self, state: State, letter: int) -> State:
        rest = self.derivative(state[0], letter, state[1])
        return rest, self.looks[rest] and self.is_word(letter)

    def accepts(self, state: State) -> bool:
        return bool(self.nullable[state[0]] & _place(state[1], False))

    def matches(self, expression: int, text: str) -> bool:
        state = (expression, False)
        for character in text:
            self.spend(1)
            state = self.step(state, self.alphabet.letter(character))
        return self.accepts(state)

    def minterms(self) -> list[int]:
        """The coarsest sets of letters that no class, nor `\\b` where there is one, tells apart."""
        classes = {operands[0] for kind, operands in self.nodes if kind == "letters"}
        if any(self.looks):
            classes.add(_WORD)
        parts = [self.alphabet.full]
        for letters in classes:
            self.spend(len(parts))
            parts = [part for whole in parts for part in (whole & letters, whole & ~letters) if part]
        return parts


# --- text to expression ---------------------------------------------------------------------------------------------
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_END = ""


@dataclass
class _Group:
    """An open parenthesis: what has been read since."""

    branches: list[int] = field(default_factory=list)  # closed by |
    operands: list[int] = field(default_factory=list)  # of this branch, closed by &
    factors: list[int] = field(default_factory=list)  # of this operand
    num_tildes: int = 0  # before the next factor


class _Parser:
    """One pass with a stack of its own: parentheses cost no recursion."""

    def __init__(self, regex: str, build: _Expressions):
        self.regex, self.build = regex, build
        self.position = 0

    def parse(self) -> int:
        groups = [_Group()]
        while (character := self._next()) != _END:
            group = groups[-1]
            if character == "(":
                groups.append(_Group())
            elif character == ")":
                if len(groups) == 1:
                    raise self._invalid("')' without '('")
                expression = self._close(groups.pop())
                self._add(groups[-1], expression)
            elif character == "|":
                self._close_branch(group)
            elif character == "&":
                self._close_operand(group, "&")
            elif character == "~":
                group.num_tildes += 1
            elif character in "*+?{":
                least, most = self._bounds(character)
                if not group.factors or group.num_tildes:
                    raise self._invalid(f"nothing before {character!r} to repeat")
                group.factors.append(self.build.repeat(group.factors.pop(), least, most))
            else:
                self._add(group, self._atom(character))
        if len(groups) > 1:
            raise self._invalid("'(' without ')'")
        return self._close(groups[0])

    def _add(self, group: _Group, expression: int) -> None:
        group.factors.append(self.build.complement(expression) if group.num_tildes % 2 else expression)
        group.num_tildes = 0

    def _close_operand(self, group: _Group, closed_by: str) -> None:
        if group.num_tildes:
            raise self._invalid("nothing after '~' to complement")
        if not group.factors and (closed_by == "&" or group.operands):
            raise self._invalid("nothing beside '&'")
        group.operands.append(self.build.concat(group.factors))
        group.factors = []

    def _close_branch(self, group: _Group) -> None:
        self._close_operand(group, "|")
        group.branches.append(self.build.intersection(group.operands))
        group.operands = []

    def _close(self, group: _Group) -> int:
        self._close_branch(group)
        return self.build.union(group.branches)

    def _bounds(self, character: str) -> tuple[int, int | None]:
        if character != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        end = self.regex.find("}", self.position)
        low, comma, high = self.regex[self.position : max(end, 0)].partition(",")
        if not (low or high) or not (low + high).isascii() or not (low + high).isdecimal():
            raise self._invalid("'{' without {m}, {m,}, {m,n} or {,n}")
        least = int(low or 0)
        most = int(high) if high else None if comma else least
        if most is not None and most < least:
            raise self._invalid("repetition with its bounds reversed")
        if max(least, most or 0) > MAX_REPEAT:
            raise RegexError("limit", f"more than {MAX_REPEAT} repetitions at character {self.position}")
        self.position = end + 1
        return least, most

    def _atom(self, character: str) -> int:
        if character == ".":
            return self.build.letters(self.build.alphabet.full)
        if character == "[":
            return self.build.letters(self._class())
        if character in "]}":
            raise self._invalid(f"{character!r} without its opening bracket")
        if character != "\\":
            return self.build.letters(1 << self.build.alphabet.letter(character))
        if self._peek() not in ("b", "B"):
            return self.build.letters(self._escaped()[1])
        boundary = self.build.boundary()
        if self._next() == "b":
            return boundary
        return self.build.intersection((self.build.empty, self.build.complement(boundary)))

    def _class(self) -> int:
        letters = 0
        negated = self._peek() == "^"
        self.position += negated
        opened = self.position
        while self._peek() != "]" or self.position == opened:  # a ] in first place is itself, as in `re`
            first, members = self._member()
            if self._peek() == "-" and self.regex[self.position + 1 : self.position + 2] not in (_END, "]"):
                self.position += 1
                last, _ = self._member()
                if not first or not last or last < first:
                    raise self._invalid("a range that is reversed or ends in a class")
                members = self.build.alphabet.between(first, last)
            letters |= members
        self.position += 1
        return self.build.alphabet.full & ~letters if negated else letters

    def _member(self) -> tuple[str, int]:
        character = self._next()
        if character == _END:
            raise self._invalid("'[' without ']'")
        return self._escaped() if character == "\\" else (character, 1 << self.build.alphabet.letter(character))

    def _escaped(self) -> tuple[str, int]:
        """(character, letters) after a backslash; the character is "" for a class."""
        character = self._next()
        if character == _END:
            raise self._invalid("a backslash at the end")
        if character in "dwsDWS":
            letters = _CLASSES[character.lower()]
            return "", letters if character.islower() else self.build.alphabet.full & ~letters
        if character.isascii() and character.isalnum():
            raise self._invalid(f"no \\{character} in this dialect, or not here")
        return character, 1 << self.build.alphabet.letter(character)

    def _peek(self) -> str:
        return self.regex[self.position : self.position + 1]

    def _next(self) -> str:
        character = self._peek()
        self.position += 1
        return character

    def _invalid(self, what: str) -> RegexError:
        position = min(self.position, len(self.regex))
        return RegexError("invalid", f"{what} at character {position} of {ascii(self.regex[:100])}")


def _parsed(regex: str, build: _Expressions) -> int:
    if not regex:
        raise RegexError("invalid", "an empty text is no regex; () matches the empty line")  # a missing answer
    if len(regex) > MAX_LENGTH:
        raise RegexError("limit", f"{len(regex):,} characters, more than {MAX_LENGTH:,}")
    if any("\ud800" <= character <= "\udfff" for character in regex):
        raise RegexError("invalid", "a lone surrogate is no character")
    return _Parser(regex, build).parse()


# --- automata -------------------------------------------------------------------------------------------------------
def _shortest_difference(build: _Expressions, gold: int, answer: int) -> str | None:
    """A shortest line in one language only. Breadth first; pairs that equalities assumed so far imply are passed over.

    That keeps the line shortest: where a passed pair differs by some rest of a line, so does a link of the chain that
    implies the pair, and every link was met at no greater depth."""
    examples = [build.alphabet.example(minterm) for minterm in build.minterms()]
    letters = [build.alphabet.letter(example) for example in examples]
    above: dict[State, State] = {}

    def representative(state: State) -> State:
        while (parent := above.get(state, state)) != state:
            above[state] = state = above.get(parent, parent)
        return state

    pairs: list[tuple[State, State]] = [((gold, False), (answer, False))]
    came_from = [(-1, "")]  # index of the pair before, and the character read there
    for index, (left, right) in enumerate(pairs):  # grows under way
        build.spend(1)
        left_class, right_class = representative(left), representative(right)
        if left_class == right_class:
            continue
        if build.accepts(left) != build.accepts(right):
            line = ""
            while index:
                index, character = came_from[index]
                line = character + line
            return line
        above[left_class] = right_class
        if len(above) > MAX_STATES:
            raise RegexError("limit", f"more than {MAX_STATES:,} states")
        for letter, example in zip(letters, examples, strict=True):
            pairs.append((build.step(left, letter), build.step(right, letter)))
            came_from.append((index, example))
    return None


def _minimal_automaton(build: _Expressions, expression: int) -> list[tuple[bool, list[tuple[int, int]]]]:
    """(accepts, [(code point, state that it and those after it lead to)]) by state, numbered breadth first from the
    lowest code point on: the same for every regex of the language."""
    minterms = build.minterms()
    targets, accepting = _automaton(build, expression, minterms)
    class_of = _classes(build, targets, accepting)
    member = dict(zip(class_of, range(len(class_of)), strict=True))
    starts = build.alphabet.starts
    runs = sorted(
        (starts[letter], column) for column, mask in enumerate(minterms) for letter in _bits(mask & ~(mask << 1))
    )
    order = [class_of[0]]
    numbers = {order[0]: 0}
    table = []
    for number in order:  # grows under way
        state = member[number]
        row: list[tuple[int, int]] = []
        for start, column in runs:
            target = class_of[targets[state][column]]
            if target not in numbers:
                numbers[target] = len(order)
                order.append(target)
            if not row or row[-1][1] != numbers[target]:
                row.append((start, numbers[target]))
        table.append((accepting[state], row))
    return table


def _automaton(build: _Expressions, expression: int, minterms: Sequence[int]) -> tuple[list[list[int]], list[bool]]:
    """(target by state and minterm, whether each state accepts); it begins in state 0."""
    letters = [next(_bits(minterm)) for minterm in minterms]
    states: list[State] = [(expression, False)]
    numbers = {states[0]: 0}
    targets = []
    for state in states:  # grows under way
        row = []
        for letter in letters:
            target = build.step(state, letter)
            number = numbers.setdefault(target, len(states))
            if number == len(states):
                states.append(target)
            row.append(number)
        build.spend(len(row))
        targets.append(row)
        if len(states) > MAX_STATES:
            raise RegexError("limit", f"more than {MAX_STATES:,} states")
    return targets, [build.accepts(state) for state in states]


def _classes(build: _Expressions, targets: list[list[int]], accepting: list[bool]) -> list[int]:
    """A number for each state, the same for two iff they accept the same rests of a line (Hopcroft 1971)."""
    sources: list[list[list[int]]] = [[[] for _ in targets] for _ in targets[0]]  # by minterm and target
    for state, row in enumerate(targets):
        for column, target in enumerate(row):
            sources[column][target].append(state)
    class_of = [int(accepts) for accepts in accepting]
    members: list[set[int]] = [set(), set()]
    for state, number in enumerate(class_of):
        members[number].add(state)
    waiting = [0, 1]
    while waiting:
        splitter = tuple(members[waiting.pop()])
        for into in sources:
            build.spend(1 + len(splitter))
            hits: dict[int, set[int]] = {}
            for target in splitter:
                for state in into[target]:
                    hits.setdefault(class_of[state], set()).add(state)
            for number, hit in hits.items():
                if len(hit) == len(members[number]):
                    continue
                members[number] -= hit
                if len(hit) > len(members[number]):
                    members[number], hit = hit, members[number]
                # The smaller part waits. The other one still does if it did; if it did not, it need not.
                waiting.append(len(members))
                for state in hit:
                    class_of[state] = len(members)
                members.append(hit)
    return class_of
