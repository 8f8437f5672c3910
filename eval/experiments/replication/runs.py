"""One run (a cell) and the plan's two series of runs: `select` on validation, `compare` on test."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llm_jepa import LLMJEPATrainer, UserError
from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.core.json_files import read_json
from llm_jepa.core.strict_yaml import dump_yaml
from llm_jepa.lm import add_view_columns, model_from, random_model, read_rows, tokenizer_from, train_tokenizer

from ...provenance import environment, weights_sha256
from ...tasks import nl_rx
from .. import small_runs
from ..small_runs import answer_of, derangement, side_by_side, with_targets_of, without_validation
from . import RESULTS

TRAIN = "synth_train.jsonl"

# The options that an arm adds to plain SFT, unless the plan has its own `arms`. Its weight comes from the plan. Two of
# them are ours: `equal_tokens_of` an arm gives it as many more steps as that arm's views would pay for, and
# `wrong_targets` gives each row the target of another one.
ARMS: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft_flops": {"equal_tokens_of": "info_nce"},
    "cosine": {"objective": "cosine"},
    "info_nce": {"objective": "info_nce"},
    "vicreg": {"objective": "mse", "regularizer": "vicreg"},
    "sigreg": {"objective": "mse", "regularizer": "sigreg"},
    "stp_paper": {"objective": "stp", "stp_formula": "paper", "num_predictor_tokens": 0},
    "stp_code": {"objective": "stp", "stp_formula": "code", "num_predictor_tokens": 0},
    "mismatched": {"objective": "info_nce", "wrong_targets": True},
}
WEIGHT_OF = {"mismatched": "info_nce"}


@dataclass(frozen=True)
class Setup:
    """What all runs of a plan share. The defaults are those of the plan of random weights.

    rows: so many training rows, drawn once (default: all). lines: of the test, the first in a random order (default:
    all). training: training arguments that take the place of those of `small_runs.RUN`. model: options of loading.
    """

    train: str = TRAIN
    rows: int | None = None
    validation: int = 512
    lines: int | None = None
    wordings: list[str] = field(default_factory=lambda: ["synth", "turk"], hash=False)
    max_new_tokens: int = small_runs.MAX_NEW_TOKENS
    training: Mapping[str, Any] = field(default_factory=dict, hash=False)
    model: Mapping[str, Any] = field(default_factory=dict, hash=False)
    arms: Mapping[str, dict[str, Any]] = field(default_factory=lambda: ARMS, hash=False)


def setup_of(plan: dict[str, Any]) -> Setup:
    """The shared settings of a plan; those that it leaves out are the defaults."""
    return Setup(**{item.name: plan[item.name] for item in fields(Setup) if item.name in plan})


@dataclass(frozen=True)
class Cell:
    """One run. `start` is a checkpoint, or "" for random weights drawn from the seed."""

    protocol: str
    arm: str
    seed: int
    learning_rate: float
    weight: float
    part: str
    steps: int
    start: str
    out: Path


@functools.cache
def _data(folder: Path, setup: Setup) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, validation rows), the same for every run. All lines of one regex are in the same part.

    There are `setup.validation` validation rows, or a few more.
    """
    rows = [dict(row) for row in read_rows(str(folder / setup.train))]
    train, validation = without_validation(rows, setup.validation)
    if setup.rows is not None:
        train = random.Random("training rows").sample(train, setup.rows)
    return train, validation


@functools.cache
def _tokenizer(folder: Path, setup: Setup, start: str) -> PreTrainedTokenizerBase:
    if start:
        tokenizer = tokenizer_from(start)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # like the published script and the trainer
        return tokenizer
    return train_tokenizer(_data(folder, setup)[0], small_runs.SHARED["tokenizer_vocab_size"])


@functools.cache
def _views(folder: Path, setup: Setup, start: str, protocol: str, context_view: str) -> Dataset:
    """Views of the training rows, the same for every run of one protocol."""
    add_views = functools.partial(
        add_view_columns,
        tokenizer=_tokenizer(folder, setup, start),
        label_protocol=protocol,
        context_view=context_view,
    )
    return Dataset.from_list([add_views(row, i) for i, row in enumerate(_data(folder, setup)[0])])


def _model(start: str, setup: Setup, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    if start:
        set_seed(seed)
        return model_from(start, dtype=torch.float32, **setup.model)
    return random_model(small_runs.SHARED["model_config"], tokenizer, seed=seed)


def run_cell(cell: Cell, data: Path, setup: Setup) -> str:
    """Train and judge one cell, unless its result file exists. Returns a line for the log."""
    settings = settings_of(cell, setup)
    if cell.out.exists():
        small_runs.refuse_other_settings(cell.out, settings)
    else:
        with tempfile.TemporaryDirectory() as scratch:  # no run saves anything
            write_json(cell.out, {**settings, **_train_and_judge(cell, data, setup, Path(scratch))})
    result = read_json(cell.out, is_finite=False)
    names = ("startswith", "exact", "equivalent", "stop_rate")
    metrics = result["metrics"][trained_wording(setup)]
    figures = "  ".join(f"{name} {100 * metrics[name]:5.1f}" for name in names)
    return f"{cell.out.stem:45s} {figures}  {result['cost']['tokens']:,} tokens, {result['seconds']:.0f} s"


def settings_of(cell: Cell, setup: Setup) -> dict[str, Any]:
    """What a result file says of its run. It names no folder of this machine."""
    settings = {name: value for name, value in asdict(cell).items() if name != "out"}
    if cell.start and Path(cell.start).is_dir():
        settings |= {"start": Path(cell.start).name, "start_sha256": weights_sha256(Path(cell.start))}
    usual = vars(Setup())
    changed = {name: value for name, value in vars(setup).items() if name != "arms" and value != usual[name]}
    if setup.arms != ARMS:  # equal, not the same: another process has a copy
        changed["options"] = dict(setup.arms[cell.arm])
    return {**settings, "setup": changed} if changed else settings


def trained_wording(setup: Setup) -> str:
    """The wording of the training rows: synth or turk."""
    return setup.train.partition("_")[0]


def _train_and_judge(cell: Cell, data: Path, setup: Setup, output_dir: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    started = time.perf_counter()
    options = dict(setup.arms[cell.arm])
    equal_to, is_wrong = options.pop("equal_tokens_of", None), options.pop("wrong_targets", False)
    rows = _views(data, setup, cell.start, cell.protocol, options.get("context_view", "prefix"))
    tokenizer = copy.deepcopy(_tokenizer(data, setup, cell.start))  # predictor tokens are added to the copy
    steps = cell.steps
    if equal_to is not None:
        with_views = {name: value for name, value in setup.arms[equal_to].items() if name != "wrong_targets"}
        view_rows = _views(data, setup, cell.start, cell.protocol, with_views.get("context_view", "prefix"))
        dear = small_runs.arguments(output_dir, 1, **{**setup.training, "jepa_weight": 0.1, **with_views})
        plain = small_runs.arguments(output_dir, 1, **{**setup.training, "jepa_weight": 0.0})
        tokens = small_runs.tokens_of(rows, plain, tokenizer)
        steps = round(steps * small_runs.tokens_of(view_rows, dear, tokenizer) / tokens)
    if is_wrong:
        partner = derangement(range(len(rows)), random.Random(f"mismatched {cell.seed}"))
        rows = with_targets_of(rows, [partner[i] for i in range(len(rows))])
    options = {
        **setup.training,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "jepa_weight": cell.weight,
        "label_protocol": cell.protocol,
        **options,
    }
    args = small_runs.arguments(output_dir, steps, **options)
    model = _model(cell.start, setup, tokenizer, cell.seed)
    trainer = LLMJEPATrainer(model, args, rows, processing_class=tokenizer)
    cost = small_runs.train(trainer)
    prompts, golds = _questions(data, setup, cell.part)
    judged = small_runs.judge(model, tokenizer, prompts, golds, setup.max_new_tokens)
    return {
        "lines": len(golds),
        "metrics": judged.metrics,
        "correct": judged.correct,
        **({"bits": dict(judged.bits)} if setup.arms != ARMS else {}),
        "cost": cost,
        "data_sha256": {path.name: file_sha256(path) for path in nl_rx.load(data)[2]},
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
    }


@functools.cache
def _questions(data: Path, setup: Setup, part: str) -> tuple[dict[str, list[list[dict[str, Any]]]], list[str]]:
    """(prompts by wording, golds) of "validation" (the wording of training alone) or "test"."""
    if part == "validation":
        rows = _data(data, setup)[1]
        return {trained_wording(setup): [row["messages"][:-1] for row in rows]}, [answer_of(row) for row in rows]
    items, _, _ = nl_rx.load(data)
    if setup.lines is not None:
        items = random.Random("test lines").sample(items, setup.lines)
    prompts = {"synth": [list(item.original) for item in items], "turk": [list(item.paraphrase) for item in items]}
    return {wording: prompts[wording] for wording in setup.wordings}, [item.answer for item in items]


def select(data: Path, plan: dict[str, Any], start: str, out: Path, jobs: int) -> None:
    """Select the learning rate by plain SFT, then the weight of every objective. Print the plan's block `settled`."""

    setup = setup_of(plan)
    protocol, metric = plan.get("selection_protocol", "completion"), plan.get("selection_metric", "startswith")

    def best(arm: str, options: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """The (learning rate, weight) with the highest mean of the metric on validation."""
        if len(options) == 1:
            return options[0]
        cells = {
            option: [
                _selection_cell(protocol, arm, option, seed, plan["steps"], start, out)
                for seed in plan["selection_seeds"]
            ]
            for option in options
        }
        flat = list(itertools.chain.from_iterable(cells.values()))
        for line in side_by_side(run_cell, flat, jobs, data, setup):
            print(line, flush=True)
        means = {
            option: statistics.mean(_on_validation(cell, trained_wording(setup), metric) for cell in group)
            for option, group in cells.items()
        }
        return max(means, key=lambda option: means[option])

    rate, _ = best("sft", [(rate, 0.0) for rate in plan["learning_rates"]])
    weights = {}
    for arm, values in plan["weights"].items():
        _, weights[arm] = best(arm, [(rate, weight) for weight in values])
    print("settled:\n" + dump_yaml({"learning_rate": rate, "weights": weights}))


def _selection_cell(
    protocol: str, arm: str, option: tuple[float, float], seed: int, steps: int, start: str, out: Path
) -> Cell:
    rate, weight = option
    path = out / "selection" / f"{arm}-{rate:g}-{weight:g}-seed{seed}.json"
    return Cell(protocol, arm, seed, rate, weight, "validation", steps, start, path)


def _on_validation(cell: Cell, wording: str, metric: str) -> float:
    share: float = read_json(cell.out, is_finite=False)["metrics"][wording][metric]
    return share


def compare(data: Path, plan: dict[str, Any], start: str, out: Path, jobs: int) -> None:
    """Run what the plan asks for, seed by seed: if you stop early, the finished seeds are whole."""
    for line in side_by_side(_run_of_set, planned_runs(plan, start, out), jobs, data):
        print(line, flush=True)


def planned_runs(plan: dict[str, Any], start: str, out: Path) -> list[tuple[Cell, Setup]]:
    """All arms of every protocol, seed by seed.

    An entry of `protocols` is named after its label protocol, or has `labels`; its `train`, `rows` and `steps` take the
    place of those of the plan. Raises UserError for a plan without settings.
    """
    rate, chosen = _settled(plan)
    setup = setup_of(plan)
    same_as = WEIGHT_OF if setup.arms == ARMS else {}
    weights = {arm: chosen.get(same_as.get(arm, arm), 0.0) for arm in setup.arms}
    protocols = plan["protocols"]
    seeds = sorted({seed for protocol in protocols.values() for seed in protocol["seeds"]})
    cells = []
    for seed, (name, protocol) in itertools.product(seeds, protocols.items()):
        if seed not in protocol["seeds"]:
            continue
        own = replace(setup, **{key: protocol[key] for key in ("train", "rows") if key in protocol})
        labels, steps = protocol.get("labels", name), protocol.get("steps", plan["steps"])
        for arm in protocol["arms"]:
            path = result_file(name, arm, seed, out)
            cells.append((Cell(labels, arm, seed, rate, weights[arm], "test", steps, start, path), own))
    return cells


def _settled(plan: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """(learning rate, weight by arm) of the block `settled`. Raises UserError if it is not whole.

    An arm without a weight would train as plain SFT, under its own name.
    """
    settled, arms = plan["settled"], plan["weights"].keys()
    if settled is None:
        raise UserError("The plan has no `settled` settings yet; run select, write them there and commit the plan.")
    parts = settled if isinstance(settled, dict) else {}
    weights = parts.get("weights")
    numbers = {"learning_rate": parts.get("learning_rate"), **(weights if isinstance(weights, dict) else {})}
    are_numbers = all(type(value) in (int, float) and value > 0 for value in numbers.values())
    if numbers.keys() != {"learning_rate", *arms} or not are_numbers:
        raise UserError(
            "The plan's `settled` must hold a learning_rate and, under weights, one positive number for each of "
            f"{', '.join(arms)}; take what select prints."
        )
    return numbers.pop("learning_rate"), numbers


def _run_of_set(cell_and_setup: tuple[Cell, Setup], data: Path) -> str:
    return run_cell(cell_and_setup[0], data, cell_and_setup[1])


def result_file(protocol: str, arm: str, seed: int, out: Path = RESULTS) -> Path:
    return out / "compare" / f"{protocol}-{arm}-seed{seed}.json"
