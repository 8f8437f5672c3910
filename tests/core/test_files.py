"""Hashes of files and folders, worked out by hand, and texts that are written whole."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jepa.core.files import (
    append,
    content_sha256,
    file_sha256,
    text_key,
    write_json,
    write_json_lines,
    write_whole,
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_of(files: dict[str, bytes]) -> str:
    """The content hash of a folder with these files, by hand: a line of name and hash for each, in order."""
    return sha256("".join(f"{name} {sha256(files[name])}\n" for name in sorted(files)).encode())


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_file_is_hashed_by_its_bytes(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\r\n\xff")
    assert file_sha256(path) == content_sha256(str(path)) == sha256(b"\r\n\xff")
    assert text_key("a") == int(sha256(b"a")[:16], 16) >> 1


def test_a_folder_is_hashed_by_the_files_that_say_what_is_computed(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "target_tokenizer/tokenizer.json": b"[]"}
    folder = write(tmp_path, files | {"README.md": b"not computed with"})
    assert content_sha256(str(folder)) == hash_of(files)
    del files["model.safetensors"]
    assert content_sha256(str(folder), has_weights=False) == hash_of(files)


def test_nothing_to_hash_has_no_hash(tmp_path):
    write(tmp_path, {"README.md": b"x"})
    assert content_sha256(str(tmp_path)) is None
    assert content_sha256(str(tmp_path / "missing")) is None


INDEX = json.dumps({"weight_map": {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}).encode()


def test_sharded_weights_are_those_that_the_index_names(tmp_path):
    """Each once; not a file of weights beside them, which nothing would load."""
    shards = {"one.safetensors": b"1", "two.safetensors": b"2"}
    folder = write(tmp_path, {"config.json": b"{}", "model.safetensors.index.json": INDEX, **shards})
    expected = content_sha256(str(folder))
    assert expected == hash_of({"config.json": b"{}", **shards})
    write(folder, {"model.safetensors": b"left by another save"})
    assert content_sha256(str(folder)) == expected
    write(folder, {"two.safetensors": b"3"})
    assert content_sha256(str(folder)) != expected


@pytest.mark.parametrize("index", [b"[]", b"{}", b"not JSON", b'{"weight_map": 3}', b'{"weight_map": {"a": []}}'])
def test_a_broken_index_counts_as_none(index, tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    assert content_sha256(str(write(tmp_path, {**files, "model.safetensors.index.json": index}))) == hash_of(files)


def cache(folder: Path, commits: dict[str, dict[str, bytes]], monkeypatch) -> None:
    """A cache of the Hub with a repository some/model: its files are links to blobs, named by their hash."""
    repository = folder / "models--some--model"
    write(repository, {"refs/main": next(iter(commits)).encode()})
    for commit, files in commits.items():
        for name, data in files.items():
            write(repository, {f"blobs/{sha256(data)}": data, f"snapshots/{commit}/.keep": b""})
            (repository / "snapshots" / commit / name).symlink_to(repository / "blobs" / sha256(data))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))


def test_a_repository_is_hashed_as_its_revision_says(tmp_path, monkeypatch):
    new, old = ({"config.json": b"{}", "model.safetensors": data} for data in (b"new", b"old"))
    cache(tmp_path, {"c" * 40: new, "d" * 40: old}, monkeypatch)
    assert content_sha256("some/model") == content_sha256("some/model", "main") == hash_of(new)
    assert content_sha256("some/model", "d" * 40) == hash_of(old) != hash_of(new)
    assert content_sha256("some/model", "e" * 40) is None
    assert content_sha256("some/model/of/no/name") is None, "the Hub has no such names"


def test_a_repository_without_a_shard_has_no_hash(tmp_path, monkeypatch):
    files = {"config.json": b"{}", "model.safetensors.index.json": INDEX, "one.safetensors": b"1"}
    cache(tmp_path, {"c" * 40: files}, monkeypatch)
    assert content_sha256("some/model") is None
    assert content_sha256("some/model", has_weights=False) == hash_of({"config.json": b"{}"})


def test_only_a_link_to_a_blob_is_not_read(tmp_path):
    """The cache names large files by their hash, 64 hex digits. Other names prove nothing."""
    name = sha256(b"other")
    real = tmp_path / name
    real.write_bytes(b"weights")
    folders = [tmp_path / number for number in "abc"]
    for folder in folders:
        write(folder, {"config.json": b"{}"})
    (folders[0] / "model.safetensors").symlink_to(real)
    lines = f"config.json {sha256(b'{}')}\nmodel.safetensors {name}\n"
    assert content_sha256(str(folders[0])) == sha256(lines.encode()), "the name of the blob is its hash"
    for folder, other in zip(folders[1:], (name.upper(), name + "0"), strict=True):
        (tmp_path / other).write_bytes(b"weights")
        (folder / "model.safetensors").symlink_to(tmp_path / other)
        assert content_sha256(str(folder)) == hash_of({"config.json": b"{}", "model.safetensors": b"weights"})


SPEAK_LATIN = "import sys; from llm_jepa.core.files import write_whole; write_whole(sys.argv[1], '\\xe9\\n')"


def test_texts_are_utf8_with_unix_line_ends_wherever_they_are_written(tmp_path):
    """Also where Python's own encoding is ASCII."""
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", SPEAK_LATIN, str(tmp_path / "a")], env=environ, check=True)
    assert (tmp_path / "a").read_bytes() == "é\n".encode()
    write_json_lines(tmp_path / "b", [{"é": 1}, [2]])
    append(tmp_path / "b", "é\n")
    assert (tmp_path / "b").read_bytes() == b'{"\\u00e9": 1}\n[2]\n' + "é\n".encode()
    write_whole(tmp_path / "b", "over")
    assert (tmp_path / "b").read_bytes() == b"over" and sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_appending_follows_no_link_and_makes_no_file(tmp_path):
    (tmp_path / "target").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("link", "missing"):
        with pytest.raises(OSError):
            append(tmp_path / name, "y")
    assert (tmp_path / "target").read_text() == "x" and not (tmp_path / "missing").exists()


def test_json_is_written_to_be_read_and_compared_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"b": {"d": 1, "c": "é"}, "a": [2]})
    assert path.read_bytes() == b'{\n "a": [\n  2\n ],\n "b": {\n  "c": "\\u00e9",\n  "d": 1\n }\n}\n'
