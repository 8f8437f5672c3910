"""Claims about targets that do not learn: forward only, of the model at the start, of a moving average of it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from llm_jepa.core.averaging import MovingAverage
from llm_jepa.core.errors import UserError
from llm_jepa.core.losses import jepa_loss
from llm_jepa.lm.batching import rows_apart
from llm_jepa.lm.targets import target_table
from tests.conftest import EXACT, LOGGED, assert_same_weights, config, exact_model, tiny_model
from tests.lm.test_objective import gradients, parameters, plain_copy, rows_with_views, trainer_gradients  # noqa: F401
from tests.lm.test_trainer import history, make, run, weights


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.0)


def alone(model, ids: list[int], args) -> torch.Tensor:
    """The embedding of one view, in a pass of its own."""
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    found = output.hidden_states[args.readout_layer][0]
    return found.mean(dim=0) if args.readout == "mean" else found[-1]


def goals_of(batch, rows: dict[int, dict], args) -> list[list[int]]:
    """The target view of each pair of a batch, found by its key: every context meets the targets in their order."""
    side, other, key = ("targets", "contexts", "target_key")
    if args.direction == "reverse":
        side, other, key = ("contexts", "targets", "context_key")
    by_key = {row[key]: row for row in rows}
    assert len(by_key) == len(rows), "keys must name one row here"
    goals, keys = [], batch["target_key"].tolist()
    while len(goals) < len(keys):
        row = by_key[keys[len(goals)]]
        goals += row[side] * len(row[other])
    return goals


class Watch(TrainerCallback):
    """Records what targets every pair was compared with, and calls `after` with the number of each finished step."""

    def __init__(self, trainer, after=None) -> None:
        self.trainer, self.after, self.seen = trainer, after, []
        fixed_target = trainer.term.fixed_target

        def recorded(model, batch):
            target = fixed_target(model, batch)
            self.seen.append((trainer.model.training, batch, target))
            return target

        trainer.term.fixed_target = recorded
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        if self.after is not None:
            self.after(state.global_step)


@pytest.fixture(scope="session")
def unique(rows_with_views) -> Dataset:  # noqa: F811
    """Rows whose prompts and completions are all different."""
    prompts, completions, kept = set(), set(), []
    for row in rows_with_views:
        prompt, completion = (message["content"] for message in row["messages"][-2:])
        if prompt not in prompts and completion not in completions:
            kept.append(row)
        prompts.add(prompt), completions.add(completion)
    return Dataset.from_list(kept)


# -- stop_gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"objective": "cosine", "readout": "mean"}, {"objective": "mse", "direction": "reverse"},
    {"objective": "smooth_l1", "readout_layer": 1, "share_rows": True}, {"context_view": "message"},
], ids=str)  # fmt: skip
def test_forward_only_pass_is_a_detach_in_the_row(options, unique, tokenizer, tmp_path):
    """Loss and gradient of `jepa_loss` with a detached target, on the packed row that holds the targets too."""
    common = {"jepa_weight": 2.0, **options}
    args = config(tmp_path, target_encoder="stop_gradient", **common)
    trainer = make(unique, tokenizer, args, model=exact_model(tokenizer))
    inside = make(unique, tokenizer, config(tmp_path, **common), model=exact_model(tokenizer))

    def detached(predicted, target, keys, *, step):
        args = inside.args
        return jepa_loss(
            predicted, target.detach(), objective=args.objective, temperature=args.temperature,
            target_key=keys.target, context_key=keys.context,
        )  # fmt: skip

    eight = trainer.train_dataset.select(range(8)).to_list()
    both_sides = trainer_gradients(inside, [eight])
    inside.term.compare = detached
    found, wanted = trainer_gradients(trainer, [eight]), trainer_gradients(inside, [eight])
    assert max((wanted[name] - both_sides[name]).abs().max() for name in wanted) > 1e-3, "no difference to find"
    assert_same_weights(found, wanted)
    pair_loss = [one.sums.over_ranks(one.accelerator)["pair_loss"] for one in (trainer, inside)]
    assert pair_loss[0] == pytest.approx(pair_loss[1] / 2, rel=LOGGED)  # `inside` has had two passes


# -- base ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 64])
def test_target_table_has_the_order_of_the_sequences(size, tokenizer, tmp_path):
    """Whatever the batch size; evaluation mode, and the mode before it afterwards."""
    model = exact_model(tokenizer, attention_dropout=0.5).train()
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(5, 300, (n,), generator=generator).tolist() for n in (7, 2, 11, 1, 5, 9, 3, 8, 12, 4, 6, 10)
    ]
    for readout, layer in (("last", -1), ("mean", 1)):
        table = target_table(model, sequences, pad_token_id=0, batch_size=size, readout=readout, layer=layer)
        assert model.training and table.dtype == torch.float64 and not table.requires_grad
        args = config(tmp_path, readout=readout, readout_layer=layer)
        model.eval()
        wanted = torch.stack([alone(model, ids, args) for ids in sequences])
        model.train()
        torch.testing.assert_close(table, wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize("options", [
    {}, {"direction": "reverse", "readout": "mean"}, {"readout_layer": 1, "lora": True},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "share_rows": True},
], ids=str)  # fmt: skip
def test_base_targets_are_those_of_the_start(options, unique, tokenizer, tmp_path):
    """At every step, in evaluation, and after a resume, with further views: each target is that of its own view."""
    options = dict(options)
    peft = {"peft_config": lora()} if options.pop("lora", False) else {}
    args = config(
        tmp_path, target_encoder="base", jepa_weight=2.0, max_steps=4, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=3, **options,
    )  # fmt: skip
    trainer = make(unique, tokenizer, args, unique.select(range(7)), exact_model(tokenizer), **copy.deepcopy(peft))
    start = plain_copy(trainer.model).eval()
    before = weights(trainer)
    resumed = make(unique, tokenizer, args, unique.select(range(7)), exact_model(tokenizer), **copy.deepcopy(peft))
    for one, checkpoint in ((trainer, None), (resumed, str(tmp_path / "checkpoint-2"))):
        watch = Watch(one)
        one.train(resume_from_checkpoint=checkpoint)
        rows = one.train_dataset.to_list()
        assert {training for training, _, _ in watch.seen} == {True, False}
        for _, batch, target in watch.seen:
            wanted = torch.stack([alone(start, ids, args) for ids in goals_of(batch, rows, args)])
            torch.testing.assert_close(target, wanted, rtol=0, atol=EXACT)
            assert not target.requires_grad
    now = weights(trainer)
    assert max((now[name] - before[name]).abs().max() for name in now) > 1e-3, "nothing moved: proves nothing"


def test_base_computes_each_different_target_once(rows, tokenizer, tmp_path):
    """Twins share a row of the table, training and validation rows alike; a data set unknown at the start is refused"""
    twins = Dataset.from_list(rows[:9] + rows[:5])
    args = config(tmp_path, target_encoder="base", objective="cosine")
    trainer = make(twins, tokenizer, args, {"a": twins.select(range(4)), "b": Dataset.from_list(rows[7:12])})
    different = {tuple(row["targets"][0]) for row in trainer.train_dataset} | {
        tuple(row["targets"][0]) for row in trainer.eval_dataset["b"]
    }
    assert len(trainer.data_collator.target_table) == len(different) < 9 + 5 + 4 + 5
    assert "eval_b_jepa_loss" in trainer.evaluate()
    with pytest.raises(UserError, match="base has targets only for the data sets"):
        trainer.evaluate(Dataset.from_list(rows[20:24]))


# -- ema -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, {"lora": True, "learning_rate": 1.0},
    {"negatives": "optimizer_step", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    {"jepa_dropout": 0.5, "seed": 5, "objective": "cosine"},
], ids=str)  # fmt: skip
def test_average_is_a_loop_by_hand(options, unique, tokenizer, tmp_path):
    """Five steps of BYOL's schedule, once per optimizer step: the targets of every step are those of the average."""
    options = dict(options)
    peft = {"peft_config": lora()} if options.pop("lora", False) else {}
    args = config(tmp_path, target_encoder="ema", ema_decay=0.6, jepa_weight=1.0, max_steps=5, **options)
    trainer = make(unique, tokenizer, args, model=exact_model(tokenizer), **peft)
    average = plain_copy(trainer.model)
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    rows, checked = trainer.train_dataset.to_list(), []

    @torch.no_grad()
    def follow(step):
        for training, batch, target in watch.seen:
            assert training
            wanted = torch.stack([alone(average, ids, args) for ids in goals_of(batch, rows, args)])
            torch.testing.assert_close(target, wanted, rtol=0, atol=EXACT)
            checked.append(step)
        watch.seen.clear()
        decay = 1 - (1 - 0.6) * (math.cos(math.pi * (step - 1) / 5) + 1) / 2
        now = dict(trainer.model.named_parameters())
        for name, p in average.named_parameters():
            if name in trainable:
                p.copy_(decay * p + (1 - decay) * now[name])

    watch = Watch(trainer, follow)
    trainer.train()
    steps = 5 if not args.jepa_dropout else len(history(trainer, "jepa_loss"))
    assert len(set(checked)) == steps and len(checked) == steps * args.gradient_accumulation_steps
    state = trainer.term.state()
    assert set(state) == {f"ema.{name}" for name in trainable}
    by_hand, now = parameters(average), parameters(trainer.model)
    assert_same_weights(state, {f"ema.{name}": by_hand[name].detach() for name in trainable})
    assert max((state[f"ema.{name}"] - now[name]).abs().max() for name in trainable) > 1e-4, "it does not lag"


def test_average_is_float32_and_leaves_the_weights_alone(tokenizer):
    """In bfloat16 a hundred steps of 1 % would all be rounded away. The model's storage is back afterwards."""
    model = tiny_model(tokenizer, dtype=torch.bfloat16)
    average = MovingAverage(model, decay=0.99)
    before, storage = weights(model.model), {n: p.data_ptr() for n, p in model.named_parameters()}
    ids = torch.tensor([[5, 6, 7, 8]])
    was = model(ids).logits.detach()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    for _ in range(100):
        average.update(0.0)
    with average.in_place_of_weights():
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        moved = dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"].detach().clone()
        inside = model(ids).logits.detach()
    share = 1 - 0.99**100
    old = before["layers.0.mlp.up_proj.weight"].float()
    torch.testing.assert_close(moved.float(), old + share, rtol=0, atol=0.02)
    assert {t.dtype for t in average.state().values()} == {torch.float32}
    assert storage == {n: p.data_ptr() for n, p in model.named_parameters()}
    assert not torch.equal(was, inside) and not torch.equal(model(ids).logits, inside)
    with pytest.raises(ZeroDivisionError), average.in_place_of_weights():
        1 / 0  # noqa: B018
    assert storage == {n: p.data_ptr() for n, p in model.named_parameters()}


def test_decay_one_is_base_and_decay_zero_the_model_itself(unique, tokenizer, tmp_path):
    """1: the average never leaves the start. 0: after the first of two steps it is the model, as stop_gradient has."""
    found, start = {}, None
    for name, options in (
        ("base", {"target_encoder": "base"}),
        ("ema 1", {"target_encoder": "ema", "ema_decay": 1.0}),
        ("ema 0", {"target_encoder": "ema", "ema_decay": 0.0}),
        ("stop", {"target_encoder": "stop_gradient"}),
    ):
        trainer, start = run(unique, tokenizer, tmp_path / name, jepa_weight=2.0, max_steps=2, **options)
        found[name] = weights(trainer)
    assert_same_weights(found["ema 1"], found["base"], start=start)
    assert_same_weights(found["ema 0"], found["stop"], start=start)
    assert max((found["stop"][name] - found["base"][name]).abs().max() for name in start) > 1e-3, "proves nothing"


@pytest.mark.parametrize("target_encoder", ["ema", "base", "stop_gradient"])
def test_evaluation_does_not_change_training(target_encoder, unique, tokenizer, tmp_path):
    """And its figures are those of the average as it then is."""
    options = {"target_encoder": target_encoder, "objective": "cosine", "jepa_weight": 1.0}
    options |= {"ema_decay": 0.5} if target_encoder == "ema" else {}
    options["per_device_eval_batch_size"] = 4  # `base` embeds in such batches, and its last bits depend on them
    without, _ = run(unique, tokenizer, tmp_path / "a", **options)
    args = config(tmp_path / "b", eval_strategy="steps", eval_steps=1, diagnostics_pairs=4, **options)
    trainer = make(unique, tokenizer, args, unique.select(range(7)), exact_model(tokenizer))
    start = plain_copy(trainer.model).eval()
    trainer.train()
    assert_same_weights(weights(trainer), weights(without), bound=0)
    teacher = start if target_encoder == "base" else plain_copy(trainer.model).eval()
    if target_encoder == "ema":
        state = trainer.term.state()
        with torch.no_grad():
            for name, p in teacher.named_parameters():
                p.copy_(state[f"ema.{name}"])
    student, terms = plain_copy(trainer.model).eval(), []
    for row in trainer.eval_dataset.to_list():
        for context in row["contexts"]:
            for goal in row["targets"]:
                z, s = alone(student, context + trainer.predictor_ids, args), alone(teacher, goal, args)
                terms.append(1 - torch.nn.functional.cosine_similarity(z, s, dim=0))
    wanted = float(torch.stack(terms).mean())
    assert history(trainer, "eval_jepa_loss")[-1] == pytest.approx(wanted, rel=EXACT)
    assert trainer.evaluate()["eval_jepa_loss"] == pytest.approx(wanted, rel=EXACT)


def test_state_of_a_torn_checkpoint_is_missed(unique, tokenizer, tmp_path):
    options = {"target_encoder": "ema", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(unique, tokenizer, config(tmp_path, **options)).train()
    (tmp_path / "checkpoint-1" / "jepa_state.safetensors").unlink()
    with pytest.raises(UserError, match="jepa_state"):
        make(unique, tokenizer, config(tmp_path, **options)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_rows_apart_end_where_their_sequences_end():
    """Two sequences in rows of three: the last token is place 2 and place 3; padding is masked."""
    batch = rows_apart([[7, 8, 9], [5]], 0, "last")
    assert batch["apart_input_ids"].tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch["apart_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["target_at"].tolist() == [2, 3]
    assert rows_apart([[7, 8, 9], [5]], 0, "mean")["target_at"].tolist() == [[0, 1, 2], [3, -1, -1]]
