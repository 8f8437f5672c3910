"""`VLJEPATrainer`: `transformers.Trainer` with the loss of VL-JEPA  (arXiv:2512.10942v2, section 2).

Predicted and target embeddings of all ranks meet in a symmetric InfoNCE whose gradient is that of one process with the
whole batch. The loss is a sum over pairs divided by the pairs of the whole optimizer step. Gradient accumulation adds
up the gradients of its micro-batches; it does not enlarge the pool of negatives, for which the paper uses batches of
24,576.

Shapes: B pairs, D shared dimension, T frames, N visual tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

from ..core.checks import check_stream_batches
from ..core.diagnostics import evaluating
from ..core.distributed import whole
from ..core.errors import UserError
from ..core.losses import at_least_float32
from ..core.pairs import PairKeys
from ..core.trainer import JEPATrainer, StepPlan
from .arguments import VLJEPATrainingArguments
from .card import write_vl_model_card
from .data import ClipCollator, ClipDataset
from .features import FeatureCache, cache_features, encoder_sha256
from .keys import check_streamed_training
from .modeling import VLJEPAModel
from .objective import KEYS, check_clips, choose_trained_parts, pair_loss, slow_y_encoder, targets_learn
from .processing import VLJEPAProcessor
from .streaming import ClipStream, clips_of, endless_clips

logger = logging.get_logger(__name__)
MAX_TEXTS = 1_000_000  # targets of a frozen y_encoder kept in memory: 3 GB of 768 floats


class VLJEPATrainer(JEPATrainer):
    """Train a VL-JEPA.

    Args:
        model, processor: see `VLJEPAModel` and `VLJEPAProcessor`. `args` says what is trained: all of the predictor and
            the projections, the y_encoder at a learning rate of its own, the last blocks of the x_encoder.
        args: `VLJEPATrainingArguments`.
        train_dataset: a `ClipDataset`; or clips that are read while training goes on (see streaming.py).
        eval_dataset: a `ClipDataset`.

    Raises UserError for options with which the training would not do what they say.
    """

    args: VLJEPATrainingArguments

    def __init__(
        self,
        model: VLJEPAModel,
        args: VLJEPATrainingArguments,
        train_dataset: ClipDataset | ClipStream | IterableDataset,
        eval_dataset: ClipDataset | None = None,
        processor: VLJEPAProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        self.check_call(args, kwargs)
        if processor is None:
            raise UserError("VLJEPATrainer needs the processor that turns clips and texts into tensors.")
        # Copies, because the features set below belong to this model, and another trainer may get the same clips.
        train_dataset, eval_dataset = copy.copy(train_dataset), copy.copy(eval_dataset)
        if isinstance(train_dataset, IterableDataset):
            train_dataset = clips_of(train_dataset)
        if isinstance(train_dataset, ClipStream):
            check_streamed_training(args)
            check_stream_batches(args)
            check_clips(ClipDataset(train_dataset.first, num_frames=model.config.num_frames), args)
            train_dataset = endless_clips(train_dataset, args, model.config.num_frames)
        else:
            train_dataset.pairs_per_clip, train_dataset.seed = args.pairs_per_clip, args.seed
            check_clips(train_dataset, args)
        if args.x_encoder_trainable_layers and eval_dataset is not None and eval_dataset.features is not None:
            raise UserError("The validation clips bring features of an x_encoder that is to be trained; give frames.")
        choose_trained_parts(model, args)
        _name_special_tokens(model, processor)
        self.base_model = model  # without the wrapper of DDP
        super().__init__(
            model=model,
            args=args,
            data_collator=ClipCollator(processor),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            **kwargs,
        )
        if self.is_fsdp_enabled:  # FSDP2 shards no scalars
            model.log_temperature.data = model.log_temperature.data.reshape(1)
        known = [dataset for dataset in (train_dataset, eval_dataset) if isinstance(dataset, ClipDataset)]
        if args.feature_cache is not None:
            for dataset in known:
                if dataset.features is None:
                    dataset.features = self._cached_features(dataset)
        if not args.y_encoder_lr_factor:
            texts = self._pooled_targets(known)
            self.data_collator = ClipCollator(processor, texts)

    # -- data ---------------------------------------------------------------------------------------------------------

    def _cached_features(self, dataset: ClipDataset) -> FeatureCache:
        """The visual features of all clips. Each process computes a share.

        If the machines share no files, one process of each machine computes them all.
        """
        model, args = self.base_model, self.args

        def encode(pixels: Tensor) -> Tensor:
            """[B, T, 3, H, W] -> [B, N, D_x]."""
            with self.compute_loss_context_manager():
                return model.encode_frames(pixels.to(args.device))

        model.x_encoder.to(args.device)
        rank, world = args.process_index, args.world_size
        if args.save_on_each_node:
            rank, world = (0 if args.should_save else 1), 1
        with evaluating(model):
            return cache_features(
                encode,
                dataset,
                self.data_collator.processor,
                str(args.feature_cache),
                # Autocast changes the features, so the precision belongs to the key of the cache.
                encoder_hash=f"{encoder_sha256(model.x_encoder)} pooled={model.config.pool_frames} "
                f"bf16={args.bf16} fp16={args.fp16}",
                batch_size=args.per_device_eval_batch_size,
                rank=rank,
                world=world,
                wait=self.accelerator.wait_for_everyone,
            )

    @torch.no_grad()
    def _pooled_targets(self, datasets: Sequence[ClipDataset]) -> dict[str, Tensor] | None:
        """Every distinct target text through the frozen y_encoder, once; on every rank, in memory.

        Targets of a stream are encoded in each step.
        """
        texts = {pair.target for dataset in datasets for clip in dataset.clips for pair in clip.pairs}
        if len(texts) > MAX_TEXTS:
            logger.warning(f"{len(texts)} distinct targets are more than {MAX_TEXTS}: encoded anew in every step.")
            return None
        self.base_model.y_encoder.to(self.args.device).eval()
        by_length = sorted(sorted(texts), key=len)  # texts of one length need little padding
        pooled: dict[str, Tensor] = {}  # [D_y] each
        with tqdm(
            total=len(texts), desc="targets of the frozen y_encoder", unit="text", disable=self.args.disable_tqdm
        ) as bar:
            for start in range(0, len(texts), 256):
                chosen = by_length[start : start + 256]
                batch = self.data_collator.processor(target=chosen).to(self.args.device)
                with self.compute_loss_context_manager():
                    states = at_least_float32(self.base_model.pool_text(**batch)).cpu()
                pooled.update(zip(chosen, states, strict=True))
                bar.update(len(chosen))
        return pooled

    def begin_epoch(self, epoch: int) -> None:
        if not self.is_streaming:
            self.train_dataset.epoch = epoch  # which of the pairs of each clip are drawn

    # -- the step -----------------------------------------------------------------------------------------------------

    def plan_step(self, batches: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], StepPlan, Tensor]:
        """Count the pairs over all micro-batches and ranks."""
        (pairs,) = self.count_over_ranks([sum(len(batch["target_key"]) for batch in batches)])
        return batches, StepPlan(self.state.global_step, pairs), pairs

    def _pair_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """[B]: the loss of each pair of this rank, among the pairs of all ranks."""
        return pair_loss(
            model, batch, self.args, targets_learn=targets_learn(self.base_model), step=self.state.global_step
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The share of one micro-batch in the loss of its optimizer step, []; without a step, its own mean."""
        losses = self._pair_loss(model, inputs)  # [B]
        if model.training:
            self.sums.add(pair_loss=losses.detach().sum(), pairs=len(losses))
        if num_items_in_batch is None:
            return losses.sum() / len(losses)
        # DDP and FSDP average gradients over ranks; the sum over all ranks' pairs has been divided by their number.
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def training_figures(self, sums: dict[str, float]) -> dict[str, float]:
        """`loss` becomes the mean over pairs since the last log."""
        # In float32, as it was summed.
        figures = {"loss": float(torch.tensor(sums["pair_loss"] / max(sums["pairs"], 1)))}
        if self.args.objective == "info_nce":
            figures["temperature"] = float(whole(self.base_model.temperature.detach()))
        return figures

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but the temperature: weight decay would pull it to 1, whatever the loss says."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_temperature")]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Two learning rates, see `slow_y_encoder`."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        slow_y_encoder(optimizer, self.base_model, self.args.y_encoder_lr_factor)
        return optimizer

    def after_optimizer_step(self, progress: float) -> None:
        if self.is_fsdp_enabled:
            _ = self.base_model.temperature  # the forward pass bounds a gathered copy; this bounds the weight

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None and "log_temperature" in state_dict:  # of a sharded model
            state_dict = {**state_dict, "log_temperature": state_dict["log_temperature"].reshape(())}
        super()._save(output_dir, state_dict=state_dict)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def example_sums(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """[clips, 2]: the loss and the number of the pairs of each clip, in float32 at least."""
        losses = at_least_float32(self._pair_loss(model, inputs))  # [B]
        clips = int(inputs["clip_of_pair"].max()) + 1
        sums = losses.new_zeros(2, clips)
        sums[0].index_add_(0, inputs["clip_of_pair"], losses)
        sums[1] += torch.bincount(inputs["clip_of_pair"], minlength=clips)
        return sums.T

    @staticmethod
    def figure_names(args: VLJEPATrainingArguments) -> tuple[str, ...]:
        return ("loss",)

    def figures(self, totals: list[float]) -> dict[str, float]:
        """`loss` is a mean over pairs. (InfoNCE depends on the size of the evaluation batches.)"""
        total, pairs = totals
        return {"loss": total / max(pairs, 1)}

    @torch.no_grad()
    def embed_bank(self, dataset: ClipDataset | None) -> tuple[Tensor, Tensor, PairKeys] | None:
        """The first `diagnostics_pairs` pairs of the clips of `dataset`."""
        wanted, size = self.args.diagnostics_pairs, self.args.per_device_eval_batch_size
        if dataset is None or wanted == 0:
            return None
        parts: list[tuple[Tensor, ...]] = []
        count = 0
        with evaluating(self.base_model):
            for start in range(0, len(dataset), size):
                clips = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
                batch = self._prepare_inputs(self.data_collator(clips))
                keys = [batch.pop(name) for name in KEYS]
                with self.compute_loss_context_manager():
                    output = self.base_model(**batch)
                parts.append((output.predicted.float(), output.target.float(), *keys))
                count += len(output.predicted)
                if count >= wanted:
                    break
        predicted, target, *all_keys = (torch.cat(side)[:wanted] for side in zip(*parts, strict=True))
        return predicted, target, PairKeys(*all_keys)

    def count_bank(self) -> int:
        dataset = self.eval_dataset
        pairs = 0 if dataset is None else sum(len(dataset.draw(i)) for i in range(len(dataset)))
        return min(pairs, self.args.diagnostics_pairs)

    def collapse_advice(self) -> str:
        return (
            "The loss is low for a trivial reason: try objective: info_nce, a regularizer, or y_encoder_lr_factor: 0."
        )

    def write_card(self, folder: Path) -> None:
        facts = self.card_facts(folder)
        if self.is_streaming:
            facts["training"]["clips"] = str(self.position)
        write_vl_model_card(folder, self.base_model, self.args, facts)


def _name_special_tokens(model: VLJEPAModel, processor: VLJEPAProcessor) -> None:
    """Write the tokenizer's special ids into the predictor's config, as Trainer would, which warns of it as of news."""
    config = model.config.get_text_config()
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(processor.tokenizer, name)
        if token is not None and not isinstance(getattr(config, name, None), list):
            setattr(config, name, token)
