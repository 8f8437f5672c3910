"""The families of models that a recipe can train: a table, and the functions that look into it.

Modules are named here and imported on use, so that `llm-jepa --help` loads no torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .core.errors import UserError

if TYPE_CHECKING:
    from .core.recipe import Groups, Recipe, RecipeSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    trains: str  # in words
    room: str  # the package with the modules `arguments` and `commands`
    groups: tuple[str, str, str]  # dataclasses of `arguments`: model, data, training
    titles: tuple[str, str, str]  # of the groups, for --help
    parents: str  # the libraries' classes that the other training keys come from
    verbs: dict[str, str]  # its commands besides `train` -> help in a few words
    check: str | None = None  # function of `arguments`: (model, training) -> None, for keys of both that must agree


FAMILIES = {
    "lm": Family(
        trains="fine-tunes a causal language model (LLM-JEPA)",
        room="llm_jepa.lm",
        groups=("ModelArguments", "DataArguments", "LLMJEPAConfig"),
        titles=("Model", "Data", "LLM-JEPA"),
        parents="trl.SFTConfig and transformers.TrainingArguments",
        verbs={
            "generate": "decode greedily",
            "embed": "embed the context and target view of rows",
            "export": "write a model for other programs: transformers 4, PEFT, llama.cpp",
        },
    ),
    "vl": Family(
        trains="trains a vision-language model (VL-JEPA)",
        room="llm_jepa.vl",
        groups=("VLModelArguments", "VLDataArguments", "VLJEPATrainingArguments"),
        titles=("VL-JEPA model", "Data", "VL-JEPA"),
        parents="transformers.TrainingArguments",
        verbs={
            "train-decoder": "give a VL-JEPA its y_decoder, on text alone",
            "watch": "caption a video or camera as its scenes change",
        },
        check="check_together",
    ),
}
PLANNED = ("world",)  # names that a later version gives a meaning
VL_PARTS = {"x_encoder", "predictor", "y_encoder", "vl_model"}  # older recipes name one of them instead of a family


def parse_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file and `--field value` overrides, checked. Raises UserError, one line, for what cannot be right."""
    from .core import recipe

    source = recipe.read_recipe(path, overrides)
    name = _family_of(source)
    parsed = recipe.parse(source, name, groups_of(name), owner=lambda key: _owner(key, name))
    check = FAMILIES[name].check
    if check is not None:
        getattr(_room(name, "arguments"), check)(parsed.model, parsed.training)
    return parsed


def groups_of(name: str) -> Groups:
    """The dataclasses that hold a family's recipe keys: model, data, training."""
    arguments = _room(name, "arguments")
    model, data, training = (getattr(arguments, group) for group in FAMILIES[name].groups)
    return model, data, training


def commands_of(name: str) -> ModuleType:
    """The module of a family's commands: `train(recipe)`, `dry_run(recipe)`, `build_trainer(recipe)` and its VERBS."""
    return _room(name, "commands")


def describe_keys() -> str:
    """Every key of every family with its type, default and meaning, for --help."""
    from .core import recipe

    lines = []
    for name, family in FAMILIES.items():
        lines.append(f"\n`{recipe.FAMILY}: {name}` {family.trains}.")
        lines.append(recipe.describe_keys(groups_of(name), family.titles, family.parents))
    lines += [
        "\nThose are learning_rate, num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps, bf16,",
        "eval_strategy, save_steps, report_to, ...",
        f"\n`{recipe.EXTENDS}: FILE` in a recipe takes the keys of another file (relative to it); its own keys win.",
    ]
    return "\n".join(lines)


def _family_of(source: RecipeSource) -> str:
    """The family that a recipe names; for older recipes without one, the family that its keys belong to."""
    name = source.family
    if name is None:
        name = "vl" if source.keys & VL_PARTS else "lm"
        if os.environ.get("RANK", "0") == "0":  # several processes read the recipe
            logger.warning(
                f"{source.path} names no family; its keys are those of {name}. Write `family: {name}` into it."
            )
        return name
    choices = " or ".join(f"`family: {known}` ({family.trains})" for known, family in FAMILIES.items())
    if name in PLANNED:
        raise UserError(f"{source.path}: family {name!r} does not exist yet; this version has {choices}.")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{source.path}: unknown family {str(name)[:80]!r}; write {choices}.")
    return name


def _owner(key: str, asking: str) -> str | None:
    """The other family that has such a key."""
    from .core.recipe import recipe_fields

    return next((name for name in FAMILIES if name != asking and key in recipe_fields(groups_of(name))), None)


def _room(name: str, module: str) -> ModuleType:
    return import_module(f"{FAMILIES[name].room}.{module}")
