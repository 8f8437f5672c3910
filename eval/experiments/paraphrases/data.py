"""The data of all runs: NL-RX split by language, the base model, and the views of the training rows."""

from __future__ import annotations

import functools
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_from_disk

from llm_jepa import UserError, cli
from llm_jepa.core.files import file_sha256, write_json, write_json_lines
from llm_jepa.core.json_files import read_json
from llm_jepa.core.publish import published
from llm_jepa.lm import add_view_columns, tokenizer_from, train_tokenizer
from llm_jepa.synthetic import nl_rx as generator

from ...graders.regexes import language
from ...tasks import nl_rx
from . import PLAN

RECIPE = PLAN.with_name("paraphrase-base.yaml")
FILES = ("synth_train.jsonl", "turk_train.jsonl", "synth_test.jsonl", "turk_test.jsonl")

REWRITE = "Say the same in other words."
WORDINGS = ("synth", "turk")
ROWS_PER_LINE = 4
# The kind of a training row, as an offset among the four rows of its line (see `rows_of`).
SYNTH_TO_REGEX, TURK_TO_REGEX, SYNTH_TO_TURK, TURK_TO_SYNTH = range(ROWS_PER_LINE)


@dataclass(frozen=True)
class Line:
    """A request in two wordings, its regex, and the part of the data to which all regexes of its language belong."""

    synth: str
    turk: str
    regex: str
    part: str  # "train", "validation" or "test"

    def in_wording(self, wording: str) -> str:
        return self.synth if wording == "synth" else self.turk


class Prepared(NamedTuple):
    lines: list[Line]
    views: Dataset  # of the training rows: ROWS_PER_LINE for each training line, in the order of the lines
    data_sha256: dict[str, str]  # file name -> hash

    def part(self, name: str) -> list[Line]:
        return [line for line in self.lines if line.part == name]


def split_lines(data: Path) -> list[Line]:
    """Split all 10,000 pairs by the *language* of the regex: 70 % train, 10 % validation, 20 % test.

    Languages that match nothing or everything go to train, because a constant answer would score 15.6 % on the
    published test file. A line leaves validation and test if one of its texts also occurs in train.

    Raises UserError for a folder without the four files, or for files that do not line up.
    """
    parts: dict[str, str] = {}
    lines = []
    for number, (synth, turk) in enumerate(_read_pairs(data), 1):
        regex = synth[-1]["content"]
        if turk[-1]["content"] != regex:
            raise UserError(f"Pair {number} of {data} asks for two regexes; synth and turk files must line up.")
        if regex not in parts:
            parts[regex] = part_of(regex)
        lines.append(Line(synth[-2]["content"], turk[-2]["content"], regex, parts[regex]))
    known: set[str] = set()
    for line in lines:
        if line.part == "train":
            known |= {line.synth, line.turk}
    return [line for line in lines if line.part == "train" or not {line.synth, line.turk} & known]


def _read_pairs(data: Path) -> list[tuple[list[dict[str, str]], list[dict[str, str]]]]:
    """(synth messages, turk messages) of the training files, then of the test files."""
    missing = [name for name in FILES if not (data / name).is_file()]
    if missing:
        raise UserError(f"{data} lacks {', '.join(missing)}; point --data at the NL-RX folder.")
    conversations = {name: nl_rx.read_conversations(data / name) for name in FILES}
    pairs: list[tuple[list[dict[str, str]], list[dict[str, str]]]] = []
    for synth, turk in (FILES[:2], FILES[2:]):
        if len(conversations[synth]) != len(conversations[turk]):
            raise UserError(
                f"{synth} has {len(conversations[synth])} lines and {turk} {len(conversations[turk])}; line i of both "
                "must ask for the same regex."
            )
        pairs += zip(conversations[synth], conversations[turk], strict=True)
    return pairs


def part_of(regex: str) -> str:
    """The part of the data for a regex: decided by its language alone, so all spellings go to the same part."""
    meaning = language(regex)
    if meaning.is_empty or meaning.is_everything:
        return "train"
    tenth = int(meaning.key[:12], 16) % 10
    if tenth < 7:
        return "train"
    return "validation" if tenth == 7 else "test"


def messages(system: str, text: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def prompts_of(lines: Sequence[Line], wording: str) -> list[list[dict[str, str]]]:
    """The chat that asks for the regex of each line, in one wording."""
    return [messages(generator.SYSTEM_PROMPT, line.in_wording(wording)) for line in lines]


def rows_of(line: Line) -> list[dict[str, Any]]:
    """The four training rows of a line, in the order SYNTH_TO_REGEX, TURK_TO_REGEX, SYNTH_TO_TURK, TURK_TO_SYNTH."""
    ask = generator.SYSTEM_PROMPT
    return [
        {"messages": messages(ask, line.synth, line.regex)},
        {"messages": messages(ask, line.turk, line.regex)},
        {"messages": messages(REWRITE, line.synth, line.turk)},
        {"messages": messages(REWRITE, line.turk, line.synth)},
    ]


def base_rows(num_regexes: int) -> list[dict[str, Any]]:
    """Generated training rows of the base, in wordings that differ from NL-RX's.

    Half of the rows ask for the regex, half for the same request in other words.
    """
    wordings = generator.TRAIN_WORDINGS
    requests = {wording: generator.generate(num_regexes, wordings=(wording,)) for wording in wordings}
    rng = random.Random("base rows")
    rows = []
    for i in range(num_regexes):
        first, second = (requests[wording][i] for wording in rng.sample(wordings, 2))
        rows.append(first)
        texts = (first["messages"][1]["content"], second["messages"][1]["content"])
        rows.append({"messages": messages(REWRITE, *texts)})
    rng.shuffle(rows)
    return rows


def prepare(data: Path, work: Path, plan: dict[str, Any]) -> None:
    """Make what all runs share: the split, the base model, and the views of all training rows."""
    work.mkdir(parents=True, exist_ok=True)
    lines = split_lines(data)
    counts = Counter(line.part for line in lines)
    print(f"lines: { {part: counts[part] for part in ('train', 'validation', 'test')} }")
    rows = base_rows(plan["base_regexes"])
    write_json_lines(work / "base.jsonl", rows)
    # The tokenizer may see the text of the training lines, but not their labels. Its regexes are generated ones.
    texts = [{"prompt": line.synth, "completion": line.turk} for line in lines if line.part == "train"]
    tokenizer = train_tokenizer([*rows, *texts], plan["vocabulary"])
    with published(work / "tokenizer") as staged:
        tokenizer.save_pretrained(staged)
    overrides = ["--train_data", str(work / "base.jsonl"), "--tokenizer_name_or_path", str(work / "tokenizer")]
    overrides += ["--output_dir", str(work / "base")]
    if not sys.stderr.isatty():
        overrides += ["--disable_tqdm", "true"]
    if (work / "base").exists():  # continue it, or find it finished; the folder of another run is refused
        overrides += ["--resume_from_checkpoint", "true"]
    if cli.main(["train", str(RECIPE), *overrides]):
        raise UserError("The base model could not be trained; see above.")
    save_prepared(work, data, lines)


def save_prepared(work: Path, data: Path, lines: Sequence[Line]) -> None:
    """Save the split, and the views of all training rows: four a line, in the order of `rows_of`."""
    tokenizer = tokenizer_from(str(work / "base"))
    rows: list[dict[str, Any]] = []
    for line in lines:
        if line.part == "train":
            rows += rows_of(line)
    views = Dataset.from_list([add_view_columns(row, i, tokenizer=tokenizer) for i, row in enumerate(rows)])
    shutil.rmtree(work / "views", ignore_errors=True)
    with published(work / "views") as staged:
        views.save_to_disk(staged)
    hashes = {name: file_sha256(data / name) for name in FILES}
    write_json(work / "split.json", {"data_sha256": hashes, "lines": [asdict(line) for line in lines]})


@functools.cache
def prepared(work: Path) -> Prepared:
    """Load what `prepare` saved, once per process. Raises UserError if it has not run."""
    if not (work / "split.json").is_file():
        raise UserError(
            f"{work} is not prepared; run python -m eval.experiments.paraphrases prepare --data FOLDER first."
        )
    split = read_json(work / "split.json", is_finite=False)
    lines = [Line(**line) for line in split["lines"]]
    return Prepared(lines, load_from_disk(work / "views"), split["data_sha256"])


def languages_of_test_lines(work: Path) -> dict[str, list[Any]]:
    """For each test line, in the order of the result files' bits: its language, and whether the base has seen it.

    The base has seen a language if one of its training rows holds a regex of that language.
    """
    known = set()
    for row in (work / "base.jsonl").read_text().splitlines():
        system, *_, answer = json.loads(row)["messages"]
        if system["content"] == generator.SYSTEM_PROMPT:
            known.add(language(answer["content"]).key)
    keys = [language(line.regex).key for line in prepared(work).part("test")]
    return {"language": [key[:12] for key in keys], "in_base": [key in known for key in keys]}
