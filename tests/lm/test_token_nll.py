"""The log-likelihood in blocks equals `F.cross_entropy` of the whole, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from llm_jepa.lm import token_nll as module
from llm_jepa.lm.token_nll import token_nll


@pytest.mark.parametrize("rows_in_block", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [[], [2, 10]])
def test_blocks_equal_cross_entropy(monkeypatch, rows_in_block, dtype, masked):
    """[7, 11] logits with different weights per row, so that a row in the wrong place changes the gradient."""
    monkeypatch.setitem(module.BLOCK, "cpu", rows_in_block * 11)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 11, generator=generator) * 4).to(dtype)
    labels = torch.tensor([0, 1, 3, 9, 4, 5, 0])
    weights = torch.tensor([1.0, 0.5, 2.0, -1.0, 0.25, 3.0, 0.125])

    ours = logits.clone().requires_grad_()
    before = ours.detach().clone()
    nll = token_nll(ours, labels, torch.tensor(masked, dtype=torch.long))
    (nll * weights.to(nll)).sum().backward()

    theirs = logits.clone().requires_grad_()
    wide = theirs.to(torch.promote_types(dtype, torch.float32))
    expected = F.cross_entropy(
        wide.index_fill(-1, torch.tensor(masked, dtype=torch.long), -torch.inf), labels, reduction="none"
    )
    (expected * weights.to(expected)).sum().backward()

    assert nll.dtype == expected.dtype and ours.grad.dtype == dtype
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 0.1 and not ours.grad[:, masked].any()
    assert torch.equal(ours, before)  # the model's logits stay as they are


def test_large_logits_do_not_overflow():
    """exp(1000) is infinite; nll of [1000, 0] is 0 for the first token and 1000 for the second."""
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]], requires_grad=True)
    nll = token_nll(logits, torch.tensor([0, 1]), torch.tensor([], dtype=torch.long))
    nll.sum().backward()
    assert nll.tolist() == [0.0, 1000.0]
    assert logits.grad.tolist() == [[0.0, 0.0], [1.0, -1.0]]


def test_no_labels_at_all():
    logits = torch.zeros(0, 5, requires_grad=True)
    nll = token_nll(logits, torch.zeros(0, dtype=torch.long), torch.tensor([1]))
    nll.sum().backward()
    assert nll.shape == (0,) and logits.grad.shape == (0, 5)
