"""Claims about failures of the machine: one line that says what to do, an exit code, and a whole last checkpoint."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from types import SimpleNamespace

import pytest
import torch

from llm_jepa.cli import main
from llm_jepa.core.checkpoint import checkpoints, fault
from llm_jepa.core.failures import _size, machine_failure
from llm_jepa.lm.trainer import LLMJEPATrainer
from llm_jepa.vl.trainer import VLJEPATrainer
from tests.core.test_stopping import folder, outcome  # noqa: F401
from tests.ranks import start

TRAINERS = {"lm": LLMJEPATrainer, "vl": VLJEPATrainer}


def our_line(stderr):
    """The one line of ours; libraries draw progress bars."""
    assert "Traceback" not in stderr, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("llm-jepa:")]
    return line


def assert_last_is_whole(run, step):
    assert [path.name for path in checkpoints(run)] == ([f"checkpoint-{step}"] if step else [])
    assert not step or fault(run / f"checkpoint-{step}") is None


# -- disk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system whose size in bytes a test can set."""
    path = tmp_path / "disk"
    path.mkdir()

    def resize(size, *options):
        subprocess.run(["mount", *options, "-o", f"size={size}", "tmpfs", str(path)], check=True, capture_output=True)

    try:
        resize(100_000, "-t", "tmpfs")
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("needs the right to mount a tmpfs")
    yield path, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)
    subprocess.run(["umount", str(path)], check=True)


# share: how much of a checkpoint the disk holds. The largest files are the weights and, twice as large, the optimizer.
@pytest.mark.parametrize(
    ("family", "share", "step"),
    [
        ("lm", 0.1, 0),
        ("lm", 0.6, 0),
        ("lm", 1.1, 3),
        ("lm", 1.6, 3),
        pytest.param("vl", 0.6, 0, marks=pytest.mark.slow),
        ("vl", 1.6, 3),
    ],
)
def test_a_full_disk(family, share, step, folder, disk, capsys):  # noqa: F811
    """In the first save and in a later one; in the weights and in torch's zip writer. Then there is room again."""
    path, resize = disk
    size = sum(file.stat().st_size for file in (folder / family / "checkpoint-3").iterdir())
    resize(int(share * size) + 50_000)  # run.json, and blocks that are not full
    words = ["train", str(folder / f"{family}.yaml"), "--output_dir", str(path / "run")]
    assert main(words) == 4
    line = our_line(capsys.readouterr().err)
    assert line.startswith(f"llm-jepa: stopped: the disk of {path}/run is full") and "make room" in line
    assert line.endswith(f"Last good checkpoint: {f'{path}/run/checkpoint-{step}' if step else 'none yet'}.")
    assert_last_is_whole(path / "run", step)
    resize(10 * size)
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert outcome(path / "run") == outcome(folder / family)


# share: of the weights. Above 1 the optimizer, twice as large, is cut: torch's zip writer gives no reason.
@pytest.mark.parametrize("share", [0.5, 1.5])
def test_a_limit_on_files(share, folder, tmp_path, capsys):  # noqa: F811
    """`ulimit -f`: there is room on the disk, so the line must not ask for more."""
    size = int(share * (folder / "lm" / "checkpoint-3" / "model.safetensors").stat().st_size)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code = main(["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    line = our_line(capsys.readouterr().err)
    assert code == 4 and f"a file in {tmp_path}/run would be larger than the {_size(size)} that the limit" in line
    assert "ulimit -f" in line and "free" not in line and "make room" not in line
    assert_last_is_whole(tmp_path / "run", 0)


def test_a_file_system_without_large_files(tmp_path):
    recipe = SimpleNamespace(training=SimpleNamespace(world_size=1, output_dir=str(tmp_path)))
    line, code = machine_failure(OSError(errno.EFBIG, "File too large"), recipe)
    assert code == 4 and "file system" in line and "output_dir" in line and "ulimit" not in line


# -- memory -----------------------------------------------------------------------------------------------------------


def allocate(*_):
    torch.empty(1 << 55, dtype=torch.uint8)


def no_memory(*_):
    raise MemoryError


def image_without_memory(*_):
    """As the image processors of transformers do it."""
    try:
        raise MemoryError("Unable to allocate 1.50 MiB for an array")
    except MemoryError as error:
        raise ValueError(f"Unable to convert output 'pixel_values' (type: list) to tensor: {error}")  # noqa: B904


@pytest.mark.parametrize(
    ("method", "fail", "said"),
    [
        ("compute_loss", allocate, "in training; set per_device_train_batch_size: 2 and gradient_accumulation_steps"),
        ("compute_loss", no_memory, "in training; set per_device_train_batch_size: 2 and gradient_accumulation_steps"),
        ("example_sums", allocate, "in an evaluation; set per_device_eval_batch_size: 2"),
        ("extra_state", allocate, "in training; set"),
        ("check_call", allocate, "outside of training: model and data do not fit"),
        ("check_call", image_without_memory, "outside of training: model and data do not fit"),
    ],
)
@pytest.mark.parametrize("family", list(TRAINERS))
def test_no_memory(family, method, fail, said, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The real error of torch's allocator, and Python's."""
    call = getattr(TRAINERS[family], method)

    def fails(self, *args, **kwargs):
        if not hasattr(self, "state") or self.state.global_step in (4, 6):
            fail()
        return call(self, *args, **kwargs)

    monkeypatch.setattr(TRAINERS[family], method, fails)
    words = ["train", str(folder / f"{family}.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main([*words, "--per_device_eval_batch_size", "4"]) == 5
    assert f"stopped: out of memory {said}" in our_line(capsys.readouterr().err)
    assert_last_is_whole(tmp_path / "run", 0 if method == "check_call" else 3)


def limited_memory(words, stderr):
    """In a child: after the fourth step, no more than 4 MB are to be had."""
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)

    def limit(self, progress):
        if self.state.global_step == 4:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))

    LLMJEPATrainer.after_optimizer_step = limit
    os._exit(main(words))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs the size of the process from Linux")
def test_a_limit_on_memory(folder, tmp_path):  # noqa: F811
    words = ["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size"]
    words += ["16", "--model_config", "{model_type: gpt2, n_embd: 256, n_layer: 4, n_head: 4, n_positions: 256}"]
    words += ["--save_steps", "100", "--eval_steps", "100", "--load_best_model_at_end", "false"]
    child = start(limited_memory, words, str(tmp_path / "stderr"))
    child.join()
    line = our_line((tmp_path / "stderr").read_text())
    assert child.exitcode == 5 and "per_device_train_batch_size: 8 and gradient_accumulation_steps: 4" in line, line


# -- figures that are no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(TRAINERS))
def test_nan_in_an_evaluation_that_chooses_the_weights(family, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    figures = TRAINERS[family].figures
    nan = {"loss": float("nan")}

    def at_step_6(self, sums):
        return figures(self, sums) | (nan if self.state.global_step == 6 else {})

    monkeypatch.setattr(TRAINERS[family], "figures", at_step_6)
    words = ["train", str(folder / f"{family}.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main(words) == 3
    line = our_line(capsys.readouterr().err)
    assert line.startswith("llm-jepa: stopped: eval_loss is nan at step 6, and the best weights are chosen by it")
    assert f"Last good checkpoint: {tmp_path}/run/checkpoint-3." in line
    assert_last_is_whole(tmp_path / "run", 3)


def test_nan_in_an_evaluation_that_chooses_nothing(folder, tmp_path, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(LLMJEPATrainer, "figures", lambda self, sums: {"loss": float("nan")})
    words = ["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main([*words, "--load_best_model_at_end", "false"]) == 0
    assert "eval_loss is nan at step 6." in caplog.text
