"""Writing files whole, and hashes of files and texts."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .json_files import read_json


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Of a folder of a model or tokenizer, the files besides weights that say what is computed: those that transformers
# looks for (its vocabularies have many names), and those of sentence-transformers.
MODEL_FILES = (
    "added_tokens.json", "bpe.codes", "chat_template.json", "chat_template.jinja", "config.json", "dict.txt",
    "generation_config.json", "merges.txt", "modules.json", "normalizer.json", "preprocessor_config.json",
    "processor_config.json", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "special_tokens_map.json",
    "spiece.model", "spm.model", "target.spm", "tekken.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
# A processor of two tokenizers has a folder for the second one.
MODEL_PATTERNS = ("additional_chat_templates/*.jinja", "*_Pooling/config.json", "target_tokenizer/*.*")
WEIGHTS = "model.safetensors"


def content_sha256(source: str, revision: str | None = None, *, has_weights: bool = True) -> str | None:
    """A hash of a file, or of the weights, config and tokenizer in a folder or in the local cache of the Hub.

    It does not depend on the place, so that a folder can be moved. None if there is nothing to hash: no such folder,
    or a Hub repository that has not been downloaded yet.

    has_weights: False to leave them out, for a tokenizer.
    """
    path = Path(source)
    if path.is_file():
        return file_sha256(path)
    folder = path if path.is_dir() else _snapshot(source, revision)
    if folder is None:
        return None
    names = {name for name in MODEL_FILES if (folder / name).is_file()}
    for pattern in MODEL_PATTERNS:
        names |= {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
    weights = _weight_files(folder) if has_weights else []
    if has_weights and not path.is_dir() and not all((folder / name).is_file() for name in weights):
        return None  # of the repository only a part has been downloaded
    names.update(weights)
    hashes = [f"{name} {_blob_sha256(folder / name)}\n" for name in sorted(names) if (folder / name).is_file()]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None


def _weight_files(folder: Path) -> list[str]:
    try:
        index = read_json(folder / f"{WEIGHTS}.index.json", {"weight_map": {str: str}})
        return sorted(set(index["weight_map"].values()))
    except (OSError, ValueError):  # not sharded; loading it names what is wrong
        return [WEIGHTS]


def _snapshot(repository: str, revision: str | None) -> Path | None:
    """The folder of the local cache that holds a revision of a Hub repository."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(repository, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None


def _blob_sha256(path: Path) -> str:
    """The cache of the Hub names large files by their SHA-256, so these need not be read."""
    name = os.path.basename(os.path.realpath(path))
    return name if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name) else file_sha256(path)


def text_key(text: str) -> int:
    """63 bits of SHA-256: equal for equal texts on every rank and machine, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


STAGE = ".stage-"  # how the names of stages begin


def make_stage(folder: str | Path) -> Path:
    """A new folder in `folder`, for files that are not finished. Nobody else can have prepared links in it.

    Its name is random and nobody but this user may enter it. It is on the file system of `folder`, so that its files
    can be renamed into `folder`. Remove it with `shutil.rmtree`; a killed process leaves it to
    `publish.remove_leftovers`.
    """
    return Path(tempfile.mkdtemp(prefix=STAGE, dir=folder))


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to. It replaces `path` when the block ends, and is removed if the block fails.

    A reader sees the old file or the new one, never half of it. The name stays, because some writers choose the format
    by its suffix. If `path` is a link, the link is replaced and not followed.
    """
    path = Path(path)
    try:
        stage = make_stage(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # the stage's name says nothing to a user
    try:
        yield stage / path.name
        os.replace(stage / path.name, path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON with sorted keys, whole and flushed to disk. Makes the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> None:
    """Write a line of JSON for each row, whole and flushed to disk."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_whole(path: str | Path, text: str) -> None:
    """Write a text as UTF-8 with Unix line ends, whole and flushed to disk."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        flush(temporary)


def append(path: str | Path, text: str) -> None:
    """Append a text to a file that exists, flushed to disk. Raises OSError for a link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0))
    with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
