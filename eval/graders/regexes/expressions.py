"""Hash-consed expressions, their simplifications and their derivatives."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Literal

from llm_jepa import UserError

from .alphabet import WORD, Alphabet

MAX_HEIGHT = 100  # of an expression as a tree; bounds `derivative`, the only recursion
# Work counts operands of expressions as they are built. Unlike the deadline, which is the second line of defence, it
# gives the same verdict on a slow or busy machine. The largest automaton of a gold has 161 states.
MAX_WORK = 500_000

State = tuple[int, bool]  # (expression, whether a word character was read last and the expression can tell)


class RegexError(UserError):
    """No verdict: the text is not a regex of the dialect (status "invalid"), or it exceeds a bound ("limit")."""

    def __init__(self, status: Literal["invalid", "limit"], message: str):
        super().__init__(message)
        self.status = status


_EVERYWHERE = (
    0b1111  # the four places in a line that `\b` can distinguish: after a word character or not, before one or not
)
_AT_BOUNDARY = 0b0110


def _place(after_word: bool, before_word: bool) -> int:
    return 1 << (2 * after_word + before_word)


class Expressions:
    """Hash-consed expressions: each is an int, and expressions that simplify to the same form share it.

    nodes[e]     (kind, operands)
    nullable[e]  the places in a line at which e matches the empty string, a bit each
    looks[e]     whether e has a `\\b`
    height[e]    its height as a tree
    """

    def __init__(self, alphabet: Alphabet, limit_s: float):
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
        """Count work. Raises RegexError when MAX_WORK or the deadline is exceeded."""
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
        if kind == "not":
            return operands[0]
        return self._node("not", (part,), (part,), _EVERYWHERE ^ self.nullable[part])

    def _flattened(self, kind: str, parts: Iterable[int]) -> Iterator[int]:
        """The parts, with the operands of each part of this kind in its place."""
        for part in parts:
            its_kind, operands = self.nodes[part]
            if its_kind == kind:
                yield from operands
            else:
                yield part

    def concat(self, parts: Iterable[int]) -> int:
        factors: list[int] = []
        for factor in self._flattened("concat", parts):
            if factor == self.nothing:
                return factor
            skippable = self.nullable[factor] == _EVERYWHERE
            if factor == self.empty or (skippable and factors and factors[-1] == self.everything):  # .*r = .*
                continue
            if factor == self.everything:
                while factors and self.nullable[factors[-1]] == _EVERYWHERE:  # r.* = .*
                    factors.pop()
            factors.append(factor)
        if not factors:
            return self.empty
        if len(factors) == 1:
            return factors[0]
        nullable = reduce(operator.and_, [self.nullable[factor] for factor in factors])
        return self._node("concat", tuple(factors), factors, nullable)

    def union(self, parts: Iterable[int]) -> int:
        return self._combine("or", parts, self.nothing, self.everything)

    def intersection(self, parts: Iterable[int]) -> int:
        return self._combine("and", parts, self.everything, self.nothing)

    def _combine(self, kind: str, parts: Iterable[int], unit: int, zero: int) -> int:
        """A union or intersection, simplified by associativity, commutativity and idempotence.

        Without these simplifications an expression could have infinitely many derivatives.
        """
        join = operator.or_ if kind == "or" else operator.and_
        operands: set[int] = set()
        masks: list[int] = []
        for operand in self._flattened(kind, parts):
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
        if not operands:
            return unit
        if len(operands) == 1:
            return operands.pop()
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
        if count == 0:
            return self.empty
        if count == 1:
            return self.union((self.empty, part))
        return self._node("at_most", (part, count), (part,), _EVERYWHERE)

    def repeat(self, part: int, least: int, most: int | None) -> int:
        """part{least,most}, or part{least,} if `most` is None."""
        if self.nullable[part] == _EVERYWHERE:  # r{m,n} = r{0,n}
            least = 0
        rest = self.star(part) if most is None else self.at_most(part, most - least)
        self.spend(least * len(list(self._flattened("concat", [part]))))  # before the memory is taken
        return self.concat([part] * least + [rest])

    def derivative(self, expression: int, letter: int, after_word: bool) -> int:
        """The expression of all rests of lines that `expression` matches after their first letter, `letter`.

        after_word: whether a word character comes before `letter`.
        """
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
        return bool(WORD >> letter & 1)

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
        """The largest sets of letters that no class distinguishes, nor `\\b` if any expression has it."""
        classes = {operands[0] for kind, operands in self.nodes if kind == "letters"}
        if any(self.looks):
            classes.add(WORD)
        parts = [self.alphabet.full]
        for letters in classes:
            self.spend(len(parts))
            halves = [(whole & letters, whole & ~letters) for whole in parts]
            parts = [part for part in itertools.chain.from_iterable(halves) if part]
        return parts
