"""The recipes that come with the package, by name: `lm/tiny-llama/nl-rx-quickstart`.

They are in `recipes/` of a checkout, and inside the installed package.
"""

from __future__ import annotations

import re
from pathlib import Path

from .core.errors import UserError

PACKAGE = Path(__file__).parent
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
