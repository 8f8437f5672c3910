"""`LLMJEPATrainer`: TRL's `SFTTrainer` with L = L_LM + jepa_weight * d(predicted, target)  (arXiv:2509.14252, eq. 2).

One step, from a collated batch to a loss, is `_forward` and `compute_loss`. Both terms are sums divided by counts of
the *whole* optimizer step (labels and pairs over all micro-batches and ranks), so that batch 8 = 2 x 4 = 3 + 5 = two
ranks of 4 in gradient. Where every pair meets every other (InfoNCE, the regularizers) the pairs of all ranks are
gathered; accumulation steps still part them, unless `negatives: optimizer_step` says otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging
from trl import SFTTrainer

from ..core import checkpoint
from ..core.diagnostics import has_collapsed, space_diagnostics
from ..core.distributed import reshard, shared_coin
from ..core.errors import UserError
from ..core.losses import at_least_float32
from ..core.trainer import SafeTrainer
from .arguments import LLMJEPAConfig
from .batching import (
    embed_pairs,
    lm_rows_only,
    model_inputs,
    no_logits,
    read,
    router_logits_of,
    router_loss,
)
from .card import write_model_card
from .data import VIEW_COLUMNS, check_dataset, pair_collator, training_collator, view_columns
from .loading import model_from, tokenizer_from
from .objective import EVALUATION, Objective, check_objective, random_numbers_of
from .predictor_tokens import add_predictor_tokens, known_predictor_ids, train_token_rows
from .probe import choose_layout
from .targets import load_state, save_state, target_table
from .views import IGNORE

logger = logging.get_logger(__name__)

JEPA_STATE = "jepa_state.safetensors"
BOOKKEEPING = ("diagnostics_pairs", "share_rows", "logging_nan_inf_filter")  # changes nothing that is learnt
COLLAPSED = (
    "At two evaluations in a row the embedding space had collapsed: wrong pairs as close as right ones, or hardly any "
    "direction left ({figures}). {advice}"
)
ADVICE = {
    "info_nce": "From random weights this can pass; if it stays, lower learning_rate, or raise the batch size.",
    "stp": "STP does not look at pairs, so this is its side effect or the model's own; compare with jepa_weight: 0.",
}
OTHER_ADVICE = (
    "The JEPA loss is low for a trivial reason: try objective: info_nce, a regularizer, a smaller jepa_weight, or "
    "target_encoder: stop_gradient."
)


class StepOutput(NamedTuple):
    token_nll: Tensor  # [labels] negative log-likelihood in nats, float32
    label_at: Tensor  # [labels] the flat place in the batch that predicts each
    pair_loss: Tensor | None  # [P], None for plain SFT
    example_of_pair: Tensor | None  # [P]
    router_loss: Tensor | None  # of a mixture of experts
    num_tokens: Tensor  # real tokens in the batch, views included


class LLMJEPATrainer(SafeTrainer, SFTTrainer):
    """Fine-tune a causal LM with a JEPA term. The model stays an ordinary `PreTrainedModel` (or `PeftModel`).

    Args:
        model: a causal LM, or the Hub id or folder of one (then loaded with float32 weights).
        args: `LLMJEPAConfig`.
        train_dataset, eval_dataset: TRL prompt-completion or conversational rows (`views.as_example`).
        processing_class: the tokenizer; predictor tokens are added to it and to the model.
        peft_config: LoRA configuration; the predictor tokens' rows are added to what it trains.

    Raises UserError for data, models and options that would train something else than they say.
    """

    _tag_names = ["trl", "sft", "llm-jepa"]
    advice_if_not_finite = "Lower learning_rate or jepa_weight, or look at the rows of this step."
    args: LLMJEPAConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: LLMJEPAConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("compute_loss_func", "compute_metrics", "data_collator", "formatting_func"):
            if kwargs.get(name) is not None:
                raise UserError(f"{name} has no place here: this trainer brings its own loss and batches; remove it.")
        if isinstance(model, PeftModel):
            raise UserError("The model is a PeftModel already; pass the base model and peft_config.")
        if isinstance(model, str):
            processing_class = processing_class or tokenizer_from(model)
            model = model_from(model, dtype=torch.float32)
        if processing_class is None:
            processing_class = tokenizer_from(model.config._name_or_path)
        for name, dataset in (("train", train_dataset), ("eval", eval_dataset)):
            check_dataset(name, dataset)
        if args.n_gpu > 1:
            raise UserError(
                f"One process sees {args.n_gpu} GPUs and would wrap the model in nn.DataParallel; use --launch ddp, or "
                "show it one with CUDA_VISIBLE_DEVICES=0."
            )
        if args.world_size > 1 and not args.average_tokens_across_devices:
            raise UserError("average_tokens_across_devices: false would weight ranks by their share; remove it.")

        # eos for want of another, as TRL and the published script do
        pad_token = args.pad_token or processing_class.pad_token or processing_class.eos_token
        if pad_token not in processing_class.get_vocab():
            raise UserError(f"The pad token {pad_token!r} is not in the tokenizer's vocabulary; set pad_token to one.")
        processing_class.pad_token = pad_token
        model.config.pad_token_id = processing_class.pad_token_id
        if model.generation_config is not None:
            model.generation_config.pad_token_id = processing_class.pad_token_id

        self.predictor_ids: list[int] = []
        if args.uses_views:
            self.predictor_ids = add_predictor_tokens(model, processing_class, args.num_predictor_tokens)
            if peft_config is not None:
                train_token_rows(peft_config, model, self.predictor_ids)
        # In the baseline too, should it start from a model that brings such tokens.
        self._masked_ids = known_predictor_ids(processing_class)
        model.config.llm_jepa = {
            **{name: getattr(args, name) for name in LLMJEPAConfig.__annotations__ if name not in BOOKKEEPING},
            "num_predictor_tokens": len(self.predictor_ids),
        }
        self._base_model = model
        self._use_cache = model.config.use_cache
        self._pairs_of = pair_collator(args, processing_class.pad_token_id, self.predictor_ids)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._pairs_of,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        if self.accelerator.parallelism_config is not None and (
            self.accelerator.parallelism_config.cp_enabled or self.accelerator.parallelism_config.sp_enabled
        ):
            raise UserError("Context and sequence parallelism drop the attention mask of packed rows; switch them off.")
        if (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true") and not self.is_fsdp_enabled:
            raise UserError(
                "FSDP was asked for, and without GPUs Accelerate makes DDP of it in silence; use --launch cpu."
            )
        narrow = {p.dtype for p in self.model.parameters() if p.requires_grad} - {torch.float32, torch.float64}
        if narrow:
            logger.warning(
                f"Trainable weights are {narrow.pop()}: few move in a step of a small learning rate (30 % at "
                "2e-5 in bfloat16). Keep dtype: float32 and set bf16: true for autocast."
            )
        if self.aux_loss_enabled and not hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func"):
            raise UserError(
                f"{type(model).__name__} has a router_aux_loss_coef, but transformers has no router loss for it; set "
                "router_aux_loss_coef: 0."
            )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the counts of the whole step itself
        self._pairs_in_step: Tensor | int = 1
        # lm_sum, labels, pair_sum, pairs, tokens, router loss, micro-batches since the last log
        self._sums = torch.zeros(7, device=args.device)
        self._eval_examples: list[Tensor] = []
        config = model.config.get_text_config()
        self.objective = Objective(args, config.hidden_size, args.device, model.dtype)
        self._is_fsdp = self.is_fsdp_enabled or self.is_distributed_loading_by_transformers
        if args.uses_jepa:
            sharded = self._is_fsdp or self.is_deepspeed_enabled
            # DeepSpeed and FSDP1 have weights of their own behind those of the model.
            opaque = self.is_deepspeed_enabled or self.is_fsdp_enabled and not self.accelerator.is_fsdp2
            check_objective(args, config, self.train_dataset, sharded=sharded, opaque=opaque)
        self._set_layout()
        if args.uses_jepa and args.target_encoder == "base":
            self._embed_base_targets()
        self._bank = self._make_bank()
        self._start_diagnostics: dict[str, float] | None = None
        self._resumed_from: str | None = None
        self._is_collapsed = self._warned_of_collapse = False
        self.add_callback(_Steps(self))

    def _set_layout(self) -> None:
        """Try the model (rank 0 decides for all), and make the collators of its layout."""
        args, predictors = self.args, len(self.predictor_ids)
        found: list[Any] = ["packed", ""]  # layout, error
        if args.uses_views or args.share_rows or (args.diagnostics_pairs and self.eval_dataset is not None):
            if self.is_world_process_zero() or self.is_distributed_loading_by_transformers:  # a sharded pass takes all
                try:
                    found[0] = choose_layout(self._base_model, predictors)
                except UserError as error:
                    found[1] = str(error)
            if args.world_size > 1:
                broadcast_object_list(found)
            if found[1] and (args.uses_views or args.share_rows):
                raise UserError(found[1])
            if found[1]:
                logger.warning(f"No diagnostics of the embedding space: {found[1]}")
                args.diagnostics_pairs = 0
        if args.share_rows and found[0] != "packed":
            raise UserError(
                f"share_rows: true needs packed rows, which {type(self._base_model).__name__} cannot have; remove it."
            )
        self._pairs_of = replace(self._pairs_of, layout=found[0])
        hidden_size = self._base_model.config.get_text_config().hidden_size
        self.data_collator = training_collator(self._pairs_of, args, hidden_size)

    def _embed_base_targets(self) -> None:
        """The start model's targets of every row, once. Equal targets have one row in the table."""
        side = "contexts" if self.args.direction == "reverse" else "targets"
        number: dict[tuple[int, ...], int] = {}

        def numbered(dataset: Any) -> Any:
            if dataset is None or isinstance(dataset, dict):
                return dataset and {name: numbered(part) for name, part in dataset.items()}
            rows = [[number.setdefault(tuple(ids), len(number)) for ids in views] for views in dataset[side]]
            return dataset.add_column("target_rows", rows)

        for name in ("train_dataset", "eval_dataset"):
            setattr(self, name, numbered(getattr(self, name)))
        table = target_table(
            self._base_model,
            list(number),
            pad_token_id=self.processing_class.pad_token_id,
            batch_size=self.args.per_device_eval_batch_size,
            readout=self.args.readout,
            layer=self.args.readout_layer,
        )
        self.data_collator = replace(self.data_collator, target_table=table)

    # -- data ---------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, packing: Any, formatting_func: Any, dataset_name: str
    ) -> Dataset:
        """Rows -> view columns. Idempotent: `evaluate` calls it again. (TRL's signature; we refuse packing.)"""
        if set(VIEW_COLUMNS) <= set(dataset.column_names):
            return dataset
        with args.main_process_first(desc="building views"):
            dataset = view_columns(
                dataset, processing_class, args, self._base_model.config, self._pairs_of, dataset_name
            )
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*VIEW_COLUMNS, "target_rows", self.args.length_column_name]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one optimizer step, with its label and pair counts over all of them and all ranks.

        `jepa_dropout` takes the views out of all of them, by one coin of (seed, step).
        """
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        step = self.state.global_step
        if self.args.jepa_dropout and shared_coin(self.args.seed, step) < self.args.jepa_dropout:
            batches = [lm_rows_only(batch) for batch in batches]
        elif self.args.uses_jepa and self.args.objective == "stp":
            for batch in batches:
                batch |= self.objective.draw_tubes(batch, step)
        counts = torch.zeros(2, device=device, dtype=torch.long)
        for batch in batches:
            counts[0] += (batch["labels"][:, 1:] != IGNORE).sum()
            counts[1] += len(batch["example_of_pair"]) if "example_of_pair" in batch else 0
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        counts = counts.clamp(min=1)
        self._pairs_in_step = counts[1]
        if batches and self.args.negatives == "optimizer_step" and all("context_at" in batch for batch in batches):
            self._compare_all_pairs(batches)
        return batches, counts[0]

    def _compare_all_pairs(self, batches: list[dict[str, Any]]) -> None:
        """`negatives: optimizer_step`: the embeddings of the whole step, without gradient, for `compare_all`.

        Dropout is of (seed, step, micro-batch, rank), so that the passes that learn can draw it again. Not of the
        generators as they are: Trainer restores those of a resumed run only after its first batches were fetched.
        """
        model = self.model_wrapped
        model.train()
        found = []
        for i, batch in enumerate(batches):
            name = f"{self.args.seed} {self.state.global_step} {i} {self.args.process_index}"
            batch["random_again"] = functools.partial(random_numbers_of, name, self.args.device)
            with torch.no_grad(), self.compute_loss_context_manager(), batch["random_again"]():
                keep = no_logits(self.args.device)
                hidden = self._call(model, batch, keep).hidden_states[self.args.readout_layer]
                target = self.objective.target_without_gradient(model, batch)  # last: it is not run again
            predicted = at_least_float32(read(hidden, batch["context_at"]))
            target = read(hidden, batch["target_at"]) if target is None else target
            found.append((predicted, at_least_float32(target)))
        self.objective.compare_all(batches, found, step=self.state.global_step)

    # -- the step -----------------------------------------------------------------------------------------------------

    def _call(self, model: torch.nn.Module, inputs: dict[str, Any], logits_to_keep: Any) -> Any:
        """One forward pass through the wrapped model, keeping the hidden state that is read and no other."""
        states = {"output_hidden_states": self.args.readout_layer} if self.objective.has_pairs(inputs) else {}
        experts = {"output_router_logits": False} if self.aux_loss_enabled else {}
        return model(**model_inputs(inputs, self._base_model), logits_to_keep=logits_to_keep, **states, **experts)

    def _forward(self, model: torch.nn.Module, inputs: dict[str, Any]) -> StepOutput:
        """A collated batch -> both terms, unreduced. Logits are computed at label positions only."""
        next_token = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)  # [R, L]
        has_label = next_token != IGNORE
        target = None if "known_loss" in inputs else self.objective.target_without_gradient(model, inputs)
        with (
            inputs.get("random_again", contextlib.nullcontext)(),
            router_logits_of(self._base_model, self.aux_loss_enabled) as router_logits,
        ):
            output = self._call(model, inputs, has_label)
        logits = output.logits.reshape(-1, output.logits.shape[-1])  # [labels, V]
        logits = at_least_float32(logits)
        if self._masked_ids:
            # Inputs only: with their logits out of the softmax the LM term is the baseline's function. In place, as
            # a copy of [labels, V] is what a big vocabulary cannot spare; unseen by autograd, because the gradient of a
            # probability of 0 is 0 already.
            ids = torch.tensor(self._masked_ids, device=logits.device)
            with torch.no_grad():
                logits.index_fill_(-1, ids, torch.finfo(logits.dtype).min)
        token_nll = F.cross_entropy(logits, next_token[has_label], reduction="none")
        num_tokens = (inputs["doc"] >= 0).sum()
        if "apart_attention_mask" in inputs:
            num_tokens = num_tokens + inputs["apart_attention_mask"].sum()
        pair_loss = None
        if self.objective.has_pairs(inputs):
            hidden = output.hidden_states[self.args.readout_layer]
            step = self.state.global_step if self.model.training else EVALUATION
            pair_loss = self.objective.pair_loss(hidden, inputs, target, step=step)
        return StepOutput(
            token_nll,
            has_label.flatten().nonzero()[:, 0],
            pair_loss,
            inputs.get("example_of_pair"),
            router_loss(self._base_model, router_logits, inputs) if router_logits else None,
            num_tokens,
        )

    def jepa_weight_now(self) -> float:
        return self.objective.weight(self.state.global_step / max(self.state.max_steps, 1))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's share of the step's loss. DDP averages gradients over ranks, hence the last factor.

        The reference code ignores `num_items_in_batch` and is off by the accumulation steps (finetune.py).
        """
        step = self._forward(model, inputs)
        lm_sum = step.token_nll.sum()
        tokens = len(step.token_nll) if num_items_in_batch is None else num_items_in_batch
        loss = lm_sum / tokens
        pair_sum, pairs = lm_sum.new_zeros(()), 0
        if step.pair_loss is not None:
            pair_sum, pairs = step.pair_loss.sum(), len(step.pair_loss)
            of = max(pairs, 1) if num_items_in_batch is None else self._pairs_in_step
            loss = loss + self.jepa_weight_now() * pair_sum / of
        if self.model.training:
            self._sums[:5] += torch.stack(
                [lm_sum.detach(), loss.new_tensor(len(step.token_nll)), pair_sum.detach(), loss.new_tensor(pairs),
                 step.num_tokens.to(loss)]
            ).float()  # fmt: skip
        loss = loss * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        if step.router_loss is not None:
            # As TRL weighs it: a mean over micro-batches, and over ranks.
            micro_batches = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * step.router_loss / micro_batches
            if self.model.training:
                self._sums[5] += step.router_loss.detach()
                self._sums[6] += 1
        return loss

    def _losses_are_finite(self) -> bool:
        return math.isfinite(float(self._sums.sum()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds lm_loss (mean over tokens), jepa_loss (mean over pairs) and num_tokens since the last training log."""
        if "loss" in logs or "train_runtime" in logs:  # a training step, or the end of training
            self._count_tokens()
            logs["num_tokens"] = self._total_train_tokens
        if "loss" in logs:
            sums = (
                self.accelerator.reduce(self._sums.clone(), reduction="sum") if self.args.world_size > 1 else self._sums
            )
            lm_sum, labels, pair_sum, pairs, _, router, micro_batches = sums.tolist()
            self._sums.zero_()
            logs["lm_loss"] = lm_sum / max(labels, 1)
            if pairs:
                logs["jepa_loss"] = pair_sum / pairs
            if micro_batches:
                logs["aux_loss"] = router / micro_batches
            if self.args.jepa_weight_end is not None:
                # of the step that ends here, as the learning rate is
                logs["jepa_weight"] = self.objective.weight((self.state.global_step - 1) / self.state.max_steps)
        super().log(logs, start_time)

    def _count_tokens(self) -> None:
        """Move the tokens of all ranks since the last call into the total, which the saved state carries on."""
        tokens = self._sums[4].clone()
        if self.args.world_size > 1:
            tokens = self.accelerator.reduce(tokens, reduction="sum")
        self._sums[4] = 0
        self._total_train_tokens += int(tokens)
        self.state.num_input_tokens_seen = self._total_train_tokens

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Collects sums per example; `evaluation_loop` turns them into token- and pair-weighted means."""
        inputs = self._prepare_inputs(inputs)
        if self.args.uses_jepa and self.args.objective == "stp":
            inputs |= self.objective.draw_tubes(inputs, EVALUATION)
        with torch.no_grad(), self.compute_loss_context_manager():
            step = self._forward(model, inputs)
        starts, order = inputs["lm_at"].sort()
        example_of_label = order[torch.searchsorted(starts, step.label_at, right=True) - 1]
        sums = step.token_nll.new_zeros(4, len(starts))
        sums[0].index_add_(0, example_of_label, step.token_nll)
        sums[1] += torch.bincount(example_of_label, minlength=len(starts))
        if step.pair_loss is not None and step.example_of_pair is not None:
            sums[2].index_add_(0, step.example_of_pair, step.pair_loss.to(sums))
            sums[3] += torch.bincount(step.example_of_pair, minlength=len(starts))
        # Per example, so that those a distributed sampler repeats to fill the last batch are dropped again.
        self._eval_examples.append(self.accelerator.gather_for_metrics(sums.T.contiguous()))
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._eval_examples = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        lm_sum, labels, pair_sum, pairs = torch.cat(self._eval_examples).cpu().double().sum(dim=0).tolist()
        figures = {"lm_loss": lm_sum / max(labels, 1)}
        figures["loss"] = figures["lm_loss"]
        if self.args.uses_jepa:
            figures["jepa_loss"] = pair_sum / max(pairs, 1)
            figures["loss"] += self.jepa_weight_now() * figures["jepa_loss"]
        if self._bank and metric_key_prefix in ("eval", self._bank_prefix):
            space = self.measure_space()
            figures |= space
            self._warn_if_collapsed(space)
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in figures.items()})
        return output

    def measure_space(self) -> dict[str, float]:
        """`space_diagnostics` of the bank: the first `diagnostics_pairs` rows of the (first) validation set. Every rank
        does all of it."""
        with self.compute_loss_context_manager():
            pairs = embed_pairs(self.model, self._base_model, self._bank, layer=self.args.readout_layer)
        return space_diagnostics(*pairs)

    def _make_bank(self) -> list[dict[str, Tensor]]:
        dataset, self._bank_prefix = self.eval_dataset, "eval"
        if isinstance(dataset, dict):
            name, dataset = next(iter(dataset.items()))
            self._bank_prefix = f"eval_{name}"
        wanted = self.args.diagnostics_pairs
        if dataset is None or wanted == 0:
            return []
        if len(dataset) < 2:
            logger.warning("The validation set has one row: no diagnostics of the embedding space.")
            return []
        if len(dataset) < wanted:
            logger.warning(
                f"The diagnostics use {len(dataset)} validation pairs, not diagnostics_pairs={wanted}: recall and "
                "rank depend on the number of pairs, so compare them only with runs on as many."
            )
        rows = dataset.select(range(min(wanted, len(dataset)))).to_list()
        # Always of the model itself, whatever the target encoder. A baseline has no predictor tokens: its context is
        # read at the last content token.
        size = self.args.per_device_eval_batch_size
        return [self._pairs_of(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _warn_if_collapsed(self, now: dict[str, float]) -> None:
        start = self._start_diagnostics
        before, self._is_collapsed = self._is_collapsed, start is not None and has_collapsed(now, start)
        if start is None or not (before and self._is_collapsed) or self._warned_of_collapse or not self.args.uses_jepa:
            return
        self._warned_of_collapse = True
        names = ("raw_cosine_matched", "raw_cosine_mismatched", "effective_rank_predicted", "effective_rank_target")
        figures = ", ".join(f"{name} {start[name]:.3g} -> {now[name]:.3g}" for name in names)
        logger.warning(COLLAPSED.format(figures=figures, advice=ADVICE.get(self.args.objective, OTHER_ADVICE)))

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Also: put back `use_cache`, which training switched off; and drop how the tokenizer was loaded here, which is
        nobody's business elsewhere (`local_files_only` breaks Hub loading)."""
        in_training, self._base_model.config.use_cache = self._base_model.config.use_cache, self._use_cache
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self._base_model.config.use_cache = in_training
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
        kept = {key: tokenizer_config[key] for key in tokenizer_config if key not in ("is_local", "local_files_only")}
        checkpoint.write_json(folder / "tokenizer_config.json", kept)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._count_tokens()
        super()._save_checkpoint(model, trial)

    def _save_more(self, folder: Path) -> None:
        state = self.objective.state()
        if state and (self.args.should_save or self._is_fsdp):
            save_state(folder / self._jepa_state_file(), state)

    def _jepa_state_file(self) -> str:
        """Of a sharded average every rank has its own part."""
        return f"rank{self.args.process_index}_{JEPA_STATE}" if self._is_fsdp else JEPA_STATE

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed_from = resume_from_checkpoint

    def _restore_objective(self) -> None:
        """The moving average starts at the weights, or where the checkpoint left it; the projector likewise."""
        self.objective.start_averaging(self.model)
        if self._resumed_from is not None and self.objective.state():
            self.objective.load(load_state(Path(self._resumed_from) / self._jepa_state_file()))
        self._resumed_from = None  # a second `train()` starts afresh

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The projector's weights are trained too; they belong to the loss and not to the model."""
        reshard(self._base_model)  # or it would take what the probe or an evaluation gathered for the weights
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        projector = list(self.objective.projector.parameters()) if self.objective.projector is not None else []
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if projector and id(projector[0]) not in known:  # it may be the user's own, or be asked for twice
            optimizer.add_param_group({"params": projector, "weight_decay": self.args.weight_decay})
        return optimizer

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A tied head is not in the file and is not missing; transformers would warn of it at every resume."""
        model = self._base_model
        tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL calls this at every checkpoint; the card says what was trained and measured here."""
        if self.is_world_process_zero():
            write_model_card(self.args.output_dir, self._base_model, self.args, self.history_of_saved_weights())


class _Steps(TrainerCallback):
    """Logs the diagnostics before the first step; a resumed run reads them, and its token count, back. Around an
    optimizer step, the moving average and the projector are seen to."""

    def __init__(self, trainer: LLMJEPATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer._restore_objective()
        if state.global_step == 0:
            if not trainer._bank:
                return
            trainer._start_diagnostics = trainer.measure_space()
            trainer.log({f"eval_{key}": value for key, value in trainer._start_diagnostics.items()})
            return
        trainer._total_train_tokens = state.num_input_tokens_seen
        for entry in state.log_history:
            if entry["step"] == 0 and "eval_recall_at_1" in entry:
                trainer._start_diagnostics = {
                    key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")
                }

    def on_pre_optimizer_step(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            reduce = self.trainer.accelerator.reduce
            self.trainer.objective.before_optimizer_step(lambda gradient: reduce(gradient, reduction="mean"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.objective.after_optimizer_step(state.global_step / state.max_steps)
