"""One run (a cell) and the plan's two series of runs: `select` on validation, `compare` on test."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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

from ...provenance import environment
from ...tasks import nl_rx
from .. import small_runs
from ..small_runs import derangement, side_by_side, with_targets_of
from . import RESULTS

TRAIN = "synth_train.jsonl"

# The options that an arm adds to plain SFT. Its weight comes from the plan.
ARMS: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft_flops": {},
    "cosine": {"objective": "cosine"},
    "info_nce": {"objective": "info_nce"},
    "vicreg": {"objective": "mse", "regularizer": "vicreg"},
    "sigreg": {"objective": "mse", "regularizer": "sigreg"},
    "stp_paper": {"objective": "stp", "stp_formula": "paper", "num_predictor_tokens": 0},
    "stp_code": {"objective": "stp", "stp_formula": "code", "num_predictor_tokens": 0},
    "mismatched": {"objective": "info_nce"},
}


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
def _data(folder: Path, held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, validation rows), the same for every run. All lines of one regex are in the same part.

    held_out: the least number of validation rows.
    """
    rows = [dict(row) for row in read_rows(str(folder / TRAIN))]
    counts = Counter(_answer(row) for row in rows)
    regexes = sorted(counts)
    random.Random("validation").shuffle(regexes)
    validation: set[str] = set()
    num_validation = 0
    for regex in regexes:
        if num_validation >= held_out:
            break
        validation.add(regex)
        num_validation += counts[regex]
    return (
        [row for row in rows if _answer(row) not in validation],
        [row for row in rows if _answer(row) in validation],
    )


def _answer(row: dict[str, Any]) -> str:
    text: str = row["messages"][-1]["content"]
    return text


@functools.cache
def _tokenizer(folder: Path, held_out: int, start: str) -> PreTrainedTokenizerBase:
    if start:
        tokenizer = tokenizer_from(start)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # like the published script and the trainer
        return tokenizer
    return train_tokenizer(_data(folder, held_out)[0], small_runs.SHARED["tokenizer_vocab_size"])


@functools.cache
def _views(folder: Path, held_out: int, start: str, protocol: str) -> Dataset:
    """Views of the training rows, the same for every run of one protocol."""
    add_views = functools.partial(
        add_view_columns, tokenizer=_tokenizer(folder, held_out, start), label_protocol=protocol
    )
    return Dataset.from_list([add_views(row, i) for i, row in enumerate(_data(folder, held_out)[0])])


def _model(start: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    if start:
        set_seed(seed)
        return model_from(start, dtype=torch.float32)
    return random_model(small_runs.SHARED["model_config"], tokenizer, seed=seed)


def run_cell(cell: Cell, data: Path, held_out: int) -> str:
    """Train and judge one cell, unless its result file exists. Returns a line for the log."""
    settings = {name: value for name, value in asdict(cell).items() if name != "out"}
    if cell.out.exists():
        small_runs.refuse_other_settings(cell.out, settings)
    else:
        with tempfile.TemporaryDirectory() as scratch:  # no run saves anything
            write_json(cell.out, {**settings, **_train_and_judge(cell, data, held_out, Path(scratch))})
    result = read_json(cell.out, is_finite=False)
    synth = result["metrics"]["synth"]
    names = ("startswith", "exact", "equivalent", "stop_rate")
    figures = "  ".join(f"{name} {100 * synth[name]:5.1f}" for name in names)
    return f"{cell.out.stem:45s} {figures}  {result['cost']['tokens']:,} tokens, {result['seconds']:.0f} s"


def _train_and_judge(cell: Cell, data: Path, held_out: int, output_dir: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = _views(data, held_out, cell.start, cell.protocol)
    tokenizer = copy.deepcopy(_tokenizer(data, held_out, cell.start))  # predictor tokens are added to the copy
    steps = cell.steps
    if cell.arm == "sft_flops":
        steps = _steps_of_equal_tokens(steps, rows, tokenizer, output_dir)
    if cell.arm == "mismatched":
        partner = derangement(range(len(rows)), random.Random(f"mismatched {cell.seed}"))
        rows = with_targets_of(rows, [partner[i] for i in range(len(rows))])
    options = {
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "jepa_weight": cell.weight,
        "label_protocol": cell.protocol,
        **ARMS[cell.arm],
    }
    args = small_runs.arguments(output_dir, steps, **options)
    model = _model(cell.start, tokenizer, cell.seed)
    trainer = LLMJEPATrainer(model, args, rows, processing_class=tokenizer)
    cost = small_runs.train(trainer)
    prompts, golds = _questions(data, held_out, cell.part)
    judged = small_runs.judge(model, tokenizer, prompts, golds)
    return {
        "lines": len(golds),
        "metrics": judged.metrics,
        "correct": judged.correct,
        "cost": cost,
        "data_sha256": {path.name: file_sha256(path) for path in nl_rx.load(data)[2]},
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _steps_of_equal_tokens(steps: int, rows: Dataset, tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> int:
    """The number of plain SFT steps that cost as many tokens as `steps` steps with views."""
    with_views = small_runs.arguments(output_dir, 1, jepa_weight=0.1)
    plain = small_runs.arguments(output_dir, 1, jepa_weight=0.0)
    tokens_with_views, tokens = (small_runs.tokens_of(rows, args, tokenizer) for args in (with_views, plain))
    return round(steps * tokens_with_views / tokens)


@functools.cache
def _questions(data: Path, held_out: int, part: str) -> tuple[dict[str, list[list[dict[str, Any]]]], list[str]]:
    """(prompts by wording, golds) of "validation" (synth alone) or "test"."""
    if part == "validation":
        rows = _data(data, held_out)[1]
        return {"synth": [row["messages"][:-1] for row in rows]}, [_answer(row) for row in rows]
    items, _, _ = nl_rx.load(data)
    prompts = {"synth": [list(item.original) for item in items], "turk": [list(item.paraphrase) for item in items]}
    return prompts, [item.answer for item in items]


def select(data: Path, plan: dict[str, Any], start: str, out: Path, jobs: int) -> None:
    """Select the learning rate by plain SFT, then the weight of every objective. Print the plan's block `settled`."""

    def best(arm: str, options: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """The (learning rate, weight) with the highest mean startswith on validation."""
        cells = {
            option: [_selection_cell(arm, option, seed, plan["steps"], start, out) for seed in plan["selection_seeds"]]
            for option in options
        }
        flat = list(itertools.chain.from_iterable(cells.values()))
        for line in side_by_side(run_cell, flat, jobs, data, plan["validation"]):
            print(line, flush=True)
        means = {option: statistics.mean(map(_validation_startswith, group)) for option, group in cells.items()}
        return max(means, key=lambda option: means[option])

    rate, _ = best("sft", [(rate, 0.0) for rate in plan["learning_rates"]])
    weights = {}
    for arm, values in plan["weights"].items():
        _, weights[arm] = best(arm, [(rate, weight) for weight in values])
    print("settled:\n" + dump_yaml({"learning_rate": rate, "weights": weights}))


def _selection_cell(arm: str, option: tuple[float, float], seed: int, steps: int, start: str, out: Path) -> Cell:
    rate, weight = option
    path = out / "selection" / f"{arm}-{rate:g}-{weight:g}-seed{seed}.json"
    return Cell("completion", arm, seed, rate, weight, "validation", steps, start, path)


def _validation_startswith(cell: Cell) -> float:
    share: float = read_json(cell.out, is_finite=False)["metrics"]["synth"]["startswith"]
    return share


def compare(data: Path, plan: dict[str, Any], start: str, out: Path, jobs: int) -> None:
    """Run all arms of both protocols, seed by seed: if you stop early, the finished seeds are whole."""
    settled = plan["settled"]
    if settled is None:
        raise UserError("The plan has no `settled` settings yet; run select, write them there and commit the plan.")
    weights = {arm: settled["weights"].get(arm, 0.0) for arm in ARMS} | {"mismatched": settled["weights"]["info_nce"]}
    protocols = plan["protocols"]
    seeds = sorted({seed for protocol in protocols.values() for seed in protocol["seeds"]})
    cells = []
    for seed, name in itertools.product(seeds, protocols):
        if seed not in protocols[name]["seeds"]:
            continue
        for arm in protocols[name]["arms"]:
            path = result_file(name, arm, seed, out)
            rate, weight = settled["learning_rate"], weights[arm]
            cells.append(Cell(name, arm, seed, rate, weight, "test", plan["steps"], start, path))
    for line in side_by_side(run_cell, cells, jobs, data, plan["validation"]):
        print(line, flush=True)


def result_file(protocol: str, arm: str, seed: int, out: Path = RESULTS) -> Path:
    return out / "compare" / f"{protocol}-{arm}-seed{seed}.json"
