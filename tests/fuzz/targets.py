"""What is fuzzed. A target takes any bytes and raises if the package does other than answer rightly or raise UserError.

Each target also compares: with Python's own reader, with the opposite direction, or with what must be true of every
answer. Otherwise a fuzzer would find only what crashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.graders import same_language
from eval.graders.regexes import RegexError, equivalent, expressions, language, matches
from eval.graders.sql import STATUSES, Databases, is_ordered
from llm_jepa.core.checkpoint import fault, fault_of_model
from llm_jepa.core.checks import check_library_options
from llm_jepa.core.errors import UserError
from llm_jepa.core.json_files import parse_json, read_json
from llm_jepa.core.publish import MANIFEST, damage_of, read_manifest, seal
from llm_jepa.core.row_files import rows_of_file
from llm_jepa.core.strict_yaml import dump_yaml
from llm_jepa.families import parse_recipe
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.lm.views import IGNORE, build_views
from llm_jepa.vl.data import read_clips

Target = Callable[[bytes], None]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def recipe(folder: Path) -> Target:
    """A recipe. One that is accepted is accepted again, with equal values, as it is written into a run."""
    path = folder / "recipe.yaml"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            parsed = parse_recipe(path)
            check_library_options(parsed.training)
            path.write_text(dump_yaml({"family": parsed.family, **parsed.given}), encoding="utf-8")
            again = parse_recipe(path)
            assert repr(again.given) == repr(parsed.given), (again.given, parsed.given)

    return run


def json_text(folder: Path) -> Target:
    """A JSON file, as a value and as rows: what is read is what Python reads."""
    path = folder / "value.json"
    tables = {suffix: folder / f"rows{suffix}" for suffix in (".json", ".jsonl", ".csv")}

    def run(data: bytes) -> None:
        path.write_bytes(data)
        value: Any = None
        with contextlib.suppress(UserError):
            value = read_json(path, (dict, list, str, int, float, bool, type(None)))
            assert same(value, json.loads(data))
            assert same(parse_json(json.dumps(value), "again", type(value)), value)
        for suffix, table in tables.items():
            table.write_bytes(data)
            rows = None
            with contextlib.suppress(UserError):
                rows = [row for _, row in rows_of_file(table)]
            if suffix == ".json" and isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
                assert rows is not None and same(rows, value), (rows, value)
            if suffix == ".csv" and rows is not None:
                assert all(cell is None or isinstance(cell, str) for row in rows for cell in row.values())

    return run


def manifest(folder: Path) -> Target:
    """The manifest of a checkpoint. It is believed only if it lists every file as it is."""
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "README.md"):
        (checkpoint / name).write_text(name)
    state = {"global_step": 1, "max_steps": 1, "log_history": []}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    seal(checkpoint)
    files = read_manifest(checkpoint)
    assert files is not None and fault(checkpoint, num_processes=1) is None

    def run(data: bytes) -> None:
        (checkpoint / MANIFEST).write_bytes(data)
        reasons = [fault(checkpoint, num_processes=1), fault(checkpoint, run={"run": "other", "fp16": True})]
        listed = read_manifest(checkpoint)
        if reasons[0] is None:
            assert listed == files, "a manifest that lists other files is believed"
        if fault_of_model(checkpoint) is None or damage_of(checkpoint) is None:
            assert listed is not None and listed.keys() <= files.keys()
            assert all(listed[name] == files[name] for name in listed if name != "README.md")

    return run


def clips(folder: Path) -> Target:
    """The manifest of clips of VL-JEPA."""
    path = folder / "clips.jsonl"
    for name in ("0.png", "a.mp4"):
        (folder / name).touch()

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            for clip in read_clips(path):
                assert Path(clip.video).is_file()
                assert clip.end_s is None or 0 <= (clip.start_s or 0) < clip.end_s
                assert clip.pairs and all(pair.target.strip() for pair in clip.pairs)
                json.dumps([clip.video, *clip.pairs], ensure_ascii=False).encode()

    return run


def views(folder: Path) -> Target:
    """A row of a language model, in JSON after a byte that chooses the options."""
    tokenizer = train_tokenizer([{"prompt": "name the number", "completion": "it is 42"}], 280)
    tokenizer.chat_template = CHATML

    def run(data: bytes) -> None:
        number = data[0] if data else 0
        context_view, protocol = ("prefix", "message")[number & 1], ("completion", "paper")[number >> 1 & 1]
        max_length = (None, 16, 64, 1)[number >> 2 & 3]
        with contextlib.suppress(UserError, UnicodeDecodeError):
            row = parse_json(data[1:].decode(), "the row")
            built = build_views(
                row, tokenizer, context_view=context_view, label_protocol=protocol, max_length=max_length
            )
            length = len(built.input_ids)
            assert 0 < length <= (max_length or length) and len(built.labels) == length
            trained = [(at, label) for at, label in enumerate(built.labels) if label != IGNORE]
            assert trained and all(built.input_ids[at] == label for at, label in trained)
            assert 0 <= built.context_start <= built.context_end <= built.target_start <= built.target_end <= length
            for texts, keys in ((built.contexts, built.context_text_keys), (built.targets, built.target_text_keys)):
                assert len(texts) == len(keys) and all(0 < len(view) <= (max_length or 10**9) for view in texts)
            assert len(built.contexts) * len(built.targets) <= 1024

    return run


def regex(folder: Path) -> Target:
    """Two regexes, a line each: equal languages have one key, and others a line that one of them matches.

    The bound on the work is a fiftieth of the usual one, or a single input could take ten seconds.
    """
    expressions.MAX_WORK //= 50

    def run(data: bytes) -> None:
        gold, _, text = data.decode(errors="surrogateescape").partition("\n")
        gold, text = gold.strip(" "), text.strip()
        right, key = same_language(gold, text)
        if gold == text:
            assert right
        verdict, opposite = equivalent(gold, text), equivalent(text, gold)
        if "limit" not in (verdict.status, opposite.status):
            assert verdict.status == opposite.status
            assert right == same_language(text, gold)[0] == (gold == text or verdict.status == "equal")
        if verdict.status == "equal":
            with contextlib.suppress(RegexError):  # an automaton may be too large, though the two are quickly compared
                assert language(gold).key == language(text).key
        if verdict.status == "different":
            line = verdict.counterexample
            assert line is not None and matches(gold, line) != matches(text, line), (verdict, key)

    return run


def sql(folder: Path) -> Target:
    """An answer in SQL. The database stays as it is; what runs is equal to itself."""
    path = folder / "shop" / "shop.sqlite"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age REAL);")
        connection.executemany("INSERT INTO singer VALUES (?, ?, ?)", [(i, f"n{i}", i / 3) for i in range(10)])
        connection.commit()
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    databases = Databases(folder, seconds=0.5, max_rows=1000, max_bytes=10**5)

    def run(data: bytes) -> None:
        text = data.decode(errors="surrogateescape")
        result = databases.run("shop", text)
        assert result.status in STATUSES and result.detail.isprintable()
        assert all(len(row) == result.columns for row in result.rows)
        assert isinstance(is_ordered(text), bool)
        if result.status == "ok":
            assert databases.grade("shop", text, text).correct
        assert hashlib.sha256(path.read_bytes()).hexdigest() == before
        assert [each.name for each in path.parent.iterdir()] == [path.name]

    return run


def same(value: Any, other: Any) -> bool:
    """Equal in type, too: 1 is not 1.0, nor True."""
    return repr(value) == repr(other)


MAKE: dict[str, Callable[[Path], Target]] = {
    "recipe": recipe, "json": json_text, "manifest": manifest, "clips": clips, "views": views, "regex": regex,
    "sql": sql,
}  # fmt: skip


def make(name: str, folder: Path) -> Target:
    """The target of that name, which writes into the folder."""
    return MAKE[name](folder)
