"""Text to expression: the parser of the dialect that `eval.graders.regexes` describes."""

from __future__ import annotations

from dataclasses import dataclass, field

from .alphabet import DIGIT, MAX_LENGTH, SPACE, WORD
from .expressions import Expressions, RegexError

MAX_REPEAT = 200  # m and n of {m,n}
_CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE}
_END = ""


@dataclass
class _Group:
    """What has been read since an open parenthesis."""

    branches: list[int] = field(default_factory=list)  # closed by |
    operands: list[int] = field(default_factory=list)  # of this branch, closed by &
    factors: list[int] = field(default_factory=list)  # of this operand
    num_tildes: int = 0  # before the next factor


class _Parser:
    """One pass with an explicit stack: nested parentheses need no recursion."""

    def __init__(self, regex: str, build: Expressions):
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
        if group.num_tildes % 2:
            expression = self.build.complement(expression)
        group.factors.append(expression)
        group.num_tildes = 0

    def _close_operand(self, group: _Group, closed_by: str) -> None:
        if group.num_tildes:
            raise self._invalid("nothing after '~' to complement")
        if not group.factors and (closed_by == "&" or group.operands):
            raise self._invalid("nothing before or after '&'")
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
        most: int | None = least
        if comma:
            most = int(high) if high else None
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
        if negated:
            return self.build.alphabet.full & ~letters
        return letters

    def _member(self) -> tuple[str, int]:
        character = self._next()
        if character == _END:
            raise self._invalid("'[' without ']'")
        if character == "\\":
            return self._escaped()
        return character, 1 << self.build.alphabet.letter(character)

    def _escaped(self) -> tuple[str, int]:
        """(character, letters) after a backslash; the character is "" for a class."""
        character = self._next()
        if character == _END:
            raise self._invalid("a backslash at the end")
        if character in "dwsDWS":
            letters = _CLASSES[character.lower()]
            if character.isupper():
                letters = self.build.alphabet.full & ~letters
            return "", letters
        if character.isascii() and character.isalnum():
            raise self._invalid(f"\\{character} is not in this dialect, or not allowed here")
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


def parse(regex: str, build: Expressions) -> int:
    """The expression of a regex, built in `build`. Raises RegexError."""
    if not regex:
        raise RegexError("invalid", "an empty text is not a regex; () matches the empty line")  # a missing answer
    if len(regex) > MAX_LENGTH:
        raise RegexError("limit", f"{len(regex):,} characters, more than {MAX_LENGTH:,}")
    if any("\ud800" <= character <= "\udfff" for character in regex):
        raise RegexError("invalid", "a lone surrogate is not a character")
    return _Parser(regex, build).parse()
