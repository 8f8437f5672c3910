"""One run (a cell) and the plan's two series of runs: `select` on validation, `compare` on test."""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llm_jepa import LLMJEPATrainer, UserError
from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.core.json_files import read_json
from llm_jepa.core.strict_yaml import dump_yaml
from llm_jepa.lm import JEPACollator, add_view_columns, known_predictor_ids, model_from, tokenizer_from

from ... import ranking
from ...provenance import environment, weights_sha256
from .. import small_runs
from ..reranking import embedded
from ..small_runs import answer_of, side_by_side
from . import specialist
from .data import FILES, Job, Questions, load

Plan = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of an arm on a data set (`job`). `start` is the folder of a checkpoint."""

    job: str
    arm: str
    seed: int
    part: str
    start: str
    out: Path


def run_cell(cell: Cell, data: Path, plan: Plan) -> str:
    """Train and judge one cell, unless its result file exists. Returns a line for the log."""
    settings = _settings(cell, plan)
    if cell.out.exists():
        small_runs.refuse_other_settings(cell.out, settings)
    else:
        with tempfile.TemporaryDirectory() as scratch:  # no run keeps its model
            write_json(cell.out, {**settings, **_train_and_judge(cell, data, plan, Path(scratch))})
    return _log_line(cell, read_json(cell.out, is_finite=False))


def _log_line(cell: Cell, result: dict[str, Any]) -> str:
    words = [f"{cell.out.stem:40s}"]
    for wording, metrics in result["generation"].items():
        if wording != "both":
            words.append(f"{wording} right {100 * metrics['equivalent']:5.1f}")
    for name, by_search in result["retrieval"].items():
        of_search = "  ".join(f"{search} {100 * found['recall_at_1']:5.1f}" for search, found in by_search.items())
        words.append(f"R@1 {name}: {of_search}")
    return "  ".join([*words, f"{result['cost']['tokens']:,} tokens, {result['seconds']:.0f} s"])


def _settings(cell: Cell, plan: Plan) -> dict[str, Any]:
    """What a result file says of its run. It names no folder of this machine."""
    start = Path(cell.start)
    settings = {name: value for name, value in asdict(cell).items() if name != "out"}
    settings |= {"start": start.name, "start_sha256": weights_sha256(start)}
    shared = {name: plan[name] for name in ("validation", "training", "model", "learning_rate")}
    own = {name: plan["jobs"][cell.job][name] for name in ("steps", "rows", "lines", "max_new_tokens")}
    settings["setup"] = {**shared, **own, "options": dict(_options(cell, plan))}
    return settings


def _options(cell: Cell, plan: Plan) -> Mapping[str, Any]:
    """The options of the arm; of those that `select` tries, the chosen ones fill the gaps."""
    options: dict[str, Any] = plan["arms"][cell.arm]
    if "contrastive" in options:
        return {**(plan["settled"] or {}), **options}
    return options


def _job(cell: Cell, data: Path, plan: Plan) -> Job:
    own = plan["jobs"][cell.job]
    return load(cell.job, data, rows=own["rows"], validation=plan["validation"], lines=own["lines"])


# -- training ---------------------------------------------------------------------------------------------------------


def _train_and_judge(cell: Cell, data: Path, plan: Plan, scratch: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    started = time.perf_counter()
    job, options = _job(cell, data, plan), dict(_options(cell, plan))
    tokenizer = _tokenizer(cell.start)
    rows = _views(cell, data, plan)
    share = options.pop("contrastive", 0.0)
    budget = plan["jobs"][cell.job]["steps"] * _tokens_of_a_step(rows, plan, tokenizer, scratch)
    set_seed(cell.seed)
    model = model_from(cell.start, dtype=torch.float32, **plan["model"])
    costs, searcher = [], None
    if share < 1:
        lm_options = options if share == 0 else {}
        costs.append(_fine_tune(cell, model, tokenizer, rows, plan, lm_options, (1 - share) * budget, scratch))
    if share > 0:
        source = Path(cell.start)
        if share < 1:
            source = scratch / "answers"
            model.save_pretrained(source)
            tokenizer.save_pretrained(source)
        requests = [row["messages"][-2]["content"] for row in job.train]
        searcher, cost = specialist.fine_tune(
            source,
            requests,
            [answer_of(row) for row in job.train],
            tokens=share * budget,
            pooling=options["pooling"],
            seed=cell.seed,
            training={**_optimiser(plan), "learning_rate": options["learning_rate"]},
            model_options=plan["model"],
            output_dir=scratch,
        )
        specialist.put_into(model, searcher)
        costs.append(cost)
    questions = getattr(job, cell.part)
    generation: dict[str, Any] = {}
    bits: dict[str, Any] = {}
    if cell.part == "test":
        longest = plan["jobs"][cell.job]["max_new_tokens"]
        judged = small_runs.judge(model, tokenizer, questions.prompts, questions.golds, longest, job.grade)
        generation, bits = judged.metrics, dict(judged.bits)
    retrieval, places = _retrieval(model, tokenizer, searcher, questions, plan)
    return {
        "lines": len(questions.golds),
        "generation": generation,
        "bits": bits,
        "retrieval": retrieval,
        "ranks": places,
        "cost": {
            "tokens": sum(cost["tokens"] for cost in costs),
            "process_seconds": round(sum(cost["process_seconds"] for cost in costs), 1),
            "stages": costs,
        },
        "bytes_to_serve": model.get_memory_footprint(),
        "data_sha256": {name: file_sha256(data / cell.job / name) for name in FILES[cell.job]},
        "environment": environment("sentence_transformers"),
        "seconds": round(time.perf_counter() - started, 1),
    }


@functools.cache
def _shared_tokenizer(start: str) -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_from(start)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # like the trainer
    return tokenizer


def _tokenizer(start: str) -> PreTrainedTokenizerBase:
    """A copy, because predictor tokens are added to it."""
    return copy.deepcopy(_shared_tokenizer(start))


def _views(cell: Cell, data: Path, plan: Plan) -> Dataset:
    add_views = functools.partial(add_view_columns, tokenizer=_shared_tokenizer(cell.start))
    return Dataset.from_list([add_views(row, i) for i, row in enumerate(_job(cell, data, plan).train)])


def _optimiser(plan: Plan) -> dict[str, Any]:
    """The training arguments that both libraries have."""
    ours = ("share_rows", "activation_checkpointing")
    return {name: value for name, value in plan["training"].items() if name not in ours}


def _tokens_of_a_step(rows: Dataset, plan: Plan, tokenizer: PreTrainedTokenizerBase, scratch: Path) -> float:
    """The tokens of a step with the views of the JEPA arms; every arm may use as many tokens as these."""
    args = _arguments(plan, scratch, 1, objective="info_nce", jepa_weight=0.1)
    return args.per_device_train_batch_size * small_runs.tokens_of(rows, args, tokenizer)


def _arguments(plan: Plan, scratch: Path, steps: int, **options: Any) -> Any:
    return small_runs.arguments(scratch, steps, **{**plan["training"], **options})


def _fine_tune(
    cell: Cell,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    plan: Plan,
    options: Mapping[str, Any],
    tokens: float,
    scratch: Path,
) -> dict[str, Any]:
    """Train with the LM loss, and with the JEPA term if the options have a weight, for so many tokens."""
    options = {"jepa_weight": 0.0, **options, "learning_rate": plan["learning_rate"], "seed": cell.seed}
    a_row = small_runs.tokens_of(rows, _arguments(plan, scratch, 1, **options), tokenizer)
    steps = max(1, round(tokens / (a_row * plan["training"]["per_device_train_batch_size"])))
    trainer = LLMJEPATrainer(model, _arguments(plan, scratch, steps, **options), rows, processing_class=tokenizer)
    return small_runs.train(trainer)


# -- judging ----------------------------------------------------------------------------------------------------------


def _retrieval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, searcher: Any, questions: Questions, plan: Plan
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[int]]]]:
    """(figures, ranks) by read-out, then by search.

    Read-outs: "specialist", sentence-transformers' vectors, if it trained the model; else "views", our embeddings, and
    "mean", the mean state of the bare texts. Searches: "WORDING to answer" finds the answer among all answers; "WORDING
    to WORDING" finds the request for the same answer among those in the other wording, or among the other requests if
    there is one wording. The states are computed as in training (bfloat16 or not).
    """
    by_readout = {}
    with torch.autocast("cpu", torch.bfloat16, enabled=plan["training"].get("bf16", False)):
        if searcher is not None:
            by_readout["specialist"] = _bare_texts(searcher, questions)
        else:
            by_readout["views"] = _views_of(model, tokenizer, questions)
            by_readout["mean"] = _bare_texts(specialist.mean_of_states(model, tokenizer), questions)
    figures: dict[str, dict[str, Any]] = {}
    places: dict[str, dict[str, list[int]]] = {}
    for readout, (requests, answers) in by_readout.items():
        ranks = dict(searches(requests, answers, questions.golds))
        figures[readout] = {search: ranking.figures(places_of) for search, places_of in ranks.items()}
        places[readout] = {search: places_of.tolist() for search, places_of in ranks.items()}
    return figures, places


def _bare_texts(encoder: Any, questions: Questions) -> tuple[dict[str, Tensor], Tensor]:
    """(requests by wording, answers), [N, D] each."""
    requests = {}
    for wording, prompts in questions.prompts.items():
        requests[wording] = specialist.encode(encoder, [prompt[-1]["content"] for prompt in prompts])
    return requests, specialist.encode(encoder, questions.golds)


def _views_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Questions
) -> tuple[dict[str, Tensor], Tensor]:
    """(requests by wording, answers), [N, D] each: the two embeddings of the JEPA term."""
    assert isinstance(tokenizer.pad_token_id, int)
    collator = JEPACollator(tokenizer.pad_token_id, known_predictor_ids(tokenizer))
    requests, answers = {}, torch.empty(0)
    for wording, prompts in questions.prompts.items():
        rows = [
            {"messages": [*prompt, {"role": "assistant", "content": gold}]}
            for prompt, gold in zip(prompts, questions.golds, strict=True)
        ]
        views = [add_view_columns(row, i, tokenizer=tokenizer) for i, row in enumerate(rows)]
        requests[wording], answers = embedded(model, views, collator)
    return requests, answers


def searches(requests: Mapping[str, Tensor], answers: Tensor, golds: Sequence[str]) -> list[tuple[str, Tensor]]:
    """(name of the search, ranks of the right documents [Q]); see `_retrieval`."""
    unit = {wording: F.normalize(vectors, dim=1) for wording, vectors in requests.items()}
    documents = F.normalize(answers, dim=1)
    found = [(f"{name} to answer", ranking.ranks(one @ documents.T, golds, golds)) for name, one in unit.items()]
    if len(unit) > 1:
        for name, other in itertools.permutations(unit, 2):
            found.append((f"{name} to {other}", ranking.ranks(unit[name] @ unit[other].T, golds, golds)))
        return found
    ((name, vectors),) = unit.items()
    similarity = (vectors @ vectors.T).fill_diagonal_(-torch.inf)  # a request does not find itself
    asked = [i for i, gold in enumerate(golds) if list(golds).count(gold) > 1]
    keys = [golds[i] for i in asked]
    return [*found, (f"{name} to {name}", ranking.ranks(similarity[asked], keys, golds))]


# -- series of runs ---------------------------------------------------------------------------------------------------


def select(data: Path, plan: Plan, start: str, out: Path, jobs: int) -> None:
    """Select learning rate and pooling of the specialist by R@1 on validation. Print the plan's block `settled`."""
    grid = plan["selection"]
    options = [
        {"learning_rate": rate, "pooling": pooling}
        for rate, pooling in itertools.product(grid["learning_rate"], grid["pooling"])
    ]
    names = [f"contrastive-{each['learning_rate']:g}-{each['pooling']}" for each in options]
    arms = {name: {"contrastive": 1.0, **each} for name, each in zip(names, options, strict=True)}
    cells = [
        Cell(grid["job"], name, seed, "validation", start, out / "selection" / f"{name}-seed{seed}.json")
        for name in names
        for seed in grid["seeds"]
    ]
    for line in side_by_side(run_cell, cells, jobs, data, {**plan, "arms": arms}):
        print(line, flush=True)
    by_name: dict[str, list[float]] = {name: [] for name in names}
    for cell in cells:
        by_search = read_json(cell.out, is_finite=False)["retrieval"]["specialist"]
        to_answer = [found["recall_at_1"] for search, found in by_search.items() if search.endswith(" to answer")]
        by_name[cell.arm].append(statistics.mean(to_answer))
    best = max(names, key=lambda name: statistics.mean(by_name[name]))
    print("settled:\n" + dump_yaml(options[names.index(best)]))


def compare(data: Path, plan: Plan, start: str, out: Path, jobs: int) -> None:
    """Run all arms, one data set after the other, seed by seed: if you stop early, the finished seeds are whole."""
    if plan["settled"] is None:
        raise UserError("The plan has no `settled` settings yet; run select, write them there and commit the plan.")
    cells = []
    for name, of_job in plan["jobs"].items():
        for seed, arm in itertools.product(of_job["seeds"], of_job["arms"]):
            cells.append(Cell(name, arm, seed, "test", start, result_file(name, arm, seed, out)))
    for line in side_by_side(run_cell, cells, jobs, data, plan):
        print(line, flush=True)


def result_file(job: str, arm: str, seed: int, out: Path) -> Path:
    return out / "compare" / f"{job}-{arm}-seed{seed}.json"
