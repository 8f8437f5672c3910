"""Several processes for one run, started through Accelerate."""

from __future__ import annotations

import importlib.resources
import importlib.util
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .core.errors import LAUNCHED, UserError, announces, first_failure
from .core.failures import LOST_RANK
from .core.signals import INTERRUPTED, SCHEDULER, TRY_AGAIN, Stopped, handled

MODULE = "llm_jepa.cli"
# Torch's agent would end the processes at a signal; we pass it on, and they end by themselves.
AGENT = {"PET_SIGNALS_TO_HANDLE": "SIGHUP"}
GRACE_S = 2.0  # for the other ranks, if one has failed; torch's agent gives a frozen one 30
CONFIGS = ("cpu", "ddp", "fsdp2", "zero3")  # accelerate_configs/*.yaml


class Machines(NamedTuple):
    """Where this machine is among those of a run. None: a single machine, or as the config file says."""

    num_machines: int | None = None
    machine_rank: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None

    def arguments(self, config: str) -> list[str]:
        """For Accelerate. Raises UserError if something is missing."""
        if self.num_machines is None:
            if any(value is not None for value in self):
                raise UserError("--machine_rank, --main_process_ip and --main_process_port need --num_machines.")
            # Accelerate's default port is fixed, so a second run on the same machine would fail.
            return [] if _names_port(config) else ["--main_process_port", str(_free_port())]
        if self.num_machines < 1 or self.machine_rank is None or self.main_process_ip is None:
            raise UserError("--num_machines N needs --machine_rank 0..N-1 and --main_process_ip of machine 0.")
        if not 0 <= self.machine_rank < self.num_machines:
            raise UserError(f"--machine_rank {self.machine_rank} must be 0 to {self.num_machines - 1}.")
        values = self._replace(main_process_port=self.main_process_port or 29500)._asdict()
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def planned_processes(config: str, num_processes: str | None, *, use_cpu: bool, num_machines: int | None) -> int:
    """How many processes `launch` would start, for a dry run; 1 if only a config file or another machine knows."""
    import torch

    _check_number(num_processes)
    if num_processes is not None:
        return int(num_processes)
    each = 2 if use_cpu else max(torch.cuda.device_count(), 1)
    return each * (num_machines or 1) if config in CONFIGS else 1


def _check_number(num_processes: str | None) -> None:
    if num_processes is not None and (not num_processes.isdigit() or int(num_processes) < 1):
        raise UserError(f"--num_processes {num_processes!r} must be a whole number of 1 or more.")


def launch(
    config: str,
    num_processes: str | None,
    recipe: str,
    overrides: Sequence[str],
    *,
    use_cpu: bool,
    machines: Machines = Machines(),  # noqa: B008
) -> int:
    """Run `llm-jepa train recipe overrides` once per process. Returns the exit code of the first process that failed.

    Args:
        config: a name of CONFIGS or an Accelerate config file.
        num_processes: of all machines. Default: one per GPU, or 2 on the CPU; with a config file, as the file says.
        recipe: a recipe file, already checked by the caller.

    Raises UserError for a config that cannot work on this machine, and `Stopped` if the run was asked to stop.
    """
    import torch

    if config in CONFIGS:
        gpus = torch.cuda.device_count()
        if gpus == 0 and not (use_cpu and config in ("cpu", "fsdp2")):
            raise UserError(f"--launch {config} needs GPUs and none is visible; use --launch cpu.")
        if config == "zero3" and importlib.util.find_spec("deepspeed") is None:
            raise UserError("--launch zero3 needs DeepSpeed: pip install deepspeed")
        file = str(importlib.resources.files("llm_jepa") / "accelerate_configs" / f"{config}.yaml")
        num_processes = num_processes or str((2 if use_cpu else gpus) * (machines.num_machines or 1))
    elif os.path.isfile(config):
        file = config
    else:
        raise UserError(f"--launch {config!r} is not one of {', '.join(CONFIGS)} and not a file.")
    _check_number(num_processes)
    if num_processes is not None and int(num_processes) % (machines.num_machines or 1):
        raise UserError(f"--num_processes {num_processes} does not divide by the {machines.num_machines} machines.")

    command = ["--config_file", file, *machines.arguments(config)]
    command += ["--num_processes", num_processes] if num_processes else []
    # Without --launch: if the file asks for one process, that process would launch itself again, endlessly.
    command += ["-m", MODULE, "train", recipe, *overrides]
    with _Signals().passed_on() as signals, _environment(use_cpu) as failures:
        code, last_words = _run_agent(command)
        if code == 0:
            return 0
        if code in (TRY_AGAIN, INTERRUPTED) or signals.last and -code in (*SCHEDULER, signal.SIGINT):
            raise Stopped(signals.last or (signal.SIGINT if code == INTERRUPTED else signal.SIGTERM))
        cause = first_failure(failures)
        # Others only know that it is gone.
        is_killed = code < 0 and cause is not None and cause[0] == LOST_RANK
        if cause is not None and not is_killed:
            code, last_words = cause
        print(f"llm-jepa: {last_words}", file=sys.stderr)
        return code if code > 0 else LOST_RANK


class _Signals:
    """Signals that this process passes on to the ranks."""

    last = 0

    @contextmanager
    def passed_on(self) -> Iterator[_Signals]:
        with handled((*SCHEDULER, signal.SIGINT), self._pass_on):
            yield self

    def _pass_on(self, number: int, frame: Any) -> None:
        self.last = number
        ranks = _ranks()
        if not ranks:
            raise Stopped(number)
        for rank in ranks:
            # The terminal sends Ctrl-C to all of its processes; a second one would end them at once.
            with suppress(ProcessLookupError):
                if number != signal.SIGINT or os.getpgid(rank) != os.getpgrp():
                    os.kill(rank, number)


def _ranks() -> list[int]:
    """The processes that train; not the helpers of torch and Python."""
    import psutil

    ranks = []
    for child in psutil.Process().children():
        try:
            if MODULE in child.cmdline():
                ranks.append(child.pid)
        except psutil.Error:  # it has ended
            continue
    return ranks


def _end_others(failures: str, is_over: threading.Event) -> None:
    """Wait until a rank reports a failure, and kill the ranks that are left after GRACE_S: they are frozen.

    One that publishes a checkpoint may finish it, as far as torch's agent lets it.
    """
    while not is_over.wait(0.2):
        if any(Path(failures).glob("*.json")) and not is_over.wait(GRACE_S):
            for rank in _ranks():
                if not announces(failures, rank):
                    with suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGKILL)


@contextmanager
def _environment(use_cpu: bool) -> Iterator[str]:
    """The environment of the launch, and silence of torch's agent. Yields the folder for the ranks' failures."""
    changes = {**AGENT, **({"ACCELERATE_USE_CPU": "true"} if use_cpu else {})}
    before = {name: os.environ.get(name) for name in (*changes, LAUNCHED)}
    with tempfile.TemporaryDirectory(prefix="llm_jepa_launch_") as failures:
        os.environ.update(changes, **{LAUNCHED: failures})
        logging.disable(logging.CRITICAL)  # 60 lines about a rank that has said in one why it ended
        is_over = threading.Event()
        watch = threading.Thread(target=_end_others, args=(failures, is_over), daemon=True)
        watch.start()
        try:
            yield failures
        finally:
            is_over.set()
            watch.join()
            logging.disable(logging.NOTSET)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _run_agent(command: list[str]) -> tuple[int, str]:
    """The exit code of the rank that failed first, or 0, and a line about it."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode, f"rank {rank} ended with exit code {failure.exitcode}; see its message above."
        name = signal.Signals(-failure.exitcode).name
        hint = " The system kills a process that way if memory runs out." if name == "SIGKILL" else ""
        return failure.exitcode, f"stopped: rank {rank} was killed by {name}.{hint} Continue from the last checkpoint."
    except subprocess.CalledProcessError as error:  # from a config file that asks for one process
        return error.returncode, f"the process ended with exit code {error.returncode}; see its message above."
    except SignalException as error:
        raise Stopped(error.sigval) from None
    return 0, ""


def _names_port(config: str) -> bool:
    """Whether an Accelerate config file says where processes meet. Several machines meet at 29500 if it does not."""
    if config in CONFIGS:
        return False
    text = Path(config).read_text(encoding="utf-8", errors="replace")
    names = r"^ *[\"']?(main_process_port[\"']? *: *[\"']?\d|num_machines[\"']? *: *[\"']?(?!1\b)\d)"
    return re.search(names, text, re.MULTILINE) is not None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
