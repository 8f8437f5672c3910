"""Train a small model on rows of views, judge its answers, and run many such runs in parallel."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a 0.7M-parameter model runs slower on several threads

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_jepa import LLMJEPAConfig, LLMJEPATrainer, UserError, generate
from llm_jepa.core.json_files import read_json
from llm_jepa.core.strict_yaml import load_yaml
from llm_jepa.lm import bank_collator, training_collator
from llm_jepa.shipped import recipe_path

from .. import graders

SHARED = load_yaml(recipe_path("lm/tiny-llama/_shared").read_text())
BATCH = SHARED["per_device_train_batch_size"]
MAX_NEW_TOKENS = 48
OPTIMISER = ("lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2", "activation_checkpointing")
# Every step of a run costs the same, and its last checkpoint is judged.
RUN = {
    **{name: SHARED[name] for name in OPTIMISER},
    "per_device_train_batch_size": BATCH,
    "dataloader_drop_last": True,
    "save_strategy": "no",
    "diagnostics_pairs": 0,
    "disable_tqdm": True,
}


def arguments(output_dir: Path, steps: int, **options: Any) -> LLMJEPAConfig:
    """The training arguments of a small run; `options` override RUN."""
    return LLMJEPAConfig(
        str(output_dir),
        max_steps=steps,
        logging_steps=max(1, steps // 10),
        use_cpu=not torch.cuda.is_available(),
        **{**RUN, **options},
    )


def train(trainer: LLMJEPATrainer) -> dict[str, Any]:
    """Train; return the cost: steps, tokens without padding, process seconds, and ten lines of the log."""
    started = time.process_time()
    trainer.train()
    history = trainer.state.log_history
    losses = [entry for entry in history if "lm_loss" in entry]
    return {
        "steps": trainer.state.max_steps,
        "tokens": max(entry["num_tokens"] for entry in history if "num_tokens" in entry),
        "process_seconds": round(time.process_time() - started, 1),
        "log": [_only(entry, ("step", "lm_loss", "jepa_loss")) for entry in losses],
    }


def _only(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: entry[name] for name in names if name in entry}


def tokens_of(rows: Dataset, args: LLMJEPAConfig, tokenizer: PreTrainedTokenizerBase) -> float:
    """The mean number of tokens in a row, counted as the trainer does: with views, without padding.

    From at most 2,048 rows: within half a per cent of the mean over all.
    """
    rows = rows.shuffle(seed=0).select(range(min(len(rows), 2048)))
    predictors = [0] * (args.num_predictor_tokens if args.uses_views else 0)  # only their number matters here
    collator = training_collator(bank_collator(args, tokenizer.pad_token_id, predictors), args)
    tokens = 0
    for start in range(0, len(rows), 512):
        batch = collator([rows[i] for i in range(start, min(start + 512, len(rows)))])
        tokens += int((batch["doc"] >= 0).sum())
    return tokens / len(rows)


def refuse_other_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError if the result file is that of a run with other settings. It would be mistaken for this one."""
    result = read_json(path, is_finite=False)
    differences = [
        f"{name} {result.get(name)!r} instead of {value!r}"
        for name, value in settings.items()
        if result.get(name) != value
    ]
    if differences:
        raise UserError(
            f"{path} holds another run ({', '.join(differences)}); move it away, or write to another folder."
        )


def answer_of(row: Mapping[str, Any]) -> str:
    """The last message of a conversational row."""
    text: str = row["messages"][-1]["content"]
    return text


def without_validation(
    rows: Sequence[dict[str, Any]], number: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, validation rows), the same at every call. All rows of one answer are in the same part.

    There are `number` validation rows, or a few more.
    """
    counts = Counter(answer_of(row) for row in rows)
    answers = sorted(counts)
    random.Random("validation").shuffle(answers)
    validation: set[str] = set()
    num_validation = 0
    for answer in answers:
        if num_validation >= number:
            break
        validation.add(answer)
        num_validation += counts[answer]
    train = [row for row in rows if answer_of(row) not in validation]
    return train, [row for row in rows if answer_of(row) in validation]


def with_targets_of(rows: Dataset, source: Sequence[int]) -> Dataset:
    """The same rows, but row i gets the target of row source[i]. The LM rows, and so the LM loss, stay unchanged."""
    others = rows.select(source)
    for name in ("targets", "target_key", "target_text_keys"):
        column = others[name][:]
        rows = rows.remove_columns(name).add_column(name, column)
    return rows


def derangement(items: Sequence[int], rng: random.Random) -> dict[int, int]:
    """Give every item another item: the next one in a random order, and the last item the first."""
    order = rng.sample(items, len(items))
    return dict(zip(order, [*order[1:], order[0]], strict=True))


class Judged(NamedTuple):
    """Judged answers.

    metrics: by wording, then by metric of `graders.regex`. With several wordings also "both": the shares of requests
        that have the same answer, and the right answer, in all wordings.
    correct: by wording, one "0" or "1" for each request (1: a regex for the same language).
    bits: the same for every metric.
    """

    metrics: dict[str, dict[str, float]]
    correct: dict[str, str]
    bits: Mapping[str, Mapping[str, str]] = MappingProxyType({})


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[list[dict[str, Any]]]],
    golds: Sequence[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    grade: Callable[[str, str, bool], graders.Grade] = graders.regex,
) -> Judged:
    """Answer the prompts of every wording greedily and judge the answers.

    grade: of (gold, answer, did it stop); by default that of regexes. Its score `equivalent` says what is right.
    """
    metrics, bits, keys = {}, {}, []
    for wording, requests in prompts.items():
        answers = generate(model, tokenizer, requests, max_new_tokens=max_new_tokens, batch_size=256)
        grades = [grade(gold, answer.text, answer.stopped) for gold, answer in zip(golds, answers, strict=True)]
        names = [name for name in grades[0].scores if name != "nondegenerate"]
        metrics[wording] = {name: _mean_score(grades, name) for name in names}
        bits[wording] = {name: "".join("01"[int(of_one.scores[name])] for of_one in grades) for name in names}
        keys.append([of_one.answer_key for of_one in grades])
    correct = {wording: of_metric["equivalent"] for wording, of_metric in bits.items()}
    if len(prompts) > 1:
        consistent = sum(len(set(of_request)) == 1 for of_request in zip(*keys, strict=True))
        all_correct = sum(set(bits) == {"1"} for bits in zip(*correct.values(), strict=True))
        metrics["both"] = {
            "consistent": consistent / len(golds),
            "consistent_and_correct": all_correct / len(golds),
        }
    return Judged(metrics, correct, bits)


def _mean_score(grades: Sequence[graders.Grade], name: str) -> float:
    return sum(grade.scores[name] for grade in grades) / len(grades)


def chosen_runs(groups: Mapping[str, dict[str, Any]], chosen: Mapping[str, str | None]) -> dict[str, dict[str, Any]]:
    """The groups of a plan ({name: {arms, seeds, ...}}) with the chosen group, arm and seed alone.

    chosen: the name of the group, the arm, the seed, in this order; None leaves all of them. Raises UserError for no
    run.
    """
    group, arm, seed = chosen.values()
    left = {}
    for name, one in groups.items():
        arms = [each for each in one["arms"] if arm in (None, each)]
        seeds = [each for each in one["seeds"] if seed in (None, str(each))]
        if group in (None, name) and arms and seeds:
            left[name] = {**one, "arms": arms, "seeds": seeds}
    if not left:
        asked = " ".join(f"--{name} {value}" for name, value in chosen.items() if value is not None)
        known = "; ".join(f"{name}: {', '.join(one['arms'])}, seeds {one['seeds']}" for name, one in groups.items())
        raise UserError(f"The plan has no run of {asked}; its runs are {known}.")
    return left


def side_by_side(run: Callable[..., str], cells: Sequence[Any], jobs: int, *shared: Any) -> Iterator[str]:
    """Call run(cell, *shared) for every cell, each in its own process, `jobs` at a time. Yield the results in order."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run, cells, *([value] * len(cells) for value in shared))
