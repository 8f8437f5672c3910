"""The synthetic NL-RX-like pairs: what the rows promise, and what a reader of the sentences can rely on."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import pytest

from llm_jepa.synthetic import nl_rx
from llm_jepa.synthetic.nl_rx import (
    ALL_OF,
    ANY_OF,
    BEFORE,
    BOTH,
    CHARACTER,
    CLAUSES,
    CONTAINS,
    DOG,
    EITHER,
    ENDS,
    HELD_OUT_WORDINGS,
    LINE,
    NOT,
    NOT_CONTAINS,
    NUM_WORDINGS,
    NUMBER,
    ONCE_OR_MORE,
    ONLY,
    REPEATS,
    RING,
    STARTS,
    SYSTEM_PROMPT,
    TRAIN_WORDINGS,
    TRUCK,
    UPPER,
    VOWEL,
    WORDS,
    ZERO_OR_MORE,
    at_least,
    generate,
    main,
    phrase,
    to_regex,
    write,
)

ALL_WORDINGS = range(NUM_WORDINGS)
AT_LEAST_TWO, AT_LEAST_THREE = at_least(2, "two"), at_least(3, "three")


def texts(rows: list[dict], role: str) -> list[str]:
    return [message["content"] for row in rows for message in row["messages"] if message["role"] == role]


@pytest.fixture(scope="module")
def worded() -> list[tuple[str, list[str]]]:
    """2000 regexes of every size, each with its six sentences."""
    by_wording = [generate(2000, seed=11, wordings=(wording,)) for wording in ALL_WORDINGS]
    sentences = zip(*(texts(rows, "user") for rows in by_wording), strict=True)
    return list(zip(texts(by_wording[0], "assistant"), map(list, sentences), strict=True))


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_is_a_system_prompt_a_sentence_and_its_regex():
    for row in generate(20, wordings=(0, 3)):
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == SYSTEM_PROMPT


def test_the_first_rows_are_the_same_when_more_are_asked_for():
    assert generate(50, seed=3, wordings=(0, 1, 2)) == generate(100, seed=3, wordings=(0, 1, 2))[:50]


def test_another_seed_gives_other_regexes():
    first, second = (set(texts(generate(200, seed=seed), "assistant")) for seed in (0, 1))
    assert len(first & second) < 100


def test_another_version_gives_other_rows(monkeypatch: pytest.MonkeyPatch):
    before = generate(20)
    monkeypatch.setattr(nl_rx, "VERSION", nl_rx.VERSION + 1)
    assert generate(20) != before


def test_the_rows_of_this_version_are_these():
    # Pinned: whoever changes the grammar sees this fail, and raises VERSION with it.
    assert nl_rx.VERSION == 1
    rows = generate(3, wordings=(0, 4))
    assert list(zip(texts(rows, "assistant"), texts(rows, "user"), strict=True)) == [
        ("((truck)(.*))&(~((.*)([0-9])))", "find lines that both begin with 'truck' and do not finish with a digit"),
        (
            r"\b((([A-Z])|(ring)){2,})\b",
            "lines with words with a capital letter or the string 'ring', 2 or more times",
        ),
        ("(~(([A-Z])(.*)))|(.*(lake).*)", "lines not starting with a capital letter or containing the string 'lake'"),
    ]


def test_the_regexes_of_a_split_are_distinct_and_of_readable_length():
    regexes = texts(generate(2000), "assistant")
    assert len(set(regexes)) == 2000
    assert all(5 <= len(regex) <= 45 for regex in regexes)


def test_the_splits_share_no_regex_whatever_the_seeds():
    train = set(texts(generate(2000, seed=0), "assistant")) | set(texts(generate(2000, seed=1), "assistant"))
    validation = set(texts(generate(200, seed=2, split="validation"), "assistant"))
    test = set(texts(generate(200, seed=0, split="test"), "assistant"))
    assert not train & validation and not train & test and not validation & test


def test_every_wording_asks_for_the_same_regexes_in_the_same_order():
    regexes = texts(generate(200, split="test", wordings=(0,)), "assistant")
    for wordings in ((1,), (4,), (4, 5), tuple(ALL_WORDINGS)):
        assert texts(generate(200, split="test", wordings=wordings), "assistant") == regexes


def test_every_asked_for_wording_is_used_about_equally_often():
    sentences = texts(generate(600, wordings=(0, 4)), "user")
    originals = texts(generate(600, wordings=(0,)), "user")
    assert 250 < sum(one == other for one, other in zip(sentences, originals, strict=True)) < 350


# --- sentences ------------------------------------------------------------------------------------------------------


def test_held_out_wordings_use_no_word_that_training_wordings_do_not(worded):
    def words(wordings: tuple[int, ...]) -> set[str]:
        return {
            word
            for _, sentences in worded
            for wording in wordings
            for word in sentences[wording].replace(",", "").split()
        }

    assert words(HELD_OUT_WORDINGS) <= words(TRAIN_WORDINGS)


def test_held_out_sentences_are_not_training_sentences(worded):
    trained = {sentences[wording] for _, sentences in worded for wording in TRAIN_WORDINGS}
    held_out = {sentences[wording] for _, sentences in worded for wording in HELD_OUT_WORDINGS}
    assert not trained & held_out


def test_one_sentence_never_asks_for_two_regexes(worded):
    regex_of: dict[str, str] = {}
    for regex, sentences in worded:
        for sentence in sentences:
            # Commas are no help to a reader who skims them.
            assert regex_of.setdefault(sentence.replace(",", ""), regex) == regex


def test_sentences_have_5_to_25_words_in_every_wording(worded):
    assert all(5 <= len(sentence.split()) <= 25 for _, sentences in worded for sentence in sentences)


def test_every_operator_has_six_wordings_that_name_its_operands_in_the_order_of_the_regex():
    operators = [LINE, ALL_OF, ANY_OF, BEFORE, BOTH, EITHER, NOT, *REPEATS, *(one for pair in CLAUSES for one in pair)]
    for operator in operators:
        in_regex = re.findall(r"\{\d\}", operator.regex)
        for wording, template in zip(ALL_WORDINGS, operator.wordings, strict=True):
            # "b after a" and "b that comes after a" are the only ones that turn the order around.
            turned = operator is BEFORE and wording in (2, 5)
            assert re.findall(r"\{\d\}", template) == (in_regex[::-1] if turned else in_regex), template


def test_every_atom_has_six_nouns():
    assert {len(atom.nouns) for atom in nl_rx.ATOMS} == {NUM_WORDINGS}


def test_the_six_wordings_of_a_line_with_every_level_read_as_written_here():
    line = LINE(ALL_OF(STARTS(BEFORE(AT_LEAST_THREE(VOWEL), DOG)), NOT_CONTAINS(EITHER(NUMBER, RING))))
    assert to_regex(line) == "(((([AEIOUaeiou]){3,}).*(dog))(.*))&(~(.*(([0-9])|(ring)).*))"
    assert [phrase(line, wording) for wording in ALL_WORDINGS] == [
        "lines starting with a vowel, 3 or more times before the string 'dog'"
        " and not containing a number or the string 'ring'",
        "lines that start with at least 3 of a vowel followed by the string 'dog'"
        " and also do not contain either a digit or the string 'ring'",
        "find every line in which 'dog' after a vowel repeated three times or more comes first"
        " while a number or else 'ring' is not present",
        "match a line if it begins with a vowel at least three times and then the text 'dog'"
        " and it does not have one of a number or the text 'ring' anywhere",
        "find lines that both begin with three or more of a vowel then followed by 'dog'"
        " and do not have either a digit or else 'ring' anywhere",
        "if a line has the string 'dog' that comes after a vowel repeated at least 3 times first"
        " and it also does not have one of either a number or the string 'ring' in it, match it",
    ]


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(nl_rx) == (0, 2)


# --- regexes --------------------------------------------------------------------------------------------------------


def test_regexes_without_and_and_not_compile(worded):
    plain = [regex for regex, _ in worded if not set("&~") & set(regex)]
    assert len(plain) > 500
    for regex in plain:
        re.compile(regex)


@pytest.mark.parametrize(
    ("part", "regex", "accepted", "rejected"),
    [
        (STARTS(VOWEL), "([AEIOUaeiou])(.*)", "apple", "dog"),
        (ENDS(DOG), "(.*)(dog)", "hot dog", "dog house"),
        (CONTAINS(NUMBER), ".*([0-9]).*", "a1b", "ab"),
        (WORDS(EITHER(DOG, TRUCK)), r"\b((dog)|(truck))\b", "truck", "ring"),
        (ONLY(BEFORE(DOG, TRUCK)), "((dog).*(truck))", "dog and truck", "truck and dog"),
        (ONLY(AT_LEAST_TWO(UPPER)), "(([A-Z]){2,})", "AB", "A"),
        (ONLY(AT_LEAST_THREE(DOG)), "((dog){3,})", "dogdogdog", "dogdog"),
        (ONLY(ONCE_OR_MORE(RING)), "((ring)+)", "ringring", ""),
        (ONLY(ZERO_OR_MORE(RING)), "((ring)*)", "", "rin"),
        (ANY_OF(STARTS(DOG), ENDS(CHARACTER)), "((dog)(.*))|((.*)(.))", "x", ""),
    ],
)
def test_a_regex_accepts_what_its_sentence_says(part, regex, accepted, rejected):
    assert to_regex(LINE(part)) == regex
    assert re.fullmatch(regex, accepted)
    assert not re.fullmatch(regex, rejected)


def test_and_and_not_are_written_in_the_dialect():
    assert to_regex(LINE(STARTS(BOTH(DOG, NOT(VOWEL))))) == "((dog)&(~([AEIOUaeiou])))(.*)"
    assert to_regex(LINE(NOT_CONTAINS(DOG))) == "~(.*(dog).*)"
    assert to_regex(LINE(ALL_OF(STARTS(DOG), ENDS(RING)))) == "((dog)(.*))&((.*)(ring))"


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, -3])
def test_a_number_of_rows_that_is_not_positive_is_refused(num_rows):
    with pytest.raises(ValueError, match=f"num_rows={num_rows}.*1 or more"):
        generate(num_rows)


def test_an_unknown_split_is_refused_by_naming_the_known_ones():
    with pytest.raises(ValueError, match="'dev'.*train, validation, test"):
        generate(1, split="dev")


@pytest.mark.parametrize("wording", [-1, NUM_WORDINGS])
def test_a_wording_out_of_range_is_refused(wording):
    with pytest.raises(ValueError, match=f"wording {wording} .*0 to 5"):
        generate(1, wordings=(0, wording))
    with pytest.raises(ValueError, match=f"wording {wording} .*0 to 5"):
        phrase(LINE(STARTS(VOWEL)), wording)


def test_no_wordings_at_all_are_refused():
    with pytest.raises(ValueError, match="needs a wording"):
        generate(1, wordings=())


def test_more_rows_than_the_grammar_yields_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="num_rows=1000000000: .*fewer rows"):
        generate(10**9)
    monkeypatch.setattr(nl_rx, "MAX_DRAWS", 1000)
    with pytest.raises(ValueError, match="num_rows=900: 1000 draws .*'train'.*fewer rows"):
        generate(900)


# --- files and command line -----------------------------------------------------------------------------------------


def test_the_same_arguments_write_the_same_bytes_and_leave_nothing_else(tmp_path: Path):
    first = write(tmp_path / "a", train=60, validation=8, test=9, seed=5)
    second = write(tmp_path / "b", train=60, validation=8, test=9, seed=5)
    assert list(first) == ["train", "validation", "original_test", "paraphrase_test"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(f"{name}.jsonl" for name in first)
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes()
    other = write(tmp_path / "c", train=60, validation=8, test=9, seed=6)
    assert other["train"].read_bytes() != first["train"].read_bytes()


def test_a_file_holds_the_rows_of_its_split_and_wordings(tmp_path: Path):
    rows = {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in write(tmp_path, train=60, validation=8, test=9, seed=5).items()
    }
    assert rows["train"] == generate(60, seed=5, wordings=(0, 1, 2, 3))
    assert rows["validation"] == generate(8, seed=5, split="validation", wordings=(0, 1, 2, 3))
    assert rows["original_test"] == generate(9, seed=5, split="test", wordings=(0,))
    assert rows["paraphrase_test"] == generate(9, seed=5, split="test", wordings=(4, 5))
    assert texts(rows["original_test"], "assistant") == texts(rows["paraphrase_test"], "assistant")


def test_an_interrupted_write_leaves_the_old_file_and_no_partial_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = write(tmp_path, train=6, validation=2, test=2)["train"].read_bytes()
    assert old.endswith(b"}\n")

    def fail(*_: object) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(nl_rx.os, "replace", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write(tmp_path, train=6, validation=2, test=2, seed=1)
    assert (tmp_path / "train.jsonl").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 4


def test_a_refused_argument_writes_nothing(tmp_path: Path):
    with pytest.raises(ValueError):
        write(tmp_path / "out", train=5, validation=5, test=0)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_each_file_with_its_number_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), "--train", "7", "--validation", "5", "--test", "3", "--seed", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / name}.jsonl: {count} rows"
        for name, count in (("train", 7), ("validation", 5), ("original_test", 3), ("paraphrase_test", 3))
    ]
    for name, count in (("train", 7), ("validation", 5), ("original_test", 3), ("paraphrase_test", 3)):
        assert len((tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()) == count


@pytest.mark.parametrize(
    "arguments",
    [["--train", "0"], ["--test", "-1"], ["--train", "many"], ["--seeds", "1"], ["--validation", "9" * 12]],
)
def test_the_command_refuses_a_bad_value_in_one_line(arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "out"), "--train", "9", "--validation", "9", *arguments])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_refuses_a_folder_that_is_a_file_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "taken"), "--train", "2", "--validation", "2", "--test", "2"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
