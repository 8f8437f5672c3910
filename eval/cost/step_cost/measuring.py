"""Time, tokens and peak memory of every arm."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from llm_jepa import UserError

from . import data as data_sets
from .arms import Arm, make_arms
from .data import Data
from .figures import MEMORY_BOUND

PADDED_REPETITIONS = 3  # of three_rows_512, which costs more than all other arms together
UNBOUNDED = ("sft_trl", "three_rows_512", "ours_k0")  # arms without a bound; --quick runs them once
OFTEN = ("sft", "ours", "ours_forward_only", "ours_cached", "ours_dropped")  # --quick runs the others 3 times
SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
PRODUCT_ARMS = ("sft", "sft_packed", "ours", "ours_packed")
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm")  # of the weights; attention has its own kernel
Figures = dict[str, dict[str, list[Any]]]  # arm -> name -> the value of each repetition


class Clock(NamedTuple):
    cpu_s: float
    wall_s: float


def timed(arm: Arm, numbers: Sequence[int], model: PreTrainedModel) -> Clock:
    """The time of one step. Gradients start as None, as in a Trainer."""
    model.zero_grad(set_to_none=True)
    _synchronize(model)
    cpu, wall = time.process_time(), time.perf_counter()
    arm.step(numbers)
    _synchronize(model)
    return Clock(time.process_time() - cpu, time.perf_counter() - wall)


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(arm: Arm, numbers: Sequence[int], model: PreTrainedModel) -> int:
    """Bytes at the peak of a step, above those of the resting model with its gradients."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
        arm.step(numbers)
        return torch.cuda.max_memory_allocated() - resting
    with _quiet_stderr(), torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:  # fmt: skip
        arm.step(numbers)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())  # stable: in the order the allocator reported them
    return max(itertools.accumulate(event.nbytes() for event in events))


def over_matrix_products(arm: Arm, numbers: Sequence[int], model: PreTrainedModel) -> float:
    """The CPU time of a step over that of its matrix products with weights, both of the same step."""
    model.zero_grad(set_to_none=True)
    with _quiet_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        started = time.process_time()
        arm.step(numbers)
        step_s = time.process_time() - started
    products_us = sum(event.self_cpu_time_total for event in profile.key_averages() if event.key in MATRIX_PRODUCTS)
    return 1e6 * step_s / products_us


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Close stderr inside the block: the C++ part of the profiler writes two lines there, at any log level."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def measure_cell(data: Data, shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """All arms of one data set and one model: every figure of every repetition. Raises UserError."""
    needed = options.repetitions * options.batch_size
    if needed > len(data.rows):
        raise UserError(
            f"{options.repetitions} repetitions of {options.batch_size} rows need {needed} rows, and {data.source} has "
            f"{len(data.rows)}; lower --repetitions or --batch-size."
        )
    draw = random.Random(options.seed)
    rows = draw.sample(data.rows, needed)
    batches = [range(start, start + options.batch_size) for start in range(0, needed, options.batch_size)]
    model, data = data_sets.load_model(shape, data, seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="step_cost_") as folder:
        arms = make_arms(model, data, rows, Path(folder), options)
    figures = {name: _tokens_of(arm, batches) for name, arm in arms.items()}
    to_weigh = _to_weigh(list(arms), batches, options)
    to_time = _to_time(list(arms), batches, options, draw)
    with tqdm(total=len(to_weigh) + len(to_time), desc=f"{data.name}, {shape}", mininterval=1) as progress:
        arms["sft"].step(batches[0])  # allocates workspaces and starts threads before anything is weighed or timed
        for name, batch in to_weigh:
            figures[name]["peak_memory"].append(peak_memory(arms[name], batch, model))
            progress.update()
        gc.collect()
        if options.device == "cpu":
            for name in PRODUCT_ARMS:
                figures[name]["over_matrix_products"] = [
                    over_matrix_products(arms[name], batch, model) for batch in batches[: options.memory_batches]
                ]
        for name, batch in to_time:
            clock = timed(arms[name], batch, model)
            figures[name]["cpu_s"].append(clock.cpu_s)
            figures[name]["wall_s"].append(clock.wall_s)
            progress.update()
    return {
        "data": data.name,
        "source": data.source,
        "rows_sha256": data.sha256,
        "tokenizer_size": len(data.tokenizer),
        "model": Path(shape).name,  # no path of this machine
        "shape": {key: getattr(model.config, key) for key in SHAPE_KEYS},
        "parameters": model.num_parameters(),
        "arms": add_dropout(figures),
    }


def _tokens_of(arm: Arm, batches: Sequence[range]) -> dict[str, list[Any]]:
    """The figures of an arm before it runs: its tokens in every batch, and empty lists for the rest."""
    tokens = [arm.tokens(batch) for batch in batches]
    return {
        "cpu_s": [],
        "wall_s": [],
        "real_tokens": [count.real for count in tokens],
        "padded_tokens": [count.padded for count in tokens],
        "peak_memory": [],
    }


def _to_weigh(arms: list[str], batches: Sequence[range], options: argparse.Namespace) -> list[tuple[str, range]]:
    """The (arm, batch) pairs whose peak memory is counted. --quick counts only the two arms that have a bound."""
    if options.quick:
        arms = [name for name in arms if name in (MEMORY_BOUND.numerator, MEMORY_BOUND.denominator)]
    return [(name, batch) for batch, name in itertools.product(batches[: options.memory_batches], arms)]


def _to_time(
    arms: list[str], batches: Sequence[range], options: argparse.Namespace, draw: random.Random
) -> list[tuple[str, range]]:
    """The (arm, batch) pairs to time: one batch after the other, the arms of each in random order."""
    most = {name: options.repetitions for name in arms}
    if options.quick:
        most |= {name: min(3, options.repetitions) for name in arms if name not in OFTEN}
        most |= dict.fromkeys(UNBOUNDED, 1)
    else:
        most["three_rows_512"] = PADDED_REPETITIONS
    pairs = []
    for repetition, batch in enumerate(batches):
        for name in draw.sample(arms, len(arms)):
            if repetition < most[name]:
                pairs.append((name, batch))
    return pairs


def add_dropout(arms: Figures) -> Figures:
    """Add the mean step of a run that drops half, or three quarters, of its steps.

    It is computed in expectation, so it has no sampling noise. Its peak memory is that of a step with views.
    """
    with_views, dropped = arms["ours"], arms["ours_dropped"]
    for percent in (50, 75):
        share = percent / 100
        mixed: dict[str, list[Any]] = {}
        for key in dropped:
            if key != "peak_memory":
                pairs = zip(with_views[key], dropped[key], strict=True)
                mixed[key] = [(1 - share) * one + share * other for one, other in pairs]
        arms[f"ours_dropout{percent}"] = {**mixed, "peak_memory": with_views["peak_memory"]}
    return arms
