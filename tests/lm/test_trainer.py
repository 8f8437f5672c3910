"""Claims about training: which runs are the same run. Weights are compared, which under SGD compares gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from llm_jepa.core import checkpoint
from llm_jepa.core.errors import NonFiniteLossError, UserError
from llm_jepa.lm.arguments import LLMJEPAConfig
from llm_jepa.lm.predictor_tokens import add_predictor_tokens
from llm_jepa.lm.trainer import LLMJEPATrainer
from tests.conftest import EXACT, FLOAT32, FLOAT32_LOGITS, LOGGED, assert_same_weights, config, exact_model, tiny_model


def weights(trainer_or_model) -> dict[str, torch.Tensor]:
    model = getattr(trainer_or_model, "model", trainer_or_model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def history(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def make(dataset, tokenizer, args, eval_dataset=None, model=None, **kwargs):
    """A trainer with its own model and tokenizer, because adding predictor tokens changes both. In float32."""
    tokenizer = copy.deepcopy(tokenizer)
    return LLMJEPATrainer(model or tiny_model(tokenizer), args, dataset, eval_dataset, tokenizer, **kwargs)


def run(dataset, tokenizer, tmp_path, **options):
    """A finished trainer of `exact_model`, and the weights it started from. In float64: see `EXACT`."""
    trainer = make(dataset, tokenizer, config(tmp_path, **options), model=exact_model(tokenizer))
    start = weights(trainer)
    trainer.train()
    return trainer, start


# -- the baseline -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_are", ["messages", "prompt-completion"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_weight_zero_is_plain_sft(rows_are, accumulation, rows, tokenizer, tmp_path):
    """Loss, gradient norm and final weights of TRL's own SFTTrainer, on the same prompt/completion rows."""
    pairs = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    dataset = Dataset.from_list(pairs if rows_are == "prompt-completion" else rows)
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4}
    ours, start = run(dataset, tokenizer, tmp_path / "ours", jepa_weight=0.0, **options)

    sft_fields = {field for field in SFTConfig.__dataclass_fields__ if SFTConfig.__dataclass_fields__[field].init}
    args = config(tmp_path / "sft", **options)
    sft_args = SFTConfig(**{key: getattr(args, key) for key in sft_fields if key != "logging_nan_inf_filter"})
    sft = SFTTrainer(
        exact_model(tokenizer), sft_args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    sft.train()

    assert len(tokenizer) == ours.model.config.vocab_size, "a token was added"
    assert history(ours, "loss") == pytest.approx(history(sft, "loss"), rel=FLOAT32_LOGITS)
    assert history(ours, "grad_norm") == pytest.approx(history(sft, "grad_norm"), rel=FLOAT32_LOGITS)
    assert_same_weights(weights(ours), weights(sft), start=start, bound=FLOAT32_LOGITS)


def test_both_arms_have_the_same_lm_term(dataset, tokenizer, tmp_path):
    """Predictor tokens never enter the softmax: the first step's LM loss is the baseline's, to the last digit."""
    baseline, _ = run(dataset, tokenizer, tmp_path / "a", jepa_weight=0.0, max_steps=1)
    jepa, _ = run(dataset, tokenizer, tmp_path / "b", jepa_weight=1.0, num_predictor_tokens=3, max_steps=1)
    assert history(jepa, "lm_loss") == pytest.approx(history(baseline, "lm_loss"), rel=LOGGED)
    assert history(jepa, "loss")[0] > history(jepa, "lm_loss")[0]
    assert jepa.model.generation_config.suppress_tokens == jepa.predictor_ids


def test_second_stage_arms_have_the_same_lm_term(dataset, tokenizer, tmp_path):
    """From a model that brings 3 predictor tokens: k = 3, k = 1 and the baseline mask all three, and agree."""
    args = config(tmp_path / "first", num_predictor_tokens=3, max_steps=1)
    first = make(dataset, tokenizer, args, model=exact_model(tokenizer))
    first.train()
    losses = []
    for name, options in (
        ("k3", {"jepa_weight": 1.0, "num_predictor_tokens": 3}),
        ("k1", {"jepa_weight": 1.0, "num_predictor_tokens": 1}),
        ("sft", {"jepa_weight": 0.0}),
    ):
        args = config(tmp_path / name, max_steps=1, **options)
        trainer = make(dataset, first.processing_class, args, model=copy.deepcopy(first.model))
        trainer.train()
        losses += history(trainer, "lm_loss")
    assert losses == pytest.approx([losses[0]] * 3, rel=LOGGED)


def test_end_of_turn_row_of_a_fresh_model_is_trained(dataset, tokenizer, tmp_path):
    """pad = eos = end of turn: as padding_idx its input row would start at zero and never get a gradient."""
    trainer = make(
        dataset, tokenizer, config(tmp_path, max_steps=1), model=tiny_model(tokenizer, tie_word_embeddings=False)
    )
    row = trainer.model.get_input_embeddings().weight[tokenizer.eos_token_id]
    before = row.detach().clone()
    trainer.train()
    assert before.norm() > 0.05 and not torch.equal(before, row)


# -- accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["cosine", "mse"])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_is_one_big_batch(batch, accumulation, objective, dataset, tokenizer, tmp_path):
    """The rows have unequal label counts, so a mean of means fails this."""
    options = {"jepa_weight": 2.0, "objective": objective}
    big, start = run(dataset, tokenizer, tmp_path / "big", per_device_train_batch_size=8, **options)
    small, _ = run(
        dataset, tokenizer, tmp_path / "small", per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, **options,
    )  # fmt: skip
    for key in ("loss", "jepa_loss", "lm_loss"):
        assert history(small, key) == pytest.approx(history(big, key), rel=LOGGED), key
    assert_same_weights(weights(small), weights(big), start=start)


@pytest.mark.parametrize("sizes", [(3, 5), (1, 7)])
def test_uneven_micro_batches_are_one_big_batch(sizes, dataset, tokenizer, tmp_path):
    """3 + 5 = 8 in gradient: dividing each micro-batch's pairs by their own number would not be."""
    trainer, _ = run(dataset, tokenizer, tmp_path, jepa_weight=2.0, objective="cosine", max_steps=1)
    eight = trainer.train_dataset.select(range(8)).to_list()

    def gradient(parts):
        batches, labels = trainer.get_batch_samples(
            iter([trainer.data_collator(part) for part in parts]), len(parts), trainer.args.device
        )
        trainer.model.zero_grad()
        for batch in batches:
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=labels).backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    trainer.model.train()
    whole = gradient([eight])
    parts = gradient([eight[: sizes[0]], eight[sizes[0] :]])
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    assert_same_weights(parts, whole)


# -- what is trained ----------------------------------------------------------------------------------------------


def test_label_protocols_count_what_they_say(dataset, tokenizer, tmp_path):
    """completion: completion tokens + end of turn. paper: every token but the pad, which is the end of turn here."""
    counts = {}
    for protocol in ("completion", "paper"):
        trainer, _ = run(dataset, tokenizer, tmp_path / protocol, label_protocol=protocol, max_steps=1)
        row = trainer.train_dataset[0]
        counts[protocol] = [label for label in row["labels"] if label != -100]
        assert (tokenizer.eos_token_id in counts[protocol]) == (protocol == "completion")
        if protocol == "paper":
            assert counts[protocol] == [token for token in row["input_ids"] if token != tokenizer.pad_token_id]
    assert len(counts["paper"]) > len(counts["completion"])


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_and_saves_exactly_its_adapters_and_the_predictor_rows(tied, dataset, tokenizer, tmp_path):
    model = tiny_model(tokenizer, tie_word_embeddings=tied)
    fresh = copy.deepcopy(model)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.0)
    args = config(tmp_path, jepa_weight=1.0, num_predictor_tokens=2, learning_rate=0.5)
    trainer = make(dataset, tokenizer, args, model=model, peft_config=lora)
    vocabulary = torch.arange(len(trainer.processing_class))
    before = trainer.base_model.get_input_embeddings()(vocabulary).detach().clone()
    trainer.train()
    after = trainer.base_model.get_input_embeddings()(vocabulary).detach()
    moved = (after - before).abs().sum(dim=1).nonzero()[:, 0].tolist()
    assert moved == trainer.predictor_ids, "all predictor rows and no other must move"

    trainer.save_model(str(tmp_path / "adapter"))
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    numel = sum(p.numel() for p in trained.values())
    assert sum(t.numel() for t in saved.values()) >= numel, "something the optimizer trains is not saved"

    add_predictor_tokens(fresh, copy.deepcopy(tokenizer), 2)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"] + trainer.predictor_ids])
    trainer.model.eval(), reloaded.eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, trainer.model(ids).logits)


def test_bf16_autocast_keeps_float32_masters(dataset, tokenizer, tmp_path):
    trainer = make(dataset, tokenizer, config(tmp_path, bf16=True, jepa_weight=1.0, objective="cosine"))
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    exact = make(dataset, tokenizer, config(tmp_path / "fp32", jepa_weight=1.0, objective="cosine"))
    exact.train()
    assert history(trainer, "loss") == pytest.approx(history(exact, "loss"), rel=0.01)
    assert history(trainer, "loss") != history(exact, "loss"), "autocast was not on"


def test_narrow_master_weights_are_warned_of(dataset, tokenizer, tmp_path, monkeypatch):
    from llm_jepa.lm import trainer as module

    warned = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *a: warned.append(text))
    make(dataset, tokenizer, config(tmp_path), model=tiny_model(tokenizer))
    assert not warned
    make(dataset, tokenizer, config(tmp_path), model=tiny_model(tokenizer, dtype=torch.bfloat16))
    assert len(warned) == 1 and "dtype: float32" in warned[0]


# -- saving and resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_run_is_the_uninterrupted_run(lora, dataset, tokenizer, tmp_path):
    """AdamW, dropout in the adapters, accumulation, mid-epoch: weights and logged losses equal bit for bit."""

    def trainer(folder, **options):
        peft = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1) if lora else None
        args = config(
            folder, max_steps=6, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=0.01,
            lr_scheduler_type="linear", gradient_accumulation_steps=2, per_device_train_batch_size=3,
            jepa_weight=1.0, max_grad_norm=1.0, **options,
        )  # fmt: skip
        return make(dataset, tokenizer, args, dataset, peft_config=peft)

    whole = trainer(tmp_path / "whole", diagnostics_pairs=16)
    whole.train()
    resumed = trainer(tmp_path / "whole", diagnostics_pairs=16)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert history(resumed, "loss") == history(whole, "loss")
    assert history(resumed, "num_tokens") == history(whole, "num_tokens")
    assert resumed.start_diagnostics == whole.start_diagnostics


def test_every_trained_parameter_is_in_the_checkpoint(dataset, tokenizer, tmp_path):
    trainer, _ = run(dataset, tokenizer, tmp_path, save_strategy="steps", save_steps=3, num_predictor_tokens=2)
    folder = tmp_path / "checkpoint-3"
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, p in trainer.model.named_parameters():
        assert id(p) in optimized
        assert torch.equal(dict(reloaded.named_parameters())[name], p), name
    assert reloaded.config.use_cache and reloaded.config.llm_jepa["num_predictor_tokens"] == 2
    assert reloaded.generation_config.suppress_tokens == trainer.predictor_ids
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|predictor_2|>") == trainer.predictor_ids[1]
    assert not list(tmp_path.rglob("training_args.bin")), "a pickle was left in the checkpoint"
    assert checkpoint.fault(folder) is None


def test_nan_stops_before_the_optimizer_and_names_the_last_good_checkpoint(dataset, tokenizer, tmp_path):
    trainer = make(dataset, tokenizer, config(tmp_path, save_strategy="steps", save_steps=2, max_steps=8))
    real = trainer.losses

    def poisoned(model, inputs, plan, part):
        losses = real(model, inputs, plan, part)
        return losses._replace(token_nll=losses.token_nll * (float("nan") if plan.step == 4 else 1.0))

    trainer.losses = poisoned
    with pytest.raises(NonFiniteLossError, match="step 5.*checkpoint-4"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.state.global_step == 4


def test_infinite_gradient_of_a_finite_loss_stops_too(dataset, tokenizer, tmp_path):
    trainer = make(dataset, tokenizer, config(tmp_path, max_grad_norm=1.0))
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteLossError, match="Gradient is not finite at step 1.*none yet"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


# -- evaluation ---------------------------------------------------------------------------------------------------


def test_eval_loss_is_weighted_by_tokens_and_pairs(dataset, tokenizer, tmp_path):
    """Batches of 5 and 3 rows of unequal length: the same figures as one batch of 8, which a mean of batches misses."""
    eight = dataset.select(range(8))
    figures = {}
    for size in (8, 5):
        args = config(
            tmp_path, per_device_eval_batch_size=size, objective="cosine", jepa_weight=0.5, diagnostics_pairs=8
        )
        trainer = make(dataset, tokenizer, args, eight, model=exact_model(tokenizer))
        figures[size] = trainer.evaluate()
    for key in ("eval_loss", "eval_lm_loss", "eval_jepa_loss", "eval_recall_at_1"):
        assert figures[5][key] == pytest.approx(figures[8][key], rel=EXACT), key
    key = "eval_effective_rank_target"  # diagnostics compute in float32
    assert figures[5][key] == pytest.approx(figures[8][key], rel=FLOAT32)
    assert figures[8]["eval_loss"] == pytest.approx(
        figures[8]["eval_lm_loss"] + 0.5 * figures[8]["eval_jepa_loss"], rel=EXACT
    )


def test_evaluation_does_not_change_training(dataset, tokenizer, tmp_path):
    options = {"max_steps": 4, "jepa_weight": 1.0}
    without, _ = run(dataset, tokenizer, tmp_path / "a", **options)
    args = config(tmp_path / "b", eval_strategy="steps", eval_steps=1, diagnostics_pairs=16, **options)
    with_eval = make(dataset, tokenizer, args, dataset, model=exact_model(tokenizer))
    with_eval.train()
    assert_same_weights(weights(with_eval), weights(without), bound=0)


def test_best_checkpoint_is_the_best_on_validation(dataset, tokenizer, tmp_path):
    """A learning rate that first helps and then harms: the loaded model is not the last one."""
    args = config(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=6,
        load_best_model_at_end=True, metric_for_best_model="eval_lm_loss", greater_is_better=False, save_total_limit=1,
        learning_rate=3.0, jepa_weight=0.1, objective="cosine",
    )  # fmt: skip
    trainer = make(dataset, tokenizer, args, dataset.select(range(16)), model=exact_model(tokenizer))
    trainer.train()
    losses = history(trainer, "eval_lm_loss")
    assert min(losses) < losses[-1] - 1e-4, "the last step is the best: this would prove nothing"
    assert trainer.evaluate()["eval_lm_loss"] == pytest.approx(min(losses), rel=EXACT)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{1 + losses.index(min(losses))}")


def test_diagnostics_of_several_validation_sets_belong_to_the_first(dataset, tokenizer, tmp_path):
    args = config(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1, diagnostics_pairs=16)
    sets = {"near": dataset.select(range(20)), "far": dataset.select(range(20, 40))}
    trainer = make(dataset, tokenizer, args, sets)
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_near_lm_loss", "eval_far_lm_loss", "eval_near_recall_at_1"} <= logged
    assert "eval_far_recall_at_1" not in logged


@pytest.mark.parametrize("metric", ["eval_far_lm_loss", "eval_near_recall_at_1"])
def test_one_of_several_validation_sets_may_choose_the_weights(metric, dataset, tokenizer, tmp_path):
    args = config(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=1,
        load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=False, diagnostics_pairs=16,
    )  # fmt: skip
    trainer = make(dataset, tokenizer, args, {"near": dataset.select(range(20)), "far": dataset.select(range(20, 40))})
    trainer.train()
    assert trainer.state.best_global_step == 1


def test_diagnostics_are_logged_at_step_zero_and_in_every_evaluation(dataset, tokenizer, tmp_path):
    args = config(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2, diagnostics_pairs=16)
    trainer = make(dataset, tokenizer, args, dataset)
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_effective_rank_predicted" in entry]
    assert steps == [0, 1, 2]
    assert len(trainer._bank[0]["target_key"]) + sum(len(b["target_key"]) for b in trainer._bank[1:]) == 16


def test_num_tokens_counts_every_real_token_of_an_epoch_once(dataset, tokenizer, tmp_path):
    """48 rows in 6 steps, logged every 4: the steps after the last log count too, padding does not."""
    trainer, _ = run(dataset, tokenizer, tmp_path, max_steps=6, logging_steps=4, jepa_weight=1.0)
    lengths = [
        sum(len(segment.ids) for segment in trainer.data_collator.example(row).segments)
        for row in trainer.train_dataset.to_list()
    ]
    assert history(trainer, "num_tokens")[-1] == sum(lengths)
    assert trainer.state.num_input_tokens_seen == sum(lengths)


def test_tensorboard_gets_every_term_and_the_diagnostics(dataset, tokenizer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    args = config(
        tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2, diagnostics_pairs=16, report_to="tensorboard"
    )
    make(dataset, tokenizer, args, dataset).train()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {"train/lm_loss", "train/jepa_loss", "eval/loss", "eval/lm_loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/recall_at_1")] == [0, 1, 2]


def test_a_model_can_be_named_by_its_folder(dataset, tokenizer, tmp_path):
    """Float32 weights, the folder's own tokenizer."""
    tiny_model(tokenizer, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = LLMJEPATrainer(str(tmp_path / "model"), config(tmp_path / "run"), dataset)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert "<|predictor_1|>" in trainer.processing_class.get_vocab()


def test_collapse_is_warned_of_once(dataset, tokenizer, tmp_path, monkeypatch):
    """Plain cosine with a heavy weight and nothing else to learn collapses in a few steps."""
    from llm_jepa.core import trainer as module

    warned = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *a: warned.append(text))
    args = config(
        tmp_path, jepa_weight=50.0, objective="cosine", max_steps=60, optim="adamw_torch", learning_rate=3e-3,
        eval_strategy="steps", eval_steps=10, diagnostics_pairs=48, logging_steps=60,
    )  # fmt: skip
    make(dataset, tokenizer, args, dataset).train()
    collapse = [text for text in warned if "collapsed" in text]
    assert len(collapse) == 1 and "info_nce" in collapse[0]


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"packing": True}, "packing"),
        ({"padding_free": True}, "padding_free"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"assistant_only_loss": True}, "label_protocol"),
        ({"completion_only_loss": False}, "label_protocol"),
        ({"activation_offloading": True}, "activation_offloading"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"logging_nan_inf_filter": True}, "NaN"),
        ({"jepa_weight": -1.0}, "jepa_weight"),
        ({"jepa_weight": math.nan}, "jepa_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"num_predictor_tokens": 11}, "0..10"),
        ({"max_length": 0}, "max_length"),
        ({"hub_token": "hf_secret"}, "hf auth login"),
    ],
)
def test_options_our_loss_cannot_honour_are_refused(options, named, tmp_path):
    with pytest.raises(UserError, match=named):
        config(tmp_path, **options)


def test_info_nce_without_other_pairs_is_refused(dataset, tokenizer, tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    with pytest.raises(UserError, match="negatives"):
        make(dataset, tokenizer, config(tmp_path, **options))
    make(dataset, tokenizer, config(tmp_path, **options, negatives="optimizer_step"))


def test_parallelism_config_is_refused(tmp_path):
    from accelerate import ParallelismConfig

    with pytest.raises(UserError, match="attention mask"):
        LLMJEPAConfig(str(tmp_path), use_cpu=True, parallelism_config=ParallelismConfig())


@pytest.mark.parametrize("argument", ["compute_loss_func", "compute_metrics", "data_collator", "formatting_func"])
def test_arguments_that_would_be_ignored_are_refused(argument, dataset, tokenizer, tmp_path):
    with pytest.raises(UserError, match=argument):
        LLMJEPATrainer(
            tiny_model(tokenizer), config(tmp_path), dataset, processing_class=tokenizer, **{argument: lambda *a: None}
        )


def test_text_of_a_predictor_token_is_refused(rows, tokenizer, tmp_path):
    bad = copy.deepcopy(rows[:3])
    bad[2]["messages"][-1]["content"] = "a<|predictor_1|>"
    with pytest.raises(UserError, match="row 2 holds the text of a predictor token"):
        make(Dataset.from_list(bad), tokenizer, config(tmp_path))


def test_rows_longer_than_learned_positions_are_refused(dataset, tokenizer, tmp_path):
    model = tiny_model(tokenizer, "gpt2", n_positions=40)
    with pytest.raises(UserError, match=r"46 of 48 train rows .* 40 positions .* set max_length: 39"):
        make(dataset, tokenizer, config(tmp_path), model=model)


def test_empty_data_and_other_types_are_refused(dataset, rows, tokenizer, tmp_path):
    with pytest.raises(UserError, match="empty"):
        LLMJEPATrainer(tiny_model(tokenizer), config(tmp_path), dataset.select([]), processing_class=tokenizer)
    with pytest.raises(UserError, match="train data is a list"):
        LLMJEPATrainer(tiny_model(tokenizer), config(tmp_path), rows, processing_class=tokenizer)


@pytest.mark.parametrize("option", [{"objective": "stp"}, {"jepa_dropout": 0.9}, {"negatives": "optimizer_step"}])
def test_weight_zero_of_any_objective_is_the_baseline(option, dataset, tokenizer, tmp_path):
    """`--jepa_weight 0` on whatever recipe: the keys of the JEPA term have no effect, and none is in the way."""
    options = {"jepa_weight": 0.0, "max_steps": 2}
    trainer, start = run(dataset, tokenizer, tmp_path / "a", **options, **option)
    plain, _ = run(dataset, tokenizer, tmp_path / "b", **options)
    assert_same_weights(weights(trainer), weights(plain), start=start)
