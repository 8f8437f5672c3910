"""Forgeries: checkpoints that somebody has changed and sealed again, so that every hash fits.

Such a checkpoint is refused in one line, or the run goes on from the one before and says so. No code of it runs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llm_jepa.core.publish import MANIFEST, seal

from .cases import EXECUTED, LOST, SURVIVED, WROTE, Case, Outcome
from .damage import unfinished
from .runs import RESUME, Run, Said, ended_badly, is_one_line, judge, train, undisturbed

OUTSIDE, MARK = "outside.txt", "executed"
Forgery = Callable[[Path], None]  # of the folder checkpoint-4


class Bomb:
    """Pickled, it makes a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)

    def __init__(self, path: Path) -> None:
        self.path = str(path)


# -- manifests --------------------------------------------------------------------------------------------------------


def _manifest_text(text: str | bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(text.encode() if isinstance(text, str) else text)


def _entries(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    value = json.loads((folder / MANIFEST).read_text())
    change(value["files"])
    (folder / MANIFEST).write_text(json.dumps(value))


def _without(name: str, keep_file: bool, folder: Path) -> None:
    _entries(lambda files: files.pop(name), folder)
    if not keep_file:
        (folder / name).unlink()


def _renamed_entry(name: str, folder: Path) -> None:
    _entries(lambda files: files.update({name: files.pop("optimizer.pt")}), folder)


def _changed_entry(key: str, value: Any, folder: Path) -> None:
    _entries(lambda files: files["optimizer.pt"].update({key: value}), folder)


TEXTS: dict[str, str | bytes] = {
    "no files": '{"files": {}}', "a list": "[]", "null": "null", "an empty object": "{}", "a text": '"files"',
    "files as a list": '{"files": []}', "100,000 brackets": "[" * 100_000, "not UTF-8": b'{"files": {"\xff": 1}}',
    "20 MB": '{"files": {' + ", ".join(f'"{i}": 1' for i in range(1_500_000)) + "}}",
    "entries that are numbers": '{"files": {"model.safetensors": 1}}',
}  # fmt: skip
MANIFESTS: dict[str, Forgery] = {
    **{f"manifest: {name}": partial(_manifest_text, text) for name, text in TEXTS.items()},
    **{
        f"manifest: without {name}{', which is still there' if keep else ''}": partial(_without, name, keep)
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
        for keep in (False, True)
    },
    **{
        f"manifest: the name {name!r}": partial(_renamed_entry, name)
        for name in (f"../../../{OUTSIDE}", "/etc/hostname", "", "a\0b", "\x1b[2Jx", "a/../../b", "a\nb")
    },
    "manifest: size of -1": partial(_changed_entry, "bytes", -1),
    "manifest: size of true": partial(_changed_entry, "bytes", True),
    "manifest: size of 10^30": partial(_changed_entry, "bytes", 10**30),
    "manifest: hash of null": partial(_changed_entry, "sha256", None),
    "manifest: hash of another file": partial(_changed_entry, "sha256", "0" * 64),
}


# -- files that are changed and sealed again --------------------------------------------------------------------------


def _resealed(change: Forgery, folder: Path) -> None:
    change(folder)
    seal(folder)


def _weights(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _first(tensors: dict[str, Any]) -> str:
    return max(tensors, key=lambda name: (tensors[name].dim(), name))


def _other_shape(tensors: dict[str, Any]) -> None:
    tensors[_first(tensors)] = tensors[_first(tensors)][:-1].clone()


def _extra(tensors: dict[str, Any]) -> None:
    tensors["intruder"] = tensors[_first(tensors)].clone()


def _state(key: str, value: Any, folder: Path) -> None:
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def _config(key: str, value: Any, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def _text_file(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)


def _pickled(name: str, folder: Path) -> None:
    """Protocol 0 is text: os.mkdir with one argument."""
    (folder / name).write_text(f"cos\nmkdir\n(S'{folder.parents[1] / MARK}'\ntR.")


def _torch_pickled(name: str, folder: Path) -> None:
    import torch

    torch.save(Bomb(folder.parents[1] / MARK), folder / name)


def _saved(name: str, value: Any, folder: Path) -> None:
    import torch

    torch.save(value, folder / name)


def _linked(name: str, folder: Path) -> None:
    elsewhere = folder.parents[1] / f"elsewhere-{name}"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)


RESEALED: dict[str, Forgery] = {
    "a weight is missing": partial(_weights, lambda tensors: tensors.pop(_first(tensors))),
    "a weight more": partial(_weights, _extra),
    "a weight of another shape": partial(_weights, _other_shape),
    "no weights at all": partial(_weights, lambda tensors: tensors.clear()),
    "weights that are a text": partial(_text_file, "model.safetensors", "weights"),
    **{f"global_step {value!r}": partial(_state, "global_step", value) for value in (-5, 3, 0, "4", 10**30, None, 4.5)},
    "max_steps 0": partial(_state, "max_steps", 0),
    "max_steps -1": partial(_state, "max_steps", -1),
    "log_history null": partial(_state, "log_history", None),
    "log_history of numbers": partial(_state, "log_history", [1, 2]),
    "a state that is a list": partial(_text_file, "trainer_state.json", "[]"),
    "a state of 100,000 brackets": partial(_text_file, "trainer_state.json", "[" * 100_000),
    "an optimizer without states": partial(_saved, "optimizer.pt", {}),
    "an optimizer that is a list": partial(_saved, "optimizer.pt", []),
    "a scheduler without state": partial(_saved, "scheduler.pt", {}),
    "generators without state": partial(_saved, "rng_state.pth", {}),
    "generators that are a number": partial(_saved, "rng_state.pth", 1),
    "an optimizer that is a text": partial(_text_file, "optimizer.pt", "optimizer"),
    "a tokenizer that is torn": partial(_text_file, "tokenizer.json", '{"version": "1.0", '),
    "a config of more layers": partial(_config, "num_hidden_layers", 5),
    "a config with auto_map": partial(_config, "auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
    "an adapter": partial(_text_file, "adapter_config.json", '{"peft_type": "LORA"}'),
    "an index of shards": partial(
        _text_file, "model.safetensors.index.json", '{"weight_map": {"lm_head.weight": "../../../outside.txt"}}'
    ),
    **{f"a pickle as {name}": partial(_pickled, name) for name in ("optimizer.pt", "training_args.bin")},
    **{
        f"a pickle of torch as {name}": partial(_torch_pickled, name)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin")
    },
    "a link as weights": partial(_linked, "model.safetensors"),
}


# -- folders ----------------------------------------------------------------------------------------------------------


def _stray(name: str, folder: Path) -> None:
    (folder / name).write_text("{}")


def _fifo(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def _renamed(folder: Path) -> None:
    folder.rename(folder.with_name("checkpoint-9"))


def _folder_link(folder: Path) -> None:
    elsewhere = folder.parents[1] / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def _of(other: Path, folder: Path) -> None:
    """Another run's checkpoint, whole and sealed, in the place of ours."""
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


FOLDERS: dict[str, Forgery] = {
    **{f"{name} that no manifest has": partial(_stray, name) for name in ("adapter_config.json", "extra.json")},
    **{f"a pipe as {name}": partial(_fifo, name) for name in (MANIFEST, "model.safetensors", "trainer_state.json")},
    "the name of a later step": _renamed,
    "a link to a folder elsewhere": _folder_link,
}


FORGERIES: dict[str, Forgery] = {
    **MANIFESTS,
    **{f"sealed again: {name}": partial(_resealed, change) for name, change in RESEALED.items()},
    **FOLDERS,
}
# Of LM's config and tokenizer.
NOT_OF_VL = ("config", "tokenizer")


def cases(work: Path, *, seed: int, quick: bool) -> Iterator[Case]:
    """Every forgery of LM's last checkpoint, some of VL's, and checkpoints of other runs."""
    lm, vl = undisturbed("lm", work), undisturbed("vl", work)
    for name in list(FORGERIES)[:: 8 if quick else 1]:
        yield Case("forged", f"lm, {name}", forged, (lm, name))
    for name in () if quick else RESEALED:
        if not any(word in name for word in NOT_OF_VL):
            yield Case("forged", f"vl, {name}", forged, (vl, f"sealed again: {name}"))
    for name in ("vl",) if quick else ("vl", "lm, other seed", "lm, ema"):
        yield Case("forged", f"lm, the checkpoint of {name}", another, (lm, undisturbed(name, work)))


def forged(folder: Path, run: Run, name: str) -> Outcome:
    checkpoint = unfinished(run, folder)
    (folder / OUTSIDE).write_text("outside")
    FORGERIES[name](checkpoint)
    said = train(run, folder, *RESUME)
    if (folder / MARK).exists():
        return Outcome(EXECUTED, "a pickle was loaded")
    if (folder / OUTSIDE).read_text() != "outside":
        return Outcome(WROTE, f"{OUTSIDE} was changed")
    return _refused_or_exact(said, folder, run)


def another(folder: Path, run: Run, other: Run) -> Outcome:
    """The checkpoint of another run, whole and sealed, in the place of ours."""
    _of(other.whole / "checkpoint-4", unfinished(run, folder))
    return _refused_or_exact(train(run, folder, *RESUME), folder, run)


def _refused_or_exact(said: Said, folder: Path, run: Run) -> Outcome:
    if (bad := ended_badly(said)) is not None:
        return bad
    if is_one_line(said):
        line = said.lines[0]
        return Outcome(SURVIVED) if "resume" in line or "checkpoint" in line else Outcome(LOST, line)
    return judge(said, folder / "run", run.whole, is_exact=False)
