"""Claims about the command line itself: help, wrong words, exit codes. The commands are tested with their families."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from llm_jepa import UserError, cli
from llm_jepa.cli import main
from llm_jepa.synthetic import nl_rx
from tests.conftest import expect_refusal

ROOT = Path(__file__).parent.parent
LLAMA = (
    "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2}"
)
LM = f"""
family: lm
model_config: {LLAMA}
tokenizer_vocab_size: 320
train_data: rows.jsonl
validation_rows: 4
max_steps: 2
save_steps: 1
eval_strategy: steps
eval_steps: 2
learning_rate: 1
per_device_train_batch_size: 4
diagnostics_pairs: 4
use_cpu: true
output_dir: lm
"""
VL = f"""
family: vl
x_encoder: {{model_type: vit, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 4,
  patch_size: 16}}
predictor: {LLAMA}
y_encoder: {{model_type: bert, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 4}}
shared_dim: 16
frame_size: 32
num_frames: 1
train_data: clips.jsonl
max_steps: 1
per_device_train_batch_size: 2
use_cpu: true
output_dir: vl
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with two recipes and their data."""
    (tmp_path / "lm.yaml").write_text(LM)
    (tmp_path / "vl.yaml").write_text(VL)
    rows = nl_rx.generate(16, seed=3)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "blue.png")
    clips = [{"image": "red.png", "target": "red"}, {"image": "blue.png", "target": "blue"}]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


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
        (["train", "--help"], 0),
        (["--version"], 0),
        (["recipes"], 0),
        (["generate", "--help"], 0),
        (["embed", "--help"], 0),
        (["demo", "--help"], 0),
        (["demo"], 2),
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
    """They are answered at once."""
    script = f"""
import sys
from llm_jepa.cli import main
try:
    code = main({argv!r})
except SystemExit as leave:
    code = leave.code
print(code, "torch" in sys.modules or "gradio" in sys.modules, file=sys.stderr)
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
        (
            ["embed", ".", "--input", "x.jsonl", "--output", "o.npy"],
            "writes two tensors: name a file that ends in .safetensors",
        ),
        (["embed", ".", "--input", "x.jsonl", "--output", "o"], "ends in .safetensors"),
        (["generate", ".", "--input", "x.jsonl", "--output", "o.csv"], "JSON lines: name a file that ends in .jsonl"),
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


# -- what a run prints ----------------------------------------------------------------------------------------------

RUNS = [
    ["train", "lm.yaml", "--dry-run"],
    ["train", "lm.yaml"],
    ["train", "lm.yaml", "--output_dir", "lora", "--use_peft", "true"],
    ["train", "lm.yaml", "--output_dir", "on", "--model_config", "null", "--model_name_or_path", "lm"],
    ["generate", "lm", "--prompt", "lines", "--max_new_tokens", "2"],
    ["embed", "lm", "--input", "rows.jsonl", "--output", "e.safetensors"],
    ["train", "vl.yaml", "--dry-run"],
    ["train", "vl.yaml"],
]


def test_runs_print_nothing_but_our_lines_and_progress_bars(folder):
    """On stderr, in a process that shows what a user's shell would show: no warning of a library."""
    script = f"from llm_jepa.cli import main; print([main(words) for words in {RUNS!r}])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, env=environment()
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == str([0] * len(RUNS)), done.stderr
    lines = [line for line in re.split(r"[\r\n]", done.stderr) if line.strip()]
    others = [line for line in lines if not re.search(r"\d+%\|.*\|", line)]
    assert len(lines) > len(others), "not even a progress bar: this shows nothing"
    assert [line for line in others if not line.startswith("Note: ") and "\x1b[A" not in line] == []


def test_ctrl_c_prints_the_command_that_continues(folder):
    """With the same overrides, quoted for a shell."""
    words = ["--max_steps", "100000", "--run_name", "a b"]
    run = [sys.executable, "-m", "llm_jepa.cli", "train", "lm.yaml"]
    process = subprocess.Popen(
        [*run, *words],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # As at a terminal. Parallel test workers and jobs in the background start with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (folder / "lm" / "checkpoint-2" / "manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    (line,) = re.findall("llm-jepa: .*", stderr)  # a progress bar may end after it
    assert process.returncode == 130 and line.startswith("llm-jepa: interrupted. Saved last: lm/checkpoint-"), stderr
    command = "llm-jepa train lm.yaml --max_steps 100000 --run_name 'a b' --resume_from_checkpoint true"
    assert line.endswith(f"Continue: {command}")


def test_ctrl_c_before_the_first_save_says_so(folder, monkeypatch, capsys):
    def interrupted(recipe):
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    monkeypatch.setattr("llm_jepa.lm.commands.train", interrupted)
    assert main(["train", "lm.yaml", "--resume_from_checkpoint", "true", "--run_name", "a b"]) == 130
    said = "Nothing is saved yet; start again: llm-jepa train lm.yaml --run_name 'a b'\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim", "grokadamw"], "optim: grokadamw: Please install grokadamw"),
        (["--report_to", "wandb"], "report_to: wandb: WandbCallback requires wandb to be installed"),
        (["--report_to", "[tensorboard, swanlab]"], "report_to: swanlab"),
    ],
)
@pytest.mark.parametrize("recipe", ["lm.yaml", "vl.yaml"])
def test_a_missing_package_is_named_before_data_and_model_are_read(words, said, recipe, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name in ("rows.jsonl", "clips.jsonl"):
        (folder / name).write_text("no rows\n")
    for dry in ([], ["--dry-run"]):
        expect_refusal(capsys, ["train", recipe, *words, *dry], said)
    assert not (folder / "lm").exists() and not (folder / "vl").exists()


def test_the_dry_run_prints_values_as_they_were_written(folder, monkeypatch, capsys):
    """transformers' save_steps and learning_rate are floats."""
    monkeypatch.chdir(folder)
    assert main(["train", "lm.yaml", "--dry-run", "--logging_steps", "7"]) == 0
    out = capsys.readouterr().out
    for line in ("save_steps: 1\n", "learning_rate: 1\n", "logging_steps: 7\n", "max_steps: 2\n"):
        assert line in out
