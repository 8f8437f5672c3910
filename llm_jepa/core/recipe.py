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
import enum
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from ruamel.yaml import YAMLError

from .errors import UserError, one_line
from .options import has_half_character
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
}
_ONLY_IN_PYTHON = (
    "a recipe has lora_r, lora_alpha, lora_dropout and lora_target_modules; for another adapter pass your own "
    "LoraConfig as peft_config to LLMJEPATrainer in Python"
)
_QUANTIZED = "weights are not quantized here; to save memory train an adapter (use_peft: true) on dtype: bfloat16"
# Options of TRL's command line that are not keys here, and why.
NOT_OFFERED = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage"), _QUANTIZED),
    "use_bnb_nested_quant": _QUANTIZED,
    **dict.fromkeys(("lora_target_parameters", "lora_modules_to_save", "lora_task_type"), _ONLY_IN_PYTHON),
    **dict.fromkeys(("use_rslora", "use_dora"), _ONLY_IN_PYTHON),
    "dataset_streaming": "the rows are read whole; write the part that you need into a file",
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


_LONGEST_LIST = 200  # characters of the words that a key takes; `optim` has 45 of them
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


def parse(
    source: RecipeSource, family: str, groups: Groups, *, owner: Callable[[str], str | None] = lambda key: None
) -> Recipe:
    """Check every value of a recipe and build its three groups.

    Args:
        family: the name of the family that `groups` belong to.
        owner: key -> the other family that has such a key, or None. Only asked about unknown keys.

    Raises UserError, one line, for anything that cannot be right.
    """
    path, fields = source.path, recipe_fields(groups)

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
    try:
        model, data, training = (_build(group, resolved) for group in groups)
    except UserError:
        raise
    except Exception as error:  # transformers' and TRL's own checks of their fields
        raise UserError(f"{path}: {one_line(error, 400)}") from None
    written = {key: value for key, value in values.items() if key != FAMILY}
    return Recipe(family, model, data, training, resolved, written)


def recipe_fields(groups: Groups) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """name -> (field, resolved type) of every key that a recipe of these groups may set."""
    fields: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for group in groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if not field.init:
                continue
            hint, choices = hints[field.name], field.metadata.get("choices")
            if choices is not None and str in _options(hint):  # transformers' way to list the allowed words
                hint = Literal[tuple(choices)] if field.default is not None else Literal[tuple(choices)] | None
            fields[field.name] = (field, hint)
    return fields


def describe_keys(groups: Groups, titles: Sequence[str], parents: str) -> str:
    """Every key of ours with its type, default and meaning, for --help.

    `titles` name the groups; `parents` names the libraries' classes that the other keys come from.
    """
    fields, lines = recipe_fields(groups), []
    for title, group in zip(titles, groups, strict=True):
        lines.append(f"\n{title} keys:")
        for name in group.__annotations__:
            field, hint = fields[name]
            default = "required" if field.default is dataclasses.MISSING else f"default {field.default}"
            lines += [f"  {name} ({_describe(hint)}; {default})", f"      {field.metadata.get('help', '')}"]
    others = len(fields) - sum(len(group.__annotations__) for group in groups)
    return "\n".join([*lines, f"\nAnd {others} keys of {parents}."])


def coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it (an int becomes a float), or UserError."""
    _check_plain(key, value)
    accepted, result = _accept(value, hint)
    if accepted:
        return result
    if isinstance(value, float) and not math.isfinite(value) and float in _options(hint):
        raise UserError(f"{key}: expected a finite number, got {value}.")
    given = f"got {value!r} ({type(value).__name__})"
    words = _words(hint)
    text = str(value)
    near = [word for word in words if text and word.startswith(text)] or difflib.get_close_matches(text, words, n=1)
    if not near:
        raise UserError(f"{key}: expected {_describe(hint, most=_LONGEST_LIST)}, {given}.")
    few = _LONGEST_LIST // 2  # characters: the word that is meant says more than a long list
    raise UserError(f"{key}: expected {_describe(hint, most=few)}, {given}; did you mean {near[0]!r}?")


def _check_plain(key: str, value: Any) -> None:
    """Raises UserError for a number of more than 64 bits, NaN in a list or mapping and half of a character."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{key}: {value} has more than 64 bits; write a smaller number.")
    if isinstance(value, str) and has_half_character(value):
        raise UserError(f"{key}: the text has a byte that is not UTF-8, or half of a surrogate pair; write it anew.")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            if isinstance(item, float) and math.isnan(item):
                raise UserError(f"{key}: it holds nan; write a finite number.")
            _check_plain(key, item)


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
    is_choice = _accept(text, hint)[0] and not _accept("", hint)[0]  # such as `no`
    if is_choice or _wants_text(hint, text):
        return text
    try:
        return load_yaml(text)
    except YAMLError:
        raise UserError(f"--{name}: cannot read {text!r} as a value.") from None


def _build(group: type, resolved: Mapping[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(group) if field.init}
    return group(**{key: value for key, value in resolved.items() if key in names})


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


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself if it is not one. A text beside an enum is one of its words."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(option for option in options if option is not str) if any(map(_is_enum, options)) else options


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _listed(options: Iterable[Any]) -> list[Any]:
    """The members of an enum that an option is a list of. Then a text of a recipe is such words, with spaces."""
    kinds = [kind for option in options if typing.get_origin(option) is list for kind in typing.get_args(option)]
    return [member.value for kind in kinds if _is_enum(kind) for member in kind]


def _words(hint: Any) -> list[str]:
    """The words that a key of a few choices takes."""
    options, words = _options(hint), []
    for option in options:
        if typing.get_origin(option) is Literal:
            words += [word for word in typing.get_args(option) if isinstance(word, str)]
        elif _is_enum(option):
            words += [str(member.value) for member in option]
    return words + _listed(options)


def _wants_text(hint: Any, text: str) -> bool:
    """True for a field that takes only text: its override is literal, so `123` is a text, and `*.jsonl` no YAML alias.

    If the field takes a list of texts too, what starts with a bracket is one.
    """
    options = {option for option in _options(hint) if option is not type(None)}
    return options == {str} or (options == {str, list[str]} and not text.startswith("["))


def _accept(value: Any, hint: Any) -> tuple[bool, Any]:
    """(does it fit, the value to use). A bool is not an int; an int becomes a float; nothing else is converted."""
    options = _options(hint)
    if isinstance(value, str) and (listed := _listed(options)):
        return all(word in listed for word in value.split()), value
    if len(options) > 1:
        for option in sorted(options, key=lambda option: option is float):  # float last, so that an int stays one
            accepted, result = _accept(value, option)
            if accepted:
                return True, result
        return False, None
    (hint,) = options
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, value
    if hint is type(None):
        return value is None, None
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments), value
    if _is_enum(hint):
        return value in [member.value for member in hint], value
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < sys.float_info.max:
            return False, None
        return True, float(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if origin is list:
        items = [_accept(item, arguments[0]) for item in value] if isinstance(value, list) else [(False, None)]
        return all(fits for fits, _ in items), [item for _, item in items]
    if origin is dict:
        return isinstance(value, dict), value
    return isinstance(hint, type) and isinstance(value, hint), value


def _describe(hint: Any, *, most: float = math.inf) -> str:
    """A type in words: "int or null", "one of a, b". A list of choices has at most `most` characters."""

    def choices(words: Iterable[Any], place: str = "") -> str:
        line = ", ".join(map(str, words))
        if len(line) <= most:
            return f"one of {line}"
        start = line[: int(most) // 2].rpartition(", ")[0]
        return f"one of {line.count(', ') + 1} words ({start}, ...{place})"

    def name(option: Any) -> str:
        if typing.get_origin(option) is Literal:
            return choices(typing.get_args(option))
        if _is_enum(option):
            return choices((member.value for member in option), f" see {option.__module__}.{option.__qualname__}")
        if listed := _listed([option]):
            return f"list of {', '.join(map(str, listed))}"
        if option is type(None):
            return "null"
        if option is bool:
            return "true or false"
        return getattr(typing.get_origin(option) or option, "__name__", str(option))

    return " or ".join(dict.fromkeys(name(option) for option in _options(hint)))
