"""A trainer that can be asked to stop, and whose resumed run is the uninterrupted one.

The request is honoured at the end of an optimizer step. If an evaluation is due there, or is running, the state from
before the evaluation is saved. The resumed run begins with that evaluation, because an evaluation draws from the
generators, and its figures may choose the weights that are kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerControl

from .files import write_json
from .json_files import read_json
from .saving import SavingTrainer
from .signals import Stopped, StopRequest, leave_to_parent, waiting_until_started

OWED = "evaluation_owed.json"  # in a checkpoint whose step was to be evaluated, and was not


class EvaluationAbandoned(Stopped):
    """A request to stop came during an evaluation."""


class StoppableTrainer(SavingTrainer):
    """A trainer that saves a checkpoint and raises `Stopped` at the end of the step in which `stop_request` came."""

    stop_request = StopRequest()  # nothing asks, unless `run.train` sets another one
    control: TrainerControl
    _may_abandon = False
    _owed: dict[str, bool] | None = None
    _seen_step = _saved_in_step = -1

    def agreed_stop(self) -> int:
        """The code of a request that any rank has, 0 if none has. Collective: no rank may stop alone."""
        if not self.stop_request.is_listening:
            return 0
        code = self.stop_request.code
        if self.args.world_size > 1:
            code = int(self.accelerator.gather(torch.tensor([code], device=self.args.device)).max())
        return code

    def abandon_evaluation_if_asked(self) -> None:
        """Call it at every batch of an evaluation, on every rank."""
        if self._may_abandon and (code := self.agreed_stop()):
            raise EvaluationAbandoned(code)

    def save_more(self, folder: Path) -> None:
        super().save_more(folder)
        if self._owed is not None and self.args.should_save:
            write_json(folder / OWED, self._owed)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        of_torch = getattr(loader, "base_dataloader", loader)
        of_torch.worker_init_fn = partial(_begin_worker, of_torch.worker_init_fn)
        of_torch._get_iterator = partial(_start_workers, of_torch._get_iterator)
        return loader

    # -- the end of a step --------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *rest: Any, **kwargs: Any
    ) -> None:
        """Called at the end of a step, and again at the end of an epoch."""
        is_step = self._seen_step != self.state.global_step
        self._seen_step = self.state.global_step
        control, arguments = self.control, (tr_loss, grad_norm, model, trial, *rest)
        # The call for the end of the epoch follows before anything else is trained, and more may be due there.
        code = 0 if is_step and self._ends_epoch() else self.agreed_stop()
        if code:
            if control.should_evaluate:
                self._owed = {"save_was_due": control.should_save}
            control.should_evaluate = control.should_save = False
            control.should_log = True  # what was summed since the last log would be lost
            super()._maybe_log_save_evaluate(*arguments, **kwargs)
        else:
            takes_long = control.should_evaluate or control.should_save
            try:
                super()._maybe_log_save_evaluate(*arguments, **kwargs)
            except EvaluationAbandoned as abandoned:
                self._owed = {"save_was_due": control.should_save}
                code = abandoned.code
            else:
                code = self.agreed_stop() if takes_long else 0
        if not code:
            return
        if self._saved_in_step != self.state.global_step or self.args.save_only_model:
            self.args.save_only_model = False  # a run that goes on needs its optimizer
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.finish_saving()
        self.accelerator.wait_for_everyone()  # a launcher ends the others as soon as one rank has ended
        raise Stopped(code)

    def _ends_epoch(self) -> bool:
        control = self.control
        # Rounded, because a resumed run's epoch is a quotient that can fall just short of a whole number.
        return control.should_training_stop or control.should_epoch_stop or round(self.state.epoch or 0, 6) % 1 == 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._saved_in_step = self.state.global_step

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation of `train()`. If it is abandoned, the generators are as they were before."""
        before = _generators()
        self._may_abandon = True
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
            return metrics
        except EvaluationAbandoned:
            _set_generators(before)
            raise
        finally:
            self._may_abandon = False

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once by a resumed run, before its first step."""
        super()._load_rng_state(checkpoint)
        self.evaluate_if_owed(checkpoint)

    def evaluate_if_owed(self, checkpoint: str | None) -> None:
        """Evaluate the weights of a checkpoint whose run stopped before it could."""
        path = Path(checkpoint or "") / OWED
        if checkpoint is None or not path.is_file():
            return
        metrics = self._evaluate(None, None)
        self._determine_best_metric(metrics, None)
        if (
            read_json(path, {"save_was_due": bool})["save_was_due"]
            and self.state.best_global_step == self.state.global_step
        ):
            self.state.best_model_checkpoint = str(checkpoint)


def _start_workers(start: Callable[[], Any]) -> Any:
    with waiting_until_started():
        return start()


def _begin_worker(begin: Callable[[int], None] | None, index: int) -> None:
    """In a worker of a data loader. If a signal to all processes ended it, training could not finish its step."""
    leave_to_parent()
    if begin is not None:
        begin(index)


def _generators() -> tuple[Any, ...]:
    """The states of the generators that an evaluation may draw from: its data loader draws a seed."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_generators(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
