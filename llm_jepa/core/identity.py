"""What makes two runs the same run: the record in `run.json`, and how two records differ.

A record has the recipe after its defaults, hashes of the data and of every file that the recipe names, and the number
of processes. If one of them differs, the run is another one, and resuming it is refused. Versions of libraries and of
this package are in the record too: they may differ, and a line says which do.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UserError
from .files import content_sha256, file_sha256

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .recipe import Recipe

# Keys of a record that are not compared like a key of the recipe.
DEFAULTS = "defaults"  # key -> value, of the keys that the recipe left out
CONTENTS = "contents"  # key -> hash of the folder, file or Hub repository that the key names
ENVIRONMENT = "environment"  # package -> version; a difference is only said
RUN_ID = "id"  # also in the manifest of each of its checkpoints
HISTORY = "history"  # what has changed at which step
ENDED_AT = "ended_at"  # the last step of a run that was made longer later
UNMARKED = "unmarked_to"  # checkpoints up to this step are of an earlier version and have no RUN_ID
NOT_COMPARED = {DEFAULTS, CONTENTS, ENVIRONMENT, RUN_ID, HISTORY, ENDED_AT, UNMARKED}
LENGTHS = {"max_steps", "num_train_epochs"}
TRAIN_FILES = "train_files_sha256"  # of the names and sizes of files that are streamed; their rows have no hash
# key -> its name for users
SHOWN = {"train_sha256": "train_data", TRAIN_FILES: "train_data", "validation_sha256": "validation_data"}
OWNER = "checkpoint"  # the name by which --allow_changed lets a checkpoint of another run through
PACKAGES = (
    "accelerate", "av", "datasets", "deepspeed", "jinja2", "numpy", "peft", "pillow", "safetensors", "tokenizers",
    "torch", "transformers", "trl",
)  # fmt: skip
# Values that the state of the optimizer brings back, so that a change would have no effect.
OF_OPTIMIZER = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate", "optim", "optim_args", "weight_decay",
    "y_encoder_lr_factor",
}  # fmt: skip
FILE_KEYS = dict.fromkeys(("deepspeed", "fsdp_config", "accelerator_config"))  # may name a file of settings
# Schedules that do not depend on the length of the run, if the warmup does not.
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")


class Change(NamedTuple):
    old: Any
    new: Any
    text: str


def describe_run(recipe: Recipe, train_sha256: str | None, validation_sha256: str | None) -> dict[str, Any]:
    """The record of a run without `CONTENTS`; plain JSON."""
    training = recipe.training
    record = {
        **recipe.identity(),
        DEFAULTS: recipe.left_out(),
        "train_sha256": train_sha256,
        "validation_sha256": validation_sha256,
        "num_processes": training.world_size,
        "sharding": _sharding(training),
        # Of a launcher's config; bf16 and fp16 are keys of their own.
        "mixed_precision": "no" if training.bf16 or training.fp16 else training.mixed_precision,
        ENVIRONMENT: environment(training),
    }
    plain: dict[str, Any] = json.loads(json.dumps(record))  # as it will be read back from the file
    return plain


def _sharding(training: TrainingArguments) -> str:
    if training.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "deepspeed"
    is_fsdp = training.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return f"fsdp {os.environ.get('FSDP_VERSION', '1')}" if is_fsdp else "none"


def contents(recipe: Recipe, sources: Mapping[str, str | None]) -> dict[str, str]:
    """key -> hash of what it names, for the keys whose files are on this machine. sources: key -> key of its revision.

    A tokenizer has no weights, and those that lie in its folder do not matter.
    """
    hashes = {}
    for key, revision_key in {**sources, **FILE_KEYS}.items():
        source = recipe.given.get(key)
        revision = recipe.given.get(revision_key) if revision_key else None
        has_weights = not key.startswith("tokenizer")
        if isinstance(source, str) and (content := content_sha256(source, revision, has_weights=has_weights)):
            hashes[key] = content
    return hashes


def environment(training: TrainingArguments) -> dict[str, str]:
    """Package -> version, of this package and of those whose code takes part in a result; and the device."""
    import torch

    on_gpu = training.device.type == "cuda"
    versions = {"device": torch.cuda.get_device_name() if on_gpu else training.device.type}
    versions["python"] = platform.python_version()
    for package in (*PACKAGES, "llm-jepa"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**versions, "source files of llm-jepa": _source_sha256()}


@functools.cache
def _source_sha256() -> str:
    """A hash of our own source files: they may change and the version may not, in a checkout that is worked on."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")]):
        if path.relative_to(root).parts[0] == "recipes":  # only in an installed package; a run has its recipe
            continue
        digest.update(f"{path.relative_to(root).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()[:16]


# -- differences ------------------------------------------------------------------------------------------------------


def changes(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Change]:
    """name -> how it differs between two records.

    Where a key names a folder, a file or a Hub repository, `CONTENTS` has its hash. If both records have the hash, it
    decides, and not the name. A record of an earlier version has no `DEFAULTS`, and hashes of fewer files.

    Args:
        defaults: the value of keys that neither a record nor its `DEFAULTS` has.
    """
    hashes = before.get(CONTENTS, {}) if ENVIRONMENT in before else {}
    hashes_now = now.get(CONTENTS, {})
    found = {}
    for key in sorted((before.keys() | now.keys() | before.get(DEFAULTS, {}).keys()) - NOT_COMPARED):
        sides = [_value(record, key, defaults) for record in (before, now)]
        # A key that a library has added or removed since, and that nobody has set.
        if any(side is None for side in sides) and key not in before:
            continue
        old, new = (side[0] if side else None for side in sides)
        name = SHOWN.get(key, key)
        if hashes.get(key) and hashes_now.get(key):
            if hashes[key] != hashes_now[key]:
                text = f"{key}: {old!r} -> {new!r}" if old != new else f"{key}: the files of {new!r} differ"
                found[name] = Change(hashes[key], hashes_now[key], text)
        elif old != new:
            found[name] = Change(old, new, f"{name}: {old!r} -> {new!r}")
    return found


def _value(record: Mapping[str, Any], key: str, defaults: Mapping[str, Any]) -> tuple[Any] | None:
    for values in (record, record.get(DEFAULTS, {}), defaults):
        if key in values:
            return (values[key],)
    return None


def changes_of_environment(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Change]:
    """The same for versions. Nothing for records of earlier versions, which have none."""
    old, new = before.get(ENVIRONMENT, {}), now.get(ENVIRONMENT, {})
    return {
        name: Change(old.get(name), new.get(name), f"{name} {old.get(name, 'none')} -> {new.get(name, 'none')}")
        for name in sorted(old.keys() | new.keys())
        if old and old.get(name) != new.get(name)
    }


def is_only_longer(found: Mapping[str, Change]) -> bool:
    """Whether the run is the same, but for more steps or more epochs."""
    if len(found) != 1 or not found.keys() <= LENGTHS:
        return False
    old, new, _ = next(iter(found.values()))
    return all(isinstance(value, int | float) for value in (old, new)) and 0 < old < new


def check_names(allowed: Collection[str], records: Collection[Mapping[str, Any]]) -> None:
    """Raises UserError for a name in --allow_changed that no record has, and for one that cannot change."""
    for name in sorted(OF_OPTIMIZER & set(allowed)):
        raise UserError(
            f"--allow_changed {name}: the checkpoint's optimizer state has the old value and brings it back; put it "
            "back, or start a new run in another output_dir."
        )
    known = {OWNER, *SHOWN.values()}
    for record in records:
        known |= record.keys() | record.get(DEFAULTS, {}).keys()
    for name in sorted(set(allowed) - (known - NOT_COMPARED - SHOWN.keys())):
        raise UserError(f"--allow_changed {name}: a run has no such key; write a name that the refusal has named.")


# -- a longer run -----------------------------------------------------------------------------------------------------


def needs_its_length(recipe: Recipe, state: Mapping[str, Any]) -> str | None:
    """What makes a run of more steps another run from the first step on, or at the last one; None if it is the same.

    state: of the checkpoint that the longer run would continue. (A family has reasons of its own.)
    """
    training = recipe.training
    schedule = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    if training.deepspeed or schedule not in ENDLESS:
        return f"lr_scheduler_type: {'of DeepSpeed' if training.deepspeed else schedule}"
    if schedule != "constant" and 0 < training.warmup_steps < 1:
        return f"warmup_steps: {training.warmup_steps}, a share of the run,"
    if training.eval_strategy == "steps" and training.eval_steps < 1:
        return f"eval_steps: {training.eval_steps}, a share of the run,"
    # The last step is evaluated and saved in any case. An evaluation draws from the generators.
    if state["global_step"] < state["max_steps"]:
        return None
    if not _is_due(training.eval_strategy, training.eval_steps, state):
        return f"the evaluation at its last step, {state['global_step']},"
    if training.load_best_model_at_end and not _is_due(training.save_strategy, training.save_steps, state):
        return f"the checkpoint of its last step, {state['global_step']},"
    return None


def _is_due(strategy: str, every: float, state: Mapping[str, Any]) -> bool:
    """Whether something is done after this step that is not the last one of its run."""
    if strategy == "steps":
        return every >= 1 and state["global_step"] % every == 0
    return strategy != "epoch" or round(float(state.get("epoch") or 0), 6) % 1 == 0


# -- the next record --------------------------------------------------------------------------------------------------


def continued(before: Mapping[str, Any], now: dict[str, Any], found: Mapping[str, Change], step: int) -> dict[str, Any]:
    """The record of a run that goes on at `step`, with what has changed (`found`) in its history."""
    record = {**now, **{key: before[key] for key in (RUN_ID, HISTORY, ENDED_AT, UNMARKED) if key in before}}
    if RUN_ID not in before:
        record[UNMARKED] = step
    if CONTENTS in before:
        record[CONTENTS] = {**before[CONTENTS], **now.get(CONTENTS, {})}
    if found:
        entry = {"step": step, "changed": {name: [change.old, change.new] for name, change in found.items()}}
        record[HISTORY] = [*before.get(HISTORY, []), entry]
    return record


def run_id(record: Mapping[str, Any]) -> str:
    """A name for a run: equal for equal runs, so that a restart at step 0 keeps it."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
