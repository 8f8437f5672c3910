"""Claims about the JEPA term of a run: which pairs, which weight, which negatives, which regularizer.

Most compare weights after plain SGD steps, which compares gradients, with a loop written out here: every view in a
forward pass of its own, nothing packed, nothing shared with the trainer but the formulas of `losses`.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from llm_jepa.cli import main
from llm_jepa.core.distributed import shared_coin
from llm_jepa.core.errors import UserError
from llm_jepa.core.losses import jepa_loss, random_slices, sigreg, vicreg
from llm_jepa.core.pairs import SLICES
from llm_jepa.core.trainer import EVALUATION
from llm_jepa.lm import objective as objective_module
from llm_jepa.lm.from_scratch import random_model
from llm_jepa.lm.objective import JEPATerm, seeded_dropout
from llm_jepa.lm.plan import KnownLoss
from llm_jepa.lm.tubes import draw_tube
from tests.conftest import EXACT, LLAMA, LOGGED, assert_same_weights, config, exact_model, tiny_model
from tests.lm.test_trainer import history, make, run, weights

# -- a step written out ----------------------------------------------------------------------------------------------


def states(model, ids: list[int], layer: int = -1) -> torch.Tensor:
    """[L, D] of one sequence alone."""
    return model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[layer][0]


def lm_terms(model, row: dict, masked: list[int]) -> torch.Tensor:
    """The negative log-likelihood of each label, predictor tokens out of the softmax."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
    logits = model(ids, use_cache=False).logits[0, :-1][labels != -100]
    logits = logits.index_fill(-1, torch.tensor(masked, dtype=torch.long), -1e30)
    return -logits.log_softmax(dim=-1).gather(1, labels[labels != -100][:, None])[:, 0]


def embeddings(model, args, rows: list[dict], predictors: list[int]) -> tuple[torch.Tensor, ...]:
    """`predicted`, `target` [P, D] and four keys [P]: every context of a row with every target of it."""

    def read_alone(ids):
        found = states(model, ids, args.readout_layer)
        return found.mean(dim=0) if args.readout == "mean" else found[-1]

    predicted, target, keys = [], [], []
    for row in rows:
        contexts, targets, header = row["contexts"], row["targets"], row["context_header"]
        sides = ["target", "context"]
        if args.direction == "reverse":
            contexts, targets, header, sides = targets, contexts, row["target_header"], ["context", "target"]
        of_targets, of_contexts = (row[f"{side}_text_keys"] for side in sides)
        for context, context_key in zip(contexts, of_contexts, strict=True):
            at = header if args.predictor_position == "first" else len(context)
            for goal, target_key in zip(targets, of_targets, strict=True):
                predicted.append(read_alone([*context[:at], *predictors, *context[at:]]))
                target.append(read_alone(goal))
                keys.append([*(row[f"{side}_key"] for side in sides), target_key, context_key])
    return torch.stack(predicted), torch.stack(target), *torch.tensor(keys).unbind(dim=1)


def step_by_hand(model, trainer, micro_batches, weight: float, *, step: int = 0, projector=None) -> None:
    """Add the gradient of one optimizer step to the weights of `model`."""
    args = trainer.args
    parts = [embeddings(model, args, rows, trainer.predictor_ids) for rows in micro_batches]
    if args.negatives == "optimizer_step":
        parts = [tuple(torch.cat(column) for column in zip(*parts, strict=True))]
    losses = []
    for predicted, target, *keys in parts:
        z, s = (predicted, target) if projector is None else (projector(predicted), projector(target))
        s = s.detach() if args.target_encoder == "stop_gradient" and projector is None else s
        of_row, context_of_row, text, context_text = keys
        loss = jepa_loss(
            z, s, objective=args.objective, temperature=args.temperature,
            target_key=(of_row, text), context_key=(context_of_row, context_text),
        )  # fmt: skip
        if args.regularizer:
            slices = random_slices(z.shape[1], SLICES, seed=args.seed, step=step, device="cpu")
            term = vicreg if args.regularizer == "vicreg" else lambda side, slices=slices: sigreg(side, slices)
            both = [term(z), term(s)] if args.target_encoder == "self" else [term(z)]
            loss = loss + args.regularizer_weight * sum(both) / len(both)
        losses.append(loss)
    nll = torch.cat([lm_terms(model, row, trainer.predictor_ids) for rows in micro_batches for row in rows])
    (nll.mean() + weight * torch.cat(losses).mean()).backward()


def plain_copy(model):
    """The model itself, before training: TRL's trainer replaces `forward` by one bound to the original."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module.__dict__.pop("forward", None)
    copied.zero_grad()
    return copied


def parameters(module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def trainer_gradients(trainer, micro_batches) -> dict[str, torch.Tensor]:
    """The same from the trainer itself: one optimizer step of these micro-batches, without the optimizer."""
    trainer.model.train()
    collated = iter([trainer.data_collator(rows) for rows in micro_batches])
    batches, labels = trainer.get_batch_samples(collated, len(micro_batches), trainer.args.device)
    trainer.model.zero_grad()
    for batch in batches:
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=labels).backward()
    return gradients(trainer.model)


def assert_same_gradient(found, wanted) -> None:
    assert max(g.abs().max() for g in wanted.values()) > 1e-2, "no gradient: equality would prove nothing"
    assert_same_weights(found, wanted)


@pytest.fixture(scope="session")
def rows_with_views(rows) -> list[dict]:
    """A third has other wordings of the prompt, a third of both, a third of nothing."""
    mixed = []
    for i, row in enumerate(rows):
        extra = {"views": None}
        if i % 3:
            extra = {"views": {"contexts": [f"please: {row['messages'][-2]['content']}", "the same lines"][: i % 3]}}
            if i % 3 == 2:
                extra["views"]["targets"] = [f"({row['messages'][-1]['content']})"]
        mixed.append({**row, **extra})
    return mixed


OPTIONS = {
    "paper": {},
    "no predictor token": {"num_predictor_tokens": 0},
    "mean": {"readout": "mean", "num_predictor_tokens": 2},
    "an inner layer": {"readout_layer": 1},
    "a layer from the end": {"readout_layer": -2, "readout": "mean"},
    "predictors first": {"predictor_position": "first", "context_view": "message", "num_predictor_tokens": 2},
    "reverse": {"direction": "reverse"},
    "reverse, predictors first": {"direction": "reverse", "predictor_position": "first"},
    "message": {"context_view": "message"},
    "paper labels": {"label_protocol": "paper"},
    "mse": {"objective": "mse"},
    "cosine": {"objective": "cosine"},
    "stop gradient": {"target_encoder": "stop_gradient", "readout": "mean"},
    "reverse, stop gradient": {"target_encoder": "stop_gradient", "direction": "reverse", "readout_layer": 1},
}


@pytest.mark.parametrize("share_rows", [False, True])
@pytest.mark.parametrize("case", list(OPTIONS))
def test_gradient_is_that_of_separate_passes(case, share_rows, rows_with_views, tokenizer, tmp_path):
    """With further views in some rows, several of them in a row or not: 8 rows in one batch."""
    args = config(tmp_path, jepa_weight=1.5, share_rows=share_rows, **OPTIONS[case])
    trainer = make(Dataset.from_list(rows_with_views[:8]), tokenizer, args, model=exact_model(tokenizer))
    by_hand = plain_copy(trainer.model)
    eight = trainer.train_dataset.to_list()
    if share_rows:
        trainer.data_collator = replace(trainer.data_collator, row_cost=10**9)
        assert len(trainer.data_collator(eight)["input_ids"]) == 1
    assert sum(len(row["contexts"]) * len(row["targets"]) for row in eight) > 8, "no further view came through"
    step_by_hand(by_hand, trainer, [eight], 1.5)
    assert_same_gradient(trainer_gradients(trainer, [eight]), gradients(by_hand))


def test_pairs_of_further_views_weigh_alike_under_accumulation(rows_with_views, tokenizer, tmp_path):
    """Micro-batches of unequal numbers of pairs: every pair of the step weighs the same."""
    options = {"jepa_weight": 2.0, "objective": "cosine"}
    dataset = Dataset.from_list(rows_with_views)
    big, start = run(dataset, tokenizer, tmp_path / "big", **options)
    small, _ = run(
        dataset, tokenizer, tmp_path / "small", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    assert_same_weights(weights(small), weights(big), start=start)


def test_equal_prompts_are_no_negatives_in_reverse(rows, tokenizer, tmp_path):
    """direction: reverse has prompts for targets: two rows with one prompt are positives of each other."""
    twins = copy.deepcopy(rows[:6])
    twins[1]["messages"][-2]["content"] = twins[0]["messages"][-2]["content"]
    args = config(tmp_path, direction="reverse", temperature=0.5, per_device_train_batch_size=4)
    trainer = make(Dataset.from_list(twins), tokenizer, args, model=exact_model(tokenizer))
    six = trainer.train_dataset.to_list()
    assert six[0]["target_key"] != six[1]["target_key"]
    batch = trainer.data_collator(six)
    assert batch["target_key"][0] == batch["target_key"][1] and len(batch["target_key"].unique()) == 5
    by_hand = plain_copy(trainer.model)
    step_by_hand(by_hand, trainer, [six], 0.1)
    assert_same_gradient(trainer_gradients(trainer, [six]), gradients(by_hand))


@pytest.mark.parametrize(("context_view", "keys"), [("prefix", 2), ("message", 1)])
def test_equal_last_turns_after_different_ones_are_one_target_only_where_they_are_all_of_it(
    context_view, keys, rows, tokenizer, tmp_path
):
    """In reverse, a `prefix` target holds the system prompt as well: two of them are not equal texts."""
    twins = copy.deepcopy(rows[:2])
    twins[1]["messages"][-2]["content"] = twins[0]["messages"][-2]["content"]
    for twin, text in zip(twins, ("Answer with a regex.", "Answer with anything else."), strict=True):
        twin["messages"] = [{"role": "system", "content": text}, *twin["messages"][-2:]]
    args = config(tmp_path, direction="reverse", context_view=context_view, objective="cosine")
    columns = make(Dataset.from_list(twins), tokenizer, args).train_dataset
    assert len({tuple(views[0]) for views in columns["contexts"]}) == len(set(columns["context_key"])) == keys


@pytest.mark.parametrize("options", [
    {"objective": "cosine"}, {"objective": "stp"}, {"jepa_weight": 0.0}, {"target_encoder": "ema"},
    {"target_encoder": "base"}, {"jepa_dropout": 0.5},
])  # fmt: skip
def test_shared_rows_are_rows_of_their_own(options, rows_with_views, tokenizer, tmp_path):
    dataset = Dataset.from_list(rows_with_views)
    apart, start = run(dataset, tokenizer, tmp_path / "a", **{"jepa_weight": 1.0, **options})
    shared, _ = run(dataset, tokenizer, tmp_path / "b", **{"jepa_weight": 1.0, **options}, share_rows=True)
    batches = (shared.train_dataset.select(range(i, i + 8)).to_list() for i in range(0, 48, 8))
    assert sum(len(shared.data_collator(batch)["input_ids"]) for batch in batches) < 48, "no row was shared"
    assert_same_weights(weights(shared), weights(apart), start=start)
    assert history(shared, "num_tokens") == history(apart, "num_tokens")


@pytest.mark.parametrize("options", [
    {"jepa_weight": 0.0}, {"jepa_weight": 1.0, "objective": "stp"}, {"jepa_weight": 1.0, "jepa_dropout": 0.5},
])  # fmt: skip
def test_a_users_collator_may_share_rows(options, dataset, tokenizer, tmp_path):
    """`trainer.data_collator` may be replaced. The batch says whether its rows are shared, not `share_rows`."""
    apart, start = run(dataset, tokenizer, tmp_path / "a", **options)
    shared = make(dataset, tokenizer, config(tmp_path / "b", **options), model=exact_model(tokenizer))
    shared.data_collator = replace(shared.data_collator, row_cost=10**9)
    shared.train()
    assert_same_weights(weights(shared), weights(apart), start=start)


# -- jepa_dropout ----------------------------------------------------------------------------------------------------


def dropped(seed: int, steps: int, share: float) -> list[bool]:
    return [shared_coin(seed, step) < share for step in range(steps)]


def seed_with(pattern: list[bool], share: float) -> int:
    return next(seed for seed in range(10_000) if dropped(seed, len(pattern), share) == pattern)


@pytest.mark.parametrize("target_encoder", ["self", "ema", "base"])
def test_dropped_steps_are_plain_sft_steps(target_encoder, dataset, tokenizer, tmp_path):
    """Three dropped steps: weights and token counts of plain SFT bit for bit."""
    options = {"seed": seed_with([True] * 3, 0.5), "num_predictor_tokens": 0, "gradient_accumulation_steps": 2}
    sft, start = run(dataset, tokenizer, tmp_path / "sft", jepa_weight=0.0, **options)
    arm, _ = run(
        dataset, tokenizer, tmp_path / "arm", jepa_weight=3.0, jepa_dropout=0.5, target_encoder=target_encoder,
        per_device_train_batch_size=8, **options,
    )  # fmt: skip
    assert_same_weights(weights(arm), weights(sft), start=start, bound=0)
    assert history(arm, "num_tokens") == history(sft, "num_tokens"), "a dropped step paid for view tokens"
    assert not history(arm, "jepa_loss")


@pytest.mark.parametrize("objective", ["info_nce", "stp"])
def test_coin_is_of_seed_and_step(objective, dataset, tokenizer, tmp_path):
    """Which steps are dropped: the same over accumulation, those of the coin, and the others are full steps."""
    options = {"seed": 5, "max_steps": 6, "jepa_dropout": 0.5, "objective": objective}
    wanted = dropped(5, 6, 0.5)
    assert 0 < sum(wanted) < 6
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer, _ = run(
            dataset, tokenizer, tmp_path / str(batch), per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, **options,
        )  # fmt: skip
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert ["jepa_loss" not in entry for entry in logged] == wanted
        for entry in logged:
            expected = entry["lm_loss"] + 0.1 * entry.get("jepa_loss", 0.0)
            assert entry["loss"] == pytest.approx(expected, rel=LOGGED)


def test_share_of_dropped_steps():
    """2000 steps at 0.3: 0.3 within four standard deviations (0.041)."""
    assert sum(dropped(42, 2000, 0.3)) / 2000 == pytest.approx(0.3, abs=0.041)


# -- negatives: optimizer_step ---------------------------------------------------------------------------------------

GRAD_CACHE = {
    "self": {},
    "stop_gradient": {"target_encoder": "stop_gradient"},
    "ema": {"target_encoder": "ema", "ema_decay": 0.5},
    "base": {"target_encoder": "base"},
    "shared rows, mean": {"share_rows": True, "readout": "mean"},
    "checkpointing": {"gradient_checkpointing": True, "activation_checkpointing": True},
    "inner layer, reverse": {"readout_layer": 1, "direction": "reverse"},
}


@pytest.mark.parametrize("case", list(GRAD_CACHE))
def test_negatives_of_the_whole_step_are_one_big_batch(case, rows_with_views, tokenizer, tmp_path):
    """8 x 1 = 4 x 2 = 2 x 4 = 1 x 8 in loss and weights, which micro-batches of their own are not."""
    options = {"jepa_weight": 1.0, "temperature": 0.3, **GRAD_CACHE[case]}
    dataset = Dataset.from_list(rows_with_views)
    big, start = run(dataset, tokenizer, tmp_path / "big", **options)
    for batch, accumulation in ((4, 2), (2, 4), (1, 8)) if case == "self" else ((2, 4),):
        small, _ = run(
            dataset, tokenizer, tmp_path / f"{batch}", per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, negatives="optimizer_step", **options,
        )  # fmt: skip
        for key, bound in (("loss", LOGGED), ("lm_loss", LOGGED), ("jepa_loss", LOGGED), ("grad_norm", EXACT)):
            assert history(small, key) == pytest.approx(history(big, key), rel=bound), key
        assert_same_weights(weights(small), weights(big), start=start)


def test_three_and_five_are_eight(dataset, tokenizer, tmp_path):
    """And the gradient is that of a step written out."""
    args = config(tmp_path, jepa_weight=2.0, negatives="optimizer_step", gradient_accumulation_steps=2)
    trainer = make(dataset.select(range(16)), tokenizer, args, model=exact_model(tokenizer))
    eight = trainer.train_dataset.select(range(8)).to_list()
    by_hand = plain_copy(trainer.model)
    step_by_hand(by_hand, trainer, [eight], 2.0)
    assert_same_gradient(trainer_gradients(trainer, [eight[:3], eight[3:]]), gradients(by_hand))
    apart = plain_copy(trainer.model)
    trainer.args.negatives = "micro_batch"
    step_by_hand(apart, trainer, [eight[:3], eight[3:]], 2.0)
    assert max((gradients(apart)[n] - g).abs().max() for n, g in gradients(by_hand).items()) > 1e-2, "proves nothing"


@pytest.mark.parametrize("options", [{}, {"target_encoder": "stop_gradient"}, {"target_encoder": "ema"},
                                     {"gradient_checkpointing": True, "activation_checkpointing": True}])  # fmt: skip
def test_dropout_is_drawn_again(options, dataset, tokenizer, tmp_path, monkeypatch):
    """The pass that learns has the very states of the pass before it; each micro-batch and step has its own."""
    args = config(
        tmp_path, negatives="optimizer_step", gradient_accumulation_steps=2, per_device_train_batch_size=4, **options
    )
    trainer = make(dataset, tokenizer, args, model=tiny_model(tokenizer, attention_dropout=0.3))
    seen, learnt, seeds = [], [], []
    compare_step, at = trainer.term.compare_step, KnownLoss.at

    def first_pass(embeddings, target_keys, *, step):
        seen.extend(predicted for predicted, _ in embeddings)
        return compare_step(embeddings, target_keys, step=step)

    def second_pass(known, predicted, target):
        learnt.append(predicted.detach())
        return at(known, predicted, target)

    def recorded(name, device):
        seeds.append(name)
        return seeded_dropout(name, device)

    trainer.term.compare_step = first_pass
    monkeypatch.setattr(KnownLoss, "at", second_pass)
    monkeypatch.setattr(objective_module, "seeded_dropout", recorded)
    trainer.train()
    assert len(seen) == len(learnt) == 6
    assert len(set(seeds)) == 6 and set(Counter(seeds).values()) == {2}, "a seed for each micro-batch of each step"
    for a, b in zip(seen, learnt, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    trainer.model.eval()
    with torch.no_grad():
        quiet = embeddings(trainer.model, args, trainer.train_dataset.select(range(2)).to_list(), trainer.predictor_ids)
        trainer.model.train()
        loud = embeddings(trainer.model, args, trainer.train_dataset.select(range(2)).to_list(), trainer.predictor_ids)
    assert (quiet[0] - loud[0]).abs().max() > 1e-3, "no dropout: proves nothing"


# -- regularizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [
    {"regularizer": "vicreg", "objective": "mse"},
    {"regularizer": "sigreg", "objective": "cosine", "regularizer_weight": 0.3},
    {"regularizer": "vicreg", "objective": "info_nce", "target_encoder": "stop_gradient", "projector_dim": 7},
    {"regularizer": "sigreg", "objective": "l2", "gradient_accumulation_steps": 2},
    {"regularizer": "vicreg", "objective": "mse", "per_device_train_batch_size": 32, "projector_dim": 0},
], ids=str)  # fmt: skip
def test_regularized_run_is_a_loop_by_hand(case, dataset, tokenizer, tmp_path):
    """Three SGD steps: model and projector end where a loop written out ends."""
    args = config(tmp_path, **{"jepa_weight": 0.5, "projector_dim": 16, "max_steps": 3, **case})
    trainer = make(dataset, tokenizer, args, model=exact_model(tokenizer))
    start = weights(trainer)
    by_hand, projector = plain_copy(trainer.model), copy.deepcopy(trainer.term.projector)
    assert (projector is None) == (args.projector_dim == 0)
    key_of = {row["index"]: row for row in trainer.train_dataset.to_list()}
    steps = []
    collate = trainer.data_collator

    def recording(rows):
        steps.append([key_of[row["index"]] for row in rows])
        return collate(rows)

    trainer.data_collator = recording
    trainer.train()
    accumulation = args.gradient_accumulation_steps
    learnt = [*by_hand.parameters(), *(projector.parameters() if projector is not None else ())]
    optimizer = torch.optim.SGD(learnt, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        step_by_hand(
            by_hand, trainer, steps[step * accumulation : (step + 1) * accumulation], 0.5, step=step,
            projector=None if projector is None else FrozenTarget(projector, args.target_encoder),
        )  # fmt: skip
        optimizer.step()
    assert_same_weights(weights(trainer), parameters(by_hand), start=start)
    if projector is not None:
        first = JEPATerm(args, 32, torch.device("cpu"), torch.float64).projector
        moved = (trainer.term.projector.weight - first.weight).abs().max()
        assert moved > 1e-3, "the projector was not trained"
        assert_same_weights(parameters(trainer.term.projector), parameters(projector))


class FrozenTarget:
    """The projector; the embedding under a target encoder that does not learn is a constant, its projection is not."""

    def __init__(self, projector, target_encoder):
        self.projector, self.detached, self.calls = projector, target_encoder != "self", 0

    def __call__(self, embedding):
        self.calls += 1
        return self.projector(embedding.detach() if self.detached and self.calls % 2 == 0 else embedding)


def test_projector_starts_from_the_seed_alone(tmp_path):
    args = config(tmp_path, regularizer="vicreg", objective="cosine")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = JEPATerm(args, 32, torch.device("cpu")).projector
    assert torch.equal(before, torch.get_rng_state()), "the run's random numbers moved"
    torch.rand(5)
    b = JEPATerm(args, 32, torch.device("cpu")).projector
    c = JEPATerm(config(tmp_path, regularizer="vicreg", objective="cosine", seed=7), 32, torch.device("cpu")).projector
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) and not torch.equal(a.weight, c.weight)


def test_projector_stays_out_of_the_model_and_under_the_recipes_optimizer(dataset, tokenizer, tmp_path):
    args = config(
        tmp_path, regularizer="vicreg", objective="cosine", projector_dim=13, save_strategy="steps", save_steps=3,
        optim="adamw_torch", learning_rate=0.01, weight_decay=0.0,
    )  # fmt: skip
    trainer = make(dataset, tokenizer, args)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    for folder in ("model", "checkpoint-3"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert not [name for name in saved if "projector" in name] and not any(13 in t.shape for t in saved.values())
    assert not list((tmp_path / "model").glob("*jepa*"))
    state = load_file(tmp_path / "checkpoint-3" / "jepa_state.safetensors")
    assert torch.equal(state["projector.weight"], trainer.term.projector.weight)
    group = next(
        group
        for group in trainer.optimizer.param_groups
        if any(p is trainer.term.projector.weight for p in group["params"])
    )
    assert group["weight_decay"] == args.weight_decay, "torch's own default decays the projector"
    assert all(p.grad is None or not p.grad.any() for p in trainer.term.projector.parameters())


def test_projector_is_trained_by_the_users_own_optimizer_too(dataset, tokenizer, tmp_path):
    """And once: a second call finds it there."""
    model = tiny_model(tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = config(tmp_path, regularizer="vicreg", objective="cosine", num_predictor_tokens=0, max_steps=1)
    trainer = make(dataset, tokenizer, args, model=model, optimizers=(optimizer, None))
    before = trainer.term.projector.weight.detach().clone()
    trainer.train()
    trainer.create_optimizer()
    assert not torch.equal(trainer.term.projector.weight, before) and len(optimizer.param_groups) == 2


@pytest.mark.parametrize("regularizer", ["vicreg", "sigreg"])
@pytest.mark.parametrize("where", ["the end of an epoch", "evaluation"])
def test_a_last_batch_of_one_row_does_not_stop_the_run(where, regularizer, dataset, tokenizer, tmp_path):
    """One row has no variance; it must not end an hour of training with a traceback."""
    options = {"regularizer": regularizer, "objective": "cosine", "max_steps": 2}
    eval_dataset = None
    if where == "evaluation":
        options |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
        eval_dataset = dataset.select(range(9))
    train = dataset.select(range(9)) if where != "evaluation" else dataset
    trainer = make(train, tokenizer, config(tmp_path, **options), eval_dataset)
    trainer.train()
    assert all(math.isfinite(value) for value in history(trainer, "loss")) and len(history(trainer, "loss")) == 2


# -- the weight's schedule -------------------------------------------------------------------------------------------


def test_weight_moves_in_a_straight_line(dataset, tokenizer, tmp_path):
    """From 0.2 to 1.0 in 4 steps: 0.2, 0.4, 0.6, 0.8. What is logged is what the step was trained with."""
    trainer, _ = run(
        dataset, tokenizer, tmp_path, jepa_weight=0.2, jepa_weight_end=1.0, max_steps=4, objective="cosine"
    )
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    used = [(entry["loss"] - entry["lm_loss"]) / entry["jepa_loss"] for entry in logged]
    assert used == pytest.approx([0.2, 0.4, 0.6, 0.8], rel=1e-3)
    assert [entry["jepa_weight"] for entry in logged] == pytest.approx(used, rel=1e-3)


class AfterSteps(TrainerCallback):
    def __init__(self, function) -> None:
        self.function = function

    def on_step_end(self, *args, **kwargs):
        self.function()


def test_weight_that_starts_at_zero_starts_as_plain_sft(dataset, tokenizer, tmp_path):
    """The first step is that of SFT; and 0.5 -> 0.5 is a constant 0.5."""
    options = {"num_predictor_tokens": 0, "objective": "cosine"}
    sft, start = run(dataset, tokenizer, tmp_path / "a", jepa_weight=0.0, max_steps=1, **options)
    args = config(tmp_path / "b", jepa_weight=0.0, jepa_weight_end=4.0, **options)
    first = make(dataset, tokenizer, args, model=exact_model(tokenizer))
    after = []
    first.add_callback(AfterSteps(lambda: after.append(weights(first))))
    first.train()
    assert_same_weights(after[0], weights(sft), start=start)
    assert history(first, "jepa_loss")[0] > 0.1
    constant, _ = run(dataset, tokenizer, tmp_path / "c", jepa_weight=0.5, **options)
    flat, _ = run(dataset, tokenizer, tmp_path / "d", jepa_weight=0.5, jepa_weight_end=0.5, **options)
    assert_same_weights(weights(flat), weights(constant), start=start, bound=0)


# -- objective: stp --------------------------------------------------------------------------------------------------


def tube_terms(model, args, row: dict, step: int) -> torch.Tensor | None:
    """1 - cos of the two displacements of one row's own tube, states from a pass of its own."""
    spans = [(row["context_start"], row["context_end"]), (row["target_start"], row["target_end"])]
    tube = draw_tube(spans, args.stp_formula, random.Random(f"{args.seed} {step} {row['index']}"))
    if tube is None:
        return None
    hidden = states(model, row["input_ids"], args.readout_layer)
    first, second = (sum(sign * hidden[position] for position, sign in side) for side in tube)
    return 1 - torch.nn.functional.cosine_similarity(first, second, dim=0)


@pytest.mark.parametrize("share_rows", [False, True])
@pytest.mark.parametrize("formula", ["paper", "code"])
def test_stp_is_a_tube_per_example(formula, share_rows, dataset, tokenizer, tmp_path):
    """Loss and gradient by hand; no token is added; 3 + 5 rows = 8; the tubes depend on the step, not on the order."""
    args = config(tmp_path, objective="stp", stp_formula=formula, jepa_weight=2.0, share_rows=share_rows)
    vocabulary = len(tokenizer)
    trainer = make(dataset.select(range(8)), tokenizer, args, model=exact_model(tokenizer))
    assert len(trainer.processing_class) == vocabulary == trainer.model.config.vocab_size
    eight = trainer.train_dataset.to_list()[::-1]
    found = {}
    for step in (0, 1):
        by_hand = plain_copy(trainer.model)
        terms = torch.stack([tube_terms(by_hand, args, row, step) for row in eight])
        nll = torch.cat([lm_terms(by_hand, row, []) for row in eight])
        (nll.mean() + 2.0 * terms.mean()).backward()
        trainer.state.global_step = step
        for parts in ([eight], [eight[:3], eight[3:]]):
            assert_same_gradient(trainer_gradients(trainer, parts), gradients(by_hand))
        found[step] = terms.mean().item()
    assert abs(found[0] - found[1]) > 1e-3, "the tubes are new ones every step"


def test_stp_evaluation_is_stable(dataset, tokenizer, tmp_path):
    """The same tubes at every evaluation, whatever the batch size and the layout; a mean over rows by hand."""
    figures = []
    for size, share in ((8, False), (3, False), (4, True)):
        args = config(
            tmp_path / str(size), objective="stp", per_device_eval_batch_size=size, share_rows=share, max_steps=2
        )
        trainer = make(dataset, tokenizer, args, dataset.select(range(11)), model=exact_model(tokenizer))
        figures.append(trainer.evaluate())
    by_hand = [tube_terms(trainer.model.eval(), args, row, EVALUATION) for row in trainer.eval_dataset.to_list()]
    mean = torch.stack(by_hand).mean().item()
    trainer.state.global_step = 1
    figures.append(trainer.evaluate())
    for found in figures:
        assert found["eval_jepa_loss"] == pytest.approx(mean, rel=EXACT)
        assert found["eval_lm_loss"] == pytest.approx(figures[0]["eval_lm_loss"], rel=EXACT)


def test_stp_row_too_short_for_a_tube_has_none(rows, tokenizer, tmp_path):
    """One word each: two content tokens. The paper's formula needs three; such a batch trains as plain SFT does."""
    short = [{"prompt": "a", "completion": "b"} for _ in range(8)]
    args = config(tmp_path, objective="stp", stp_formula="code", max_steps=1)
    trainer = make(Dataset.from_list(short), tokenizer, args)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"content": [0, 1, 1, 1]})
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters()) and not history(trainer, "jepa_loss")


# -- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_encoder", ["self", "stop_gradient", "base"])
def test_evaluation_does_not_depend_on_the_batches(target_encoder, rows_with_views, tokenizer, tmp_path):
    """eval_lm_loss per token and eval_jepa_loss per pair: 11 rows in batches of 11, 4 and 1, shared or not, by hand."""
    dataset, figures = Dataset.from_list(rows_with_views), []
    for size, share in ((11, False), (4, True), (1, False)):
        args = config(
            tmp_path / str(size), objective="cosine", per_device_eval_batch_size=size, share_rows=share,
            target_encoder=target_encoder, num_predictor_tokens=2,
        )  # fmt: skip
        trainer = make(dataset, tokenizer, args, dataset.select(range(11)), model=exact_model(tokenizer))
        figures.append(trainer.evaluate())
    eleven, model = trainer.eval_dataset.to_list(), trainer.model.eval()
    predicted, target, *_ = embeddings(model, args, eleven, trainer.predictor_ids)
    jepa = (1 - torch.nn.functional.cosine_similarity(predicted, target)).mean().item()
    lm = torch.cat([lm_terms(model, row, trainer.predictor_ids) for row in eleven]).mean().item()
    for found in figures:
        assert found["eval_jepa_loss"] == pytest.approx(jepa, rel=EXACT)
        assert found["eval_lm_loss"] == pytest.approx(lm, rel=EXACT)
        assert found["eval_loss"] == pytest.approx(lm + 0.1 * jepa, rel=EXACT)


# -- resuming --------------------------------------------------------------------------------------------------------

RESUMED = {
    "dropout and a rising weight": {"jepa_dropout": 0.5, "jepa_weight": 0.0, "jepa_weight_end": 1.0},
    "ema": {"target_encoder": "ema", "ema_decay": 0.5},
    "ema, LoRA": {"target_encoder": "ema", "ema_decay": 0.5, "lora": True},
    "base, LoRA": {"target_encoder": "base", "lora": True},
    "stop_gradient": {"target_encoder": "stop_gradient"},
    "vicreg, ema": {"regularizer": "vicreg", "objective": "mse", "target_encoder": "ema", "projector_dim": 16},
    "sigreg": {"regularizer": "sigreg", "objective": "cosine", "projector_dim": 16, "per_device_train_batch_size": 8},
    "stp": {"objective": "stp"},
    "negatives of the step": {"negatives": "optimizer_step"},
    "negatives of the step, ema": {"negatives": "optimizer_step", "target_encoder": "ema"},
}


@pytest.mark.parametrize("case", list(RESUMED))
def test_resumed_run_is_the_uninterrupted_run(case, dataset, tokenizer, tmp_path):
    """AdamW, dropout in the model, accumulation, mid-epoch: weights, projector, average bit for bit."""
    options = dict(RESUMED[case])
    lora = options.pop("lora", False)

    def trainer():
        peft = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1) if lora else None
        args = config(
            tmp_path, **{
                "max_steps": 5, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch",
                "learning_rate": 0.01, "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 3, "jepa_weight": 1.0, "max_grad_norm": 1.0, **options,
            },
        )  # fmt: skip
        model = tiny_model(tokenizer, attention_dropout=0.1)
        return make(dataset, tokenizer, args, model=model, peft_config=peft)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 5
    assert history(resumed, "loss") == history(whole, "loss")
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    ours, theirs = whole.term.state(), resumed.term.state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert bool(ours) == ("ema" in case or "reg" in case)


# -- what is chosen by the length ------------------------------------------------------------------------------------


def test_group_by_length_groups_by_the_packed_row(rows_with_views, tokenizer, tmp_path):
    """The lengths are those of the rows that are laid out, views included."""
    args = config(
        tmp_path, train_sampling_strategy="group_by_length", num_predictor_tokens=2, max_steps=1,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = make(Dataset.from_list(rows_with_views), tokenizer, args)
    lengths = trainer.train_dataset["length"]
    real = [int((trainer.data_collator([row])["doc"] >= 0).sum()) for row in trainer.train_dataset.to_list()]
    assert list(lengths) == real and len(set(real)) > 10
    order = list(trainer._get_train_sampler())
    spread = [max(part) - min(part) for part in (
        [lengths[i] for i in order[start : start + 2]] for start in range(0, len(order), 2)
    )]  # fmt: skip
    assert sorted(order) == list(range(len(lengths))) and sum(spread) / len(spread) < (max(real) - min(real)) / 6
    trainer.train()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"jepa_weight": 0.0}, {"objective": "stp"}], ids=["plain SFT", "stp"])
def test_shared_rows_are_refused_where_the_model_cannot_have_them(options, dataset, tokenizer, tmp_path):
    """A recurrent model reads straight on from one example into the next, with views or without."""
    model = random_model(
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, tokenizer, seed=0,
        dtype=torch.float32, attn_implementation="eager",
    )  # fmt: skip
    with pytest.raises(UserError, match="share_rows: true needs packed rows"):
        make(dataset, tokenizer, config(tmp_path, share_rows=True, **options), model=model)


RECIPE = {
    "family": "lm",
    "model_config": LLAMA,
    "tokenizer_vocab_size": 320,
    "use_cpu": True,
    "activation_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "diagnostics_pairs": 0,
}


def refused(tmp_path, rows, capsys, **changes) -> str:
    """The one line of stderr of `llm-jepa train`, which ended with exit code 2 before it wrote anything."""
    data, path = tmp_path / "train.jsonl", tmp_path / "recipe.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(yaml.safe_dump({**RECIPE, "train_data": str(data), "output_dir": str(tmp_path / "run"), **changes}))
    code = main(["train", str(path)])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("llm-jepa:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert not list((tmp_path / "run").rglob("*")), "a run that cannot start must leave the folder free"
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "cosine", "regularizer": "sigreg", "projector_dim": 0, "per_device_train_batch_size": 8},
         "projector_dim: 128"),
        ({"objective": "cosine", "regularizer": "vicreg", "projector_dim": 0}, "projector_dim: 128"),
        ({"objective": "cosine", "regularizer": "sigreg"}, "per_device_train_batch_size"),
        ({"objective": "cosine", "regularizer": "vicreg", "per_device_train_batch_size": 1}, "regularizer: vicreg"),
        ({"attn_implementation": "flex_attention"}, "attn_implementation: expected one of sdpa, eager"),
        ({"readout_layer": 3}, "readout_layer=3"),
        ({"readout_layer": 0}, "readout_layer=0"),
        ({"readout_layer": -3}, "readout_layer=-3"),
        ({"objective": "stp", "readout_layer": 3}, "readout_layer=3"),
        ({"predictor_position": "first"}, "context_view: message"),
        ({"objective": "stp", "regularizer": "vicreg"}, "regularizer: vicreg would be ignored"),
        ({"objective": "stp", "target_encoder": "ema"}, "target_encoder: ema"),
        ({"objective": "cosine", "negatives": "optimizer_step"}, "objective: info_nce"),
        ({"negatives": "optimizer_step", "regularizer": "vicreg"}, "without a regularizer"),
        ({"stop_gradient_target": True}, "target_encoder"),
        ({"packing": True}, "share_rows"),
        ({"jepa_dropout": 1.0}, "jepa_dropout=1"),
        ({"jepa_dropout": -0.1}, "jepa_dropout=-0.1"),
        ({"per_device_train_batch_size": 1}, "negatives: optimizer_step"),
        ({"target_encoder": "teacher"}, "one of self, stop_gradient, ema, base"),
        ({"ema_decay": 1.5}, "ema_decay=1.5"),
        ({"projector_dim": -1}, "projector_dim=-1"),
        ({"jepa_weight_end": -1.0}, "jepa_weight_end"),
        ({"objective": "cosine", "temperature": 0.1}, "temperature: 0.1 would be ignored: it belongs to objective"),
        ({"ema_decay": 0.9}, "ema_decay: 0.9 would be ignored"),
        ({"stp_formula": "code"}, "stp_formula: code would be ignored"),
        ({"projector_dim": 64}, "projector_dim: 64 would be ignored"),
        ({"regularizer_weight": 0.5}, "regularizer_weight: 0.5 would be ignored"),
        ({"context_view": "message", "predictor_position": "first", "num_predictor_tokens": 0}, "predictor_position"),
        ({"jepa_weight_end": 0.5, "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch",
          "validation_rows": 8},
         "metric_for_best_model: eval_lm_loss"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_one_line_before_the_first_step(changes, said, rows, tmp_path, capsys):
    assert said in refused(tmp_path, rows, capsys, **changes)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_too_few_different_targets_for_info_nce(direction, rows, tmp_path, capsys):
    few = copy.deepcopy(rows[:12])
    for i, row in enumerate(few):
        row["messages"][-1 if direction == "forward" else -2]["content"] = f"answer {i % 3}"
    line = refused(tmp_path, few, capsys, direction=direction)
    assert "info_nce" in line and "have 3" in line and "batches of 4" in line


@pytest.mark.parametrize("views", [
    [""], [3], {"contexts": "another"}, {"contexts": [3]}, {"targets": [""]}, {"context": ["another"]},
], ids=str)  # fmt: skip
def test_wrong_views_name_the_row(views, rows, tmp_path, capsys):
    line = refused(tmp_path, [*rows[:5], {**rows[5], "views": views}], capsys)
    assert "row 5" in line and "views" in line


def test_wrong_views_among_right_ones_name_the_row(rows_with_views, tmp_path, capsys):
    """The column's type is another one in that row, which the reader of the file finds first."""
    bad = [*rows_with_views[:6], {**rows_with_views[6], "views": {"contexts": "another"}}]
    line = refused(tmp_path, bad, capsys)
    assert "views" in line
