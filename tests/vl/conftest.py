from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Every `train()` collects garbage, which among all that torch imports takes longer than the training."""
    gc.freeze()
    yield
    gc.unfreeze()
