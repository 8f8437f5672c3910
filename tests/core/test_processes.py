"""Claim: two processes take the steps of one, however the rows are spread over ranks and micro-batches.

For DDP and for Accelerate's FSDP2, whose parameters must be shards. The weights of every step are compared, in float64.
The default suite runs `llm-jepa train` on ranks that are forked; a slow test starts them through `--launch`.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import llm_jepa
from eval.faults.states import add_torn_files, watch
from llm_jepa.cli import main
from llm_jepa.core import checkpoint
from llm_jepa.core.trainer import JEPATrainer
from tests.core.test_stopping import TRAINERS, at, folder, outcome, send_at  # noqa: F401
from tests.launched import launch
from tests.lm.test_ranks import FLOAT64, RECIPE
from tests.ranks import on_ranks
from tests.vl.test_commands import RECIPE as VL_RECIPE
from tests.vl.test_commands import SGD

BOUND = 1e-7  # absolute, of every weight after every step
STEPS = 3
GRID = ((8, 1), (4, 2), (2, 4), (1, 8))  # batch, accumulation
LM = {**RECIPE, **FLOAT64, "max_steps": STEPS, "eval_strategy": "no", "validation_rows": 0, "diagnostics_pairs": 0}
# A loss of each pair by itself: with InfoNCE, a micro-batch is the pool of negatives.
VL = {
    **VL_RECIPE, **SGD, "max_steps": STEPS, "objective": "cosine", "diagnostics_pairs": 0, "pairs_per_clip": 1,
    "x_encoder_trainable_layers": -1, "eval_strategy": "no",
}  # fmt: skip
DDP, FSDP = "ddp", "fsdp2"


class Recorder(TrainerCallback):
    """Writes the weights of every step, and in what form the ranks hold them."""

    def __init__(self, steps: str) -> None:
        self.steps = Path(steps)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        held = {name: value.detach() for name, value in model.state_dict().items()}
        sharded = sum(isinstance(value, DTensor) for value in held.values())
        whole = {n: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for n, v in held.items()}
        if args.process_index == 0:
            self.steps.mkdir(exist_ok=True)
            save_file({n.removeprefix("module."): v for n, v in whole.items()}, self.steps / f"{state.global_step}")
            (self.steps / "held.json").write_text(json.dumps([sharded, len(held), args.world_size]))


def record_steps(steps: str) -> None:
    """Let every trainer of this process compute in float64 and write its weights after every step."""
    begin = JEPATrainer.__init__

    def recorded(self, *, args, **kwargs):
        kwargs["model"].double()
        begin(self, args=args, **kwargs)
        self.add_callback(Recorder(steps))

    JEPATrainer.__init__ = recorded


def train_as_rank(rank: int, kind: str, words: list[str], steps: str | None, said: str = os.devnull) -> int:
    """What `--launch` does in a rank.

    kind: DDP or FSDP. steps: a folder for the weights of every step. said: a file for the output of all ranks.
    """
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if kind == FSDP:
        config = yaml.safe_load((Path(llm_jepa.__file__).parent / "accelerate_configs" / "fsdp2.yaml").read_text())
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ.update({key.upper(): str(value) for key, value in config["fsdp_config"].items()})
    if steps is not None:
        record_steps(steps)
    code = main(words)
    gc.collect()  # the wrapped model must not outlive the process group
    return code


def train_and_stop_as_rank(
    rank: int, kind: str, words: list[str], said: str, family: str, step: int | None = None
) -> int:
    """The last rank alone gets SIGTERM in this step."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == dist.get_world_size() - 1 and step is not None:
            send_at(patch, TRAINERS[family], "compute_loss", at(step))
        return train_as_rank(rank, kind, words, None, said)


def spread(family: str, batch: int, accumulation: int, data: Path, output: Path) -> list[str]:
    words = ["train", str(data / f"{family}.yaml"), "--per_device_train_batch_size", str(batch)]
    return [*words, "--gradient_accumulation_steps", str(accumulation), "--output_dir", str(output)]


def weights(steps: Path) -> list[dict[str, torch.Tensor]]:
    """After every step."""
    return [load_file(steps / str(step)) for step in range(1, STEPS + 1)]


def assert_same_at_every_step(actual: Path, expected: Path) -> None:
    steps = list(zip(weights(actual), weights(expected), strict=True))
    for ours, theirs in steps:
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(ours[name].reshape(tensor.shape), tensor, rtol=0, atol=BOUND)
    (first, _), *_, (last, _) = steps
    assert max((last[name] - first[name]).abs().max() for name in first) > 1e-3, "nothing was trained: proves nothing"


def assert_held(steps: Path, kind: str, world: int) -> None:
    """FSDP2 holds every weight as a shard. Without GPUs, Accelerate would silently use DDP."""
    sharded, tensors, ranks = json.loads((steps / "held.json").read_text())
    assert tensors > 20 and (sharded, ranks) == (tensors if kind == FSDP else 0, world)


@pytest.fixture(scope="module")
def data(folder) -> Path:  # noqa: F811
    """Recipes of both families; NAME-ROWS holds the steps of one process with so many rows in a batch."""
    path = folder / "processes"
    path.mkdir()
    for name, values, rows in (("lm", LM, "rows.jsonl"), ("vl", VL, "clips.jsonl")):
        recipe = {**values, "train_data": str(folder / rows), "output_dir": str(path / name)}
        (path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return path


def one_process(family: str, rows: int, data: Path) -> Path:
    """The steps of one process whose batch is the whole step."""
    steps = data / f"{family}-{rows}"
    if not steps.exists():
        assert on_ranks(
            1, train_as_rank, DDP, spread(family, rows, 1, data, data / f"run-{steps.name}"), str(steps)
        ) == [0]
    return steps


# -- how rows are spread over ranks and micro-batches -----------------------------------------------------------------

CASES = [(family, 2, kind, cell) for family in TRAINERS for kind in (DDP, FSDP) for cell in GRID]
CASES += [(family, 1, DDP, cell) for family in TRAINERS for cell in GRID[1:]]
# Seconds each: the default suite takes every kind, every cell and both families once.
SAMPLE = [("lm", 2, DDP, (8, 1)), ("lm", 2, FSDP, (2, 4)), ("vl", 2, FSDP, (4, 2)), ("vl", 1, DDP, (1, 8))]


@pytest.mark.parametrize(
    ("family", "world", "kind", "cell"),
    [pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.slow) for case in CASES],
)
def test_the_weights_of_every_step_are_those_of_one_batch(family, world, kind, cell, data, tmp_path):
    batch, accumulation = cell
    expected = one_process(family, batch * accumulation * world, data)
    words, steps = spread(family, batch, accumulation, data, tmp_path / "run"), tmp_path / "steps"
    assert on_ranks(world, train_as_rank, kind, words, str(steps)) == [0] * world
    assert_held(steps, kind, world)
    assert_same_at_every_step(steps, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lm", "vl"])
def test_through_the_launcher(family, data, tmp_path):
    """`--launch fsdp2` with gloo: DTensors in every rank, and the weights of one process."""
    words = [*spread(family, 4, 2, data, tmp_path / "run"), "--launch", "fsdp2", "--num_processes", "2"]
    code = f"from tests.core.test_processes import record_steps\nrecord_steps({str(tmp_path / 'steps')!r})"
    done = launch(tmp_path, words, code)
    assert done.returncode == 0 and done.stdout.count("Saved to") == 1, done.stderr[-2000:]
    assert_held(tmp_path / "steps", FSDP, 2)
    assert_same_at_every_step(tmp_path / "steps", one_process(family, 16, data))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DDP, FSDP])
def test_a_temperature_that_is_learnt(kind, data, tmp_path):
    """A scalar, which FSDP2 does not shard: it is one value of a vector there, and a scalar in the saved model."""
    learnt = ["--objective", "info_nce", "--learn_temperature", "true"]
    for world, batch in ((1, 16), (2, 8)):
        words = [*spread("vl", batch, 1, data, tmp_path / f"run-{world}"), *learnt]
        ranks = on_ranks(world, train_as_rank, kind if world == 2 else DDP, words, str(tmp_path / f"{world}"))
        assert ranks == [0] * world
    one, two = ([step["log_temperature"].reshape(()) for step in weights(tmp_path / f"{world}")] for world in (1, 2))
    assert len(set(map(float, one))) == STEPS
    torch.testing.assert_close(torch.stack(two), torch.stack(one), rtol=0, atol=BOUND)
    assert load_file(tmp_path / "run-2" / "model.safetensors")["log_temperature"].shape == ()


# -- rows that do not divide ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DDP, FSDP])
@pytest.mark.parametrize("family", ["lm", "vl"])
def test_uneven_last_batches(family, kind, data, tmp_path):
    """48 rows, 14 a step: three steps end an epoch. Without its last 6 rows, the fourth is that of one process, too.
    With them, Accelerate repeats 8 rows, and says so."""
    (rows,) = yaml.safe_load((data / f"{family}.yaml").read_text())["train_data"].splitlines()
    assert len(Path(rows).read_text().splitlines()) == 48
    more = ["--max_steps", "4", "--dataloader_drop_last"]
    for name, world, batch, drop in (("one", 1, 14, "true"), ("two", 2, 7, "true"), ("filled", 2, 7, "false")):
        words = [*spread(family, batch, 1, data, tmp_path / f"run-{name}"), *more, drop]
        said = tmp_path / f"{name}.txt"
        ranks = on_ranks(world, train_as_rank, kind if world == 2 else DDP, words, str(tmp_path / name), str(said))
        assert ranks == [0] * world, said.read_text()
        assert ("8 row(s) are trained twice in each epoch" in said.read_text()) == (name == "filled")
    assert_same_at_every_step(tmp_path / "two", tmp_path / "one")
    one, two, filled = (load_file(tmp_path / name / "4") for name in ("one", "two", "filled"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name].reshape(tensor.shape), tensor, rtol=0, atol=BOUND)
    assert max((filled[name].reshape(tensor.shape) - tensor).abs().max() for name, tensor in one.items()) > 1e-4


# -- saves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [pytest.param("lm"), pytest.param("vl", marks=pytest.mark.slow)])
def test_a_sharded_run_is_stopped_and_goes_on_bit_for_bit(family, folder, tmp_path):  # noqa: F811
    """Dropout, a moving average, accumulation and the best weights: everything that a resumed run must bring back.
    Its checkpoints are for the same number of processes, sharded in the same way."""
    said = str(tmp_path / "said.txt")
    words = ["train", str(folder / f"{family}.yaml"), "--per_device_train_batch_size", "2", "--output_dir"]
    whole, run = tmp_path / "whole", [*words, str(tmp_path / "run")]
    assert on_ranks(2, train_and_stop_as_rank, FSDP, [*words, str(whole)], said, family) == [0, 0]
    assert on_ranks(2, train_and_stop_as_rank, FSDP, run, said, family, 4) == [75, 75]
    assert checkpoint.newest_complete(tmp_path / "run").name == "checkpoint-5"
    run += ["--resume_from_checkpoint", "true"]
    for kind, world, changed in ((DDP, 2, "sharding: 'fsdp 2' -> 'none'"), (FSDP, 1, "num_processes: 2 -> 1")):
        refusal = tmp_path / f"{kind}.txt"
        assert on_ranks(world, train_and_stop_as_rank, kind, run, str(refusal), family) == [2] * world
        said_there = refusal.read_text()  # a line of one rank may begin inside that of another
        assert said_there.count("llm-jepa: error: ") == said_there.count(changed) == world, said_there
    assert on_ranks(2, train_and_stop_as_rank, FSDP, run, said, family) == [0, 0]
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("family", [pytest.param("lm"), pytest.param("vl", marks=pytest.mark.slow)])
def test_another_number_of_processes_is_refused(family, before, after, folder, tmp_path):  # noqa: F811
    """They would take other rows in other steps. A refusal changes nothing: the run goes on with the old number."""
    run, said = tmp_path / "run", tmp_path / "said.txt"
    words = ["train", str(folder / f"{family}.yaml"), "--output_dir", str(run), "--per_device_train_batch_size"]
    assert on_ranks(before, train_and_stop_as_rank, DDP, [*words, "2"], str(said), family, 1) == [75] * before
    held = contents(run)
    words[2:2] = ["--resume_from_checkpoint", "true"]
    for batch in (2, 2 * before // after):  # the latter takes as many rows in a step
        said.unlink()
        assert on_ranks(after, train_and_stop_as_rank, DDP, [*words, str(batch)], str(said), family) == [2] * after
        lines = [line for line in said.read_text().splitlines() if line.startswith("llm-jepa:")]
        assert len(lines) == after, said.read_text()
        assert all(f"num_processes: {before} -> {after}" in line for line in lines), lines
        assert contents(run) == held
    assert on_ranks(before, train_and_stop_as_rank, DDP, [*words, "2"], str(said), family) == [0] * before


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def train_as_first_of_its_machine(rank: int, words: list[str], said: str) -> int:
    os.environ["LOCAL_RANK"] = "0"
    return train_as_rank(rank, DDP, words, None, said)


def test_machines_that_share_files_do_not_both_write_them(folder, tmp_path):  # noqa: F811
    """Each machine would publish the same stage, and the one that ends first would remove it."""
    said = tmp_path / "said.txt"
    words = ["train", str(folder / "lm.yaml"), "--output_dir", str(tmp_path / "run"), "--save_on_each_node", "true"]
    assert on_ranks(2, train_as_first_of_its_machine, words, str(said)) == [2, 2]
    assert said.read_text().count("several machines share output_dir") == 2 and "Traceback" not in said.read_text()
    assert not list((tmp_path / "run").iterdir())


# -- kills ------------------------------------------------------------------------------------------------------------


def train_and_copy_as_rank(rank: int, kind: str, words: list[str], run: str, states: str) -> int:
    """Rank 0 copies the folder of the run before each of its own file events: what a kill of both would leave."""
    if rank == 0:
        watch(Path(run), Path(states))
    return train_as_rank(rank, kind, words, None)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "points"), [(DDP, 12), (FSDP, 12)])
def test_two_ranks_that_are_killed_in_a_save(kind, points, folder, tmp_path):  # noqa: F811
    """The first save, later ones and the final one; the same command ends with the run that was not killed."""
    run, states, whole = tmp_path / "run", tmp_path / "states", tmp_path / "whole"
    states.mkdir()
    words = ["train", str(folder / "lm.yaml"), "--per_device_train_batch_size", "2", "--output_dir", str(run)]
    words += ["--max_steps", "6"]
    assert on_ranks(2, train_and_copy_as_rank, kind, words, str(run), str(states)) == [0, 0]
    run.rename(whole)
    add_torn_files(states)
    names = sorted(path.name for path in states.iterdir() if (path / "run.json").exists())
    assert len(names) > 50
    saved = set()
    for name in names[len(names) // (2 * points) :: len(names) // points]:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(states / name, run)
        newest = checkpoint.newest_sealed(run)
        saved.add(newest and newest.name)
        ranks = on_ranks(2, train_as_rank, kind, [*words, "--resume_from_checkpoint", "true"], None)
        assert ranks == [0, 0], name
        assert outcome(run) == outcome(whole), name
        assert checkpoint.fault_of_model(run) is None and not list(run.rglob(".stage-*")), name
    assert len(saved) > 1, "all of them were killed in the same save"
