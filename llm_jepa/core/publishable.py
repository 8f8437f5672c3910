"""What must not be in a file that is published: access tokens, paths of this machine, pickles.

Reads no weights: of safetensors the header, of GGUF the first 64 MB, of text everything.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError
from .json_files import parse_json, read_text

LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows
LARGEST_TEXT = 500_000_000
HEAD_OF_GGUF = 64 << 20
SECRETS = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|sk-(proj-|ant-)?[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}|xox[abp]-[\w-]{20,})\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# A path of some machine. Not after a letter, so not a part of a URL.
PATHS = re.compile(
    r"(?<![\w.~/:-])(/(home|Users|root|tmp|mnt|scratch|workspace|srv|opt|media|private)/[\w.@-]+)|\b[A-Z]:\\+Users\\+\w+"
    r"|file://"
)
# Vocabularies and templates hold such words by themselves: /mnt/data is in the template of gpt-oss.
WORDS = re.compile(r"(^|/)(tokenizer\.json|vocab\.(json|txt)|merges\.txt|tekken\.json|.*\.jinja|.*\.model)$")
PICTURES = (".png", ".jpg", ".jpeg", ".svg")


def check_file(path: Path, name: str, folder: Path) -> None:
    """Raises UserError if a file may not be published.

    name: in `folder`, for the message.
    """
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{name} is a link or not a file; put the file itself in its place.")
    if path.suffix == ".safetensors":
        text = json.dumps(_header(path, name), ensure_ascii=False)
    elif path.suffix == ".gguf":
        with open(path, "rb") as file:
            head = file.read(HEAD_OF_GGUF)
        if not head.startswith(b"GGUF"):
            raise UserError(f"{name} is not a GGUF file.")
        text = head.decode("utf-8", errors="replace")
    elif path.suffix in PICTURES or path.suffix == ".model":  # of sentencepiece
        text = path.read_bytes().decode("utf-8", errors="replace")
    else:
        text = _text(path, name)
    is_binary = path.suffix in (".gguf", *PICTURES)
    _check_text(text, name, _places(folder), paths=not is_binary and not WORDS.search(name))


def _header(path: Path, name: str) -> dict[str, Any]:
    """The header of a safetensors file, which must fill the file to its end. Needs no torch."""

    def refuse() -> NoReturn:
        raise UserError(f"{name} is not a whole safetensors file; save it again.")

    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
            refuse()
        head = file.read(length)
    try:
        header: dict[str, Any] = parse_json(head.decode("utf-8"), name)
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError):
        refuse()
    if not ends or max(ends) != size - 8 - length:
        refuse()
    return header


def _text(path: Path, name: str) -> str:
    text = read_text(path, largest=LARGEST_TEXT)
    if path.suffix == ".json":
        value = parse_json(text, name, (dict, list), is_finite=False)
        if isinstance(value, dict) and "chat_template" in value:
            text = json.dumps({**value, "chat_template": ""}, ensure_ascii=False, indent=1)
    return text


def _places(folder: Path) -> list[str]:
    """Paths of this machine that no file may name. `/root` alone is too short to mean one."""
    places = {str(folder.absolute()), str(folder.resolve()), str(Path.cwd()), str(Path.home())}
    return sorted(place for place in places if len(Path(place).parts) > 2)


def _check_text(text: str, name: str, places: list[str], *, paths: bool) -> None:
    if secret := SECRETS.search(text):
        raise UserError(
            f"{name}, line {_line(text, secret.start())}, holds what looks like an access token or a private key; "
            "remove it, and revoke it if anybody has seen it. Nothing was sent."
        )
    for place in places:
        if (start := text.find(place)) >= 0:
            raise UserError(f"{name}, line {_line(text, start)}, names a folder of this machine, {place}; remove it.")
    found = PATHS.search(text) if paths else None
    if found:
        raise UserError(
            f"{name}, line {_line(text, found.start())}, names a path of some machine, {found[0]}; remove it."
        )


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
