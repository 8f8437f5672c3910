"""Render the table of recipes/README.md from the recipes themselves:  python -m recipes.table [--check]

Values are the resolved ones; titles, published numbers and sources are the comments at the head of each recipe. --check
changes nothing and exits 1 if the README is stale.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from llm_jepa.core.files import write_whole
from llm_jepa.core.recipe import EXTENDS
from llm_jepa.core.strict_yaml import read_yaml
from llm_jepa.families import parse_recipe

HERE = Path(__file__).parent
README = HERE / "README.md"
BEGIN, END = "<!-- table of recipes -->", "<!-- end of table -->"
TITLE = re.compile(r"# (?P<model>.+?) on (?P<data>.+?): (?P<method>.+)\.")
PUBLISHED = re.compile(r"# Published: (?:(?P<sft>.+) -> )?(?P<ours>.+), (?P<metric>.+) \((?P<source>arXiv:.+)\)")
BASELINE = re.compile(r"# Baseline: +(?P<file>\S+)")
RUN = re.compile(r"# Run by us: (?P<where>.+)")
COLUMNS = (
    *("recipe", "model", "data", "method", "lr", "λ", "k"),
    *("published: SFT → this (%)", "metric; source", "baseline", "run by us"),
)


def runnable() -> list[Path]:
    """Every LLM-JEPA recipe, twins included; files with a leading underscore are parents and cannot be run."""
    paths = [path for path in HERE.glob("lm/*/*.yaml") if path.name[0] != "_"]
    return sorted(paths, key=lambda path: (path.parent.name, path.stem))


def is_twin(path: Path) -> bool:
    return path.stem.endswith("-baseline")


def head(path: Path, pattern: re.Pattern[str]) -> dict[str, str | None]:
    """The named parts of the one comment line at the head of the recipe that matches; {} without one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [match for line in lines if line.startswith("# ") and (match := pattern.fullmatch(line))]
    assert len(found) <= 1, f"{path}: {pattern.pattern} stands there {len(found)} times"
    return found[0].groupdict() if found else {}


def row(path: Path) -> str:
    """One recipe. The SFT number of a variant (STP) is that of the recipe it extends."""
    training = parse_recipe(path, ["--use_cpu", "true"]).training
    title, published, baseline = head(path, TITLE), head(path, PUBLISHED), head(path, BASELINE)["file"]
    sft = published.get("sft")
    if published and sft is None:
        sft = head(path.parent / str(read_yaml(path)[EXTENDS]), PUBLISHED)["sft"]
    numbers = f"{sft} → {published['ours']}".replace("+-", "±") if published else ""
    source = f"{published['metric']}; {published['source']}" if published else ""
    cells = (
        f"[{path.parent.name}/{path.stem}](lm/{path.parent.name}/{path.name})",
        title["model"],
        title["data"],
        title["method"],
        f"{training.learning_rate:.0e}".replace("e-0", "e-"),
        f"{training.jepa_weight:g}",
        str(training.num_predictor_tokens),
        numbers,
        source,
        f"[{Path(str(baseline)).stem}](lm/{path.parent.name}/{baseline})",
        head(path, RUN).get("where") or "no",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def table() -> str:
    rows = [row(path) for path in runnable() if not is_twin(path)]
    return "\n".join([f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *rows])


def rendered() -> str:
    """The README as it should be."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{README} has no {BEGIN} ... {END}"
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(check: bool) -> int:
    text = rendered()
    if text == README.read_text(encoding="utf-8"):
        return 0
    if check:
        print(f"{README} is stale; run python -m recipes.table")
        return 1
    write_whole(README, text)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
