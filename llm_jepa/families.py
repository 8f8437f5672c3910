"""The families of models that a recipe can train: a table, and the functions that look into it.

Modules are named here and imported on use, so that `llm-jepa --help` loads no torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .core.errors import UserError
from .shipped import model_source, recipe_path

if TYPE_CHECKING:
    from .core.inherited import Fields
    from .core.recipe import CheckedRecipe, Groups, Recipe, RecipeSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    trains: str  # in words
    room: str  # the package with the modules `keys`, `arguments` and `commands`
    keys: tuple[str, str, str]  # dataclasses of `keys`: model, data, and our part of training. They need no library
    training: str  # the dataclass of `arguments` that has all training keys
    titles: tuple[str, str, str]  # of the groups, for --help
    parents: str  # the libraries' classes that the other training keys come from
    verbs: dict[str, str]  # its commands besides `train` -> help in a few words
    check: str | None = None  # function of `keys` for keys of several groups that must agree, see `_check_together`


FAMILIES = {
    "lm": Family(
        trains="fine-tunes a causal language model (LLM-JEPA)",
        room="llm_jepa.lm",
        keys=("ModelArguments", "DataArguments", "JEPAKeys"),
        training="LLMJEPAConfig",
        titles=("Model", "Data", "LLM-JEPA"),
        parents="trl.SFTConfig and transformers.TrainingArguments",
        verbs={
            "generate": "decode greedily",
            "embed": "embed the context and target view of rows",
            "export": "write a model for other programs: transformers 4, PEFT, llama.cpp",
        },
        check="check_together",
    ),
    "vl": Family(
        trains="trains a vision-language model (VL-JEPA)",
        room="llm_jepa.vl",
        keys=("VLModelArguments", "VLDataArguments", "VLJEPAKeys"),
        training="VLJEPATrainingArguments",
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
    return build_recipe(check_recipe(path, overrides))


def build_recipe(checked: CheckedRecipe) -> Recipe:
    """The recipe with its training arguments. Imports torch. Raises UserError for what only the libraries see."""
    from .core import recipe

    name = checked.family
    training = recipe.build(groups_of(name)[-1], checked.given, checked.source.path)
    _check_together(name, checked.model, checked.data, training, checked.given)
    return recipe.Recipe(name, checked.model, checked.data, training, checked.given, checked.written)


def check_recipe(path: str | Path, overrides: Sequence[str] = ()) -> CheckedRecipe:
    """Read a recipe (a file, or the name of one of ours) and check its values.

    Imports no library, if the table of inherited keys fits the installed ones.

    Raises UserError, one line.
    """
    from .core import recipe
    from .core.inherited import default_of
    from .core.values import check_numbers

    source = recipe.read_recipe(recipe_path(path), overrides)
    name = _family_of(source)
    fields = fields_of(name)
    given, written = recipe.check_values(source, name, fields, owner=lambda key: _owner(key, name))
    for key in ("model_name_or_path", "tokenizer_name_or_path"):
        if given.get(key):
            given[key] = model_source(given[key])
    model, data, training = (recipe.build(group, given, source.path) for group in keys_of(name))
    for key, (field, _) in fields.items():
        if not hasattr(training, key):
            setattr(training, key, given.get(key, default_of(field)))
    check_numbers(training)
    training.check()
    _check_together(name, model, data, training, given)
    return recipe.CheckedRecipe(source, name, model, data, given, written)


def fields_of(name: str) -> Fields:
    """Every recipe key of a family with its field and type."""
    from .core import inherited
    from .core.recipe import recipe_fields

    if inherited.is_of_installed_versions():
        return {**inherited.read_inherited(name), **recipe_fields(keys_of(name))}
    return recipe_fields(groups_of(name))


def keys_of(name: str) -> Groups:
    """The dataclasses with the recipe keys of ours: model, data, training. They import no library."""
    keys = _room(name, "keys")
    model, data, training = (getattr(keys, group) for group in FAMILIES[name].keys)
    return model, data, training


def groups_of(name: str) -> Groups:
    """The dataclasses that hold a family's recipe keys: model, data, training with all inherited keys."""
    model, data, _ = keys_of(name)
    return model, data, getattr(_room(name, "arguments"), FAMILIES[name].training)


def commands_of(name: str) -> ModuleType:
    """The module of a family's commands: `train(recipe)`, `dry_run(recipe)`, `build_trainer(recipe)` and its VERBS."""
    return _room(name, "commands")


def describe_keys() -> str:
    """Every key of every family with its type, default and meaning, for --help."""
    from .core import recipe
    from .core.inherited import read_inherited

    lines = []
    for name, family in FAMILIES.items():
        inherited = read_inherited(name)
        lines.append(f"\n`{recipe.FAMILY}: {name}` {family.trains}.")
        lines.append(recipe.describe_keys(keys_of(name), family.titles, inherited))
        others = sum(field.metadata["help"] is None for field, _ in inherited.values())
        lines.append(f"\nAnd {others} keys of {family.parents}.")
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
    return next((name for name in FAMILIES if name != asking and key in fields_of(name)), None)


def _check_together(name: str, model: Any, data: Any, training: Any, given: Mapping[str, Any]) -> None:
    """given: the keys that the recipe sets, and their values."""
    check = FAMILIES[name].check
    if check is not None:
        getattr(_room(name, "keys"), check)(model, data, training, given)


def _room(name: str, module: str) -> ModuleType:
    return import_module(f"{FAMILIES[name].room}.{module}")
