"""Changed settings: between the kill and the resumption, something changes that can change the result.

The command must refuse, or say what has changed. Going on to another result in silence is the failure. Conversely,
what changes nothing must not be refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llm_jepa.core.checkpoint import RUN_FILE

from .cases import LOST, SILENT, SURVIVED, Case, Outcome
from .runs import (
    LM,
    RESUME,
    SMALL,
    VL,
    Run,
    Said,
    command,
    difference,
    ended_badly,
    in_child,
    is_one_line,
    judge,
    train,
    undisturbed,
    write_recipe,
)

# How a row of messages becomes text; not the template that is in the start folder.
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}[end]{% endfor %}"
LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}
# Every path is relative: a case has its own copy of the whole folder.
LM_FILES = {
    **{key: value for key, value in LM.items() if key not in ("model_config", "tokenizer_vocab_size")},
    "model_name_or_path": "start", "train_data": "rows.jsonl", "validation_data": "validation.jsonl",
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "diagnostics_pairs": 0,
}  # fmt: skip
SETUPS: dict[str, dict[str, Any]] = {
    "lm": {**LM_FILES, "target_encoder": "base"},
    "lm, lora": {**LM_FILES, **LORA},
    "lm, template": {**LM_FILES, "chat_template_path": "template.jinja"},
    "vl": {
        **{key: value for key, value in VL.items() if key not in ("frame_size", "tokenizer_vocab_size")},
        "y_encoder": "y_encoder", "x_encoder": "x_encoder", "train_data": "clips.jsonl",
    },
}  # fmt: skip
Change = Callable[[Path], None]


# -- files ------------------------------------------------------------------------------------------------------------


def _nudge(file: str, folder: Path) -> None:
    """Change every weight of a file a little."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / file)
    save_file({name: value * 1.01 for name, value in tensors.items()}, folder / file, metadata={"format": "pt"})


def _swap_words(file: str, folder: Path) -> None:
    """Two tokens of a tokenizer change places."""
    path = folder / file
    value = json.loads(path.read_text())
    vocabulary = value["model"]["vocab"]
    a, b = [name for name in vocabulary if name.isascii() and name.isalpha() and len(name) == 1][:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(value))


def _replace(file: str, old: str, new: str, folder: Path) -> None:
    text = (folder / file).read_text()
    assert old in text, f"{old!r} is not in {file}"
    (folder / file).write_text(text.replace(old, new))


def _set(file: str, key: str, value: Any, folder: Path) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, key: value}))


def _rows(change: Callable[[list[str]], list[str]], file: str, folder: Path) -> None:
    lines = (folder / file).read_text().splitlines()
    (folder / file).write_text("".join(line + "\n" for line in change(lines)))


def _picture(folder: Path) -> None:
    for path in folder.glob("*.png"):
        shutil.copyfile(folder / "0.png", path) if path.name != "0.png" else None


def _another_checkpoint(other: Path, folder: Path) -> None:
    shutil.rmtree(folder / "run" / "checkpoint-2")
    shutil.copytree(other / "checkpoint-2", folder / "run" / "checkpoint-2")


def _forget_version(package: str, folder: Path) -> None:
    """As if the run had been started with another version of a package."""
    path = folder / "run" / RUN_FILE
    path.write_text(json.dumps(_with_old_version(json.loads(path.read_text()), package)))


def _with_old_version(value: Any, package: str) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: "0.0.1" if key == package else _with_old_version(entry, package) for key, entry in value.items()}


def _move(old: str, new: str, folder: Path) -> None:
    (folder / old).rename(folder / new)


def _reversed(lines: list[str]) -> list[str]:
    return lines[::-1]


def _one_less(lines: list[str]) -> list[str]:
    return lines[:-1]


def _one_twice(lines: list[str]) -> list[str]:
    return [*lines, lines[0]]


# setup, what is changed -> how
FILES: dict[tuple[str, str], Change] = {
    ("lm", "weights of the start model"): partial(_nudge, "start/model.safetensors"),
    ("lm, lora", "weights of the start model"): partial(_nudge, "start/model.safetensors"),
    ("lm", "config of the start model"): partial(_set, "start/config.json", "rms_norm_eps", 1e-3),
    ("lm, lora", "dropout of the start model"): partial(_set, "start/config.json", "attention_dropout", 0.5),
    ("lm", "tokenizer of the start model"): partial(_swap_words, "start/tokenizer.json"),
    ("lm", "chat template of the start model"): partial(
        _replace, "start/chat_template.jinja", "message['content']", "message['content'] | upper"
    ),
    ("lm, template", "chat_template_path"): partial(_replace, "template.jinja", "[{{", "<{{"),
    ("lm", "order of the rows"): partial(_rows, _reversed, "rows.jsonl"),
    ("lm", "a row less"): partial(_rows, _one_less, "rows.jsonl"),
    ("lm", "a row more"): partial(_rows, _one_twice, "rows.jsonl"),
    ("lm", "a word in the rows"): partial(_replace, "rows.jsonl", "lines", "rows"),
    ("lm", "order of the validation rows"): partial(_rows, _reversed, "validation.jsonl"),
    ("lm", "a validation row less"): partial(_rows, _one_less, "validation.jsonl"),
    ("vl", "weights of the y_encoder"): partial(_nudge, "y_encoder/model.safetensors"),
    ("vl", "weights of the x_encoder"): partial(_nudge, "x_encoder/model.safetensors"),
    ("vl", "pictures"): _picture,
    ("vl", "order of the clips"): partial(_rows, _reversed, "clips.jsonl"),
    ("vl", "a text of the clips"): partial(_replace, "clips.jsonl", "number 3", "number 4"),
}
KEYS: dict[str, list[tuple[str, Any]]] = {
    "lm": [
        ("learning_rate", 0.02), ("seed", 7), ("data_seed", 7), ("per_device_train_batch_size", 2),
        ("gradient_accumulation_steps", 2), ("objective", "cosine"), ("jepa_weight", 0.5), ("num_predictor_tokens", 2),
        ("target_encoder", "stop_gradient"), ("lr_scheduler_type", "constant"), ("max_steps", 8), ("max_steps", 3),
        ("weight_decay", 0.1), ("optim", "sgd"), ("jepa_dropout", 0.5), ("readout", "mean"), ("max_length", 64),
        ("context_view", "message"), ("max_grad_norm", 0.01), ("warmup_steps", 2), ("adam_beta1", 0.5),
        ("eval_steps", 1), ("temperature", 0.5), ("adam_epsilon", 0.01),
    ],
    "vl": [
        ("learning_rate", 0.02), ("seed", 7), ("pairs_per_clip", 2), ("num_frames", 2), ("shared_dim", 4),
        ("y_encoder_lr_factor", 0.5), ("temperature", 0.5), ("per_device_train_batch_size", 2),
    ],
}  # fmt: skip
VERSIONS = ("torch", "transformers", "llm-jepa", "source files of llm-jepa")
# Nothing of the result depends on these.
SAME: dict[str, tuple[Change, tuple[str, ...]]] = {
    "nothing": (lambda folder: None, ()),
    "a default written out": (lambda folder: None, ("--weight_decay", "0.0")),
    "the folder of the start model": (partial(_move, "start", "moved"), ("--model_name_or_path", "moved")),
    "the folder of the rows": (partial(_move, "rows.jsonl", "moved.jsonl"), ("--train_data", "moved.jsonl")),
    "workers of the loader": (lambda folder: None, ("--dataloader_num_workers", "1")),
    "the progress bar": (lambda folder: None, ("--disable_tqdm", "false")),
}  # fmt: skip


def cases(work: Path, *, seed: int, quick: bool) -> Iterator[Case]:
    names = ("lm",) if quick else tuple(SETUPS)
    setups = {name: prepared(name, work) for name in names}
    for setup, what in [key for key in FILES if key[0] in setups][:: 5 if quick else 1]:
        yield Case("changed setting", f"{setup}, {what}", changed_file, (setups[setup], setup, what))
    for name in setups:
        for key, value in KEYS.get(name, [])[:: 10 if quick else 1]:
            yield Case("changed setting", f"{name}, {key}: {value}", changed_key, (setups[name], key, value))
    for package in VERSIONS:
        yield Case("changed setting", f"version of {package}", changed_version, (setups["lm"], package))
    for same in SAME:
        yield Case("unchanged setting", same, unchanged, (setups["lm"], same))
    if not quick:
        other = undisturbed("lm, other seed", work), undisturbed("lm", work)
        yield Case("changed setting", "the checkpoint of another run", changed_checkpoint, other)


def changed_file(folder: Path, setup: Path, name: str, what: str) -> Outcome:
    _begin(setup, folder)
    FILES[name, what](folder)
    return _judge_change(_resume(folder), folder, setup, words=())


def changed_key(folder: Path, setup: Path, key: str, value: Any) -> Outcome:
    _begin(setup, folder)
    return _judge_change(_resume(folder, f"--{key}", str(value)), folder, setup, words=(key,))


def changed_version(folder: Path, setup: Path, package: str) -> Outcome:
    """The result may be the same; that another version computes it must be said."""
    _begin(setup, folder)
    _forget_version(package, folder)
    said = _resume(folder)
    bad = ended_badly(said)
    if bad is not None:
        return bad
    is_said = f"{package} 0.0.1 -> " in said.out + said.err
    return Outcome(SURVIVED) if is_said else Outcome(SILENT, f"exit {said.code}, and nothing about {package}")


def changed_checkpoint(folder: Path, other: Run, run: Run) -> Outcome:
    """Another run's checkpoint of step 2 in the place of ours."""
    (folder / "run").mkdir()
    shutil.copy(run.whole / RUN_FILE, folder / "run")
    shutil.copytree(other.whole / "checkpoint-2", folder / "run" / "checkpoint-2")
    said = train(run, folder, *RESUME)
    is_refused = ended_badly(said) is None and is_one_line(said) and "checkpoint" in said.lines[0]
    return Outcome(SURVIVED) if is_refused else judge(said, folder / "run", run.whole)


def unchanged(folder: Path, setup: Path, what: str) -> Outcome:
    """It must be resumed, and to the same result."""
    _begin(setup, folder)
    change, words = SAME[what]
    change(folder)
    return judge(_resume(folder, *words), folder / "run", setup / "run")


def _judge_change(said: Said, folder: Path, setup: Path, *, words: tuple[str, ...]) -> Outcome:
    bad = ended_badly(said)
    if bad is not None:
        return bad
    if is_one_line(said) and "Cannot resume" in said.lines[0]:
        is_named = all(word in said.lines[0] for word in words)
        return Outcome(SURVIVED) if is_named else Outcome(LOST, f"the refusal does not name it: {said.lines[0]}")
    if is_one_line(said) and words and all(word in said.lines[0] for word in words):
        return Outcome(SURVIVED)  # no run may have this value
    if said.code != 0:
        return Outcome(LOST, f"exit {said.code}: {said.err[-300:]}")
    wrong = difference(folder / "run", setup / "run")
    return Outcome(SURVIVED) if wrong is None else Outcome(SILENT, f"exit 0, but {wrong}")


# -- setups -----------------------------------------------------------------------------------------------------------


def prepared(name: str, work: Path) -> Path:
    """A folder with everything that a run needs, and the run."""
    setup = work / "setups" / name.replace(", ", "-")
    if not setup.exists():
        in_child(_prepare, name, setup, undisturbed("lm", work).whole)
    return setup


def _prepare(name: str, setup: Path, start_model: Path) -> None:
    values = SETUPS[name]
    if values["family"] == "lm":
        _copy_model(start_model, setup / "start")
        write_recipe("lm", setup)  # for its rows
        lines = (setup / "rows.jsonl").read_text().splitlines(keepends=True)
        (setup / "rows.jsonl").write_text("".join(lines[:40]))
        (setup / "validation.jsonl").write_text("".join(lines[40:]))
        (setup / "template.jinja").write_text(TEMPLATE)
    else:
        write_recipe("vl", setup)
        _make_encoders(setup)
    from llm_jepa.core.strict_yaml import dump_yaml

    (setup / "recipe.yaml").write_text(dump_yaml(values))
    said = command(["train", "recipe.yaml", "--output_dir", "run"], setup)
    assert said.code == 0, said.err


def _copy_model(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.name not in (RUN_FILE, "trainer_state.json", "manifest.json"):
            shutil.copy(path, target)


def _make_encoders(setup: Path) -> None:
    """A small vision encoder and text encoder with a tokenizer, as folders."""
    from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel, set_seed

    from llm_jepa.lm.from_scratch import train_tokenizer

    set_seed(0)
    tokenizer = train_tokenizer([{"prompt": "number 0 1 2 3 4", "completion": "a"}] * 4, 290)
    text = BertConfig(**SMALL, num_hidden_layers=1, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    BertModel(text).save_pretrained(setup / "y_encoder")
    tokenizer.save_pretrained(setup / "y_encoder")
    ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=8, num_hidden_layers=2)).save_pretrained(setup / "x_encoder")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(setup / "x_encoder")


def _begin(setup: Path, folder: Path) -> None:
    """Copy a setup, with its run as it was after checkpoint-2."""
    for path in setup.iterdir():
        if path.name == "run":
            continue
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    (folder / "run").mkdir()
    shutil.copy(setup / "run" / RUN_FILE, folder / "run")
    shutil.copytree(setup / "run" / "checkpoint-2", folder / "run" / "checkpoint-2")


def _resume(folder: Path, *words: str) -> Said:
    return command(["train", "recipe.yaml", "--output_dir", "run", *words, *RESUME], folder)
