"""Answers that are words: compared as strings, by their first words, or with lists of alternatives.

Generation removes white space at both ends of an answer, so every grader removes it from the gold as well.
There are two normalisations:
  plain             ours, for the files of users: two texts that a person calls different stay different
  squad_normalized  SQuAD's, only where the published metric uses it (NQ-Open): it drops all ASCII punctuation, so it
                    makes 1.5 million and 15 million, or C++ and C, the same answer
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple


class Grade(NamedTuple):
    scores: dict[str, float]  # by metric, 0 to 1; a metric that is missing does not count this answer
    answer_key: str


def written(gold: str, text: str, stopped: bool) -> dict[str, float]:
    """The string metrics exact, startswith, contains and stop_rate, without white space at the ends of either text.

    `startswith` and `contains` forgive text that follows or surrounds the gold string. `exact` does not: it rises with
    a model that stops in time, whatever it knows.
    """
    gold, text = gold.strip(), text.strip()
    return {
        "exact": float(text == gold),
        "startswith": float(text.startswith(gold)),
        "contains": float(gold in text),
        "stop_rate": float(stopped),
    }


def exact(gold: str, text: str) -> tuple[bool, str]:
    """Equal strings, ignoring white space at both ends."""
    return text.strip() == gold.strip(), text.strip()


def starts_with(gold: str, text: str) -> tuple[bool, str]:
    """The answer begins with the gold as whole words, both `plain`; `C` does not begin `C++ is`, nor `1` `1.5 million`.

    For text that runs on (a cloze). The key of a wrong answer is its first clause.
    """
    words = plain(gold)
    whole, opened = plain(text), plain(text.strip().lstrip(_OPENING))
    # "Rome" is the city: quotes that do not surround all. Only then may a quote end the words: 6" is not 6.
    ends = ((whole, _END_OF_WORDS), (opened, _END_OF_QUOTE if opened != whole else _END_OF_WORDS))
    for opening, end in ends:
        if words and opening.startswith(words) and end.match(opening, len(words)):
            return True, words
    clause = plain(_END_OF_CLAUSE.split(text.strip(), maxsplit=1)[0])
    return False, whole if clause in ("", words) else clause


def one_of(gold: str, text: str) -> tuple[bool, str]:
    """The first answer (before any `; `) is one of the alternatives, which `; ` separates. All are `plain`."""
    answer = plain(text.split("; ")[0])
    alternatives = [words for words in map(plain, gold.split("; ")) if words]
    right = answer in alternatives
    return right, alternatives[0] if right else answer


_OPENING = "\"'`*\u201c\u2018\u00ab\u201e"
_PAIRS = [(pair[0], pair[1]) for pair in ('""', "''", "``", "«»", "‹›", "「」")] + [("**", "**")]
_SENTENCE_MARKS = ".,;:?…。，！？"
# A mark ends a word only before white space: those of 1.5 and 10:45 are a part of it. `!` only after two letters: after
# a digit or a single letter it may be a factorial.
_MARK = rf"[{_SENTENCE_MARKS}]|(?<=[^\W\d_]{{2}})!"
_END_OF_WORDS = re.compile(rf"(?:{_MARK})*(?:\s|\u2014|$)")
_END_OF_QUOTE = re.compile(rf"(?:{_MARK}|['”»`\"*])*(?:\s|\u2014|$)")
_END_OF_CLAUSE = re.compile(rf"(?:{_MARK})(?=\s|$)|\n|\u2014")
_KEPT = ("<super>", "<sub>", "<fraction>", "<circle>", "<square>", "<font>")  # 10⁵ is not 105
_SAME_MARK = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
    }
)


def plain(text: str) -> str:
    """The text without differences that carry no meaning.

    Dropped:
      letter case; the Unicode form (NFC, and compatibility forms such as full-width letters and ligatures)
      kinds of quotes, of dashes and of white space
      what surrounds the whole text: white space, quotes, `**` and backquotes, the mark that ends a sentence,
        brackets around one word as in (B)
      a leading article (a, an, the), unless nothing else or only another article follows
    Kept: all other punctuation and symbols (C++, 1.5, -5, .NET, 5%, U.S.), superscripts, fractions, accents, inner
    articles, word order. A text of nothing but marks stays as it is.
    """
    if not text.isascii():
        composed = unicodedata.normalize("NFC", safe_to_normalize(text))
        text = unicodedata.normalize("NFC", "".join(map(_same_form, composed)))
    text = " ".join(text.translate(_SAME_MARK).lower().split())
    text = _without_surroundings(text) or text
    article, _, rest = text.partition(" ")
    if article in ("a", "an", "the") and rest not in ("", "a", "an", "the"):
        return rest
    return text


_MARKS = re.compile(r"[^\x00-\u02ff]{31,}")  # cheap to find; letters of other scripts are looked at more closely
_MAX_MARKS = 30
_JOINER = "\u034f"


def safe_to_normalize(text: str) -> str:
    """The text with a joiner after every 30 combining marks in a row (the Stream-Safe Format of Unicode, UAX #15).

    Normalisation sorts the marks of a letter, in quadratic time: 80,000 marks take minutes. No language writes more
    than a few.
    """
    return _MARKS.sub(lambda match: _with_joiners(match[0]), text)


def _with_joiners(text: str) -> str:
    parts, marks = [], 0
    for character in text:
        # Some characters are a letter with marks, or only marks: count what they decompose into.
        pieces = unicodedata.normalize("NFKD", character)
        leading = next((i for i, piece in enumerate(pieces) if not unicodedata.combining(piece)), len(pieces))
        if marks + leading > _MAX_MARKS:
            parts.append(_JOINER)
            marks = 0
        parts.append(character)
        if leading == len(pieces):
            marks += leading
        else:
            marks = next((i for i, piece in enumerate(reversed(pieces)) if not unicodedata.combining(piece)), 0)
    return "".join(parts)


def _same_form(character: str) -> str:
    """Its compatibility form, unless that changes the meaning."""
    kind = unicodedata.decomposition(character).partition(" ")[0]
    if not kind.startswith("<") or kind in _KEPT:
        return character
    return unicodedata.normalize("NFKC", character)


def _without_surroundings(text: str) -> str:
    previous = None
    while text != previous:
        previous = text
        text = _without_end_marks(text).lstrip("¿¡")
        for opening, closing in _PAIRS:
            inner = text[len(opening) : len(text) - len(closing)]
            surrounded = len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing)
            if surrounded and opening not in inner and closing not in inner:
                text = inner.strip()
        text = re.sub(r"^\((\w+)\)$", r"\1", text)
    return text


def _without_end_marks(text: str) -> str:
    words = text.rstrip(_SENTENCE_MARKS + "! ")
    if re.search(r"(?:\d|[)\]]|(?:^|\W)\w)$", words):  # 5!, n! and (n + 1)! may be factorials
        return text.rstrip(_SENTENCE_MARKS + " ")
    return words


def squad_normalized(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016) after NFKC: lower case, no punctuation, articles or double spaces.

    An answer that consists of articles only (the band The The) keeps them.
    """
    text = unicodedata.normalize("NFKC", safe_to_normalize(text)).lower()
    text = " ".join("".join(c for c in text if c not in string.punctuation).split())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()) or text


def open_answer(alternatives: Sequence[str], text: str, stopped: bool) -> Grade:
    """Grade an answer by a list of gold alternatives, as NQ-Open is scored: both are `squad_normalized`.

    An answer without a word is never right.

    equal       the first answer (before any `; `) is an alternative
    any_listed  one of the `; `-separated answers is an alternative; this rewards hedging
    contains    the text has an alternative in it, as whole words
    """
    right_keys = [key for key in map(squad_normalized, alternatives) if key]
    answers = [squad_normalized(piece) for piece in text.split("; ")]
    padded = f" {squad_normalized(text)} "
    scores = {
        "equal": float(answers[0] in right_keys),
        "any_listed": float(any(answer in right_keys for answer in answers)),
        "contains": float(any(f" {key} " in padded for key in right_keys)),
        "stop_rate": float(stopped),
    }
    return Grade(scores, right_keys[0] if scores["equal"] else answers[0])
