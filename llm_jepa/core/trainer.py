"""What the trainers of all families do: plan a step, add up losses, evaluate per example, watch for collapse, save.

    class LLMJEPATrainer(JEPATrainer, SFTTrainer)        class VLJEPATrainer(JEPATrainer)

`SafeTrainer` makes checkpoints complete and free of pickles and stops at NaN. `JEPATrainer` adds one JEPA step. A
family fills in these hooks:

    plan_step      the micro-batches of one optimizer step -> what the step does
    compute_loss   one micro-batch -> its share of the loss        (the name that transformers gives it)
    example_sums   one evaluation batch -> sums per example
    figures        sums of a whole evaluation -> the figures that are logged
    embed_bank     embeddings whose geometry is measured; count_bank says of how many pairs
    extra_state    tensors that a resumed run needs besides model and optimizer; load_extra_state takes them back
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from . import checkpoint
from .card import CURVE, Evaluation, draw_curve, last_evaluation, training_facts
from .checks import check_best_is_measured, check_one_device, check_refused
from .diagnostics import has_collapsed, space_diagnostics
from .distributed import shard_on_cpu
from .errors import NonFiniteLossError, UserError
from .pairs import PairKeys
from .safetensors_files import load_tensors, tensors_of
from .streaming import StreamingTrainer
from .sums import NamedSums
from .tokenizer import forget_local_keys
from .untrusted import load_with_report, plain_config

logger = logging.get_logger(__name__)

JEPA_STATE = "jepa_state.safetensors"
EVALUATION = -1  # the "step" of evaluations, so that random choices are the same in every evaluation
COLLAPSED = (
    "At two evaluations in a row the embedding space had collapsed: wrong pairs are as close as right ones, or hardly "
    "any direction is left ({figures}). {advice}"
)
COLLAPSE_FIGURES = ("raw_cosine_matched", "raw_cosine_mismatched", "effective_rank_predicted", "effective_rank_target")


class SafeTrainer(StreamingTrainer):
    """`Trainer` whose checkpoints are complete, without pickles, and which stops before NaN reaches the weights.

    It extends by inheritance because that is how `Trainer` is extended: `class Ours(SafeTrainer, SFTTrainer)`.
    """

    advice_if_not_finite = "Lower learning_rate, or look at the rows of this step."

    def create_accelerator_and_postprocess(self) -> None:
        shard_on_cpu(self.args)
        super().create_accelerator_and_postprocess()

    @property
    def is_fsdp(self) -> bool:
        """Whether each rank holds a part of the weights, by Accelerate's FSDP or by transformers' own loading."""
        return bool(self.is_fsdp_enabled or self.is_distributed_loading_by_transformers)

    @property
    def is_sharded(self) -> bool:
        return self.is_fsdp or self.is_deepspeed_enabled

    def losses_are_finite(self) -> bool:
        return True

    def _get_grad_norm(self, model: Any, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """Called after clipping and before the optimizer: the last moment to keep NaN out of the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16 skips overflowing steps by itself
        finite = self.losses_are_finite()
        if not finite or not (scaled or math.isfinite(float(norm))):
            raise NonFiniteLossError(
                f"{'Gradient' if finite else 'Loss'} is not finite at step {self.state.global_step + 1}; stopped "
                f"before the optimizer took it. Last good checkpoint: {self.last_good_checkpoint()}. "
                + self.advice_if_not_finite
            )
        return norm

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """NaN is neither better nor worse than another figure, so nothing would be chosen, and nothing said."""
        name = str(self.args.metric_for_best_model or "")
        name = name if name.startswith("eval_") else f"eval_{name}"
        if not math.isfinite(metrics.get(name, 0.0)):
            raise NonFiniteLossError(
                f"{name} is {metrics[name]} at step {self.state.global_step}, and the best weights are chosen by it. "
                f"Last good checkpoint: {self.last_good_checkpoint()}. Look at the validation rows, or "
                "lower learning_rate."
            )
        is_best: bool = super()._determine_best_metric(metrics, trial)
        return is_best

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save without `training_args.bin`, which is a pickle, and without the local keys of tokenizers."""
        if self.args.save_on_each_node:  # transformers 5.24 writes the weights on one machine only
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.should_save_on_this_rank = bool  # of is_main_process, which is one process of each machine
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)
            forget_local_keys(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_by_name(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def load_weights(self, folder: str) -> None:
        """Load the weights of one of this run's checkpoints. Raises UserError if it is not whole."""
        self._check_whole(folder)
        self._load_from_checkpoint(folder)

    def _load_best_model(self) -> None:
        self._check_whole(str(self.state.best_model_checkpoint))
        if not self._load_by_name(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _check_whole(self, folder: str) -> None:
        is_there = Path(folder).is_dir()
        reason = checkpoint.fault(folder, run=self.run, has_state=False) if is_there else "there is no such folder"
        if reason:
            raise UserError(f"Cannot load the weights of {folder}: {reason}.")

    def _load_by_name(self, folder: str) -> bool:
        """Load a whole model from its checkpoint. False if the folder holds adapters or shards instead.

        transformers writes some families (ViT, GPT-NeoX, mixtures of experts) under the names of version 4. Only
        `from_pretrained` translates them back; Trainer warns of missing keys and goes on with the weights it has.

        Raises UserError for missing and for unexpected weights.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            self._check_adapter(folder, model)
        if self.is_sharded or not isinstance(model, PreTrainedModel):
            return False
        saved, report = load_with_report(type(model), folder, plain_config(model.config), dtype=model.dtype)
        _check_same_names(folder, missing=report["missing_keys"], unexpected=report["unexpected_keys"])
        model.load_state_dict(saved.state_dict())
        return True

    def _check_adapter(self, folder: str, model: PeftModel) -> None:
        """PEFT and Trainer load what is there, and leave the rest of the adapter as it was."""
        path = Path(folder) / "adapter_model.safetensors"
        if self.is_sharded or not path.is_file():
            return
        saved = set(tensors_of(path))
        expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        known = expected | set(get_peft_model_state_dict(model, save_embedding_layers=True))  # of earlier versions
        _check_same_names(folder, missing=expected - saved, unexpected=saved - known)

    def saved_step(self) -> int:
        """The step whose weights are saved: with load_best_model_at_end, the best one, not the last."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return self.state.global_step if best is None else best

    def history_of_saved_weights(self) -> list[dict[str, float]]:
        """The log up to the step whose weights are saved."""
        return [entry for entry in self.state.log_history if entry["step"] <= self.saved_step()]


def _check_same_names(folder: str, *, missing: Collection[str], unexpected: Collection[str]) -> None:
    for names, what in ((missing, "lacks"), (unexpected, "has unexpected")):
        if names:
            examples = ", ".join(sorted(names)[:3])
            raise UserError(
                f"{folder} {what} {len(names)} weight(s) of this model ({examples}); it is not from this run."
            )


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step does. Made once, before its first micro-batch runs; families add fields to it.

    step: the optimizer step on which random choices depend; `EVALUATION` outside training.
    pairs: [] pairs over all micro-batches and ranks, at least 1; divides the sum of pair losses.
    """

    step: int
    pairs: Tensor


class JEPATrainer(SafeTrainer):
    """One JEPA step and its evaluation. Refuses what would replace the loss, the batches or the device layout."""

    refused: ClassVar[tuple[str, ...]] = ("compute_loss_func", "compute_metrics", "data_collator")
    sum_names: ClassVar[tuple[str, ...]] = ("pair_loss", "pairs")
    plan: StepPlan
    bank_prefix = "eval"  # evaluations that measure the geometry: this one and "eval"
    began_at = 0  # the step at which this process began to train
    data_facts: Mapping[str, str] = {}  # for the card; a run by a recipe fills it in (`card.data_facts`)

    def __init__(self, *, args: TrainingArguments, **kwargs: Any) -> None:
        super().__init__(args=args, **kwargs)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the counts of the whole optimizer step itself
        self.sums = NamedSums(self.sum_names, args.device)
        self.start_diagnostics: dict[str, float] | None = None
        self._example_sums: list[Tensor] = []
        self._is_collapsed = self._warned_of_collapse = False
        self._resumed_from: str | None = None
        self.release_folder: Callable[[], object] = lambda: None  # lets other processes train in output_dir again
        self.add_callback(_Hooks(self))

    @classmethod
    def check_call(cls, args: TrainingArguments, kwargs: dict[str, Any]) -> None:
        """Raises UserError for arguments of the constructor that this trainer cannot honour. Call it first."""
        check_refused(kwargs, cls.refused)
        check_one_device(args)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def plan_step(self, batches: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], StepPlan, Tensor]:
        """The micro-batches of one optimizer step -> those to run, the plan, and the divisor of the first loss term.

        Runs on every rank at the same time, so it may call collectives. `batches` is empty if the data ended.
        """
        raise NotImplementedError

    def example_sums(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """One evaluation batch -> [examples, S] sums per example, which `figures` turns into means."""
        raise NotImplementedError

    @staticmethod
    def figure_names(args: Any) -> tuple[str, ...]:
        """The names of `figures`."""
        raise NotImplementedError

    def figures(self, totals: list[float]) -> dict[str, float]:
        """The S sums over all evaluation examples -> figures for the log, without prefix."""
        raise NotImplementedError

    def training_figures(self, sums: dict[str, float]) -> dict[str, float]:
        """The sums of all ranks since the last training log -> figures for the log."""
        raise NotImplementedError

    def embed_bank(self, dataset: Any) -> tuple[Tensor, Tensor, PairKeys] | None:
        """`predicted`, `target` [P, D] and the keys [P] of a few validation pairs; None if there are none."""
        raise NotImplementedError

    def count_bank(self) -> int:
        """The number of pairs that `embed_bank` embeds of the validation set."""
        raise NotImplementedError

    def collapse_advice(self) -> str:
        """What to do if the space collapses; "" if this run has no JEPA term to blame."""
        raise NotImplementedError

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs besides model and optimizer; not a part of the saved model."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `extra_state` returned when the checkpoint was saved."""

    def begin_training(self, state: TrainerState) -> None:
        """Called when training begins or resumes, before `load_extra_state` and before the geometry is measured."""

    def begin_epoch(self, epoch: int) -> None:
        """Called at the start of every epoch."""

    def before_optimizer_step(self) -> None:
        """Called when the gradients of a step are complete and clipped."""

    def after_optimizer_step(self, progress: float) -> None:
        """Called after every optimizer step; `progress` is the finished part of the run, 0 to 1."""

    # -- the step -----------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Fetch the micro-batches of one optimizer step and plan it. (The name and result are those of Trainer.)"""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.take_position(batches)
        batches, self.plan, divisor = self.plan_step(batches)
        return batches, divisor

    def count_over_ranks(self, counts: Sequence[Tensor | int]) -> Tensor:
        """[n] counts of this rank -> [n] counts of all ranks, each at least 1. A collective call."""
        counted = torch.zeros(len(counts), dtype=torch.long, device=self.args.device)
        for i, count in enumerate(counts):
            counted[i] += count  # no copy from the CPU, which would wait for the device
        if self.args.world_size > 1:
            counted = self.accelerator.reduce(counted, reduction="sum")
        return counted.clamp(min=1)

    def losses_are_finite(self) -> bool:
        return self.sums.are_finite()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures of the family to a training log."""
        if "loss" in logs:
            logs.update(self.training_figures(self.sums.over_ranks(self.accelerator)))
            self.sums.reset()
        super().log(logs, start_time)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Collect sums per example; `evaluation_loop` turns them into means over tokens and pairs."""
        self.abandon_evaluation_if_asked()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.example_sums(model, inputs)  # [examples, S]
        # Per example, because a distributed sampler repeats some to fill the last batch, and these are dropped here.
        self._example_sums.append(self.accelerator.gather_for_metrics(sums.contiguous()))
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Adds the family's figures and, for the validation set, the geometry of its embeddings."""
        self._example_sums = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        # Accelerate keeps each loader that it has prepared, and with it a copy of the table: 90 kB an evaluation.
        loaders = self.accelerator._dataloaders
        self.accelerator._dataloaders = [loader for loader in loaders if loader is not dataloader]
        figures = self.figures(torch.cat(self._example_sums).cpu().double().sum(dim=0).tolist())
        if metric_key_prefix in ("eval", self.bank_prefix):
            space = self.measure_space(dataloader.dataset)
            figures |= space
            self._warn_if_collapsed(space)
        if not math.isfinite(figures["loss"]) and self.args.metric_for_best_model is None:
            logger.warning(f"{metric_key_prefix}_loss is {figures['loss']} at step {self.state.global_step}.")
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in figures.items()})
        return output

    def measure_space(self, dataset: Any = None) -> dict[str, float]:
        """`space_diagnostics` of the bank, {} without one. Every rank embeds all of it."""
        bank = self.embed_bank(self.eval_dataset if dataset is None else dataset)
        if bank is None or len(bank[0]) < 2:
            return {}
        predicted, target, keys = bank
        return space_diagnostics(predicted, target, keys.target, keys.context)

    def _warn_if_collapsed(self, now: dict[str, float]) -> None:
        """Warn once, at the second evaluation in a row that looks collapsed compared with the start of the run."""
        start = self.start_diagnostics
        was_collapsed = self._is_collapsed
        self._is_collapsed = bool(start and now) and has_collapsed(now, start or {})
        advice = self.collapse_advice()
        if not (start and was_collapsed and self._is_collapsed and advice) or self._warned_of_collapse:
            return
        self._warned_of_collapse = True
        figures = ", ".join(f"{name} {start[name]:.3g} -> {now[name]:.3g}" for name in COLLAPSE_FIGURES)
        logger.warning(COLLAPSED.format(figures=figures, advice=advice))

    def write_card(self, folder: Path) -> None:
        """Write the model card of the saved weights into `folder`."""
        raise NotImplementedError

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card into output_dir; nothing while a checkpoint is saved, when TRL calls this, too."""
        if self.is_world_process_zero() and self._stage is None:
            self.write_card(Path(self.args.output_dir))

    def last_evaluation(self) -> Evaluation:
        """What is known of the saved weights, for their card."""
        return last_evaluation(self.history_of_saved_weights(), self.saved_step(), self.count_bank())

    def card_facts(self, folder: Path) -> dict[str, Any]:
        """What the cards of all families show: the run, its last evaluation, and its curve, which is drawn here."""
        training = training_facts(self.state, self.args, saved_step=self.saved_step(), began_at=self.began_at)
        if self.is_streaming:  # the whole run is one epoch of an endless data set
            training.pop("epochs", None)
        return {
            "training": {**self.data_facts, **training},
            "evaluation": self.last_evaluation(),
            "curve": CURVE if draw_curve(self.state.log_history, folder / CURVE) else None,
        }

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_more(self, folder: Path) -> None:
        super().save_more(folder)
        state = self.extra_state()
        if state and (self.args.should_save or self.is_fsdp):
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in state.items()}, self._state_file(folder)
            )

    def _state_file(self, folder: Path) -> Path:
        """Of sharded state every rank has its own part."""
        return folder / (f"rank{self.args.process_index}_{JEPA_STATE}" if self.is_fsdp else JEPA_STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed_from = resume_from_checkpoint

    def restore_extra_state(self) -> None:
        """Read the extra state of the checkpoint that this run resumes from. A second `train()` starts afresh."""
        folder, self._resumed_from = self._resumed_from, None
        if folder is None or not self.extra_state():
            return
        path = self._state_file(Path(folder))
        if not path.is_file():
            raise UserError(f"The checkpoint has no {path.name}, which holds its target encoder or projector.")
        self.load_extra_state(load_tensors(path))


class _Hooks(TrainerCallback):
    """Calls the trainer's hooks, and logs the geometry before the first step; a resumed run reads it back."""

    def __init__(self, trainer: JEPATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.began_at = state.global_step
        trainer.begin_stream(state.global_step)
        trainer.begin_training(state)
        trainer.restore_extra_state()
        if state.global_step == 0:
            if trainer.eval_dataset is None:
                return
            space = trainer.measure_space()
            check_best_is_measured(args, space, trainer.bank_prefix)
            if space:
                trainer.start_diagnostics = space
                trainer.log({f"eval_{key}": value for key, value in space.items()})
            return
        for entry in state.log_history:
            if entry["step"] == 0 and "eval_recall_at_1" in entry:
                trainer.start_diagnostics = {
                    key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")
                }

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.end_stream()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Rounded, because a resumed run's epoch is a quotient that can fall just short of a whole number.
        self.trainer.begin_epoch(int(round(state.epoch or 0, 6)))

    def on_pre_optimizer_step(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        self.trainer.before_optimizer_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.after_optimizer_step(state.global_step / max(state.max_steps, 1))
