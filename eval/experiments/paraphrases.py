"""Does an embedding objective use unlabelled paraphrases better than training on their tokens?

    python -m eval.experiments.paraphrases prepare --data FOLDER   # split the data, train the base model; minutes
    python -m eval.experiments.paraphrases select                  # the plan's grid on validation
    python -m eval.experiments.paraphrases confirm        # arms x seeds on test, with what the plan has settled
    python -m eval.experiments.paraphrases analyse        # the plan's analysis of the committed result files

eval/plans/paraphrases.yaml is the plan: question, arms, primary metric, analysis and stopping rule in words, and, as
values, every setting that was chosen. It was committed before the first test run. A run whose result file exists is not
repeated, so that each step can be stopped and started again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_jepa import LLMJEPATrainer, UserError, cli, generate
from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.lm.batching import JEPACollator
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.lm.loading import model_from, tokenizer_from
from llm_jepa.lm.predictor_tokens import known_predictor_ids
from llm_jepa.lm.views import add_view_columns
from llm_jepa.synthetic import nl_rx as generator

from .. import graders
from ..figures.inference import detectable_difference, equivalence, hierarchical, holm, show_p, t_interval, t_test
from ..graders.regexes import language
from ..provenance import environment, weights_sha256
from ..tasks import nl_rx
from . import small_runs
from .reranking import Similarity, contrastive_head, embedded, log_probabilities, rerank, risk_coverage, sample
from .small_runs import BATCH, MAX_NEW_TOKENS, derangement, side_by_side, with_targets_of

PLAN = Path(__file__).parents[1] / "plans" / "paraphrases.yaml"
RESULTS = Path(__file__).parents[1] / "results" / "paraphrases"
RECIPE = PLAN.with_name("paraphrase-base.yaml")
FILES = ("synth_train.jsonl", "turk_train.jsonl", "synth_test.jsonl", "turk_test.jsonl")

REWRITE = "Say the same in other words."
WORDINGS = ("synth", "turk")
# Training rows of a line, in the order in which the views of all lines are stored.
SYNTH_TO_REGEX, TURK_TO_REGEX, SYNTH_TO_TURK, TURK_TO_SYNTH = range(4)
NO_GRADIENT = 1 / 3  # cost of a token that is only read, in tokens that are learnt from


@dataclass(frozen=True)
class Line:
    """A request in two wordings, the regex, and the part of the data that all regexes of its language belong to."""

    synth: str
    turk: str
    regex: str
    part: str


@dataclass(frozen=True)
class Arm:
    """What a run learns from. `pairs`: the JEPA term's targets are the rows' own, or those of other rewritings."""

    labels: str  # "few" in synth wording, or "all" in both
    rewriting: bool = True
    pairs: str = "none"  # "own", "shuffled"
    consistency: bool = False


ARMS = {
    "sft": Arm("few", rewriting=False),
    "rewriting": Arm("few"),
    "info_nce": Arm("few", pairs="own"),
    "shuffled": Arm("few", pairs="shuffled"),
    "consistency": Arm("few", consistency=True),
    "ceiling": Arm("all", rewriting=False),
}


@dataclass(frozen=True)
class Settings:
    """Of one run; the plan's `settled` holds those of the confirmatory ones."""

    budget_tokens: int
    learning_rate: float
    jepa_weight: float
    readout: str  # "last", of one predictor token, or "mean", without
    consistency_weight: float
    sft_share: float  # of the budget; the arm with few labels and nothing else overfits on all of it


# -- data -------------------------------------------------------------------------------------------------------------


def split_lines(data: Path) -> list[Line]:
    """All 10,000 pairs, split by *language* of the regex: 70 % of them train, 10 % validation, 20 % test.

    Languages that match nothing or everything are train (a constant answer would score 15.6 % on the published test
    file). A line leaves validation and test if one of its texts stands in train.

    Raises UserError for a folder without the four files, or files that do not line up.
    """
    missing = [name for name in FILES if not (data / name).is_file()]
    if missing:
        raise UserError(f"{data} lacks {', '.join(missing)}; point --data at the NL-RX folder.")
    columns = [nl_rx.read_conversations(data / name) for name in FILES]
    for one, other in ((0, 1), (2, 3)):
        if len(columns[one]) != len(columns[other]):
            raise UserError(
                f"{FILES[one]} has {len(columns[one])} lines, {FILES[other]} {len(columns[other])}: no pairs."
            )
    pairs = [*zip(columns[0], columns[1], strict=True), *zip(columns[2], columns[3], strict=True)]
    parts: dict[str, str] = {}
    lines = []
    for number, (synth, turk) in enumerate(pairs, 1):
        regex = synth[-1]["content"]
        if turk[-1]["content"] != regex:
            raise UserError(f"Pair {number} of {data} asks for two regexes; synth and turk files must line up.")
        if regex not in parts:
            parts[regex] = _part(regex)
        lines.append(Line(synth[-2]["content"], turk[-2]["content"], regex, parts[regex]))
    known = {text for line in lines if line.part == "train" for text in (line.synth, line.turk)}
    return [line for line in lines if line.part == "train" or not {line.synth, line.turk} & known]


def _part(regex: str) -> str:
    found = language(regex)
    if found.is_empty or found.is_everything:
        return "train"
    return (*["train"] * 7, "validation", "test", "test")[int(found.key[:12], 16) % 10]


def messages(system: str, text: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def rows_of(line: Line) -> list[dict[str, Any]]:
    ask = generator.SYSTEM_PROMPT
    return [
        {"messages": messages(ask, line.synth, line.regex)},
        {"messages": messages(ask, line.turk, line.regex)},
        {"messages": messages(REWRITE, line.synth, line.turk)},
        {"messages": messages(REWRITE, line.turk, line.synth)},
    ]


def base_rows(num_regexes: int) -> list[dict[str, Any]]:
    """Generated text in wordings that are not NL-RX's: half asks for the regex, half for the same in other words."""
    wordings = generator.TRAIN_WORDINGS
    said = [generator.generate(num_regexes, wordings=(wording,)) for wording in wordings]
    rng = random.Random("base rows")
    rows = []
    for i in range(num_regexes):
        one, other = rng.sample(wordings, 2)
        rows.append(said[one][i])
        rows.append({"messages": messages(REWRITE, *(said[w][i]["messages"][1]["content"] for w in (one, other)))})
    rng.shuffle(rows)
    return rows


def prepare(data: Path, work: Path, plan: dict[str, Any]) -> None:
    """Everything that all runs share: the split, the base model, the views of all training rows."""
    work.mkdir(parents=True, exist_ok=True)
    lines = split_lines(data)
    counts = {part: sum(line.part == part for line in lines) for part in ("train", "validation", "test")}
    print(f"lines: {counts}")
    rows = base_rows(plan["base_regexes"])
    (work / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The words of the data are no secret, its labels are: the tokenizer sees the texts of train, and generated regexes.
    texts = [{"prompt": line.synth, "completion": line.turk} for line in lines if line.part == "train"]
    train_tokenizer([*rows, *texts], plan["vocabulary"]).save_pretrained(work / "tokenizer")
    overrides = ["--train_data", str(work / "base.jsonl"), "--tokenizer_name_or_path", str(work / "tokenizer")]
    overrides += ["--output_dir", str(work / "base")] + ([] if sys.stderr.isatty() else ["--disable_tqdm", "true"])
    if (work / "base").exists():  # goes on, or is finished; another run's folder is refused
        overrides += ["--resume_from_checkpoint", "true"]
    if cli.main(["train", str(RECIPE), *overrides]):
        raise UserError("The base model could not be trained; see above.")
    save_prepared(work, data, lines)


def save_prepared(work: Path, data: Path, lines: Sequence[Line]) -> None:
    """The split, and the views of all training rows: four a line, in the order of `rows_of`."""
    tokenizer = tokenizer_from(str(work / "base"))
    train = [row for line in lines if line.part == "train" for row in rows_of(line)]
    views = Dataset.from_list([add_view_columns(row, i, tokenizer=tokenizer) for i, row in enumerate(train)])
    shutil.rmtree(work / "views", ignore_errors=True)
    views.save_to_disk(work / "views")
    hashes = {name: file_sha256(data / name) for name in FILES}
    write_json(work / "split.json", {"data_sha256": hashes, "lines": [asdict(line) for line in lines]})


@functools.cache
def prepared(work: Path) -> tuple[list[Line], Dataset, dict[str, str]]:
    """(lines, views of the training rows, hashes of the data files), once per process."""
    if not (work / "split.json").is_file():
        raise UserError(
            f"{work} is not prepared; run python -m eval.experiments.paraphrases prepare --data FOLDER first."
        )
    split = json.loads((work / "split.json").read_text())
    return [Line(**line) for line in split["lines"]], load_from_disk(work / "views"), split["data_sha256"]


# -- one run ----------------------------------------------------------------------------------------------------------


def training_rows(arm: Arm, seed: int, views: Dataset, *, num_labels: int) -> tuple[list[int], list[int], Dataset]:
    """(labelled lines, lines whose pair of wordings is used, the rows of one pass): the seed draws all of it.

    Half of the rows ask for regexes, half for rewriting; the smaller half is repeated.
    """
    rng = random.Random(f"labels {seed}")
    num_lines = len(views) // 4
    few = sorted(rng.sample(range(num_lines), num_labels))
    others = [line for line in range(num_lines) if line not in set(few)]
    if arm.labels == "all":
        labelled = [4 * line + kind for line in range(num_lines) for kind in (SYNTH_TO_REGEX, TURK_TO_REGEX)]
    else:
        labelled = [4 * line + SYNTH_TO_REGEX for line in few]
    if not arm.rewriting:
        return few, [], views.select(labelled)
    rewriting = [4 * line + kind for line in others for kind in (SYNTH_TO_TURK, TURK_TO_SYNTH)]
    rows = views.select([*_repeated(labelled, len(rewriting), rng), *rewriting])
    if arm.pairs == "shuffled":
        # Each rewriting row predicts what another one says: the same texts, the same loss, no meaning.
        partner, half = derangement(others, rng), len(rewriting)
        place = {row: half + i for i, row in enumerate(rewriting)}
        rows = with_targets_of(rows, [*range(half), *(place[4 * partner[row // 4] + row % 4] for row in rewriting)])
    return few, others, rows


def _repeated(items: Sequence[int], length: int, rng: random.Random) -> list[int]:
    found: list[int] = []
    while len(found) < length:
        found += rng.sample(items, len(items))
    return found[:length]


def train(
    name: str, seed: int, settings: Settings, work: Path, plan: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """(model, tokenizer, cost) of one arm, from the base, at the tokens of the budget."""
    arm = ARMS[name]
    lines, views, _ = prepared(work)
    train_lines = [line for line in lines if line.part == "train"]
    few, others, rows = training_rows(arm, seed, views, num_labels=plan["labels"])
    model, tokenizer = model_from(str(work / "base"), dtype=torch.float32), tokenizer_from(str(work / "base"))
    options: dict[str, Any] = {"learning_rate": settings.learning_rate, "seed": seed, "jepa_weight": 0.0}
    if arm.pairs != "none":
        predictors = int(settings.readout == "last")
        options |= {
            "jepa_weight": settings.jepa_weight,
            "num_predictor_tokens": predictors,
            "readout": settings.readout,
        }
    args = small_runs.arguments(work / "trainer", 1, **options)
    per_step = BATCH * small_runs.tokens_of(rows, args, tokenizer)
    budget = settings.budget_tokens * (settings.sft_share if name == "sft" else 1)
    extra, steps = None, round(budget / per_step)
    if arm.consistency:
        extra = Consistency([train_lines[i] for i in others], tokenizer, seed, settings.consistency_weight)
        steps = extra.plan_steps(budget, per_step, [train_lines[i] for i in few])
    args = small_runs.arguments(work / "trainer", steps, **options)
    trainer = ConsistentTrainer(model, args, rows, processing_class=tokenizer)
    trainer.consistency = extra
    cost = small_runs.train(trainer)
    if extra is not None:
        cost["tokens"] += round(extra.tokens)
    return trainer.model, tokenizer, cost


class Consistency:
    """Output consistency: KL(p(. | synth, y<t) || p(. | turk, y<t)) over the tokens of y, the model's own greedy answer
    to the synth wording, found once at a quarter of the run. The synth side is not moved (UDA, arXiv:1904.12848).

    `tokens`: what it has cost, in tokens that are learnt from.
    """

    PAIRS = 16  # a step
    STARTS_AT = 0.25  # of the run: before, the model has no answer worth repeating

    def __init__(self, lines: Sequence[Line], tokenizer: PreTrainedTokenizerBase, seed: int, weight: float) -> None:
        self.lines = random.Random(f"consistency {seed}").sample(lines, len(lines))
        self.tokenizer, self.weight, self.tokens = tokenizer, weight, 0.0
        self.start = 0
        self.answers: list[str] = []

    def plan_steps(self, budget: float, tokens_per_step: float, labelled: Sequence[Line]) -> int:
        """Steps that cost the budget. A pair costs what labelled rows do: one side learnt from, one read, and before
        that the greedy answer."""
        mean = sum(len(self._ids(line.synth, line.regex)[0]) for line in labelled) / len(labelled)
        late = self.PAIRS * mean * (1 + NO_GRADIENT + NO_GRADIENT)
        steps = round(budget / (tokens_per_step + (1 - self.STARTS_AT) * late))
        self.start = round(self.STARTS_AT * steps)
        self.lines = self.lines[: (steps - self.start) * self.PAIRS]
        return steps

    def loss(self, model: PreTrainedModel, step: int) -> Tensor | None:
        if step < self.start:
            return None
        if not self.answers:
            prompts = [messages(generator.SYSTEM_PROMPT, line.synth) for line in self.lines]
            found = generate(model, self.tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=256)
            self.answers = [generation.text for generation in found]
            rows = [self._ids(line.synth, text)[0] for line, text in zip(self.lines, self.answers, strict=True)]
            self.tokens += NO_GRADIENT * sum(map(len, rows))
        first = (step - self.start) * self.PAIRS
        chosen = [i for i in range(first, first + self.PAIRS) if i < len(self.lines) and self.answers[i]]
        if not chosen:
            return None
        sides = [[self._ids(getattr(self.lines[i], w), self.answers[i]) for i in chosen] for w in WORDINGS]
        with torch.no_grad():
            teacher = self._log_probabilities(model, sides[0])
        student = self._log_probabilities(model, sides[1])
        self.tokens += sum(len(ids) for ids, _ in sides[1]) + NO_GRADIENT * sum(len(ids) for ids, _ in sides[0])
        return self.weight * F.kl_div(student, teacher, log_target=True, reduction="sum") / len(student)

    def _ids(self, text: str, answer: str) -> tuple[list[int], int]:
        """Token ids of the whole turn, and how many of them are prompt."""
        template = functools.partial(self.tokenizer.apply_chat_template, tokenize=False)
        prompt = template(messages(generator.SYSTEM_PROMPT, text), add_generation_prompt=True)
        tail = self.tokenizer(answer, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        head = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return head + tail, len(head)

    def _log_probabilities(self, model: PreTrainedModel, rows: Sequence[tuple[list[int], int]]) -> Tensor:
        """[answer tokens of all rows, V]: the same answers in the same order for both sides."""
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows], device=model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows], device=model.device)
        keep = torch.zeros_like(mask, dtype=torch.bool)
        for row, (tokens, prompt) in enumerate(rows):
            keep[row, prompt - 1 : len(tokens) - 1] = True
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[keep].float().log_softmax(dim=-1)


class ConsistentTrainer(LLMJEPATrainer):
    """`LLMJEPATrainer`, plus `consistency` where an arm has it."""

    consistency: Consistency | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        more = self.consistency.loss(model, self.state.global_step) if self.consistency is not None else None
        return loss if more is None else loss + more


def uses_of_the_space(
    name: str,
    seed: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[Line],
    readout: str,
    work: Path,
    plan: dict[str, Any],
) -> dict[str, Any]:
    """Reranking of samples and abstention on the turk wording, by similarity, log-probability and vote.

    Similarity is the cosine of the JEPA term where the arm has it; else that of a contrastive head trained on the
    frozen states of the same rows, for as many labels.
    """
    ask = [messages(generator.SYSTEM_PROMPT, line.turk) for line in lines]
    greedy = [g.text for g in generate(model, tokenizer, ask, max_new_tokens=MAX_NEW_TOKENS, batch_size=256)]
    samples = sample(
        model, tokenizer, ask, num_samples=plan["rerank"]["samples"], max_new_tokens=MAX_NEW_TOKENS, seed=seed
    )
    groups = [[one, *more] for one, more in zip(greedy, samples, strict=True)]
    grades = [
        [graders.regex(line.regex, text, True) for text in group] for line, group in zip(lines, groups, strict=True)
    ]
    correct = [[grade.scores["equivalent"] == 1 for grade in group] for group in grades]
    collator = JEPACollator(tokenizer.pad_token_id, known_predictor_ids(tokenizer), readout=readout)
    similarity: Similarity = F.cosine_similarity
    if ARMS[name].pairs == "none":
        rows = training_rows(ARMS[name], seed, prepared(work)[1], num_labels=plan["labels"])[2]
        predicted, target = embedded(model, rows, collator)
        similarity = contrastive_head(predicted, target, torch.tensor(rows["target_key"]), seed=seed)
    # An empty answer has no view: to similarity and log-probability it is the worst of its group.
    answers = [(i, text) for i, group in enumerate(groups) for text in dict.fromkeys(group) if text]
    views = [
        add_view_columns({"messages": messages(generator.SYSTEM_PROMPT, lines[i].turk, text)}, i, tokenizer=tokenizer)
        for i, text in answers
    ]
    by_score = {
        "similarity": similarity(*embedded(model, views, collator)).tolist(),
        "log_probability": log_probabilities(model, views, tokenizer.pad_token_id).tolist(),
    }
    scores = {
        score: [[known.get((i, text), -math.inf) for text in group] for i, group in enumerate(groups)]
        for score, values in by_score.items()
        for known in [dict(zip(answers, values, strict=True))]
    }
    # The greedy answer is judged by the share of samples that mean the same as it does.
    keys = [[grade.answer_key for grade in group] for group in grades]
    scores["votes"] = [[sum(key == other for other in group[1:]) for key in group] for group in keys]
    first, rest = [row[0] for row in correct], [row[1:] for row in correct]
    return {
        "lines": len(lines),
        "greedy": statistics.mean(first),
        "any_sample": statistics.mean(any(row) for row in rest),
        "reranked": {
            name: rerank([s[1:] for s in score], [row[1:] for row in correct]) for name, score in scores.items()
        },
        "abstention": {name: risk_coverage([s[0] for s in score], first) for name, score in scores.items()},
    }


@dataclass(frozen=True)
class Cell:
    """One run: what, with what, judged on which part, written where."""

    arm: str
    seed: int
    settings: Settings
    part: str
    out: Path


def run_cell(cell: Cell, work: Path, plan: dict[str, Any]) -> str:
    """Train and score one cell; returns a line for the log. A cell whose file exists is left alone."""
    if cell.out.exists():
        what = {"arm": cell.arm, "seed": cell.seed, "part": cell.part, "settings": asdict(cell.settings)}
        small_runs.refuse_other_settings(cell.out, what)
    else:
        torch.set_num_threads(1)
        started = time.perf_counter()
        lines, _, hashes = prepared(work)
        test = [line for line in lines if line.part == cell.part]
        model, tokenizer, cost = train(cell.arm, cell.seed, cell.settings, work, plan)
        prompts = {w: [messages(generator.SYSTEM_PROMPT, getattr(line, w)) for line in test] for w in WORDINGS}
        judged = small_runs.judge(model, tokenizer, prompts, [line.regex for line in test])
        space = None
        if cell.part == "test" and cell.arm in plan["rerank"]["arms"]:
            few = test[: plan["rerank"]["lines"]]
            space = uses_of_the_space(cell.arm, cell.seed, model, tokenizer, few, cell.settings.readout, work, plan)
        result = {
            "arm": cell.arm,
            "seed": cell.seed,
            "part": cell.part,
            "lines": len(test),
            "settings": asdict(cell.settings),
            "metrics": judged.metrics,
            "correct": judged.correct,
            "space": space,
            "cost": cost,
            "base_sha256": weights_sha256(work / "base"),
            "data_sha256": hashes,
            "environment": environment(),
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_json(cell.out, result)
    found = json.loads(cell.out.read_text())
    turk = found["metrics"]["turk"]
    return (
        f"{cell.out.stem:50s} turk equal {100 * turk['equivalent']:5.1f} exact {100 * turk['exact']:5.1f} "
        f"synth equal {100 * found['metrics']['synth']['equivalent']:5.1f}  {found['cost']['steps']} steps, "
        f"{found['cost']['tokens']:,} tokens, {found['seconds']:.0f} s"
    )


# -- the plan's steps -------------------------------------------------------------------------------------------------


def select(work: Path, plan: dict[str, Any], jobs: int) -> None:
    """The plan's grid, one key after the other in its order; prints the settings that validation prefers."""
    settings = Settings(**plan["start"])
    for stage in plan["grid"]:
        arm, names = stage["arm"], list(stage["values"])
        cells: dict[Settings, list[Cell]] = {}
        for values in itertools.product(*stage["values"].values()):
            option = dict(zip(names, values, strict=True))
            name = "-".join([arm, *(f"{key}={value}" for key, value in option.items())])
            tried = replace(settings, **option)
            cells[tried] = [
                Cell(arm, seed, tried, "validation", RESULTS / "selection" / f"{name}-seed{seed}.json")
                for seed in plan["selection_seeds"]
            ]
        for line in side_by_side(run_cell, [cell for group in cells.values() for cell in group], jobs, work, plan):
            print(line, flush=True)
        turk = {
            tried: statistics.mean(_turk(json.loads(cell.out.read_text())) for cell in group)
            for tried, group in cells.items()
        }
        settings = max(turk, key=lambda tried: turk[tried])
        for tried, mean in turk.items():
            print(f"{arm} { ({name: getattr(tried, name) for name in names}) }: turk equal {100 * mean:.1f}")
    print("settled:\n" + yaml.safe_dump(asdict(settings), sort_keys=False))


def _turk(result: dict[str, Any]) -> float:
    equal: float = result["metrics"]["turk"]["equivalent"]
    return equal


def confirm(work: Path, plan: dict[str, Any], jobs: int) -> None:
    """Seed by seed, all arms: stopped early, there are whole seeds."""
    if plan["settled"] is None:
        raise UserError(f"{PLAN.name} has no `settled` settings yet; run select, write them there and commit the plan.")
    settings = Settings(**plan["settled"])
    cells = [
        Cell(arm, seed, settings, "test", RESULTS / "confirm" / f"{arm}-seed{seed}.json")
        for seed in plan["seeds"]
        for arm in plan["arms"]
    ]
    write_json(RESULTS / "test_lines.json", facts_of_test_lines(work))
    for line in side_by_side(run_cell, cells, jobs, work, plan):
        print(line, flush=True)


def facts_of_test_lines(work: Path) -> dict[str, list[Any]]:
    """Of each test line, in the order of the result files' bits: its language, and whether the base's training rows
    hold a regex of that language."""
    base = [json.loads(row)["messages"] for row in (work / "base.jsonl").read_text().splitlines()]
    known = {language(m[-1]["content"]).key for m in base if m[0]["content"] == generator.SYSTEM_PROMPT}
    keys = [language(line.regex).key for line in prepared(work)[0] if line.part == "test"]
    return {"language": [key[:12] for key in keys], "in_base": [key in known for key in keys]}


def confirmed(plan: dict[str, Any], folder: Path = RESULTS / "confirm") -> dict[tuple[str, int], dict[str, Any]]:
    """(arm, seed) -> result file, of the seeds for which every arm is there, in the plan's order.

    Raises UserError for fewer than two such seeds, and for runs that do not belong together.
    """
    paths = {(arm, seed): folder / f"{arm}-seed{seed}.json" for arm in plan["arms"] for seed in plan["seeds"]}
    seeds = [seed for seed in plan["seeds"] if all(paths[arm, seed].is_file() for arm in plan["arms"])]
    if len(seeds) < 2:
        raise UserError(f"{folder} holds {len(seeds)} whole seed(s) of {plan['arms']}; run confirm first.")
    runs = {key: json.loads(path.read_text()) for key, path in paths.items() if key[1] in seeds}
    same = ("data_sha256", "base_sha256", "settings", "part", "lines")
    kinds = {json.dumps([run[name] for name in same], sort_keys=True) for run in runs.values()}
    if len(kinds) > 1:
        raise UserError(f"The runs in {folder} are of {len(kinds)} data sets, bases or settings; remove the odd ones.")
    return runs


def analyse(plan: dict[str, Any], folder: Path = RESULTS / "confirm") -> dict[str, Any]:
    """The plan's analysis of the seeds for which every arm is there. Differences in points of turk equality.

    Primary: `plan["primary"]`, with its hierarchical interval (seeds and lines), paired t test over seeds, and the
    equivalence test at the plan's margin. The other comparisons are secondary: Holm's p over all of them.
    """
    runs = confirmed(plan, folder)
    seeds = sorted({seed for _, seed in runs}, key=plan["seeds"].index)
    figures: dict[str, Any] = {"seeds": seeds, "lines": runs[plan["arms"][0], seeds[0]]["lines"], "arms": {}}
    for arm in plan["arms"]:
        values = {
            f"{wording} {metric}": [runs[arm, seed]["metrics"][wording][metric] for seed in seeds]
            for wording in WORDINGS
            for metric in ("equivalent", "exact", "startswith", "contains", "stop_rate")
        }
        values |= {
            name: [runs[arm, seed]["metrics"]["both"][name] for seed in seeds]
            for name in ("consistent", "consistent_and_correct")
        }
        values |= {name: [runs[arm, seed]["cost"][name] for seed in seeds] for name in ("steps", "tokens")}
        figures["arms"][arm] = {name: [statistics.mean(v), statistics.stdev(v)] for name, v in values.items()}
    correct = {key: np.array([int(bit) for bit in run["correct"]["turk"]]) for key, run in runs.items()}
    facts = json.loads((folder.parent / "test_lines.json").read_text())
    languages, place = np.unique(facts["language"], return_inverse=True)

    def differences(one: str, other: str) -> np.ndarray:
        return 100.0 * np.stack([correct[one, seed] - correct[other, seed] for seed in seeds])

    def compare(one: str, other: str, num_tests: int = 1) -> dict[str, Any]:
        difference = differences(one, other)
        by_seed = difference.mean(axis=1)
        same = equivalence(by_seed, plan["margin_points"])
        return {
            "by_seed": [round(value, 2) for value in by_seed.tolist()],
            "hierarchical": hierarchical(difference)._asdict(),
            "t_interval": t_interval(by_seed)._asdict(),
            "p": t_test(by_seed),
            "equivalence": {"interval_90": same.interval._asdict(), "within_margin": same.equivalent},
            "detectable": detectable_difference(float(by_seed.std(ddof=1)), len(seeds), num_tests=num_tests),
        }

    # Not in the plan: is it the lines whose language the base has seen, or the few languages with many lines?
    difference = differences(*plan["primary"])
    counted_once = np.stack([np.bincount(place, row) / np.bincount(place) for row in difference])
    figures["sensitivity"] = {
        "language not in base": hierarchical(difference[:, ~np.array(facts["in_base"])])._asdict(),
        "lines of a language not in base": int(sum(not known for known in facts["in_base"])),
        "each language once": hierarchical(counted_once)._asdict(),
        "languages": len(languages),
    }
    figures["primary"] = {"arms": plan["primary"], **compare(*plan["primary"])}
    planned = plan["secondary"]
    secondary = {f"{one} - {other}": compare(one, other, len(planned)) for one, other in planned}
    for name, p in holm({name: found["p"] for name, found in secondary.items()}).items():
        secondary[name]["p_holm"] = p
    return {**figures, "secondary": secondary}


def table(figures: dict[str, Any]) -> str:
    """Markdown: the arms, then the planned differences."""
    shown = ("turk equivalent", "turk exact", "turk startswith", "turk stop_rate", "synth equivalent", "consistent")
    names = {"equivalent": "equal language", "stop_rate": "stops", "consistent": "same answer to both"}
    title = lambda name: " ".join(names.get(word, word) for word in name.split())  # noqa: E731
    lines = ["| arm | steps | tokens | " + " | ".join(map(title, shown)) + " |", "|---|" + "---:|" * (len(shown) + 2)]
    for arm, values in figures["arms"].items():
        cells = [f"{values['steps'][0]:.0f}", f"{values['tokens'][0] / 1000:,.0f}k"]
        cells += [f"{100 * mean:.1f} ± {100 * sd:.1f}" for mean, sd in (values[name] for name in shown)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| turk, equal language, points | | 95 %, seeds (t) | seeds and lines | p | by seed | detectable |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    primary = figures["primary"]
    rows = [(f"**{' - '.join(primary['arms'])}** (primary)", primary, show_p(primary["p"]))]
    rows += [(name, found, f"{show_p(found['p_holm'])} (Holm)") for name, found in figures["secondary"].items()]
    for name, found, p in rows:
        (mean, *t), (_, *crossed) = found["t_interval"].values(), found["hierarchical"].values()
        lines.append(
            f"| {name} | {mean:+.1f} | {t[0]:+.1f} to {t[1]:+.1f} | {crossed[0]:+.1f} to {crossed[1]:+.1f} | {p} | "
            f"{', '.join(f'{gain:+.1f}' for gain in found['by_seed'])} | {found['detectable']:.1f} |"
        )
    return "\n".join(lines)


def space_table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: what similarity, log-probability and votes make of the same samples, by arm; mean over its runs."""
    lines = [
        "| arm | greedy | 8 samples: any right | picked by similarity | by log-probability a token | by vote | "
        "abstention, AURC: similarity | log-probability a token | vote |",
        "|---|" + "---:|" * 8,
    ]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        spaces = [run["space"] for run in runs if run["arm"] == arm]
        values = [[100 * space["greedy"] for space in spaces], [100 * space["any_sample"] for space in spaces]]
        scores = ("similarity", "log_probability", "votes")
        values += [[100 * space["reranked"][score] for space in spaces] for score in scores]
        values += [[100 * space["abstention"][score]["aurc"] for space in spaces] for score in scores]
        cells = [f"{statistics.mean(v):.1f}" + (f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "") for v in values]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: dict[tuple[str, int], dict[str, Any]], path: Path) -> None:
    """Every run a dot: what an arm reaches on turk, and what it gains over `rewriting` of the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = list(dict.fromkeys(arm for arm, _ in runs))
    seeds = sorted({seed for _, seed in runs})
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(arms) + 1.8), layout="constrained", sharey=True)
    for row, arm in enumerate(arms):
        reached = [100 * _turk(runs[arm, seed]) for seed in seeds]
        gained = [value - 100 * _turk(runs["rewriting", seed]) for value, seed in zip(reached, seeds, strict=True)]
        color = "#d55e00" if arm == "info_nce" else "#0072b2"
        for axis, values in zip(axes, (reached, gained), strict=True):
            axis.plot(values, [row] * len(values), "o", color=color, alpha=0.35, markersize=6, markeredgewidth=0)
            axis.plot([statistics.mean(values)], [row], "|", color=color, markersize=22, markeredgewidth=2.5)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="turk requests answered with the right language, %", title="A dot a seed, a bar the mean")
    axes[1].set(xlabel="points", title="Minus rewriting of the same seed")
    axes[1].axvline(0, color="0.6", linewidth=1)
    for axis in axes:
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.experiments.paraphrases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=["prepare", "select", "confirm", "analyse"])
    parser.add_argument("--data", type=Path, help="NL-RX folder (prepare)")
    parser.add_argument("--work", type=Path, default=Path("runs/paraphrases"), help="base model and views")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    options = parser.parse_args(argv)
    plan = yaml.safe_load(PLAN.read_text())
    try:
        if options.step == "prepare":
            if options.data is None:
                raise UserError("prepare needs --data FOLDER with " + ", ".join(FILES) + ".")
            prepare(options.data, options.work, plan)
        elif options.step == "select":
            select(options.work, plan, options.jobs)
        elif options.step == "confirm":
            confirm(options.work, plan, options.jobs)
        else:
            figures, runs = analyse(plan), confirmed(plan)
            write_json(RESULTS / "summary.json", figures)
            draw(runs, RESULTS / "turk.png")
            print(table(figures) + "\n\n" + space_table([run for run in runs.values() if run["space"]]))
    except UserError as error:
        print(f"eval.experiments.paraphrases: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
