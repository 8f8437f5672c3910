"""Checks that the arguments and trainers of all families share. Each raises UserError and returns nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.utils import logging

from .diagnostics import SPACE_FIGURES
from .errors import UserError, one_line

logger = logging.get_logger(__name__)

# optim_args: the first are false if they are anything but a word for true, the second true whatever they are.
SWITCHES = ("nesterov", "centered", "use_kahan_summation", "bf16_stochastic_round")
UNREAD = ("could not convert", "invalid literal", "invalid truth value")  # of float, int and transformers
ALWAYS_TRUE = ("decouple_lr", "kahan_sum")
SPEED = ("runtime", "samples_per_second", "steps_per_second")  # figures of every evaluation, and not of the model


def check_batches(
    args: TrainingArguments, rows: int | None, validation_rows: int, *, compares_rows: bool, step: int
) -> None:
    """What the numbers of rows mean for batches. Warns of a last batch that has a single row, and of repeated rows.

    Args:
        rows, validation_rows: of the data sets; 0 validation rows if nothing is evaluated. No training rows of an
            endless stream, whose batches are all full.
        compares_rows: the loss compares the rows of a batch with each other.
        step: the rows of all ranks that are compared with each other in training.

    Raises UserError if drop_last leaves no batch, or if evaluation compares a row with nothing.
    """
    batch = args.per_device_train_batch_size * args.world_size
    if rows is None:
        rows = batch * step  # divides by both
    if args.dataloader_drop_last and rows < batch:
        raise UserError(
            f"dataloader_drop_last: true leaves no batch: {rows} training rows are fewer than the {batch} of one "
            "batch; lower per_device_train_batch_size."
        )
    repeated = -rows % batch
    if args.world_size > 1 and repeated and not args.dataloader_drop_last and args.process_index == 0:
        logger.warning(
            f"{repeated} row(s) are trained twice in each epoch: {rows} rows do not divide by the {batch} of "
            f"{args.world_size} processes, and Accelerate fills the last batches up. dataloader_drop_last: true leaves "
            "the last rows of an epoch out instead."
        )
    if not compares_rows:
        return
    alone = "which the loss compares with others of its batch"
    if validation_rows > 1 and args.per_device_eval_batch_size * args.world_size == 1:
        raise UserError(
            f"per_device_eval_batch_size: 1 evaluates each row alone, {alone}, so that eval_loss would say nothing; "
            "set 2 or more."
        )
    # With several ranks, Accelerate fills the last batches up.
    if args.world_size == 1 and rows % step == 1 and not args.dataloader_drop_last and args.process_index == 0:
        logger.warning(
            f"The last step of an epoch has a single row ({rows} rows, {step} at a time), {alone}: its JEPA loss is 0. "
            "Set dataloader_drop_last: true, or another batch size."
        )


def check_best_metric(args: TrainingArguments, figures: Iterable[str]) -> None:
    """Raises UserError if no evaluation gives metric_for_best_model.

    figures: the names that the trainer's `figures` gives. The geometry is added if enough pairs are measured.
    """
    if args.metric_for_best_model is None:
        return
    has_space = getattr(args, "diagnostics_pairs", 0) >= 2
    names = [f"eval_{name}" for name in (*figures, *(SPACE_FIGURES if has_space else ()))]
    name = _with_prefix(args.metric_for_best_model)
    if name in names or name in (f"eval_{speed}" for speed in SPEED):
        return
    if name.removeprefix("eval_") in SPACE_FIGURES:
        raise UserError(f"metric_for_best_model: {name} is not measured; set diagnostics_pairs: 2 or more, e.g. 512.")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(names)}."
    raise UserError(f"metric_for_best_model: no evaluation of this run gives {args.metric_for_best_model[:80]!r}{hint}")


def check_best_is_measured(args: TrainingArguments, space: Mapping[str, float], prefix: str) -> None:
    """Raises UserError if metric_for_best_model is a figure of the geometry that these validation rows do not have.

    space: the figures of the geometry before the first step. prefix: of the evaluations that measure it.
    """
    name = _with_prefix(args.metric_for_best_model or "").removeprefix(f"{prefix}_")
    if name in SPACE_FIGURES and name not in space:
        raise UserError(
            f"metric_for_best_model: the validation rows give no {name}, because they have too few pairs, or too few "
            "new ones; add validation rows, or choose eval_loss."
        )


def _with_prefix(name: str) -> str:
    """The name that transformers looks up."""
    return name if name.startswith("eval_") else f"eval_{name}"


def check_packages(args: TrainingArguments) -> None:
    """Raises UserError if `optim` or `report_to` needs a package that is not installed, and for wrong `optim_args`."""
    check_optim_args(args)
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError, NotImplementedError) as error:
        if "pass a `model`" not in str(error) and "pass a model" not in str(error):  # its package is there
            raise UserError(f"optim: {getattr(args.optim, 'value', args.optim)}: {one_line(error)}") from error
    for integration in args.report_to:
        try:
            for callback in get_reporting_integration_callbacks([integration]):
                callback()
        except (ImportError, ValueError, RuntimeError) as error:
            raise UserError(f"report_to: {integration}: {one_line(error)}") from error


class _Read(dict[str, str]):
    """optim_args that remember which of them an optimizer of transformers reads."""

    def __init__(self, *items: Any) -> None:
        super().__init__(*items)
        self.names: list[str] = []  # in order; the last one is at fault if a value cannot be read

    def _note(self, name: str) -> str:
        self.names.append(name)
        return name

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self._note(str(name)))

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(self._note(name))

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(self._note(name), default)

    def pop(self, name: str, default: Any = None) -> Any:
        return super().get(self._note(name), default)


def check_optim_args(args: TrainingArguments) -> None:
    """Raises UserError for optim_args that transformers cannot read, or that it leaves out silently."""
    if not args.optim_args:
        return
    given = _Read(_split_optim_args(args.optim_args))
    read = _names_read(args, given)
    if read is None:
        return
    optim = getattr(args.optim, "value", args.optim)
    # Trainer sets the decay of each group of weights by the key of the recipe.
    used = [name for name in dict.fromkeys(read) if name != "weight_decay"]
    for name, value in given.items():
        if name not in used:
            takes = f"takes {', '.join(used)}" if used else "takes none of them"
            raise UserError(
                f"optim_args: {name} would be ignored: optim: {optim} {takes}. Remove it; adam_beta1, adam_beta2, "
                "adam_epsilon and weight_decay are keys of the recipe."
            )
        if name in SWITCHES and value.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise UserError(f"optim_args: {name}={value} must be true or false.")
        if name in ALWAYS_TRUE and value.lower() != "true":
            raise UserError(f"optim_args: transformers takes {name}={value} for true; remove it.")


def _split_optim_args(text: str) -> dict[str, str]:
    """As transformers splits them. Raises UserError for what is not NAME=VALUE, and for a name that is there twice."""
    options: dict[str, str] = {}
    for part in text.replace(" ", "").split(","):
        name, equals, value = part.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or not equals or not re.fullmatch(r"[\w.+-]+", value):
            raise UserError(f"optim_args: {part[:40]!r} is not NAME=VALUE; for example momentum=0.9,nesterov=true.")
        if name in options:
            raise UserError(f"optim_args: {name} is there twice.")
        if value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
            raise UserError(f"optim_args: {name}={value} is not a finite number.")
        options[name] = value
    return options


def _names_read(args: TrainingArguments, given: _Read) -> list[str] | None:
    """The names that an optimizer reads, or None if its package is missing. Raises UserError for a wrong value."""
    context = OptimizerContext(
        args=args, model=None, optimizer_kwargs={"lr": args.learning_rate},
        adam_kwargs={"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}, optim_args=given,
    )  # fmt: skip
    try:
        kind, options = _OPTIMIZER_HANDLERS[args.optim](context)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and given.names:
            kind([torch.nn.Parameter(torch.zeros(1))], **options)  # looks at the values
    except ImportError:
        return None
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error, ValueError) and "mod" in str(error):  # a model is not there yet; all names have been read
            return given.names
        if not given.names:  # the package is missing
            return None
        is_unread = isinstance(error, AttributeError) or any(word in str(error) for word in UNREAD)
        name = given.names[-1]
        where = f"{name}={dict(given.items()).get(name)}: " if is_unread else ""
        raise UserError(f"optim_args: {where}{one_line(error, 200)}.") from error
    return given.names


def check_library_options(args: TrainingArguments) -> None:
    """Raises UserError for options that transformers passes on unchecked and torch refuses later, in its own words."""
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs"):
        value = getattr(args, name)
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{name}: expected a mapping, got {value!r}; write {{name: value}}.")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UserError("dataloader_persistent_workers: there are no workers; set dataloader_num_workers: 1 or more.")
    if args.torch_compile:  # these import the compiler, a second
        _check_choice("torch_compile_mode", args.torch_compile_mode, torch._inductor.list_mode_options())
        _check_choice("torch_compile_backend", args.torch_compile_backend, torch._dynamo.list_backends(exclude_tags=()))
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, args.lr_scheduler_kwargs)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"lr_scheduler_type, lr_scheduler_kwargs: {one_line(error, 300)}") from error


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value is not None and value not in choices:
        raise UserError(f"{name}: {value!r} is unknown; choose one of {', '.join(choices)}.")


def check_precision(args: TrainingArguments) -> None:
    """bf16 and fp16 need a GPU, unless the run says that it is on the CPU."""
    if (args.bf16 or args.fp16) and not args.use_cpu and not torch.cuda.is_available():
        raise UserError("bf16 and fp16 need a GPU and none is visible; add --use_cpu true or --bf16 false.")


def check_dispatch(args: TrainingArguments) -> None:
    if args.accelerator_config.dispatch_batches:
        raise UserError(
            "accelerator_config.dispatch_batches cuts a batch by its rows, and a pair is not a row; remove it."
        )


def check_stream_batches(args: TrainingArguments) -> None:
    """Raises UserError for an option with which the rows of a stream would not be those that a resume skips."""
    if args.accelerator_config.split_batches:
        raise UserError("accelerator_config.split_batches: a stream counts its rows by whole batches; remove it.")


def check_refused(kwargs: Mapping[str, Any], names: Iterable[str]) -> None:
    """Arguments of `Trainer` that would replace the loss or the batches of ours."""
    for name in names:
        if kwargs.get(name) is not None:
            raise UserError(f"{name} is not supported: this trainer brings its own loss and batches; remove it.")


def check_one_device(args: TrainingArguments) -> None:
    """One process with several GPUs would become `nn.DataParallel`, which splits a batch by its rows."""
    if args.n_gpu > 1:
        raise UserError(
            f"One process sees {args.n_gpu} GPUs and would wrap the model in nn.DataParallel; use --launch ddp, or "
            "show it one with CUDA_VISIBLE_DEVICES=0."
        )
