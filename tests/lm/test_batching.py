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
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from llm_jepa.core.losses import jepa_loss
from llm_jepa.lm.attention import attention_of_lm_rows, model_inputs, who_sees_whom
from llm_jepa.lm.batching import KINDS, LM_ROW, TARGET, JEPACollator, lm_rows_only, share_rows
from llm_jepa.lm.objective import JEPATerm, LLMJEPALoss
from llm_jepa.lm.plan import plan_alone
from llm_jepa.lm.predictor_tokens import add_predictor_tokens
from llm_jepa.lm.reading import read_pairs
from llm_jepa.lm.targets import target_table
from llm_jepa.lm.views import add_view_columns
from tests.conftest import FAMILIES, config, tiny_model
from tests.properties import examples

# Relative, in float64. Not `EXACT`: most families have RMS norms, which transformers computes in float32.
TOLERANCE = 1e-6


LAYOUTS = {
    "packed": {"layout": "packed"},
    "shared": {"layout": "packed", "row_cost": 10**9},  # one row, where no token is padding
    "separate": {"layout": "separate"},
    "flat": {"layout": "flat"},
}


def views_of(rows, tokenizer, context_view="prefix", count=5, **options):
    options |= {"tokenizer": tokenizer, "context_view": context_view}
    return [add_view_columns(row, i, **options) for i, row in enumerate(rows[:count])]


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
    """The loss of the package on the collator's own batch."""
    batch = JEPACollator(tokenizer.pad_token_id, predictors, **collator)(views)
    layout = collator.get("layout", "packed")
    return loss_of(batch, model, base, predictors, objective, weight, tmp_path, layout)


def loss_of(batch, model, base, predictors, objective, weight, tmp_path, layout="packed", **options):
    """Both terms of a batch that is a step by itself, each divided by its count."""
    args = dataclasses.replace(config(tmp_path), jepa_weight=weight, objective=objective, **options)
    losses = LLMJEPALoss(args, base, JEPATerm(args, base.config.hidden_size, torch.device("cpu")), predictors, False)
    plan = plan_alone(batch, args, layout, step=0)
    out = losses(model, batch, plan, *plan.micro_batches)
    loss = out.token_nll.sum() / plan.labels
    return loss if out.pair_loss is None else loss + weight * out.pair_loss.sum() / plan.pairs


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
        "context_header": 0,
        "target_header": 0,
        "target_key": 1,
        "context_key": 2,
        "target_text_keys": [1],
        "context_text_keys": [2],
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
        **model_inputs({**batch, "input_ids": ids}, model, "segments"), output_hidden_states=-1
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
    assert not set(batch) & {"context_at", "target_at", "target_key", "example_of_pair"}
    assert attention_of_lm_rows("packed", batch) == "rows", "no mask of its own is needed"
    mask = model_inputs(batch, tiny_model(tokenizer), "rows")["attention_mask"]
    assert set((batch["doc"] % KINDS)[mask.bool()].tolist()) == {LM_ROW}
    for row, real, view in zip(batch["input_ids"], mask, views, strict=True):
        assert row[real.bool()].tolist() == view["input_ids"]


def test_pad_to_multiple_of(rows, tokenizer):
    batch = JEPACollator(tokenizer.pad_token_id, pad_to_multiple_of=16)(views_of(rows, tokenizer))
    assert batch["input_ids"].shape[1] % 16 == 0


# -- rows that several examples share -----------------------------------------------------------------------------


def cost_of(lengths, rows, row_cost):
    length = max(sum(lengths[i] for i in row) for row in rows)
    return len(rows) * length * (row_cost + length)


@examples(100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=14), st.integers(1, 20_000))
def test_share_rows_loses_nothing_and_never_costs_more(lengths, row_cost):
    rows = share_rows(lengths, row_cost)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert cost_of(lengths, rows, row_cost) <= cost_of(lengths, [[i] for i in range(len(lengths))], row_cost)


@pytest.mark.parametrize(
    ("lengths", "row_cost", "expected"),
    [
        ([7], 100, [[0]]),
        ([5, 5, 5, 5], 100, [[0], [1], [2], [3]]),  # no padding to save: longer rows would only cost, 4 * 5 * 105
        ([10, 5, 5], 100, [[0], [1, 2]]),  # 2 * 10 * 110 = 2200; in one row 20 * 120 = 2400, apart 3300
        ([10, 5, 5], 0, [[0], [1, 2]]),  # 200; 400; 300
        ([9, 1], 100, [[0, 1]]),  # 10 * 110 = 1100; apart 2 * 9 * 109 = 1962
        ([9, 8], 1, [[0], [1]]),  # 2 * 9 * 10 = 180; 17 * 18 = 306
        ([2, 6, 4, 8, 4], 100, [[1, 0], [2, 4], [3]]),  # 3 * 8 * 108 = 2592: three full rows
        ([1, 3, 6, 4], 1, [[2, 0], [3, 1]]),  # longest first: 2 * 7 * 8 = 112; in their order 3 * 6 * 7 = 126
        ([3, 8, 6], 100, [[1], [2, 0]]),  # 2 * 9 * 109 = 1962; 17 * 117 = 1989. A row holds 17 / 2, rounded up
        ([9, 5, 5, 5], 10, [[0], [1, 2], [3]]),  # 3 * 10 * 20 = 600; 4 * 9 * 19 = 684
        ([7, 6, 5], 10_000, [[0, 1, 2]]),  # 18 tokens in one row, at least 24 in two
    ],
)  # fmt: skip
def test_share_rows_worked_by_hand(lengths, row_cost, expected):
    assert sorted(map(sorted, share_rows(lengths, row_cost))) == sorted(map(sorted, expected))


@pytest.mark.parametrize("label_protocol", ["completion", "paper"])
@pytest.mark.parametrize("context_view", ["prefix", "message"])
def test_shared_rows_equal_separate_passes(context_view, label_protocol, rows, tokenizer, tmp_path):
    """With paper labels every token is one, the first too: its neighbour, another example, must not predict it."""
    model = tiny_model(tokenizer, dtype=torch.float64)
    predictors = add_predictor_tokens(model, tokenizer, 2)
    views, copied = views_of(rows, tokenizer, context_view, label_protocol=label_protocol), copy.deepcopy(model)
    assert (views[0]["labels"][0] == -100) == (label_protocol == "completion")
    options = {"row_cost": 10**9}
    batch = JEPACollator(tokenizer.pad_token_id, predictors, **options)(views)
    assert len(batch["input_ids"]) == 1 and (batch["doc"] % KINDS == LM_ROW).sum() == sum(
        len(view["input_ids"]) for view in views
    )
    reference = separate_passes(copied, views, predictors, "info_nce", 0.7)
    reference.backward()
    ours = packed_pass(model, model, views, predictors, "info_nce", 0.7, tmp_path, tokenizer, **options)
    ours.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=TOLERANCE)
    assert_same(gradients(model), gradients(copied))


@pytest.mark.parametrize("with_views", [True, False])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_lm_at_is_where_each_example_starts(layout, with_views, rows, tokenizer):
    views = views_of(rows, tokenizer)
    batch = JEPACollator(tokenizer.pad_token_id, with_views=with_views, **LAYOUTS[layout])(views)
    flat = batch["input_ids"].flatten()
    for at, view in zip(batch["lm_at"], views, strict=True):
        assert flat[at : at + len(view["input_ids"])].tolist() == view["input_ids"]


def lm_rows(batch):
    """Every LM row of a batch: its tokens, labels and positions, in a canonical order."""
    found = []
    for r, docs in enumerate(batch["doc"]):
        starts = (docs != docs.roll(1)).nonzero()[:, 0].tolist() or [0]
        starts = sorted({0, *starts})
        for start, stop in zip(starts, [*starts[1:], len(docs)], strict=True):
            if docs[start] >= 0 and docs[start] % KINDS == LM_ROW:
                columns = [batch[key][r, start:stop].tolist() for key in ("input_ids", "labels")]
                positions = batch["position_ids"][r, start:stop].tolist() if "position_ids" in batch else None
                found.append((*columns, positions if positions != list(range(stop - start)) else None))
    return sorted(found, key=str)


@pytest.mark.parametrize("label_protocol", ["completion", "paper"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_lm_rows_only_is_the_batch_without_views(layout, label_protocol, rows, tokenizer, tmp_path):
    """jepa_dropout drops views after collation: tokens, labels and LM loss are those of with_views=False."""
    model = tiny_model(tokenizer, dtype=torch.float64)
    predictors = [] if layout == "flat" else add_predictor_tokens(model, tokenizer, 2)
    views = views_of(rows, tokenizer, label_protocol=label_protocol)
    plain = JEPACollator(tokenizer.pad_token_id, predictors, with_views=False, **LAYOUTS[layout])(views)
    batch = JEPACollator(tokenizer.pad_token_id, predictors, **LAYOUTS[layout])(views)
    dropped = lm_rows_only(batch)
    assert "context_at" in batch and "context_at" not in dropped and "target_at" not in dropped
    assert lm_rows(dropped) == lm_rows(plain) and len(lm_rows(plain)) == len(views)
    assert set(dropped) == set(plain)
    first = dropped["input_ids"].flatten()[dropped["lm_at"]]
    assert torch.equal(first, plain["input_ids"].flatten()[plain["lm_at"]])
    if layout in ("packed", "separate"):
        there = plain["doc"] >= 0
        for key in ("labels", "doc", "lm_at"):
            assert torch.equal(dropped[key], plain[key]), key
        assert torch.equal(dropped["input_ids"][there], plain["input_ids"][there])
    options = {"layout": LAYOUTS[layout]["layout"]}
    losses = [loss_of(b, model, model, predictors, "cosine", 0.0, tmp_path, **options) for b in (plain, dropped)]
    reference = separate_passes(model, views, predictors, "cosine", 0.0)
    assert [loss.item() for loss in losses] == pytest.approx([reference.item()] * 2, rel=1e-9)


# -- what is read, where and from which side ----------------------------------------------------------------------


def pairs_alone(model, views, predictors, layer=-1, readout="last", predictor_position="last", direction="forward"):
    """Every context of an example with every target of it, each in a forward pass of its own -> [P, D], [P, D], [P]."""

    def embed(ids):
        output = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        states = output.hidden_states[layer][0]
        return states[-1] if readout == "last" else states.mean(dim=0)

    found = []
    for view in views:
        sides = [(view["contexts"], view["context_header"]), (view["targets"], view["target_header"])]
        (sources, header), (goals, _) = sides if direction == "forward" else sides[::-1]
        key = view["target_key" if direction == "forward" else "context_key"]
        for ids in sources:
            at = len(ids) if predictor_position == "last" else header
            predicted = embed(ids[:at] + predictors + ids[at:])
            found += [(predicted, embed(goal), torch.tensor(key)) for goal in goals]
    return tuple(map(torch.stack, zip(*found, strict=True)))


def pair_loss_of(model, views, predictors, tokenizer, tmp_path, *, layer=-1, targets="inside", layout, **options):
    """The pair losses of a collated batch: InfoNCE, which sees all pairs, + MSE, which sees lengths, [P]."""
    collator = JEPACollator(tokenizer.pad_token_id, predictors, target_placement=targets, **LAYOUTS[layout], **options)
    batch = collator(views)
    encoder = {"inside": "self", "apart": "stop_gradient", "cached": "base"}[targets]
    total = 0
    for name in ("info_nce", "mse"):
        args = config(tmp_path, jepa_weight=1.0, objective=name, readout_layer=layer, target_encoder=encoder)
        term = JEPATerm(args, model.config.hidden_size, torch.device("cpu"))
        plan = plan_alone(batch, args, collator.layout, step=0)
        total = (
            total + LLMJEPALoss(args, model, term, predictors, False)(model, batch, plan, *plan.micro_batches).pair_loss
        )
    assert ("apart_input_ids" in batch) == (targets == "apart")
    return total, batch


def both_losses(predicted, target, key):
    return sum(jepa_loss(predicted, target, objective=name, target_key=key) for name in ("info_nce", "mse"))


OTHER_WORDINGS = {
    0: {"contexts": ["lines with a digit", "any digit will do"], "targets": [".*[0-9].*"]},
    2: {"targets": ["(a|b)", "([ab])"]},
    3: {"contexts": ["what has no vowel"]},
}
READS = [
    {},
    {"readout": "mean"},
    {"layer": 1},
    {"layer": -2, "readout": "mean"},
    {"predictor_position": "first"},
    {"predictor_position": "first", "readout": "mean", "layer": 1},
    {"direction": "reverse"},
    {"direction": "reverse", "predictor_position": "first"},
    {"pad_to_multiple_of": 16},
    {"targets": "apart"},
    {"targets": "apart", "readout": "mean", "layer": 1},
    {"targets": "apart", "direction": "reverse"},
    {"targets": "cached"},
    {"targets": "cached", "direction": "reverse", "readout": "mean", "layer": -2},
]


@pytest.mark.parametrize(
    ("context_view", "options"),
    [*(("prefix", options) for options in READS), *(("message", options) for options in READS[:8])],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "default",
)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_pairs_equal_separate_passes(layout, context_view, options, rows, tokenizer, tmp_path):
    """Loss per pair and gradient: embeddings, their pairing and their keys must all be right.

    Targets apart or cached are constants in the reference.
    """
    model = tiny_model(tokenizer, dtype=torch.float64, num_hidden_layers=3)
    predictors = [] if layout == "flat" else add_predictor_tokens(model, tokenizer, 2)
    rows = [{**row, **({"views": OTHER_WORDINGS[i]} if i in OTHER_WORDINGS else {})} for i, row in enumerate(rows[:4])]
    views, copied = views_of(rows, tokenizer, context_view), copy.deepcopy(model)
    place = {key: options[key] for key in ("layer", "readout", "predictor_position", "direction") if key in options}
    predicted, target, key = pairs_alone(copied, views, predictors, **place)
    assert len(key) == 3 * 2 + 1 + 3 + 2 and len(set(key.tolist())) == 4
    fixed = options.get("targets", "inside") != "inside"
    reference = both_losses(predicted, target.detach() if fixed else target, key)
    reference.mean().backward()

    table = {}
    if options.get("targets") == "cached":
        number = {}
        for view in views:
            goals = view["contexts" if options.get("direction") == "reverse" else "targets"]
            view["target_table_rows"] = [number.setdefault(tuple(ids), len(number)) for ids in goals]
        found = target_table(
            model, list(number), pad_token_id=tokenizer.pad_token_id, batch_size=3,
            readout=options.get("readout", "last"), layer=options.get("layer", -1),
        )  # fmt: skip
        table = {"target_table": found}
    ours, batch = pair_loss_of(model, views, predictors, tokenizer, tmp_path, layout=layout, **options, **table)
    assert batch["target_key"].tolist() == key.tolist()
    assert batch["example_of_pair"].tolist() == [0] * 6 + [1] + [2] * 3 + [3] * 2
    if "pad_to_multiple_of" in options:
        assert batch["input_ids"].shape[1] % 16 == 0 or layout == "flat"
    if layout == "flat":
        assert (batch["doc"] >= 0).all(), "padding in a flat row is a sequence for each token of it"
    torch.testing.assert_close(ours, reference, rtol=TOLERANCE, atol=TOLERANCE)
    ours.mean().backward()
    learning = {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}
    assert sum(g.norm() for g in learning.values()) > 0.01, "no gradient: equal ones would prove nothing"
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, learning)


def test_targets_apart_are_a_detached_side(rows, tokenizer, tmp_path):
    """stop_gradient in a pass of its own = the same states, detached, of the packed row; and not what self learns."""
    views = views_of(rows, tokenizer)
    found = {}
    for name, options in (("apart", {"targets": "apart"}), ("detached", {}), ("self", {})):
        model = tiny_model(tokenizer, dtype=torch.float64)
        loss, batch = pair_loss_of(model, views, [], tokenizer, tmp_path, layout="packed", **options)
        if name == "detached":
            hidden = model(**model_inputs(batch, model, "segments"), output_hidden_states=True).hidden_states[-1]
            predicted, target = read_pairs(hidden, batch)
            loss = both_losses(predicted, target.detach(), batch["target_key"])
        loss.mean().backward()
        found[name] = loss.detach(), gradients(model.model)
    torch.testing.assert_close(found["apart"][0], found["detached"][0], rtol=1e-9, atol=0)
    assert_same(found["apart"][1], found["detached"][1])
    with pytest.raises(AssertionError):
        assert_same(found["self"][1], found["detached"][1])


LM = [1, 50, 51, 52, 53, 60, 61, 62, 63, 64]


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("predictor_count", [0, 2])
@pytest.mark.parametrize(
    ("context", "target", "extra"),  # tokens beside the LM row in a packed row, without the predictor tokens
    [
        (LM[:5], [1, 70, 71], 2),  # the usual: the whole context, and a BOS token
        ([1, 80, 81], [1, 70, 71], 4),
        ([80, 81, 82], [70, 71, 72], 6),  # nothing in common
        (LM[:3] + [80], LM[:6] + [70, 71], 3),  # a target that begins with prompt and completion
        (LM[:5], LM[:7], 0),  # everything, and no segment but that of the predictor tokens
        (LM, [*LM, 70], 1),  # all of the row, and longer than it
        ([80], [1], 1),
    ],
)
def test_what_views_share_with_the_lm_row(context, target, extra, predictor_count, layout, tokenizer, tmp_path):
    model = tiny_model(tokenizer, dtype=torch.float64)
    predictors = [] if layout == "flat" else add_predictor_tokens(model, tokenizer, predictor_count)
    view = {
        "input_ids": LM, "labels": [-100] * 5 + LM[5:], "contexts": [context], "targets": [target], "context_header": 1,
        "target_header": 1,
        "target_key": 0, "context_key": 0, "target_text_keys": [0], "context_text_keys": [0],
    }  # fmt: skip
    other = {**view, "input_ids": [1, 90, 91, 92, 93, 94, 95], "labels": [-100, -100, 91, 92, 93, 94, 95],
             "contexts": [[1, 90, 91]], "targets": [[1, 96]], "target_key": 1, "context_key": 1,
             "target_text_keys": [1], "context_text_keys": [1]}  # fmt: skip
    views, copied = [view, other], copy.deepcopy(model)
    batch = JEPACollator(tokenizer.pad_token_id, predictors, **LAYOUTS[layout])(views)
    if layout == "packed":
        assert (batch["doc"][0] >= 0).sum() == len(LM) + extra + len(predictors)
    reference = separate_passes(copied, views, predictors, "info_nce", 0.7)
    reference.backward()
    ours = loss_of(batch, model, model, predictors, "info_nce", 0.7, tmp_path, LAYOUTS[layout]["layout"])
    ours.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=TOLERANCE)
    assert_same(gradients(model), gradients(copied))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_padding_to_a_multiple_changes_no_loss(layout, rows, tokenizer, tmp_path):
    model = tiny_model(tokenizer, dtype=torch.float64)
    predictors = [] if layout == "flat" else add_predictor_tokens(model, tokenizer, 2)
    views, copied = views_of(rows, tokenizer), copy.deepcopy(model)
    reference = separate_passes(copied, views, predictors, "cosine", 0.7)
    reference.backward()
    options = {**LAYOUTS[layout], "pad_to_multiple_of": 64}
    ours = packed_pass(model, model, views, predictors, "cosine", 0.7, tmp_path, tokenizer, **options)
    ours.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=TOLERANCE)
    assert_same(gradients(model), gradients(copied))
