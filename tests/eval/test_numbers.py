"""Claims about the number grader: it compares values, by the grammar of `eval.graders.values`, and nothing else."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.graders import check_gold, same_number
from eval.graders.values import stated_value, value_of
from llm_jepa import UserError
from tests.eval.number_pairs import DIFFERENT, EQUAL, NOT_A_NUMBER, lines, pairs
from tests.properties import examples


def test_the_table_is_large():
    assert len(pairs(EQUAL)) + len(pairs(DIFFERENT)) + len(lines(NOT_A_NUMBER)) >= 300


@pytest.mark.parametrize(("gold", "text"), pairs(EQUAL))
def test_equal(gold, text):
    right, key = same_number(gold, text)
    assert right and key == same_number(gold, gold)[1], "two spellings of one number share a key"
    assert same_number(gold, f" {text}\n")[0]


@pytest.mark.parametrize(("gold", "text"), pairs(DIFFERENT))
def test_different(gold, text):
    right, key = same_number(gold, text)
    assert not right and key != same_number(gold, gold)[1]


@pytest.mark.parametrize("text", lines(NOT_A_NUMBER))
def test_not_a_number(text):
    with pytest.raises(UserError, match="is not a number of the grammar"):
        check_gold("number", text)
    with pytest.raises(UserError, match="is not a number of the grammar"):
        same_number(text, text)


GOLDS = sorted({gold for gold, _ in pairs(EQUAL) + pairs(DIFFERENT)})


@pytest.mark.parametrize("one", GOLDS)
def test_every_gold_equals_itself_and_the_grader_is_symmetric(one):
    assert same_number(one, one)[0]
    assert stated_value(one) == value_of(one), "a gold means the same as an answer"
    for other in GOLDS:
        assert same_number(one, other)[0] == same_number(other, one)[0], other


# 10**20: value + 0.001 must fit the 28 digits of Decimal, the oracle.
DECIMALS = st.decimals(-(10**20), 10**20, allow_nan=False, allow_infinity=False, places=3)
SEPARATORS = st.sampled_from(["", ",", " ", "'", "_", "\u00a0", "\u2009", "\u202f"])


@examples(100)
@given(DECIMALS, SEPARATORS, st.sampled_from(["-", "\u2212", "\u2013", "minus "]), st.sampled_from(["", "$", "€"]))
def test_spellings_of_a_decimal_are_its_value(value, separator, minus, currency):
    """Decimal is the oracle, and the neighbour 0.001 away is another number."""
    spelled = f"{abs(value):,f}".replace(",", separator)
    text = (minus if value < 0 else "") + currency + spelled
    assert value_of(text).amount == Fraction(value), text
    assert stated_value(f"So, of 7 and 3, it is {text}.").amount == Fraction(value)
    assert same_number(f"{value:f}", text)[0] and not same_number(f"{value + Decimal('0.001'):f}", text)[0]


@examples(100)
@given(st.integers(0, 10**6), st.integers(1, 999), st.integers(1, 999), st.integers(-30, 30))
def test_fractions_mixed_numbers_and_powers_of_ten(whole, top, bottom, exponent):
    assert value_of(f"{top}/{bottom}").amount == Fraction(top, bottom)
    assert value_of(f"\\frac{{{top}}}{{{bottom}}}").amount == Fraction(top, bottom)
    assert value_of(f"{whole}e{exponent}").amount == whole * Fraction(10) ** exponent
    assert value_of(f"{whole} × 10^{exponent}").amount == whole * Fraction(10) ** exponent
    mixed = value_of(f"{whole} {top}/{bottom}")
    if top < bottom:
        assert mixed.amount == whole + Fraction(top, bottom)
    else:
        assert mixed is None or mixed.amount == Fraction(int(f"{whole}{top}"), bottom)  # groups of three: 5 100/7


SPELLINGS = st.sampled_from(["{:f}", "{:,f}", "${:,f}", "{:f} ", "#### {:f}", "{:f}000", "+{:f}"])


@examples(100)
@given(st.decimals(-2, 2, places=1), st.decimals(-2, 2, places=1), SPELLINGS, SPELLINGS)
def test_two_numbers_are_the_same_iff_their_values_are_whichever_is_the_gold(one, other, how, also):
    """Reflexive, symmetric, and with it transitive: the keys of two answers are equal iff their values are."""
    a, b = (spelling.format(value) for spelling, value in ((how, one), (also, other)))
    a, b = (text.replace("+-", "-").replace("$-", "-$") for text in (a, b))
    for gold, text in ((a, b), (b, a)):
        gold = gold.replace("#### ", "")
        assert same_number(gold, gold)[0]
        right, key = same_number(gold, text)
        assert right == (one == other) == (key == same_number(gold, gold)[1]), (gold, text)


@examples(100)
@given(st.text(alphabet="0123456789.,:/-+eE%$€ '_x^()½⁵−\n#kmt√<>=", max_size=40))
def test_any_text_has_a_value_or_none(text):
    """Never an error; and what is a number as a whole is the number that the text states."""
    value = value_of(text)
    stated_value(text)
    if value is not None and "\n" not in text.strip():
        assert stated_value(text) == value
        assert same_number(text, text)[0]


HOSTILE = [
    "9" * 100_000, "1," * 50_000, "1 000 " * 20_000, "1e" + "9" * 50_000, "<" * 100_000 + "5", "1 - " * 30_000 + "1",
    "#### " * 20_000, "½" * 50_000, "1/" * 50_000, "\\frac{" * 20_000, "5)" * 50_000, "1:23" * 30_000,
    "12 345" * 20_000, "5 hundred" + " million" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_end(text):
    """A search that is quadratic in the length would take minutes here, and a large exponent all memory."""
    stated_value(text)
    with pytest.raises(UserError, match="is not a number"):
        check_gold("number", text)


def test_a_currency_counts_only_if_the_gold_has_one():
    assert same_number("5", "$5")[1] == same_number("5", "€5")[1] == "number:5"
    assert same_number("$5", "6 €")[1] != same_number("$5", "$6")[1] == same_number("$5", "6")[1]
    assert same_number("5", "no idea") == (False, "text:no idea")
