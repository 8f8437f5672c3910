"""Build the site from the files of the repository, as they are: `make docs`.

The site has the folders of the repository, so a link that works on a Git host works on the site. A page is

- every Markdown file that the navigation names, or that one of its pages links to;
- every notebook in `docs/`, with its stored outputs;
- every other file that a page links to (a recipe, a program), with its source; of a folder, its list of files.

Nothing is executed, and nothing of `llm_jepa` is imported.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from urllib.parse import quote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()([^()\s#]+)(?=[#)])")
ASSETS = {".png", ".svg", ".css", ".js"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what mkdocs finds in `docs/` by the pages of the repository."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    starts = _paths_of(config.nav)
    styles = [path for path in config.extra_css if (ROOT / path).exists()]  # others are those of plugins
    known = {*starts, *styles, *config.extra["polyfills"], config.theme["logo"]}
    queue = sorted(known)
    while queue:
        path = queue.pop()
        file = _file_of(path, config)
        if path not in starts:
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
        linked = _links(path, file.content_string) - known if file.is_documentation_page() else set()
        known |= linked
        queue += sorted(linked)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages made of other files; leave out the marks of the rendering and of the tests."""
    here = posixpath.dirname(page.file.src_uri)

    def pointed(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, match[0]))
        name = _page_name(path) if (ROOT / path).exists() else path
        return match[0] if name == path else posixpath.relpath(name, here)

    return LINK.sub(pointed, re.sub(r"^<!-- .* -->$", "", markdown, flags=re.MULTILINE))


def _paths_of(nav: list | dict | str) -> set[str]:
    """The files of a navigation."""
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav
    return set().union(*map(_paths_of, parts))


def _page_name(path: str) -> str:
    """The file of the site that shows a file or a folder of the repository."""
    if (ROOT / path).is_dir():
        return f"{path}/README.md"
    suffix = posixpath.splitext(path)[1]
    return path if suffix == ".md" or suffix in ASSETS else f"{path}.md"


def _links(path: str, text: str) -> set[str]:
    """The files of the repository that a page links to."""
    here = posixpath.dirname(path)
    paths = {posixpath.normpath(posixpath.join(here, target)) for target in LINK.findall(text)}
    return {_page_name(path) for path in paths if (ROOT / path).exists()}


def _file_of(name: str, config: MkDocsConfig) -> File:
    """A file of the site: one of the repository, or a page made of one."""
    source = ROOT / name
    if source.is_file():
        return File.generated(config, name, abs_src_path=str(source))
    source = source.parent if source.name == "README.md" else source.with_suffix("")
    if not source.exists():
        raise FileNotFoundError(f"{name} of the navigation in mkdocs.yml does not exist.")
    if source.suffix == ".ipynb":
        return File.generated(config, name, content=_notebook_page(source))
    if source.is_dir():
        return File.generated(config, name, content=_folder_page(source))
    return File.generated(config, name, content=_source_page(source))


def _source_page(path: Path) -> str:
    code = _fenced(path.read_text(), LANGUAGES.get(path.suffix, "text"))
    head = "---\nsearch: {exclude: true}\n---\n"
    return f"{head}# {path.name}\n\n`{path.relative_to(ROOT).as_posix()}`\n\n{code}"


def _folder_page(folder: Path) -> str:
    lines = [f"- [{file.name}]({quote(file.name)})" for file in sorted(folder.iterdir()) if file.is_file()]
    return f"# {folder.name}\n\n" + "\n".join(lines) + "\n"


def _fenced(text: str, language: str = "text") -> str:
    return f"````{language}\n{text.rstrip()}\n````\n"


def _notebook_page(path: Path) -> str:
    """Markdown of a notebook: texts, code, and the outputs that are stored in it."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text + "\n" if cell["cell_type"] == "markdown" else _fenced(text, "python"))
        parts += map(_output, cell.get("outputs", ()))
    return "\n".join(parts)


def _output(output: dict) -> str:
    """An output of a cell: its picture, or its text."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img class="output" alt="" src="data:image/png;base64,{picture}">\n'
    text = _fenced("".join(output.get("text", data.get("text/plain", ""))))
    return f'<div class="output" markdown>\n\n{text}\n</div>\n'
