"""Claim: a JSON file is the value that it says, or one line says what is wrong with it."""

from __future__ import annotations

import os

import pytest

from llm_jepa.core.errors import UserError
from llm_jepa.core.json_files import parse_json, read_json, read_json_lines


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("[]", dict, "it is a list instead of an object"),
        ("null", dict, "it is null instead of an object"),
        ("{", dict, "it is not JSON"),
        ("[" * 100_000, list, "nested"),
        ("[" * 65 + "]" * 65, list, "more than 64 deep"),
        ('{"a": NaN}', dict, "it holds NaN"),
        ('{"a": 1e999}', dict, "it holds 1e999"),
        ('{"a": {"b": 1, "b": 2}}', dict, "the key 'b' twice"),
        ('{"a": "\\ud800"}', dict, "half of a surrogate pair"),
        ('{"a": ' + "9" * 5000 + "}", dict, "it is not JSON"),
        ('{"b": 1}', {"a": int}, "it has no 'a'"),
        ('{"a": true}', {"a": int}, "its 'a' is true or false instead of a whole number"),
        ('{"a": [1, "x"]}', {"a": [int]}, "item 1 of its 'a' is a text instead of a whole number"),
        ('{"a": {"b": 1}}', {"a": {str: str}}, "its 'b' is a whole number instead of a text"),
        ('{"a": "z"}', {"a": {"x", "y"}}, "its 'a' is 'z' instead of x or y"),
        ('{"a": []}', {"a": {"x", None}}, "instead of None or x"),
    ],
)
def test_what_is_wrong_is_said(text, shape, reason):
    with pytest.raises(UserError) as error:
        parse_json(text, "file.json", shape)
    message = str(error.value)
    assert message.startswith("file.json cannot be read: ") and reason in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "shape", "value"),
    [
        ('{"a": 1, "other": null}', {"a": int, "b?": str}, {"a": 1, "other": None}),
        ('{"a": 1}', {"a": float}, {"a": 1}),
        ('{"a": null}', {"a": {"x", None}}, {"a": None}),
        ('{"a": "\\ud83d\\ude00"}', {str: str}, {"a": "\U0001f600"}),
        ("[" * 64 + "]" * 64, list, None),
        ('[{"a": 1}, {}]', [{"a?": int}], [{"a": 1}, {}]),
    ],
)
def test_what_is_right_is_read(text, shape, value):
    found = parse_json(text, "file.json", shape)
    assert value is None or found == value


def test_floats_that_python_writes_may_be_let_through(tmp_path):
    path = tmp_path / "log.json"
    path.write_text('{"loss": Infinity}')
    assert read_json(path, is_finite=False) == {"loss": float("inf")}
    with pytest.raises(UserError, match="Infinity"):
        read_json(path)


def test_only_files_of_a_limited_size_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path, largest=8) == {"a": 1}
    with pytest.raises(UserError, match="has 8 bytes, and 7 are the most"):
        read_json(path, largest=7)
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    with pytest.raises(UserError, match="is not a file"):
        read_json(tmp_path / "pipe")
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8 text .* at byte 0"):
        read_json(path)


def test_a_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n[]\n')
    with pytest.raises(UserError, match="a.jsonl, line 3 cannot be read: it is a list"):
        read_json_lines(path)
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
