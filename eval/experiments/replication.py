"""What does the JEPA term change? The published comparison, repeated at the size that two CPU cores allow.

    python -m eval.experiments.replication select  --data FOLDER      # weights and learning rate, on validation
    python -m eval.experiments.replication compare --data FOLDER   # arms x protocols x seeds on test, as planned
    python -m eval.experiments.replication analyse                 # the plan's analysis of the committed result files

eval/plans/replication.yaml is the plan. A run whose result file exists is not repeated. With `--start NAME` the runs
start from a checkpoint (a folder or a Hub id) instead of random weights: the same comparison on a pretrained model, for
those who have one and a GPU. It needs settings of its own, `--plan` (copy ours, set `settled: null`, `select`), and a
place of its own, `--out`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llm_jepa import LLMJEPATrainer, UserError
from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.lm.from_scratch import random_model, train_tokenizer
from llm_jepa.lm.loading import model_from, read_rows, tokenizer_from
from llm_jepa.lm.views import add_view_columns

from ..figures.inference import detectable_difference, hierarchical, holm, show_p, t_interval, t_test
from ..provenance import environment
from ..tasks import nl_rx
from . import small_runs
from .small_runs import derangement, side_by_side, with_targets_of

PLAN = Path(__file__).parents[1] / "plans" / "replication.yaml"
RESULTS = Path(__file__).parents[1] / "results" / "replication"
TRAIN = "synth_train.jsonl"

# What an arm adds to plain SFT; the weight comes from the plan.
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


# Not planned: what the views cost, spent on plain SFT; and right against wrong targets.
CONTROLS = (
    ("cosine", "sft_flops"),
    ("info_nce", "sft_flops"),
    ("vicreg", "sft_flops"),
    ("sigreg", "sft_flops"),
    ("info_nce", "mismatched"),
)
SHOWN = {"sft_flops": "sft, equal tokens"}

# arXiv:2509.14252, NL-RX-SYNTH, mean +- sd over 5 seeds: (metric, regular, LLM-JEPA with cosine); labels on every
# non-pad token. From random weights (table 2, a Llama-3.2-1B shape) startswith, else (table 12) exact match.
PUBLISHED = {
    "": ("startswith", "54.38 ± 1.70", "60.59 ± 1.01"),
    "meta-llama/Llama-3.2-1B-Instruct": ("exact", "57.29 ± 5.32", "71.46 ± 1.34"),
    "google/gemma-2-2b-it": ("exact", "33.65 ± 3.24", "43.12 ± 2.61"),
    "apple/OpenELM-1_1B-Instruct": ("exact", "12.07 ± 1.81", "25.40 ± 2.40"),
    "allenai/OLMo-2-0425-1B-Instruct": ("exact", "87.09 ± 0.36", "87.52 ± 0.29"),
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
    """(training rows, validation rows), the same for every run; lines of one regex stay together."""
    rows = [dict(row) for row in read_rows(str(folder / TRAIN))]
    regexes = sorted({row["messages"][-1]["content"] for row in rows})
    random.Random("validation").shuffle(regexes)
    kept: set[str] = set()
    counts = {regex: 0 for regex in regexes}
    for row in rows:
        counts[row["messages"][-1]["content"]] += 1
    for regex in regexes:
        if sum(counts[known] for known in kept) >= held_out:
            break
        kept.add(regex)
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for row in rows:
        parts[row["messages"][-1]["content"] in kept].append(row)
    return parts


@functools.cache
def _tokenizer(folder: Path, held_out: int, start: str) -> PreTrainedTokenizerBase:
    if start:
        tokenizer = tokenizer_from(start)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as the published script, and the trainer
        return tokenizer
    return train_tokenizer(_data(folder, held_out)[0], small_runs.SHARED["tokenizer_vocab_size"])


@functools.cache
def _views(folder: Path, held_out: int, start: str, protocol: str) -> Dataset:
    tokenizer = _tokenizer(folder, held_out, start)
    return Dataset.from_list(
        [
            add_view_columns(row, i, tokenizer=tokenizer, label_protocol=protocol)
            for i, row in enumerate(_data(folder, held_out)[0])
        ]
    )


def _model(start: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    if start:
        set_seed(seed)
        return model_from(start, dtype=torch.float32)
    return random_model(small_runs.SHARED["model_config"], tokenizer, seed=seed)


def run_cell(cell: Cell, data: Path, held_out: int) -> str:
    """Train and judge one cell; returns a line for the log. A cell whose file exists is left alone."""
    what = {name: value for name, value in asdict(cell).items() if name != "out"}
    if cell.out.exists():
        small_runs.refuse_other_settings(cell.out, what)
    else:
        with tempfile.TemporaryDirectory() as nowhere:  # no run saves anything
            write_json(cell.out, {**what, **_train_and_judge(cell, data, held_out, Path(nowhere))})
    found = json.loads(cell.out.read_text())
    figures = found["metrics"]["synth"]
    shown = "  ".join(
        f"{name} {100 * figures[name]:5.1f}" for name in ("startswith", "exact", "equivalent", "stop_rate")
    )
    return f"{cell.out.stem:45s} {shown}  {found['cost']['tokens']:,} tokens, {found['seconds']:.0f} s"


def _train_and_judge(cell: Cell, data: Path, held_out: int, output_dir: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = _views(data, held_out, cell.start, cell.protocol)
    tokenizer = copy.deepcopy(_tokenizer(data, held_out, cell.start))  # predictor tokens are added to it
    options = {
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "jepa_weight": cell.weight,
        "label_protocol": cell.protocol,
        **ARMS[cell.arm],
    }
    steps = cell.steps
    if cell.arm == "sft_flops":
        with_views = small_runs.arguments(output_dir, 1, jepa_weight=0.1)
        plain = small_runs.arguments(output_dir, 1, jepa_weight=0.0)
        count = functools.partial(small_runs.tokens_of, rows, tokenizer=tokenizer)
        steps = round(steps * count(with_views) / count(plain))
    if cell.arm == "mismatched":
        partner = derangement(range(len(rows)), random.Random(f"mismatched {cell.seed}"))
        rows = with_targets_of(rows, [partner[i] for i in range(len(rows))])
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


@functools.cache
def _questions(data: Path, held_out: int, part: str) -> tuple[dict[str, list[list[dict[str, Any]]]], list[str]]:
    """(prompts by wording, golds) of "validation" (synth alone) or "test"."""
    if part == "validation":
        rows = _data(data, held_out)[1]
        return {"synth": [row["messages"][:-1] for row in rows]}, [row["messages"][-1]["content"] for row in rows]
    items, _, _ = nl_rx.load(data)
    prompts = {"synth": [list(item.original) for item in items], "turk": [list(item.paraphrase) for item in items]}
    return prompts, [item.answer for item in items]


# -- the plan's steps -------------------------------------------------------------------------------------------------


def select(data: Path, plan: dict[str, Any], start: str, out: Path, jobs: int) -> None:
    """Learning rate by plain SFT, then the weight of every objective; prints the block `settled` of the plan."""

    def best(arm: str, options: Sequence[tuple[float, float]]) -> tuple[float, float]:
        cells = {
            (rate, weight): [
                Cell("completion", arm, seed, rate, weight, "validation", plan["steps"], start,
                     out / "selection" / f"{arm}-{rate:g}-{weight:g}-seed{seed}.json")
                for seed in plan["selection_seeds"]
            ]
            for rate, weight in options
        }  # fmt: skip
        flat = [cell for group in cells.values() for cell in group]
        for line in side_by_side(run_cell, flat, jobs, data, plan["validation"]):
            print(line, flush=True)
        reached = {
            option: statistics.mean(
                json.loads(cell.out.read_text())["metrics"]["synth"]["startswith"] for cell in group
            )
            for option, group in cells.items()
        }
        return max(reached, key=lambda option: reached[option])

    rate, _ = best("sft", [(rate, 0.0) for rate in plan["learning_rates"]])
    weights = {arm: best(arm, [(rate, weight) for weight in plan["weights"][arm]])[1] for arm in plan["weights"]}
    print("settled:\n" + yaml.safe_dump({"learning_rate": rate, "weights": weights}, sort_keys=False))


def compare(data: Path, plan: dict[str, Any], start: str, out: Path, jobs: int) -> None:
    """Seed by seed, all arms of both protocols: stopped early, there are whole seeds."""
    settled = plan["settled"]
    if settled is None:
        raise UserError("The plan has no `settled` settings yet; run select, write them there and commit the plan.")
    weights = {arm: settled["weights"].get(arm, 0.0) for arm in ARMS} | {"mismatched": settled["weights"]["info_nce"]}
    cells = [
        Cell(protocol, arm, seed, settled["learning_rate"], weights[arm], "test", plan["steps"], start,
             result_file(protocol, arm, seed, out))
        for seed in sorted({seed for of in plan["protocols"].values() for seed in of["seeds"]})
        for protocol, of in plan["protocols"].items()
        if seed in of["seeds"]
        for arm in of["arms"]
    ]  # fmt: skip
    for line in side_by_side(run_cell, cells, jobs, data, plan["validation"]):
        print(line, flush=True)


def result_file(protocol: str, arm: str, seed: int, out: Path = RESULTS) -> Path:
    return out / "compare" / f"{protocol}-{arm}-seed{seed}.json"


def analyse(plan: dict[str, Any], out: Path) -> dict[str, Any]:
    """By protocol: mean and sd of every arm, its difference to sft in points, and the differences CONTROLS, over the
    seeds that all arms have.

    Raises UserError if there are fewer than two such seeds, or runs that do not belong together.
    """
    figures: dict[str, Any] = {}
    for protocol, of in plan["protocols"].items():
        runs = {
            (arm, seed): json.loads(path.read_text())
            for arm, seed in itertools.product(of["arms"], of["seeds"])
            if (path := result_file(protocol, arm, seed, out)).is_file()
        }
        seeds = [seed for seed in of["seeds"] if all((arm, seed) in runs for arm in of["arms"])]
        if len(seeds) < 2:
            raise UserError(f"{out} holds {len(seeds)} whole seed(s) of protocol {protocol}; run compare first.")
        same = ("data_sha256", "lines", "steps", "learning_rate", "start", "part")
        kinds = {json.dumps([run[name] for name in same], sort_keys=True) for run in runs.values()}
        kinds |= {
            f"{arm} {run['weight']}" for (arm, _), run in runs.items() if run["weight"] != runs[arm, seeds[0]]["weight"]
        }
        if len(kinds) > 1:
            raise UserError(
                f"The {protocol} runs in {out} are of {len(kinds)} settings or data sets; remove the odd ones."
            )
        arms = {}
        for arm in of["arms"]:
            values = {
                f"{wording} {metric}": [runs[arm, seed]["metrics"][wording][metric] for seed in seeds]
                for wording in ("synth", "turk")
                for metric in ("startswith", "exact", "contains", "stop_rate", "equivalent")
            }
            values["tokens"] = [runs[arm, seed]["cost"]["tokens"] for seed in seeds]
            arms[arm] = {name: [statistics.mean(v), statistics.stdev(v)] for name, v in values.items()}
            arms[arm]["weight"] = runs[arm, seeds[0]]["weight"]
        by_arm = {arm: [runs[arm, seed] for seed in seeds] for arm in of["arms"]}
        controls = [pair for pair in CONTROLS if set(pair) <= set(by_arm)]
        one = by_arm["sft"][0]
        figures[protocol] = {
            "seeds": seeds,
            "lines": one["lines"],
            "start": one["start"],
            "arms": arms,
            "minus_sft": _differences(by_arm, [(arm, "sft") for arm in of["arms"][1:]]),
            "controls": _differences(by_arm, controls),
        }
    return figures


def seeds_of(figures: dict[str, Any], plan: dict[str, Any]) -> str:
    return ", ".join(
        f"{len(found['seeds'])} of {len(plan['protocols'][protocol]['seeds'])} seeds under {protocol}"
        for protocol, found in figures.items()
    )


def table(figures: dict[str, Any]) -> str:
    """Markdown: an arm a row, the published figure beside it where there is one, then what each arm adds to sft."""
    shown = (
        "synth startswith",
        "synth exact",
        "synth contains",
        "synth stop_rate",
        "synth equivalent",
        "turk startswith",
        "turk equivalent",
    )
    lines = ["| labels | arm | weight | " + " | ".join(shown) + " | published |", "|---|---|---:|" + "---:|" * 8]
    for protocol, found in figures.items():
        metric, *published = PUBLISHED.get(found["start"], ("", "", ""))
        beside = dict(zip(("sft", "cosine"), published, strict=True)) if protocol == "paper" and metric else {}
        for arm, values in found["arms"].items():
            cells = [f"{100 * mean:.1f} ± {100 * sd:.1f}" for mean, sd in (values[name] for name in shown)]
            figure = f"{beside[arm]} {metric}" if arm in beside else ""
            lines.append(
                f"| {protocol} | {SHOWN.get(arm, arm)} | {values['weight']:g} | " + " | ".join(cells) + f" | {figure} |"
            )
    lines += [
        "",
        "| labels | difference in startswith | synth | p (Holm) | detectable | turk | p (Holm) | detectable |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    named = {
        protocol + note: found[family]
        for family, note in (("minus_sft", ""), ("controls", ", not planned"))
        for protocol, found in figures.items()
    }
    for labels, differences in named.items():
        for name, gains in differences.items():
            cells = []
            for gain in (gains["synth"], gains["turk"]):
                mean, low, high = gain["startswith"].values()
                cells += [
                    f"{mean:+.1f} ({low:+.1f} to {high:+.1f})",
                    show_p(gain["p_holm"]),
                    f"{gain['detectable']:.1f}",
                ]
            title = " - ".join(SHOWN.get(arm, arm) for arm in name.split(" - "))
            lines.append(f"| {labels} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differences(
    by_arm: dict[str, list[dict[str, Any]]], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """One family of paired differences: "one - other" -> wording -> figures, Holm within a wording."""
    found: dict[str, dict[str, dict[str, Any]]] = {f"{one} - {other}": {} for one, other in pairs}
    for wording in ("synth", "turk"):
        for one, other in pairs:
            found[f"{one} - {other}"][wording] = _minus(by_arm[one], by_arm[other], wording, num_tests=len(pairs))
        for name, p in holm({name: of[wording]["p"] for name, of in found.items()}).items():
            found[name][wording]["p_holm"] = p
    return found


def _minus(
    runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], wording: str, *, num_tests: int
) -> dict[str, Any]:
    """Paired by seed, in points: startswith with its t interval, language equality with its hierarchical one."""
    pairs = list(zip(runs, baseline, strict=True))
    gains = [100 * (a["metrics"][wording]["startswith"] - b["metrics"][wording]["startswith"]) for a, b in pairs]
    bits = [[np.array([int(bit) for bit in run["correct"][wording]]) for run in pair] for pair in pairs]
    return {
        "startswith_by_seed": gains,
        "startswith": t_interval(gains)._asdict(),
        "p": t_test(gains),
        "equivalent": hierarchical(100.0 * np.stack([a - b for a, b in bits]))._asdict(),
        "detectable": detectable_difference(statistics.stdev(gains), len(gains), num_tests=num_tests),
    }


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as a plan: {error}") from None
    wanted = yaml.safe_load(PLAN.read_text()).keys()
    if not isinstance(plan, dict) or plan.keys() != wanted:
        raise UserError(f"{path} is not a plan: its keys must be {', '.join(wanted)}.")
    return plan


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.experiments.replication",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=["select", "compare", "analyse"])
    parser.add_argument("--data", type=Path, help="NL-RX folder: {synth,turk}_{train,test}.jsonl (select, compare)")
    parser.add_argument(
        "--start", default="", help="checkpoint to start from (default: random weights, 0.7M parameters)"
    )
    parser.add_argument(
        "--out", type=Path, help="result files (default: the committed ones; with --start it is needed)"
    )
    parser.add_argument("--plan", type=Path, help=f"default: eval/plans/{PLAN.name}; with --start it is needed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each; 1 on one GPU")
    options = parser.parse_args(argv)
    try:
        if options.start and (options.out is None or options.plan is None):
            raise UserError(
                "--start needs --plan FILE, with settings chosen for that model, and --out FOLDER: its runs are not "
                "those of the committed comparison."
            )
        plan = _read_plan(options.plan or PLAN)
        out = options.out or RESULTS
        if options.step == "analyse":
            figures = analyse(plan, out)
            write_json(out / "summary.json", figures)
            print(f"{table(figures)}\n\nOver {seeds_of(figures, plan)}.")
            return 0
        if options.data is None:
            raise UserError(f"{options.step} needs --data FOLDER with {TRAIN} and the test files.")
        nl_rx.load(options.data)  # says what is missing before anything starts
        step = select if options.step == "select" else compare
        step(options.data, plan, options.start, out, options.jobs)
    except UserError as error:
        print(f"eval.experiments.replication: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
