"""The letters of the automata: blocks of characters that no regex at hand distinguishes."""

from __future__ import annotations

import string
from bisect import bisect_right
from collections.abc import Iterator

MAX_LENGTH = 500  # characters of a regex; the longest gold has 54


def mask(characters: str) -> int:
    """The ASCII letters of a set as an int."""
    return sum(1 << ord(c) for c in characters)


def bits(mask: int) -> Iterator[int]:
    """The letters of a set, in order."""
    while mask:
        yield (mask & -mask).bit_length() - 1
        mask &= mask - 1


DIGIT = mask(string.digits)
WORD = mask(string.ascii_letters + string.digits + "_")
SPACE = mask(" \t\n\r\f\v")
_SHOWN_FIRST = string.ascii_lowercase + string.digits + string.ascii_uppercase + " _" + string.punctuation


class Alphabet:
    """The letters: each ASCII character, and blocks of the other code points.

    A block ends at every code point that a regex names. A set of letters is an int with bit i for letter i; letter i
    begins at code point starts[i].
    """

    def __init__(self, *regexes: str):
        named = {ord(c) for regex in regexes for c in regex[:MAX_LENGTH] if not c.isascii()}
        self.starts = sorted({*range(129), *named, *(code + 1 for code in named)} - {0x110000})
        self.full = (1 << len(self.starts)) - 1

    def letter(self, character: str) -> int:
        """The letter that a character belongs to."""
        return bisect_right(self.starts, ord(character)) - 1

    def between(self, first: str, last: str) -> int:
        """The set of letters from `first` to `last`, both included."""
        return (2 << self.letter(last)) - (1 << self.letter(first))

    def example(self, letters: int) -> str:
        """A character of the set that is easy to read in a counterexample."""
        for character in _SHOWN_FIRST:
            if letters >> ord(character) & 1:
                return character
        letter = next(bits(letters))
        return "\u00e9" if self.letter("\u00e9") == letter else chr(self.starts[letter])
