"""A trainer whose checkpoints are published whole, while training goes on.

The files of a checkpoint are written into a stage, as `Trainer` writes them. Hashing them, flushing them to disk and
removing older checkpoints takes as long again, and needs nothing that training changes. A thread does it. The folder
appears under its name when it is complete; a run that is killed before that resumes from the checkpoint before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import TrainOutput

from . import checkpoint, publish
from .errors import announced
from .files import make_stage
from .identity import RUN_ID


class SavingTrainer(Trainer):
    """`Trainer` that publishes checkpoints: a kill at any moment leaves a complete one or none.

    The run's folder has the last checkpoint when `train` returns or raises, when a callback's `on_save` is called, and
    before the next save begins. A second Ctrl-C does not wait for it.
    """

    run: Mapping[str, Any] = MappingProxyType({})  # the record of its run, see `identity`
    _stage: Path | None = None  # while a checkpoint is written
    _work: publish.Work | None = None  # while a checkpoint is published

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException:
            self.finish_saving()
            raise
        finally:
            self._close_bars()

    def _close_bars(self) -> None:
        """Close the progress bars of a training that did not end, so that what is printed next begins a line."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                for bar in (callback.training_bar, callback.prediction_bar):
                    if bar is not None:
                        bar.close()

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is published. Raises what went wrong. Not collective."""
        work, self._work = self._work, None
        if work is not None:
            work.finish()

    def last_good_checkpoint(self) -> str:
        """The newest complete checkpoint of this run, in words."""
        self.finish_saving()
        has_state, has_scaler = not self.args.save_only_model, getattr(self.accelerator, "scaler", None) is not None
        newest = checkpoint.newest_complete(self.args.output_dir, has_state=has_state, has_scaler=has_scaler)
        return str(newest or "none yet")

    def save_more(self, folder: Path) -> None:
        """Write what else belongs into a checkpoint. Called on every rank before the checkpoint is sealed."""

    @contextmanager
    def stage(self, folder: Path) -> Iterator[Path]:
        """A private folder in `folder`, the same on all ranks, which is removed when the block ends."""
        names: list[str | None] = [None]
        if self.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            names = [str(make_stage(folder))]
        if self.args.world_size > 1:
            broadcast_object_list(names)
        path = Path(str(names[0]))
        try:
            yield path
        finally:
            if self.args.should_save:
                shutil.rmtree(path, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written: while one is saved, a stage."""
        return str(self._stage or super()._get_output_dir(trial=trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint into a stage, and let a thread publish it and remove older ones."""
        self.finish_saving()
        run_dir = Path(self._get_output_dir(trial))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        with ExitStack() as stack:
            stage = stack.enter_context(self.stage(run_dir))
            self._write_checkpoint(stage, run_dir, model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:  # with save_on_each_node, one process of each machine
                publish_it = self._publisher(stage / target.name, target)
                remove_stage = stack.pop_all().close

                def work() -> None:
                    with announced():
                        try:
                            publish_it()
                        finally:
                            remove_stage()

                self._work = publish.Work(work)
                self._work.start()
            if self._is_awaited():
                self.finish_saving()
                self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
            self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, stage: Path, run_dir: Path, model: Any, trial: Any) -> None:
        staged = stage / f"checkpoint-{self.state.global_step}"
        limit, pushes = self.args.save_total_limit, self.args.push_to_hub
        self._stage, self.args.save_total_limit, self.args.push_to_hub = stage, None, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._stage, self.args.save_total_limit, self.args.push_to_hub = None, limit, pushes
        self._name_best_checkpoint(run_dir, staged)
        self.save_more(staged)

    def _name_best_checkpoint(self, run_dir: Path, staged: Path) -> None:
        """Trainer looked for the best checkpoint in the stage; its path in the state must be the final one."""
        step = self.state.best_global_step
        if not step:
            return
        best = run_dir / f"checkpoint-{step}"
        if best.name == staged.name or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(staged / checkpoint.STATE_FILE))

    def _publisher(self, staged: Path, target: Path) -> Callable[[], None]:
        """A function that publishes a checkpoint and looks at nothing that training changes."""
        step, best, limit = self.state.global_step, self.state.best_model_checkpoint, self.args.save_total_limit
        run = self.run.get(RUN_ID)

        def publish_it() -> None:
            publish.seal(staged, run=run)
            publish.publish(staged, target)
            checkpoint.rotate(target.parent, step=step, best=best, limit=limit)

        return publish_it

    def _is_awaited(self) -> bool:
        """Whether somebody looks at the checkpoint as soon as it is saved."""
        reads = any(type(c).on_save is not TrainerCallback.on_save for c in self.callback_handler.callbacks)
        return reads or self.args.push_to_hub or self.args.save_on_each_node

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Called at the end of a step. Raises what went wrong with a save as soon as it is known."""
        if self._work is not None and not self._work.is_alive():
            self.finish_saving()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Called after the last step. Every rank may load the best checkpoint here."""
        self.finish_saving()
        self.accelerator.wait_for_everyone()
        return super()._finalize_training(*args, **kwargs)
