"""Score a model on a task:  python -m eval.run --model DIR --task nl_rx --data DIR --out FILE.json

Answers are decoded greedily; if a task has choices, the likeliest one is the answer. The command writes one JSON with
the figures and everything needed to repeat them, and next to it one line a question. A run that was cut short
continues where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_jepa import UserError
from llm_jepa.core.json_files import read_json
from llm_jepa.lm import (
    Generation,
    Prompt,
    PromptForm,
    answer_row,
    choose_batches,
    encode,
    end_of_turn_ids,
    form_from,
    generate_batches,
    model_from,
    other_format,
    tokenizer_from,
)

from .command import ArgumentParser, one_line_errors, seed_number, whole
from .provenance import environment, weights_sha256
from .run_files import Row, RunFiles
from .tasks import TASKS, Data, Group, Task, last_text, task_named, turns_of

SCHEMA = 1


class Question(NamedTuple):
    group: Group
    at: int  # the index of one of its wordings

    @property
    def prompt(self) -> Prompt:
        return self.group.prompts[self.at]

    @property
    def key(self) -> tuple[str, str]:
        return self.group.id, self.group.wordings[self.at]

    @property
    def choices(self) -> tuple[str, ...] | None:
        return self.group.extra.get("choices")


class Answer(NamedTuple):
    generation: Generation
    log_likelihoods: tuple[float, ...] | None = None  # of the choices, if there are any
    likeliest_per_character: str | None = None


def evaluate_model(
    model: str,
    task: Task,
    data: Data,
    *,
    out: Path | None,
    samples: Path | None = None,
    batch_size: int = 256,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> tuple[Row, list[Row]]:
    """(result, samples) of a saved model or Hub id on a task, all wordings.

    Args:
        out: the result file, written last and atomically; None writes nothing. If `out` already holds this run, its
            result is returned as it is; a run that was cut short continues from its samples.
        samples: one line a question, in the order of groups and wordings (default: FILE.samples.jsonl next to `out`).
            Ignored without `out`.
        limit: use the first groups only.
        seed: of the model's training, for the record; decoding is deterministic. Default: the seed that the model's
            run recorded.

    Raises UserError for a model or data that cannot be used, and if `out` belongs to another run.
    """
    started = time.perf_counter()
    groups = data.groups[:limit]
    questions = [Question(group, at) for group in groups for at in range(len(group.prompts))]
    files = None if out is None else RunFiles(out, samples)
    tokenizer = tokenizer_from(model)
    form = form_from(model)
    prompts = [question.prompt for question in questions]
    note = _warn_of_other_prompts(prompts, tokenizer, form)
    encoded = encode(tokenizer, prompts, form)
    _warn_of_untrained_starts(questions, encoded, tokenizer, form)
    lm = model_from(model, dtype=torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    new_tokens = max_new_tokens or task.max_new_tokens
    decoding = {
        "greedy": True,
        "max_new_tokens": new_tokens,
        "batch_size": batch_size,
        "backend": "transformers",
        "stop_token_ids": end_of_turn_ids(tokenizer),
    }
    run = _record(task, data, limit, decoding, tokenizer.chat_template, encoded, _identity(model, lm), seed)
    if files is not None and (finished := files.finished(run)) is not None:
        return finished
    too_long = _beyond_the_limit(lm, encoded, new_tokens)
    rows = {} if files is None else files.resume(run)
    todo = [i for i, question in enumerate(questions) if question.key not in rows]
    num_resumed = len(questions) - len(todo)
    if num_resumed and files is not None:
        print(f"Continuing after {num_resumed} of {len(questions)} answers in {files.partial}.")
    remaining = [questions[i] for i in todo]
    answers = _answers(lm, tokenizer, remaining, [encoded[i] for i in todo], batch_size, new_tokens)
    with tqdm(total=len(questions), initial=len(rows), desc=task.name, disable=not progress, unit="answer") as bar:
        for batch in answers:
            fresh = [_sample(task, remaining[i], answer) for i, answer in sorted(batch.items())]
            rows.update({(row["group"], row["wording"]): row for row in fresh})
            if files is not None:
                files.append(fresh)
            bar.update(len(fresh))
    lines = [rows[question.key] for question in questions]
    _warn_of_undecided(lines)
    result = {
        **run,
        **_metrics(groups, lines),
        "groups": len(groups),
        "items": len(groups),  # the name in older result files
        "dropped_as_known_from_train": data.dropped,
        "dropped_for_their_gold": data.unusable,
        "beyond_token_limit": too_long,
        "prompts_in_another_format": note,
        "resumed_answers": num_resumed,
        "published": task.published,
        "trap": task.trap,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if files is not None:
        files.finish(result, lines)
    return result, lines


def _record(
    task: Task,
    data: Data,
    limit: int | None,
    decoding: Row,
    chat_template: Any,
    encoded: Sequence[list[int]],
    model: Row,
    seed: int | None,
) -> Row:
    """Everything that makes a run this run and not another one."""
    if seed is None:
        seed = (model["run"] or {}).get("seed")
    return {
        "schema": SCHEMA,
        "task": task.name,
        "primary": task.metric,
        "limit": limit,
        "decoding": decoding,
        "data_sha256": data.sha256,
        "template_sha256": _sha256(chat_template),
        "prompts_sha256": _sha256(json.dumps(encoded)),  # some templates render the date
        "model": model,
        "environment": environment(),
        "seed": seed,
    }


def score_model(model: str, data: str, *, task: str = "nl_rx", **settings: Any) -> tuple[Row, list[Row]]:
    """`evaluate_model` by the names of task and data. Writes no file unless `out` is given."""
    chosen = task_named(task)
    return evaluate_model(model, chosen, chosen.load(data), **{"out": None, **settings})


# -- answers ----------------------------------------------------------------------------------------------------------


def _answers(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    encoded: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[dict[int, Answer]]:
    """Batches of index -> answer: the generated answers first, then the choices."""
    written = [i for i, question in enumerate(questions) if question.choices is None]
    prompts = [encoded[i] for i in written]
    for batch in generate_batches(lm, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size):
        yield {written[i]: Answer(generation) for i, generation in batch.items()}
    chosen = [i for i, question in enumerate(questions) if question.choices is not None]
    if not chosen:
        return
    asked, options = [questions[i].prompt for i in chosen], [questions[i].choices or () for i in chosen]
    for scored in choose_batches(lm, tokenizer, asked, options, batch_size=batch_size):
        best: dict[int, Answer] = {}
        for i, choice in scored.items():
            labels = questions[chosen[i]].choices or ()
            likeliest = Generation(labels[choice.most_likely], True, 0)
            best[chosen[i]] = Answer(likeliest, choice.log_likelihoods, labels[choice.most_likely_per_character])
        yield best


def _sample(task: Task, question: Question, answer: Answer) -> Row:
    """A line of the samples file."""
    group, (_, wording) = question.group, question.key
    text, stopped, num_tokens = answer.generation
    grade = task.grade(group, text, stopped)
    sample = {
        "group": group.id,
        "wording": wording,
        "prompt": last_text(question.prompt),
        "gold": group.answer,
        "text": text,
        "stopped": stopped,
        "num_tokens": num_tokens,
        "scores": grade.scores,
        "answer_key": grade.answer_key,
    }
    if answer.likeliest_per_character is not None:
        per_character = task.grade(group, answer.likeliest_per_character, True).scores[task.metric]
        sample["scores"] = {**grade.scores, f"{task.metric}_per_character": per_character}
        sample["log_likelihoods"] = dict(zip(question.choices or (), answer.log_likelihoods or (), strict=True))
    return sample


def _metrics(groups: Sequence[Group], lines: Sequence[Row]) -> Row:
    """The means of all metrics by wording, and the names of the wordings."""
    wordings: dict[str, None] = {}
    for group in groups:
        wordings |= dict.fromkeys(group.wordings)
    metrics = {}
    for name in wordings:
        metrics[name] = _means([row for row in lines if row["wording"] == name])
    return {"metrics": metrics, "wordings": list(wordings)}


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """Mean of each metric over the rows that have it, in the order in which the rows first name them."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["scores"].items():
            columns.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


# -- warnings ---------------------------------------------------------------------------------------------------------
# stacklevel=3: each is called by `evaluate_model`, and the warning belongs to the line that called that one.


def _warn_of_other_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, form: PromptForm
) -> str | None:
    """Warn of prompts in another format than the model was trained on. The note goes into the result, too."""
    note = other_format(prompts, form)
    plain = sum(isinstance(turns_of(prompt), str) for prompt in prompts)
    if note is None and plain and form.format is None and tokenizer.chat_template is not None:
        note = (
            f"{plain} of {len(prompts)} prompts are plain strings, so the model continues them without its chat "
            "template. Give lists of messages to use the template."
        )
    if note is not None:
        warnings.warn(note, stacklevel=3)
    return note


def _warn_of_untrained_starts(
    questions: Sequence[Question], encoded: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, form: PromptForm
) -> None:
    """Warn of asked prompts that are not the start of the row with their gold answer, token for token."""
    if form.format is None:
        return  # how the model was trained is not known
    count = 0
    for question, ids in zip(questions, encoded, strict=True):
        try:
            row = answer_row(tokenizer, question.prompt, question.group.answer, form, "")
        except UserError:
            continue  # a gold that is not a text of its own; the prompt itself was rendered before
        ends_elsewhere = form.ends == "content" and len(ids) != row.start
        count += row.ids[: len(ids)] != ids or ends_elsewhere
    if count:
        warnings.warn(
            f"{count} of {len(questions)} prompts are not, token for token, the start of the row with their answer: "
            "the model was not trained to continue them. Look at white space at the end of the prompts.",
            stacklevel=3,
        )


def _warn_of_undecided(lines: Sequence[Row]) -> None:
    count = sum(bool(row["scores"].get("undecided")) for row in lines)
    if count:
        warnings.warn(f"{count} of {len(lines)} answers could not be decided; counted as wrong.", stacklevel=3)


def _beyond_the_limit(lm: PreTrainedModel, encoded: Sequence[list[int]], max_new_tokens: int) -> int:
    """The number of prompts for which the model may have too few positions."""
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return 0
    count = sum(len(ids) + max_new_tokens > limit for ids in encoded)
    if count:
        warnings.warn(
            f"{count} of {len(encoded)} prompts may run beyond the {limit} positions that the model was made for "
            f"(longest prompt: {max(map(len, encoded))} tokens, max_new_tokens: {max_new_tokens}).",
            stacklevel=3,
        )
    return count


# -- the model --------------------------------------------------------------------------------------------------------


def _identity(model: str, lm: PreTrainedModel) -> Row:
    """Name and weights, and the record of the run that trained it: recipe, cost, geometry at the start and at the best
    evaluation."""
    folder = Path(model)
    if not folder.is_dir():
        revision = getattr(lm.config, "_commit_hash", None)
        return {"name": model, "weights_sha256": weights_sha256(folder), "revision": revision, "run": None}
    identity: Row = {"name": folder.name, "weights_sha256": weights_sha256(folder)}
    if not (folder / "run.json").is_file():
        return {**identity, "run": None}
    state = read_json(folder / "trainer_state.json", {"global_step": int, "log_history": [dict]}, is_finite=False)
    history = state["log_history"]
    evaluations = [entry for entry in history if "eval_recall_at_1" in entry]
    best_step = state.get("best_global_step") or state["global_step"]
    best = [entry for entry in evaluations if entry["step"] == best_step]
    return {
        **identity,
        "run": read_json(folder / "run.json"),
        "train_tokens": max([entry["num_tokens"] for entry in history if "num_tokens" in entry], default=None),
        "train_seconds": next(
            (entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None
        ),
        "space_at_start": _evaluation(evaluations[:1]),
        "validation": _evaluation(best[-1:]),
    }


def _evaluation(entries: Sequence[Row]) -> Row | None:
    """The figures of a logged evaluation without the speed; None if there is no evaluation."""
    for entry in entries:
        return {key.removeprefix("eval_"): value for key, value in entry.items() if "per_second" not in key}
    return None


def _sha256(text: Any) -> str | None:
    # A chat template may be a dict of several.
    return None if text is None else hashlib.sha256(str(text).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------


@one_line_errors("eval.run", if_stopped="The answers so far are kept; the same command continues.")
def main(argv: Sequence[str] | None = None) -> int:
    tasks = "\n".join(f"  {task.name:16s} {task.metric}" for task in TASKS.values())
    parser = ArgumentParser(
        prog="python -m eval.run",
        description=__doc__,
        epilog=f"tasks and their primary metrics:\n{tasks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a saved model, or a Hub id")
    parser.add_argument("--task", default="nl_rx", help="a task of the list below (default: %(default)s)")
    parser.add_argument("--data", required=True, help="file or folder of the task, or a Hub id")
    parser.add_argument("--out", required=True, type=Path, help="result JSON")
    parser.add_argument("--samples", type=Path, help="one line a question (default: FILE.samples.jsonl next to --out)")
    parser.add_argument("--limit", type=whole(1), help="score the first N groups only")
    parser.add_argument("--max_new_tokens", type=whole(1), help="default: the task's")
    parser.add_argument("--batch_size", type=whole(1), default=256)
    parser.add_argument("--seed", type=seed_number, help="seed of the model's training, for the record")
    options = vars(parser.parse_args(argv))
    result, _ = score_model(options.pop("model"), options.pop("data"), **options)
    print(table(result))
    return 0


def table(result: Row) -> str:
    """The metrics by wording, for a terminal."""
    names: dict[str, None] = {}
    for figures in result["metrics"].values():
        names |= dict.fromkeys(figures)
    width = max(len(name) for name in [*names, "12345678"]) + 2
    lines = ["wording         " + "".join(f"{name:>{width}}" for name in names)]
    for wording, figures in result["metrics"].items():
        shown = {name: f"{100 * value:.1f}%" for name, value in figures.items()}
        line = f"{wording:16s}"
        for name in names:
            line += f"{shown.get(name, ''):>{width}}"
        lines.append(line)
    dropped = result["dropped_as_known_from_train"]
    lines.append(
        f"{result['items']} items"
        + (f" ({dropped} left out, because they are in the training data)" if dropped else "")
        + f"; primary metric: {result['primary']}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
