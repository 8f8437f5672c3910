"""A gold answer is right, in every task and for every gold: whatever it is and whatever space surrounds it."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import graders
from eval.graders.cider import cider_d
from eval.tasks import TASKS, Data
from llm_jepa.synthetic import nl_rx as generator
from tests.eval.number_pairs import DIFFERENT, EQUAL, pairs
from tests.properties import examples

SHARED = Path(__file__).parents[3] / "shared" / "data"
SPACES = ("", " ", "\n")


def assert_golds_are_right(name: str, data: Data) -> int:
    """Count the golds. Each is right with every space at its ends, and all right answers of a group share a key."""
    task, count = TASKS[name], 0
    for group in data.groups:
        answers = [group.answer]
        if name == "nq_open":
            answers = [text for text in group.extra["alternatives"] if graders.squad_normalized(text)]
        keys = set()
        for answer in answers:
            for space in SPACES:
                scores, key = task.grade(group, f"{space}{answer}{space}", True)
                assert scores[task.metric] == 1, (name, group.answer, answer)
                assert scores.get("exact", 1) == 1, (name, answer)
                keys.add(key)
        assert len(keys) == 1, (name, group.answer)
        count += len(answers)
    return count


def load(name: str, rows: list[dict]) -> Data:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be graded and are left out")
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return TASKS[name].load(str(path))


TEXT = st.text(st.characters(codec="utf-8", exclude_characters=";"), min_size=1, max_size=30)
WORDS = TEXT.filter(lambda text: text.strip() and graders.squad_normalized(text))
NUMBERS = st.sampled_from(sorted({gold for gold, _ in pairs(EQUAL) + pairs(DIFFERENT)}))
REGEXES = st.sampled_from([row["messages"][-1]["content"] for row in generator.generate(200, seed=7)])


@examples(20)
@given(
    st.lists(st.tuples(st.lists(WORDS, min_size=1, max_size=3), st.lists(TEXT, max_size=1)), min_size=1, max_size=10)
)
def test_nq_open(rows):
    data = load("nq_open", [{"question": "q", "answer": words + others} for words, others in rows])
    assert len(data.groups) == len(rows) and assert_golds_are_right("nq_open", data) >= len(rows)


@examples(20)
@given(st.lists(st.decimals(-(10**9), 10**9, places=2), min_size=1, max_size=10), TEXT.filter(lambda t: "#" not in t))
def test_gsm8k(numbers, solution):
    rows = [{"question": "q", "answer": f"{solution}\n#### {value:{mark}f}"} for value in numbers for mark in ("", ",")]
    assert assert_golds_are_right("gsm8k", load("gsm8k", rows)) == len(rows)


GROUPS = st.one_of(
    st.tuples(st.sampled_from([None, "exact", "startswith", "alternatives"]), TEXT.filter(str.strip)),
    st.tuples(st.just("alternatives"), st.lists(TEXT.filter(str.strip), min_size=1, max_size=3).map("; ".join)),
    st.tuples(st.just("number"), NUMBERS),
    st.tuples(st.just("number"), st.decimals(-(10**9), 10**9, allow_nan=False).map(str)),
    st.tuples(st.just("regex"), REGEXES),
    st.tuples(st.just("choices"), st.sampled_from(["yes", " no"])),
)


@examples(30)
@given(st.lists(GROUPS, min_size=1, max_size=20), st.sampled_from(SPACES))
def test_groups(golds, space):
    rows = []
    for number, (grader, gold) in enumerate(golds):
        row = {"id": str(number), "prompts": ["q"], "answer": f"{space}{gold}{space}"}
        if grader == "choices":
            row["choices"] = ["yes ", "no", "perhaps"]
        elif grader:
            row["grader"] = grader
        rows.append(row)
    data = load("groups", rows)
    choices = [group for group in data.groups if "choices" in group.extra]
    for group in choices:
        assert (
            sum(TASKS["groups"].grade(group, choice, True).scores["correct"] for choice in group.extra["choices"]) == 1
        )
    assert assert_golds_are_right("groups", data) == len(rows)


@examples(20)
@given(st.lists(TEXT.filter(str.strip), min_size=1, max_size=10))
def test_pararel(golds):
    rows = [{"id": str(i), "prompts": ["x is [Y]."], "answer": gold} for i, gold in enumerate(golds)]
    assert assert_golds_are_right("pararel", load("pararel", rows)) == len(rows)


@pytest.mark.parametrize("name", ["hellaswag", "rotten_tomatoes", "paws"])
def test_choices(name):
    column = {"hellaswag": "ctx", "rotten_tomatoes": "text", "paws": "sentence1"}[name]
    extra = {"hellaswag": {"endings": ["a", "b", "c", "d"]}, "paws": {"sentence2": "b"}}.get(name, {})
    labels = range(4 if name == "hellaswag" else 2)
    data = load(name, [{column: "x", **extra, "label": label} for label in labels])
    assert assert_golds_are_right(name, data) == len(labels)


def test_spider(tmp_path):
    with sqlite3.connect(tmp_path / "x.sqlite") as connection:
        connection.execute("CREATE TABLE items (name TEXT, price REAL, blob BLOB)")
        connection.executemany("INSERT INTO items VALUES (?, ?, ?)", [("é", 0.1, b"\0"), (None, -0.0, None)] * 2)
    connection.close()
    (tmp_path / "database" / "x").mkdir(parents=True)
    (tmp_path / "x.sqlite").rename(tmp_path / "database" / "x" / "x.sqlite")
    golds = [
        "SELECT * FROM items", "SELECT count(*) FROM items;", "SELECT name FROM items ORDER BY price",
        "SELECT sum(price) FROM items", "SELECT name FROM items WHERE 0", "\u00a0SELECT 1\u00a0", "SELECT 1 -- one",
    ]  # fmt: skip
    rows = [{"db_id": "x", "question": "q", "query": gold} for gold in golds]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    data = TASKS["spider"].load(str(tmp_path))
    assert data.unusable == 0 and assert_golds_are_right("spider", data) == len(golds)


def test_generated_nl_rx(tmp_path):
    generator.write(tmp_path, train=20, validation=4, test=60)
    data = TASKS["nl_rx"].load(str(tmp_path))
    assert assert_golds_are_right("nl_rx", data) == len(data.groups) > 40


def test_real_nl_rx():
    if not (SHARED / "nl_rx").is_dir():
        pytest.skip(f"the real NL-RX is not at {SHARED}")
    data = TASKS["nl_rx"].load(str(SHARED / "nl_rx"))
    assert assert_golds_are_right("nl_rx", data) == 1771


def test_a_caption_is_most_like_itself():
    """The mean of a caption with itself as the one reference is 10, in whichever Unicode form and apostrophe."""
    other = ["two small birds on a wire"]
    for caption, same in (
        ("a caf\u00e9 with an old sign", "a cafe\u0301 with an old sign"),
        ("a man's red hat here", "a man’s red hat here"),
    ):
        (score,) = cider_d([same], [[caption]], document_frequency=[[caption], other])[1]
        assert score == pytest.approx(10)
