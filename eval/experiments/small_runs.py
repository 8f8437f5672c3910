"""What the committed experiments share: a small run from rows of views to judged answers, and many of them at once."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a 0.7M-parameter model runs slower on several threads

import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_jepa import LLMJEPAConfig, LLMJEPATrainer, UserError, generate
from llm_jepa.lm.data import pair_collator, training_collator

from .. import graders

SHARED = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "lm" / "tiny-llama" / "_shared.yaml").read_text())
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
    return LLMJEPAConfig(
        str(output_dir),
        max_steps=steps,
        logging_steps=max(1, steps // 10),
        use_cpu=not torch.cuda.is_available(),
        **{**RUN, **options},
    )


def train(trainer: LLMJEPATrainer) -> dict[str, Any]:
    """Runs it; returns what it cost: steps, tokens (padding aside), process seconds, and ten lines of its log."""
    started = time.process_time()
    trainer.train()
    history = trainer.state.log_history
    return {
        "steps": trainer.state.max_steps,
        "tokens": max(entry["num_tokens"] for entry in history if "num_tokens" in entry),
        "process_seconds": round(time.process_time() - started, 1),
        "log": [{k: e[k] for k in ("step", "lm_loss", "jepa_loss") if k in e} for e in history if "lm_loss" in e],
    }


def tokens_of(rows: Dataset, args: LLMJEPAConfig, tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens of a row in the mean, as the trainer will count them: those of its views included, padding not. From 2,048
    rows: within half a per cent of all."""
    rows = rows.shuffle(seed=0).select(range(min(len(rows), 2048)))
    predictors = [0] * (args.num_predictor_tokens if args.uses_views else 0)  # their number is all that matters
    collator = training_collator(pair_collator(args, tokenizer.pad_token_id, predictors), args)
    tokens = 0
    for start in range(0, len(rows), 512):
        batch = collator([rows[i] for i in range(start, min(start + 512, len(rows)))])
        tokens += int((batch["doc"] >= 0).sum())
    return tokens / len(rows)


def refuse_other_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError if the result file holds a run with other settings: it would be taken for this one."""
    found = json.loads(path.read_text())
    other = [name for name, value in settings.items() if found.get(name) != value]
    if other:
        shown = ", ".join(f"{name} {found.get(name)!r} instead of {settings[name]!r}" for name in other)
        raise UserError(f"{path} holds another run ({shown}); move it away, or write to another folder.")


def with_targets_of(rows: Dataset, source: Sequence[int]) -> Dataset:
    """The same rows; row i predicts what row source[i] says. The LM row, so the LM loss, stays as it is."""
    wrong = rows.select(source)
    for name in ("targets", "target_key"):
        column = wrong[name][:]
        rows = rows.remove_columns(name).add_column(name, column)
    return rows


def derangement(items: Sequence[int], rng: random.Random) -> dict[int, int]:
    """Every item gets another one: the next in a random round."""
    order = rng.sample(items, len(items))
    return dict(zip(order, [*order[1:], order[0]], strict=True))


class Judged(NamedTuple):
    """`metrics`: by wording, then by metric of `graders.regex`; where there are several, under "both" the share
    of requests with the same answer, and with the right one, in all of them. `correct`: "0" or "1" a request by wording
    (equal language)."""

    metrics: dict[str, dict[str, float]]
    correct: dict[str, str]


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[list[dict[str, Any]]]],
    golds: Sequence[str],
) -> Judged:
    """Greedy answers to the prompts of every wording, judged by the language of the regex."""
    metrics, correct, keys = {}, {}, []
    for wording, asked in prompts.items():
        found = generate(model, tokenizer, asked, max_new_tokens=MAX_NEW_TOKENS, batch_size=256)
        grades = [graders.regex(gold, g.text, g.stopped) for gold, g in zip(golds, found, strict=True)]
        names = [name for name in grades[0].scores if name != "nondegenerate"]
        metrics[wording] = {name: sum(grade.scores[name] for grade in grades) / len(golds) for name in names}
        correct[wording] = "".join("01"[int(grade.scores["equivalent"])] for grade in grades)
        keys.append([grade.answer_key for grade in grades])
    if len(prompts) > 1:
        same = [len(set(answers)) == 1 for answers in zip(*keys, strict=True)]
        right = [set(bits) == {"1"} for bits in zip(*correct.values(), strict=True)]
        metrics["both"] = {
            "consistent": sum(same) / len(golds), "consistent_and_correct": sum(right) / len(golds),
        }  # fmt: skip
    return Judged(metrics, correct)


def side_by_side(run: Callable[..., str], cells: Sequence[Any], jobs: int, *shared: Any) -> Iterator[str]:
    """run(cell, *shared) of every cell, `jobs` at a time in processes of their own; the lines they return, in order."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(run, cells, *([value] * len(cells) for value in shared))
