"""The training arguments of `family: vl`: the keys of transformers, and those of `keys.VLJEPAKeys`."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import SchedulerType, TrainingArguments

from ..core.checks import check_dispatch, check_precision
from ..core.values import check_numbers
from .keys import VLJEPAKeys


@dataclass
class VLJEPATrainingArguments(VLJEPAKeys, TrainingArguments):
    """`transformers.TrainingArguments` plus what VL-JEPA adds. A batch of 8 is 8 clips."""

    # Another default than the parent's.
    lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "The paper's pretraining: constant; its SFT: cosine."}
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        check_precision(self)
        if self.report_to is None:
            self.report_to = "none"
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:  # transformers: False with activation_checkpointing
            self.ddp_find_unused_parameters = True  # a batch without queries leaves the predictor's token table unused
        self.check()
        check_dispatch(self)
