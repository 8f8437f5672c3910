"""Claims about several machines: two network namespaces that share a wire, each with a launcher and one gloo rank.

The same command as on one machine, with the number of this one. Then the wire is cut in the middle of the run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_jepa.core import checkpoint
from tests.core.test_stopping import folder, outcome, train_as_rank  # noqa: F401
from tests.launched import environment
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow
ADDRESS = "10.77.0.{}"
TIMEOUT_S = 8
FAULT = """
import subprocess
if os.environ["RANK"] == "1":
    from llm_jepa.lm.trainer import LLMJEPATrainer

    def after_optimizer_step(self, progress, after=LLMJEPATrainer.after_optimizer_step):
        after(self, progress)
        if self.state.global_step == 4:
            open({then!r}, "w").close()
            {fault}

    LLMJEPATrainer.after_optimizer_step = after_optimizer_step
"""


class Machines:
    """Two network namespaces, joined by a pair of virtual network cards. `wires[i]` is the card of machine i."""

    def __init__(self) -> None:
        self.names = [f"llm_jepa_{os.getpid()}_{i}" for i in range(2)]
        self.wires = [f"wire{i}" for i in range(2)]

    def connect(self) -> None:
        for name in self.names:
            self._ip("netns", "add", name)
        (a, b), (wire_a, wire_b) = self.names, self.wires
        self._ip("link", "add", wire_a, "netns", a, "type", "veth", "peer", "name", wire_b, "netns", b)
        for i, (name, wire) in enumerate(zip(self.names, self.wires, strict=True)):
            self._ip("-n", name, "addr", "add", f"{ADDRESS.format(i + 1)}/24", "dev", wire)
            for card in ("lo", wire):
                self._ip("-n", name, "link", "set", card, "up")

    def repair(self) -> None:
        for name, wire in zip(self.names, self.wires, strict=True):
            self._ip("-n", name, "link", "set", wire, "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, i: int, words: list[str], env: dict[str, str], disks: Path | None) -> subprocess.Popen:
        """`llm-jepa` with these words on machine i. disks: machine i sees DISKS/i as DISKS/here."""
        env = {**env, "GLOO_SOCKET_IFNAME": self.wires[i]}
        command = ["ip", "netns", "exec", self.names[i]]  # with mounts that no other process sees
        if disks is not None:
            command += ["sh", "-c", f'mount --bind "$0/{i}" "$0/here" && exec "$@"', str(disks)]
        command += [sys.executable, "-m", "llm_jepa.cli", *words]
        command += ["--num_machines", "2", "--machine_rank", str(i), "--main_process_ip", ADDRESS.format(1)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    machines = Machines()
    try:
        machines.connect()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        machines.remove()
        pytest.skip(f"needs the right to make network namespaces: {error}")
    yield machines
    machines.remove()


@pytest.fixture(scope="module")
def whole(folder) -> Path:  # noqa: F811
    """The uninterrupted run of two ranks on one machine."""
    words = ["train", str(folder / "lm.yaml"), "--per_device_train_batch_size", "2", "--output_dir"]
    assert on_ranks(2, train_as_rank, [*words, str(folder / "one machine")], None, 0) == [0, 0]
    return folder / "one machine"


def on_both(machines, words, env, disks=None) -> tuple[list[int], list[list[str]], float]:
    """Exit codes, our lines on stderr, and when the last one ended."""
    running = [machines.start(i, words, env, disks) for i in range(2)]
    said = [process.communicate(timeout=300) for process in running]
    assert not any("Traceback" in err for _, err in said), said
    lines = [[line for line in err.splitlines() if "llm-jepa:" in line] for _, err in said]
    return [process.returncode for process in running], lines, time.time()


def command(folder, output, *more):  # noqa: F811
    words = ["train", str(folder / "lm.yaml"), "--launch", "cpu", "--num_processes", "2", "--ddp_timeout"]
    return [*words, str(TIMEOUT_S), "--per_device_train_batch_size", "2", "--output_dir", str(output), *more]


def test_a_cut_wire_ends_both_sides_and_the_run_goes_on_exactly(machines, whole, folder, tmp_path):  # noqa: F811
    """One output_dir, as on a shared file system. Both sides wait for ddp_timeout, and say so in a line."""
    run, then = tmp_path / "run", tmp_path / "then"
    fault = f"subprocess.run(['ip', 'link', 'set', {machines.wires[1]!r}, 'down'], check=True)"
    env = environment(tmp_path, FAULT.format(then=str(then), fault=fault))
    codes, lines, end = on_both(machines, command(folder, run), env)
    assert codes == [6, 6] and [len(said) for said in lines] == [1, 1], lines
    for (line,) in lines:
        assert f"another process ended or did not answer within ddp_timeout: {TIMEOUT_S} seconds" in line
        assert line.endswith(f"Last good checkpoint: {run}/checkpoint-3.")
    seconds = end - then.stat().st_mtime
    assert seconds < TIMEOUT_S + 10, seconds
    machines.repair()
    words = command(folder, run, "--resume_from_checkpoint", "true")
    codes, lines, _ = on_both(machines, words, environment(tmp_path / "no code"))
    assert codes == [0, 0], lines
    assert outcome(run) == outcome(whole)


def test_machines_that_share_no_files(machines, whole, folder, tmp_path):  # noqa: F811
    """Each writes its folder whole. One scheduler stops one machine; all stop, and go on from their own folders."""
    disks = tmp_path / "disks"
    for name in ("0", "1", "here"):
        (disks / name).mkdir(parents=True)
    fault = f"os.kill(os.getppid(), {int(signal.SIGTERM)})"
    env = environment(tmp_path, FAULT.format(then=str(tmp_path / "then"), fault=fault))
    words = command(folder, disks / "here" / "run", "--save_on_each_node", "true")
    codes, lines, _ = on_both(machines, words, env, disks)
    assert codes == [75, 75], lines
    runs = [disks / name / "run" for name in ("0", "1")]
    newest = [checkpoint.newest_complete(run) for run in runs]
    assert newest[0].name == newest[1].name, newest
    for rank, path in enumerate(newest):
        assert (path / f"rng_state_{rank}.pth").exists() and not (path / f"rng_state_{1 - rank}.pth").exists()
    words += ["--resume_from_checkpoint", "true"]
    codes, lines, _ = on_both(machines, words, environment(tmp_path / "no code"), disks)
    assert codes == [0, 0], lines
    for run in runs:
        assert outcome(run) == outcome(whole) and checkpoint.fault_of_model(run) is None
