"""NL-RX: a regular expression from English, in two wordings of the same request (Locascio et al. 2016).

Line i of the two test files asks for the same regex: `synth` is generated English, `turk` a crowd worker's paraphrase.
39 synth test pairs are also in train, and the published evaluators keep them. Here, lines known from training are
dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.core.files import file_sha256
from llm_jepa.core.row_files import json_rows
from llm_jepa.lm import parse_row

from .. import graders
from ..graders import Grade
from ..graders.regexes import RegexError, language
from .questions import LLM_JEPA, Data, Group, Task, left_out

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
    """(items, number of lines dropped, files read).

    A line is dropped in *both* wordings if a training file has its regex or one of its two texts. Raises UserError for
    a folder without the files, or for files whose lines do not belong together.
    """
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
        raise UserError(
            f"{files[0].name} has {len(original)} lines and {files[1].name} {len(paraphrase)}; line i of both "
            "must ask for the same regex."
        )
    known: set[str] = set()
    for rows in train:
        for messages in rows:
            known |= {messages[-2]["content"], messages[-1]["content"]}
    items = []
    for line, (one, other) in enumerate(zip(original, paraphrase, strict=True)):
        answer = one[-1]["content"]
        if other[-1]["content"] != answer:
            raise UserError(f"Line {line + 1} of {files[0].name} and {files[1].name} ask for different regexes.")
        if not {answer, one[-2]["content"], other[-2]["content"]} & known:
            items.append(Item(line, tuple(one[:-1]), tuple(other[:-1]), answer))
    return items, len(original) - len(items), files


def read_conversations(path: Path) -> list[list[dict[str, Any]]]:
    """The messages of every row, with the answer last. Raises UserError, with file and line, for any other row."""
    rows = []
    for where, row in json_rows(path):
        example = parse_row(row, where)
        if isinstance(example.prompt, str) or isinstance(example.completion, str):
            raise UserError(f"{where}: NL-RX rows are conversations; give 'messages' or lists of messages.")
        rows.append([*example.prompt, *example.completion])
    return rows


def load_task(data_dir: str) -> Data:
    """Two wordings a group. `extra`: line, and degenerate (the gold regex matches no line, or every line)."""
    items, dropped, files = load(data_dir)
    if not items:
        raise UserError("No item is left to score: every line is also in train. Use the test files of another split.")
    groups, faults = [], []
    for item in items:
        try:
            gold = language(graders.gold_regex(item.answer))
            degenerate = gold.is_empty or gold.is_everything
        except RegexError as error:
            if error.status == "invalid":
                faults.append(f"{files[0].name}, line {item.line + 1}: the gold is not a regex: {error}")
                continue
            degenerate = False  # too large to decide; a degenerate language has one state
        prompts = (list(item.original), list(item.paraphrase))
        extra = {"line": item.line, "degenerate": degenerate}
        groups.append(Group(str(item.line), prompts, WORDINGS, item.answer, extra))
    hashes = {path.name: file_sha256(path) for path in files}
    return Data(tuple(groups), hashes, dropped, left_out(faults, len(items)))


def _grade(group: Group, text: str, stopped: bool) -> Grade:
    return graders.regex(group.answer, text, stopped, degenerate=group.extra["degenerate"])


TASK = Task(
    "nl_rx",
    load_task,
    _grade,
    metric="equivalent",
    max_new_tokens=64,
    published=f"{LLM_JEPA}, tables 12 and 13), Llama-3.2-1B, exact match on all 2,000 lines: "
    "synth 57.29 +- 5.32 (SFT), 71.46 +- 1.34; turk 22.49 +- 1.91 (SFT), 30.94 +- 1.13",
    trap="39 synth test pairs are also in train; exact match calls equal languages different, and depends on where an "
    "answer stops. The evaluator of NL-RX's authors compares automata, but reads \\b as the letter b",
)
