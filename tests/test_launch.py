"""Claims about `--launch`: a signal reaches every rank, and whatever happens to a rank is one line and an exit code.

The real command, with two gloo ranks. Rank 1 does something in its third step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jepa.core.checkpoint import fault
from tests.core.test_stopping import folder  # noqa: F401

ROOT = Path(__file__).parent.parent
FAULT = """
import os, signal, time
if os.environ.get("RANK") == "1":  # Python imports this module when it starts
    from llm_jepa.lm.trainer import LLMJEPATrainer

    def after_optimizer_step(self, progress):
        if self.state.global_step == 4:
            {fault}

    LLMJEPATrainer.after_optimizer_step = after_optimizer_step
"""
PARENT = "os.getppid()"


def launch(folder, tmp_path, fault, *words):  # noqa: F811
    """Exit code, our lines on stderr, and the seconds since the fault."""
    (tmp_path / "sitecustomize.py").write_text(
        FAULT.format(fault=f"open({str(tmp_path / 'then')!r}, 'w').close(); {fault}")
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "llm_jepa.cli", "train", str(folder / "lm.yaml"), "--launch", "cpu", *words]
    command += ["--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    seconds = time.time() - (tmp_path / "then").stat().st_mtime
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if "llm-jepa:" in line or "torch" in line]
    return done.returncode, [line for line in lines if "reducer.cpp" not in line], seconds


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_every_rank(number, folder, tmp_path):  # noqa: F811
    code, (line,), _ = launch(folder, tmp_path, f"os.kill(os.getppid(), {int(number)}); time.sleep(1)")
    name = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert code == (130 if number == signal.SIGINT else 75)
    assert line.startswith(f"llm-jepa: {name}. Saved last: {tmp_path}/run/checkpoint-5. Continue: llm-jepa train")
    assert "--launch cpu" in line and fault(tmp_path / "run" / "checkpoint-5") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("raise ValueError('the cause')", 2, "rank 1: error: ValueError: the cause (run again with --traceback"),
        ("raise MemoryError", 5, "rank 1: stopped: out of memory in training; set per_device_train_batch_size: 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 6, "stopped: rank 1 was killed by SIGKILL."),
        ("os.kill(os.getpid(), signal.SIGSTOP)", 6, "rank 0: stopped: another process ended or did not answer"),
    ],
)
def test_a_rank_that_fails_is_one_line(what, code, said, folder, tmp_path):  # noqa: F811
    """A frozen rank too: the others wait for ddp_timeout. Without help, that would be half an hour of gloo, and then
    half a minute of torch's agent; the bound leaves time for a busy machine."""
    exit_code, lines, seconds = launch(folder, tmp_path, what, "--ddp_timeout", "5")
    assert exit_code == code and len(lines) == 1, lines
    assert lines[0].startswith(f"llm-jepa: {said}")
    assert fault(tmp_path / "run" / "checkpoint-3") is None
    assert seconds < 5 + 25, seconds
