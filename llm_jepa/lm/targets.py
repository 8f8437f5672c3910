"""Targets that do not move with the gradient: a moving average of the model, and the model at the start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.distributed import gather_with_grad
from ..core.errors import UserError
from ..core.losses import at_least_float32
from .batching import embed_targets, evaluating, rows_apart


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
    """Embeddings [N, D] of N token sequences in evaluation mode, on the CPU; the ranks share the work.

    In float32, or in float64 if the model is.
    """
    device = next(model.parameters()).device
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if len(sequences) < world:
        raise UserError(f"{len(sequences)} distinct targets are fewer than {world} ranks; use fewer ranks.")
    mine = by_length[torch.distributed.get_rank() if world > 1 else 0 :: world]
    parts = []
    with evaluating(model):
        for start in range(0, len(mine), batch_size):
            batch = rows_apart([sequences[i] for i in mine[start : start + batch_size]], pad_token_id, readout)
            batch = {key: value.to(device) for key, value in batch.items()}
            parts.append(at_least_float32(embed_targets(model, batch, layer=layer)))
    found, _ = gather_with_grad(torch.cat(parts))
    order, _ = gather_with_grad(torch.tensor(mine, device=device))
    table = torch.empty_like(found, device="cpu")
    table[order.cpu()] = found.cpu()
    return table


def save_state(path: Path, state: dict[str, Tensor]) -> None:
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, path)


def load_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"The checkpoint has no {path.name}, which holds its target encoder or projector.")
    return load_file(path)
