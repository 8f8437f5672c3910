"""What a VL-JEPA step compares, which weights learn from it, and how the frozen parts are computed once.

Shapes: B pairs, D shared dimension, T frames, N visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.pairs import compare_pairs
from .arguments import VLJEPATrainingArguments
from .data import Clip, ClipDataset
from .modeling import VLJEPAModel

KEYS = ("target_key", "context_key")  # of a batch: they are for the loss, not for the model


def pair_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    args: VLJEPATrainingArguments,
    *,
    targets_learn: bool,
    step: int,
) -> Tensor:
    """[B]: the loss of each pair of this rank, among the pairs of all ranks.

    Args:
        model: the (wrapped) `VLJEPAModel`.
        batch: from `data.ClipCollator`.
        targets_learn: whether anything on the target side is trained; regularizers look at that side only then.
        step: seeds the random slices of `regularizer: sigreg`.
    """
    output = model(**{name: value for name, value in batch.items() if name not in KEYS})
    return compare_pairs(
        output.predicted,  # [B, D]
        output.target,  # [B, D]
        batch["target_key"],  # [B]
        context_key=batch["context_key"],  # [B]
        objective=args.objective,
        temperature=output.temperature if args.learn_temperature else output.temperature.detach(),
        regularizer=args.regularizer,
        regularizer_weight=args.regularizer_weight,
        both_sides=targets_learn,
        seed=args.seed,
        step=step,
    )


def targets_learn(model: VLJEPAModel) -> bool:
    """Whether any weight of the y_encoder or of its projection is trained."""
    parts = (model.y_encoder, model.target_projection)
    return any(weight.requires_grad for part in parts for weight in part.parameters())


def check_clips(clips: ClipDataset, args: VLJEPATrainingArguments) -> None:
    """Raises UserError for options that these clips cannot be trained with."""
    if args.x_encoder_trainable_layers and clips.features is not None:
        raise UserError("The clips bring their features, so x_encoder_trainable_layers would train nothing; set 0.")
    check_pairs(clips.clips, args)


def check_pairs(clips: Sequence[Clip], args: VLJEPATrainingArguments) -> int:
    """The most pairs that a batch of all ranks can have. Raises UserError if they are too few for the objective."""
    each = min(args.pairs_per_clip, max(len(clip.pairs) for clip in clips))
    pairs = args.per_device_train_batch_size * each * args.world_size
    if args.objective == "info_nce" and min(pairs, len(clips) * each) < 2:
        raise UserError("objective: info_nce needs other pairs as negatives; raise per_device_train_batch_size to 2.")
    least = 8 if args.regularizer == "sigreg" else 2
    if args.regularizer is not None and pairs < least:
        raise UserError(
            f"regularizer: {args.regularizer} cannot estimate a distribution from {pairs} pair(s), it needs {least}; "
            "raise per_device_train_batch_size or pairs_per_clip."
        )
    return pairs


def choose_trained_parts(model: VLJEPAModel, args: VLJEPATrainingArguments) -> None:
    """Set `requires_grad` of every weight as `args` says. Raises UserError for more blocks than there are."""
    model.requires_grad_(True)
    model.log_temperature.requires_grad_(args.objective == "info_nce" and args.learn_temperature)
    model.y_encoder.requires_grad_(args.y_encoder_lr_factor > 0)
    if args.x_encoder_trainable_layers >= 0:
        model.x_encoder.requires_grad_(False)
        for weight in last_blocks(model.x_encoder, args.x_encoder_trainable_layers):
            weight.requires_grad_(True)


def last_blocks(x_encoder: nn.Module, count: int) -> list[nn.Parameter]:
    """The weights of the last `count` blocks, and of what follows them (the final norm). Raises UserError."""
    if not count:
        return []
    lists = {name: module for name, module in x_encoder.named_modules() if isinstance(module, nn.ModuleList)}
    # A block may hold a list of its own layers; only the outer lists are lists of blocks. The heaviest is the encoder.
    outer = {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    name, blocks = max(outer.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()), default=("", []))
    if count > len(blocks):
        raise UserError(
            f"x_encoder_trainable_layers={count}: the x_encoder has {len(blocks)} blocks; choose fewer, or -1 for all."
        )
    names = [key for key, _ in x_encoder.named_parameters()]
    prefix = f"{name}.{len(blocks) - count}."
    first = next(i for i, key in enumerate(names) if key.startswith(prefix))
    return [weight for _, weight in list(x_encoder.named_parameters())[first:]]


def slow_y_encoder(optimizer: torch.optim.Optimizer, model: VLJEPAModel, factor: float) -> None:
    """Give the weights of the y_encoder `factor` times the learning rate of the others (paper: section 3.1, 0.05).

    The projection from y_encoder to the shared space keeps the full rate: the paper says "all text encoder parameters".
    """
    slow = {id(weight) for weight in model.y_encoder.parameters()}
    for group in list(optimizer.param_groups):
        chosen = [weight for weight in group["params"] if id(weight) in slow]
        if chosen and len(chosen) < len(group["params"]):
            group["params"] = [weight for weight in group["params"] if id(weight) not in slow]
            options = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**options, "params": chosen, "lr": group["lr"] * factor})
