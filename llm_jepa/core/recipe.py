"""Recipe YAML + command-line overrides -> dataclasses, strictly and before anything is loaded.

A recipe is one flat mapping of the field names in `llm_jepa.lm.arguments`, or in `llm_jepa.vl.arguments` where it names
an x_encoder or a vl_model: then it trains a VL-JEPA. YAML is read by its 1.2 core rules (`no` is a
word, `1e-5` a number), without anchors, tags or duplicate keys. Every value is checked against the field's type and
choices, from the file and from the command line alike. `extends: FILE`, relative to the recipe, names one parent whose
keys the recipe overrides; what comes out is the same as if it had been written out in full.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from ..lm.arguments import DataArguments, LLMJEPAConfig, ModelArguments
from ..vl.arguments import VLDataArguments, VLJEPATrainingArguments, VLModelArguments
from .errors import UserError

MAX_BYTES = 100_000
MAX_DEPTH = 20
MAX_FILES = 5  # a recipe, the file it extends, the file that one extends, ...
EXTENDS = "extends"
Groups = tuple[type, type, type]
LLM_GROUPS: Groups = (ModelArguments, DataArguments, LLMJEPAConfig)
VL_GROUPS: Groups = (VLModelArguments, VLDataArguments, VLJEPATrainingArguments)
# Names that people bring along, and what became of them.
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
}
# How a run is watched and stored, not what it computes: free to differ between a run and its resumption.
BOOKKEEPING = {
    "dataloader_num_workers", "dataset_num_proc", "disable_tqdm", "feature_cache", "hub_model_id", "hub_private_repo",
    "hub_strategy", "log_level", "logging_first_step", "logging_steps", "logging_strategy", "output_dir", "push_to_hub",
    "report_to", "resume_from_checkpoint", "run_name", "save_steps", "save_strategy", "save_total_limit", "train_data",
    "validation_data",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    model: Any  # the three groups of LLM_GROUPS, or of VL_GROUPS
    data: Any
    training: Any
    given: dict[str, Any]  # what the file and the command line set, resolved

    @property
    def is_vl(self) -> bool:
        return isinstance(self.training, VLJEPATrainingArguments)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be the same run; plain JSON."""
        same = {key: value for key, value in sorted(self.given.items()) if key not in BOOKKEEPING}
        cached = (
            {"feature_cache": True} if self.given.get("feature_cache") else {}
        )  # wherever: its features are float16
        return same | cached


def parse(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and `--field value` overrides. Raises UserError, one line, for anything that cannot be right."""
    chain = _chain(Path(path))
    flags = {word[2:].partition("=")[0].replace("-", "_") for word in overrides if word.startswith("--")}
    named = {key for _, own in chain for key in own} | flags
    groups = VL_GROUPS if named & {"x_encoder", "predictor", "y_encoder", "vl_model"} else LLM_GROUPS
    fields = recipe_fields(groups)
    values: dict[str, Any] = {}
    for file, own in reversed(chain):  # the child's keys win
        unknown = [key for key in own if key not in fields]
        if unknown:
            raise UserError(f"{file}: " + "; ".join(_unknown(key, list(fields)) for key in unknown))
        values.update(own)
    values.update(_parse_overrides(overrides, fields))
    resolved = {key: coerce(key, value, fields[key][1]) for key, value in values.items()}
    parts = [
        {key: resolved[key] for key in resolved if key in {f.name for f in dataclasses.fields(group) if f.init}}
        for group in groups
    ]
    if "train_data" not in resolved:
        raise UserError(f"{path} sets no train_data: name a .jsonl, .json, .csv or .parquet file or a Hub dataset.")
    if resolved.get("output_dir") is None:
        raise UserError(f"{path} sets no output_dir: name the folder the run is saved in.")
    try:
        model, data, training = (group(**values) for group, values in zip(groups, parts, strict=True))
    except UserError:
        raise
    except Exception as error:  # transformers' and TRL's own checks of their fields
        raise UserError(f"{path}: {' '.join(str(error).split())[:400]}") from None
    if groups is VL_GROUPS and training.objective != "info_nce" and model.temperature != VLModelArguments.temperature:
        raise UserError(
            f"temperature: {model.temperature} would be ignored: it belongs to objective: info_nce; remove it."
        )
    return Recipe(model, data, training, resolved)


def recipe_fields(groups: Groups = LLM_GROUPS) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """name -> (field, resolved type) of everything a recipe of these groups may set."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for group in groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.init:
                hint, choices = hints[field.name], field.metadata.get("choices")
                if choices is not None and str in _options(hint):  # transformers' way to say what a text may be
                    hint = Literal[tuple(choices)] if field.default is not None else Literal[tuple(choices)] | None
                found[field.name] = (field, hint)
    return found


def describe_keys() -> str:
    """Every key of ours with its type, default and meaning, for --help."""
    lines = []
    for groups, titles in (
        (LLM_GROUPS, ("Model", "Data", "LLM-JEPA")),
        (VL_GROUPS, ("VL-JEPA model", "Data", "VL-JEPA")),
    ):
        fields = recipe_fields(groups)
        if groups is VL_GROUPS:
            lines.append("\nA recipe that names an x_encoder or a vl_model trains a VL-JEPA, with these keys instead.")
        for title, group in zip(titles, groups, strict=True):
            lines.append(f"\n{title} keys:")
            for name in group.__annotations__:
                field, hint = fields[name]
                default = "required" if field.default is dataclasses.MISSING else f"default {field.default}"
                lines += [f"  {name} ({_describe(hint)}; {default})", f"      {field.metadata.get('help', '')}"]
        others = len(fields) - sum(len(group.__annotations__) for group in groups)
        parent = "trl.SFTConfig and " if groups is LLM_GROUPS else ""
        lines.append(f"\nAnd {others} keys of {parent}transformers.TrainingArguments.")
    lines.append(
        "\nThose are learning_rate, num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps, bf16,\n"
        "eval_strategy, save_steps, report_to, ..."
        f"\n\n`{EXTENDS}: FILE` in a recipe (relative to it) takes the keys of another one, which its own override."
    )
    return "\n".join(lines)


def coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it (an int becomes a float), or UserError."""
    accepted, result = _accept(value, hint)
    if not accepted:
        raise UserError(f"{key}: expected {_describe(hint)}, got {value!r} ({type(value).__name__}).")
    return result


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A flat YAML mapping of a trusted size and shape. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No recipe at {path}; write llm-jepa train RECIPE.yaml --field value, the recipe first.")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes; a recipe is a page of YAML (limit {MAX_BYTES}).")
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold `key: value` lines, found {type(value).__name__}.")
    return value


# ---------------------------------------------------------------------------------------------------------------------


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe and the files it extends, parents last, each with its own keys (`extends` aside). Raises UserError."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    while True:
        own = read_yaml(path)
        chain.append((path, own))
        if EXTENDS not in own:
            return chain
        parent = _parent(path, own.pop(EXTENDS))
        if any(os.path.samefile(parent, file) for file, _ in chain):
            raise UserError(f"{path} extends {parent}, which is itself or extends it: a circle has no values.")
        if len(chain) == MAX_FILES:
            raise UserError(f"{path} extends {parent}, file {MAX_FILES + 1} of a recipe that may have {MAX_FILES}.")
        path = parent


def _parent(path: Path, name: Any) -> Path:
    """The file that the recipe at `path` extends. Raises UserError."""
    # Plain names only: no absolute path, drive, URL, `~`, `$`, backslash, nor `..` after a name. Nobody has to guess
    # which file is meant, and it means the same on every machine.
    if not isinstance(name, str) or not re.fullmatch(r"(\.\./)*([\w-][\w .-]*/)*[\w-][\w .-]*\.ya?ml", name):
        raise UserError(f"{path} extends {str(name)[:80]!r}: write one .yaml file relative to it, as ../_base.yaml.")
    parent = path.parent / name
    if not os.path.isfile(parent):
        raise UserError(f"{path} extends {parent}, which is no file; the name is relative to {path.parent}.")
    return parent


def _parse_overrides(arguments: Sequence[str], fields: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """--field value, --field=value and --field-with-hyphens value; values are YAML scalars or flow collections."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"Unexpected argument {flag!r}; overrides are written --field value.")
        name, equals, text = flag[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} has no value; write --{name} VALUE.")
            text = rest.pop(0)
        if name == EXTENDS:
            raise UserError(f"--{EXTENDS}: only a recipe file can extend another; on the command line give the keys.")
        if name not in fields:
            raise UserError(_unknown(name, list(fields), "--"))
        if name in values:
            raise UserError(f"--{name} is given twice.")
        if text.lower() in ("none", "null"):
            values[name] = None
        elif _accept(text, fields[name][1])[0] and not _accept("", fields[name][1])[0]:
            values[name] = text  # a choice such as `no`
        elif _wants_text(fields[name][1]):
            values[name] = text
        else:
            try:
                values[name] = yaml.load(text, Loader=_StrictLoader)
            except yaml.YAMLError:
                raise UserError(f"--{name}: cannot read {text!r} as a value.") from None
    return values


def _unknown(key: str, known: list[str], dashes: str = "") -> str:
    if key in RENAMED:
        return f"unknown key {dashes + key!r}: use {RENAMED[key]}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {dashes + key!r}" + (f"; did you mean {near[0]!r}?" if near else "; see llm-jepa train --help")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _wants_text(hint: Any) -> bool:
    """A str field without a structured alternative: its override is taken to the letter, `123` included."""
    options = [option for option in _options(hint) if option is not type(None)]
    return options == [str]


def _accept(value: Any, hint: Any) -> tuple[bool, Any]:
    """(does it fit, the value to use). bool is no int; an int is a float; nothing else is converted."""
    options = _options(hint)
    if len(options) > 1:
        for option in sorted(options, key=lambda option: option is float):  # keep an int where both are welcome
            accepted, result = _accept(value, option)
            if accepted:
                return True, result
        return False, None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, value
    if hint is type(None):
        return value is None, None
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments), value
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint], value
    if hint is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < sys.float_info.max
        return ok, float(value) if ok else None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if origin is list:
        ok = isinstance(value, list) and all(_accept(item, arguments[0])[0] for item in value)
        return ok, [_accept(item, arguments[0])[1] for item in value] if ok else None
    if origin is dict:
        return isinstance(value, dict), value
    return isinstance(hint, type) and isinstance(value, hint), value


def _describe(hint: Any) -> str:
    def name(option: Any) -> str:
        if typing.get_origin(option) is Literal:
            return "one of " + ", ".join(map(str, typing.get_args(option)))
        if isinstance(option, type) and issubclass(option, enum.Enum):
            return "one of " + ", ".join(str(member.value) for member in option)
        if option is type(None):
            return "null"
        if option is bool:
            return "true or false"
        return getattr(typing.get_origin(option) or option, "__name__", str(option))

    return " or ".join(dict.fromkeys(name(option) for option in _options(hint)))


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 core scalars; no anchors, aliases, tags, merges or duplicate keys; limited depth."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError(f"anchors and aliases are not allowed (line {event.start_mark.line + 1})")
        if getattr(event, "tag", None):
            raise yaml.YAMLError(f"tags are not allowed (line {event.start_mark.line + 1})")
        if self.depth >= MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels (line {event.start_mark.line + 1})")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.YAMLError(f"keys must be words (line {key_node.start_mark.line + 1})")
            if key in seen:
                raise yaml.YAMLError(f"{key!r} is given twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [c if c != "\0" else "" for c in _first]
    )


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    if len(node.value) > 40:
        raise yaml.YAMLError(f"a number of {len(node.value)} digits (line {node.start_mark.line + 1})")
    return int(str(loader.construct_scalar(node)))  # YAML 1.1 would read 010 as 8


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _float)
