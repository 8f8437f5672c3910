"""Named sums that a training run adds up between two logs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NamedSums:
    """Sums over micro-batches, kept as one float32 tensor on the device, so that ranks add them up in one reduction.

    Args:
        names: of the sums, all 0 at first.
        device: of this rank.

    Adding never waits for the device; only `over_ranks` does.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device | str) -> None:
        self.names = names
        self.values = torch.zeros(len(names), device=device)  # [names]

    def add(self, **amounts: Tensor | int) -> None:
        """Add a 0-d tensor or a count to each sum that is named. A KeyError says that a name does not exist."""
        row = []
        for name in self.names:
            amount = amounts.pop(name, 0)
            if not isinstance(amount, Tensor):
                # Filled in on the device. A copy from the CPU would wait until the device has caught up.
                amount = torch.full((), amount, dtype=self.values.dtype, device=self.values.device)
            row.append(amount.to(self.values))
        if amounts:
            raise KeyError(f"no sums are named {sorted(amounts)}; there are {self.names}")
        self.values += torch.stack(row)

    def over_ranks(self, accelerator: Any) -> dict[str, float]:
        """The sums of all ranks, by name. A collective call if there are several ranks."""
        values = self.values.clone()
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values, reduction="sum")
        return dict(zip(self.names, values.tolist(), strict=True))

    def reset(self, *names: str) -> None:
        """Set these sums to 0; without names, all of them."""
        for name in names or self.names:
            self.values[self.names.index(name)] = 0

    def are_finite(self) -> bool:
        return bool(self.values.isfinite().all())
