"""Claim: InfoNCE over ranks of any size is InfoNCE in one process, in value and in gradient; and one coin for all.

Each number of ranks is started once, and the tests below look at what the ranks found.
"""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llm_jepa.core.distributed import gather_with_grad, shard_on_cpu, shared_coin, wants_fsdp, whole
from llm_jepa.core.losses import info_nce
from tests.ranks import on_ranks

PAIRS, FEATURES, DIM = 6, 7, 5
# rows of each rank; the 6 pairs in the order of ranks
SPLITS = {2: [(4, 2), (0, 6), (3, 3)], 3: [(3, 1, 2), (2, 0, 4), (0, 0, 6)]}
KEYS = torch.tensor([4, 9, 4, 1, 9, 4])  # equal targets, also across ranks, and none is a row number
WHOLE = torch.arange(12.0).view(6, 2)
STEPS = 20_000


def encoder() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(FEATURES, DIM).double()


def features() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    both = torch.randn(2, PAIRS, FEATURES, generator=draw, dtype=torch.float64)
    return both[0], both[1, [0, 1, 0, 3, 1, 0]]  # the same key has the same features


def rows_of(split: tuple[int, ...], rank: int) -> slice:
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def weight_of(rank: int, rows: int) -> Tensor:
    """[rows, 3], exact in bfloat16; but 256 + 1 is 256 there."""
    return 256 + 2.0 * torch.arange(rows * 3).view(rows, 3) if rank == 0 else torch.ones(rows, 3)


def found_by(rank: int, world: int) -> dict[str, object]:
    found: dict[str, object] = {}
    contexts, targets = features()
    for split in SPLITS[world]:
        mine = rows_of(split, rank)
        model = torch.nn.parallel.DistributedDataParallel(encoder())
        embedded = model(torch.cat([contexts[mine], targets[mine]]))
        z, own = gather_with_grad(embedded[: split[rank]])
        s, _ = gather_with_grad(embedded[split[rank] :])
        key, key_own = gather_with_grad(KEYS[mine])
        value = info_nce(z, s, target_key=key)
        (value[own].sum() / len(z) * world).backward()
        found[f"{split}"] = {
            "own": [own.start, own.stop, key_own.start, key_own.stop],
            "value": value.detach(),
            "key": key,
            "weight": model.module.weight.grad,
            "bias": model.module.bias.grad,
        }

    # Rows that are not contiguous, and on rank 0 a gradient that is not; nothing is averaged here.
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.full((3, 2 - rank % 2), float(rank), dtype=dtype).T.requires_grad_()
        gathered, _ = gather_with_grad(x)
        handed: list[Tensor] = []
        gathered.register_hook(handed.append)
        weight = weight_of(rank, len(gathered)).to(dtype)
        ((gathered.T * weight.T.contiguous()) if rank == 0 else gathered * weight).sum().backward()
        found[f"{dtype}"] = {"gathered": gathered.detach(), "grad": x.grad, "handed": handed[0]}

    # Rank 0 has a leaf, the others bring rows that need no gradient: all must still meet in the backward.
    leaf = torch.ones(2, 3, requires_grad=True) if rank == 0 else torch.ones(rank - 1, 3)
    gathered, own = gather_with_grad(leaf)
    (gathered[own].sum() + (rank + 1) * gathered[:1].sum()).backward()
    found["one_leaf"] = {"grad": leaf.grad, "needs": leaf.requires_grad}

    with torch.no_grad():
        silent, _ = gather_with_grad(torch.full((rank + 1, 2), float(rank), requires_grad=True))
    plain, _ = gather_with_grad(torch.full((rank + 1, 2), float(rank)))
    found["no_grad"] = {"silent": silent, "plain": plain, "needs": silent.requires_grad or plain.requires_grad}
    empty = torch.zeros(0, 3, requires_grad=True)
    nothing, own = gather_with_grad(empty)
    nothing.sum().backward()
    found["nothing"] = {"rows": nothing, "own": [own.start, own.stop], "grad": empty.grad}
    shards = distribute_tensor(WHOLE, init_device_mesh("cpu", (world,)), [Shard(0)])
    found["whole"] = {"parts": whole(shards), "plain": whole(WHOLE[rank]), "rows": len(shards.to_local())}
    found["coin"] = [shared_coin(3, step) for step in range(100)]
    return found


@pytest.fixture(scope="module", params=sorted(SPLITS))
def ranks(request) -> list[dict]:
    return on_ranks(request.param, found_by, request.param)


def test_info_nce_over_ranks_is_info_nce_in_one_process(ranks):
    model, (contexts, targets) = encoder(), features()
    value = info_nce(model(contexts), model(targets), target_key=KEYS)
    value.mean().backward()
    without_keys = info_nce(model(contexts), model(targets)).detach()
    assert (value - without_keys).abs().max() > 0.1, "the keys change nothing: that they are gathered is not tested"
    for split in SPLITS[len(ranks)]:
        for rank, found in enumerate(ranks):
            here = found[f"{split}"]
            rows = rows_of(split, rank)
            assert here["own"] == [rows.start, rows.stop] * 2
            assert here["key"].equal(KEYS)
            for name, expected in (("value", value.detach()), ("weight", model.weight.grad), ("bias", model.bias.grad)):
                torch.testing.assert_close(
                    here[name], expected, rtol=1e-12, atol=1e-13, msg=lambda m, n=name, s=split: f"{s} {n}: {m}"
                )


def test_what_only_wrong_gradients_would_pass():
    """The comparison above can tell: a backward that keeps a rank's own gradient is far off, at the same value."""
    model, (contexts, targets) = encoder(), features()
    info_nce(model(contexts), model(targets), target_key=KEYS).mean().backward()
    exact = model.weight.grad.clone()
    model.zero_grad()
    for rows in (slice(0, 3), slice(3, 6)):
        z, s = model(contexts), model(targets)
        kept = torch.zeros(PAIRS, 1, dtype=torch.bool)
        kept[rows] = True
        z, s = torch.where(kept, z, z.detach()), torch.where(kept, s, s.detach())
        (info_nce(z, s, target_key=KEYS)[rows].sum() / PAIRS).backward()
    assert (model.weight.grad - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_added_in_float32_and_come_back_in_their_type(ranks, dtype):
    """And what autograd handed to the backward is not written into."""
    world = len(ranks)
    rows = [[float(rank)] * 3 for rank in range(world) for _ in range(2 - rank % 2)]
    total = sum(weight_of(rank, len(rows)) for rank in range(world)).to(dtype)
    for rank, found in enumerate(ranks):
        here = found[f"{dtype}"]
        assert here["gathered"].dtype == here["grad"].dtype == dtype
        assert here["gathered"].equal(torch.tensor(rows).to(dtype))
        assert here["grad"].equal(total[rows.index([float(rank)] * 3) :][: 2 - rank % 2])
        assert here["handed"].equal(weight_of(rank, len(rows)).to(dtype))


def test_a_rank_that_needs_no_gradient_still_takes_part_in_the_backward(ranks):
    world = len(ranks)
    first = 1 + sum(rank + 1 for rank in range(world))
    assert ranks[0]["one_leaf"]["grad"].tolist() == [[first] * 3, [1] * 3]
    assert all(found["one_leaf"] == {"grad": None, "needs": False} for found in ranks[1:])


def test_without_gradient_nothing_but_the_rows_comes_back(ranks):
    rows = [[float(rank)] * 2 for rank in range(len(ranks)) for _ in range(rank + 1)]
    for found in ranks:
        assert found["no_grad"]["silent"].tolist() == found["no_grad"]["plain"].tolist() == rows
        assert found["no_grad"]["needs"] is False


def test_no_rows_anywhere(ranks):
    for found in ranks:
        assert found["nothing"]["rows"].shape == found["nothing"]["grad"].shape == (0, 3)
        assert found["nothing"]["own"] == [0, 0]


def test_without_a_process_group_it_is_the_tensor_itself():
    x = torch.randn(3, 2, requires_grad=True)
    gathered, own = gather_with_grad(x)
    assert gathered is x and own == slice(0, 3)


# -- shards ---------------------------------------------------------------------------------------------------------


def test_whole_is_all_of_a_sharded_tensor_and_any_other_tensor_itself(ranks):
    for rank, found in enumerate(ranks):
        assert found["whole"]["rows"] == 6 // len(ranks), "sharded, or the test shows nothing"
        assert type(found["whole"]["parts"]) is Tensor and torch.equal(found["whole"]["parts"], WHOLE)
        assert torch.equal(found["whole"]["plain"], WHOLE[rank])


@pytest.mark.parametrize("fsdp", [[], ["full_shard"]])
@pytest.mark.parametrize("launcher", [None, "true", "True", "false", ""])
@pytest.mark.parametrize("processes", list(DistributedType))
def test_fsdp_shards_over_cpu_processes_if_the_arguments_or_the_launcher_ask_for_it(
    processes, launcher, fsdp, monkeypatch
):
    if launcher is None:
        monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", launcher)
    state = PartialState()
    monkeypatch.setattr(state, "distributed_type", processes)
    args = SimpleNamespace(fsdp=fsdp)
    asked = bool(fsdp) or launcher in ("true", "True")
    assert wants_fsdp(args) is asked
    shard_on_cpu(args)
    changes = asked and processes == DistributedType.MULTI_CPU
    assert state.distributed_type == (DistributedType.MULTI_GPU if changes else processes)


# -- the coin -------------------------------------------------------------------------------------------------------


def test_every_rank_and_this_process_throw_the_same(ranks):
    assert [found["coin"] for found in ranks] == [[shared_coin(3, step) for step in range(100)]] * len(ranks)


def test_the_coin_never_changes():
    """Pinned: another hash or another reading of it would end a resumed run differently."""
    pinned = {(0, 0): 0.146248278444, (0, 1): 0.58426418648, (1, 0): 0.122270950262, (42, 1000): 0.264792480868}
    assert {at: round(shared_coin(*at), 12) for at in pinned} == pinned


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_the_coin_is_uniform_and_independent_over_steps(seed):
    """5 standard deviations each; fixed seeds, so nothing here is luck."""
    draws = [shared_coin(seed, step) for step in range(STEPS)]
    assert min(draws) >= 0 and max(draws) < 1
    for p in (0.01, 0.1, 0.5, 0.75, 0.99):
        heads = sum(draw < p for draw in draws)
        assert abs(heads - p * STEPS) < 5 * math.sqrt(STEPS * p * (1 - p)), p
    for lag in (1, 2, 8):
        assert abs(correlation(draws[:-lag], draws[lag:])) < 5 / math.sqrt(STEPS - lag), lag


@pytest.mark.parametrize("other", [1, 2, 1000])
def test_different_seeds_throw_independently(other):
    """Also shifted by the difference of the seeds, which a sum of seed and step would make equal."""
    draws = [shared_coin(0, step) for step in range(STEPS)]
    others = [shared_coin(other, step) for step in range(STEPS)]
    assert abs(correlation(draws, others)) < 5 / math.sqrt(STEPS)
    assert abs(correlation(draws[other:], others[:-other])) < 5 / math.sqrt(STEPS - other)


def correlation(a: list[float], b: list[float]) -> float:
    return float(torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1])


def test_throwing_moves_no_generator():
    numpy = pytest.importorskip("numpy")
    before = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].tolist(), numpy.random.get_state()[2]
    shared_coin(0, 0)
    after = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].tolist(), numpy.random.get_state()[2]
    assert before[0] == after[0] and before[1].equal(after[1]) and before[2:] == after[2:]
