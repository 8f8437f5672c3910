"""Render docs/results/, README.md's table of the families and the model cards:  python -m eval.report [--check]

Every number comes from the committed files in eval/results/. --check changes nothing, and exits 1 if a rendered file is
stale. So no number in them can be typed by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llm_jepa import UserError
from llm_jepa.core.files import write_whole
from llm_jepa.shipped import CHECKPOINTS

from .command import ArgumentParser, one_line_errors, require
from .pages import cost, experiments, nl_rx, pretrained, reliability, vl
from .pages.cards import cards
from .pages.families import families_table
from .pages.memory import memory_tables

ROOT = Path(__file__).parent.parent
README, PAGES, CARDS = ROOT / "README.md", ROOT / "docs" / "results", ROOT / "model_cards"
BEGIN, END = "<!-- results: {} -->", "<!-- end of results -->"


def rendered_blocks() -> dict[Path, dict[str, str]]:
    """File -> block name -> the Markdown that belongs between the block's markers."""
    return {
        README: {"families": families_table()},
        PAGES / "nl_rx.md": {"tiny_nl_rx": nl_rx.table(nl_rx.load())},
        PAGES / "paraphrases.md": {"paraphrases": experiments.paraphrase_tables()},
        PAGES / "pretrained.md": {
            "pretrained_published": pretrained.published(),
            "pretrained_completion": pretrained.completion(),
            "pretrained_two_jobs": pretrained.both_jobs(),
        },
        PAGES / "replication.md": {"replication": experiments.replication_tables()},
        PAGES / "step_cost.md": {"step_cost": cost.step_table()},
        PAGES / "vl.md": {"vl": vl.vl_tables()},
        PAGES / "reliability.md": {"reliability": reliability.scorecard()},
        PAGES / "throughput.md": {"throughput": cost.throughput_line()},
        ROOT / "docs" / "scaling.md": {"memory": memory_tables()},
    }


def with_blocks(text: str, blocks: dict[str, str], source: str) -> str:
    """The text with every block between its markers replaced. Raises UserError if a marker is missing or repeated."""
    for name, rendered in blocks.items():
        begin = BEGIN.format(name)
        before, *rest = text.split(begin)
        if len(rest) != 1 or END not in rest[0]:
            raise UserError(f"{source} must hold `{begin}` and, after it, `{END}`, exactly once.")
        text = f"{before}{begin}\n{rendered}\n{END}{rest[0].split(END, 1)[1]}"
    return text


def rendered_files() -> dict[Path, str]:
    """File -> its whole text as it should be."""
    files = {CARDS / f"{card.name}.md": card.text for card in cards()}
    files |= {CHECKPOINTS / card.checkpoint / "README.md": card.text for card in cards()}
    for path, blocks in rendered_blocks().items():
        files[path] = with_blocks(path.read_text(), blocks, path.name)
    return files


@one_line_errors("eval.report")
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m eval.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether every file is up to date")
    options = parser.parse_args(argv)
    require("scipy")
    fresh = rendered_files()
    stale = [path for path, text in fresh.items() if not path.is_file() or path.read_text() != text]
    names = ", ".join(path.name for path in stale)
    if not stale:
        print("README.md, docs/results/ and model_cards/ are up to date.")
        return 0
    if options.check:
        print(f"These files differ from eval/results: {names}; run python -m eval.report.", file=sys.stderr)
        return 1
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, fresh[path])
    print(f"Rewritten: {names}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
