"""What comes with the package, by name: recipes (`lm/tiny-llama/nl-rx-quickstart`), small checkpoints (`shapestream`).

Recipes are in `recipes/` of a checkout, and inside the installed package.
"""

from __future__ import annotations

import re
from pathlib import Path

from .core.errors import UserError

PACKAGE = Path(__file__).parent
CHECKPOINTS = PACKAGE / "checkpoints"
RECIPES = next((folder for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if folder.is_dir()), None)


def recipe_names() -> dict[str, str]:
    """name -> the first line of the recipe, for all that can be run."""
    if RECIPES is None:
        return {}
    names = {}
    for path in sorted(RECIPES.rglob("*.yaml")):
        if not path.name.startswith("_"):  # of a file that others extend
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            names[path.relative_to(RECIPES).with_suffix("").as_posix()] = first.removeprefix("#").strip()
    return names


def recipe_path(name: str | Path) -> Path:
    """The recipe file that a word of the command line means: a file, or a recipe that comes with the package.

    A file wins. Raises UserError if there is neither.
    """
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml") or RECIPES is None:
        return path  # if it is not there, `read_yaml` says so
    words = str(name).removeprefix("recipes/")
    if re.fullmatch(r"([\w.-]+/)+[\w.-]+", words) and ".." not in words:
        shipped = RECIPES / f"{words}.yaml"
        if shipped.is_file():
            return shipped
    raise UserError(f"{str(name)[:200]!r} is neither a file nor a recipe of ours; `llm-jepa recipes` lists those.")


def checkpoint_names() -> dict[str, str]:
    """name -> what the model does, from the first sentence of its card."""
    names = {}
    for card in sorted(CHECKPOINTS.glob("*/README.md")):
        text = card.read_text(encoding="utf-8").partition("\n# ")[2].partition("\n\n")[2]  # below the title
        sentence = re.split(r"(?<=[.:])\s", " ".join(text.split()), maxsplit=1)[0]
        names[card.parent.name] = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", sentence)  # a link becomes its text
    return names


def checkpoint(name: str) -> Path:
    """The folder of a checkpoint that comes with the package, for any `from_pretrained`: 5 MB each, no download.

        VLJEPA.from_pretrained(llm_jepa.checkpoint("shapestream"))
        AutoModelForCausalLM.from_pretrained(llm_jepa.checkpoint("nl-rx"))

    Its card, README.md, says how it was made and what was measured. Raises UserError for another name.
    """
    if name not in checkpoint_names():
        raise UserError(f"{str(name)[:200]!r} is not a checkpoint of ours; these are: {', '.join(checkpoint_names())}.")
    return CHECKPOINTS / name


def model_source(word: str) -> str:
    """The model that a word of the command line or of a recipe names: of a checkpoint of ours, its folder.

    A folder of that name wins. Anything else stays, because it may be a Hub id.
    """
    return word if Path(word).exists() or word not in checkpoint_names() else str(checkpoint(word))
