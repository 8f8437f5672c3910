"""Moving averages of a model's weights, for targets that follow it slowly."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .distributed import reshard
from .losses import at_least_float32


class MovingAverage:
    """Exponential moving average of a model's trainable weights, in float32 (float64 if they are), sharded as they are.

    decay(t) = 1 - (1 - decay) * (cos(pi * t) + 1) / 2 with t = step / steps: from `decay` to 1 (BYOL,
    arXiv:2006.07733, section 3.2).
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        reshard(model)
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: at_least_float32(_local(p).detach()).clone() for name, p in self._weights.items()}

    def decay_at(self, progress: float) -> float:
        """The decay at `progress`, the finished part of the run, 0 to 1."""
        return 1 - (1 - self.decay) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """Move the average towards the weights. Call it once after each optimizer step."""
        weight = 1 - self.decay_at(progress)
        for name, average in self._average.items():
            average.lerp_(at_least_float32(_local(self._weights[name])), weight)

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model computes with the average inside the block. Not between a forward pass and its backward pass."""
        weights = {}
        reshard(self._model)
        try:
            for name, p in self._weights.items():
                if isinstance(p, DTensor):  # FSDP gathers from the storage that it got, so only the values change
                    weights[name] = _local(p).detach().clone()
                    _local(p).data.copy_(self._average[name])
                else:
                    weights[name] = p.data
                    p.data = self._average[name].to(p.dtype)
            yield
        finally:
            # Without this, the pass that learns would compute with the final norm and the head of the average.
            reshard(self._model)
            for name, data in weights.items():
                p = self._weights[name]
                if isinstance(p, DTensor):
                    _local(p).data.copy_(data)
                else:
                    p.data = data

    def state(self) -> dict[str, Tensor]:
        return {f"ema.{name}": average for name, average in self._average.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, average in self._average.items():
            average.copy_(state[f"ema.{name}"])


def _local(p: Tensor) -> Tensor:
    """The shard of this rank under FSDP2; otherwise the tensor itself."""
    return p.to_local() if isinstance(p, DTensor) else p
