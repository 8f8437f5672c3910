"""Recipes: YAML files and command-line overrides become dataclasses, checked before anything is loaded.

A recipe is one flat mapping of keys. Which keys exist depends on its `family`; the caller hands in the family's three
dataclasses (model, data, training) as `groups`. YAML follows the core rules of version 1.2 (`no` is a word, `1e-5` a
number), without anchors, tags and duplicate keys. Every value is checked against the type and choices of its field.
`extends: FILE`, relative to the recipe, names one parent. The recipe overrides the parent's keys; the result is the
same as if everything were written in one file.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAMLError

from .errors import UserError, one_line
from .inherited import Fields
from .kinds import accept, coerce, describe, options_of, wants_text
from .strict_yaml import load_yaml, read_yaml

MAX_FILES = 5  # a recipe, the file it extends, the file that one extends, ...
EXTENDS, FAMILY = "extends", "family"  # keys of the recipe itself; no family has a field of these names
Groups = tuple[type, type, type]  # dataclasses: model, data, training
# Names from other tools and older versions, and what to write instead.
RENAMED = {
    "warmup_ratio": "warmup_steps (a value below 1 is a ratio)",
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "overwrite_output_dir": "a fresh output_dir",
    "logging_dir": "the TENSORBOARD_LOGGING_DIR environment variable",
    "lbd": "jepa_weight",
    "jepa_lambda": "jepa_weight",
    "lambda": "jepa_weight",
    "dataset_name": "train_data",
    "predictors": "num_predictor_tokens",
    "stop_gradient_target": "target_encoder: stop_gradient",
    "jepa_ratio": "jepa_dropout (1 - jepa_ratio)",
    "dataset_train_split": "train_split",
    "dataset_test_split": "validation_split",
    "dataset_streaming": "streaming",
}
_ONLY_IN_PYTHON = (
    "a recipe has lora_r, lora_alpha, lora_dropout and lora_target_modules; for another adapter pass your own "
    "LoraConfig as peft_config to LLMJEPATrainer in Python"
)
_QUANTIZED = "load_in_4bit: true takes NF4 and double quantization, as QLoRA does; nothing else is offered"
# Options of TRL's command line that are not keys here, and why.
NOT_OFFERED = {
    **dict.fromkeys(("load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage"), _QUANTIZED),
    "use_bnb_nested_quant": _QUANTIZED,
    **dict.fromkeys(("lora_target_parameters", "lora_modules_to_save", "lora_task_type"), _ONLY_IN_PYTHON),
    **dict.fromkeys(("use_rslora", "use_dora"), _ONLY_IN_PYTHON),
    "ignore_bias_buffers": "it is for debugging models with DDP; leave it out",
}
# Keys that say how a run is watched and stored, not what it computes. They may change when a run is resumed.
BOOKKEEPING = {
    "columns", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc",
    "ddp_timeout", "disable_tqdm", "feature_cache", "hub_always_push", "hub_model_id", "hub_private_repo",
    "hub_revision", "hub_strategy", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step",
    "logging_steps", "logging_strategy", "max_row_bytes", "max_row_pairs", "max_rows", "output_dir", "push_to_hub",
    "report_to", "resume_from_checkpoint", "run_name", "save_steps", "save_strategy", "save_total_limit",
    "skip_memory_metrics", "stop_after", "train_data", "validation_data",
}  # fmt: skip


SECRETS = {"hub_token", "push_to_hub_token"}  # of no file


@dataclass(frozen=True)
class RecipeSource:
    """A recipe as written: nothing is checked but the YAML and the form of the overrides."""

    files: list[tuple[Path, dict[str, Any]]]  # the recipe first, then the file it extends, ...
    overrides: dict[str, str]  # key -> its text on the command line

    @property
    def path(self) -> Path:
        return self.files[0][0]

    @property
    def keys(self) -> set[str]:
        """Every key that the files or the command line name."""
        return {key for _, keys in self.files for key in keys} | self.overrides.keys()

    @property
    def family(self) -> Any:
        """The value of `family`: the command line wins, then the nearest file. None if nobody sets it."""
        if FAMILY in self.overrides:
            return self.overrides[FAMILY]
        return next((keys[FAMILY] for _, keys in self.files if FAMILY in keys), None)


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe whose values are right, as far as this can be told before torch is imported."""

    source: RecipeSource
    family: str
    model: Any  # instances of the family's groups
    data: Any
    given: dict[str, Any]  # as in Recipe
    written: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    family: str
    model: Any  # instances of the family's groups
    data: Any
    training: Any
    given: dict[str, Any]  # the values that the files and the command line set, checked; without `family`
    written: dict[str, Any]  # the same as they were written: an int for a float is still an int
    allowed: frozenset[str] = frozenset()  # names of --allow_changed: what may differ when a run is resumed

    def identity(self) -> dict[str, Any]:
        """The values that make two runs the same run; plain JSON. `family` follows from the keys, so it is left out."""
        free = BOOKKEEPING | self.may_change()
        same = {key: value for key, value in sorted(self.given.items()) if key not in free and not self._is_unset(key)}
        if self.given.get("feature_cache"):
            same["feature_cache"] = True  # its folder may change, but cached features are float16
        return same

    def may_change(self) -> set[str]:
        """The keys that may differ when this run is resumed."""
        keys = BOOKKEEPING - {"feature_cache"}
        # Evaluation watches the run, unless its figures choose the weights or the learning rate. The batches that
        # compute cached features and targets have this size, too, and that changes their rounding.
        decides = (
            self.given.get("load_best_model_at_end")
            or self.given.get("lr_scheduler_type") == "reduce_lr_on_plateau"
            or self.given.get("feature_cache")
            or self.given.get("target_encoder") == "base"
        )
        return keys if decides else {*keys, "per_device_eval_batch_size"}

    def defaults(self) -> dict[str, Any]:
        """The default of every key that has a plain one, as JSON has it: to leave a key out is to write this."""
        defaults = {}
        for group in (self.model, self.data, self.training):
            for field in dataclasses.fields(group):
                if field.default is not dataclasses.MISSING:
                    defaults[field.name] = getattr(field.default, "value", field.default)
                elif field.default_factory is not dataclasses.MISSING:
                    defaults[field.name] = field.default_factory()
        return defaults

    def left_out(self) -> dict[str, Any]:
        """key -> value of the keys that the recipe leaves out; if the default is null, what stands for it.

        It is kept with the run, because another version may have another default.
        """
        values, free = {}, BOOKKEEPING | self.may_change() | SECRETS
        for group in (self.model, self.data, self.training):
            for name in [field.name for field in dataclasses.fields(group) if field.init]:
                if name in free or (name in self.given and not self._is_unset(name)):
                    continue
                value = self.defaults().get(name)
                resolved = getattr(group, name)
                values[name] = resolved if value is None and _is_plain(resolved) else value
        return values

    def _is_unset(self, key: str) -> bool:
        return self.given.get(key, 0) is None and self.defaults().get(key, 0) is None


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeSource:
    """Read a recipe, the files it extends and `--field value` overrides. Raises UserError, one line."""
    return RecipeSource(_chain(Path(path)), _split_overrides(overrides))


def check_values(
    source: RecipeSource, family: str, fields: Fields, *, owner: Callable[[str], str | None] = lambda key: None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of a recipe, each checked by itself: `Recipe.given` and `Recipe.written`.

    Args:
        family: the name of the family that the keys `fields` belong to.
        owner: key -> the other family that has such a key, or None. Only asked about unknown keys.

    Raises UserError, one line, for an unknown key, a value of another type, and a missing train_data or output_dir.
    """
    path = source.path

    def unknown(keys: Iterable[str], dashes: str = "") -> str:
        return "; ".join(_unknown([key for key in keys if key not in fields], list(fields), owner, family, dashes))

    values: dict[str, Any] = {}
    for file, keys in reversed(source.files):  # the child's keys win
        if message := unknown(key for key in keys if key != FAMILY):
            raise UserError(f"{file}: {message}")
        values |= keys
    overrides = {key: text for key, text in source.overrides.items() if key != FAMILY}
    if message := unknown(overrides, "--"):
        raise UserError(message)
    values |= {key: _override(key, text, fields[key][1]) for key, text in overrides.items()}
    resolved = {key: coerce(key, value, fields[key][1]) for key, value in values.items() if key != FAMILY}
    if "train_data" not in resolved:
        raise UserError(
            f"{path} sets no train_data: name a .jsonl, .json, .csv or .parquet file, a folder, or a Hub dataset."
        )
    if resolved.get("output_dir") is None:
        raise UserError(f"{path} sets no output_dir: name the folder the run is saved in.")
    return resolved, {key: value for key, value in values.items() if key != FAMILY}


def build(group: type, values: Mapping[str, Any], path: Path) -> Any:
    """A dataclass with those of the values that it has fields for. Raises UserError, one line; `path` is the recipe."""
    names = {field.name for field in dataclasses.fields(group) if field.init}
    try:
        return group(**{key: value for key, value in values.items() if key in names})
    except UserError:
        raise
    except Exception as error:  # transformers' and TRL's own checks of their fields
        raise UserError(f"{path}: {one_line(error, 400)}") from None


def recipe_fields(groups: Sequence[type]) -> Fields:
    """name -> (field, resolved type) of every key that a recipe of these groups may set."""
    fields: Fields = {}
    for group in groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if not field.init:
                continue
            hint, choices = hints[field.name], field.metadata.get("choices")
            if choices is not None and str in options_of(hint):  # transformers' way to list the allowed words
                hint = Literal[tuple(choices)] if field.default is not None else Literal[tuple(choices)] | None
            fields[field.name] = (field, hint)
    return fields


def describe_keys(groups: Groups, titles: Sequence[str], inherited: Fields) -> str:
    """Every key of ours with its type, default and meaning, for --help. `titles` name the groups."""
    lines = []
    described = [recipe_fields([group]) for group in groups]
    described[-1] |= {name: (field, hint) for name, (field, hint) in inherited.items() if field.metadata["help"]}
    for title, fields in zip(titles, described, strict=True):
        lines.append(f"\n{title} keys:")
        for name, (field, hint) in fields.items():
            default = "required" if field.default is dataclasses.MISSING else f"default {field.default}"
            lines += [f"  {name} ({describe(hint)}; {default})", f"      {field.metadata.get('help', '')}"]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe and the files it extends, parents last, each with its own keys except `extends`. Raises UserError."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    while True:
        own = read_yaml(path)
        chain.append((path, own))
        if EXTENDS not in own:
            return chain
        parent = _parent(path, own.pop(EXTENDS))
        if any(os.path.samefile(parent, file) for file, _ in chain):
            raise UserError(
                f"{path} extends {parent}, which is itself or extends it: a circle has no values; remove one `extends`."
            )
        if len(chain) == MAX_FILES:
            raise UserError(f"{path} extends {parent}, file {MAX_FILES + 1} of a recipe that may have {MAX_FILES}.")
        path = parent


def _parent(path: Path, name: Any) -> Path:
    """The file that the recipe at `path` extends. Raises UserError."""
    # Plain names only: no absolute path, drive, URL, `~`, `$`, backslash, nor `..` after a name. So a name is easy to
    # read and means the same file on every machine.
    if not isinstance(name, str) or not re.fullmatch(r"(\.\./)*([\w-][\w .-]*/)*[\w-][\w .-]*\.ya?ml", name):
        raise UserError(f"{path} extends {str(name)[:80]!r}: write one .yaml file relative to it, as ../_base.yaml.")
    parent = path.parent / name
    if not os.path.isfile(parent):
        raise UserError(f"{path} extends {parent}, which is not a file; the name is relative to {path.parent}.")
    return parent


def _split_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`--field value`, `--field=value` and `--field-with-hyphens value` -> {field: value as text}."""
    texts: dict[str, str] = {}
    words = list(arguments)
    while words:
        flag = words.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"Unexpected argument {flag!r}; overrides are written --field value.")
        name, equals, text = flag[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} has no value; write --{name} VALUE.")
            text = words.pop(0)
        if name == EXTENDS:
            raise UserError(f"--{EXTENDS}: only a recipe file can extend another; on the command line give the keys.")
        if name in texts:
            raise UserError(f"--{name} is given twice.")
        texts[name] = text
    return texts


def _override(name: str, text: str, hint: Any) -> Any:
    """The value of an override: a YAML scalar or flow collection. A field that takes any text takes it literally."""
    if text.lower() in ("none", "null"):
        return None
    is_choice = accept(text, hint)[0] and not accept("", hint)[0]  # such as `no`
    if is_choice or wants_text(hint, text):
        return text
    try:
        return load_yaml(text)
    except YAMLError:
        raise UserError(f"--{name}: cannot read {text!r} as a value.") from None


def _unknown(
    keys: Iterable[str], known: list[str], owner: Callable[[str], str | None], family: str, dashes: str
) -> list[str]:
    """Why these keys cannot be used, and what to write instead. Keys of one other family share one message."""
    messages: list[str] = []
    foreign: dict[str, list[str]] = {}  # other family -> its keys
    for key in keys:
        name = repr(dashes + key)
        other = owner(key)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        if key in RENAMED:
            messages.append(f"unknown key {name}: use {RENAMED[key]}")
        elif key in NOT_OFFERED:
            messages.append(f"unknown key {name}: {NOT_OFFERED[key]}")
        elif other is not None:
            foreign.setdefault(other, []).append(name)
        elif near:
            messages.append(f"unknown key {name}; did you mean {near[0]!r}?")
        else:
            messages.append(f"unknown key {name}; see llm-jepa train --help")
    for other, names in foreign.items():
        is_one = len(names) == 1
        messages.append(
            f"unknown {'key' if is_one else 'keys'} {', '.join(names)} of family: {family}: "
            f"{'it belongs' if is_one else 'they belong'} to family: {other}; write `family: {other}` into the recipe "
            f"to train one, or remove the {'key' if is_one else 'keys'}"
        )
    return messages


def _is_plain(value: Any) -> bool:
    """Whether JSON has such a value."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
