"""The rendered blocks of docs/results, README.md and model_cards: tables by functions, sentences in *.md.jinja."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

RESULTS = Path(__file__).parents[1] / "results"
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def cell(text: str, limit: int = 200) -> str:
    """A text as a cell of a Markdown table: one line, and nothing that Markdown or HTML would read."""
    line = " ".join(text.split())[:limit]
    return html.escape("".join(char if char.isprintable() else "?" for char in line), quote=False).replace("|", "\\|")


TEMPLATES.filters["cell"] = cell


def render(template: str, **facts: Any) -> str:
    """Render the template `<template>.md.jinja` of this folder. Raises jinja2.UndefinedError for a missing fact."""
    return TEMPLATES.get_template(f"{template}.md.jinja").render(facts)


def short_commits(results: Iterable[dict[str, Any]]) -> str:
    """The commits of some result files, in seven characters each."""
    return ", ".join(sorted({result["environment"]["commit"][:7] for result in results}))
