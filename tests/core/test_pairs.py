"""The loss of pairs: one process against closed forms, two ranks against one process."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor

from llm_jepa.core.losses import info_nce, jepa_distance, random_slices, sigreg, vicreg
from llm_jepa.core.pairs import SLICES, compare_pairs
from tests.ranks import on_ranks


def two_sides(rows: int = 6, dim: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    z, s = torch.randn(2, rows, dim, generator=draw, dtype=torch.float64)
    return z, s, torch.tensor([4, 9, 4, 1, 9, 4])[:rows]


# Pairs 0 and 3 have one context and different targets; so have 1 and 5, by the text of a view alone.
CONTEXTS = torch.tensor([70, 71, 72, 70, 74, 75]), torch.tensor([50, 51, 52, 53, 54, 51])
TEXTS = torch.tensor([20, 21, 22, 23, 24, 25])


def test_two_orthogonal_pairs_and_two_that_share_a_target():
    """z = s = I, t = 0.5: ln(1 + e^-2). With one key for both, either is right: 0. Pairs by themselves: 1 - cos."""
    eye, keys = torch.eye(2), torch.tensor([3, 8])
    loss = compare_pairs(eye, eye, keys, objective="info_nce", temperature=0.5)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-2))] * 2, abs=1e-6)
    assert compare_pairs(eye, eye, keys * 0, objective="info_nce", temperature=0.5).abs().max() < 1e-6
    z = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert compare_pairs(z, eye, keys, objective="cosine").tolist() == pytest.approx([0.0, 0.2])
    assert compare_pairs(z, eye, keys, objective="l2").tolist() == pytest.approx([0.0, math.sqrt(18)])


@pytest.mark.parametrize("objective", ["info_nce", "cosine", "mse"])
@pytest.mark.parametrize("regularizer", [None, "vicreg", "sigreg"])
def test_one_process_is_the_distance_plus_the_mean_of_the_sides(objective, regularizer):
    z, s, key = two_sides()
    if objective == "info_nce":
        distance = info_nce(z, s, temperature=0.3, target_key=(key, TEXTS), context_key=CONTEXTS)
    else:
        distance = jepa_distance(z, s, kind=objective)
    slices = random_slices(5, SLICES, seed=7, step=3, device="cpu")
    term = {None: lambda x: x.new_zeros(()), "vicreg": vicreg, "sigreg": lambda x: sigreg(x, slices)}[regularizer]
    options = {"objective": objective, "temperature": 0.3, "regularizer": regularizer, "seed": 7, "step": 3}
    options |= {"target_key": (key, TEXTS), "context_key": CONTEXTS}
    both = compare_pairs(z, s, regularizer_weight=0.4, **options)
    torch.testing.assert_close(both, distance + 0.4 * (term(z) + term(s)) / 2)
    torch.testing.assert_close(compare_pairs(z, s, both_sides=False, **options), distance + term(z))
    if regularizer is not None:
        assert (term(z) - term(s)).abs() > 1e-3, "the sides weigh the same: which is taken is not tested"
    if regularizer == "sigreg":
        assert not torch.equal(both, compare_pairs(z, s, regularizer_weight=0.4, **{**options, "step": 4}))


def test_a_single_pair_has_no_spread_to_regularize():
    z, s, key = two_sides(1)
    assert compare_pairs(z, s, key, objective="cosine", regularizer="vicreg").equal(jepa_distance(z, s))


def test_two_pairs_have_a_spread_and_what_is_left_out_is_what_the_signature_says():
    z, s, key = two_sides(2)
    plain = {"objective": "info_nce", "regularizer": "sigreg"}
    value = compare_pairs(z, s, key, **plain)
    assert torch.equal(value, compare_pairs(z, s, key, temperature=0.07, seed=0, step=0, regularizer_weight=1, **plain))
    slices = random_slices(5, SLICES, seed=0, step=0, device="cpu")
    expected = info_nce(z, s, temperature=0.07, target_key=key) + (sigreg(z, slices) + sigreg(s, slices)) / 2
    torch.testing.assert_close(value, expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(value, compare_pairs(z, s, key, objective="info_nce"))


@pytest.mark.parametrize("regularizer", ["sigreg", "vicreg"])
def test_everything_is_computed_where_the_embeddings_are(regularizer, monkeypatch):
    """The device `meta` holds no values: a tensor on the CPU beside its tensors is an error, as it is on a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know this device
    z = torch.zeros(3, 5, device="meta")
    loss = compare_pairs(z, z, z[:, 0].long(), objective="info_nce", regularizer=regularizer)
    assert loss.device == z.device and loss.shape == (3,)


def test_the_gradient_of_the_temperature_is_that_of_finite_differences():
    z, s, key = two_sides()

    def loss(log_temperature: Tensor) -> Tensor:
        return compare_pairs(z, s, key, objective="info_nce", temperature=log_temperature.exp()).mean()

    at = torch.tensor(math.log(0.3), dtype=torch.float64, requires_grad=True)
    loss(at).backward()
    with torch.no_grad():
        slope = (loss(at + 1e-5) - loss(at - 1e-5)) / 2e-5
    assert at.grad.item() == pytest.approx(slope.item(), rel=1e-7) and abs(slope) > 0.1


SPLITS = [(4, 2), (1, 5), (3, 3)]  # pairs of the two ranks; equal keys lie on different ones


CASES = [("info_nce", None), ("info_nce", "vicreg"), ("cosine", "sigreg"), ("cosine", None), ("mse", "vicreg")]


class Sides(torch.nn.Module):
    """Two linear maps and a temperature, which is part of the output as it is in `VLJEPAModel`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.z, self.s = torch.nn.Linear(5, 4).double(), torch.nn.Linear(5, 4).double()
        self.log_temperature = torch.nn.Parameter(torch.tensor(math.log(0.3), dtype=torch.float64))

    def forward(self, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.z(z), self.s(s), self.log_temperature.exp()


def sides_and_loss(module, rows: slice, case: tuple[str, str | None]) -> Tensor:
    z, s, key = (side[rows] for side in two_sides())
    contexts = tuple(key[rows] for key in CONTEXTS)
    z, s, temperature = module(z, s)
    objective, regularizer = case
    return compare_pairs(
        z, s, (key, TEXTS[rows]), context_key=contexts, objective=objective, temperature=temperature,
        regularizer=regularizer, regularizer_weight=0.3,
    )  # fmt: skip


def found_by(rank: int) -> dict[str, dict[str, Tensor | None]]:
    found = {}
    for split in SPLITS:
        rows = slice(0, split[0]) if rank == 0 else slice(split[0], 6)
        for case in CASES:
            module = torch.nn.parallel.DistributedDataParallel(Sides(), find_unused_parameters=True)
            value = sides_and_loss(module, rows, case)
            (value.sum() / 6 * 2).backward()  # as compute_loss does
            gradients = {name: weight.grad for name, weight in module.module.named_parameters()}
            found[f"{split} {case}"] = {"value": value.detach(), **gradients}
    return found


def test_two_ranks_of_uneven_pairs_are_one_process():
    """Loss and gradients, that of the temperature among them; equal texts on different ranks are positives."""
    ranks = on_ranks(2, found_by)
    z, s, key = two_sides()
    by_targets, by_both = (info_nce(z, s, target_key=key, context_key=of) for of in (None, CONTEXTS))
    assert (by_targets - by_both).max() > 1e-2, "the contexts do not matter: proves nothing of them"
    for case in CASES:
        whole = Sides()
        value = sides_and_loss(whole, slice(0, 6), case)
        value.mean().backward()
        for split in SPLITS:
            here = [found[f"{split} {case}"] for found in ranks]
            torch.testing.assert_close(torch.cat([found["value"] for found in here]), value.detach())
            for name, weight in whole.named_parameters():
                for found in here:
                    if weight.grad is None:  # the temperature of cosine
                        assert found[name] is None or found[name] == 0
                    else:
                        torch.testing.assert_close(found[name], weight.grad, msg=lambda m, n=name: f"{n}: {m}")
