"""Claims about the command line itself: help, wrong words, exit codes. The commands are tested with their families."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_jepa import UserError, cli
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
        (["embed", ".", "--input", "missing.jsonl", "--output", "o.safetensors"], "No data file"),
        (["embed", ".", "--input", "x.jsonl", "--output", "o.npy"], "writes two tensors in one file of safetensors"),
        (["embed", ".", "--input", "x.jsonl", "--output", "o"], "ends in .safetensors"),
        (["generate", ".", "--input", "x.jsonl", "--output", "o.csv"], "JSON lines; name a file that ends in .jsonl"),
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


class Strange(Exception):
    """What the code of a model might raise."""


@pytest.mark.parametrize("flag", [[], ["--traceback"]])
def test_an_error_that_nobody_foresaw(flag, monkeypatch, capsys):
    """One line with its type and exit code 2; with the flag, where it was raised comes first, and hidden causes."""

    def fail(argv):
        assert argv == ["generate", "x"], "the flag is not for the command"
        try:
            raise Strange("the cause")
        except Strange:
            raise Strange("first line\nsecond line") from None

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["generate", *flag, "x"]) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("llm-jepa: error: Strange: first line second line") and "--traceback" in line
    assert bool(before) == bool(flag) and ("the cause" in "".join(before)) == bool(flag)


def test_an_error_of_a_data_worker_is_its_own_last_line(monkeypatch, capsys):
    """torch puts the traceback of the worker into the message."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise self.error

    def fail(argv):
        list(torch.utils.data.DataLoader(Rows(), num_workers=1))

    monkeypatch.setattr(cli, "_run", fail)
    for error, line in ((UserError("Row 3 is bad."), "Row 3 is bad."), (IndexError("range"), "IndexError: range")):
        Rows.error = error
        assert cli.main([]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"llm-jepa: error: {line}") and "\n" not in said
