"""The six arms: what each one learns from, its training at equal token cost, and the consistency loss."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_jepa import LLMJEPATrainer, generate
from llm_jepa.lm import model_from, tokenizer_from
from llm_jepa.synthetic import nl_rx as generator

from .. import small_runs
from ..small_runs import BATCH, MAX_NEW_TOKENS, derangement, with_targets_of
from .data import (
    ROWS_PER_LINE,
    SYNTH_TO_REGEX,
    SYNTH_TO_TURK,
    TURK_TO_REGEX,
    TURK_TO_SYNTH,
    Line,
    messages,
    prepared,
    prompts_of,
)

NO_GRADIENT = 1 / 3  # cost of a token that is only read, in tokens that are trained on


@dataclass(frozen=True)
class Arm:
    """What a run learns from."""

    labels: str  # "few" in synth wording, or "all" in both wordings
    rewriting: bool = True
    pairs: str = "none"  # targets of the JEPA term: "own", or "shuffled": those of other rewriting rows
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
    """Settings of one run. The plan's `settled` holds those of the confirmatory runs."""

    budget_tokens: int
    learning_rate: float
    jepa_weight: float
    readout: str  # "last": the state of one predictor token. "mean": the mean of all states, without predictor tokens
    consistency_weight: float
    sft_share: float  # of the budget for the arm sft: with few labels and nothing else it overfits on the whole budget


class TrainingRows(NamedTuple):
    labelled: list[int]  # numbers of the lines whose label is used
    paired: list[int]  # numbers of the lines whose pair of wordings is used
    rows: Dataset  # the rows of one pass


def training_rows(arm: Arm, seed: int, views: Dataset, *, num_labels: int) -> TrainingRows:
    """The rows of one arm. The seed draws all of it, and arms of one seed have the same labels.

    Half of the rows ask for regexes, half for rewriting. The smaller half is repeated.
    """
    rng = random.Random(f"labels {seed}")
    num_lines = len(views) // ROWS_PER_LINE
    few = sorted(rng.sample(range(num_lines), num_labels))
    others = sorted(set(range(num_lines)) - set(few))
    if arm.labels == "all":
        labelled = _rows_of_lines(range(num_lines), SYNTH_TO_REGEX, TURK_TO_REGEX)
    else:
        labelled = _rows_of_lines(few, SYNTH_TO_REGEX)
    if not arm.rewriting:
        return TrainingRows(few, [], views.select(labelled))
    rewriting = _rows_of_lines(others, SYNTH_TO_TURK, TURK_TO_SYNTH)
    rows = views.select([*_repeated(labelled, len(rewriting), rng), *rewriting])
    if arm.pairs == "shuffled":
        rows = _with_shuffled_targets(rows, rewriting, derangement(others, rng))
    return TrainingRows(few, others, rows)


def _rows_of_lines(lines: Sequence[int], *kinds: int) -> list[int]:
    """Row numbers in the stored views: the given kinds of row, line by line."""
    return [ROWS_PER_LINE * line + kind for line in lines for kind in kinds]


def _repeated(items: Sequence[int], length: int, rng: random.Random) -> list[int]:
    """`length` items: whole random passes over them, the last one cut off."""
    repeated: list[int] = []
    while len(repeated) < length:
        repeated += rng.sample(items, len(items))
    return repeated[:length]


def _with_shuffled_targets(rows: Dataset, rewriting: Sequence[int], partner: dict[int, int]) -> Dataset:
    """Let each rewriting row predict the target of its partner's row: the same texts and loss, but no meaning.

    rows: as many labelled rows as rewriting ones, then the rewriting ones. partner: line -> another line.
    """
    first = len(rewriting)
    position = {row: first + i for i, row in enumerate(rewriting)}
    sources = list(range(first))  # labelled rows keep their targets
    for row in rewriting:
        line, kind = divmod(row, ROWS_PER_LINE)
        sources.append(position[ROWS_PER_LINE * partner[line] + kind])
    return with_targets_of(rows, sources)


def train(
    name: str, seed: int, settings: Settings, work: Path, plan: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Train one arm from the base on the budget's tokens. Returns (model, tokenizer, cost)."""
    arm = ARMS[name]
    data = prepared(work)
    train_lines = data.part("train")
    labelled, paired, rows = training_rows(arm, seed, data.views, num_labels=plan["labels"])
    model, tokenizer = model_from(str(work / "base"), dtype=torch.float32), tokenizer_from(str(work / "base"))
    options = _training_options(arm, seed, settings)
    one_step = small_runs.arguments(work / "trainer", 1, **options)
    tokens_per_step = BATCH * small_runs.tokens_of(rows, one_step, tokenizer)
    budget = settings.budget_tokens * (settings.sft_share if name == "sft" else 1)
    consistency, steps = None, round(budget / tokens_per_step)
    if arm.consistency:
        consistency = Consistency([train_lines[i] for i in paired], tokenizer, seed, settings.consistency_weight)
        steps = consistency.plan_steps(budget, tokens_per_step, [train_lines[i] for i in labelled])
    args = small_runs.arguments(work / "trainer", steps, **options)
    trainer = ConsistentTrainer(model, args, rows, processing_class=tokenizer)
    trainer.consistency = consistency
    cost = small_runs.train(trainer)
    if consistency is not None:
        cost["tokens"] += round(consistency.tokens)
    return trainer.model, tokenizer, cost


def _training_options(arm: Arm, seed: int, settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {"learning_rate": settings.learning_rate, "seed": seed, "jepa_weight": 0.0}
    if arm.pairs != "none":
        options["jepa_weight"] = settings.jepa_weight
        options["num_predictor_tokens"] = int(settings.readout == "last")
        options["readout"] = settings.readout
    return options


class Turn(NamedTuple):
    """Token ids of a prompt and its answer; the first `num_prompt` of them are the prompt."""

    ids: list[int]
    num_prompt: int


class Consistency:
    """Output consistency: KL(p(. | synth, y<t) || p(. | turk, y<t)) over the tokens of y, in nats per token.

    y is the model's own greedy answer to the synth wording. All answers are made once, at a quarter of the run. The
    synth side gets no gradient (UDA, arXiv:1904.12848).

    `tokens`: the cost so far, in tokens that are trained on.
    """

    PAIRS = 16  # a step
    STARTS_AT = 0.25  # of the run: before that, the model has no answer worth repeating

    def __init__(self, lines: Sequence[Line], tokenizer: PreTrainedTokenizerBase, seed: int, weight: float) -> None:
        self.lines = random.Random(f"consistency {seed}").sample(lines, len(lines))
        self.tokenizer, self.weight, self.tokens = tokenizer, weight, 0.0
        self.start = 0
        self.answers: list[str] = []

    def plan_steps(self, budget: float, tokens_per_step: float, labelled: Sequence[Line]) -> int:
        """The number of steps that cost the budget.

        A pair is taken to be as long as the labelled rows. One side of it is trained on and the other is only read. Its
        greedy answer costs a third of a row before that.
        """
        mean_length = sum(len(self._turn(line.synth, line.regex).ids) for line in labelled) / len(labelled)
        late = self.PAIRS * mean_length * (1 + NO_GRADIENT + NO_GRADIENT)
        steps = round(budget / (tokens_per_step + (1 - self.STARTS_AT) * late))
        self.start = round(self.STARTS_AT * steps)
        self.lines = self.lines[: (steps - self.start) * self.PAIRS]
        return steps

    def loss(self, model: PreTrainedModel, step: int) -> Tensor | None:
        """The weighted loss of the pairs of this step. None before the start, and if no pair has an answer."""
        if step < self.start:
            return None
        if not self.answers:
            self._answer_all(model)
        first = (step - self.start) * self.PAIRS
        last = min(first + self.PAIRS, len(self.lines))
        synth, turk = [], []
        for line, answer in zip(self.lines[first:last], self.answers[first:last], strict=True):
            if answer:
                synth.append(self._turn(line.synth, answer))
                turk.append(self._turn(line.turk, answer))
        if not synth:
            return None
        with torch.no_grad():
            teacher = self._log_probabilities(model, synth)
        student = self._log_probabilities(model, turk)
        self.tokens += sum(len(turn.ids) for turn in turk) + NO_GRADIENT * sum(len(turn.ids) for turn in synth)
        return self.weight * F.kl_div(student, teacher, log_target=True, reduction="sum") / len(student)

    def _answer_all(self, model: PreTrainedModel) -> None:
        prompts = prompts_of(self.lines, "synth")
        generations = generate(model, self.tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=256)
        self.answers = [generation.text for generation in generations]
        for line, answer in zip(self.lines, self.answers, strict=True):
            self.tokens += NO_GRADIENT * len(self._turn(line.synth, answer).ids)

    def _turn(self, text: str, answer: str) -> Turn:
        encode = functools.partial(self.tokenizer, add_special_tokens=False)
        prompt = self.tokenizer.apply_chat_template(
            messages(generator.SYSTEM_PROMPT, text), tokenize=False, add_generation_prompt=True
        )
        head, tail = encode(prompt)["input_ids"], encode(answer)["input_ids"]
        return Turn([*head, *tail, self.tokenizer.eos_token_id], len(head))

    def _log_probabilities(self, model: PreTrainedModel, turns: Sequence[Turn]) -> Tensor:
        """[answer tokens of all turns, V]. Both sides have the same answers in the same order."""
        length = max(len(turn.ids) for turn in turns)
        ids = torch.full((len(turns), length), self.tokenizer.pad_token_id)  # [R, L]
        mask = torch.zeros_like(ids)
        predicts_answer = torch.zeros_like(ids, dtype=torch.bool)
        for row, turn in enumerate(turns):
            ids[row, : len(turn.ids)] = torch.tensor(turn.ids)
            mask[row, : len(turn.ids)] = 1
            predicts_answer[row, turn.num_prompt - 1 : len(turn.ids) - 1] = True
        ids, mask, predicts_answer = (tensor.to(model.device) for tensor in (ids, mask, predicts_answer))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [R, L, V]
        return logits[predicts_answer].float().log_softmax(dim=-1)


class ConsistentTrainer(LLMJEPATrainer):
    """`LLMJEPATrainer` that adds the loss of `consistency`, if it is set."""

    consistency: Consistency | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.consistency is None:
            return loss
        consistency = self.consistency.loss(model, self.state.global_step)
        return loss if consistency is None else loss + consistency
