"""One training run: its identity, where to continue it, and what it leaves in its folder.

The identity is what the recipe computes, the rows and the number of processes; it is kept in `run.json`.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from .checkpoint import RUN_FILE, find_resume
from .errors import UserError
from .files import write_json
from .recipe import Recipe
from .trainer import JEPATrainer

NOT_SHOWN = ("runtime", "samples_per_second", "steps_per_second")  # speed is not a result of training


def identify(
    recipe: Recipe, train_sha256: str | None, validation_sha256: str | None
) -> tuple[dict[str, Any], str | None]:
    """The identity of a run (plain JSON) and the checkpoint to resume it from, if any. Writes nothing.

    Raises UserError if there is nothing to evaluate on, or if the output folder cannot be used.
    """
    training = recipe.training
    if validation_sha256 is None and (training.eval_strategy != "no" or training.load_best_model_at_end):
        raise UserError(
            "There is nothing to evaluate on: set validation_data or validation_rows, or eval_strategy: no."
        )
    identity = {
        **recipe.identity(),
        "train_sha256": train_sha256,
        "validation_sha256": validation_sha256,
        "num_processes": training.world_size,
    }
    identity = json.loads(json.dumps(identity))  # as it will be read back from the file
    resume = find_resume(training.output_dir, identity, resume=training.resume_from_checkpoint)
    if resume is not None and training.save_only_model:
        raise UserError(
            "save_only_model: true left no optimizer state to resume from; start a new run in another output_dir."
        )
    return identity, resume


def claim(trainer: JEPATrainer, identity: dict[str, Any]) -> None:
    """Write the run's identity into its folder. Call it last, so that a run that is refused leaves the folder free."""
    trainer.accelerator.wait_for_everyone()  # until every process has looked at the folder
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir) / RUN_FILE, identity)


def data_seed(recipe: Recipe) -> int:
    """The seed that draws the validation rows: the same for all seeds of a recipe unless it sets data_seed."""
    return recipe.training.data_seed if recipe.training.data_seed is not None else 0


@contextmanager
def library_refusals() -> Iterator[None]:
    """Turn the checks of transformers and TRL into UserError: a wrong value, or report_to without its package."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if "install" not in str(error):
            raise
        raise UserError(str(error)) from error


def train(
    trainer: JEPATrainer, resume: str | None, *, before_saving: Callable[[JEPATrainer], None] | None = None
) -> None:
    """Train, or continue at the checkpoint `resume`, and leave a plain, loadable model in output_dir.

    before_saving: called with the trainer before the final model is saved, e.g. to merge an adapter.

    Raises UserError if an optimizer lacks its package, or if nothing computes metric_for_best_model.
    """
    folder = Path(trainer.args.output_dir)
    finished = resume is not None and _restore_if_finished(trainer, resume)
    if finished and (folder / "model.safetensors").exists():
        print(f"{folder} is already finished ({trainer.state.global_step} steps).")
        return
    if not finished:
        try:
            trainer.train(resume_from_checkpoint=resume)
        except ImportError as error:
            raise UserError(f"Training stopped: {error}") from error
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            raise UserError(f"Training stopped: {error}") from error
    # A run that was finished but not saved was killed between its last checkpoint and the final save.
    if before_saving is not None:
        before_saving(trainer)
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        _print_evaluation(trainer)
        print(f"Saved to {trainer.args.output_dir}")


def leave_process_group() -> None:
    """Destroy the process group of a multi-process run. Call it only after the trainer is gone.

    A live DistributedDataParallel waits for gloo's threads while it holds the GIL, and those threads may need the GIL
    in order to exit.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # trainer and model are parts of reference cycles
        torch.distributed.barrier()  # no process leaves while another still waits for its answer
        torch.distributed.destroy_process_group()


def _restore_if_finished(trainer: JEPATrainer, resume: str) -> bool:
    """If no step is left, load the state and the weights to keep. (`Trainer.train` would take one more step.)"""
    state = TrainerState.load_from_json(os.path.join(resume, "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer.state = state
    keep_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    trainer.load_weights(str(state.best_model_checkpoint) if keep_best else resume)
    return True


def _print_evaluation(trainer: JEPATrainer) -> None:
    """Print the last evaluation of the run and the figures before the first step."""
    evaluations = [entry for entry in trainer.history_of_saved_weights() if "eval_loss" in entry]
    if not evaluations:
        return
    last, start = evaluations[-1], trainer.start_diagnostics or {}
    is_saved = last["step"] == trainer.saved_step()
    title = f"Validation, saved weights (step {last['step']})" if is_saved else f"Validation at step {last['step']}"
    print(f"\n{title:40s}{'step 0':>12s}{'saved' if is_saved else 'then':>12s}")
    for key in sorted(last):
        name = key.removeprefix("eval_")
        if key.startswith("eval_") and name not in NOT_SHOWN:
            before = f"{start[name]:.3g}" if name in start else ""
            print(f"  {name:38s}{before:>12s}{last[key]:>12.3g}")
    if not is_saved:
        print(f"  The saved weights are those of step {trainer.saved_step()}, which were not evaluated.")
