"""Several processes for one run, started through Accelerate."""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from .core.errors import UserError

LAUNCHED = "LLM_JEPA_LAUNCHED"  # an environment variable of the processes that `launch` starts
CONFIGS = ("cpu", "ddp", "fsdp2", "zero3")  # accelerate_configs/*.yaml


def launch(config: str, num_processes: str | None, recipe: str, overrides: Sequence[str]) -> int:
    """Run `llm-jepa train recipe overrides` once per process. Returns the exit code of the first process that failed.

    Args:
        config: a name of CONFIGS or an Accelerate config file.
        num_processes: default: one per GPU, or 2 on the CPU; with a config file, as the file says.
        recipe: a recipe file, already checked by the caller.

    Raises UserError for a config that cannot work on this machine, and KeyboardInterrupt for Ctrl-C.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if config in CONFIGS:
        gpus = torch.cuda.device_count()
        if config != "cpu" and gpus == 0:
            raise UserError(f"--launch {config} needs GPUs and none is visible; use --launch cpu.")
        if config == "zero3" and importlib.util.find_spec("deepspeed") is None:
            raise UserError("--launch zero3 needs DeepSpeed: pip install deepspeed")
        file = str(importlib.resources.files("llm_jepa") / "accelerate_configs" / f"{config}.yaml")
        num_processes = num_processes or str(gpus or 2)
    elif os.path.isfile(config):
        file = config
    else:
        raise UserError(f"--launch {config!r} is not one of {', '.join(CONFIGS)} and not a file.")
    if num_processes is not None and (not num_processes.isdigit() or int(num_processes) < 1):
        raise UserError(f"--num_processes {num_processes!r} must be a whole number of 1 or more.")

    command = ["--config_file", file, "--main_process_port", str(_free_port())]
    command += ["--num_processes", num_processes] if num_processes else []
    # Without --launch: if the file asks for one process, that process would launch itself again, endlessly.
    command += ["-m", "llm_jepa.cli", "train", recipe, *overrides]
    if config == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ[LAUNCHED] = "true"
    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"llm-jepa: rank {rank} ended with exit code {failure.exitcode}; see its message above.", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        if error.sigval != signal.SIGINT:
            raise
        raise KeyboardInterrupt from None
    except subprocess.CalledProcessError as error:  # from a config file that asks for one process
        return error.returncode if error.returncode > 0 else 1
    finally:
        del os.environ[LAUNCHED]
    return 0


def _free_port() -> int:
    """Accelerate's default port is fixed, so a second run on the same machine would fail."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
