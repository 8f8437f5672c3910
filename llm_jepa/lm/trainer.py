"""`LLMJEPATrainer`: TRL's `SFTTrainer` with L = L_LM + jepa_weight * d(predicted, target)  (arXiv:2509.14252, eq. 2).

One optimizer step:

    plan_step      decides what its micro-batches do (`plan.LMStepPlan`)
    compute_loss   runs one micro-batch (`objective.LLMJEPALoss`) and divides its sums by the counts of the plan

Both terms are sums divided by counts of the *whole* optimizer step (labels and pairs over all micro-batches and ranks).
So batch 8 = 2 x 4 = 3 + 5 = two ranks of 4 in gradient. If the objective compares every pair with every other (InfoNCE,
the regularizers), the pairs of all ranks are gathered; those of other micro-batches only with
`negatives: optimizer_step`.

Shapes: R rows, L tokens in a row, B examples, P pairs, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.utils import logging
from trl import SFTTrainer

from ..core.checks import check_stream_batches
from ..core.distributed import reshard, shared_coin
from ..core.errors import UserError
from ..core.pairs import PairKeys
from ..core.sources import stream_of
from ..core.streaming import Position
from ..core.trainer import EVALUATION, JEPATrainer
from . import sentence_transformer
from .adapter import is_in_4bit, save_adapter
from .arguments import LLMJEPAConfig, check_objective
from .batching import KEYS, JEPACollator, Layout, keys_of, lm_rows_only
from .card import sample_of, write_model_card
from .data import (
    VIEW_COLUMNS,
    Preparation,
    RowCounts,
    bank_collator,
    check_dataset,
    first_views,
    fit_to_model,
    form_of_rows,
    make_bank,
    set_pad_token,
    settle_form,
    training_collator,
    view_columns,
)
from .keys import JEPAKeys, check_streamed_training
from .loading import model_from, tokenizer_from
from .objective import JEPATerm, LLMJEPALoss, sums_of_examples
from .plan import LMStepPlan, MicroBatch, comparison, count_labels, plan_alone, plan_micro_batch
from .predictor_tokens import add_predictor_tokens, known_predictor_ids
from .probe import agree_on_layout
from .prompts import TRAINED
from .reading import embed_pairs
from .streaming import RowViews, endless_rows
from .targets import base_targets
from .token_rows import add_missing_rows, train_token_rows

logger = logging.get_logger(__name__)

# They do not change what is learned.
BOOKKEEPING = ("diagnostics_pairs", "share_rows", "stop_after", "logging_nan_inf_filter")
ADVICE = {
    "info_nce": "From random weights this can pass; if it stays, lower learning_rate, or raise the batch size.",
    "stp": "STP does not look at pairs, so this is its side effect or the model's own; compare with jepa_weight: 0.",
}
OTHER_ADVICE = (
    "The JEPA loss is low for a trivial reason: try objective: info_nce, a regularizer, a smaller jepa_weight, or "
    "target_encoder: stop_gradient."
)


class LLMJEPATrainer(JEPATrainer, SFTTrainer):
    """Fine-tune a causal LM with a JEPA term. The model stays an ordinary `PreTrainedModel` (or `PeftModel`).

    Args:
        model: a causal LM, or the Hub id or folder of one (then loaded with float32 weights).
        args: `LLMJEPAConfig`.
        train_dataset, eval_dataset: TRL prompt-completion or conversational rows (`rows.parse_row`). Training rows
            may be a `datasets.IterableDataset`, which is read again when it ends; `args.max_steps` ends the run.
        processing_class: the tokenizer; predictor tokens are added to it and to the model.
        peft_config: LoRA configuration; the rows of the predictor tokens are added to what it trains.
        preparation: of `data.prepare_rows`, whose data sets are then given; it may hold a stream.

    Raises UserError for data, models and options with which the training would not do what they say.
    """

    _tag_names = ["trl", "sft", "llm-jepa"]
    advice_if_not_finite = "Lower learning_rate or jepa_weight, or look at the rows of this step."
    refused = (*JEPATrainer.refused, "formatting_func")
    sum_names = ("lm_loss", "labels", "pair_loss", "pairs", "tokens", "router_loss", "micro_batches")
    args: LLMJEPAConfig
    plan: LMStepPlan
    train_dataset: Any
    eval_dataset: Any
    data_collator: JEPACollator
    layout: Layout  # of the rows, as the probe found it

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: LLMJEPAConfig,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        preparation: Preparation | None = None,
        **kwargs: Any,
    ) -> None:
        self.check_call(args, kwargs)
        if isinstance(model, PeftModel):
            raise UserError("The model is a PeftModel already; pass the base model and peft_config.")
        if isinstance(model, str):
            processing_class = processing_class or tokenizer_from(model)
            model = model_from(model, dtype=torch.float32)
        if processing_class is None:
            processing_class = tokenizer_from(model.config._name_or_path)
        check_dataset("train", train_dataset)
        check_dataset("eval", eval_dataset)
        if args.world_size > 1 and not args.average_tokens_across_devices:
            raise UserError("average_tokens_across_devices: false would weight ranks by their share; remove it.")
        self.predictor_ids = prepare_model(model, processing_class, args, peft_config)
        # The baseline masks them too, in case it starts from a model that has such tokens already.
        self.masked_ids = known_predictor_ids(processing_class)
        self.base_model = model  # without the wrappers of PEFT and DDP
        self._use_cache = model.config.use_cache
        self.row_counts: dict[str, RowCounts] = {}
        if preparation is not None:
            self.row_counts |= preparation.counts
        self._streamed = None if preparation is None else preparation.streamed
        if isinstance(train_dataset, IterableDataset):
            check_streamed_training(args)
            self._streamed = first_views(stream_of(train_dataset), processing_class, args)
        if self._streamed is not None:
            check_stream_batches(args)
        raw = train_dataset if self._streamed is None else self._streamed.raw
        self._form = preparation.form if preparation is not None else form_of_rows(raw, processing_class)
        self._is_ready = False  # until both data sets are
        self._bank_collator = bank_collator(args, processing_class.pad_token_id, self.predictor_ids)
        with warnings.catch_warnings():
            # PEFT asks the model for an old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            super().__init__(
                model=model,
                args=args,
                data_collator=self._bank_collator,  # until the layout is known
                train_dataset=train_dataset if self._streamed is None else raw.to_iterable_dataset(),
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                **kwargs,
            )
        self._is_ready = True
        if is_in_4bit(model):
            # TRL makes the adapter bfloat16, in which small steps are rounded away.
            for p in self.model.parameters():
                p.data = p.data.float() if p.requires_grad else p.data
        check_support(self)
        self._saved_template = preparation.template if preparation is not None else None
        if preparation is None and self._form is not TRAINED:
            self._form, self._saved_template = settle_form(self._form, raw, self._checked_rows, processing_class)
        if self._form is not TRAINED:
            model.config.llm_jepa["prompt"] = self._form.to_dict()
        config = model.config.get_text_config()
        self.term = JEPATerm(args, config.hidden_size, args.device, model.dtype)
        self.losses = LLMJEPALoss(args, model, self.term, self.masked_ids, self.aux_loss_enabled)
        self._micro_batches: Iterator[MicroBatch] = iter(())
        if args.uses_jepa:
            opaque = self.is_deepspeed_enabled or self.is_fsdp_enabled and not self.accelerator.is_fsdp2
            check_objective(args, config, self._checked_rows, sharded=self.is_sharded, opaque=opaque)
        self._set_layout()
        if args.target_placement == "cached":
            self._embed_base_targets()
        if isinstance(self.eval_dataset, dict):
            self.bank_prefix = f"eval_{next(iter(self.eval_dataset))}"
        self._bank = make_bank(self.eval_dataset, self._bank_collator, args)

    def _set_layout(self) -> None:
        """Probe the model and make the collators of its layout."""
        args = self.args
        needs_rows = args.uses_views or args.share_rows
        layout: Layout = "packed"
        if needs_rows or (args.diagnostics_pairs and self.eval_dataset is not None):
            # A forward pass of a sharded model needs all ranks; otherwise rank 0 decides for all of them.
            probes = self.is_world_process_zero() or self.is_distributed_loading_by_transformers
            layout, error = agree_on_layout(self.base_model, len(self.predictor_ids), args.world_size, probes=probes)
            if error and needs_rows:
                raise UserError(error)
            if error:
                logger.warning(f"No diagnostics of the embedding space: {error}")
                args.diagnostics_pairs = 0
        if args.share_rows and layout != "packed":
            raise UserError(
                f"share_rows: true needs packed rows, which {type(self.base_model).__name__} cannot have; remove it."
            )
        self.layout = layout
        self._bank_collator = replace(self._bank_collator, layout=layout)
        hidden_size = self.base_model.config.get_text_config().hidden_size
        self.data_collator = training_collator(self._bank_collator, args, hidden_size)

    @property
    def _checked_rows(self) -> Dataset:
        """The training rows as views; of a stream, the first ones."""
        return self.train_dataset if self._streamed is None else self._streamed.views

    def _embed_base_targets(self) -> None:
        self.train_dataset, self.eval_dataset, table = base_targets(
            self.base_model, self.args, self.train_dataset, self.eval_dataset, self.processing_class.pad_token_id
        )
        self.data_collator = replace(self.data_collator, target_table=table)

    # -- data ---------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, packing: Any, formatting_func: Any, dataset_name: str
    ) -> Dataset:
        """Rows -> view columns. Idempotent, because `evaluate` calls it again. (The signature is TRL's.)

        Of a stream, only the first rows; the others follow in training.
        """
        if self._streamed is not None and dataset_name == "train":
            fit_to_model(self._streamed.views, args, self.base_model.config, self._bank_collator, dataset_name)
            return endless_rows(
                self._streamed,
                RowViews(processing_class, self._streamed.form, args, self.base_model.config, len(self.predictor_ids)),
            )
        if not set(VIEW_COLUMNS) <= set(dataset.column_names):
            with args.main_process_first(desc="building views"):
                dataset, self.row_counts[dataset_name] = view_columns(
                    dataset, processing_class, args, self._form, dataset_name
                )
        elif self._is_ready:
            return dataset
        dataset = fit_to_model(dataset, args, self.base_model.config, self._bank_collator, dataset_name)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*VIEW_COLUMNS, "target_table_rows", self.args.length_column_name]

    # -- the step -----------------------------------------------------------------------------------------------------

    def plan_step(self, batches: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], LMStepPlan, Tensor]:
        """Decide what this optimizer step does; see `LMStepPlan`.

        With `negatives: optimizer_step` the model runs here for the first time: it embeds all pairs without gradient.
        """
        args, step = self.args, self.state.global_step
        # One coin of (seed, step) for all ranks: ranks that disagree would wait for each other's pairs forever.
        dropped = args.jepa_dropout > 0 and shared_coin(args.seed, step) < args.jepa_dropout
        if dropped:
            batches = [lm_rows_only(batch) for batch in batches]
        compares = comparison(args, dropped=dropped)
        parts = [plan_micro_batch(batch, args, self.layout, compares, step=step) for batch in batches]
        labels = sum(count_labels(batch) for batch in batches)
        # [] each, at least 1
        labels, pairs = self.count_over_ranks([labels, sum(part.num_pairs for part in parts)])
        if batches and compares == "known":
            parts = self._compare_step(batches, parts, step)
        self._micro_batches = iter(parts)
        return batches, LMStepPlan(step, pairs, compares, labels, tuple(parts)), labels

    def _compare_step(self, batches: list[dict[str, Tensor]], parts: list[MicroBatch], step: int) -> list[MicroBatch]:
        """`negatives: optimizer_step`: embed the whole step without gradient, and compare all of its pairs.

        Dropout depends on (seed, step, micro-batch, rank), so that the pass that learns can draw it again. It does not
        depend on the state of the generators: Trainer restores that of a resumed run only after its first batches.
        """
        model = self.model_wrapped
        model.train()
        seeded, embeddings = [], []
        for i, (batch, part) in enumerate(zip(batches, parts, strict=True)):
            part = replace(part, dropout_seed=f"{self.args.seed} {step} {i} {self.args.process_index}")
            with self.compute_loss_context_manager():
                embeddings.append(self.losses.embed(model, batch, part))  # [P, D] each
            seeded.append(part)
        keys = keys_of({name: torch.cat([batch[name] for batch in batches]) for name in KEYS})
        known = self.term.compare_step(embeddings, keys, step=step)
        return [replace(part, known=loss) for part, loss in zip(seeded, known, strict=True)]

    def jepa_weight_now(self) -> float:
        return self.term.weight(self.state.global_step / max(self.state.max_steps, 1))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The share of one micro-batch in the loss of its optimizer step, [].

        `num_items_in_batch` is the number of labels in the whole step, from `plan_step`; without it the batch is a step
        by itself. (The reference code ignores it, so its loss grows with the accumulation steps: finetune.py.)
        """
        is_alone = num_items_in_batch is None
        if is_alone:
            step = self.state.global_step if self.model.training else EVALUATION
            plan = plan_alone(inputs, self.args, self.layout, step=step)
            (part,) = plan.micro_batches
        else:
            plan, part = self.plan, next(self._micro_batches)
        out = self.losses(model, inputs, plan, part)
        lm_sum = out.token_nll.sum()  # []
        loss = lm_sum / plan.labels
        pair_sum = lm_sum.new_zeros(())
        if out.pair_loss is not None:
            pair_sum = out.pair_loss.sum()  # [P] -> []
            loss = loss + self.jepa_weight_now() * pair_sum / plan.pairs
        if not is_alone:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over ranks
        router = lm_sum.new_zeros(())
        if out.router_loss is not None:
            # Weighted as in TRL: a mean over micro-batches, and over ranks.
            router = out.router_loss
            loss = loss + self.router_aux_loss_coef * router / len(plan.micro_batches)
        if self.model.training:
            self.sums.add(
                lm_loss=lm_sum.detach(),
                labels=len(out.token_nll),
                pair_loss=pair_sum.detach(),
                pairs=part.num_pairs,
                tokens=out.num_tokens,
                router_loss=router.detach(),
                micro_batches=int(out.router_loss is not None),
            )
        return loss

    def training_figures(self, sums: dict[str, float]) -> dict[str, float]:
        """lm_loss is a mean over tokens, jepa_loss over pairs, aux_loss over micro-batches."""
        figures = {"lm_loss": sums["lm_loss"] / max(sums["labels"], 1)}
        if sums["pairs"]:
            figures["jepa_loss"] = sums["pair_loss"] / sums["pairs"]
        if sums["micro_batches"]:
            figures["aux_loss"] = sums["router_loss"] / sums["micro_batches"]
        if self.args.jepa_weight_end is not None:
            # Of the step that ends here, as the logged learning rate is.
            figures["jepa_weight"] = self.term.weight((self.state.global_step - 1) / self.state.max_steps)
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_runtime" in logs:  # a training step, or the end of training
            self._count_tokens()
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)

    def _count_tokens(self) -> None:
        """Move the tokens of all ranks since the last call into the total, which the saved state carries on."""
        self._total_train_tokens += int(self.sums.over_ranks(self.accelerator)["tokens"])
        self.sums.reset("tokens")
        self.state.num_input_tokens_seen = self._total_train_tokens

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def example_sums(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """[B, 4]: the LM loss, labels, pair loss and pairs of each example."""
        plan = plan_alone(inputs, self.args, self.layout, step=EVALUATION)
        (part,) = plan.micro_batches
        out = self.losses(model, inputs, plan, part)
        return sums_of_examples(out, inputs, part)

    @staticmethod
    def figure_names(args: LLMJEPAConfig) -> tuple[str, ...]:
        return ("loss", "lm_loss", "jepa_loss") if args.uses_jepa else ("loss", "lm_loss")

    def figures(self, totals: list[float]) -> dict[str, float]:
        lm_sum, labels, pair_sum, pairs = totals
        figures = {"lm_loss": lm_sum / max(labels, 1)}
        figures["loss"] = figures["lm_loss"]
        if self.args.uses_jepa:
            figures["jepa_loss"] = pair_sum / max(pairs, 1)
            figures["loss"] += self.jepa_weight_now() * figures["jepa_loss"]
        return figures

    def embed_bank(self, dataset: Any) -> tuple[Tensor, Tensor, PairKeys] | None:
        """The first `diagnostics_pairs` rows of the (first) validation set, whatever `dataset` is evaluated."""
        if not self._bank:
            return None
        layer = self.args.readout_layer
        with self.compute_loss_context_manager():
            return embed_pairs(self.model, self.base_model, self._bank, layout=self.layout, layer=layer)

    def count_bank(self) -> int:
        return sum(len(batch["target_key"]) for batch in self._bank)

    def collapse_advice(self) -> str:
        return ADVICE.get(self.args.objective, OTHER_ADVICE) if self.args.uses_jepa else ""

    # -- around the optimizer step ------------------------------------------------------------------------------------

    def begin_training(self, state: TrainerState) -> None:
        self.term.start_averaging(self.model)
        if state.global_step > 0:
            self._total_train_tokens = state.num_input_tokens_seen

    def extra_state(self) -> dict[str, Tensor]:
        return self.term.state()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.term.load(state)

    def before_optimizer_step(self) -> None:
        if self.args.world_size > 1:
            self.term.before_optimizer_step(lambda gradient: self.accelerator.reduce(gradient, reduction="mean"))

    def after_optimizer_step(self, progress: float) -> None:
        self.term.after_optimizer_step(progress)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Also trains the projector, which belongs to the loss and not to the model."""
        reshard(self.base_model)  # or it would take what the probe or an evaluation gathered for the weights
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        projector = list(self.term.projector.parameters()) if self.term.projector is not None else []
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # The optimizer may be the user's, and this may be called twice.
        if projector and id(projector[0]) not in known:
            optimizer.add_param_group({"params": projector, "weight_decay": self.args.weight_decay})
        return optimizer

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save an adapter alone; restore `use_cache` of a whole model, which training switched off."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            folder, is_main = output_dir or self.args.output_dir, self.args.should_save
            with self.template_to_save():
                save_adapter(model, self.processing_class, folder, state_dict=state_dict, is_main_process=is_main)
            return
        if state_dict is not None:  # gathered from shards, where a tied head became a second tensor
            state_dict = {key: value for key, value in state_dict.items() if key not in model.all_tied_weights_keys}
        in_training, self.base_model.config.use_cache = self.base_model.config.use_cache, self._use_cache
        try:
            with self.template_to_save():
                super()._save(output_dir, state_dict=state_dict)
        finally:
            self.base_model.config.use_cache = in_training
        if self.args.should_save:
            sentence_transformer.write_files(output_dir or self.args.output_dir, self.processing_class, model.config)

    @contextlib.contextmanager
    def template_to_save(self) -> Iterator[None]:
        """Inside the block, the tokenizer has the chat template that asks what was trained; see `settle_form`.

        Training keeps its own: labels begin where TRL's generation prompt ends.
        """
        tokenizer = self.processing_class
        in_training = tokenizer.chat_template
        tokenizer.chat_template = self._saved_template or in_training
        try:
            yield
        finally:
            tokenizer.chat_template = in_training

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._count_tokens()
        super()._save_checkpoint(model, trial)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A tied head is neither in the file nor missing; transformers would warn about it at every resume."""
        model = self.base_model
        tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def write_card(self, folder: Path) -> None:
        refusal = sentence_transformer.plan(self.processing_class, self.base_model.config).refusal
        facts, sample = self.card_facts(folder), None
        # Rank 0 cannot run sharded weights alone, and a card that goes to the Hub unread shows no row.
        is_adapter = is_in_4bit(self.base_model)
        if not self.is_sharded and not self.args.push_to_hub:
            sample = sample_of(self.base_model, self.processing_class, self.eval_dataset)
        rows: dict[str, RowCounts | Position] = {**self.row_counts}
        if self.is_streaming:
            rows["train"] = self.position
        write_model_card(folder, self.base_model, self.args, facts, rows, refusal, sample, is_adapter)


def prepare_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: LLMJEPAConfig,
    peft_config: PeftConfig | None,
) -> list[int]:
    """Set the pad token, give every token a row, add the predictor tokens and write the settings, all in place.

    Returns the ids of the predictor tokens. Raises UserError for a pad token that the tokenizer does not have, or for
    an adapter that cannot train the new rows.
    """
    set_pad_token(tokenizer, args)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    added_ids = add_missing_rows(model, tokenizer)
    predictor_ids: list[int] = []
    if args.uses_views:
        predictor_ids = add_predictor_tokens(model, tokenizer, args.num_predictor_tokens)
    if peft_config is not None:
        train_token_rows(peft_config, model, inputs=predictor_ids, labels=added_ids)
    model.config.llm_jepa = {
        **{name: getattr(args, name) for name in JEPAKeys.__annotations__ if name not in BOOKKEEPING},
        "num_predictor_tokens": len(predictor_ids),
    }
    return predictor_ids


def check_support(trainer: LLMJEPATrainer) -> None:
    """Raises UserError for parallelism and losses that would be dropped silently; warns of narrow weights."""
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise UserError("Context and sequence parallelism drop the attention mask of packed rows; switch them off.")
    if is_in_4bit(trainer.base_model) and trainer.is_sharded:
        raise UserError("load_in_4bit: true cannot be sharded; launch with ddp, or train on one device.")
    model_class = type(trainer.base_model)
    if trainer.aux_loss_enabled and not hasattr(sys.modules[model_class.__module__], "load_balancing_loss_func"):
        raise UserError(
            f"{model_class.__name__} has a router_aux_loss_coef, but transformers has no router loss for it; set "
            "router_aux_loss_coef: 0."
        )
    narrow = {p.dtype for p in trainer.model.parameters() if p.requires_grad} - {torch.float32, torch.float64}
    if narrow:
        logger.warning(
            f"Trainable weights are {narrow.pop()}: few move in a step of a small learning rate (30 % at "
            "2e-5 in bfloat16). Keep dtype: float32 and set bf16: true for autocast."
        )
