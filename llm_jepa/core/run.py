"""One training run: its record, where to continue it, and what it leaves in its folder.

The record says what is computed (see `identity`); it is kept in `run.json`.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from accelerate.utils import gather_object
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from .card import data_facts
from .checkpoint import (
    RUN_FILE,
    STATE_FILE,
    ended_at,
    fault_of_model,
    find_resume,
    hold,
    is_finished_of_before,
    is_last,
    read_run,
    rotate,
    say,
)
from .checks import SPEED
from .errors import UserError
from .files import write_json
from .identity import (
    CONTENTS,
    ENDED_AT,
    LENGTHS,
    RUN_ID,
    TRAIN_FILES,
    changes,
    changes_of_environment,
    contents,
    continued,
    describe_run,
    needs_its_length,
    run_id,
)
from .publish import MANIFEST, publish_into, remove_leftovers, seal
from .recipe import Recipe
from .signals import StopRequest
from .stopping import OWED
from .trainer import JEPATrainer


class Beginning(NamedTuple):
    """record: of the run, for RUN_FILE.  resume: the checkpoint to continue from, or None."""

    record: dict[str, Any]
    resume: str | None


def identify(
    recipe: Recipe,
    train_sha256: str | None,
    validation_sha256: str | None,
    *,
    sources: Mapping[str, str | None],
    further: str,
    needs_length: str | None = None,
    train_files_sha256: str | None = None,
) -> Beginning:
    """The record of a run and the checkpoint to resume it from, if any. Writes nothing; says what has changed.

    Args:
        sources: keys that may name a folder, a file or a Hub repository -> the key of its revision. These are compared
            by what they hold.
        further: how to train a finished model for more steps, in words.
        needs_length: what of the family depends on the number of steps, beside the learning rate.
        train_files_sha256: of names and sizes, if the training rows are streamed and so have no hash.

    Raises UserError if there is nothing to evaluate on, or if the output folder cannot be used.
    """
    training, folder = recipe.training, Path(recipe.training.output_dir)
    evaluates = training.eval_strategy != "no" or training.load_best_model_at_end or training.eval_on_start
    if validation_sha256 is None and evaluates:
        raise UserError(
            "There is nothing to evaluate on: set validation_data or validation_rows, or eval_strategy: no."
        )
    record = describe_run(recipe, train_sha256, validation_sha256)
    record[CONTENTS] = contents(recipe, sources)
    if train_files_sha256 is not None:
        record[TRAIN_FILES] = train_files_sha256
    resume = find_resume(
        folder,
        record,
        resume=training.resume_from_checkpoint,
        may_change=recipe.may_change(),
        allowed=recipe.allowed,
        defaults=recipe.defaults(),
        needs_its_length=lambda state: needs_length or needs_its_length(recipe, state),
        further=further,
        num_processes=None if training.save_on_each_node else training.world_size,
    )
    if resume is None:
        return Beginning(record, None)
    return Beginning(_next_record(recipe, record, resume), resume)


def _next_record(recipe: Recipe, record: dict[str, Any], resume: str) -> dict[str, Any]:
    """The record of a run that goes on; says what is another than before."""
    folder = Path(recipe.training.output_dir)
    before = {key: value for key, value in read_run(folder).items() if key not in recipe.may_change()}
    found, versions = changes(before, record, recipe.defaults()), changes_of_environment(before, record)
    if allowed := [change.text for name, change in found.items() if name in recipe.allowed]:
        say(f"Allowed to differ from here on: {'; '.join(allowed)}.")
    if resume == str(folder):
        return before  # it is finished
    if versions:
        texts = ", ".join(change.text for change in versions.values())
        say(f"Warning: this run goes on with other versions, so its result may be another: {texts}.")
    step = _state_of(resume).global_step
    record = continued(before, record, {**found, **versions}, step)
    if found.keys() & LENGTHS:
        record[ENDED_AT] = max(before.get(ENDED_AT, 0), ended_at(folder))
    return record


def is_finished(recipe: Recipe, start: Beginning) -> bool:
    """Whether no step is left and the final model is whole; says so. Needs no model."""
    folder, (record, resume) = Path(recipe.training.output_dir), start
    if resume is None or not is_last(resume, record):
        return False
    is_verified = (folder / MANIFEST).exists()
    if resume != str(folder):  # otherwise `find_resume` has looked
        is_whole = fault_of_model(folder, record) is None if is_verified else is_finished_of_before(folder, record)
        if not is_whole or (is_verified and not is_last(folder, record)):
            return False
    if recipe.training.should_save:
        note = "" if is_verified else "; an earlier version saved it without a manifest to verify it by"
        print(f"{folder} is already finished ({_state_of(resume).global_step} steps{note}).")
        _clean(folder)
    return True


def _clean(folder: Path) -> None:
    if count := remove_leftovers(folder):
        print(f"Removed {count} leftover(s) of a killed process from {folder}.")


def claim(trainer: JEPATrainer, recipe: Recipe, record: dict[str, Any], *, sources: Mapping[str, str | None]) -> None:
    """Write the run's record into its folder. Call it last, so that a run that is refused leaves the folder free."""
    trainer.accelerator.wait_for_everyone()  # until every process has looked at the folder
    _check_machines(trainer)
    if RUN_ID not in record:
        # From the Hub, since `identify`. What is not a folder costs nothing: the cache names files by their hash.
        given = {key: str(recipe.given.get(key)) for key in sources}
        downloaded = {key: revision for key, revision in sources.items() if not Path(given[key]).exists()}
        record = {**record, CONTENTS: {**record[CONTENTS], **contents(recipe, downloaded)}}
        record[RUN_ID] = run_id(record)
    trainer.run = record
    trainer.data_facts = data_facts({**vars(recipe.model), **recipe.given}, record)
    if not trainer.args.should_save:  # one process, or with save_on_each_node one of each machine
        return
    folder = Path(trainer.args.output_dir)
    write_json(folder / RUN_FILE, record)
    descriptor = hold(folder)
    if descriptor is not None:
        trainer.release_folder = weakref.finalize(trainer, os.close, descriptor)
    _clean(folder)


def _check_machines(trainer: JEPATrainer) -> None:
    """With save_on_each_node, each machine writes the same names. Raises UserError if machines share output_dir."""
    args = trainer.args
    if not args.save_on_each_node:
        return
    with trainer.stage(Path(args.output_dir)) as stage:
        shares = args.should_save and args.process_index != 0 and stage.exists()
        answers = gather_object([shares])  # before the stage is removed
    if any(answers):
        raise UserError(
            f"save_on_each_node: true, but several machines share output_dir {args.output_dir}, and would write the "
            "same files. Remove save_on_each_node: process 0 then writes them for all."
        )


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
    trainer: JEPATrainer, resume: str | None, *, before_saving: Callable[[JEPATrainer, Path], None] | None = None
) -> None:
    """Train, or continue at the checkpoint `resume`, and leave a plain, loadable model in output_dir.

    before_saving: called with the trainer and the folder before the final model is saved, e.g. to merge an adapter.

    A request to stop that comes after the last step changes nothing: the final save is short.

    Raises UserError if an optimizer lacks its package, or if nothing computes metric_for_best_model, and `Stopped` if
    the run was asked to stop and has saved a checkpoint.
    """
    trainer.stop_request = StopRequest(trainer.args.stop_after)
    try:
        with trainer.stop_request.listening():
            _train_and_save(trainer, resume, before_saving)
    finally:
        trainer.release_folder()


def _train_and_save(
    trainer: JEPATrainer, resume: str | None, before_saving: Callable[[JEPATrainer, Path], None] | None
) -> None:
    # A run that was finished but not saved was killed between its last checkpoint and the final save.
    if resume is None or not _restore_if_finished(trainer, resume):
        try:
            trainer.train(resume_from_checkpoint=resume)
        except ImportError as error:
            raise UserError(f"Training stopped: {error}") from error
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            raise UserError(f"Training stopped: {error.args[0]}") from error  # str() of a KeyError has quotes
    _save(trainer, before_saving)
    if trainer.is_world_process_zero():
        _print_evaluation(trainer)
        print(f"Saved to {trainer.args.output_dir}")


def _save(trainer: JEPATrainer, before_saving: Callable[[JEPATrainer, Path], None] | None) -> None:
    """Save the model, the log and the card in a stage, and move them into output_dir, with their manifest last."""
    folder, args = Path(trainer.args.output_dir), trainer.args
    with trainer.stage(folder) as stage:
        staged = stage / (folder.resolve().name or "model")  # cards take their title from it
        if before_saving is not None:
            before_saving(trainer, staged)
        trainer.save_model(str(staged), _internal_call=True)  # True: not to the Hub yet
        if args.should_save:
            trainer.state.save_to_json(str(staged / STATE_FILE))
            trainer.write_card(staged)
        trainer.accelerator.wait_for_everyone()
        if args.should_save and staged.exists():
            seal(staged, run=trainer.run.get(RUN_ID))
            publish_into(staged, folder)
        trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save", revision=args.hub_revision)


def set_timeout(training: TrainingArguments) -> None:
    """Let gloo wait for `ddp_timeout`. transformers passes it on for GPUs only, and gloo's own is half an hour."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._set_pg_timeout(training.ddp_timeout_delta)


def hide_bars(training: TrainingArguments) -> None:
    """Hide the progress bars of Datasets and transformers as well, if the recipe wants none (`disable_tqdm`)."""
    if training.disable_tqdm:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()


def leave_process_group() -> None:
    """Destroy the process group of a multi-process run. Call it only after the trainer is gone.

    A live DistributedDataParallel waits for gloo's threads while it holds the GIL, and those threads may need the GIL
    in order to exit.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # trainer and model are parts of reference cycles
        torch.distributed.barrier()  # no process leaves while another still waits for its answer
        torch.distributed.destroy_process_group()


def _state_of(checkpoint: str) -> TrainerState:
    state: TrainerState = TrainerState.load_from_json(os.path.join(checkpoint, STATE_FILE))
    return state


def _restore_if_finished(trainer: JEPATrainer, resume: str) -> bool:
    """If no step is left, load the state and the weights to keep. (`Trainer.train` would take one more step.)"""
    if not is_last(resume, trainer.run):
        return False
    trainer.state = state = _state_of(resume)
    trainer.read_position(resume)
    if (Path(resume) / OWED).is_file():
        trainer.load_weights(resume)
        trainer.begin_training(state)
        trainer.restore_extra_state()
        trainer.evaluate_if_owed(resume)
    keep_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    trainer.load_weights(str(state.best_model_checkpoint) if keep_best else resume)
    if trainer.is_world_process_zero():
        _rotate(trainer, resume)
    return True


def _rotate(trainer: JEPATrainer, resume: str) -> None:
    """Remove the checkpoints of which there are too many, if a kill came between the last one and their removal."""
    folder, state = Path(trainer.args.output_dir), trainer.state
    best = str(folder / Path(state.best_model_checkpoint).name) if state.best_model_checkpoint else None
    if Path(resume).resolve().parent == folder.resolve():
        rotate(folder, step=state.global_step, best=best, limit=trainer.args.save_total_limit)


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
        if key.startswith("eval_") and name not in SPEED:
            before = f"{start[name]:.3g}" if name in start else ""
            print(f"  {name:38s}{before:>12s}{last[key]:>12.3g}")
    if not is_saved:
        print(f"  The saved weights are those of step {trainer.saved_step()}, which were not evaluated.")
