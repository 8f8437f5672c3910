"""Claims about grading: numbers are no floats, nothing is no answer, a likelihood is that of one row alone."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval import graders
from eval.graders import gsm8k, marked_number, number, open_answer, squad_normalized
from eval.graders.cider import cider_d
from eval.graders.sql import Databases
from eval.tasks import TASKS, Group
from eval.tasks.choices import one_of as one_of_choices
from llm_jepa import UserError
from llm_jepa.lm.inference import Choice, choose_batches, encode
from llm_jepa.lm.predictor_tokens import add_predictor_tokens
from tests.conftest import tiny_model
from tests.properties import examples

# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", "18"),
        ("#### $1,234.50.", "1234.5"),
        ("007", "7"),
        ("-0.00", "0"),
        ("-$3", "-3"),
        ("\u22123 degrees", "-3"),
        (".5", "0.5"),
        ("12.", "12"),
        ("10-3", "10"),
        ("x2-3", "2"),
        ("1,2345", "1"),  # no thousands
        ("100000000000000000000000000001", "100000000000000000000000000001"),  # as floats, equal to the one without 1
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("none", None),
        ("$ , . -", None),
        ("\u0663", None),  # an Arabic-Indic three: no digit of ours
    ],
)
def test_numbers_by_hand(text, value):
    assert number(text) == value


# 10**20: value + 0.001 must fit the 28 digits of Decimal, the oracle.
@examples(100)
@given(
    st.decimals(-(10**20), 10**20, allow_nan=False, allow_infinity=False, places=3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_two_spellings_are_one_number_and_two_numbers_are_two(value, commas, dollar, dot):
    """However it is written, the key is that value (Decimal is the oracle) and that of no neighbour."""
    text = f"{abs(value):,f}" if commas else f"{abs(value):f}"
    text = ("-" if value < 0 else "") + ("$" if dollar else "") + text + ("." if dot else "")
    value_read = number(f"so it is {text}")
    assert value_read is not None and Decimal(value_read) == value
    assert number(f"{value:f}") == value_read and number(f"{value + Decimal('0.001'):f}") != value_read


def test_last_number_takes_no_sign_from_a_subtraction():
    assert number("it is 20-5", last=True) == "5" and number("it is -5", last=True) == "-5"
    assert number("(3)-2", last=True) == "2"


def test_gsm8k_by_hand():
    """Marked and right; right but unmarked (apart); marked wrong though the last number is right; 1,000 is 1000."""
    grade = lambda gold, text: gsm8k(f"2+3\n#### {gold}", text, True)  # noqa: E731
    assert grade("5", "so\n#### 5").scores == {"number": 1, "last_number": 1, "stop_rate": 1}
    assert grade("5", "so it is 5").scores == {"number": 0, "last_number": 1, "stop_rate": 1}
    assert grade("5", "#### 4\nor 5").scores == {"number": 0, "last_number": 0, "stop_rate": 1}
    assert grade("1,000", "#### 1000.00").scores["number"] == 1
    assert grade("5", "").scores == {"number": 0, "last_number": 0, "stop_rate": 1}
    assert grade("5", "#### 5\nQ: more? #### 9").scores["number"] == 1, "only the first answer is to this question"
    assert grade("5", "#### 5").answer_key == grade("5", "x #### $5.0").answer_key
    assert grade("5", "#### 5").answer_key != grade("5", "#### 6").answer_key
    assert marked_number("####\n5") is None, "an answer stands on the line of its mark"


# -- regexes ----------------------------------------------------------------------------------------------------------


def test_a_regex_is_right_if_it_matches_the_same_lines():
    grade = graders.regex("(a|b).*", "[ab].*", True)
    assert grade.scores == {
        "exact": 0, "startswith": 0, "contains": 0, "stop_rate": 1, "equivalent": 1, "undecided": 0, "nondegenerate": 1,
    }  # fmt: skip
    assert grade.answer_key == graders.regex("(a|b).*", "(b|a).*", True).answer_key
    wrong = graders.regex("(a|b).*", "[ab].", False)
    assert wrong.scores["equivalent"] == wrong.scores["nondegenerate"] == wrong.scores["stop_rate"] == 0
    assert wrong.answer_key != grade.answer_key
    assert wrong.answer_key == graders.regex("x", "(a|b).", True).answer_key, "the key is the answer's, not the gold's"


def test_degenerate_golds_do_not_count_and_broken_answers_are_wrong():
    assert "nondegenerate" not in graders.regex(".*", ".*.*", True, degenerate=True).scores
    broken = graders.regex("a", "(((", True)
    assert broken.scores["equivalent"] == 0 and broken.scores["undecided"] == 0
    assert broken.answer_key != graders.regex("a", "((", True).answer_key
    assert graders.regex("a", "", True).scores["equivalent"] == 0


# -- short answers ----------------------------------------------------------------------------------------------------


def test_normalized_by_hand():
    assert squad_normalized("  The  U.S.\u00a0Army! ") == "us army"
    assert squad_normalized("An apple a day") == "apple day" and squad_normalized("theatre") == "theatre"
    assert squad_normalized("The The") == "the the" and squad_normalized("...") == ""


def test_open_answers_by_hand_and_against_the_published_code():
    """The published test, `any(piece in gold for piece in answer.split("; "))`, is true of every one of `free`."""
    golds = ["January 4, 2019", "4 January 2019"]
    scores = lambda text: open_answer(golds, text, True).scores  # noqa: E731
    free = ["", "J", "2019", " "]
    assert all(any(piece in "; ".join(golds) for piece in text.split("; ")) for text in free)
    for text in free:
        assert scores(text) == {"equal": 0, "any_listed": 0, "contains": 0, "stop_rate": 1}, text
    assert scores("the 4 january 2019.")["equal"] == 1
    assert scores("1999; January 4, 2019") == {"equal": 0, "any_listed": 1, "contains": 1, "stop_rate": 1}
    assert scores("It was on January 4, 2019, I think") == {"equal": 0, "any_listed": 0, "contains": 1, "stop_rate": 1}
    assert open_answer(["5"], "15", True).scores["contains"] == 0, "whole words only"
    one, other = (open_answer(golds, text, True).answer_key for text in golds)
    assert one == other, "two right answers are the same answer"
    assert open_answer(["..."], "...", True).scores["equal"] == 0


def test_squads_normalisation_is_nq_opens_alone():
    """It makes C++ and C one answer; the graders of user files do not use it."""
    assert open_answer(["C"], "C++", True).scores["equal"] == 1
    assert not graders.one_of("C", "C++")[0] and not graders.starts_with("C", "C++ is")[0]


SAME_TEXTS = [
    ("Paris", "paris"), ("Paris", " Paris\n"), ("Paris", "Paris."), ("Paris", "**Paris**."),
    ("Paris", "“Paris”"),
    ("Paris", "«Paris»"), ("Paris", "`Paris`!"), ("Paris", "'Paris'"), ("the Beatles", "Beatles"),
    ("a dog", "The dog"), ("an apple", "apple"), ("B", "(B)"), ("B", "b."), ("Yahoo!", "Yahoo"), ("U.S.", "u.s"),
    ("New York", "new  york"), ("New York", "New\u00a0York"), ("café", "cafe\u0301"), ("fine", "ﬁne"),
    ("C", "Ｃ"), ("1914-1918", "1914–1918"), ("don't", "don’t"),
    ("Really?!", "really"), ("¿Quién?", "quién"),
    ("C++", "c++."), (".NET", ".net"), ("AC/DC", "ac/dc"), ("10:45", "10:45."), ("/", "/"), ("...", "..."),
    ("The The", "the the"), ("A", "a"), ("5", "5."), ("東京", "東京。"),
]  # fmt: skip
OTHER_TEXTS = [
    ("1.5 million", "15 million"), ("C++", "C"), ("C#", "C"), ("C#", "C++"), (".NET", "NET"), ("5%", "5"), ("$5", "5"),
    ("-5", "5"), ("+5", "5"), ("5!", "5"), ("1/2", "12"), ("3:2", "32"), ("10:45", "1045"), ("10⁵", "105"),
    ("x²", "x2"),
    ("½", "12"), ("A+", "A"), ("A-", "A"), ("resume", "résumé"), ("6'", "6"),
    ('6"', "6"), ("(1, 2)", "[1, 2]"),
    ("f(x)", "fx"), ("a_b", "ab"), ("__init__", "init"), ("!x", "x"), ("~5", "5"), ("192.168.1.1", "1921.6811"),
    ("man the boats", "man boats"), ("vitamin a", "vitamin"), ("The The", "The"), ("co-op", "coop"), ("3 - 2", "32"),
    ("@home", "home"), ("#1", "1"), ("a", "an"), ("...", "x"), ("5€", "5"), ("re-sign", "resign"), ("AT&T", "ATT"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME_TEXTS)
def test_differences_without_a_meaning(one, other):
    assert graders.plain(one) == graders.plain(other)
    assert graders.one_of(one, other) == graders.one_of(other, other) and graders.one_of(other, one)[0]


@pytest.mark.parametrize(("one", "other"), OTHER_TEXTS)
def test_differences_with_a_meaning(one, other):
    for gold, text in ((one, other), (other, one)):
        right, key = graders.one_of(gold, text)
        assert not right and key != graders.one_of(gold, gold)[1]
        assert not graders.open_answer([gold], "", True).scores["equal"]


def test_cloze_answers_run_on():
    right, key = graders.starts_with("New York", "New York, where she died in 1999.")
    assert right and key == graders.starts_with("New York", "new york")[1]
    assert not graders.starts_with("York", "Yorkshire")[0] and not graders.starts_with("...", "anything")[0]
    assert graders.starts_with("Rome", "Paris. It")[1] == graders.starts_with("Rome", "Paris, a city")[1]
    for text in ('"Rome" is it', "Rome: a city", "Rome! Yes", "**Rome** is", "The Rome of", "Rome\u2014where", "rome"):
        assert graders.starts_with("Rome", text) == (True, "rome"), text
    for gold, text in [("1", "1.5 million"), ("5", "5% of"), ("6", '6" pipe'), ("5", "5! is 120"), ("C", "C# is")]:
        assert not graders.starts_with(gold, text)[0], text
    assert graders.starts_with("x", "1.5 million. So")[1] != graders.starts_with("x", "1.7 million. So")[1]


MARKED = st.lists(st.sampled_from([*"aAbB.!?\"'“”’*`() ;-—…5:/\n", "the ", "The ", "**", "..."]), max_size=8).map(
    "".join
)


@examples(100)
@given(st.text(max_size=20) | MARKED, st.text(max_size=20) | MARKED)
def test_keys_of_words_agree_with_their_grades(gold, text):
    """The key is the right answers' iff the answer is right, and normalising twice changes nothing that counts."""
    for grade in (graders.one_of, graders.starts_with, graders.exact):
        if not gold.strip() or "; " in gold or not grade(gold, gold)[0]:
            continue
        right, key = grade(gold, text)
        assert right == (key == grade(gold, gold)[1]) or grade is graders.starts_with and not text.strip()
    if gold.strip() and text.strip() and "; " not in gold + text:
        assert graders.one_of(gold, text)[0] == graders.one_of(text, gold)[0]


# -- the ends of a text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [" ", "\n", "\t\r\n ", "\u00a0", "\u2003"])
def test_white_space_at_the_ends_counts_on_neither_side(space):
    """Generation strips an answer, so a gold that kept its spaces could never be equalled."""
    for gold, text in ((f"a{space}", "a"), (f"{space}a", "a"), ("a", f"{space}a{space}"), (f"a{space}", f"{space}a")):
        assert graders.written(gold, text, True) == {"exact": 1, "startswith": 1, "contains": 1, "stop_rate": 1}
        assert graders.regex(gold, text, True).scores == graders.regex("a", "a", True).scores
        for grade in (graders.same_language, graders.exact, graders.one_of, graders.starts_with):
            assert grade(gold, text) == grade("a", "a")
        assert graders.same_number(gold.replace("a", "5"), text.replace("a", "5")) == (True, "number:5")
        assert graders.open_answer([gold], text, True).scores["equal"] == 1
        assert gsm8k(gold.replace("a", "#### 5"), text.replace("a", "#### 5"), True).scores["number"] == 1
        cider = [cider_d([caption], [["a"]], document_frequency=[["a"], ["b"]])[0] for caption in (text, "a")]
        assert cider[0] == cider[1]


def test_a_space_that_a_regex_needs():
    r"""In `a\ ` the space is escaped: cut off, the gold would be no regex. `[ ]` needs no such care."""
    key = graders.same_language("a[ ]", "a[ ]")[1]
    for text in ("a\\ ", "a\\", "a[ ]"):
        assert graders.same_language("a\\ ", text) == (True, key), text
    assert not graders.same_language("a\\ ", "a")[0] and not graders.same_language("a[ ]", "a")[0]
    assert graders.same_language("a\\\\ ", "a\\\\")[0], "an escaped backslash, then a space"
    assert not graders.same_language("a[ ]", "a\\")[0], "only for a gold that ends so"
    graders.check_gold("regex", "a\\ ")


def test_a_choice_is_right_whatever_space_it_has():
    extra = one_of_choices((" yes", "no "))("", "yes")
    group = Group("a", ("q",), ("0",), "yes", extra)
    assert TASKS["paws"].grade(group, " yes", True).scores["accuracy"] == 1
    assert TASKS["paws"].grade(group, "no ", True).scores["accuracy"] == 0
    with pytest.raises(ValueError, match="must be different texts"):
        one_of_choices(("yes", "yes "))("", "yes")


@pytest.mark.parametrize(
    ("grader", "gold", "message"),
    [
        ("exact", " \n", "is empty or white space"),
        ("startswith", "", "is empty"),
        ("number", "seven", "'seven' is not a number"),
        ("number", "5 km", "Give the number alone"),
        ("regex", "a(", "not a regex"),
        ("alternatives", "one; ; two", "an empty alternative"),
    ],
)
def test_golds_that_no_answer_could_equal(grader, gold, message):
    with pytest.raises(UserError, match=message):
        graders.check_gold(grader, gold)


def test_graders_of_user_files():
    assert graders.BY_NAME["number"]("#### 7", "seven, so 7.0") == (True, "number:7")
    assert not graders.BY_NAME["number"]("7", "seven")[0]
    with pytest.raises(UserError, match="'seven' is not a number"):
        graders.BY_NAME["number"]("seven", "seven")
    assert graders.BY_NAME["regex"]("a|b", "[ab]")[0] and not graders.BY_NAME["regex"]("a", "b")[0]
    assert graders.BY_NAME["alternatives"]("one; 1", "1")[0] and not graders.BY_NAME["alternatives"]("one; 1", "2")[0]
    assert graders.BY_NAME["exact"]("a ", " a") == (True, "a") and not graders.BY_NAME["exact"]("a", "A")[0]


# -- SQL --------------------------------------------------------------------------------------------------------------


def test_sql_by_execution(tmp_path):
    (tmp_path / "shop").mkdir()
    with sqlite3.connect(tmp_path / "shop" / "shop.sqlite") as connection:
        connection.execute("CREATE TABLE items (name TEXT, price INT)")
        connection.executemany("INSERT INTO items VALUES (?, ?)", [("cup", 3), ("pot", 9)])
    connection.close()
    with Databases(tmp_path) as databases:
        grade = lambda answer: graders.sql_execution(  # noqa: E731
            databases.grade("shop", "SELECT name FROM items WHERE price > 5", answer), True
        )
        right = grade("SELECT name FROM items WHERE price = 9")
        assert right.scores == {"execution": 1, "failed": 0, "stop_rate": 1}
        assert right.answer_key == grade("SELECT 'pot'").answer_key
        assert grade("SELECT name FROM items").scores == {"execution": 0, "failed": 0, "stop_rate": 1}
        assert grade("SELECT nam FROM items").scores == {"execution": 0, "failed": 1, "stop_rate": 1}
        assert grade("").scores["execution"] == 0


# -- multiple choice --------------------------------------------------------------------------------------------------


def test_choice_by_hand():
    """-3 nats over 1 character or -4 over 4: the sum prefers the first, the mean the second."""
    choice = Choice((-3.0, -4.0, -9.0), (1, 4, 3))
    assert choice.most_likely == 0 and choice.most_likely_per_character == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_likelihoods_are_those_of_each_row_alone(family, tokenizer):
    """Against one unpadded forward pass a row, over the whole vocabulary, token by token; questions of unequal length
    with unequal numbers of choices, whatever the batch. In float64, so that the tolerance can be small."""
    model = tiny_model(tokenizer, family, torch.float64).eval()
    prompts = ["lines with", [{"role": "user", "content": "a line that has a digit or a vowel"}], "b"]
    choices = [[" a", " the word dog", " z"], ["yes", "no"], [" x y", " starts with", " q", " 7"]]
    expected = []
    for ids, options in zip(encode(tokenizer, prompts), choices, strict=True):
        sums = []
        for option in options:
            new = tokenizer(option, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids + new]), use_cache=False).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[len(ids) - 1 + i, token]) for i, token in enumerate(new)))
        expected.append(sums)
    assert len({len(tokenizer(o, add_special_tokens=False)["input_ids"]) for some in choices for o in some}) > 2
    for batch_size in (1, 2, 4, 50):
        scored = {}
        for batch in choose_batches(model, tokenizer, prompts, choices, batch_size=batch_size):
            scored.update(batch)
        for index, sums in enumerate(expected):
            assert scored[index].log_likelihoods == pytest.approx(sums, abs=1e-9)
    assert scored[0].num_characters == (1, 12, 1)


def test_suppressed_tokens_take_no_probability(tokenizer):
    """Adding predictor tokens with huge logits changes no likelihood: the model never generates them."""
    model = tiny_model(tokenizer, "llama", torch.float64, tie_word_embeddings=False).eval()
    prompts = ["lines with"]
    (before,) = choose_batches(model, tokenizer, prompts, [[" a", " dog"]], batch_size=8)
    ids = add_predictor_tokens(model, tokenizer, 2)
    with torch.no_grad():
        model.get_output_embeddings().weight[ids] = 100 * model.get_output_embeddings().weight[:2]
    (after,) = choose_batches(model, tokenizer, prompts, [[" a", " dog"]], batch_size=8)
    assert after[0].log_likelihoods == pytest.approx(before[0].log_likelihoods, abs=1e-9)


# -- metrics for Hugging Face evaluate --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`evaluate.load` of a folder of ours, offline, with its caches elsewhere."""
    evaluate = pytest.importorskip("evaluate")
    caches = tmp_path_factory.mktemp("evaluate")
    folder = Path(graders.__file__).parents[1] / "metrics"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(caches / "modules"))
        yield lambda name: evaluate.load(str(folder / name), cache_dir=str(caches / "cache"))


def test_regex_equivalence_metric(load):
    metric = load("regex_equivalence")
    figures = metric.compute(predictions=["[ab].*", "x", "((", "q"], references=["(a|b).*", "y", "z", "q"])
    assert figures == {"equivalent": 0.5, "exact": 0.25, "undecided": 0}
    with pytest.raises(UserError, match="The answer is not a regex"):
        metric.compute(predictions=["(("], references=["(("])


def test_sql_execution_metric(load, tmp_path):
    (tmp_path / "shop").mkdir()
    sqlite3.connect(tmp_path / "shop" / "shop.sqlite").execute("CREATE TABLE items (name TEXT)").connection.close()
    figures = load("sql_execution").compute(
        predictions=["SELECT 2 - 1", "SELECT 2", "SELECT", "SELECT 3"],
        references=["SELECT 1", "SELECT 1", "SELECT name FROM items", "SELECT 3"],
        db_ids=["shop"] * 4,
        databases=str(tmp_path),
    )
    assert figures == {"execution": 0.5, "failed": 0.25}


def test_paraphrase_consistency_metric(load):
    """Group a: both right. Group b: a wrong answer twice, a right one once: 1 of 3 pairs agrees, and not rightly."""
    metric = load("paraphrase_consistency")
    rows = [("4", "a"), ("5", "b"), ("4.0", "a"), ("5.0", "b"), ("4", "b")]
    columns = {"predictions": [text for text, _ in rows], "groups": [group for _, group in rows]}
    figures = metric.compute(**columns, references=["4"] * 5, grader="number")
    assert figures["accuracy"] == pytest.approx((1 + 1 / 3) / 2) and figures["worst_of_k"] == 0.5
    assert figures["consistency"] == pytest.approx((1 + 1 / 3) / 2) and figures["consistent_and_correct"] == 0.5
    with pytest.raises(UserError, match="did you mean 'number'"):
        metric.compute(**columns, references=["4"] * 5, grader="numbr")
    with pytest.raises(UserError, match="'four' is not a number"):
        metric.compute(**columns, references=["four"] * 5, grader="number")


@pytest.mark.parametrize("other_package", [False, True])
def test_a_metric_elsewhere_says_where_it_belongs(other_package, tmp_path):
    """In one interpreter for all metrics, far from the repository; with another package named eval installed, too."""
    pytest.importorskip("evaluate")
    if other_package:
        (tmp_path / "eval").mkdir()
        (tmp_path / "eval" / "__init__.py").write_text("")
    metrics = Path(graders.__file__).parents[1] / "metrics"
    names = sorted(path.name for path in metrics.iterdir() if path.is_dir() and not path.name.startswith("_"))
    assert len(names) == 3
    code = f"""
import sys
sys.modules["llm_jepa_eval"] = None  # not installed
import evaluate
for name in {names!r}:
    try:
        evaluate.load({str(metrics)!r} + "/" + name)
    except ImportError as error:
        print(error)
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_EVALUATE_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr[-1000:]
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"The metric {name} is a part of llm_jepa, and Python cannot see it")
        assert "llm-jepa[eval]" in line and "run Python in the root of the repository" in line and "'eval'" not in line


def test_metrics_are_classes_like_others():
    """Without `evaluate.load`, from the repository's root."""
    pytest.importorskip("evaluate")
    from eval.metrics.regex_equivalence.regex_equivalence import RegexEquivalence

    assert RegexEquivalence().compute(predictions=["a"], references=["a|a"])["equivalent"] == 1
