"""Claims about the documentation site that need no build. `make docs` builds it, and every warning is an error."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import llm_jepa

ROOT = Path(__file__).parent.parent
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
API_PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))


def paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [path for part in (nav.values() if isinstance(nav, dict) else nav) for path in paths(part)]


def test_the_navigation_has_every_page_once():
    pages = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")}
    pages |= {f"{page.relative_to(ROOT).as_posix()}.md" for page in (ROOT / "docs").rglob("*.ipynb")}
    pages |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "recipes/README.md"}
    nav = paths(SITE["nav"])
    assert sorted(nav) == sorted(pages)


def test_a_newcomer_reads_in_this_order():
    steps = ["README", "lm", "vl", "embeddings", "publishing", "recipes", "evaluation", "results/README", "scaling"]
    steps += ["limits", "papers", "api/README", "CHANGELOG"]
    places = [paths(SITE["nav"]).index(f"{'' if step.isupper() else 'docs/'}{step}.md") for step in steps]
    assert places == sorted(places)


def test_the_site_loads_nothing_from_elsewhere():
    assert SITE["theme"]["font"] is False, "mkdocs-material would load fonts from a server"
    assert any("iframe-worker" in path for path in SITE["extra"]["polyfills"]), "`offline` would load one from a server"
    for path in (*SITE["extra_css"], *SITE["extra"]["polyfills"], SITE["theme"]["logo"]):
        text = (ROOT / path).read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text and "//cdn" not in text


# -- the Python interface --------------------------------------------------------------------------------------------


def documented() -> dict[str, list[str]]:
    """Every name of docs/api with the members that it shows."""
    names: dict[str, list[str]] = {}
    for page in API_PAGES:
        for name, members in re.findall(r"^::: (\S+)\n(?: .*\n +members: \[(.*)\]\n)?", page.read_text(), re.MULTILINE):
            names[name] = members.split(", ") if members else []
    return names


NAMES = documented()


def resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_an_api_name_exists(name):
    thing = resolve(name)
    for member in NAMES[name]:
        assert inspect.getdoc(getattr(thing, member)), f"{name}.{member} has no docstring"


def test_the_api_has_every_public_name():
    """`__all__` of the three packages; a name of `llm_jepa.lm` may be on the page of `llm_jepa`."""
    for package in (llm_jepa, llm_jepa.lm, llm_jepa.vl):
        public = {f"{package.__name__}.{name}" for name in package.__all__}
        public -= {f"{package.__name__}.{name}" for name in ("lm", "vl")}  # packages: pages of their own
        things = {id(resolve(name)) for name in NAMES}
        missing = [name for name in public - NAMES.keys() if id(resolve(name)) not in things]
        assert not missing, f"docs/api lacks {missing}"


@functools.cache
def callables() -> dict[str, Any]:
    """The functions and classes of the interface, and the members that are shown."""
    things = {name: resolve(name) for name in NAMES}
    things |= {f"{name}.{member}": getattr(things[name], member) for name in NAMES for member in NAMES[name]}
    return {name: thing for name, thing in things.items() if callable(thing) and hasattr(thing, "__module__")}


def test_args_of_docstrings_are_parameters():
    """Every entry `name:` or `name, name:` below "Args:" is a parameter."""
    checked = 0
    for name, thing in callables().items():
        section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", inspect.getdoc(thing) or "", re.MULTILINE)
        if section is None:
            continue
        entries = re.findall(r"^    (\w[\w, ]*):", section[1], re.MULTILINE)
        known = inspect.signature(thing).parameters
        wrong = [entry for text in entries for entry in text.split(", ") if entry not in known]
        assert entries and not wrong, f"{name} has no parameters {wrong}; it has {list(known)}"
        checked += len(entries)
    assert checked > 50
