"""NL-RX: a regular expression from English, in two wordings of the same request (Locascio et al. 2016).

Line i of the two test files asks for the same regex: `synth` is generated English, `turk` a crowd worker's paraphrase.
39 synth test pairs stand in train, and the published evaluators keep them; lines known from training are dropped here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.lm.views import as_example

# (original test, paraphrase test, training files): the real data set's names, and those of llm_jepa.synthetic.nl_rx
LAYOUTS = (
    ("synth_test.jsonl", "turk_test.jsonl", ("synth_train.jsonl", "turk_train.jsonl")),
    ("original_test.jsonl", "paraphrase_test.jsonl", ("train.jsonl", "validation.jsonl")),
)
WORDINGS = ("original", "paraphrase")
METRICS = ("exact", "startswith", "contains", "equivalent", "stop_rate")  # in tables


@dataclass(frozen=True)
class Item:
    """One request: the messages before the answer in both wordings, and the gold regex."""

    line: int
    original: tuple[dict[str, Any], ...]
    paraphrase: tuple[dict[str, Any], ...]
    answer: str


def load(data_dir: str | Path) -> tuple[list[Item], int, list[Path]]:
    """(clean items, number of lines dropped, files read). A line leaves *both* wordings if its regex or either of its
    texts stands in a training file. Raises UserError for a folder without the files, or files that do not line up."""
    folder = Path(data_dir)
    layout = next((layout for layout in LAYOUTS if (folder / layout[0]).is_file()), None)
    if layout is None:
        raise UserError(f"{folder} holds neither {LAYOUTS[0][0]} nor {LAYOUTS[1][0]}; point --data at an NL-RX folder.")
    files = [folder / name for name in (layout[0], layout[1], *layout[2])]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, needed to drop lines known from training.")
    original, paraphrase, *train = [read_conversations(path) for path in files]
    if len(original) != len(paraphrase):
        raise UserError(f"{files[0].name} has {len(original)} lines, {files[1].name} {len(paraphrase)}: no pairs.")
    known = {text for rows in train for messages in rows for text in (messages[-2]["content"], messages[-1]["content"])}
    items = []
    for line, (one, other) in enumerate(zip(original, paraphrase, strict=True)):
        answer = one[-1]["content"]
        if other[-1]["content"] != answer:
            raise UserError(f"Line {line + 1} of {files[0].name} and {files[1].name} ask for different regexes.")
        if not {answer, one[-2]["content"], other[-2]["content"]} & known:
            items.append(Item(line, tuple(one[:-1]), tuple(other[:-1]), answer))
    return items, len(original) - len(items), files


def read_conversations(path: Path) -> list[list[dict[str, Any]]]:
    """The messages of every row, the answer last. Raises UserError with file and line for anything else."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}.") from None
        example = as_example(row if isinstance(row, dict) else {}, where)
        if isinstance(example.prompt, str) or isinstance(example.completion, str):
            raise UserError(f"{where}: NL-RX rows are conversations; give 'messages' or lists of messages.")
        rows.append([*example.prompt, *example.completion])
    return rows
