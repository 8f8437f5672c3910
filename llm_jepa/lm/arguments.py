"""The training arguments of `family: lm`: the keys of TRL and transformers, and those of `keys.JEPAKeys`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedConfig
from trl import SFTConfig

from ..core.checks import check_dispatch, check_precision
from ..core.errors import UserError
from ..core.values import check_numbers
from .keys import JEPAKeys


@dataclass
class LLMJEPAConfig(JEPAKeys, SFTConfig):
    """`trl.SFTConfig` plus the JEPA term. `jepa_weight=0` is plain SFT."""

    def __post_init__(self) -> None:
        check_numbers(self)
        # TRL turns bf16 on by default, which a machine without a GPU refuses.
        on_cpu = self.use_cpu or not torch.cuda.is_available()
        if on_cpu and not self.fp16 and self.bf16 is None:
            self.bf16 = False
        check_precision(self)
        # TRL still sets the old name, which transformers warns of.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.report_to is None:
            self.report_to = "none"
        super().__post_init__()
        self.check()
        check_dispatch(self)


def check_objective(
    args: LLMJEPAConfig, config: PreTrainedConfig, train: Dataset, *, sharded: bool, opaque: bool
) -> None:
    """Raises UserError for what can be refused only once the model (its text `config`), data and ranks are known.

    sharded: FSDP or DeepSpeed. opaque: DeepSpeed or FSDP 1, which keep weights of their own behind those of the model.
    """
    if not 1 <= abs(args.readout_layer) <= config.num_hidden_layers:
        raise UserError(
            f"readout_layer={args.readout_layer} does not exist: the model has layers 1 to "
            f"{config.num_hidden_layers} (-1 is the last)."
        )
    check_pairs(args)
    check_targets(args, train)
    if args.regularizer is not None:
        _check_regularizer(args, config, sharded=sharded)
    if args.target_encoder == "ema" and opaque:
        raise UserError(
            "target_encoder: ema cannot follow weights that DeepSpeed or FSDP version 1 holds; use --launch fsdp2 or "
            "ddp."
        )
    if args.target_encoder == "base" and sharded:
        raise UserError("target_encoder: base embeds its targets before the model is sharded; use --launch ddp.")


def check_pairs(args: LLMJEPAConfig) -> None:
    """Raises UserError if a batch has too few pairs for the objective or the regularizer.

    Not checked by the configuration, because the process that starts the ranks does not know their number.
    """
    pairs = pairs_compared(args)
    if not args.uses_views:
        return
    if args.objective == "info_nce" and pairs < 2:
        raise UserError(
            "objective: info_nce needs other pairs in the batch as negatives; set per_device_train_batch_size to 2 "
            "or more, negatives: optimizer_step, or objective: cosine."
        )
    if args.regularizer is not None and pairs < (8 if args.regularizer == "sigreg" else 2):
        raise UserError(
            f"regularizer: {args.regularizer} cannot estimate a distribution from {pairs} pair(s) per micro-batch; "
            "raise per_device_train_batch_size."
        )


def pairs_compared(args: LLMJEPAConfig) -> int:
    """How many pairs of the training rows meet in one loss."""
    pairs = args.per_device_train_batch_size * args.world_size
    return pairs * args.gradient_accumulation_steps if args.negatives == "optimizer_step" else pairs


def check_targets(args: LLMJEPAConfig, train: Dataset) -> None:
    """Raises UserError if the training rows have too few different targets for the batches of InfoNCE."""
    if not args.uses_views or args.objective != "info_nce":
        return
    pairs = pairs_compared(args)
    contexts, targets = "context_key", "target_key"
    if args.direction == "reverse":
        contexts, targets = targets, contexts
    if len(train) > 1 and len(set(train[contexts])) == 1:
        raise UserError(
            "objective: info_nce has no negatives, because every training row has the same "
            f"{'completion' if args.direction == 'reverse' else 'prompt'}, to which all targets are right answers; use "
            "objective: cosine with a regularizer."
        )
    distinct = len(set(train[targets]))
    # At least two; a few equal rows of a small file are positives of each other.
    if distinct < max(2, min(pairs, len(train) // 2)):
        smaller = ", or smaller batches" if distinct > 1 else ""
        raise UserError(
            f"objective: info_nce needs different targets as negatives, and the training rows have {distinct} "
            f"for batches of {pairs}; use objective: cosine with a regularizer{smaller}."
        )


def _check_regularizer(args: LLMJEPAConfig, config: PreTrainedConfig, *, sharded: bool) -> None:
    pairs = pairs_compared(args)
    if sharded:
        raise UserError(f"regularizer: {args.regularizer} has no sharded projector; use --launch ddp.")
    if not args.projector_dim and pairs < config.hidden_size:
        raise UserError(
            f"regularizer: {args.regularizer} without a projector would judge {config.hidden_size} dimensions "
            f"by {pairs} pairs; set projector_dim: 128, or a batch of {config.hidden_size} pairs."
        )
