"""Checks of the values of recipe keys. They need no library, so they answer before one is imported.

Each raises UserError and returns nothing. `core.checks` has those that ask torch and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import UserError
from .options import MAX_SEED


def check_at_least(args: Any, lowest: Mapping[str, float]) -> None:
    """Each named value must be at least its lowest one."""
    for name, low in lowest.items():
        if getattr(args, name) < low:
            raise UserError(f"{name}={getattr(args, name)} must be {low} or more.")


def check_ranges(args: Any, ranges: Iterable[tuple[str, float, float, str]]) -> None:
    """(name, low, high, why): the value is None or within low..high."""
    for name, low, high, why in ranges:
        value = getattr(args, name, None)
        if isinstance(value, (int, float)) and not low <= value <= high:
            allowed = f"be {low} or more" if high >= 10_000 and not value > high else f"lie in {low}..{high}"
            raise UserError(f"{name}={value} must {allowed} ({why}).")


def check_fixed(args: Any, fixed: Iterable[tuple[str, Any, str]]) -> None:
    """(name, value, why): options of the parent classes that must keep this value."""
    for name, value, why in fixed:
        if getattr(args, name, value) != value:
            raise UserError(f"{name}={getattr(args, name)!r} is not supported: {why}; remove it.")


def check_used(args: Any, uses: Iterable[tuple[str, bool, str]]) -> None:
    """(name, is it used, what it belongs to): an option that would be ignored must have its default."""
    for name, is_used, owner in uses:
        value = getattr(args, name)
        if not is_used and value != type(args).__dataclass_fields__[name].default:
            raise UserError(f"{name}: {value} would be ignored: it belongs to {owner}; remove it.")


# Options of transformers that it takes unchecked: (name, low, high, why). A number beyond these ends in an error of
# torch or numpy after the model is loaded, or trains nothing.
NUMBERS = (
    *((name, 0, MAX_SEED, "numpy takes no other") for name in ("seed", "data_seed")),
    *((name, 1, 10**6, "it counts rows") for name in ("per_device_train_batch_size", "per_device_eval_batch_size")),
    ("gradient_accumulation_steps", 1, 10**6, "it counts micro-batches"),
    ("num_train_epochs", 1e-6, 1e6, "set max_steps for a part of an epoch"),
    ("max_steps", -1, 10**12, "-1 counts epochs"),
    ("learning_rate", 0, math.inf, "1e-5 to 1e-3 is usual"),
    ("warmup_steps", 0, 1e12, "below 1 it is a share"),
    ("weight_decay", 0, 1e6, "0.01 to 0.1 is usual"),
    ("adam_beta1", 0, 1 - 1e-9, "0.9 is usual"),
    ("adam_beta2", 0, 1 - 1e-9, "0.95 to 0.999 is usual"),
    ("adam_epsilon", 0, 1e6, "1e-8 is usual"),
    ("max_grad_norm", 0, math.inf, "0 clips nothing"),
    *(
        (name, 0, 1e12, "it counts steps; below 1 it is a share")
        for name in ("logging_steps", "save_steps", "eval_steps")
    ),
    ("eval_delay", 0, 1e12, "it counts steps or epochs"),
    ("save_total_limit", 0, 10**9, "it counts checkpoints"),
    *((name, 1, 10**9, "it counts steps") for name in ("eval_accumulation_steps", "torch_empty_cache_steps")),
    ("dataloader_num_workers", 0, 1024, "each is a process"),
    ("dataloader_prefetch_factor", 1, 1024, "it counts batches"),
    ("dataset_num_proc", 1, 1024, "each is a process"),
    ("ddp_timeout", 1, 10**8, "it counts seconds"),
    ("ddp_bucket_cap_mb", 1, 10**6, "it counts MB"),
    ("local_rank", -1, 10**6, "the launcher sets it"),
)


def check_numbers(args: Any) -> None:
    """Raises UserError for a number of transformers' own options that is out of range."""
    check_ranges(args, NUMBERS)


def check_stream(args: Any) -> None:
    """Training options that go with a stream of rows, which has no known end and no index."""
    if args.max_steps <= 0:
        raise UserError("A stream has no known end, so streaming: true needs max_steps; set it.")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise UserError(f"{name}: epoch: a stream has no epochs; set {name}: steps.")
    if args.train_sampling_strategy != "random":
        raise UserError(
            f"train_sampling_strategy: {args.train_sampling_strategy} needs all rows, and streaming: true reads one "
            "after the other, in the order of the files or shuffled with shuffle_buffer; remove it."
        )
    if args.dataloader_num_workers > 1:
        raise UserError(
            f"dataloader_num_workers: {args.dataloader_num_workers} would read the stream as many times; set 1 or 0."
        )


def check_counts_steps(given: Mapping[str, Any]) -> None:
    """The keys of a recipe with streaming: true."""
    if given.get("num_train_epochs") is not None:
        raise UserError("num_train_epochs: streaming: true counts steps, because a stream has no epochs; remove it.")


def check_streamed_data(data: Any) -> None:
    """`streaming` and `shuffle_buffer` of the data arguments of a recipe."""
    check_at_least(data, {"shuffle_buffer": 0})
    check_used(data, (("shuffle_buffer", data.streaming, "streaming: true"),))
    if data.streaming and data.validation_rows:
        raise UserError(
            "validation_rows are drawn from all rows, which streaming: true does not know; set validation_data."
        )
    counts_rows = not data.streaming or data.validation_data is not None
    check_used(data, (("max_rows", counts_rows, "data that are not streamed"),))


def check_validation(data: Any) -> None:
    """`validation_data` and `validation_rows` of the data arguments of a recipe."""
    check_at_least(data, {"validation_rows": 0, "max_rows": 1, "max_row_bytes": 1})
    if data.validation_data is not None and data.validation_rows:
        raise UserError("Set validation_data or validation_rows, not both.")
