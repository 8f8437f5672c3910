"""`LLMJEPATrainer`: TRL's `SFTTrainer` with L = L_LM + jepa_weight * d(predicted, target)  (arXiv:2509.14252, eq. 2).

One step, from a collated batch to a loss, is `_forward` and `compute_loss`. Both terms are sums divided by counts of
the *whole* optimizer step (labels and pairs over all micro-batches and ranks), so that batch 8 = 2 x 4 = 3 + 5 = two
ranks of 4 in gradient. InfoNCE is the exception by nature: its negatives are the micro-batch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints
from transformers.utils import logging
from trl import SFTTrainer

from . import checkpoint
from .config import LLMJEPAConfig
from .diagnostics import has_collapsed, space_diagnostics
from .errors import NonFiniteLossError, UserError
from .loading import model_from, tokenizer_from
from .losses import jepa_loss
from .model_card import write_model_card
from .packing import JEPACollator, check_packable, embed_pairs, model_inputs, read_pairs
from .predictor_tokens import add_predictor_tokens, known_predictor_ids, train_token_rows
from .views import IGNORE, add_view_columns

logger = logging.get_logger(__name__)

VIEW_COLUMNS = ["input_ids", "labels", "split", "context_ids", "target_ids", "target_key", "truncated"]
COLLAPSE_HINT = (
    "The embedding space has collapsed: wrong pairs are as close as right ones, or hardly any direction is left "
    "({figures}). The JEPA loss is low for a trivial reason. Try objective: info_nce, a smaller jepa_weight, or "
    "stop_gradient_target: true."
)


class StepOutput(NamedTuple):
    token_nll: Tensor  # [labels] negative log-likelihood in nats, float32
    row_of_label: Tensor  # [labels] which row each belongs to
    pair_loss: Tensor | None  # [B], None for plain SFT
    num_tokens: Tensor  # real tokens in the batch, views included


class LLMJEPATrainer(SFTTrainer):
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
        if args.world_size > 1 and args.uses_jepa and args.objective == "info_nce":
            raise UserError(
                f"objective: info_nce compares pairs within one rank only, and this run has {args.world_size}: its "
                "negatives would depend on the number of GPUs. Use one rank, or objective: cosine."
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
        if args.uses_jepa:
            check_packable(model)
            self.predictor_ids = add_predictor_tokens(model, processing_class, args.num_predictor_tokens)
            if peft_config is not None:
                train_token_rows(peft_config, model, self.predictor_ids)
        # In the baseline too, should it start from a model that brings such tokens.
        self._masked_ids = known_predictor_ids(processing_class)
        model.config.llm_jepa = {
            "jepa_weight": args.jepa_weight,
            "objective": args.objective,
            "num_predictor_tokens": len(self.predictor_ids),
            "context_view": args.context_view,
            "label_protocol": args.label_protocol,
        }
        self._base_model = model
        self._use_cache = model.config.use_cache
        multiple = args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else 1
        collator = JEPACollator(processing_class.pad_token_id, self.predictor_ids, args.uses_jepa, multiple)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
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
        narrow = {p.dtype for p in self.model.parameters() if p.requires_grad} - {torch.float32, torch.float64}
        if narrow:
            logger.warning(
                f"Trainable weights are {narrow.pop()}: few move in a step of a small learning rate (30 % at "
                "2e-5 in bfloat16). Keep dtype: float32 and set bf16: true for autocast."
            )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the counts of the whole step itself
        self._pairs_in_step: Tensor | int = 1
        self._sums = torch.zeros(5, device=args.device)  # lm_sum, labels, pair_sum, pairs, tokens since the last log
        self._eval_rows: list[Tensor] = []
        self._bank = self._make_bank()
        self._start_diagnostics: dict[str, float] | None = None
        self._warned_of_collapse = False
        self.add_callback(_AtStart(self))

    # -- data ---------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, packing: Any, formatting_func: Any, dataset_name: str
    ) -> Dataset:
        """Rows -> view columns. Idempotent: `evaluate` calls it again. (TRL's signature; we refuse packing.)"""
        if set(VIEW_COLUMNS) <= set(dataset.column_names):
            return dataset
        options = {
            "tokenizer": processing_class,
            "context_view": args.context_view,
            "label_protocol": args.label_protocol,
            "max_length": args.max_length,
        }
        with args.main_process_first(desc="building views"):
            dataset = dataset.map(
                add_view_columns,
                with_indices=True,
                fn_kwargs=options,
                num_proc=args.dataset_num_proc,
                load_from_cache_file=False,  # its key does not see a change in views.py or in a template's renderer
                remove_columns=dataset.column_names,
                desc=f"Building views of the {dataset_name} rows",
            )
        truncated = sum(dataset["truncated"])
        if truncated:
            logger.warning(
                f"{truncated} of {len(dataset)} {dataset_name} rows were cut to max_length={args.max_length} tokens."
            )
        self._check_positions(dataset, dataset_name)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _check_positions(self, dataset: Dataset, name: str) -> None:
        """Learned positions (gpt2) end somewhere; a longer row would be an index error in the middle of training."""
        config = self._base_model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None or getattr(config, "rope_parameters", None) is not None:
            return
        longest = max(max(map(len, dataset[key])) for key in ("input_ids", "context_ids", "target_ids"))
        if longest + len(self.predictor_ids) > limit:
            raise UserError(
                f"The longest {name} row has {longest} tokens and {len(self.predictor_ids)} predictor tokens, the "
                f"model {limit} positions; set max_length: {limit - len(self.predictor_ids)} or less."
            )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = VIEW_COLUMNS

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one optimizer step, with its label and pair counts over all of them and all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = torch.zeros(2, device=device, dtype=torch.long)
        for batch in batches:
            counts[0] += (batch["labels"][:, 1:] != IGNORE).sum()
            counts[1] += len(batch["target_at"]) if "target_at" in batch else 0
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        counts = counts.clamp(min=1)
        self._pairs_in_step = counts[1]
        return batches, counts[0]

    # -- the step -----------------------------------------------------------------------------------------------------

    def _forward(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> StepOutput:
        """One forward pass through the wrapped model: logits at label positions only, the last hidden state only."""
        next_token = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)  # [R, L]
        has_label = next_token != IGNORE
        packed = "doc" in inputs
        output = model(
            **model_inputs(inputs, self._base_model),
            logits_to_keep=has_label,
            **({"output_hidden_states": -1} if packed else {}),
        )
        logits = output.logits.reshape(-1, output.logits.shape[-1])  # [labels, V]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self._masked_ids:
            # Inputs only: with their logits out of the softmax the LM term is the baseline's function.
            ids = torch.tensor(self._masked_ids, device=logits.device)
            logits = logits.index_fill(-1, ids, torch.finfo(logits.dtype).min)
        token_nll = F.cross_entropy(logits, next_token[has_label], reduction="none")
        pair_loss = None
        if packed:
            predicted, target = read_pairs(output.hidden_states[-1], inputs)
            pair_loss = jepa_loss(
                predicted,
                target,
                objective=self.args.objective,
                temperature=self.args.temperature,
                target_key=inputs["target_key"],
                stop_gradient=self.args.stop_gradient_target,
            )
        real = inputs["doc"] >= 0 if packed else inputs["attention_mask"] > 0
        return StepOutput(token_nll, has_label.nonzero()[:, 0], pair_loss, real.sum())

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
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
            loss = loss + self.args.jepa_weight * pair_sum / (
                pairs if num_items_in_batch is None else self._pairs_in_step
            )
        if self.model.training:
            self._sums[0] += lm_sum.detach()
            self._sums[1] += len(step.token_nll)
            self._sums[2] += pair_sum.detach()
            self._sums[3] += pairs
            self._sums[4] += step.num_tokens
        return loss * (1 if num_items_in_batch is None else self.accelerator.num_processes)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """Called after clipping and before the optimizer: the last moment to keep NaN out of the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16 skips overflowing steps by itself
        sums_finite = math.isfinite(float(self._sums.sum()))
        if not sums_finite or not (scaled or math.isfinite(float(norm))):
            last = checkpoint.newest_complete(self.args.output_dir)
            raise NonFiniteLossError(
                f"{'Gradient' if sums_finite else 'Loss'} is not finite at step {self.state.global_step + 1}; stopped "
                f"before the optimizer took it. Last good checkpoint: {last or 'none yet'}. Lower learning_rate or "
                "jepa_weight, or look at the rows of this step."
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds lm_loss (mean over tokens), jepa_loss (mean over pairs) and num_tokens since the last training log."""
        if "loss" in logs or "train_runtime" in logs:  # a training step, or the end of training
            self._count_tokens()
            logs["num_tokens"] = self._total_train_tokens
        if "loss" in logs:
            sums = (
                self.accelerator.reduce(self._sums.clone(), reduction="sum") if self.args.world_size > 1 else self._sums
            )
            lm_sum, labels, pair_sum, pairs, _ = sums.tolist()
            self._sums.zero_()
            logs["lm_loss"] = lm_sum / max(labels, 1)
            if pairs:
                logs["jepa_loss"] = pair_sum / pairs
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
        """Collects sums per row; `evaluation_loop` turns them into token- and pair-weighted means."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            step = self._forward(model, inputs)
        rows = inputs["input_ids"].shape[0]
        lm_sum = step.token_nll.new_zeros(rows).index_add_(0, step.row_of_label, step.token_nll)
        labels = torch.bincount(step.row_of_label, minlength=rows).to(lm_sum)
        pair_loss = step.pair_loss.to(lm_sum) if step.pair_loss is not None else torch.zeros_like(lm_sum)
        # Per row, so that the rows a distributed sampler repeats to fill the last batch are dropped again.
        self._eval_rows.append(self.accelerator.gather_for_metrics(torch.stack([lm_sum, labels, pair_loss], dim=1)))
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._eval_rows = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        lm_sum, labels, pair_sum = torch.cat(self._eval_rows).double().cpu().sum(dim=0).tolist()
        figures = {"lm_loss": lm_sum / max(labels, 1)}
        figures["loss"] = figures["lm_loss"]
        if self.args.uses_jepa:
            figures["jepa_loss"] = pair_sum / sum(len(rows) for rows in self._eval_rows)
            figures["loss"] += self.args.jepa_weight * figures["jepa_loss"]
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
            pairs = embed_pairs(self.model, self._base_model, self._bank)
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
        if not self.args.uses_jepa:
            try:
                check_packable(self._base_model)
            except UserError as error:
                logger.warning(f"No diagnostics of the embedding space: {error}")
                return []
        if len(dataset) < wanted:
            logger.warning(
                f"The diagnostics use {len(dataset)} validation pairs, not diagnostics_pairs={wanted}: recall and "
                "rank depend on the number of pairs, so compare them only with runs on as many."
            )
        rows = dataset.select(range(min(wanted, len(dataset)))).to_list()
        # A baseline has no predictor tokens: its context is read at the last content token.
        collator = JEPACollator(self.processing_class.pad_token_id, self.predictor_ids)
        size = self.args.per_device_eval_batch_size
        return [collator(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _warn_if_collapsed(self, now: dict[str, float]) -> None:
        start = self._start_diagnostics
        if start is None or self._warned_of_collapse or not self.args.uses_jepa or not has_collapsed(now, start):
            return
        self._warned_of_collapse = True
        names = ("raw_cosine_matched", "raw_cosine_mismatched", "effective_rank_predicted", "effective_rank_target")
        figures = ", ".join(f"{name} {start[name]:.3g} -> {now[name]:.3g}" for name in names)
        logger.warning(COLLAPSE_HINT.format(figures=figures))

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Also: put back `use_cache`, which training switched off; drop `training_args.bin`, a pickle; and drop how the
        tokenizer was loaded here, which is nobody's business elsewhere (`local_files_only` breaks Hub loading)."""
        in_training, self._base_model.config.use_cache = self._base_model.config.use_cache, self._use_cache
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self._base_model.config.use_cache = in_training
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
        kept = {key: tokenizer_config[key] for key in tokenizer_config if key not in ("is_local", "local_files_only")}
        checkpoint.write_json(folder / "tokenizer_config.json", kept)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The manifest comes last, and older checkpoints go only after it: a kill at any moment leaves one whole."""
        self._count_tokens()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run_dir = self._get_output_dir(trial=trial)
            checkpoint.seal(os.path.join(run_dir, f"checkpoint-{self.state.global_step}"))
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()

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

    def history_of_saved_weights(self) -> list[dict[str, float]]:
        """The log up to the step whose weights are saved: with load_best_model_at_end, the best one, not the last."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return [entry for entry in self.state.log_history if best is None or entry["step"] <= best]


class _AtStart(TrainerCallback):
    """Logs the diagnostics before the first step; a resumed run reads them, and its token count, back."""

    def __init__(self, trainer: LLMJEPATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
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


def check_dataset(name: str, dataset: Any) -> None:
    """Raises UserError unless `dataset` is a non-empty map-style `datasets.Dataset` (or a dict of them)."""
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if part is None and name == "eval":
            continue
        if not isinstance(part, Dataset):
            raise UserError(f"The {name} data is a {type(part).__name__}; pass a datasets.Dataset (no streaming).")
        if len(part) == 0:
            raise UserError(f"The {name} data set is empty; point it at a file with rows.")
