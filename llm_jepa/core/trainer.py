"""What both trainers do to `transformers.Trainer`: checkpoints that are whole or not there, no pickle, no NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import rotate_checkpoints

from . import checkpoint
from .errors import NonFiniteLossError


class SafeTrainer(Trainer):
    """A mixin by inheritance, because that is how Trainer is extended: `class Ours(SafeTrainer, SFTTrainer)`."""

    advice_if_not_finite = "Lower learning_rate, or look at the rows of this step."

    def _losses_are_finite(self) -> bool:
        return True

    def _get_grad_norm(self, model: Any, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """Called after clipping and before the optimizer: the last moment to keep NaN out of the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16 skips overflowing steps by itself
        finite = self._losses_are_finite()
        if not finite or not (scaled or math.isfinite(float(norm))):
            last = checkpoint.newest_complete(self.args.output_dir)
            raise NonFiniteLossError(
                f"{'Gradient' if finite else 'Loss'} is not finite at step {self.state.global_step + 1}; stopped "
                f"before the optimizer took it. Last good checkpoint: {last or 'none yet'}. {self.advice_if_not_finite}"
            )
        return norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Without `training_args.bin`, a pickle."""
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_by_name(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def load_weights(self, folder: str) -> None:
        """Load the weights of one of this run's checkpoints."""
        self._load_from_checkpoint(folder)

    def _load_best_model(self) -> None:
        if not self._load_by_name(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _load_by_name(self, folder: str) -> bool:
        """A whole model from its checkpoint; False where it is no such (adapters, shards).

        transformers writes some families (ViT, GPT-NeoX, mixtures of experts) under the names of version 4. Only
        `from_pretrained` translates them back; Trainer warns of missing keys and goes on with the weights it has.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers
        if sharded or not isinstance(model, PreTrainedModel):
            return False
        saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
        model.load_state_dict(saved.state_dict())
        return True

    def _save_more(self, folder: Path) -> None:
        """What else belongs into a checkpoint; on every rank, before it is sealed."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The manifest comes last, and older checkpoints go only after it: a kill at any moment leaves one whole."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        self._save_more(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.seal(folder)
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()

    def history_of_saved_weights(self) -> list[dict[str, float]]:
        """The log up to the step whose weights are saved: with load_best_model_at_end, the best one, not the last."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return [entry for entry in self.state.log_history if best is None or entry["step"] <= best]
