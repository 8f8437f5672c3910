"""Claims about the sums between two logs: named, exact, and added without waiting for the device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm_jepa.core.sums import NamedSums


class Copies(TorchDispatchMode):
    """Records the copies between devices or types."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "copy" in str(function):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_sums_add_up_by_name_and_start_again():
    sums = NamedSums(("loss", "pairs", "tokens"), "cpu")
    sums.add(loss=torch.tensor(0.5, dtype=torch.float64), pairs=3)
    sums.add(pairs=torch.tensor(2), tokens=7)
    assert sums.values.tolist() == [0.5, 5, 7]
    sums.reset("pairs")
    assert sums.values.tolist() == [0.5, 0, 7]
    sums.reset()
    assert sums.values.tolist() == [0, 0, 0] and sums.are_finite()
    with pytest.raises(KeyError, match="token"):
        sums.add(token=1)


def test_adding_copies_nothing_to_the_device():
    """Such a copy waits until the device has computed all it was given. (The device "meta" stands for a GPU.)"""
    sums = NamedSums(("loss", "pairs", "tokens"), "meta")
    loss = torch.ones((), device="meta")
    with Copies() as copies:
        sums.add(loss=loss, pairs=3)
    assert copies.found == []
