"""The value of a number as people write it, by a stated grammar, compared exactly.

    number   = [sign] [currency] (mixed | fraction | decimal [exponent]) [scale] [percent] [currency]
    decimal  = whole ["." digits] | "." digits      | continental: 1.234,56   1.234.567   1 234,5   1'234,5
    whole    = digits | groups of three with , ' _ or a space: 1,234   1 234   1'234      | Indian: 12,34,567
    exponent = "e" [sign] digits | "x 10^" digits, also alone: 10^5, 10⁵, 1.5 × 10⁵
    fraction = whole "/" whole      mixed = digits " " fraction below 1, "1½", "5 and a half"
    scale    = hundred, thousand, million, billion, trillion, dozen, lakh, crore, 万, 億: a factor (not 3億5000万)
    percent  = "%", "percent", "‰": a hundredth, a thousandth; so 50% is 0.5, and not 50
    currency = $, €, USD, euros, ...: two different ones differ; one that is missing on a side does not count
    time     = h:mm[:ss] [am|pm] | h am|pm: a kind of its own, in seconds, never equal to a number

Digits, minus signs, spaces and apostrophes may be those of any script; LaTeX's \\frac, \\times, \\%, ... are read.

Not a number, because a person would not read one value: a decimal comma without groups (1,5 may be a list), a range
(5-10), an expression (2 + 3; what follows "=" counts), a date, a version, a phone number, a ratio (2:1), an ordinal
(5th), a bound (>5, 5+, ±5), a root, a power that is not of ten, 0.333..., division by 0, letters on the digits (5k, x2,
B12), unless they are a unit (5km), and numbers in words (seven). Units are words and are not read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

MAX_LENGTH = 400  # characters of a number, and the largest exponent: 1e999999999 must not fill the memory


class Value(NamedTuple):
    amount: Fraction  # of a time: seconds
    kind: str = "number"  # or "time"
    currency: str = ""

    @property
    def key(self) -> str:
        """Equal iff amount and kind are; the currency is left out."""
        return f"{self.kind}:{self.amount}"


# -- the grammar ------------------------------------------------------------------------------------------------------

_LETTER = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u052f"  # no CJK: it writes no spaces
_WHOLE = r"""(?:[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?:'[0-9]{3})+|(?:_[0-9]{3})+|(?:\ [0-9]{3})+)(?![0-9])
    |[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?![0-9])|[0-9]+)"""
_CONTINENTAL = r"""[1-9][0-9]{0,2}(?:(?:\.[0-9]{3})+|(?:'[0-9]{3})+|(?:\ [0-9]{3})+),[0-9]+
    |[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}(?![0-9])"""
_POWER = r"(?:[-+]?[0-9]+|\([-+]?[0-9]+\))"
_SIGNS = r"[$€£¥₹₩₽₺₫¢]"
_CODES = "USD|EUR|GBP|JPY|CNY|INR|CHF|CAD|AUD"
_CURRENCY_OF = {
    "dollar": "$", "usd": "$", "us$": "$", "euro": "€", "eur": "€", "pound": "£", "gbp": "£", "yen": "¥", "jpy": "¥",
    "rupee": "₹", "inr": "₹", "cent": "¢",
}  # fmt: skip
_SCALE = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "lakh": 10**5, "crore": 10**7, "百": 10**2, "千": 10**3, "万": 10**4, "萬": 10**4, "億": 10**8, "亿": 10**8,
}  # fmt: skip
_PARTS = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4)}

_NUMBER = re.compile(
    rf"""
    (?<![{_LETTER}0-9])(?<![{_LETTER}0-9][_-])(?<![0-9][.,:/^'+*×÷·%])(?<!\^)
    (?P<sign>[-+]|(?i:minus|negative)\ )?
    (?:(?P<before>(?:(?:US|AU?|CA?|NZ|HK|S)?\$|{_SIGNS}|(?:{_CODES})(?![A-Za-z])))\ ?(?P<inner>[-+])?)?
    (?:
        (?P<time>[0-9]{{1,3}}:[0-5][0-9](?::[0-5][0-9](?:\.[0-9]+)?)?(?![0-9])(?:\ ?(?i:[ap]m\b|[ap]\.m\b\.?))?
            |[0-9]{{1,2}}\ ?(?i:[ap]m\b|[ap]\.m\b\.?))
        |(?P<mixed>[0-9]+\ [1-9][0-9]*/[0-9]+)
        |(?P<fraction>{_WHOLE}\ ?/\ ?{_WHOLE})
        |10(?:\^|\*\*)(?P<power>{_POWER})
        |(?P<decimal>{_CONTINENTAL}|{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)
            (?:[eE](?P<exponent>[-+]?[0-9]+)|\ ?[x×*·]\ ?10(?:\^|\*\*)(?P<of_ten>{_POWER}))?
    )
    (?P<part>\ and\ (?:a|one)\ (?i:half|third|quarter)\b)?
    (?P<scale>(?:[\ -]?(?i:hundred|thousand|million|billion|trillion|dozen|lakh|crore)s?\b|[百千万萬億亿])*)
    (?P<percent>\ ?(?:[%‰]|(?i:percent|per\ cent)\b))?
    (?P<after>\ ?(?:{_SIGNS}|(?:{_CODES})\b|(?i:dollar|euro|pound|yen|rupee|cent)s?\b))?
    """,
    re.VERBOSE,
)
_UNITS = (
    "km|cm|mm|kg|mg|g|lb|lbs|oz|ml|mL|L|h|hr|hrs|min|mins|sec|secs|ms|ft|in|yd|mi|mph|kmh|kph|Hz|kHz|MHz|GHz|KB|kB|MB"
    "|GB|TB|W|kW|kWh|V|C|F"
)
_WORDS_OF_ARITHMETIC = r"(?i:plus|minus|times|divided\ by)\b"
# What stands right behind or in front of digits and makes them a part of something that is not their value.
_SPOILED_AFTER = re.compile(
    rf"""[0-9]|[.,:/^'*×÷·_-]\(?[-+]?[0-9]|[+^±]|-(?![{_LETTER}])|\(\ ?[0-9]|°\ ?[0-9]|_[{_LETTER}]
    |(?!(?:{_UNITS})(?![{_LETTER}0-9]))[{_LETTER}]
    |[\ -]?(?i:half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?
        |thousandths?|millionths?|squared|cubed|factorial)\b
    |\ ?(?:k|K|M|B|bn|mn|mln|mio|mrd|Mio|Mrd)\b
    |[)\]}}]*[\ \t]*(?:[-+*/×÷·^]|x\ |{_WORDS_OF_ARITHMETIC})[\ \t]*[($€£¥√]*[0-9.√]
    |\)\ ?[0-9]{{3}}-""",
    re.VERBOSE,
)
_SPOILED_BEFORE = re.compile(
    rf"""(?:[0-9)\]%][\ \t]*(?:[-+*×÷·^/]|\ x|{_WORDS_OF_ARITHMETIC})[\ \t]*[($€£¥√{{]*
    |(?<![-=>])(?:[<>≤≥≠±]=?|\+/-)[\ \t]*
    |(?:√|\b(?:sqrt|log|ln))[\ \t]*[({{]*
    |\}}(?:[\ \t]*\{{)?
    |\+[0-9]{{1,3}}[-\ 0-9()]*
    |[0-9][百千万萬億亿]+
    |[0-9]\ [0-9]{{3}}\ )$""",
    re.VERBOSE,
)
_TAG_OR_QUOTE = re.compile(r"(?:<[^<>]*>|^[ \t]*>)[ \t]*$")  # <b>5</b>, and a line that begins with >
_ROOM_BEFORE, _ROOM_AFTER = 60, 40  # characters that are looked at: more would be slow on hostile text


def value_of(text: str) -> Value | None:
    """The value of a text that is one number and nothing else, or that gives one after `####`. None for other texts."""
    text = text.strip()
    marked = _marked(text)
    if marked is not None or "\n" in text:
        return marked
    line = _plain(text).strip()
    match = _NUMBER.match(line)
    if match is None or line[match.end() :] not in ("", "."):
        return None
    return _value(match, line)


def stated_value(text: str) -> Value | None:
    """The value that an answer states: the number after the first `####` that has one, otherwise its last number.

    The number of a list item (`2. Then ...` at the start of a line) counts only if there is no other.
    """
    marked = _marked(text)
    if marked is not None:
        return marked
    marker = None
    for line in reversed(text.splitlines()):
        if not re.search(r"[\d¼-¾⅐-⅞]", line):
            continue
        for match, value in _last_first(_plain(line)):
            if not _is_marker(match):
                return value
            marker = marker or value
    return marker


def _marked(text: str) -> Value | None:
    """The number right after a `####`. A heading such as `#### Step 2` has none."""
    for rest in re.findall(r"####[ \t]*([^\n]*)", text):
        line = _plain(rest)
        match = _NUMBER.match(line)
        if match is not None and not _is_marker(match) and (value := _value(match, line)) is not None:
            return value
    return None


def _last_first(line: str) -> Iterator[tuple[re.Match[str], Value]]:
    for match in reversed(list(_NUMBER.finditer(line))):
        value = _value(match, line)
        if value is not None:
            yield match, value


def _is_marker(match: re.Match[str]) -> bool:
    before, after = match.string[: match.start()], match.string[match.end() :]
    return before.strip(" \t-*#") == "" and match[0].isdigit() and re.match(r"[.)][ \t]+\S", after) is not None


# -- from the text to the value ---------------------------------------------------------------------------------------


def _value(match: re.Match[str], line: str) -> Value | None:
    """The value of a match; None if what surrounds it makes it a part of something else, or beyond the limits."""
    before = line[max(0, match.start() - _ROOM_BEFORE) : match.start()]
    after = line[match.end() : match.end() + _ROOM_AFTER]
    if match.end() - match.start() > MAX_LENGTH or _SPOILED_AFTER.match(after):
        return None
    if _SPOILED_BEFORE.search(before) and not _TAG_OR_QUOTE.search(before):
        return None
    sign = match["sign"] or match["inner"] or ""
    if sign in ("-", "+") and re.search(r"[0-9)\]%][ \t]*$", before):  # 20 -5 is an expression
        return None
    if match["decimal"] and "." in match["decimal"] and after.startswith(("..", "…")):  # 0.333...
        return None
    if (" " in (match["decimal"] or "") or sign == "+") and re.match(r" [0-9(]", after):  # a phone number
        return None
    if match["time"]:
        return None if sign or match["scale"] or match["percent"] else _time(match["time"])
    amount, currency = _amount(match), _currency(match)
    if amount is None or currency is None:
        return None
    negative = sign.strip().lower() in ("-", "minus", "negative") or bool(re.search(r"=[ \t]*-[ \t]+$", before))
    return Value(-amount if negative else amount, currency=currency)


def _amount(match: re.Match[str]) -> Fraction | None:
    exponent = int((match["exponent"] or match["of_ten"] or match["power"] or "0").strip("()"))
    if abs(exponent) > MAX_LENGTH:
        return None
    amount = _fraction(match["mixed"] or match["fraction"]) if not match["power"] else Fraction(1)
    if match["decimal"]:
        amount = Fraction(_decimal(match["decimal"]))
    if amount is None:
        return None
    amount *= Fraction(10) ** exponent
    if match["part"]:
        amount += _PARTS[match["part"].split()[-1].lower()]
    for word in re.findall(r"[a-z]+|[百千万萬億亿]", match["scale"].lower()):
        amount *= _SCALE[word.removesuffix("s")]
    if match["percent"]:
        amount /= 1000 if "‰" in match["percent"] else 100
    return amount


def _decimal(text: str) -> str:
    """The same number without groups, with a decimal point."""
    comma, point = text.rfind(","), text.rfind(".")
    grouped_by_other = any(mark in text for mark in "' .") and comma > point and "," not in text[:comma]
    if comma >= 0 and grouped_by_other:
        text = text[:comma].replace(".", "") + "." + text[comma + 1 :]
    elif text.count(".") > 1:
        text = text.replace(".", "")
    return re.sub("[,'_ ]", "", text)


def _fraction(text: str | None) -> Fraction | None:
    """`3/4`, or `1 3/4` as a mixed number, which needs a part below 1."""
    if text is None:
        return None
    top, bottom = re.split(r" ?/ ?", text)
    mixed = re.fullmatch(r"([0-9]+) ([1-9][0-9]*)", top)
    denominator = int(_decimal(bottom))
    if denominator == 0:
        return None
    if mixed is None:
        return Fraction(int(_decimal(top)), denominator)
    if int(mixed[2]) < denominator:
        return int(mixed[1]) + Fraction(int(mixed[2]), denominator)
    return None


def _time(text: str) -> Value | None:
    digits, half_of_day = re.fullmatch(r"([0-9:.]*[0-9])\s*([a-z]?)[a-z.]*", text.lower(), re.DOTALL).groups()  # type: ignore[union-attr]
    hours, minutes, seconds = [Fraction(part) for part in [*digits.split(":"), "0", "0"][:3]]
    if half_of_day:
        if not 1 <= hours <= 12:
            return None
        hours = hours % 12 + (12 if half_of_day == "p" else 0)
    return Value(hours * 3600 + minutes * 60 + seconds, "time")


def _currency(match: re.Match[str]) -> str | None:
    """A sign for each currency, "" without one. None if the number has two different ones."""
    names = set()
    for text in (match["before"], match["after"]):
        if text is not None:
            word = text.strip().lower()
            names.add(_CURRENCY_OF.get(word, _CURRENCY_OF.get(word.removesuffix("s"), word)))
    if match["before"] == match["after"] == "$":  # $5$ is mathematics in LaTeX
        return ""
    return None if len(names) > 1 else "".join(names)


# -- one way to write each character ----------------------------------------------------------------------------------

_SAME = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
    **dict.fromkeys("\u00a0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))), " "),
    **dict.fromkeys("\u2019\u02bc\u2018\uff07", "'"),
    **dict.fromkeys("\u2044\u2215\uff0f", "/"),
    **dict.fromkeys("\u2236\uff1a", ":"),
    **dict.fromkeys("\u22c5\u2219", "·"),
    "\u066b": ".", "\u066c": ",", "\u066a": "%", "\uff0e": ".", "\uff0c": ",", "\uff05": "%", "\uff04": "$",
    "\uff0b": "+", "\uffe5": "¥", "\uffe1": "£", "\u2715": "×", "\u2a2f": "×",
}  # fmt: skip
_SAME_CHARACTER = str.maketrans(_SAME)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}(?![0-9])"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*([0-9])\s*([0-9])(?![0-9])"), r" \1/\2"),
    (re.compile(r"(?<=-)\ (?=[0-9]+/)"), ""),  # the sign before \frac
    (re.compile(r"\\times(?![a-z])"), "×"),
    (re.compile(r"\\cdot(?![a-z])"), "·"),
    (re.compile(r"\\div(?![a-z])"), "÷"),
    (re.compile(r"\\pm(?![a-z])"), "±"),
    (re.compile(r"\\(?:leq?|lt)(?![a-z])"), "<"),
    (re.compile(r"\\(?:geq?|gt)(?![a-z])"), ">"),
    (re.compile(r"\\sqrt(?![a-z])"), "√"),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;: ]"), " "),
    (re.compile(r"\\(?=[%$])"), ""),
    (re.compile(r"\^\{([-+]?[0-9]+)\}"), r"^\1"),
)


def _plain(line: str) -> str:
    """The line in the characters of the grammar."""
    if not line.isascii():
        line = re.sub(r"[⁺⁻]?[⁰¹²³⁴-⁹]+", lambda m: "^" + m[0].translate(_SUPERSCRIPTS), line)
        line = re.sub(r"([0-9]?)[ \u00a0]?([¼-¾⅐-⅞])(?![0-9])", _vulgar, line)
        line = line.translate(_SAME_CHARACTER)
        line = re.sub(r"[^\W\D0-9]", lambda m: str(unicodedata.decimal(m[0])), line)
    if "\\" in line or "{" in line:
        for pattern, text in _LATEX:
            line = pattern.sub(text, line)
    return line


def _vulgar(match: re.Match[str]) -> str:
    space = f"{match[1]} " if match[1] else match[0][:-1]
    return space + unicodedata.normalize("NFKC", match[2]).replace("\u2044", "/")
