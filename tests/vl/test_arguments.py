"""Keys of a VL-JEPA recipe that do not go together are refused."""

from __future__ import annotations

import pytest
import torch

from llm_jepa.core.errors import UserError
from llm_jepa.vl.keys import VLDataArguments, VLModelArguments
from tests.vl.runs import arguments


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"feature_cache": "x", "x_encoder_trainable_layers": 1}, "frozen x_encoder"),
        ({"y_encoder_lr_factor": -0.1}, "y_encoder_lr_factor=-0.1 must be 0 or more"),
        ({"pairs_per_clip": 0}, "pairs_per_clip=0 must be 1 or more"),
        ({"x_encoder_trainable_layers": -2}, "must be -1 or more"),
        ({"per_device_train_batch_size": 0}, "must be 1 or more"),
        ({"objective": "cosine", "learn_temperature": False}, "belongs to objective: info_nce"),
        ({"regularizer_weight": 2.0}, "belongs to a regularizer"),
        ({"remove_unused_columns": True}, "the collator reads clips"),
        ({"logging_nan_inf_filter": True}, "NaN"),
        ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, "first epoch"),
        ({"label_smoothing_factor": 0.1}, "no labels"),
        ({"hub_token": "hf_secret"}, "hf auth login"),
        ({"bf16": True, "use_cpu": False}, "need a GPU"),
        ({"accelerator_config": {"dispatch_batches": True}}, "a pair is not a row"),
    ],
)
def test_options_that_cannot_work_are_refused(options, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        arguments(tmp_path, **options)


PARTS = {"x_encoder": {"model_type": "vit"}, "predictor": "p", "y_encoder": "y", "frame_size": 16}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vl_model": "x", "predictor": "p"}, "predictor belongs to a new model"),
        ({"vl_model": "x", "shared_dim": 3}, "shared_dim belongs to a new model"),
        ({**PARTS, "y_encoder": None}, "names no y_encoder"),
        ({**PARTS, "x_encoder": {"hidden_size": 3}}, "x_encoder has no model_type"),
        ({**PARTS, "x_encoder_revision": "main"}, "x_encoder_revision would be ignored"),
        ({**PARTS, "frame_size": None}, "frame_size goes with"),
        ({**PARTS, "x_encoder": "x"}, "frame_size goes with"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        VLModelArguments(**options)
    VLModelArguments(**PARTS), VLModelArguments(vl_model="x")


def test_validation_is_given_or_held_out():
    with pytest.raises(UserError, match="not both"):
        VLDataArguments("a", validation_data="b", validation_rows=1)
    with pytest.raises(UserError, match="validation_rows=-1"):
        VLDataArguments("a", validation_rows=-1)
