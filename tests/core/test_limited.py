"""Claim: what a child computes comes back; what takes too much time or memory, or fails, is a reason in one line.

The functions are those of Python itself: a child imports its function by name, and a module of tests imports too much.
"""

from __future__ import annotations

import colorsys
import json
import operator
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from llm_jepa.core.errors import UserError
from llm_jepa.core.limited import Refused, run_limited
from llm_jepa.core.patterns import matching


def test_values_come_back():
    assert run_limited(operator.add, ["a", 1], [None, {"ü\ud800": 2.5}]) == ["a", 1, None, {"ü\ud800": 2.5}]


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (re.fullmatch, ["(a+)+b", "a" * 60], "it takes more than 0.3 seconds"),
        (operator.mul, ["a", 1_000_000_000], "it needs more than 64 MB of memory"),
        (json.loads, ["[" * 100_000], "it is nested or recursive without end"),
        (operator.truediv, [1, 0], "ZeroDivisionError: division by zero"),
        (int, ["1\nllm-jepa: error: forged"], "ValueError: invalid literal"),
        (os._exit, [3], "its process ended with code 3"),
        (os.abort, [], "its process ended with code -6"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_end_is_a_reason(function, arguments, reason):
    with pytest.raises(Refused) as refused:
        run_limited(function, *arguments, seconds=0.3, megabytes=64)
    assert str(refused.value).startswith(reason) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("letter", "megabytes", "reason"),
    [("a", 512, "its answer is longer than 16 MB"), ("\U0001f469", 100, "it needs more than 100 MB of memory")],
    ids=ascii,
)
def test_a_long_answer_is_a_reason(letter, megabytes, reason):
    """30 million characters: 30 MB of some letters, and 120 MB of others."""
    with pytest.raises(Refused, match=reason):
        run_limited(operator.mul, letter, 30_000_000, megabytes=megabytes)


def test_the_child_writes_no_file(tmp_path):
    (tmp_path / "from").write_text("text")
    with pytest.raises(Refused, match="File too large"):
        run_limited(shutil.copyfile, str(tmp_path / "from"), str(tmp_path / "to"))


def test_the_current_folder_and_the_environment_choose_no_module(tmp_path, monkeypatch):
    """A module of the folder in which a command runs is a stranger's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("operator", "json", "sitecustomize", "usercustomize"):
        Path(f"{name}.py").write_text(f"import os; os.close(os.open({str(tmp_path / 'canary')!r}, os.O_CREAT))")
    assert run_limited(operator.add, 1, 2) == 3
    assert not Path("canary").exists()


def test_modules_of_python_come_before_those_of_the_path(tmp_path, monkeypatch):
    """A user's folder may hold a `colorsys.py`; this process found Python's before."""
    (tmp_path / "colorsys.py").write_text("def rgb_to_hls(r, g, b): return 'forged'")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run_limited(colorsys.rgb_to_hls, 1, 1, 1) == [0.0, 1, 0.0]


def test_a_path_that_python_ignores_is_ignored(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, Path("elsewhere")])
    assert run_limited(operator.add, 1, 2) == 3


def test_patterns_match_whole_names():
    names = ["model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.0.q_proj_old", "q_proj"]
    assert matching(r".*\.(q|k)_proj", names, "key") == names[:2]
    assert matching("q_proj", names, "key") == names[3:]
    assert matching("none", names, "key") == []


@pytest.mark.parametrize(("pattern", "says"), [("(a", "unterminated"), ("(a+)+b", "takes more than 2 seconds")])
def test_patterns_that_cannot_be_used_are_refused_by_key(pattern, says):
    with pytest.raises(UserError, match=f"^lora_target_modules=.*{says}.*Write a list of names"):
        matching(pattern, ["a" * 60], "lora_target_modules")
