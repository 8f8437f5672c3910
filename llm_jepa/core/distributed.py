"""Exact gradients over ranks, and a random number that all ranks share.

A loss that compares every pair with every other (InfoNCE) is written like this. Its value and gradient are then those
of one process with all rows, however the rows are spread over the ranks:

    z, own = gather_with_grad(predicted)              # [b_r, D] -> [B, D], B = sum of b_r
    s, _ = gather_with_grad(target)
    value = info_nce(z, s)                            # [B]: every rank computes all of it,
    loss = value[own].sum() / B * world_size          # but sums its own rows only

*Own rows only*, because the backward of the gather adds up what all ranks hand back: a rank that summed all of `value`
would count every row world_size times. *The global count*, because ranks of different size must not weigh the same.
*Times world_size* where the wrapper averages the gradients of the weights over ranks (DDP, FSDP2) instead of adding
them up. Every rank must run the backward pass, even one without rows, because it is a collective call.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def gather_with_grad(x: Tensor) -> tuple[Tensor, slice]:
    """Gather `x` [b_r, ...] of all ranks -> [sum of b_r, ...] in the order of ranks, and the slice of our own rows.

    b_r may differ from rank to rank and may be 0; the rest of the shape, and the dtype, may not. Integers, as keys are,
    gather without gradient. The gradient of a gathered row is the sum over all ranks, added in float32 at least. If
    `x` needs a gradient on any rank, every rank takes part in the backward pass, or the others would wait for it.
    Without a process group, or with one process, this returns `x` itself.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x, slice(0, len(x))
    wants_grad = x.requires_grad and torch.is_grad_enabled()
    headers = _all_gather(torch.tensor([len(x), wants_grad], device=x.device))
    sizes, wanted = torch.stack(headers, dim=1).tolist()
    if any(wanted) and not wants_grad:
        x = x.detach().requires_grad_()
    start = sum(sizes[: dist.get_rank()])
    own = slice(start, start + len(x))
    return _Gather.apply(x, sizes, own), own


def _all_gather(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return parts


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], own: slice) -> Tensor:
        ctx.own = own
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        return torch.cat([part[:size] for part, size in zip(_all_gather(padded), sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.to(wide, copy=True, memory_format=torch.contiguous_format)  # a copy: all_reduce writes into it
        dist.all_reduce(total)
        return total[ctx.own].to(grad.dtype), None, None


def reshard(model: torch.nn.Module) -> None:
    """FSDP2: drop the gathered weights, so that the next pass gathers what the shards then hold.

    Accelerate and transformers leave the final norm, the head and the root (with them a tied embedding) gathered after
    a forward pass, for its backward. A pass without backward leaves them so: they are what `parameters()` then returns,
    and what the next pass computes with, whatever was written into the shards. Does nothing without FSDP2.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_on_cpu(args: Any) -> None:
    """Let Accelerate's FSDP2 shard over CPU processes, too. Call it before the trainer makes its `Accelerator`.

    Accelerate 1.15 honours FSDP for processes with GPUs only; with gloo it would silently use DDP. Nothing else in its
    FSDP2 depends on the device. args: `TrainingArguments`.
    """
    state = PartialState()
    if wants_fsdp(args) and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # `AcceleratorState` turns it into FSDP


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, or all of a tensor that is sharded; then every rank must call this."""
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered


def wants_fsdp(args: Any) -> bool:
    """Whether the run or its launcher asks for Accelerate's FSDP. args: `TrainingArguments`."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shared_coin(seed: int, step: int) -> float:
    """A uniform number in [0, 1) that depends only on (seed, step).

    So it is the same on every rank, platform and resumed run, and no generator moves. Ranks with different coins would
    wait for each other's collective call forever.
    """
    digest = hashlib.sha256(f"llm_jepa coin {int(seed)} {int(step)}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
