"""The command `python -m eval.step_cost`."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets.utils.logging import disable_progress_bar
from transformers.utils import logging

from llm_jepa import UserError
from llm_jepa.core.files import write_json

from ...command import ArgumentParser, check_writable, one_line_errors, require, seed_number, whole
from ...provenance import environment
from . import __doc__ as about
from .data import DATA_SETS, SHAPES, load_data
from .figures import BOUNDS, MEMORY_BOUND, bounds_table, plot, summary, table
from .measuring import measure_cell

DEFAULTS = {"repetitions": 15, "memory_batches": 5, "data": list(DATA_SETS), "model": list(SHAPES)}
QUICK_DEFAULTS = {"repetitions": 5, "memory_batches": 1, "data": ["nl_rx"], "model": ["body"]}
SETTINGS = ("quick", "repetitions", "memory_batches", "batch_size", "threads", "device", "dtype", "seed")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, arms = str(about).partition("\n\n")
    parser = ArgumentParser(
        prog="python -m eval.step_cost",
        description=description,
        epilog=arms,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: nl_rx, body model, 5 repetitions")
    parser.add_argument("--nl-rx", type=Path, metavar="DIR", help="folder of synth_train.jsonl (default: generated)")
    parser.add_argument("--spider", type=Path, metavar="DIR", help="folder of spider_train.jsonl (default: generated)")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, help="default: both; with --quick nl_rx")
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="MODEL",
        help=f"{' or '.join(SHAPES)} of random weights, a folder, or a Hub id (default: both; with --quick body)",
    )
    parser.add_argument("--repetitions", type=whole(1), help="batches per arm (default: 15; with --quick 5)")
    parser.add_argument(
        "--memory-batches",
        type=whole(1),
        help="batches whose peak is counted (default: 5; --quick: 1, of ours and sft)",
    )
    parser.add_argument("--batch-size", type=whole(1), default=4, help="examples of a micro-batch")
    parser.add_argument("--threads", type=whole(1, 1024), default=1, help="torch threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--seed", type=seed_number, default=0, help="weights, rows and order of the arms")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file for every figure of every repetition")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="file for the bars of the ratios")
    options = parser.parse_args(argv)
    for name, default in (QUICK_DEFAULTS if options.quick else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cells and print their tables. Returns the result file's content. Raises UserError."""
    _check(options)
    disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    folders = {"nl_rx": options.nl_rx, "longer": options.spider}
    clock = "cpu_s" if options.device == "cpu" else "wall_s"
    cells = []
    for name in options.data:
        data = load_data(name, folders[name], seed=options.seed)
        for shape in options.model:
            cell = measure_cell(data, shape, options)
            cell["summary"] = summary(cell, clock)
            cells.append(cell)
            print(f"{table(cell, clock, options.batch_size)}\n", flush=True)
    # The bounds are for this cell. Without it, the first one is summed up.
    bounded = next((cell for cell in cells if (cell["data"], cell["model"]) == ("nl_rx", "body")), cells[0])
    return {
        "environment": environment(),
        "config": {name: getattr(options, name) for name in SETTINGS},
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "clock": clock,
        "bounds": {name: bound._asdict() for name, bound in {**BOUNDS, "ours_memory_over_sft": MEMORY_BOUND}.items()},
        "cells": cells,
        "summary_of": {key: bounded[key] for key in ("data", "source", "model")},
        "summary": bounded["summary"],
    }


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for options that cannot work."""
    if options.memory_batches > options.repetitions:
        raise UserError(
            f"--memory-batches {options.memory_batches} is more than the {options.repetitions} batches; lower it, or "
            "raise --repetitions."
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, and none is visible; use --device cpu.")
    for option, folder in (("--nl-rx", options.nl_rx), ("--spider", options.spider)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{option}: no folder at {folder}.")
    check_writable(options.out, options.plot)
    if options.plot is not None:
        require("matplotlib")


@one_line_errors("eval.step_cost")
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    result = run(options)
    summed_up = result["summary_of"]
    print(", ".join(summed_up.values()) + ":")
    missed = "MISSED"
    if options.repetitions < 10:
        print("Few repetitions: on a busy machine a figure may be a tenth off. A verdict takes 15 (the default).")
        missed = "above, but see the line before"
    print(bounds_table(result["summary"], missed))
    if options.nl_rx is None or (summed_up["data"], summed_up["model"]) != ("nl_rx", "body"):
        print("The bounds are meant for real NL-RX rows (--nl-rx DIR) and the body model; these are others.")
    if options.out is not None:
        write_json(options.out, result)
    if options.plot is not None:
        plot(result["cells"], result["clock"], options.plot)
    return 0
