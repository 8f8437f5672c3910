"""Processes for tests: ranks of a gloo group, and a run that a test kills.

They are forked from a server that has imported torch, transformers and this package. A process that imports them itself
costs five seconds of a core. Forked from the test's own process instead, it would hang if that has used OpenMP threads.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

DEADLINE_S = 240  # ranks that wait for each other would do so for hours

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["tests.preload"])


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that calls `function`, which a module of tests must define at its top."""
    process = forkserver.Process(target=function, args=arguments)
    process.start()
    return process


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(rank, *arguments)` on `world` ranks of a process group; returns what each returned.

    Results are tensors, numbers, texts, and lists and dicts of them. Raises what a rank raised. A test inside a rank
    could end it and leave the others waiting, so ranks return what they found, and the test looks at that.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_processes(
            _one_rank, (world, folder, function, arguments), nprocs=world, join=False, start_method="forkserver"
        )
        end = time.monotonic() + DEADLINE_S
        try:
            while not ranks.join(timeout=1):
                assert time.monotonic() < end, "the ranks wait for each other"
        finally:
            for process in ranks.processes:
                process.kill()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]


def _one_rank(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # Accelerate asks for them, and uses the group below
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    if dist.is_initialized():
        # No DistributedDataParallel may outlive its group: the last to go would wait for the group's threads, which
        # wait for Python's lock.
        dist.barrier()
        dist.destroy_process_group()
