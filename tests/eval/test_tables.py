"""Figures as text, as the committed reports have them."""

import pytest

from eval.figures.tables import aligned_table, estimate_spread, markdown_table, mean_spread, sample_sd


def test_mean_and_sample_standard_deviation():
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, sd = sqrt(14 / 2) = 2.6458."""
    assert mean_spread([1.0, 2.0, 6.0], ".2f") == "3.00 ± 2.65"
    assert mean_spread([1.0, 2.0, 6.0], "+.1f") == "+3.0 ± 2.6"


def test_a_single_value_has_no_spread():
    assert sample_sd([4.0]) is None
    assert mean_spread([4.0]) == "4.0"
    assert estimate_spread(0.5, None, ".2f") == "0.50"


def test_markdown_table():
    rows = [["sft", "1.0", ""], ["jepa", "2.5", "x"]]
    assert markdown_table(["arm", "", "note"], rows, align="lrl") == (
        "| arm | | note |\n|---|---:|---|\n| sft | 1.0 |  |\n| jepa | 2.5 | x |"
    )
    assert markdown_table(["a", "b"], []) == "| a | b |\n|---|---:|"


def test_a_row_of_another_width_is_refused():
    with pytest.raises(ValueError, match="2 columns cannot have a row of 1"):
        markdown_table(["a", "b"], [["1"]])


def test_aligned_table():
    assert aligned_table(["%", "accuracy"], [["a longer name", "1.0"]]) == (
        "| %             | accuracy |\n| ------------- | -------: |\n| a longer name |      1.0 |"
    )
