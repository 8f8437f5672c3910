"""Claims about training a VL-JEPA: which runs are the same run, and which weights move. One process; `test_commands`
has several ranks. Weights are compared, which under SGD compares gradients."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_jepa.core import checkpoint
from llm_jepa.core import trainer as trainer_module
from llm_jepa.core.errors import NonFiniteLossError, UserError
from llm_jepa.core.files import text_key
from llm_jepa.core.losses import info_nce, jepa_distance
from llm_jepa.vl import trainer as vl_trainer_module
from llm_jepa.vl.data import Clip, ClipCollator, ClipDataset, Pair
from llm_jepa.vl.features import cache_features
from llm_jepa.vl.objective import KEYS
from llm_jepa.vl.trainer import VLJEPATrainer
from tests.conftest import EXACT, FLOAT32, LOGGED, assert_same_weights
from tests.core.test_losses import by_hand
from tests.vl.runs import (
    TEXTS,
    arguments,
    count_calls,
    exact,
    history,
    make,
    make_clips,
    moved,
    parts,
    run,
    weights,
)

# -- epochs -----------------------------------------------------------------------------------------------------------


def test_the_trainer_tells_the_data_set_its_epoch(tmp_path):
    """10 clips in batches of 5, 3 epochs: each sees every clip once, with the pairs of its own epoch."""
    trainer = make(tmp_path, per_device_train_batch_size=5, pairs_per_clip=1, max_steps=6, objective="cosine")
    seen: list[Tensor] = []
    real = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append(inputs["target_key"])
        return real(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    expected = ClipDataset(make_clips(), num_frames=2, pairs_per_clip=1, seed=trainer.args.seed)
    per_epoch = []
    for expected.epoch in range(3):
        per_epoch.append(sorted(text_key(expected.draw(i)[0].target) for i in range(10)))
        assert sorted(torch.cat(seen[expected.epoch * 2 :][:2]).tolist()) == per_epoch[-1]
    assert per_epoch[0] != per_epoch[1]


# -- the loss of a step -----------------------------------------------------------------------------------------------


def test_two_captions_of_one_clip_are_positives(tmp_path):
    """In training, `eval_loss` and the diagnostics, against loops; each under two queries, in items of their own."""
    one, two, three = (clip.video for clip in make_clips(3))
    rows = [
        (one, None, TEXTS[0]), (one, None, TEXTS[1]), (two, None, TEXTS[1]), (one, "q", TEXTS[2]),
        (three, "q", TEXTS[3]), (three, "q", TEXTS[4]),
    ]  # fmt: skip
    clips = [Clip(video.copy(), (Pair(query, text),)) for video, query, text in rows]
    options = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 6, "diagnostics_pairs": 6}
    trainer = make(tmp_path, ClipDataset(clips, num_frames=2), max_steps=1, **options, **exact())
    with torch.no_grad():
        batch = ClipCollator(trainer.processing_class)([ClipDataset(clips, num_frames=2)[i] for i in range(6)])
        output = trainer.model.eval()(**{name: value for name, value in batch.items() if name not in KEYS})
    contexts = [{(video.tobytes(), query)} for video, query, _ in rows]
    losses = by_hand(output.predicted, output.target, contexts, [{text} for *_, text in rows], output.temperature)
    figures = trainer.evaluate(ClipDataset(clips, num_frames=2))
    assert figures["eval_loss"] == pytest.approx(losses.mean().item(), rel=EXACT)
    assert info_nce(output.predicted, output.target, target_key=batch["target_key"]).mean() > losses.mean() + 0.1
    cosine = F.cosine_similarity(output.predicted[:, None], output.target[None], dim=-1)
    right = {(i, i) for i in range(6)} | {(0, 1), (0, 2), (1, 0), (1, 2), (2, 1), (4, 5), (5, 4)}
    wrong = [cosine[i, j].item() for i in range(6) for j in range(6) if (i, j) not in right]
    assert figures["eval_raw_cosine_mismatched"] == pytest.approx(sum(wrong) / len(wrong), abs=1e-6)
    trainer.train()
    assert history(trainer, "loss") == pytest.approx([losses.mean().item()], rel=LOGGED)


@pytest.mark.parametrize("objective", ["info_nce", "cosine"])
def test_the_logged_loss_of_the_first_step_is_that_of_its_pairs(objective, tmp_path):
    """All 10 clips in one batch: the mean over their 19 pairs, by the distance itself, from a model never trained."""
    trainer, start = run(tmp_path, max_steps=1, per_device_train_batch_size=10, objective=objective, **exact())
    model, processor = parts(exact=True)
    dataset = ClipDataset(make_clips(), num_frames=2, pairs_per_clip=3)
    batch = ClipCollator(processor)([dataset[i] for i in range(10)])
    key, context_key = (batch.pop(name) for name in KEYS)
    output = model(**batch)
    if objective == "info_nce":
        assert output.temperature.item() == pytest.approx(0.07)
        keys = {"target_key": key, "context_key": context_key}
        loss = info_nce(output.predicted, output.target, temperature=output.temperature, **keys).mean()
    else:
        loss = (1 - F.cosine_similarity(output.predicted, output.target)).mean()
    assert history(trainer, "loss") == pytest.approx([loss.item()], rel=LOGGED) and len(key) == 19
    model.requires_grad_(True)
    model.x_encoder.requires_grad_(False)
    loss.backward()
    expected = {}
    for name, weight in model.named_parameters():
        rate = 0.1 * (0.05 if name.startswith("y_encoder.") else 1)
        expected[name] = start[name] - (0 if weight.grad is None else rate * weight.grad)
    assert_same_weights(weights(trainer), expected, start=start)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (1, 8)])
def test_accumulation_of_pairs_by_themselves_is_one_big_batch(batch, accumulation, tmp_path):
    """Clips have 1 to 3 pairs, so a mean of means fails this."""
    options = {"objective": "cosine", "clips": make_clips(16)}
    big, start = run(tmp_path / "big", per_device_train_batch_size=8, **options, **exact())
    options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    small, _ = run(tmp_path / "small", **options, **exact())
    assert history(small, "loss") == pytest.approx(history(big, "loss"), rel=LOGGED)
    assert_same_weights(weights(small), weights(big), start=start)


def gradients(trainer, batches: list[list[dict]]) -> dict[str, Tensor]:
    """Of one optimizer step over micro-batches of these items."""
    found, pairs = trainer.get_batch_samples(
        iter([trainer.data_collator(items) for items in batches]), len(batches), trainer.args.device
    )
    trainer.model.zero_grad()
    for batch in found:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=pairs).backward()
    return {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None}


def test_uneven_micro_batches(tmp_path):
    """3 + 5 = 8 clips for cosine. For InfoNCE they are the mean of two smaller pools, by pairs, and not the big one."""
    for objective in ("cosine", "info_nce"):
        trainer = make(tmp_path, make_clips(8), objective=objective, **exact())
        items = [trainer.train_dataset[i] for i in range(8)]
        whole, micro = gradients(trainer, [items]), gradients(trainer, [items[:3], items[3:]])
        assert max(g.abs().max() for g in whole.values()) > 1e-3
        apart = max((whole[name] - micro[name]).abs().max().item() for name in whole)
        if objective == "cosine":
            assert_same_weights(micro, whole)
            continue
        assert apart > 1e-2
        first, second = gradients(trainer, [items[:3]]), gradients(trainer, [items[3:]])
        counts = [sum(len(item.pairs) for item in some) for some in (items[:3], items[3:])]
        assert counts[0] / 3 != counts[1] / 5
        mean = {name: (counts[0] * first[name] + counts[1] * second[name]) / sum(counts) for name in whole}
        assert_same_weights(micro, mean)


def test_loss_of_several_steps_is_the_mean_over_their_pairs(tmp_path):
    """Logged every 2 steps of unequal numbers of pairs; the learning rate is 0, so that steps can be compared."""
    options = {"objective": "cosine", "learning_rate": 0.0, "per_device_train_batch_size": 3, "max_steps": 4}
    single, _ = run(tmp_path / "a", **options)
    double, _ = run(tmp_path / "b", logging_steps=2, **options)
    seen: list[int] = []
    trainer = make(tmp_path / "c", **options)
    real = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append(len(inputs["target_key"]))
        return real(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    losses = history(single, "loss")
    expected = [(losses[i] * seen[i] + losses[i + 1] * seen[i + 1]) / (seen[i] + seen[i + 1]) for i in (0, 2)]
    assert len(set(seen)) > 1 and history(double, "loss") == pytest.approx(expected, rel=LOGGED)


def test_regularizer_is_added_in_training_and_in_evaluation(tmp_path):
    """One batch of all clips, learning rate 0: evaluated on the same pairs, the loss is the same."""
    for regularizer in ("vicreg", "sigreg"):
        trainer = make(
            tmp_path, make_clips(), make_clips(), objective="cosine", regularizer=regularizer, regularizer_weight=2.0,
            learning_rate=0.0, max_steps=1, per_device_train_batch_size=10, per_device_eval_batch_size=10, **exact(),
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert history(trainer, "loss")[0] == pytest.approx(before, rel=LOGGED)
        plain, _ = run(tmp_path / "p", objective="cosine", max_steps=1, per_device_train_batch_size=10)
        assert history(trainer, "loss")[0] > history(plain, "loss")[0] + 0.1


# -- what is trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "layers", "expected"),
    [
        ("vit", 0, ()),
        ("vit", 2, ("layers.1.", "layers.2.", "layernorm.")),
        ("vit", -1, ("",)),
        ("vjepa2", 1, ("encoder.layer.2.", "encoder.layernorm.")),
        ("resnet", 2, ("encoder.stages.1.", "encoder.stages.2.")),
        ("resnet", 0, ()),
        ("mobilenet_v2", 1, ("layer.15.", "conv_1x1.")),
    ],
)
def test_exactly_the_last_blocks_of_the_x_encoder_move(x, layers, expected, tmp_path):
    """With the statistics of their batch norms, and no others."""
    model, processor = parts(x)
    before = {name: value.clone() for name, value in model.x_encoder.state_dict().items()}
    run(
        tmp_path, model=model, processor=processor, x_encoder_trainable_layers=layers, optim="adamw_torch",
        learning_rate=0.01, max_steps=2,
    )  # fmt: skip
    after = model.x_encoder.state_dict()
    should = {name for name in before if name.startswith(expected)} if expected else set()
    assert moved(before, after) == should - {name for name in should if name.endswith("mask_token")}


def test_everything_else_moves_and_a_frozen_part_does_not(tmp_path):
    trainer, start = run(tmp_path / "a", max_steps=1)
    found = moved(start, weights(trainer))
    for name in (
        "log_temperature",
        "vision_projection.weight",
        "output_projection.bias",
        "target_projection.weight",
        "predictor.embed_tokens.weight",
        "predictor.layers.0.mlp.up_proj.weight",
        "y_encoder.embeddings.word_embeddings.weight",
        "y_encoder.encoder.layer.0.output.dense.weight",
    ):
        assert name in found, name
    frozen, start = run(tmp_path / "b", max_steps=1, y_encoder_lr_factor=0, learn_temperature=False)
    still = set(start) - moved(start, weights(frozen))
    assert {name for name in start if name.startswith("y_encoder.")} | {"log_temperature"} <= still
    assert "target_projection.weight" not in still


def test_temperature_is_learnt_or_stays(tmp_path):
    learnt, _ = run(tmp_path / "a")
    assert len(set(history(learnt, "temperature"))) == 3 and history(learnt, "temperature")[0] != 0.07
    fixed, _ = run(tmp_path / "b", learn_temperature=False)
    assert history(fixed, "temperature") == pytest.approx([0.07] * 3)
    cosine, start = run(tmp_path / "c", objective="cosine")
    assert not history(cosine, "temperature") and "log_temperature" not in moved(start, weights(cosine))


def test_every_trained_weight_is_in_one_group_with_its_rate(tmp_path):
    """And the temperature does not decay: weight decay would pull it to 1, whatever the loss says."""
    trainer, _ = run(
        tmp_path, x_encoder_trainable_layers=1, optim="adamw_torch", learning_rate=0.01, weight_decay=0.1, max_steps=1
    )
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    rates, decays = {}, {}
    for group in trainer.optimizer.param_groups:
        for weight in group["params"]:
            assert names[id(weight)] not in rates, "a weight is in two groups"
            rates[names[id(weight)]], decays[names[id(weight)]] = group["lr"], group["weight_decay"]
    assert set(rates) == {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    for name, rate in rates.items():
        assert rate == pytest.approx(0.01 * (0.05 if name.startswith("y_encoder.") else 1)), name
    assert decays["y_encoder.encoder.layer.0.output.dense.weight"] == decays["vision_projection.weight"] == 0.1
    assert decays["y_encoder.encoder.layer.0.output.dense.bias"] == decays["vision_projection.bias"] == 0
    assert decays["log_temperature"] == 0


def test_a_frozen_y_encoder_reads_every_text_once_and_trains_as_if_it_read_them_always(tmp_path, monkeypatch):
    model, processor = parts(y_dropout=0.1, exact=True)
    calls = count_calls(model.y_encoder)
    options = {"y_encoder_lr_factor": 0, "validation": make_clips(4, seed=1), "eval_strategy": "steps", "eval_steps": 2}
    cached, start = run(tmp_path / "a", model=model, processor=processor, **options)
    assert sum(calls) == len(TEXTS)
    monkeypatch.setattr(vl_trainer_module, "MAX_TEXTS", 0)
    warned = []
    monkeypatch.setattr(vl_trainer_module.logger, "warning", lambda text, *a: warned.append(text))
    model, processor = parts(y_dropout=0.1, exact=True)
    calls = count_calls(model.y_encoder)
    fresh, _ = run(tmp_path / "b", model=model, processor=processor, **options)
    assert len(calls) > 3 and "5 distinct targets" in warned[0]
    assert_same_weights(weights(cached), weights(fresh), start=start)
    assert history(cached, "eval_loss") == pytest.approx(history(fresh, "eval_loss"), rel=EXACT)


def test_activation_checkpointing_is_the_same_training(tmp_path):
    plain, start = run(tmp_path / "a", x_encoder_trainable_layers=-1, **exact())
    again, _ = run(tmp_path / "b", x_encoder_trainable_layers=-1, activation_checkpointing=True, **exact())
    assert_same_weights(weights(again), weights(plain), start=start)


# -- saving and resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs_per_clip", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_run(pairs_per_clip, tmp_path):
    """AdamW, dropout, accumulation; 3 steps an epoch, so from 3 at its boundary and from 4 within. Bit for bit."""

    def trainer(**options):
        model, processor = parts(y_dropout=0.2)
        return make(
            tmp_path, make_clips(), make_clips(5, seed=1), model=model, processor=processor, max_steps=7,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, pairs_per_clip=pairs_per_clip,
            optim="adamw_torch", learning_rate=0.01, lr_scheduler_type="linear", max_grad_norm=1.0,
            x_encoder_trainable_layers=1, save_strategy="steps", diagnostics_pairs=8, **options,
        )  # fmt: skip

    whole = trainer(save_steps=1)
    whole.train()
    for step in (3, 4):
        resumed = trainer(save_steps=50)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(resumed)[name]), (step, name)
        for key in ("loss", "temperature", "learning_rate"):
            assert history(resumed, key) == history(whole, key)
        rates = [group["lr"] for group in resumed.optimizer.param_groups]
        assert rates == [group["lr"] for group in whole.optimizer.param_groups]
        assert max(rates) == pytest.approx(20 * min(rates)) or max(rates) == 0
        assert resumed.start_diagnostics == whole.start_diagnostics and "recall_at_1" in whole.start_diagnostics
    assert checkpoint.fault(tmp_path / "checkpoint-3") is None
    assert not list(tmp_path.rglob("training_args.bin")), "a pickle was left in a checkpoint"


def test_two_rates_survive_a_resumption(tmp_path):
    """Half way down a linear schedule, each half of its own."""
    options = {"optim": "adamw_torch", "learning_rate": 0.02, "lr_scheduler_type": "linear", "save_strategy": "steps"}
    run(tmp_path, save_steps=2, max_steps=4, **options)
    resumed = make(tmp_path, save_steps=50, max_steps=4, **options)
    seen = []
    real = resumed.compute_loss

    def compute_loss(*args, **kwargs):
        seen.append(sorted({group["lr"] for group in resumed.optimizer.param_groups}))
        return real(*args, **kwargs)

    resumed.compute_loss = compute_loss
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen == [pytest.approx([0.01 * 0.05, 0.01]), pytest.approx([0.005 * 0.05, 0.005])]


def test_nan_stops_before_the_optimizer(tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=1)
    real = trainer._pair_loss
    trainer._pair_loss = lambda *args: real(*args) * (float("nan") if trainer.state.global_step == 2 else 1)
    with pytest.raises(NonFiniteLossError, match="Loss is not finite at step 3.*checkpoint-2"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_eval_loss_is_the_mean_over_pairs(tmp_path):
    """Clips of 1 to 3 pairs in batches of 4 and 3: the same as in one of 7, which a mean of batches or clips misses."""
    seven, found = make_clips(7, seed=1), {}
    for size in (7, 4):
        options = {"objective": "cosine", "per_device_eval_batch_size": size, "diagnostics_pairs": 64}
        trainer = make(tmp_path, None, seven, **options, **exact())
        found[size] = trainer.evaluate()
    model, processor = parts(exact=True)
    dataset = ClipDataset(seven, num_frames=2, pairs_per_clip=3)
    batch = ClipCollator(processor)([dataset[i] for i in range(7)])
    for name in KEYS:
        batch.pop(name)
    with torch.no_grad():
        output = model.eval()(**batch)
    cosine = F.cosine_similarity(output.predicted, output.target)
    by_clip = [cosine[batch["clip_of_pair"] == i].mean().item() for i in range(7)]
    assert abs(cosine.mean() - sum(by_clip) / 7) > 1e-3, "the mean over clips is the same: this would prove nothing"
    for figures in found.values():
        assert figures["eval_loss"] == pytest.approx(1 - cosine.mean().item(), rel=EXACT)
        assert figures["eval_raw_cosine_matched"] == pytest.approx(
            cosine.mean().item(), rel=FLOAT32
        )  # so are diagnostics
        assert figures["eval_recall_at_1"] == found[7]["eval_recall_at_1"]


def test_evaluation_does_not_change_training(tmp_path):
    def trained(name, **options):
        model, processor = parts("resnet")  # no dropout: a data loader draws a number from the global generator
        return run(
            tmp_path / name, validation=make_clips(3, seed=1), model=model, processor=processor,
            x_encoder_trainable_layers=-1, **options,
        )[0]  # fmt: skip

    without, evaluated = trained("a"), trained("b", eval_strategy="steps", eval_steps=1, diagnostics_pairs=4)
    state = evaluated.model.state_dict()
    for name, value in without.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_diagnostics_are_of_so_many_pairs_at_step_zero_and_at_every_evaluation(tmp_path, monkeypatch):
    counted = []
    real = trainer_module.space_diagnostics
    monkeypatch.setattr(
        trainer_module, "space_diagnostics", lambda z, s, *keys: counted.append(len(z)) or real(z, s, *keys)
    )
    options = {"validation": make_clips(8, seed=1), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer, _ = run(tmp_path, diagnostics_pairs=9, per_device_eval_batch_size=2, **options)
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_effective_rank_predicted" in entry]
    assert steps == [0, 1, 2] and counted == [9] * 3


def test_an_evaluation_leaves_no_loader_behind(tmp_path):
    """Accelerate would keep one for each, with its data: a run of many evaluations would grow without end."""
    trainer = make(tmp_path, make_clips(), make_clips(4, seed=1), max_steps=1)
    trainer.train()
    for _ in range(3):
        trainer.evaluate()
    (loader,) = trainer.accelerator._dataloaders
    assert loader.dataset is trainer.train_dataset


@pytest.mark.parametrize("frozen", [False, True])
def test_other_clips_can_be_evaluated_than_those_given_to_the_trainer(frozen, tmp_path):
    """Also with texts that the frozen y_encoder has not read before, and where the trainer has no validation set."""
    options = {"y_encoder_lr_factor": 0 if frozen else 0.05, "diagnostics_pairs": 8, "objective": "cosine"}
    new = [Clip(make_clips(1, seed=9)[0].video, (Pair(None, "never seen"),))]
    trainer = make(tmp_path, **options, **exact())
    loss = trainer.evaluate(ClipDataset(new, num_frames=2))["eval_loss"]
    model, processor = parts(exact=True)
    with torch.no_grad():
        output = model.eval()(**processor(videos=[new[0].video], target="never seen"))
    assert loss == pytest.approx(jepa_distance(output.predicted, output.target).item(), rel=EXACT)


def test_collapse_is_warned_of_once(tmp_path, monkeypatch):
    """Cosine alone, with a y_encoder that learns as fast as the predictor: one point is a minimum."""
    warned = []
    monkeypatch.setattr(trainer_module.logger, "warning", lambda text, *a: warned.append(text))
    options = {
        "y_encoder_lr_factor": 1.0, "max_steps": 30, "optim": "adamw_torch", "learning_rate": 5e-3,
        "eval_strategy": "steps", "eval_steps": 5, "diagnostics_pairs": 19, "logging_steps": 60,
        "per_device_train_batch_size": 10, "per_device_eval_batch_size": 10,
    }  # fmt: skip
    run(tmp_path / "a", validation=make_clips(), objective="cosine", **options)
    assert sum("collapsed" in text for text in warned) == 1
    warned.clear()
    run(tmp_path / "b", validation=make_clips(), objective="info_nce", **options)
    assert not [text for text in warned if "collapsed" in text]


# -- features, computed once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FLOAT32), (torch.float16, 1e-2)])
def test_training_from_the_cache_is_training(dtype, bound, tmp_path, monkeypatch):
    """And neither a step nor an evaluation runs the x_encoder. Training and validation have their own features."""
    monkeypatch.setattr(vl_trainer_module, "cache_features", functools.partial(cache_features, dtype=dtype))
    options = {"validation": make_clips(4, seed=1), "eval_strategy": "steps", "eval_steps": 2, "diagnostics_pairs": 4}
    fresh, start = run(tmp_path / "a", **options)
    model, processor = parts()
    calls = count_calls(model.x_encoder)
    options |= {"feature_cache": str(tmp_path / "cache"), "model": model, "processor": processor}
    trainer = make(tmp_path / "b", **options)
    assert sum(calls) == 2 * 14  # frames of 10 + 4 clips
    trainer.train()
    assert sum(calls) == 2 * 14
    assert_same_weights(weights(trainer), weights(fresh), start=start, bound=bound)
    assert history(trainer, "eval_loss") == pytest.approx(history(fresh, "eval_loss"), rel=bound)
    assert history(trainer, "eval_recall_at_1") == history(fresh, "eval_recall_at_1")


def test_features_may_be_given(tmp_path):
    """As a tensor: no frame is read, and the training is the same. Not for an x_encoder that is trained."""
    model, processor = parts()
    with torch.no_grad():
        found = model.eval().encode_frames(
            processor(videos=[clip.video for clip in make_clips()])["pixel_values_videos"]
        )
    unread = [Clip("no such file", clip.pairs) for clip in make_clips()]
    given, _ = run(tmp_path / "a", ClipDataset(unread, num_frames=2, features=found))
    fresh, start = run(tmp_path / "b")
    assert_same_weights(weights(given), weights(fresh), start=start, bound=FLOAT32)
    with pytest.raises(UserError, match="x_encoder_trainable_layers"):
        make(tmp_path, ClipDataset(unread, num_frames=2, features=found), x_encoder_trainable_layers=1)
    with pytest.raises(UserError, match="validation clips bring features"):
        frames, known = (ClipDataset(make_clips(), num_frames=2, features=each) for each in (None, found))
        VLJEPATrainer(model, arguments(tmp_path, x_encoder_trainable_layers=1), frames, known, processor)
    with pytest.raises(UserError, match="9 visual features for 10 clips"):
        ClipDataset(unread, num_frames=2, features=found[:9])


def test_two_trainers_of_the_same_clips_have_their_own_features(tmp_path):
    """The second has another x_encoder: what the first one's gave must not be taken for its own."""
    dataset = ClipDataset(make_clips(), num_frames=2)
    first = make(tmp_path / "a", dataset, feature_cache=str(tmp_path / "cache"))
    model, processor = parts()
    with torch.no_grad():
        model.x_encoder.layernorm.bias += 1
    second = make(
        tmp_path / "b", dataset, feature_cache=str(tmp_path / "cache"), model=model, processor=processor,
        pairs_per_clip=1, seed=3,
    )  # fmt: skip
    one, two = (trainer.data_collator([trainer.train_dataset[0]])["visual_features"] for trainer in (first, second))
    torch.testing.assert_close(two, one + 1, rtol=0, atol=2e-3)
    assert (first.train_dataset.pairs_per_clip, first.train_dataset.seed) == (3, 42)


def test_workers_draw_the_pairs_of_their_epoch(tmp_path):
    options = {"pairs_per_clip": 1, "max_steps": 5, "per_device_train_batch_size": 5, "objective": "cosine"}
    here, start = run(tmp_path / "a", **options, **exact())
    workers, _ = run(tmp_path / "b", dataloader_num_workers=1, **options, **exact())
    assert history(workers, "loss") == history(here, "loss")
    assert_same_weights(weights(workers), weights(here), start=start)


def test_the_precision_of_a_run_is_part_of_its_cache(tmp_path):
    """Features under bfloat16 autocast are 3 digits poorer; a float32 run must not take them for its own."""
    for name, bf16 in (("a", True), ("b", False)):
        make(tmp_path / name, feature_cache=str(tmp_path / "cache"), bf16=bf16)
    assert len(list((tmp_path / "cache").iterdir())) == 2


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_device_train_batch_size": 1, "pairs_per_clip": 1}, "other pairs as negatives"),
        ({"clips": make_clips(1)}, "other pairs as negatives"),
        # Clips of one pair each give one, however many are asked for.
        ({"clips": make_clips(10)[::3], "per_device_train_batch_size": 1, "pairs_per_clip": 4}, "as negatives"),
        ({"objective": "cosine", "regularizer": "sigreg", "per_device_train_batch_size": 2}, "sigreg .* 8"),
        (
            {"objective": "cosine", "regularizer": "vicreg", "per_device_train_batch_size": 1, "pairs_per_clip": 1},
            "vicreg .* 2",
        ),
        ({"x_encoder_trainable_layers": 4}, "has 3 blocks"),
    ],
)
def test_trainings_that_cannot_work_are_refused(options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        make(tmp_path, **options)


def test_arguments_the_trainer_would_ignore_are_refused(tmp_path):
    model, processor = parts()
    dataset = ClipDataset(make_clips(), num_frames=2)
    for name in ("compute_loss_func", "compute_metrics", "data_collator"):
        with pytest.raises(UserError, match=name):
            VLJEPATrainer(model, arguments(tmp_path), dataset, processor=processor, **{name: lambda *a: None})
    with pytest.raises(UserError, match="needs the processor"):
        VLJEPATrainer(model, arguments(tmp_path), dataset)


def test_the_card_names_parts_of_the_hub_and_of_a_folder_only_its_last_name(tmp_path):
    """Also of a folder of another machine, where an earlier stage was trained."""
    trainer = make(tmp_path / "run")
    trainer.base_model.config.revisions = {
        "x_encoder": {"name": "some/encoder", "revision": None},
        "predictor": {"name": str(tmp_path), "revision": None},
        "y_encoder": {"name": "/another-machine/texts", "revision": None},
    }
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "base_model:\n- some/encoder\n" in text and "| texts |" in text and f"| {tmp_path.name} |" in text
    assert "/another-machine" not in text and str(tmp_path) not in text
