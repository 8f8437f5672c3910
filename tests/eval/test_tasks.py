"""Claims about tasks and runs: raw rows and shipped rows ask the same, a run cut short ends as if it had not been, and
data that cannot be scored gets one line before anything is written."""

from __future__ import annotations

import copy
import csv
import dataclasses
import gzip
import importlib.util
import json
import signal
import sqlite3
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from eval import graders, run
from eval.run import evaluate_model
from eval.tasks import TASKS, Data, Group, nl_rx
from llm_jepa import UserError
from llm_jepa.lm.inference import choose_batches, generate
from llm_jepa.synthetic import nl_rx as generator
from tests.conftest import tiny_model

SHARED = Path(__file__).parents[3] / "shared" / "data"


def messages(system, user, answer):
    turns = zip(("system", "user", "assistant"), (system, user, answer), strict=True)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# -- loading ----------------------------------------------------------------------------------------------------------

HELLASWAG = "Which one of A), B), C), or D) is the best ending for the context? Answer A, B, C, or D."
RAW_AND_SHIPPED = {
    "gsm8k": (
        {"question": "2 cups and 3?", "answer": "2+3=5\n#### 5"},
        messages("Answer the math question, show steps.", "2 cups and 3?", "2+3=5\n#### 5"),
    ),
    "nq_open": (
        {"question": "who won", "answer": ["Tyra Sanchez", "Tyra"]},
        messages("Answer the question below.", "who won", "Tyra Sanchez; Tyra"),
    ),
    "hellaswag": (
        {"ctx": "He sits", "endings": ["up.", "down.", "in.", "on."], "label": "1"},
        messages(HELLASWAG, "He sits\nA) up.\nB) down.\nC) in.\nD) on.", "B"),
    ),
    "rotten_tomatoes": (
        {"text": "a fine film .", "label": 1},
        messages("Determine whether the comment is positive or negative", "a fine film .", "Good"),
    ),
    "paws": (
        {"sentence1": "a to b", "sentence2": "b to a", "label": 0},
        messages("Do the two sentences mean the same? Answer Yes or No.", "1) a to b\n2) b to a", "No"),
    ),
}


@pytest.mark.parametrize("name", list(RAW_AND_SHIPPED))
def test_raw_columns_and_shipped_rows_are_the_same_questions(name, tmp_path):
    raw, shipped = RAW_AND_SHIPPED[name]
    load = TASKS[name].load
    of_raw = load(write(tmp_path / "raw.jsonl", [raw]))
    of_shipped = load(write(tmp_path / "shipped.jsonl", [shipped]))
    assert of_raw.groups == of_shipped.groups and len(of_raw.groups) == 1
    assert of_raw.sha256 != of_shipped.sha256 and set(of_raw.sha256) == {"raw.jsonl"}
    right = TASKS[name].grade(of_raw.groups[0], of_raw.groups[0].answer, True).scores
    assert right[TASKS[name].metric] == 1
    assert TASKS[name].grade(of_raw.groups[0], "", True).scores[TASKS[name].metric] == 0


def test_a_folder_a_csv_and_a_parquet_file_hold_the_same_rows(tmp_path):
    raw, _ = RAW_AND_SHIPPED["rotten_tomatoes"]
    with open(tmp_path / "rows.csv", "w") as file:
        writer = csv.DictWriter(file, list(raw))
        writer.writeheader()
        writer.writerow(raw)
    Dataset.from_list([raw]).to_parquet(tmp_path / "test.parquet")
    load = TASKS["rotten_tomatoes"].load
    expected = load(write(tmp_path / "other.jsonl", [raw])).groups
    assert load(str(tmp_path / "rows.csv")).groups == expected == load(str(tmp_path)).groups


def test_every_task_says_what_it_is():
    for name, task in TASKS.items():
        assert task.name == name and task.published and task.trap and task.max_new_tokens >= 1


def test_user_groups(tmp_path):
    rows = [
        {"id": "x", "prompts": ["a b", "b a"], "answer": 5, "grader": "number"},
        {"id": 7, "prompts": ["c"], "wordings": ["plain"], "answer": "no", "choices": ["yes", "no"]},
    ]
    data = TASKS["groups"].load(write(tmp_path / "g.jsonl", rows))
    assert data.groups[0] == Group("x", ("a b", "b a"), ("0", "1"), "5", {"grader": "number"})
    assert data.groups[1] == Group("7", ("c",), ("plain",), "no", {"choices": ("yes", "no")})
    assert TASKS["groups"].grade(data.groups[0], "so 5.0", True).scores["correct"] == 1


def test_golds_and_prompts_of_groups_are_as_written(tmp_path):
    """A neighbour's 0.5 made the gold of `{"answer": 5}` "5.0", and its turn with a name gave every turn one."""
    turn = {"role": "user", "content": "q"}
    answers = [5, 0.5, "5.0", True, "None", 10**20]
    prompts = [[turn] if i % 2 else [{**turn, "name": "n"}] for i in range(len(answers))]
    rows = [{"id": i, "prompts": [prompts[i]], "answer": answer} for i, answer in enumerate(answers)]
    rows.append({"id": "yes", "prompts": ["a"], "answer": True, "choices": [True, False, "maybe"]})
    groups = TASKS["groups"].load(write(tmp_path / "g.jsonl", rows)).groups
    assert [group.answer for group in groups] == ["5", "0.5", "5.0", "true", "None", "1" + "0" * 20, "true"]
    assert [group.prompts[0] for group in groups[:-1]] == prompts
    assert groups[-1].extra == {"choices": ("true", "false", "maybe")}
    assert all(TASKS["groups"].grade(group, group.answer, True).scores["correct"] == 1 for group in groups[:-1])


def test_tasks_read_every_container(tmp_path):
    """A file, a compressed one, a pattern, two kinds of folders, and a CSV with the answer None."""
    rows = [{"question": "how many?", "answer": "two #### 2"}, {"question": "and now?", "answer": "#### 1,000"}]
    (tmp_path / "hub").mkdir()
    (tmp_path / "other.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "hub" / "data-test.jsonl", rows)
    for source in ("a.jsonl", "other.jsonl.gz", "[a].jsonl", "saved", "hub"):
        data = TASKS["gsm8k"].load(str(tmp_path / source))
        assert [group.answer for group in data.groups] == ["two #### 2", "#### 1,000"] and data.sha256, source
    with open(tmp_path / "b.csv", "w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["who?", "None"], ["where?", "NA"]])
    assert [group.answer for group in TASKS["nq_open"].load(str(tmp_path / "b.csv")).groups] == ["None", "NA"]


def test_a_line_separator_in_a_text_does_not_end_a_row(tmp_path):
    """U+2028 is a character of JSON texts, and a line break for `str.splitlines`."""
    (tmp_path / "a.jsonl").write_text(json.dumps(messages("s", "a\u2028b", "c"), ensure_ascii=False), encoding="utf-8")
    assert nl_rx.read_conversations(tmp_path / "a.jsonl")[0][1]["content"] == "a\u2028b"


def test_cloze_prompts_end_where_the_answer_begins(tmp_path):
    rows = [
        {"id": "1", "prompts": ["Dante was born in [MASK].", "Dante's town: [Y]", "Dante is from"], "answer": "Rome"}
    ]
    data = TASKS["pararel"].load(write(tmp_path / "p.jsonl", rows))
    assert data.groups[0].prompts == ("Dante was born in", "Dante's town:", "Dante is from")
    assert TASKS["pararel"].grade(data.groups[0], "Rome, where he", False).scores["correct"] == 1
    rows[0]["prompts"][0] = "[MASK] is where Dante was born."
    with pytest.raises(UserError, match="row 1: .MASK. is not at the end"):
        TASKS["pararel"].load(write(tmp_path / "p.jsonl", rows))


def spider_folder(path, query):
    (path / "database" / "shop").mkdir(parents=True)
    with sqlite3.connect(path / "database" / "shop" / "shop.sqlite") as connection:
        connection.execute("CREATE TABLE items (name TEXT)")
    connection.close()
    write(path / "spider_test.jsonl", [messages("s", "For db_id:[shop]\n\nall names?", query)])
    return str(path)


def test_spider_runs_queries(tmp_path):
    """An empty result equals an empty result; a query that fails does not, though sqlite3 prints nothing for both."""
    data = TASKS["spider"].load(spider_folder(tmp_path, "SELECT name FROM items"))
    grade = lambda text: TASKS["spider"].grade(data.groups[0], text, True).scores["execution"]  # noqa: E731
    assert grade("SELECT name FROM items WHERE 1") == 1 and grade("SELECT nothing FROM nowhere") == 0


def test_official_spider_columns(tmp_path):
    spider_folder(tmp_path, "SELECT 1")
    (tmp_path / "spider_test.jsonl").unlink()
    (tmp_path / "dev.json").write_text(json.dumps([{"db_id": "shop", "question": "all?", "query": "SELECT 2"}]))
    (group,) = TASKS["spider"].load(str(tmp_path)).groups
    assert TASKS["spider"].load(str(tmp_path / "dev.json")).groups == (group,)
    assert group.prompts[0][-1]["content"] == "For db_id:[shop]\n\nall?" and group.answer == "SELECT 2"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("hellaswag", messages("s", "q", "E"), "row 1: the answer 'E' is none of the choices; known: A, B, C, D"),
        ("rotten_tomatoes", messages("s", "q", "Goood"), "did you mean 'Good'"),
        ("rotten_tomatoes", {"text": "x", "label": 3}, "the answer '3' is none"),
        ("hellaswag", {"ctx": "x", "endings": ["1"] * 4, "label": ""}, "row 1: the label is '' with 4 endings"),
        ("gsm8k", messages("s", "q", "#### five"), "row 1: the gold solution has no number"),
        ("gsm8k", {"question": "q", "solution": "5"}, "missing: answer"),
        ("nq_open", messages("s", "q", "?!"), "row 1: the answer '\\?!' has no word"),
        ("gsm8k", {"question": "q", "answer": 5}, "row 1: the answer is 5, not a text"),
        ("nq_open", {"question": "q", "answer": [5]}, "neither a text nor a list of texts"),
        ("groups", {"id": "1", "prompts": ["a"], "anwser": "b"}, "unknown key 'anwser'; did you mean 'answer'"),
        ("groups", {"id": "1", "prompts": [], "answer": "b"}, "row 1 has no prompts"),
        ("groups", {"id": "1", "prompts": ["a", " "], "answer": "b"}, "none of them empty"),
        ("groups", {"id": "1", "prompts": ["a"], "answer": "b", "grader": "regx"}, "did you mean 'regex'"),
        (
            "groups",
            {"id": "1", "prompts": ["a"], "answer": "b(", "grader": "regex"},
            "row 1: The answer is not a regex",
        ),
        (
            "groups",
            {"id": "1", "prompts": ["a"], "answer": "b", "grader": "number"},
            "row 1: The answer 'b' is not a number",
        ),
        ("groups", {"id": "1", "prompts": ["a"], "answer": "5 km", "grader": "number"}, "Give the number alone"),
        ("groups", {"id": "1", "prompts": ["a"], "answer": " "}, "row 1: The answer is empty or white space"),
        ("groups", {"id": "1", "prompts": ["a"], "answer": "a", "choices": ["a", "a "]}, "must be different texts"),
        ("groups", {"id": "1", "prompts": ["a"], "answer": "yess", "choices": ["yes", "no"]}, "did you mean 'yes'"),
        ("groups", {"id": "1", "prompts": ["a"], "answer": "y", "wordings": ["0", "1"]}, "each of the 1 prompts"),
        ("groups", {"id": "1", "prompts": ["a", "b"], "answer": "y", "wordings": ["x", "x"]}, "a different name"),
        ("paws", {"prompt": "a"}, "has the columns"),
    ],
)
def test_data_that_cannot_be_graded(name, row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        TASKS[name].load(write(tmp_path / "rows.jsonl", [row]))


BAD_ROWS = [
    ("gsm8k", messages("s", "q", "#### five"), "no number"),
    ("nq_open", {"question": "Between 1 and 2?", "answer": ["/"]}, "has no word"),
    ("nq_open", {"question": "q", "answer": []}, "not a text"),
    ("nq_open", {"question": "q", "answer": None}, "missing: answer"),
    ("hellaswag", {"ctx": "x", "endings": ["1"] * 4, "label": ""}, "the label is ''"),
    ("hellaswag", {"ctx": "x", "endings": ["1"] * 3, "label": "1"}, "3 endings"),
    ("rotten_tomatoes", {"text": "x", "label": 3}, "none of the choices"),
    ("paws", messages("s", "q", " "), "no text content"),
]


@pytest.mark.parametrize(("name", "bad", "reason"), BAD_ROWS)
def test_a_row_that_cannot_be_graded_does_not_block_the_others(name, bad, reason, tmp_path):
    """It is left out, the warning counts it, and the other rows keep their number."""
    rows = [RAW_AND_SHIPPED[name][0], bad, RAW_AND_SHIPPED[name][0]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="1 of 3 rows cannot be graded and are left out.*row 2") as warned:
        data = TASKS[name].load(str(tmp_path / "rows.jsonl"))
    assert reason in str(warned[0].message)
    assert [group.id for group in data.groups] == ["0", "2"] and data.unusable == 1


def test_a_bad_regex_does_not_block_the_others(tmp_path):
    for name in ("synth_test", "turk_test"):
        write(tmp_path / f"{name}.jsonl", [messages("s", f"{name} {gold}", gold) for gold in ("a", "(b", "c")])
    for name in ("synth_train", "turk_train"):
        (tmp_path / f"{name}.jsonl").write_text("")
    with pytest.warns(UserWarning, match="1 of 3 rows .* line 2: the gold is not a regex"):
        data = TASKS["nl_rx"].load(str(tmp_path))
    assert [group.answer for group in data.groups] == ["a", "c"] and data.unusable == 1


def test_an_alternative_with_a_semicolon_stays_one_answer(tmp_path):
    """Cut in two, half of it would be right."""
    row = {"question": "who", "answer": ["Lennon; McCartney", "the Beatles"]}
    (group,) = TASKS["nq_open"].load(write(tmp_path / "r.jsonl", [row])).groups
    right = lambda text: TASKS["nq_open"].grade(group, text, True).scores["equal"]  # noqa: E731
    assert right("Lennon, McCartney") and right("beatles") and not right("Lennon") and not right("McCartney")


def test_an_id_may_not_come_twice(tmp_path):
    rows = [{"id": "1", "prompts": ["a"], "answer": "b"}] * 2
    with pytest.raises(UserError, match="row 2: the id '1' is that of row 1"):
        TASKS["groups"].load(write(tmp_path / "rows.jsonl", rows))


def test_spider_data_that_cannot_be_graded(tmp_path):
    with pytest.raises(UserError, match="no folder `database`"):
        TASKS["spider"].load(str(tmp_path))
    with pytest.raises(UserError, match="No gold query of .* runs .*on shop, error: no such column: nam"):
        TASKS["spider"].load(spider_folder(tmp_path / "a", "SELECT nam FROM items"))
    rows = [messages("s", "For db_id:[shop]\n\n?", sql) for sql in ("SELECT 1", "SELECT nam FROM items")]
    write(tmp_path / "a" / "spider_test.jsonl", rows)
    with pytest.warns(UserWarning, match="1 of 2 rows cannot be graded .* row 2: the gold query fails"):
        data = TASKS["spider"].load(str(tmp_path / "a"))
    assert [group.answer for group in data.groups] == ["SELECT 1"] and data.unusable == 1
    spider_folder(tmp_path / "b", "SELECT 1")
    write(tmp_path / "b" / "spider_test.jsonl", [messages("s", "For db_id:[shpo]\n\n?", "SELECT 1")])
    with pytest.raises(UserError, match="no database 'shpo' in database; is it 'shop'"):
        TASKS["spider"].load(str(tmp_path / "b"))


def test_folders_of_another_layout(tmp_path):
    with pytest.raises(UserError, match="holds no gsm8k data: looked for gsm8k_test"):
        TASKS["gsm8k"].load(str(tmp_path))
    with pytest.raises(UserError, match="There is no data at"):
        TASKS["gsm8k"].load(str(tmp_path / "missing"))


def test_a_gold_of_nl_rx_that_is_no_regex_is_named(tmp_path):
    for name, text in (("synth_test", "all"), ("turk_test", "any")):
        write(tmp_path / f"{name}.jsonl", [messages("s", text, "(a")])
    for name in ("synth_train", "turk_train"):
        (tmp_path / f"{name}.jsonl").write_text("")
    with pytest.raises(UserError, match="None of 1 rows .* synth_test.jsonl, line 1: the gold is not a regex"):
        TASKS["nl_rx"].load(str(tmp_path))


def test_golds_that_match_everything_or_nothing_are_flagged(tmp_path):
    golds = [".*", "~(.*)", "a&b", "a", "(a|b).*"]
    for name in ("synth_test", "turk_test"):
        write(tmp_path / f"{name}.jsonl", [messages("s", f"{name} {gold}", gold) for gold in golds])
    for name in ("synth_train", "turk_train"):
        (tmp_path / f"{name}.jsonl").write_text("")
    data = TASKS["nl_rx"].load(str(tmp_path))
    assert [group.extra["degenerate"] for group in data.groups] == [True, True, True, False, False]
    counted = ["nondegenerate" in TASKS["nl_rx"].grade(group, "a", True).scores for group in data.groups]
    assert counted == [False, False, False, True, True]


def test_real_nl_rx():
    """1,771 of 2,000 lines are new; of their golds a fifth match everything or nothing, whatever the question is."""
    if not (SHARED / "nl_rx").is_dir():
        pytest.skip(f"the real NL-RX is not at {SHARED}")
    data = TASKS["nl_rx"].load(str(SHARED / "nl_rx"))
    assert (len(data.groups), data.dropped) == (1771, 229)
    assert 200 < sum(group.extra["degenerate"] for group in data.groups) < 500


def test_real_spider_rows_name_their_database():
    if not (SHARED / "spider").is_dir():
        pytest.skip(f"the Spider rows are not at {SHARED}")
    with pytest.raises(UserError, match="no folder `database`"):
        TASKS["spider"].load(str(SHARED / "spider"))


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_dir(tokenizer, tmp_path):
    path = tmp_path / "model"
    model = tiny_model(tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def group_file(path, count=7):
    """Three wordings of unequal length a group; every third group has choices; the second names its wordings."""
    rows = generator.generate(3 * count, seed=5)
    groups = []
    for i in range(count):
        texts = [row["messages"][1]["content"] for row in rows[3 * i : 3 * i + 3]]
        groups.append({"id": f"g{i}", "prompts": [texts[0], texts[1] + " and " + texts[0], texts[2]], "answer": "a"})
        if i % 3 == 2:
            groups[-1]["choices"] = ["a", "a lot more"]
    groups[1]["wordings"] = ["0", "1", "other"]
    return write(path, groups)


def stable(result):
    return {key: value for key, value in result.items() if key not in ("seconds", "resumed_answers")}


class Stopped(Exception):
    pass


def stopping_after(task, count):
    """The task, and a list that grows with each answer; the process ends after `count` of them."""
    graded = []

    def grade(group, text, stopped):
        if len(graded) == count:
            raise Stopped
        graded.append(group.id)
        return task.grade(group, text, stopped)

    return dataclasses.replace(task, grade=grade), graded


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("stop", [0, 5, 14, 20])
def test_a_run_cut_short_ends_as_if_it_had_not_been(stop, cut, model_dir, tmp_path):
    """After 0, 1, 3 and all-but-one batches; with a line half written, too, and then cut short once more. What was
    answered is not answered again."""
    task = TASKS["groups"]
    data = task.load(group_file(tmp_path / "g.jsonl"))
    settings = {"batch_size": 4, "max_new_tokens": 5, "progress": False}
    whole, lines = evaluate_model(model_dir, task, data, out=tmp_path / "whole.json", **settings)
    out = tmp_path / "cut.json"
    with pytest.raises(Stopped):
        evaluate_model(model_dir, stopping_after(task, stop)[0], data, out=out, **settings)
    partial = tmp_path / "cut.samples.jsonl.partial"
    resumed = partial.read_text().splitlines()[1:]
    assert not out.exists() and len(resumed) <= stop and (stop < 5 or resumed)
    if cut:
        with open(partial, "a") as file:
            file.write('{"group": "g0", "wor')
        if stop < 14:
            with pytest.raises(Stopped):
                evaluate_model(model_dir, stopping_after(task, 5)[0], data, out=out, **settings)
            assert len(partial.read_text().splitlines()) > 1 + len(resumed)
            resumed = partial.read_text().splitlines()[1:]
    counting, graded = stopping_after(task, -1)
    result, again = evaluate_model(model_dir, counting, data, out=out, **settings)
    per_choice = sum("log_likelihoods" in line for line in lines) - sum("log_likelihoods" in line for line in resumed)
    assert len(graded) == len(lines) - len(resumed) + per_choice
    assert again == lines and stable(result) == stable(whole) and result["resumed_answers"] == len(resumed)
    assert (
        not partial.exists()
        and (tmp_path / "cut.samples.jsonl").read_text() == (tmp_path / "whole.samples.jsonl").read_text()
    )
    assert [(line["group"], line["wording"]) for line in lines] == [
        (group.id, name) for group in data.groups for name in group.wordings
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_command_that_is_stopped_goes_on(number, code, model_dir, tmp_path, monkeypatch, capsys):
    """The signal comes while the second batch is graded."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with SIGINT ignored
    words = ["--task", "groups", "--model", model_dir, "--data", str(group_file(tmp_path / "g.jsonl"))]
    words += ["--batch_size", "4", "--max_new_tokens", "5", "--out"]
    assert run.main([*words, str(tmp_path / "whole.json")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        sample, count = run._sample, iter(range(100))
        patch.setattr(
            run, "_sample", lambda *args: (next(count) == 5 and signal.raise_signal(number), sample(*args))[1]
        )
        assert run.main([*words, str(tmp_path / "cut.json")]) == code
    said = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    kept = "The answers so far are kept; the same command continues."
    assert capsys.readouterr().err.splitlines()[-1] == f"eval.run: {said}. {kept}"
    assert not (tmp_path / "cut.json").exists()
    assert run.main([*words, str(tmp_path / "cut.json")]) == 0
    signal.signal(signal.SIGINT, before)
    whole, cut = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    assert cut["resumed_answers"] == 4 and stable(cut) == stable(whole)
    assert (tmp_path / "cut.samples.jsonl").read_text() == (tmp_path / "whole.samples.jsonl").read_text()


@pytest.mark.parametrize("where", ["partial", "finished"])
@pytest.mark.parametrize(
    "change", ["model", "data", "template", "tokens", "max_new_tokens", "batch_size", "limit", "seed"]
)
def test_another_run_does_not_go_on(change, where, model_dir, tmp_path, tokenizer):
    task = TASKS["groups"]
    data = task.load(group_file(tmp_path / "g.jsonl", 3))
    settings = {"batch_size": 4, "max_new_tokens": 3, "progress": False, "limit": None, "seed": None}
    out = tmp_path / "o.json"
    if where == "partial":
        with pytest.raises(Stopped):
            evaluate_model(model_dir, stopping_after(task, 4)[0], data, out=out, **settings)
    else:
        first = evaluate_model(model_dir, task, data, out=out, **settings)
        assert evaluate_model(model_dir, task, data, out=out, **settings) == first, "the same run is simply there"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    if change == "model":
        other = tiny_model(tokenizer)
        with torch.no_grad():
            other.get_input_embeddings().weight[5] += 1
        other.save_pretrained(model_dir)
    elif change == "data":
        data = dataclasses.replace(data, sha256={"g.jsonl": "0"})
    elif change in ("template", "tokens"):
        if change == "template":
            tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "user")
        else:
            tokenizer.add_tokens(["ines"])  # the same texts are other tokens
        tokenizer.save_pretrained(model_dir)
    else:
        settings[change] = {"max_new_tokens": 4, "batch_size": 3, "limit": 2, "seed": 9}[change]
    with pytest.raises(UserError, match="another run"):
        evaluate_model(model_dir, task, data, out=out, **settings)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_answers_are_those_of_generate_and_of_the_likeliest_choice(model_dir, tokenizer, tmp_path):
    data = TASKS["groups"].load(group_file(tmp_path / "g.jsonl"))
    result, lines = evaluate_model(
        model_dir, TASKS["groups"], data, out=None, samples=tmp_path / "s.jsonl", batch_size=3, max_new_tokens=4,
        progress=False,
    )  # fmt: skip
    model = tiny_model(tokenizer)
    by_place = {(line["group"], line["wording"]): line for line in lines}
    for group in data.groups:
        for name, prompt in zip(group.wordings, group.prompts, strict=True):
            line = by_place[group.id, name]
            if "choices" not in group.extra:
                (alone,) = generate(model, tokenizer, [prompt], max_new_tokens=4)
                assert (line["text"], line["stopped"], line["num_tokens"]) == alone
                assert line["scores"]["exact"] == (alone.text == group.answer)
            else:
                likely = line["log_likelihoods"]
                assert line["text"] == max(likely, key=likely.get) and len(likely) == 2
                per_character = max(likely, key=lambda choice: likely[choice] / len(choice))
                assert line["scores"]["correct_per_character"] == (per_character == "a")
            assert line["prompt"] == prompt and line["gold"] == "a"
    assert result["wordings"] == ["0", "1", "2", "other"] and result["groups"] == 7 and result["schema"] == 1
    third = [line["scores"]["correct"] for line in lines if line["wording"] == "2"]
    assert len(third) == 6 and result["metrics"]["2"]["correct"] == sum(third) / 6
    assert {path.name for path in tmp_path.iterdir()} == {"g.jsonl", "model"}, "out=None writes nothing"


def test_a_choice_follows_a_space_after_text_and_none_after_a_template(model_dir, tokenizer):
    turns = [{"role": "user", "content": "lines"}]
    extra = {"choices": ("a", "dog")}
    data = Data((Group("a", ("lines",), ("0",), "a", extra), Group("b", (turns,), ("0",), "a", extra)), {})
    _, (text, chat) = evaluate_model(model_dir, TASKS["groups"], data, out=None, progress=False)
    (expected,) = choose_batches(
        tiny_model(tokenizer), tokenizer, ["lines", turns], [[" a", " dog"], ["a", "dog"]], batch_size=9
    )
    for row, choice in ((text, expected[0]), (chat, expected[1])):
        assert list(row["log_likelihoods"].values()) == pytest.approx(choice.log_likelihoods, abs=1e-5)
    assert expected[0] != expected[1]


def test_prompts_beyond_the_models_positions_are_counted(tokenizer, tmp_path):
    """Llama goes on with a warning, GPT-2 has a table that ends: one line that says what to do."""
    long = "word " * 250
    data = Data((Group("a", ("lines", long), ("0", "1"), "x"), Group("b", (long,), ("0",), "x")), {})
    for family in ("llama", "gpt2"):
        folder = tmp_path / family
        tiny_model(tokenizer, family).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        run_it = lambda folder=folder: evaluate_model(  # noqa: E731
            str(folder), TASKS["groups"], data, out=None, max_new_tokens=2, progress=False
        )
        with pytest.warns(UserWarning, match="2 of 3 prompts may run beyond the 256 positions"):
            if family == "llama":
                assert run_it()[0]["beyond_token_limit"] == 2
            else:
                with pytest.raises(UserError, match="2 of 3 prompts are longer than the 256 positions"):
                    run_it()


def test_a_metric_counts_the_answers_that_have_it():
    """a: (1 + 0 + 0) / 3; b: only the second has it."""
    assert run._means([{"scores": {"a": 1}}, {"scores": {"a": 0, "b": 1}}, {"scores": {"a": 0}}]) == {
        "a": 1 / 3,
        "b": 1,
    }


def test_undecided_answers_are_counted_and_said(model_dir):
    task = dataclasses.replace(
        TASKS["groups"],
        grade=lambda group, text, stopped: graders.Grade({"correct": 0.0, "undecided": float(group.id == "a")}, text),
    )
    data = Data((Group("a", ("x",), ("0",), "x"), Group("b", ("y",), ("0",), "x")), {})
    with pytest.warns(UserWarning, match="1 of 2 answers could not be decided"):
        result, _ = evaluate_model(model_dir, task, data, out=None, max_new_tokens=2, progress=False)
    assert result["metrics"]["0"]["undecided"] == 0.5


# -- the command line -------------------------------------------------------------------------------------------------


def command(tmp_path, **changes):
    options = {"model": tmp_path / "model", "task": "groups", "data": tmp_path / "g.jsonl", "out": tmp_path / "o.json"}
    return [str(word) for key, value in {**options, **changes}.items() for word in (f"--{key}", value)]


def test_the_command_line_scores(model_dir, tmp_path, capsys):
    group_file(tmp_path / "g.jsonl", 3)
    samples = tmp_path / "s.jsonl"
    argv = command(tmp_path, limit=2, batch_size=2, max_new_tokens=3, seed=4, samples=samples)
    assert run.main(argv) == 0
    assert "2 items" in capsys.readouterr().out
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["seed"] == 4 and result["decoding"]["max_new_tokens"] == 3 and result["limit"] == 2
    assert len(samples.read_text().splitlines()) == 6 and str(tmp_path) not in (tmp_path / "o.json").read_text()


def test_help_lists_the_tasks(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{task.name} " in text and f" {task.metric}" in text for task in TASKS.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "gsm8"}, "did you mean 'gsm8k'"),
        ({"data": "{}/none.jsonl"}, "No data file at"),
        ({"data": "{}/none"}, "There is no data at"),
        ({"task": "gsm8k", "data": "{}/model"}, "holds no gsm8k data"),
        ({"model": "{}/none"}, "No model folder at"),
        ({"out": "{}/model"}, "is a folder"),
        ({"out": "{}/g.jsonl/o.json"}, "is in the way"),
        ({"batch_size": 0}, "--batch_size: '0' must be a whole number, 1 or more"),
        ({"limit": -1}, "--limit: '-1' must be a whole number, 1 or more"),
        ({"task": "paws"}, "unknown"),
    ],
)
def test_one_line_exit_2_and_nothing_written(changes, message, model_dir, tmp_path, capsys):
    group_file(tmp_path / "g.jsonl", 3)
    changes = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in changes.items()}
    if changes == {"task": "paws"}:
        message = "paws needs 'messages' or sentence1, sentence2, label"
    before = sorted(tmp_path.rglob("*"))
    assert run.main(command(tmp_path, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_without_a_template_is_named(model_dir, tokenizer, tmp_path, capsys):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(model_dir)
    write(tmp_path / "r.jsonl", [RAW_AND_SHIPPED["gsm8k"][0]])
    assert run.main(command(tmp_path, task="gsm8k", data=tmp_path / "r.jsonl")) == 2
    assert "no chat template" in capsys.readouterr().err


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------

LM_EVAL = Path(run.__file__).parent / "lm_eval"


@pytest.fixture
def nl_rx_dir(tmp_path):
    generator.write(tmp_path / "nl_rx", train=8, validation=4, test=5)
    return str(tmp_path / "nl_rx")


def test_the_harness_task_grades_as_ours(nl_rx_dir):
    """Its hooks on made-up answers: two groups right in both wordings, one in one, one twice the same wrong answer."""
    spec = importlib.util.spec_from_file_location("llm_jepa_nl_rx_utils", LM_EVAL / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    rows = list(utils.load(nl_rx_dir, pretrained="a model argument")["test"])
    assert len(rows) == 10 and [row["wording"] for row in rows[:2]] == ["original", "paraphrase"]
    assert rows[1]["user"] == TASKS["nl_rx"].load(nl_rx_dir).groups[0].prompts[1][-1]["content"]
    right = [f" ({row['gold']}) " for row in rows]
    answers = [*right[:2], right[2], "q", "q", "q", "q", "qq", *right[8:]]
    rows_of_figures = [utils.process_results(row, [text]) for row, text in zip(rows, answers, strict=True)]
    assert [figures["equivalent"] for figures in rows_of_figures] == [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert not any(figures["exact"] for figures in rows_of_figures)
    figure = lambda name: getattr(utils, name)([figures[name] for figures in rows_of_figures])  # noqa: E731
    assert [figure(name) for name in ("worst_of_k", "consistency", "consistent_and_correct")] == [0.4, 0.6, 0.4]
    with pytest.raises(UserError, match="--metadata nl_rx=FOLDER"):
        utils.load()


def test_the_harness_gets_the_answers_that_we_get(nl_rx_dir, model_dir):
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")
    from lm_eval.tasks import TaskManager

    output = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model_dir, "dtype": "float32"},
        tasks=["llm_jepa_nl_rx"],
        task_manager=TaskManager(include_path=str(LM_EVAL), metadata={"nl_rx": nl_rx_dir}),
        device="cpu",
        batch_size=4,
        apply_chat_template=True,
    )
    result, lines = evaluate_model(model_dir, TASKS["nl_rx"], TASKS["nl_rx"].load(nl_rx_dir), out=None, progress=False)
    ours = {(line["group"], line["wording"]): line["text"] for line in lines}
    for sample in output["samples"]["llm_jepa_nl_rx"]:
        assert sample["resps"][0][0].strip() == ours[sample["doc"]["group"], sample["doc"]["wording"]]
    theirs = output["results"]["llm_jepa_nl_rx"]["exact,none"]
    assert theirs == pytest.approx(sum(result["metrics"][name]["exact"] for name in result["wordings"]) / 2)
