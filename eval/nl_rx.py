"""NL-RX: a regular expression from English, in two wordings of the same request (Locascio et al. 2016).

Line i of the two test files asks for the same regex: `synth` is generated English, `turk` a crowd worker's paraphrase.
Trap of the published evaluator (galilai-group/llm-jepa, evaluate.py): 39 synth test pairs stand in train, and exact
match mixes what is written with where it stops. So lines known from training are dropped, and exact, startswith,
contains and stop rate are reported side by side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jepa import UserError
from llm_jepa.generation import Generation

# (original test, paraphrase test, training files): the real data set's names, and those of llm_jepa.data.nl_rx
LAYOUTS = (
    ("synth_test.jsonl", "turk_test.jsonl", ("synth_train.jsonl", "turk_train.jsonl")),
    ("original_test.jsonl", "paraphrase_test.jsonl", ("train.jsonl", "validation.jsonl")),
)
WORDINGS = ("original", "paraphrase")
METRICS = ("exact", "startswith", "contains", "stop_rate")
# Published, for orientation only: another model, other splits, exact match on all 2,000 lines.
PUBLISHED = "LLM-JEPA (arXiv:2509.14252, table 12), Llama-3.2-1B on synth: SFT 57.29 +- 5.32, LLM-JEPA 71.46 +- 1.34"


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
    original, paraphrase, *train = [_rows(path) for path in files]
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


def score(answers: Sequence[str], generations: Sequence[Generation]) -> dict[str, float]:
    """Shares in 0..1. `startswith` and `contains` forgive what follows the gold string, `exact` does not."""
    pairs = list(zip(answers, generations, strict=True))
    if not pairs:
        raise UserError("No item is left to score; every line stands in train.")
    hits = {
        "exact": [g.text == a for a, g in pairs],
        "startswith": [g.text.startswith(a) for a, g in pairs],
        "contains": [a in g.text for a, g in pairs],
        "stop_rate": [g.stopped for _, g in pairs],
    }
    return {name: sum(values) / len(pairs) for name, values in hits.items()}


def _rows(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines() if line.strip()]
