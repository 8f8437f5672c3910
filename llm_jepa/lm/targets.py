"""Targets of the start model (`target_encoder: base`), computed once before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.diagnostics import evaluating
from ..core.distributed import gather_with_grad
from ..core.errors import UserError
from ..core.losses import at_least_float32
from .arguments import LLMJEPAConfig
from .batching import rows_apart
from .reading import embed_targets


def base_targets(
    model: PreTrainedModel, args: LLMJEPAConfig, train_dataset: Any, eval_dataset: Any, pad_token_id: int
) -> tuple[Any, Any, Tensor]:
    """Both data sets with a column `target_table_rows`, and the table [N, D] of embeddings that it numbers.

    Equal targets share one row of the table. `eval_dataset` may be None or a dict of data sets.
    """
    column = "contexts" if args.direction == "reverse" else "targets"
    numbers: dict[tuple[int, ...], int] = {}
    train_dataset = _number_targets(train_dataset, column, numbers)
    eval_dataset = _number_targets(eval_dataset, column, numbers)
    table = target_table(
        model,
        list(numbers),
        pad_token_id=pad_token_id,
        batch_size=args.per_device_eval_batch_size,
        readout=args.readout,
        layer=args.readout_layer,
    )
    return train_dataset, eval_dataset, table


def _number_targets(dataset: Any, column: str, numbers: dict[tuple[int, ...], int]) -> Any:
    """Add `target_table_rows`; a sequence that is new in `numbers` gets the next number."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _number_targets(part, column, numbers) for name, part in dataset.items()}
    rows = []
    for views in dataset[column]:
        rows.append([numbers.setdefault(tuple(ids), len(numbers)) for ids in views])
    return dataset.add_column("target_table_rows", rows)


@torch.no_grad()
def target_table(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int,
    readout: str = "last",
    layer: int = -1,
) -> Tensor:
    """Embed N token sequences in evaluation mode: [N, D] on the CPU, float32 or float64. The ranks share the work."""
    device = next(model.parameters()).device
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if len(sequences) < world:
        raise UserError(f"{len(sequences)} distinct targets are fewer than {world} ranks; use fewer ranks.")
    rank = torch.distributed.get_rank() if world > 1 else 0
    mine = by_length[rank::world]  # every world-th, so that the ranks get equal lengths
    parts = []
    with evaluating(model):
        for start in range(0, len(mine), batch_size):
            batch = rows_apart([sequences[i] for i in mine[start : start + batch_size]], pad_token_id, readout)
            batch = {key: value.to(device) for key, value in batch.items()}
            parts.append(at_least_float32(embed_targets(model, batch, layer=layer)))
    embedded, _ = gather_with_grad(torch.cat(parts))  # [N, D] in the order of ranks
    order, _ = gather_with_grad(torch.tensor(mine, device=device))
    table = torch.empty_like(embedded, device="cpu")
    table[order.cpu()] = embedded.cpu()
    return table
