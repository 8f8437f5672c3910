"""Claims about options that transformers takes unchecked: they are one line before a model is loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments, trainer_optimizer

from llm_jepa.core.checks import check_optim_args, check_packages
from llm_jepa.core.errors import UserError


def arguments(optim, optim_args):
    return TrainingArguments(output_dir="run", use_cpu=True, report_to="none", optim=optim, optim_args=optim_args)


@pytest.mark.parametrize(
    ("optim", "optim_args", "said"),
    [
        ("adamw_torch", "((=", "'((=' is not NAME=VALUE"),
        ("adamw_torch", "betas=zz", "betas would be ignored: optim: adamw_torch takes none of them"),
        ("adamw_torch_fused", "beta1=0.8", "beta1 would be ignored"),
        ("adafactor", "scale_parameter=true", "scale_parameter would be ignored"),
        ("sgd", "momentum", "'momentum' is not NAME=VALUE"),
        ("sgd", "momentum=", "'momentum=' is not NAME=VALUE"),
        ("sgd", "momentum=0.9,", "'' is not NAME=VALUE"),
        ("sgd", "momentum=0.9=1", "is not NAME=VALUE"),
        ("sgd", "momentum=0.9,momentum=0.8", "momentum is there twice"),
        ("sgd", "momentum=zz", "momentum=zz: could not convert"),
        ("sgd", "momentum=nan", "momentum=nan is not a finite number"),
        ("sgd", "momentum=-1", "Invalid momentum value"),
        ("sgd", "nesterov=true", "Nesterov momentum requires a momentum"),
        ("sgd", "momentum=0.9,nesterov=zz", "nesterov=zz must be true or false"),
        ("sgd", "momentun=0.9", "momentun would be ignored: optim: sgd takes momentum, dampening, nesterov"),
        ("sgd", "weight_decay=0.1", "weight_decay would be ignored"),
        ("adagrad", "momentum=0.9", "takes lr_decay, eps"),
        ("rmsprop", "centered=maybe", "centered=maybe must be"),
    ],
)
def test_optim_args_that_change_nothing_or_cannot_be_read_are_refused(optim, optim_args, said):
    with pytest.raises(UserError) as error:
        check_packages(arguments(optim, optim_args))
    assert said in str(error.value) and str(error.value).startswith("optim_args: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("optim", "optim_args", "options"),
    [
        ("sgd", "momentum=0.9, nesterov=True", {"momentum": 0.9, "nesterov": True}),
        ("adagrad", "lr_decay=1e-3,eps=1e-6", {"lr_decay": 1e-3, "eps": 1e-6}),
        ("rmsprop", "alpha=0.9,centered=yes", {"alpha": 0.9, "centered": True}),
        ("adamw_torch", "", {}),
        ("adamw_torch", None, {}),
    ],
)
def test_optim_args_that_are_read_reach_the_optimizer(optim, optim_args, options):
    args = arguments(optim, optim_args)
    check_packages(args)
    kind, given = Trainer.get_optimizer_cls_and_kwargs(args)
    group = kind([torch.nn.Parameter(torch.zeros(1))], **given).param_groups[0]
    assert {name: group[name] for name in options} == options


def test_the_decay_of_optim_args_is_ignored():
    """Why it is refused: Trainer gives each group of weights the decay of its own key."""
    args = arguments("sgd", "weight_decay=0.5")
    trainer = Trainer(torch.nn.Linear(2, 2), args, train_dataset=[])
    assert {group["weight_decay"] for group in trainer.create_optimizer().param_groups} == {0.0}


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw", "lomo", "stable_adamw", "grokadamw", "lion_32bit"])
def test_without_its_package_an_optimizer_is_not_asked(monkeypatch, optim):
    """The line about the package comes from `check_packages`."""
    monkeypatch.setattr(trainer_optimizer, "is_bitsandbytes_available", lambda: False)  # the extra quant has it
    check_optim_args(arguments(optim, "rank=8"))


def test_with_its_package_an_optimizer_is_asked():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="rank would be ignored: optim: lion_32bit takes none of them"):
        check_packages(arguments("lion_32bit", "rank=8"))
