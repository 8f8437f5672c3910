"""Claims about the shape of the package, read off its source: who may import whom, what is light, what is not there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path
from types import FunctionType

import pytest

import llm_jepa
import llm_jepa.lm
import llm_jepa.vl

ROOT = Path(__file__).parent.parent
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "datasets",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "yaml",
    "ruamel",
    "numpy",
} | {"PIL", "av"}


def sources(*folders: str) -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources("llm_jepa")


def imports_of(name: str, path: Path, *, top_level: bool = False) -> set[str]:
    """Every module or name imported anywhere in a file, functions included, as a full dotted path.

    top_level: only what runs when the module is imported, so neither functions nor `if TYPE_CHECKING`.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{full}.{alias.name}" for alias in node.names}
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if top_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
    return found


def ours(imported: set[str]) -> set[str]:
    """The modules of `llm_jepa` among imported names: the longest prefix that is one, without `llm_jepa.`."""
    found = set()
    for name in imported:
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        if name in MODULES:
            found.add(name.removeprefix("llm_jepa").removeprefix("."))
    return found


# The packages re-export lazily and may name anything; importing a public name from them counts as its module.
LAZY = {"llm_jepa": llm_jepa, "llm_jepa.lm": llm_jepa.lm, "llm_jepa.vl": llm_jepa.vl}
GRAPH = {
    name.removeprefix("llm_jepa."): ours(imports_of(name, path)) for name, path in MODULES.items() if name not in LAZY
}


FAMILIES = ("lm", "vl", "world")
STUBS = {"losses", "trainer", "config", "packing", "views", "vl.config", "vl.video", "vl.selective_decoding"} | {
    "vl.report", "data", "data.nl_rx", "data.shapestream"
}  # fmt: skip


def room(module: str) -> str:
    """`core`, `lm`, ... or the module itself if it lies on the top floor."""
    return module.partition(".")[0]


@pytest.mark.parametrize("module", sorted(set(GRAPH) - STUBS))
def test_who_may_import_whom(module):
    """core knows no family; a family knows no other; synthetic imports core alone; nobody imports the command line."""
    allowed = {
        "core": {"core"},
        "stream": {"core", "stream"},
        "synthetic": {"core", "synthetic"},
        **{family: {"core", "stream", "synthetic", family} for family in FAMILIES},
    }
    rooms = {room(other) for other in GRAPH[module]}
    if room(module) in allowed:
        assert rooms <= allowed[room(module)], f"{module} imports {sorted(rooms - allowed[room(module)])}"
    assert "" not in GRAPH[module], f"{module} imports the package itself, which imports {module} again"
    assert "cli" not in GRAPH[module], "what the command line calls must not call it back"


@pytest.mark.parametrize("module", sorted(name for name in GRAPH if room(name) == "stream"))
def test_streams_need_no_torch(module):
    """Frames and time are numpy, Pillow and PyAV: a segmenter runs where no model does."""
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        imported = imports_of(f"llm_jepa.{name}", MODULES[f"llm_jepa.{name}"])
        assert not {i.partition(".")[0] for i in imported} & {"torch", "transformers"}, name
        waiting += [other for other in GRAPH[name] if other not in seen]


def test_there_is_no_cycle():
    """By removing modules whose imports are all gone until none is left; needs no table."""
    left = {module: set(imports) for module, imports in GRAPH.items()}
    while ready := [module for module, imports in left.items() if not imports & left.keys()]:
        for module in ready:
            del left[module]
    assert not left
    assert sum(map(len, GRAPH.values())) > 20, "the graph is nearly empty: the reader of imports is broken"


@pytest.mark.parametrize("module", ["core.losses", "core.diagnostics"])
def test_the_maths_imports_torch_and_nothing_of_ours(module):
    """So it can be read, tested and copied alone."""
    outside = {name.partition(".")[0] for name in imports_of(f"llm_jepa.{module}", MODULES[f"llm_jepa.{module}"])}
    assert GRAPH[module] == set()
    assert "torch" in outside and outside - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_package_knows_neither_its_evaluation_nor_its_tests(name):
    assert not {imported.partition(".")[0] for imported in imports_of(name, MODULES[name])} & {"eval", "tests"}


@pytest.mark.parametrize("name", sorted({**MODULES, **sources("eval")}))
def test_nobody_imports_a_private_name_of_ours(name):
    imported = imports_of(name, {**MODULES, **sources("eval")}[name])
    names = [i.rpartition(".")[2] for i in imported if i.startswith(("llm_jepa.", "eval."))]
    assert not [one for one in names if one.startswith("_") and one != "__doc__"]


def test_the_command_line_starts_without_the_heavy_libraries():
    """A mistyped option is answered at once: cli and all it imports at its top are standard library."""
    waiting, seen = ["llm_jepa.cli"], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        imported = imports_of(name, MODULES[name], top_level=True)
        assert not {i.partition(".")[0] for i in imported} & HEAVY, name
        waiting += [f"llm_jepa.{other}" for other in ours(imported) if other and f"llm_jepa.{other}" not in seen]
    assert "llm_jepa.core.errors" in seen


@pytest.mark.parametrize(
    "module", ["llm_jepa", "llm_jepa.cli", "llm_jepa.core.errors", "llm_jepa.synthetic.nl_rx", "llm_jepa.vl"]
)
def test_importing_it_loads_no_heavy_library(module):
    """In an interpreter of its own: this one has loaded them all."""
    code = f"import {module}, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")
    assert HEAVY & set(sys.modules), "the names are misspelt"


def test_every_public_name_is_there():
    """And is the object of the module it is said to come from; a function or class is defined there."""
    for package in LAZY.values():
        assert len(set(package.__all__)) == len(package.__all__)
        for name in package._HOMES:
            home = resolve_name(package._HOMES[name], package.__name__)
            thing = getattr(package, name)
            assert thing is getattr(import_module(home), name)
            assert not isinstance(thing, (type, FunctionType)) or thing.__module__ == home
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = package.no_such_name


def test_public_names_are_known_to_type_checkers():
    """The imports under TYPE_CHECKING and `__all__` are those of the table."""
    for name, package in LAZY.items():
        imported = {full.rpartition(".")[2] for full in imports_of(name, MODULES[name])}
        assert set(package._HOMES) <= set(package.__all__) <= imported
        assert set(package.__all__) - set(package._HOMES) <= set(FAMILIES)


def test_the_packages_of_the_families_are_names_of_the_package():
    code = "import llm_jepa, sys; llm_jepa.lm.__all__, llm_jepa.vl.__all__; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "False", "")


# -- what is not there ----------------------------------------------------------------------------------------------

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def dangers(tree: ast.AST) -> list[str]:
    """Ways to run code that came with data or with a checkpoint."""
    found = []
    for node in ast.walk(tree):
        pairs: list[tuple[str | None, ast.AST]] = []
        if isinstance(node, ast.Call):
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"):
                found.append(called)
            if called == "torch.load" and not any(keyword.arg == "weights_only" for keyword in node.keywords):
                found.append(called)
            safe_yaml = any(
                keyword.arg == "typ" and ast.unparse(keyword.value) == "'safe'" for keyword in node.keywords
            )
            if called == "yaml.load" or called.endswith("YAML") and not safe_yaml:
                found.append(called)
        elif isinstance(node, ast.Dict):
            pairs = [
                (key.value, value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            ]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            found.append(str(node.module))
        for name, value in pairs:
            fixed = value.value if isinstance(value, ast.Constant) else None
            safe = {"trust_remote_code": False, "weights_only": True, "use_safetensors": True, "shell": False}
            if name in safe and fixed is not safe[name]:
                found.append(f"{name}={ast.unparse(value)}")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "from_pretrained(x, trust_remote_code=True)",
        "from_pretrained(x, trust_remote_code=given)",
        "options = {'trust_remote_code': True}",
        "load(x, weights_only=False)",
        "from_pretrained(x, use_safetensors=False)",
        "torch.load(x)",
        "import pickle",
        "def f():\n    from pickle import loads",
        "yaml.load(x, Loader=yaml.UnsafeLoader)",
        "YAML()",
        "ruamel.yaml.YAML(typ='unsafe')",
        "eval(x)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_search_for_unsafe_loading_finds_it(code):
    assert dangers(ast.parse(code))


@pytest.mark.parametrize("name", sorted({**MODULES, **sources("eval")}))
def test_nothing_that_came_with_data_or_a_checkpoint_is_run(name):
    """No trust_remote_code, no unsafe torch.load, no pickle, no eval."""
    assert dangers(ast.parse({**MODULES, **sources("eval")}[name].read_text())) == []
