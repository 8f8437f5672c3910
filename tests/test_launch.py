"""Claims about `--launch`: a signal reaches every rank, and whatever happens to a rank is one line and an exit code.

The real command, with two gloo ranks. Rank 1 does something in its third step.
"""

from __future__ import annotations

import signal
import time

import pytest

from llm_jepa import launch as launch_module
from llm_jepa.core.checkpoint import fault
from llm_jepa.core.errors import first_failure
from llm_jepa.core.signals import Stopped
from tests.core.test_stopping import folder  # noqa: F401
from tests.launched import environment
from tests.launched import launch as run_launcher

FAULT = """
import signal, time
from llm_jepa.lm.trainer import LLMJEPATrainer

def fail(self, *args, call=LLMJEPATrainer.{method}, **kwargs):
    if os.environ["RANK"] == "{rank}" and self.state.global_step == {step}:
        open({then!r}, "w").close()
        {fault}
    return call(self, *args, **kwargs)

LLMJEPATrainer.{method} = fail
"""
STOPPED, ASLEEP = "os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(1000)"


def launch(folder, tmp_path, fault, *words, method="after_optimizer_step", step=4, rank=1):  # noqa: F811
    """Exit code, our lines on stderr, and the seconds since the fault."""
    then = tmp_path / "then"
    code = FAULT.format(method=method, step=step, rank=rank, then=str(then), fault=fault)
    command = ["train", str(folder / "lm.yaml"), "--launch", "cpu", *words]
    command += ["--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "2"]
    done = run_launcher(tmp_path, command, code)
    seconds = time.time() - then.stat().st_mtime
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if "llm-jepa:" in line or "torch" in line]
    return done.returncode, [line for line in lines if "reducer.cpp" not in line], seconds


# A rank that trains nothing and imports no torch: rank 0 sends its launcher a signal as soon as both are there, and
# each says which signals reach it. The launcher knows its ranks by the name of their module.
RANK = """
import os, pathlib, signal, sys, time
folder, number, rank = pathlib.Path(sys.argv[2]), int(sys.argv[4]), os.environ["RANK"]
got = []
for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(each, lambda number, frame: got.append(number))
(folder / f"{rank}.here").touch()
if rank == "0":
    while not (folder / "1.here").exists():
        time.sleep(0.01)
    os.kill(os.getppid(), number)
while not got:
    time.sleep(0.01)
time.sleep(0.2)  # a second one would be too many
(folder / f"{rank}.got").write_text(str(got))
os._exit(130 if number == signal.SIGINT else 75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_launcher_passes_a_signal_on_to_every_rank_once(number, tmp_path, monkeypatch):
    (tmp_path / "rank_of_test.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", environment(tmp_path)["PYTHONPATH"])
    monkeypatch.setattr(launch_module, "MODULE", "rank_of_test")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        launch_module.launch("cpu", "2", str(tmp_path), ["--signal", str(int(number))], use_cpu=True)
    assert stopped.value.code == number
    assert signal.getsignal(signal.SIGTERM) is before
    assert [(tmp_path / f"{rank}.got").read_text() for rank in "01"] == [str([int(number)])] * 2


# Rank 1 fails when rank 0 is there, which then saves for longer than a frozen rank may stay, and freezes.
SAVING_RANK = """
import os, pathlib, signal, sys, time
from llm_jepa.core.errors import announced, report
folder, seconds, rank = pathlib.Path(sys.argv[2]), float(sys.argv[4]), os.environ["RANK"]
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == "1":
    while not (folder / "0.here").exists():
        time.sleep(0.01)
    sys.exit(report("llm-jepa", "the cause", 3))
with announced():
    (folder / "0.here").touch()
    time.sleep(seconds)
    (folder / "0.saved").touch()
time.sleep(1000)
"""


def test_a_rank_that_saves_is_not_killed_with_those_that_are_frozen(tmp_path, monkeypatch, capsys):
    (tmp_path / "rank_of_test.py").write_text(SAVING_RANK)
    monkeypatch.setenv("PYTHONPATH", environment(tmp_path)["PYTHONPATH"])
    monkeypatch.setattr(launch_module, "MODULE", "rank_of_test")
    monkeypatch.setattr(launch_module, "GRACE_S", 0.3)
    began = time.monotonic()
    assert launch_module.launch("cpu", "2", str(tmp_path), ["--seconds", "2"], use_cpu=True) == 3
    assert time.monotonic() - began < 25, "torch's agent ended it, after 30 seconds"
    assert (tmp_path / "0.saved").exists()
    assert capsys.readouterr().err == "llm-jepa: rank 1: the cause\n"


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
    ],
)
def test_a_rank_that_fails_is_one_line(what, code, said, folder, tmp_path):  # noqa: F811
    exit_code, lines, _ = launch(folder, tmp_path, what)
    assert exit_code == code and len(lines) == 1, lines
    assert lines[0].startswith(f"llm-jepa: {said}")
    assert fault(tmp_path / "run" / "checkpoint-3") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "method", "step", "rank"),
    [
        (STOPPED, "compute_loss", 3, 1),
        (ASLEEP, "compute_loss", 3, 1),
        (STOPPED, "example_sums", 6, 1),
        (STOPPED, "save_more", 6, 1),
        (ASLEEP, "_publisher", 6, 0),
    ],
    ids=["forward, stopped", "forward, asleep", "evaluation", "save", "rename"],
)
def test_a_rank_that_freezes_ends_the_run(what, method, step, rank, folder, tmp_path):  # noqa: F811
    """The others wait for ddp_timeout. Without help, that would be half an hour of gloo, and then half a minute of
    torch's agent; 2.6 seconds after the timeout were measured with 15 processes on two cores."""
    exit_code, lines, seconds = launch(
        folder, tmp_path, what, "--ddp_timeout", "5", method=method, step=step, rank=rank
    )
    assert exit_code == 6 and len(lines) == 1, lines
    assert lines[0].startswith(f"llm-jepa: rank {1 - rank}: stopped: another process ended or did not answer within")
    assert lines[0].endswith(f"Last good checkpoint: {tmp_path}/run/checkpoint-3.")
    assert seconds < 5 + 10, seconds


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("num_machines: 1\nnum_processes: 2\n", False),
        ("num_machines: 2\n", True),
        ('{\n "num_machines": 12}', True),
        ("main_process_port: 29511\n", True),
        ("main_process_port: '29511'\n", True),
        ("main_process_port: null\n", False),
    ],
)
def test_the_port_of_a_config_file_is_not_overridden(text, names, tmp_path):
    """A free port, another one on each machine, would be chosen; then they never meet."""
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert bool(launch_module.Machines().arguments(str(config))) is not names


def test_half_a_failure_of_a_killed_process_is_passed_over(tmp_path):
    (tmp_path / "0.json").write_text('{"time": 1')
    (tmp_path / "1.json").write_text('{"time": 2, "rank": 1, "line": "no", "exit_code": 4}')
    assert first_failure(str(tmp_path)) == (4, "rank 1: no")
