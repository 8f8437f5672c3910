"""What fuzzing begins with: for each target a file of JSON lines, and words that its inputs are made of."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

FOLDER = Path(__file__).with_name("corpus")
OF_JSON = ("{", "}", "[", "]", '"', ":", ",", "null", "true", "1e999", "NaN", "-1", "\\ud800", '{"a":1,"a":2}', "\n")
WORDS: dict[str, Sequence[str]] = {
    "recipe": (
        "family: ", "lm", "vl", "extends: ", "train_data: ", "output_dir: ", "learning_rate: ", "max_steps: ",
        "model_path: ", "lora_r: ", "lora_target_modules: ", "optim_args: ", "lr_scheduler_kwargs: ",
        "lr_scheduler_type: ", "objective: ", "model_config: ", "report_to: ", "seed: ", "fsdp: ",
        "deepspeed: ", "warmup_steps: ", "stop_after: ", ".nan", "1e300", "-1", "null", "[", "]", "{", "}", "? ", "- ",
        "&a", "*a", "!!python/name:os", "<<: ", "\n", "'",
    ),
    "json": (*OF_JSON, "\ufeff", "\r\n", "[{", "}]"),
    "manifest": (*OF_JSON, '"files"', '"bytes"', '"sha256"', '"run"', '"model.safetensors"', '"../x"', "0", "1" * 30),
    "clips": (*OF_JSON, '"video"', '"image"', '"target"', '"query"', '"start_s"', '"end_s"', '"0.png"', "1e300"),
    "views": (
        *OF_JSON, '"prompt"', '"completion"', '"messages"', '"role"', '"content"', '"user"', '"assistant"', '"system"',
        '"views"', '"contexts"', '"targets"', '"target_key"', '"tools"', '"chat_template_kwargs"', "<|im_end|>",
        "<|predictor_1|>", "\\u0000",
    ),
    "regex": (
        "(", ")", "[", "]", "^", "-", "{2}", "{,3}", "{2,}", "|", "&", "~", "*", "+", "?", ".", "\\b", "\\d", "\n",
    ),
    "sql": (
        "SELECT ", " FROM ", "singer", " WHERE ", " ORDER BY ", " GROUP BY ", "name", "age", "id", "count(*)", " JOIN ",
        " UNION ", " LIMIT ", "PRAGMA ", "ATTACH ", "WITH RECURSIVE t(n) AS (", "randomblob(", "'", '"', "--", "/*",
        ";", " OVER (", "printf(", "json_each(", "load_extension(", "writefile(", "x'00'", "1e999", "zeroblob(",
    ),
}  # fmt: skip


def read(name: str) -> list[bytes]:
    """The inputs that a target begins with."""
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [bytes.fromhex(entry["hex"]) if "hex" in entry else entry["text"].encode() for entry in entries]


def write(name: str, inputs: Iterable[bytes]) -> None:
    """Keep these inputs, the short ones first; bytes that are not a text are kept as hexadecimal digits."""
    lines = []
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        try:
            entry = {"text": data.decode()}
        except UnicodeDecodeError:
            entry = {"hex": data.hex()}
        lines.append(json.dumps(entry) + "\n")
    (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def mutations(name: str, count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Inputs that differ from those of the corpus in one to four places."""
    inputs, words, rng = read(name), [word.encode() for word in WORDS[name]], random.Random(seed)
    for _ in range(count):
        data = rng.choice(inputs)
        for _ in range(rng.randint(1, 4)):
            data = _mutated(data, rng, words, rng.choice(inputs))
        yield data


def _mutated(data: bytes, rng: random.Random, words: Sequence[bytes], other: bytes) -> bytes:
    start, end = sorted(rng.randint(0, len(data)) for _ in range(2))
    cut = slice(*sorted(rng.randint(0, len(other)) for _ in range(2)))
    middle = data[start:end]
    new = rng.choice([rng.choice(words), rng.randbytes(1), b"", middle * rng.choice([2, 50]), other[cut], middle[::-1]])
    return data[:start] + new + data[rng.choice([start, end]) :]
