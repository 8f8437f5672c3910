"""Claims about the command line itself: help, wrong words, exit codes. The commands are tested with their families."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jepa.cli import main
from tests.conftest import expect_refusal

ROOT = Path(__file__).parent.parent


def test_help_names_every_key_of_ours(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for key in ("jepa_weight", "objective", "context_view", "label_protocol", "train_data", "model_config", "--launch"):
        assert key in out


def test_a_reader_that_leaves_is_told_nothing():
    to_nobody = f"{sys.executable} -m llm_jepa.cli train --help | true; echo ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", to_nobody], capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.split() == ["141"] and done.stderr == ""


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["embed", "--help"], 0),
        (["train"], 2),
        (["train", "--dry-run"], 2),
        (["tran"], 2),
        ([], 2),
        (["generate"], 2),
        (["embed", "x"], 2),
        (["watch"], 2),
    ],
)
def test_help_and_wrong_words_load_no_torch(argv, code):
    """They are answered at once. `train --help` loads torch: it shows the keys of trl's and transformers' classes."""
    script = f"""
import sys
from llm_jepa.cli import main
try:
    code = main({argv!r})
except SystemExit as leave:
    code = leave.code
print(code, "torch" in sys.modules, file=sys.stderr)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stderr.splitlines()[-1] == f"{code} False"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train"], "Which recipe"),
        (["train", "missing.yaml"], "No recipe at missing.yaml"),
        (["tran"], "invalid choice"),
        ([], "COMMAND"),
        (["generate", "./nowhere", "--prompt", "x"], "No model folder"),
        (["generate", "."], "--prompt --input"),
        (["generate", ".", "--prompt", "x", "--temperature", "1"], "unknown arguments"),
        (["generate", ".", "--prompt", "x", "--batch_size", "0"], "1 or more"),
        (["generate", ".", "--input", "x.jsonl", "--system", "s"], "--system goes with --prompt"),
        (["embed", ".", "--input", "missing.jsonl", "--output", "o"], "No data file"),
    ],
)
def test_wrong_commands(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_refusal(capsys, argv, said)


@pytest.mark.parametrize("arguments", [["train", "missing.yaml"], ["train"], ["embed", "x"]])
def test_the_real_command_exits_with_2_and_one_line(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llm_jepa.cli", *arguments], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
