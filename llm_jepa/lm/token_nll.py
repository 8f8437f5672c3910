"""Negative log-likelihoods of tokens over a large vocabulary, a block of rows at a time.

`F.cross_entropy` on float32 copies holds four matrices of [labels, V] besides the logits: a copy, its log-softmax, and
the gradients of both. With V = 49,152 and 500 labels each is 100 MB, and the first step that touches these pages waits
for them. Here a block stays in the cache; only the logits and their gradient are whole, in the dtype of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = {"cpu": 2**20, "other": 2**26}  # numbers in a block: 4 MB in a CPU's cache; few, large kernels on a GPU


def token_nll(logits: Tensor, labels: Tensor, masked_ids: Tensor) -> Tensor:
    """Logits [N, V] and labels [N] -> -log softmax(logits)[label] in nats, [N]; differentiable in `logits`, once.

    Args:
        logits: of any float dtype. The result is float32 (float64 for float64), and so is everything in between.
        masked_ids: [M] ids that no label has. They count as impossible, and get no gradient.
    """
    return _TokenNLL.apply(logits, labels, masked_ids)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, masked_ids: Tensor) -> Tensor:
        log_total = logits.new_empty(len(labels), dtype=_wide(logits))  # [N] log of the sum of exponentials
        nll = torch.empty_like(log_total)
        for rows in _blocks(logits):
            block = logits[rows].to(log_total.dtype, copy=True)
            block.index_fill_(-1, masked_ids, -torch.inf)
            log_total[rows] = block.logsumexp(-1)
            nll[rows] = log_total[rows] - block.gather(-1, labels[rows, None])[:, 0]
        ctx.save_for_backward(logits, labels, masked_ids, log_total)
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, nll_gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, masked_ids, log_total = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _blocks(logits):
            # d nll / d logits = softmax(logits) - one-hot(label)
            block = logits[rows].to(log_total.dtype, copy=True).sub_(log_total[rows, None]).exp_()
            block.index_fill_(-1, masked_ids, 0.0)
            block.scatter_add_(-1, labels[rows, None], block.new_full((len(block), 1), -1.0))
            gradient[rows] = block.mul_(nll_gradient[rows, None])
        return gradient, None, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _blocks(logits: Tensor) -> list[slice]:
    n, vocabulary = logits.shape
    size = max(1, BLOCK["cpu" if logits.device.type == "cpu" else "other"] // vocabulary)
    return [slice(start, start + size) for start in range(0, n, size)]
