"""Claim: one packed forward equals separate passes over each view, in loss and in gradient.

The reference is written without any of the packing code: every view alone, batch size 1, no padding, no mask, positions
from 0. Float64 models; RMSNorm and softmax still run in float32 inside some families, hence relative 1e-6.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, config, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import TrainerState

from llm_jepa.errors import UserError
from llm_jepa.losses import jepa_loss
from llm_jepa.objective import Objective
from llm_jepa.packing import KINDS, LM_ROW, TARGET, JEPACollator, model_inputs, read_pairs, who_sees_whom
from llm_jepa.predictor_tokens import add_predictor_tokens
from llm_jepa.trainer import LLMJEPATrainer
from llm_jepa.views import add_view_columns

TOLERANCE = 1e-6


def views_of(rows, tokenizer, context_view="prefix", count=5):
    return [
        add_view_columns(row, i, tokenizer=tokenizer, context_view=context_view) for i, row in enumerate(rows[:count])
    ]


def separate_passes(model, views, predictors, objective, weight):
    """LM loss (mean over labels) + weight * JEPA loss (mean over pairs), every sequence in a forward of its own."""
    hidden_of = lambda ids: model(  # noqa: E731
        input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True
    )
    nll, labels, contexts, targets = 0.0, 0, [], []
    for view in views:
        output = hidden_of(view["input_ids"])
        logits = output.logits[0, :-1]
        if predictors:
            logits = logits.index_fill(-1, torch.tensor(predictors), float("-inf"))
        wanted = torch.tensor(view["labels"][1:])
        nll = nll + F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        labels += int((wanted != -100).sum())
        contexts.append(hidden_of(view["contexts"][0] + predictors).hidden_states[-1][0, -1])
        targets.append(hidden_of(view["targets"][0]).hidden_states[-1][0, -1])
    keys = torch.tensor([view["target_key"] for view in views])
    pair = jepa_loss(torch.stack(contexts), torch.stack(targets), objective=objective, target_key=keys)
    return nll / labels + weight * pair.mean()


def packed_pass(model, base, views, predictors, objective, weight, tmp_path, tokenizer, **collator):
    """The trainer's own compute_loss on the collator's own batch."""
    trainer = LLMJEPATrainer.__new__(LLMJEPATrainer)  # the loss alone; __init__ would prepare data and add tokens
    trainer.args = dataclasses.replace(config(tmp_path), jepa_weight=weight, objective=objective)
    trainer._masked_ids, trainer._base_model, trainer.model = predictors, base, model
    trainer.objective = Objective(trainer.args, base.config.hidden_size, torch.device("cpu"))
    trainer.state, trainer.aux_loss_enabled, trainer._sums = TrainerState(max_steps=1), False, torch.zeros(7)
    batch = JEPACollator(tokenizer.pad_token_id, predictors, **collator)(views)
    return trainer.compute_loss(model, batch)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found and all(g.abs().sum() > 0 for g in found.values()), "a zero gradient would compare equal to anything"
    return found


def assert_same(ours, reference):
    assert ours.keys() == reference.keys()
    scale = torch.cat([g.flatten() for g in reference.values()]).norm()
    for name in reference:
        assert (ours[name] - reference[name]).norm() <= TOLERANCE * scale, name


@pytest.mark.parametrize("objective", ["cosine", "info_nce"])
@pytest.mark.parametrize("context_view", ["prefix", "message"])
@pytest.mark.parametrize("predictor_count", [0, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_packed_equals_separate_passes(
    family, attention, predictor_count, context_view, objective, rows, tokenizer, tmp_path
):
    model = tiny_model(tokenizer, family, torch.float64, attn_implementation=attention)
    predictors = add_predictor_tokens(model, tokenizer, predictor_count)
    views = views_of(rows, tokenizer, context_view)
    assert len({len(v["input_ids"]) for v in views}) > 1, "rows of one length would not test the padding"
    copied = copy.deepcopy(model)

    reference = separate_passes(copied, views, predictors, objective, 0.7)
    reference.backward()
    ours = packed_pass(model, model, views, predictors, objective, 0.7, tmp_path, tokenizer)
    ours.backward()

    assert ours.item() == pytest.approx(reference.item(), rel=TOLERANCE)
    assert_same(gradients(model), gradients(copied))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant, rows, tokenizer, tmp_path):
    model = tiny_model(tokenizer, dtype=torch.float64)
    predictors = add_predictor_tokens(model, tokenizer, 1)
    views, copied = views_of(rows, tokenizer), copy.deepcopy(model)
    separate_passes(copied, views, predictors, "cosine", 1.0).backward()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    packed_pass(model, model, views, predictors, "cosine", 1.0, tmp_path, tokenizer).backward()
    assert_same(gradients(model), gradients(copied))


@pytest.mark.parametrize("tied", [True, False])
def test_lora_with_trained_predictor_rows_equals_separate_passes(tied, rows, tokenizer, tmp_path):
    base = tiny_model(tokenizer, dtype=torch.float64, tie_word_embeddings=tied)
    predictors = add_predictor_tokens(base, tokenizer, 2)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False,
        trainable_token_indices={"embed_tokens": predictors},
    )  # fmt: skip
    torch.manual_seed(1)
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    views, copied = views_of(rows, tokenizer), copy.deepcopy(model)
    separate_passes(copied, views, predictors, "cosine", 1.0).backward()
    packed_pass(model, base, views, predictors, "cosine", 1.0, tmp_path, tokenizer).backward()
    ours = gradients(model)
    assert any("token" in name for name in ours), "the predictor rows are not trained"
    assert_same(ours, gradients(copied))


def test_who_sees_whom_of_a_row_worked_by_hand():
    """LM row of 3 tokens (split 2), one predictor token, a target of 2, one pad: the seven rows of the mask."""
    view = {
        "input_ids": [5, 6, 7],
        "labels": [-100, -100, 7],
        "contexts": [[5, 6]],
        "targets": [[8, 9]],
        "headers": [0, 0],
        "target_key": 1,
    }
    longer = {**view, "targets": [[8, 9, 9]]}
    batch = JEPACollator(pad_token_id=0, predictor_ids=[4])([view, longer])
    mask = who_sees_whom(batch["doc"], batch["parent"], batch["visible"], batch["position_ids"])[0]
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],  # the predictor continues the prompt: not the completion token 7
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],  # padding sees itself: a row of -inf would be NaN in eager attention
    ]
    assert mask.int().tolist() == expected
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 2, 0, 1, 0]
    assert batch["context_at"].tolist() == [3, 7 + 3] and batch["target_at"].tolist() == [5, 7 + 6]


def test_perturbing_what_must_be_invisible_changes_nothing(rows, tokenizer):
    """Bit for bit: the target view does not reach the LM row or the context, nor the completion the context."""
    model = tiny_model(tokenizer)
    predictors = add_predictor_tokens(model, tokenizer, 2)
    views = views_of(rows, tokenizer)
    batch = JEPACollator(tokenizer.pad_token_id, predictors)(views)
    hidden = lambda ids: model(  # noqa: E731
        **model_inputs({**batch, "input_ids": ids}, model), output_hidden_states=-1
    ).hidden_states[-1]
    before = hidden(batch["input_ids"])
    swap = lambda where: torch.where(where, (batch["input_ids"] * 7 + 3) % 200 + 10, batch["input_ids"])  # noqa: E731

    after = hidden(swap(batch["doc"] == TARGET))
    assert not torch.equal(after[batch["doc"] == TARGET], before[batch["doc"] == TARGET])
    assert torch.equal(after[batch["doc"] != TARGET], before[batch["doc"] != TARGET])

    split = torch.tensor([len(view["contexts"][0]) for view in views])[:, None]
    after = hidden(swap((batch["doc"] == 0) & (batch["position_ids"] >= split)))
    assert torch.equal(after[batch["doc"] == 1], before[batch["doc"] == 1])
    assert torch.equal(after[batch["doc"] == 2], before[batch["doc"] == 2])
    predicted, target = read_pairs(before, batch)
    assert torch.equal(predicted[0], before.flatten(0, 1)[batch["context_at"][0]]) and predicted.shape == target.shape


def test_plain_collator_adds_no_token(rows, tokenizer):
    views = views_of(rows, tokenizer)
    batch = JEPACollator(tokenizer.pad_token_id, with_views=False)(views)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "doc", "lm_at"}
    assert set((batch["doc"] % KINDS)[batch["attention_mask"].bool()].tolist()) == {LM_ROW}
    for row, mask, view in zip(batch["input_ids"], batch["attention_mask"], views, strict=True):
        assert row[mask.bool()].tolist() == view["input_ids"]


def test_pad_to_multiple_of(rows, tokenizer):
    batch = JEPACollator(tokenizer.pad_token_id, pad_to_multiple_of=16)(views_of(rows, tokenizer))
    assert batch["input_ids"].shape[1] % 16 == 0
