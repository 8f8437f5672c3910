"""Claims about the installed package: built from a source archive, in a new environment, far from the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
RECIPE = "lm/tiny-llama/nl-rx-quickstart"


def tracked() -> list[str]:
    """The files of a clone. A folder that was not cloned has no list of them."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a clone of the repository")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def call(*words: object, cwd: Path, **environment: str) -> str:
    """The output of a command that succeeds."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the source archive as `python -m build` does."""
    folder = tmp_path_factory.mktemp("build")
    for name in tracked():
        copy = folder / "clone" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    call(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=folder / "clone")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    call(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_has_every_file_and_no_other_top_level_name(wheel):
    """Modules and data of the package, of the evaluation, and the recipes; not the results, nor the tests."""
    with zipfile.ZipFile(wheel) as packed:
        found = set(packed.namelist())
    assert {name.partition("/")[0].partition(".dist-info")[0] for name in found} - {"llm_jepa", "llm_jepa_eval"} == {
        wheel.name.rpartition("-py3")[0]
    }
    expected = set()
    for name in tracked():
        top, _, rest = name.partition("/")
        if top == "llm_jepa":
            expected.add(name)
        elif top == "recipes" and name.endswith(".yaml"):
            expected.add(f"llm_jepa/recipes/{rest}")
        elif top == "recipes" and name.endswith(".py"):
            expected.add(f"llm_jepa/recipes/{rest}")  # setuptools packs the modules of every package
        elif top == "eval" and not rest.startswith("results/"):
            expected.add(f"llm_jepa_eval/{rest}")
    packed_files = {name for name in found if ".dist-info/" not in name}
    assert packed_files == expected
    assert len(expected) > 200


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of a new environment with the wheel. What the package needs comes from this environment."""
    folder = tmp_path_factory.mktemp("venv")
    call(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    here = sysconfig.get_paths()["purelib"]
    where = call(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    # A folder of a .pth file is searched, but its own .pth files are not read: an editable install stays out.
    (Path(where) / "libraries.pth").write_text(here + "\n")
    call(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=folder)
    return python


@pytest.mark.slow
def test_a_stranger_installs_it_and_takes_the_first_steps(python, tmp_path):
    """Version, data, a recipe by name, a dry run, two steps of training, an answer, a score."""
    llm_jepa = python.parent / "llm-jepa"
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    version = call(llm_jepa, "--version", cwd=tmp_path)
    assert version.startswith("llm-jepa 0.") and str(python.parent.parent) in version and str(ROOT) not in version
    assert RECIPE in [line.split()[0] for line in call(llm_jepa, "recipes", cwd=tmp_path).splitlines()]
    call(python, "-m", "llm_jepa.synthetic.nl_rx", "runs/quickstart/data", cwd=tmp_path)
    assert "# The first row, packed" in call(llm_jepa, "train", RECIPE, "--dry-run", cwd=tmp_path, **offline)
    short = ["--max_steps", "2", "--save_steps", "2", "--eval_steps", "2", "--output_dir", "runs/mine"]
    call(llm_jepa, "train", RECIPE, *short, cwd=tmp_path, **offline)
    call(llm_jepa, "generate", "runs/mine", "--prompt", "lines with a vowel", cwd=tmp_path, **offline)
    score = [python, "-m", "llm_jepa_eval.run", "--model", "runs/mine", "--task", "nl_rx", "--out", "score.json"]
    call(*score, "--data", "runs/quickstart/data", "--limit", "4", cwd=tmp_path, **offline)
    assert json.loads((tmp_path / "score.json").read_text())["task"] == "nl_rx"


@pytest.mark.slow
def test_the_evaluation_is_imported_under_its_own_name(python, tmp_path):
    """Every module; and there is no package `eval` for other people's code to meet."""
    code = """
import importlib.util, pkgutil, llm_jepa_eval
skipped = ("llm_jepa_eval.metrics.", "llm_jepa_eval.lm_eval")
names = [m.name for m in pkgutil.walk_packages(llm_jepa_eval.__path__, "llm_jepa_eval.")]
names = [name for name in names if not name.startswith(skipped) and not name.endswith(".__main__")]
for name in names:
    importlib.import_module(name)
import sys
assert importlib.util.find_spec("eval") is None and "eval" not in sys.modules
print(len(names))
"""
    assert int(call(python, "-c", code, cwd=tmp_path, HF_HUB_OFFLINE="1")) > 60


@pytest.mark.slow
def test_metrics_load_from_the_installed_package(python, tmp_path):
    pytest.importorskip("evaluate")
    code = """
import evaluate, llm_jepa_eval
folder = llm_jepa_eval.__path__[0] + "/metrics/regex_equivalence"
print(evaluate.load(folder).compute(predictions=["[ab].*"], references=["(a|b).*"])["equivalent"])
"""
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    assert call(python, "-c", code, cwd=tmp_path, **env).strip() == "1.0"
