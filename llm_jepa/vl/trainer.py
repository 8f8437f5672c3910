"""`VLJEPATrainer`: `transformers.Trainer` with the loss of VL-JEPA  (arXiv:2512.10942v2, section 2).

predicted and target embeddings of all ranks meet in a symmetric InfoNCE whose gradient is that of one process with the
whole batch. The loss is a sum over pairs divided by the pairs of the whole optimizer step. Gradient accumulation adds
up the gradients of its micro-batches; it does not enlarge the pool of negatives, which the paper's batches of 24,576
are there for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..core.diagnostics import has_collapsed, space_diagnostics
from ..core.errors import UserError
from ..core.pairs import compare_pairs
from ..core.trainer import SafeTrainer
from .arguments import VLJEPATrainingArguments
from .card import write_vl_model_card
from .data import ClipCollator, ClipDataset
from .features import FeatureCache, cache_features, encoder_sha256
from .modeling import VLJEPAModel
from .processing import VLJEPAProcessor

logger = logging.get_logger(__name__)
MAX_TEXTS = 1_000_000  # targets of a frozen y_encoder kept in memory: 3 GB of 768 floats
COLLAPSED = (
    "At two evaluations in a row the embedding space had collapsed: wrong pairs as close as right ones, or hardly any "
    "direction left. The loss is low for a trivial reason: try objective: info_nce, a regularizer, or "
    "y_encoder_lr_factor: 0."
)


class VLJEPATrainer(SafeTrainer):
    """Train a VL-JEPA.

    Args:
        model, processor: see `VLJEPAModel` and `VLJEPAProcessor`. What is trained of the model is what `args` says: all
            of predictor and projections, the y_encoder at its own learning rate, the last blocks of the x_encoder.
        args: `VLJEPATrainingArguments`.
        train_dataset, eval_dataset: `ClipDataset`s.

    Raises UserError for options that would train something else than they say.
    """

    args: VLJEPATrainingArguments

    def __init__(
        self,
        model: VLJEPAModel,
        args: VLJEPATrainingArguments,
        train_dataset: ClipDataset,
        eval_dataset: ClipDataset | None = None,
        processor: VLJEPAProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("compute_loss_func", "compute_metrics", "data_collator"):
            if kwargs.get(name) is not None:
                raise UserError(f"{name} has no place here: this trainer brings its own loss and batches; remove it.")
        if processor is None:
            raise UserError("VLJEPATrainer needs the processor that turns clips and texts into tensors.")
        if args.n_gpu > 1:
            raise UserError(
                f"One process sees {args.n_gpu} GPUs and would wrap the model in nn.DataParallel; use --launch ddp, or "
                "show it one with CUDA_VISIBLE_DEVICES=0."
            )
        # Ours: features set below belong to this model, and another trainer may be given the same clips.
        train_dataset, eval_dataset = copy.copy(train_dataset), copy.copy(eval_dataset)
        train_dataset.pairs_per_clip, train_dataset.seed = args.pairs_per_clip, args.seed
        check_clips(train_dataset, args)
        if args.x_encoder_trainable_layers and eval_dataset is not None and eval_dataset.features is not None:
            raise UserError("The validation clips bring features of an x_encoder that is to be trained; give frames.")
        choose_trained_parts(model, args)
        self._vl_model = model
        super().__init__(
            model=model,
            args=args,
            data_collator=ClipCollator(processor),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            **kwargs,
        )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole step itself
        if args.feature_cache is not None:
            for dataset in (train_dataset, eval_dataset):
                if dataset is not None and dataset.features is None:
                    dataset.features = self._cached_features(dataset)
        if not args.y_encoder_lr_factor:
            texts = self._pooled_targets(train_dataset, eval_dataset)
            self.data_collator = ClipCollator(processor, texts)
        self._sums = torch.zeros(2, device=args.device)  # loss, pairs since the last log
        self._eval_clips: list[Tensor] = []
        self._start_diagnostics: dict[str, float] | None = None
        self._is_collapsed = self._warned_of_collapse = False
        self.add_callback(_Epochs(self))

    # -- data ---------------------------------------------------------------------------------------------------------

    def _cached_features(self, dataset: ClipDataset) -> FeatureCache:
        model, args = self._vl_model, self.args
        was_training = model.training
        model.eval()

        def encode(pixels: Tensor) -> Tensor:
            with self.compute_loss_context_manager():
                return model.encode_frames(pixels.to(args.device))

        model.x_encoder.to(args.device)
        with args.main_process_first(local=False, desc="computing visual features"):
            cache = cache_features(
                encode,
                dataset,
                self.data_collator.processor,
                str(args.feature_cache),
                encoder_hash=f"{encoder_sha256(model.x_encoder)} pooled={model.config.pool_frames} "
                f"bf16={args.bf16} fp16={args.fp16}",  # autocast
                batch_size=args.per_device_eval_batch_size,
                is_main=args.process_index == 0,
            )
        model.train(was_training)
        return cache

    @torch.no_grad()
    def _pooled_targets(self, *datasets: ClipDataset | None) -> dict[str, Tensor] | None:
        """Every distinct target text through the frozen y_encoder, once; on every rank, in memory."""
        texts = sorted(
            {pair.target for data in datasets if data is not None for clip in data.clips for pair in clip.pairs}
        )
        if len(texts) > MAX_TEXTS:
            logger.warning(f"{len(texts)} distinct targets are more than {MAX_TEXTS}: encoded anew in every step.")
            return None
        self._vl_model.y_encoder.to(self.args.device).eval()
        by_length = sorted(texts, key=len)  # little padding
        found: dict[str, Tensor] = {}
        bar = tqdm(
            total=len(texts), desc="targets of the frozen y_encoder", unit="text", disable=self.args.disable_tqdm
        )
        for start in range(0, len(texts), 256):
            chosen = by_length[start : start + 256]
            batch = self.data_collator.processor(target=chosen).to(self.args.device)
            with self.compute_loss_context_manager():
                pooled = self._vl_model.pool_text(**batch).float().cpu()
            found.update(zip(chosen, pooled, strict=True))
            bar.update(len(chosen))
        bar.close()
        return found

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one optimizer step, and their pairs over all of them and all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        pairs = torch.tensor(sum(len(batch["target_key"]) for batch in batches), device=device)
        if self.args.world_size > 1:
            pairs = self.accelerator.reduce(pairs, reduction="sum")
        return batches, pairs.clamp(min=1)

    # -- the step -----------------------------------------------------------------------------------------------------

    def _pair_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """[B]: the loss of each pair of this rank, among the pairs of all ranks."""
        inputs = dict(inputs)
        target_key = inputs.pop("target_key")
        output = model(**inputs)
        temperature = output.temperature
        return compare_pairs(
            output.predicted,
            output.target,
            target_key,
            objective=self.args.objective,
            temperature=temperature if self.args.learn_temperature else temperature.detach(),
            regularizer=self.args.regularizer,
            regularizer_weight=self.args.regularizer_weight,
            both_sides=any(
                weight.requires_grad
                for part in (self._vl_model.y_encoder, self._vl_model.target_projection)
                for weight in part.parameters()
            ),
            seed=self.args.seed,
            step=self.state.global_step,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        pair_loss = self._pair_loss(model, inputs)
        pairs = len(pair_loss) if num_items_in_batch is None else num_items_in_batch
        if model.training:
            self._sums += torch.stack([pair_loss.detach().sum(), pair_loss.new_tensor(len(pair_loss))]).float()
        # DDP and FSDP average gradients over ranks; the sum over all ranks' pairs has been divided by their number.
        return pair_loss.sum() / pairs * (1 if num_items_in_batch is None else self.accelerator.num_processes)

    def _losses_are_finite(self) -> bool:
        return bool(self._sums.isfinite().all())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Not the temperature: decay would pull it to 1, whatever the loss says."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_temperature")]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Two learning rates: the y_encoder's is `y_encoder_lr_factor` times the others' (paper: section 3.1).

        Its projection to the shared space learns at the full rate: the paper says "all text encoder parameters".
        """
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        slow = {id(weight) for weight in self._vl_model.y_encoder.parameters()}
        for group in list(optimizer.param_groups):
            chosen = [weight for weight in group["params"] if id(weight) in slow]
            if chosen and len(chosen) < len(group["params"]):
                group["params"] = [weight for weight in group["params"] if id(weight) not in slow]
                options = {key: value for key, value in group.items() if key != "params"}
                rate = group["lr"] * self.args.y_encoder_lr_factor
                optimizer.add_param_group({**options, "params": chosen, "lr": rate})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`loss` becomes the mean over pairs since the last log; adds the temperature."""
        if "loss" in logs:
            sums = self._sums.clone()
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums, reduction="sum")
            self._sums.zero_()
            logs["loss"] = float(sums[0] / sums[1].clamp(min=1))
            if self.args.objective == "info_nce":
                logs["temperature"] = float(self._vl_model.temperature.detach())
        super().log(logs, start_time)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            pair_loss = self._pair_loss(model, inputs)
        clips = int(inputs["clip_of_pair"].max()) + 1
        sums = pair_loss.new_zeros(2, clips, dtype=torch.float32)
        sums[0].index_add_(0, inputs["clip_of_pair"], pair_loss.float())
        sums[1] += torch.bincount(inputs["clip_of_pair"], minlength=clips)
        # Per clip, so that those a distributed sampler repeats to fill the last batch are dropped again.
        self._eval_clips.append(self.accelerator.gather_for_metrics(sums.T.contiguous()))
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Adds `loss`, a mean over pairs (InfoNCE depends on the size of the batches), and the geometry."""
        self._eval_clips = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, pairs = torch.cat(self._eval_clips).cpu().double().sum(dim=0).tolist()
        figures = {"loss": total / max(pairs, 1)}
        if self.args.diagnostics_pairs and metric_key_prefix == "eval":
            space = self.measure_space(dataloader.dataset)
            figures |= space
            self._warn_if_collapsed(space)
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in figures.items()})
        return output

    @torch.no_grad()
    def measure_space(self, dataset: Any = None) -> dict[str, float]:
        """`space_diagnostics` of the first `diagnostics_pairs` pairs of the validation clips. Every rank does all."""
        dataset, model = dataset or self.eval_dataset, self._vl_model
        was_training = model.training
        model.eval()
        collate, found, count = self.data_collator, [], 0
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(dataset), size):
            batch = self._prepare_inputs(collate([dataset[i] for i in range(start, min(start + size, len(dataset)))]))
            target_key = batch.pop("target_key")
            with self.compute_loss_context_manager():
                output = model(**batch)
            found.append((output.predicted.float(), output.target.float(), target_key))
            count += len(target_key)
            if count >= self.args.diagnostics_pairs:
                break
        model.train(was_training)
        predicted, target, key = (torch.cat(side)[: self.args.diagnostics_pairs] for side in zip(*found, strict=True))
        return space_diagnostics(predicted, target, key) if len(key) > 1 else {}

    def _warn_if_collapsed(self, now: dict[str, float]) -> None:
        start = self._start_diagnostics
        before, self._is_collapsed = self._is_collapsed, bool(start and now) and has_collapsed(now, start or {})
        if before and self._is_collapsed and not self._warned_of_collapse:
            self._warned_of_collapse = True
            logger.warning(COLLAPSED)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            write_vl_model_card(self.args.output_dir, self._vl_model, self.args, self.history_of_saved_weights())


def check_clips(clips: ClipDataset, args: VLJEPATrainingArguments) -> None:
    """Raises UserError for options that these clips cannot be trained with."""
    if args.x_encoder_trainable_layers and clips.features is not None:
        raise UserError("The clips bring their features, so x_encoder_trainable_layers would train nothing; set 0.")
    each = min(args.pairs_per_clip, max(len(clip.pairs) for clip in clips.clips))
    pairs = args.per_device_train_batch_size * each * args.world_size
    if args.objective == "info_nce" and min(pairs, len(clips) * each) < 2:
        raise UserError("objective: info_nce needs other pairs as negatives; raise per_device_train_batch_size to 2.")
    if args.regularizer is not None and pairs < (least := 8 if args.regularizer == "sigreg" else 2):
        raise UserError(
            f"regularizer: {args.regularizer} cannot judge a distribution by {pairs} pair(s), but by {least}."
        )


def choose_trained_parts(model: VLJEPAModel, args: VLJEPATrainingArguments) -> None:
    """Set `requires_grad` of every weight as `args` says. Raises UserError for more blocks than there are."""
    model.requires_grad_(True)
    model.log_temperature.requires_grad_(args.objective == "info_nce" and args.learn_temperature)
    model.y_encoder.requires_grad_(args.y_encoder_lr_factor > 0)
    if args.x_encoder_trainable_layers >= 0:
        model.x_encoder.requires_grad_(False)
        for weight in last_blocks(model.x_encoder, args.x_encoder_trainable_layers):
            weight.requires_grad_(True)


def last_blocks(x_encoder: nn.Module, count: int) -> list[nn.Parameter]:
    """The weights of the last `count` blocks, and of what follows them (the final norm). Raises UserError."""
    if not count:
        return []
    lists = {name: module for name, module in x_encoder.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    name, blocks = max(outer.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()), default=("", []))
    if count > len(blocks):
        raise UserError(
            f"x_encoder_trainable_layers={count}: the x_encoder has {len(blocks)} blocks; choose fewer, or -1 for all."
        )
    names = [key for key, _ in x_encoder.named_parameters()]
    first = names.index(next(key for key in names if key.startswith(f"{name}.{len(blocks) - count}.")))
    return [weight for _, weight in list(x_encoder.named_parameters())[first:]]


class _Epochs(TrainerCallback):
    """Tells the data set its epoch; measures the space before the first step; reads that back on resumption."""

    def __init__(self, trainer: VLJEPATrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.train_dataset.epoch = int(round(state.epoch or 0, 6))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if state.global_step == 0:
            if trainer.eval_dataset is not None and trainer.args.diagnostics_pairs:
                trainer._start_diagnostics = trainer.measure_space()
                trainer.log({f"eval_{key}": value for key, value in trainer._start_diagnostics.items()})
            return
        for entry in state.log_history:
            if entry["step"] == 0 and "eval_recall_at_1" in entry:
                trainer._start_diagnostics = {
                    key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")
                }
