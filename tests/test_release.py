"""Claims about the files that a release and its visitors need."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_has_the_version_and_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    papers = {entry["url"].rpartition("/")[2] for entry in citation["references"]}
    assert papers == {"2509.14252", "2512.10942"} and all(paper in (ROOT / "README.md").read_text() for paper in papers)


def test_the_changelog_begins_with_the_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == PROJECT["version"]


def lower_bounds(requirements: list[str]) -> dict[str, Version]:
    bounds = {}
    for text in requirements:
        requirement = Requirement(text)
        (low,) = [one.version for one in requirement.specifier if one.operator == ">="]
        bounds[requirement.name.lower()] = Version(low)
    return bounds


def test_the_oldest_versions_are_those_of_the_lower_bounds():
    """`make test-min` would otherwise test versions that nobody is promised."""
    lines = [line for line in (ROOT / "constraints-min.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {name.lower(): Version(version) for name, version in (line.split("==") for line in lines)}
    bounds = lower_bounds(PROJECT["dependencies"])
    assert pinned == bounds


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_the_forms_of_issues_are_whole(path):
    """As GitHub wants them: names that differ, and types that exist."""
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert form["blank_issues_enabled"] is True
        return
    assert {"name", "description", "body"} <= form.keys() and form["body"]
    names = [part["id"] for part in form["body"]]
    assert len(set(names)) == len(names)
    assert {part["type"] for part in form["body"]} <= {"textarea", "input", "dropdown", "checkboxes", "markdown"}
    assert all("label" in part["attributes"] for part in form["body"])


def test_there_are_forms():
    assert {path.stem for path in FORMS} == {"bug", "config", "feature", "result"}


def test_the_evaluation_names_itself_nowhere():
    """It is `eval` in the repository and `llm_jepa_eval` in the wheel, so its imports of itself are relative."""
    found = []
    for path in sorted((ROOT / "eval").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [path.relative_to(ROOT).parts[1] for name in names if name.partition(".")[0] == "eval"]
    assert set(found) == {"metrics"}, "there an import of the other name follows"
