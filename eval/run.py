"""Score a model on a task:  python -m eval.run --model DIR --task nl_rx --data DIR --out FILE.json

Greedy decoding (or, where the task has choices, the likeliest one). Writes one JSON with the figures and everything
needed to repeat them, and one line a question beside it. A run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_jepa import UserError
from llm_jepa.core.files import write_json
from llm_jepa.lm.inference import Generation, choose_batches, encode, generate_batches, read
from llm_jepa.lm.loading import model_from, tokenizer_from
from llm_jepa.lm.predictor_tokens import known_predictor_ids
from llm_jepa.lm.views import end_of_turn_ids

from .command import one_line_errors
from .provenance import environment, weights_sha256
from .tasks import TASKS, Data, Group, Task, last_text, task_named

SCHEMA = 1
BACKENDS = ("transformers", "vllm")


class Question(NamedTuple):
    group: Group
    at: int  # which of its wordings


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
    backend: str = "transformers",
    seed: int | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(result, samples) of a saved model or Hub id on a task, all wordings.

    Args:
        out: the result file, written last and atomically; None writes nothing. A finished run that `out` already holds
            is returned as it is; a run cut short continues from its samples.
        samples: one line a question, in the order of groups and wordings (default: FILE.samples.jsonl beside `out`);
            not without `out`.
        limit: the first groups only.
        seed: of the model's training, for the record: decoding draws nothing. Default: what the model's run says.

    Raises UserError for a model or data that cannot be used, and where `out` belongs to another run.
    """
    import torch

    started = time.perf_counter()
    groups = data.groups[:limit]
    questions = [Question(group, at) for group in groups for at in range(len(group.prompts))]
    if backend not in BACKENDS:
        raise UserError(f"There is no backend {backend!r}; use {' or '.join(BACKENDS)}.")
    if backend == "vllm" and any("choices" in group.extra for group in groups):
        raise UserError(f"{task.name} compares log-likelihoods, which the vllm backend does not; use transformers.")
    samples = None if out is None else samples or out.with_suffix(".samples.jsonl")
    for path in (out, samples):
        if path is not None:
            _check_writable(path)
    tokenizer = tokenizer_from(model)
    bare = sum(isinstance(group.prompts[at], str) for group, at in questions)
    if bare and tokenizer.chat_template is not None:
        warnings.warn(
            f"{bare} of {len(questions)} prompts are plain strings: continued as they stand, without the model's chat "
            "template. Give lists of messages to use it.",
            stacklevel=2,
        )
    encoded = encode(tokenizer, [group.prompts[at] for group, at in questions])
    new_tokens = max_new_tokens or task.max_new_tokens
    lm = None
    if backend == "transformers":
        lm = model_from(model, dtype=torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    run: dict[str, Any] = {
        "schema": SCHEMA,
        "task": task.name,
        "primary": task.metric,
        "limit": limit,
        "decoding": {
            "greedy": True, "max_new_tokens": new_tokens, "batch_size": batch_size, "backend": backend,
            "stop_token_ids": end_of_turn_ids(tokenizer),
        },
        "data_sha256": data.sha256,
        "template_sha256": _sha256(tokenizer.chat_template),
        "prompts_sha256": _sha256(json.dumps(encoded)),  # some templates render the date
        "model": _identity(model, lm),
        "environment": environment(),
    }  # fmt: skip
    run["seed"] = seed if seed is not None else (run["model"]["run"] or {}).get("seed")
    if out is not None and out.exists():
        return _finished(out, samples, run)
    too_long = _beyond_the_limit(lm, encoded, new_tokens)
    partial = None if samples is None else samples.with_name(samples.name + ".partial")
    rows = _resume(partial, run)
    todo = [i for i, (group, at) in enumerate(questions) if (group.id, group.wordings[at]) not in rows]
    if len(todo) < len(questions):
        print(f"Going on after {len(questions) - len(todo)} of {len(questions)} answers in {partial}.")
    with tqdm(total=len(questions), initial=len(rows), desc=task.name, disable=not progress, unit="answer") as bar:
        answers = _answers(
            lm, model, tokenizer, [questions[i] for i in todo], [encoded[i] for i in todo], batch_size, new_tokens
        )
        while True:
            try:
                batch = next(answers, None)
            except IndexError as error:
                if not too_long:
                    raise
                raise UserError(
                    f"The model has no positions for {too_long} of {len(questions)} prompts and {new_tokens} new "
                    "tokens; lower max_new_tokens, or leave these prompts out."
                ) from error
            if batch is None:
                break
            fresh = [_sample(task, questions[todo[i]], answer) for i, answer in sorted(batch.items())]
            rows.update({(row["group"], row["wording"]): row for row in fresh})
            if partial is not None:
                _append(partial, fresh)
            bar.update(len(fresh))
    lines = [rows[group.id, group.wordings[at]] for group, at in questions]
    undecided = sum(bool(row["scores"].get("undecided")) for row in lines)
    if undecided:
        warnings.warn(f"{undecided} of {len(lines)} answers could not be decided; counted as wrong.", stacklevel=2)
    wordings = list(dict.fromkeys(name for group in groups for name in group.wordings))
    result = {
        **run,
        "metrics": {name: _means([row for row in lines if row["wording"] == name]) for name in wordings},
        "wordings": wordings,
        "groups": len(groups),
        "items": len(groups),  # as older result files call them
        "dropped_as_known_from_train": data.dropped,
        "dropped_for_their_gold": data.unusable,
        "beyond_token_limit": too_long,
        "resumed_answers": len(questions) - len(todo),
        "published": task.published,
        "trap": task.trap,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if out is not None and samples is not None and partial is not None:  # all three or none
        _write_lines(samples, lines)
        write_json(out, result)
        partial.unlink(missing_ok=True)
    return result, lines


def score_model(model: str, data: str, *, task: str = "nl_rx", **settings: Any) -> tuple[dict[str, Any], list[Any]]:
    """`evaluate_model` by names, without files unless `out` is given."""
    chosen = task_named(task)
    return evaluate_model(model, chosen, chosen.load(data), **{"out": None, **settings})


# -- answers ----------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    generation: Generation
    log_likelihoods: tuple[float, ...] | None = None
    likeliest_per_character: str | None = None


def _answers(
    lm: PreTrainedModel | None,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    encoded: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[dict[int, Answer]]:
    """Batches of index -> answer: the generated ones first, then the choices."""
    written = [i for i, (group, _) in enumerate(questions) if "choices" not in group.extra]
    chosen = [i for i, (group, _) in enumerate(questions) if "choices" in group.extra]
    prompts = [encoded[i] for i in written]
    if lm is None:
        batches = _vllm(name, tokenizer, prompts, max_new_tokens)
    else:
        batches = generate_batches(lm, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    for batch in batches:
        yield {written[i]: Answer(generation) for i, generation in batch.items()}
    if chosen:
        assert lm is not None
        labels = [questions[i].group.extra["choices"] for i in chosen]
        # After a bare text a word begins with a space; after a chat template's header it does not.
        bare = [isinstance(group.prompts[at], str) for group, at in (questions[i] for i in chosen)]
        options = [[" " * space + label for label in some] for space, some in zip(bare, labels, strict=True)]
        for scored in choose_batches(lm, tokenizer, [encoded[i] for i in chosen], options, batch_size=batch_size):
            yield {
                chosen[i]: Answer(
                    Generation(labels[i][choice.most_likely], True, 0),
                    choice.log_likelihoods,
                    labels[i][choice.most_likely_per_character],
                )
                for i, choice in scored.items()
            }


def _vllm(
    name: str, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[list[int]], max_new_tokens: int
) -> Iterator[dict[int, Generation]]:
    """`generate_batches` by vLLM, all in one batch. UNTESTED: written from its documentation, never run by us."""
    try:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("The vllm backend needs vLLM (Linux, CUDA): pip install vllm") from None
    stop = end_of_turn_ids(tokenizer)
    settings = SamplingParams(
        temperature=0.0,
        max_tokens=max_new_tokens,
        stop_token_ids=stop,
        ignore_eos=True,  # stop_token_ids holds eos, and nothing but it ends an answer
        logit_bias=dict.fromkeys(known_predictor_ids(tokenizer), -100.0) or None,
        detokenize=False,
    )
    # generation_config="vllm": a checkpoint's advice (repetition_penalty) is none of ours, as in llm_jepa.generate.
    engine = LLM(model=name, dtype="float32", generation_config="vllm", trust_remote_code=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in encoded], settings)
    batch = {}
    for index, output in enumerate(outputs):
        ids = list(output.outputs[0].token_ids)
        if output.outputs[0].finish_reason == "stop" and not set(ids) & set(stop):
            ids.append(stop[0])  # some versions leave the stop token out
        batch[index] = read(tokenizer, ids, stop)
    yield batch


def _sample(task: Task, question: Question, answer: Answer) -> dict[str, Any]:
    group, at = question
    text, stopped, num_tokens = answer.generation
    grade = task.grade(group, text, stopped)
    sample = {
        "group": group.id,
        "wording": group.wordings[at],
        "prompt": last_text(group.prompts[at]),
        "gold": group.answer,
        "text": text,
        "stopped": stopped,
        "num_tokens": num_tokens,
        "scores": grade.scores,
        "answer_key": grade.answer_key,
    }
    if answer.likeliest_per_character is not None:
        other = task.grade(group, answer.likeliest_per_character, True).scores[task.metric]
        sample["scores"] = {**grade.scores, f"{task.metric}_per_character": other}
        sample["log_likelihoods"] = dict(zip(group.extra["choices"], answer.log_likelihoods or (), strict=True))
    return sample


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean of each metric over the rows that have it, in the order in which the first row names them."""
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    columns = {name: [row["scores"][name] for row in rows if name in row["scores"]] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}


def _beyond_the_limit(lm: PreTrainedModel | None, encoded: Sequence[list[int]], max_new_tokens: int) -> int:
    limit = None if lm is None else getattr(lm.config.get_text_config(), "max_position_embeddings", None)
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


# -- what a run is ----------------------------------------------------------------------------------------------------


def _identity(model: str, lm: PreTrainedModel | None) -> dict[str, Any]:
    """Name and weights, and what the run that trained it recorded: recipe, cost, geometry at the start and the best."""
    folder = Path(model)
    who = {"name": folder.name if folder.is_dir() else model, "weights_sha256": weights_sha256(folder)}
    if not folder.is_dir():
        who["revision"] = getattr(lm.config, "_commit_hash", None) if lm is not None else None
    if not (folder / "run.json").is_file():
        return {**who, "run": None}
    log = json.loads((folder / "trainer_state.json").read_text())
    history = log["log_history"]
    evaluations = [e for e in history if "eval_recall_at_1" in e]
    best = [e for e in evaluations if e["step"] == (log.get("best_global_step") or log["global_step"])]
    keep = lambda e: {k.removeprefix("eval_"): v for k, v in e.items() if "per_second" not in k}  # noqa: E731
    return {
        **who,
        "run": json.loads((folder / "run.json").read_text()),
        "train_tokens": max((e["num_tokens"] for e in history if "num_tokens" in e), default=None),
        "train_seconds": next((e["train_runtime"] for e in reversed(history) if "train_runtime" in e), None),
        "space_at_start": keep(evaluations[0]) if evaluations else None,
        "validation": keep(best[-1]) if best else None,
    }


def _sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _difference(run: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Where another run was another run, or None."""
    for key, value in json.loads(json.dumps(run)).items():
        before = other.get(key)
        if before != value:
            if isinstance(value, dict) and isinstance(before, dict):
                inner = next(k for k in {**value, **before} if value.get(k) != before.get(k))
                return f"{key}.{inner} is {before.get(inner)!r:.80}, now {value.get(inner)!r:.80}"
            return f"{key} is {before!r:.80}, now {value!r:.80}"
    return None


def _finished(out: Path, samples: Path | None, run: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        result = json.loads(out.read_text())
        rows = [json.loads(line) for line in samples.read_text().splitlines()] if samples else []
    except (OSError, ValueError) as error:
        raise UserError(
            f"{out} is there, but not a run with its samples ({error}); remove it or name another."
        ) from None
    other = _difference(run, result)
    if other:
        raise UserError(f"{out} holds another run ({other}); remove it or choose another --out.")
    print(f"{out} holds this run already; remove it to run again.")
    return result, rows


def _resume(partial: Path | None, run: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The samples of a run cut short, by (group, wording); starts the file if there is none. A line that was being
    written when the run ended is cut off."""
    if partial is None:
        return {}
    if not partial.exists():
        partial.parent.mkdir(parents=True, exist_ok=True)
        _write_lines(partial, [run])
        return {}
    whole = [line for line in partial.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        before, *rows = [json.loads(line) for line in whole]
    except ValueError:
        raise UserError(f"{partial} is not a run that was cut short; remove it.") from None
    other = _difference(run, before)
    if other:
        raise UserError(f"{partial} belongs to another run ({other}); remove it to start afresh, or use another --out.")
    with open(partial, "r+b") as file:
        file.truncate(sum(map(len, whole)))
    return {(row["group"], row["wording"]): row for row in rows}


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("")
    _append(temporary, rows)
    os.replace(temporary, path)


def _check_writable(path: Path) -> None:
    """Before anything is computed, and without writing anything."""
    there = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not (path.exists() or there.is_dir()) or not os.access(there, os.W_OK):
        what = "is a folder" if path.is_dir() else f"cannot be written ({there} is in the way)"
        raise UserError(f"{path} {what}; choose another file.")


# ---------------------------------------------------------------------------------------------------------------------


@one_line_errors("eval.run")
def main(argv: Sequence[str] | None = None) -> int:
    tasks = "\n".join(f"  {task.name:16s} {task.metric}" for task in TASKS.values())
    parser = argparse.ArgumentParser(
        prog="python -m eval.run",
        description=__doc__,
        epilog=f"tasks and their primary metrics:\n{tasks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a saved model, or a Hub id")
    parser.add_argument("--task", default="nl_rx", help="one of those below (default: %(default)s)")
    parser.add_argument("--data", required=True, help="the task's file, folder, or Hub id")
    parser.add_argument("--out", required=True, type=Path, help="result JSON")
    parser.add_argument("--samples", type=Path, help="one line a question (default: FILE.samples.jsonl beside --out)")
    parser.add_argument("--limit", type=int, help="score the first N groups only")
    parser.add_argument("--max_new_tokens", type=int, help="default: the task's")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--seed", type=int, help="of the model's training, for the record")
    parser.add_argument("--backend", default="transformers", choices=BACKENDS)
    options = vars(parser.parse_args(argv))
    for name in ("limit", "max_new_tokens", "batch_size"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"--{name} must be 1 or more, not {options[name]}.")
    result, _ = score_model(options.pop("model"), options.pop("data"), **options)
    print(table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for figures in result["metrics"].values() for name in figures))
    width = max(len(name) for name in [*names, "12345678"]) + 2
    lines = [" " * 16 + "".join(f"{name:>{width}}" for name in names)]
    for wording, figures in result["metrics"].items():
        cells = (f"{100 * figures[name]:.1f}%" if name in figures else "" for name in names)
        lines.append(f"{wording:16s}" + "".join(f"{cell:>{width}}" for cell in cells))
    lines.append(
        f"{result['items']} items ({result['dropped_as_known_from_train']} dropped, known from train); "
        f"primary metric: {result['primary']}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
