"""Claims about rows as people have them: other names, Alpaca, ShareGPT, content parts, and views that are messages.

Each is compared with the same data as TRL rows: both must make the same token ids.
"""

from __future__ import annotations

import json
import logging

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from eval.tasks.questions import read_questions
from llm_jepa import UserError
from llm_jepa.cli import main
from llm_jepa.core.json_files import read_json
from llm_jepa.core.sources import data_sha256, read_rows
from llm_jepa.lm.data import warn_of_rows
from llm_jepa.lm.formats import format_of, standard_row
from llm_jepa.lm.rows import parse_row
from llm_jepa.lm.views import build_views
from tests.conftest import expect_refusal
from tests.lm.test_commands import RECIPE, trained  # noqa: F401  (a fixture)
from tests.lm.test_views import plain_tokenizer, tokenizer_of


def turn(role: str, content: object) -> dict:
    return {"role": role, "content": content}


USER, ANSWER, SYSTEM = turn("user", "the fox"), turn("assistant", "over"), turn("system", "quick")
ONE = {"messages": [USER, ANSWER]}
WITH_SYSTEM = {"messages": [SYSTEM, USER, ANSWER]}
PARTS = [{"type": "text", "text": "the "}, {"type": "text", "text": "fox", "image": None}]
SAME = {  # name -> a row as people have it, the same row as TRL has it
    "Alpaca": ({"instruction": "the fox", "output": "over"}, ONE),
    "Alpaca with an empty input": ({"instruction": "the fox", "input": " ", "output": "over", "text": "x"}, ONE),
    "Alpaca with an input": (
        {"instruction": "the quick", "input": "fox", "output": "over"},
        {"messages": [turn("user", "the quick\n\nfox"), ANSWER]},
    ),
    "Alpaca with a system turn": ({"instruction": "the fox", "output": "over", "system": "quick"}, WITH_SYSTEM),
    "Alpaca beside columns of other rows": (
        {"messages": None, "prompt": None, "instruction": "the fox", "input": None, "output": "over"},
        ONE,
    ),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "the fox"}, {"from": "gpt", "value": "over"}]}, ONE),
    "ShareGPT of several turns": (
        {
            "id": "1",
            "conversations": [
                {"from": "system", "value": "quick"},
                {"from": "human", "value": "x", "weight": 1},
                {"from": "gpt", "value": "y", "weight": 0},
                {"from": "user", "value": "the fox"},
                {"from": "gpt", "value": "over"},
            ],
        },
        {"messages": [SYSTEM, turn("user", "x"), turn("assistant", "y"), USER, ANSWER]},
    ),
    "ShareGPT with a system column": (
        {"system": "quick", "conversations": [{"from": "human", "value": "the fox"}, {"from": "gpt", "value": "over"}]},
        WITH_SYSTEM,
    ),
    "ShareGPT of messages": ({"conversations": [USER, ANSWER]}, ONE),
    "parts in one turn": ({"messages": [SYSTEM, turn("user", PARTS), ANSWER]}, WITH_SYSTEM),
    "parts in prompt and completion": (
        {"prompt": [turn("user", PARTS)], "completion": [turn("assistant", [{"type": "text", "text": "over"}])]},
        ONE,
    ),
    "views as a list": ({**ONE, "views": ["x", "fox"]}, {**ONE, "views": {"contexts": ["x", "fox"]}}),
    "views as a text": ({**ONE, "views": "x"}, {**ONE, "views": {"contexts": ["x"]}}),
    "views as turns": (
        {**ONE, "views": [turn("user", "x"), "fox"]},
        {**ONE, "views": {"contexts": ["x", "fox"]}},
    ),
    "views as conversations": (
        {**WITH_SYSTEM, "views": {"contexts": [[SYSTEM, turn("user", "x")], [turn("user", PARTS)]],
                                  "targets": [[turn("assistant", "on")], turn("assistant", "fox")]}},
        {**WITH_SYSTEM, "views": {"contexts": ["x", "the fox"], "targets": ["on", "fox"]}},
    ),
    "views beside an Alpaca row": (
        {"instruction": "the fox", "output": "over", "views": ["x"]},
        {**ONE, "views": {"contexts": ["x"]}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_rows_as_people_have_them_make_the_tokens_of_trl_rows(name):
    theirs, ours = SAME[name]
    tokenizer = tokenizer_of("chatml")
    assert build_views(theirs, tokenizer) == build_views(ours, tokenizer)
    assert theirs == SAME[name][0], "the row itself was changed"


def test_a_row_of_trl_is_not_touched():
    for row in (ONE, {"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}, {"prompt": [USER]}):
        assert standard_row(row, "") is row
    assert format_of({"instruction": "x", "response": "y"}) is None  # Dolly's: its `context` would be lost
    assert format_of({"question": "x"}) is None


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction": "x", "output": ""}, "no output; fill in 'output'"),
        ({"instruction": "", "input": "", "output": "y"}, "no instruction"),
        ({"instruction": "x", "input": ["a"], "output": "y"}, "'input' of an Alpaca row must be a text, found list"),
        ({"conversations": []}, "'conversations' must be a list of"),
        ({"conversations": "x"}, "'conversations' must be a list of"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "ends with role 'user'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "a turn is from 'alien'; known are human"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": None}]}, "no text content"),
        ({"conversations": [USER, {"from": "gpt", "value": "x", "weight": 0}]}, "has weight 0"),
        ({"conversations": [SYSTEM, USER, ANSWER], "system": "other"}, "two system turns"),
        ({"question": "x", "answer": "y"}, "columns: {prompt: question, completion: answer}"),
        ({"messages": [turn("user", [{"type": "text", "text": "x", "image": "y"}]), ANSWER]}, "not a text"),
        ({"messages": [turn("user", ["x"]), ANSWER]}, r"not a text \(str\)"),
        ({**WITH_SYSTEM, "views": [[turn("system", "other"), USER]]}, "whose turns are not those of the row"),
        ({**ONE, "views": {"targets": [[USER, ANSWER]]}}, "whose turns are not those of the row"),
        ({**ONE, "views": [turn("user", " ")]}, "without a text"),
        ({**ONE, "views": [None]}, "not texts"),
        ({**ONE, "views": [[]]}, "not texts"),
    ],
)
def test_what_cannot_be_read_is_one_line(row, says):
    with pytest.raises(UserError, match=f"^row 3.*{says}"):
        parse_row(row, "row 3")


def test_formats_and_columns_are_said_in_one_line_each(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    alpaca, sharegpt = SAME["Alpaca with an input"][0], SAME["ShareGPT"][0]
    mixed = write(tmp_path / "mixed.jsonl", [alpaca, alpaca, sharegpt, {"prompt": "x", "completion": "y"}])
    warn_of_rows(read_rows(mixed), "train")
    lines = [record.getMessage() for record in caplog.records]
    assert [line[:30] for line in lines] == ["2 of 4 train rows are Alpaca r", "1 of 4 train rows are ShareGPT",
                                             "3 of 4 train rows are conversa"]  # fmt: skip
    caplog.clear()
    warn_of_rows(Dataset.from_list([{**alpaca, "paraphrases": ["x"], "source": "y"}]), "train")
    (_, unused) = [record.getMessage() for record in caplog.records]
    assert "not used: paraphrases, source." in unused and "columns: {views: paraphrases}" in unused
    caplog.clear()
    warn_of_rows(Dataset.from_list([{"prompt": "x", "completion": "y", "system": "z"}]), "train")
    assert "not used: system" in caplog.text


# -- names of columns -----------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_are_read_under_other_names(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ours = [{"prompt": "a", "completion": "b", "views": ["c"], "id": 1}]
    plain = read_rows(write(tmp_path / "ours.jsonl", ours))
    theirs = write(tmp_path / "theirs.jsonl", [{"question": "a", "answer": "b", "wordings": ["c"], "id": 1}])
    renamed = read_rows(theirs, columns={"prompt": "question", "completion": "answer", "views": "wordings"})
    assert list(renamed) == list(plain) and data_sha256(renamed) == data_sha256(plain) and not caplog.records
    swapped = read_rows(str(tmp_path / "ours.jsonl"), columns={"prompt": "completion", "completion": "prompt"})
    assert (swapped[0]["prompt"], swapped[0]["completion"]) == ("b", "a")
    taken = read_rows(
        write(tmp_path / "x.jsonl", [{"prompt": "no", "q": "a", "completion": "b"}]), columns={"prompt": "q"}
    )
    assert sorted(taken.column_names) == ["completion", "prompt"]
    assert taken[:] == {"prompt": ["a"], "completion": ["b"]} and "the column prompt of" in caplog.text
    with pytest.raises(UserError, match="has no column 'question', which `columns` names; it has prompt, completion"):
        read_rows(str(tmp_path / "ours.jsonl"), columns={"prompt": "question"})


def test_a_csv_with_other_names_and_a_byte_order_mark_trains_and_is_asked(trained, tmp_path, capsys):  # noqa: F811
    """The run is that of the same rows under TRL's names, and may be resumed with them."""
    lines = [("question", "answer", "paraphrases"), *((f"ask {i}", f"it is {i}", f"tell {i}") for i in range(20))]
    (tmp_path / "a.csv").write_text("".join(",".join(line) + "\n" for line in lines), encoding="utf-8-sig")
    named = [dict(zip(("prompt", "completion", "views"), line, strict=True)) for line in lines[1:]]
    runs = {}
    for name, data in (("csv", str(tmp_path / "a.csv")), ("jsonl", write(tmp_path / "b.jsonl", named))):
        values = {**RECIPE, "train_data": data, "output_dir": str(tmp_path / name), "max_steps": 2}
        if name == "csv":
            values["columns"] = {"prompt": "question", "completion": "answer", "views": "paraphrases"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        assert main(["train", str(tmp_path / f"{name}.yaml")]) == 0
        runs[name] = load_file(tmp_path / name / "model.safetensors")
    assert all((runs["csv"][key] == runs["jsonl"][key]).all() for key in runs["csv"])
    records = [read_json(tmp_path / name / "run.json") for name in ("csv", "jsonl")]
    assert records[0]["train_sha256"] == records[1]["train_sha256"] and records[0]["id"] == records[1]["id"]

    words = ["--input", str(tmp_path / "a.csv"), "--columns", "prompt=question", "completion=answer"]
    out = tmp_path / "out.jsonl"
    assert main(["generate", str(trained), *words, "--output", str(out), "--max_new_tokens", "2"]) == 0
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == [f"ask {i}" for i in range(20)]
    assert main(["embed", str(trained), *words, "--output", str(tmp_path / "e.safetensors")]) == 0
    capsys.readouterr()
    for names, said in (
        ({"promt": "question"}, "columns: 'promt' is not a column that is read"),
        ({"prompt": 3}, "columns: write the name of a column"),
        ({"prompt": "question", "views": "question"}, "one column cannot be read under two names"),
        ({"prompt": "nothing"}, "has no column 'nothing'"),
    ):
        expect_refusal(capsys, ["train", str(tmp_path / "csv.yaml"), "--columns", json.dumps(names), "--dry-run"], said)


def test_other_formats_are_asked_and_embedded_like_messages(trained, tmp_path, capsys):  # noqa: F811
    theirs = [SAME["Alpaca with an input"][0], SAME["ShareGPT"][0], SAME["parts in one turn"][0]]
    unanswered = [{"instruction": "the fox", "input": None}, {"conversations": [{"from": "human", "value": "the fox"}]}]
    as_trl = [SAME["Alpaca with an input"][1], ONE, WITH_SYSTEM]
    written = {}
    for name, rows in (("theirs", theirs), ("ours", as_trl), ("open", unanswered)):
        data, out = write(tmp_path / f"{name}.jsonl", rows), tmp_path / f"{name}.safetensors"
        capsys.readouterr()
        assert main(["embed", str(trained), "--input", data, "--output", str(out)]) == 0
        notes = capsys.readouterr().err
        written[name] = load_file(out)
        assert ("Alpaca rows" in notes and "ShareGPT rows" in notes) == (name != "ours")
        answers = tmp_path / f"{name}.out.jsonl"
        assert main(["generate", str(trained), "--input", data, "--output", str(answers), "--max_new_tokens", "2"]) == 0
        written[f"{name} prompts"] = [json.loads(line)["prompt"] for line in answers.read_text().splitlines()]
    assert written["theirs"].keys() == written["ours"].keys() == {"context", "target"}
    assert all((written["theirs"][key] == written["ours"][key]).all() for key in written["ours"])
    assert written["theirs prompts"] == written["ours prompts"] == [row["messages"][:-1] for row in as_trl]
    assert written["open"].keys() == {"context"} and written["open prompts"] == [[USER], [USER]]


def test_all_rows_that_cannot_be_read_are_counted(tmp_path, capsys):
    rows = [{"instruction": f"ask {i}", "output": "" if i in (3, 5) else "x"} for i in range(8)]
    values = {**RECIPE, "train_data": write(tmp_path / "a.jsonl", rows), "output_dir": str(tmp_path / "run")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    said = ("row 3 has no output", "2 of 8 rows cannot be read; this is the first")
    expect_refusal(capsys, ["train", str(tmp_path / "r.yaml")], *said)


def test_a_task_reads_training_rows_of_every_format(tmp_path):
    rows = [SAME[name][0] for name in ("Alpaca", "ShareGPT", "parts in one turn")]
    data = read_questions(
        write(tmp_path / "test.jsonl", rows), "t", system="s", columns=("question",), ask=dict.get,
        extra=lambda question, answer: {"question": question},
    )  # fmt: skip
    assert [group.prompts[0] for group in data.groups] == [[USER], [USER], [SYSTEM, USER]]
    assert {group.answer for group in data.groups} == {"over"} and data.groups[0].extra == {"question": "the fox"}


def test_plain_texts_have_views_as_a_list_too():
    row = {"prompt": "the fox", "completion": " over"}
    listed, keyed = ({**row, "views": views} for views in (["a x "], {"contexts": ["a x "]}))
    assert build_views(listed, plain_tokenizer()) == build_views(keyed, plain_tokenizer())
