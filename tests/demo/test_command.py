"""Claims about `llm-jepa demo`: which page a model gets, and what is refused."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

pytest.importorskip("gradio")

from llm_jepa.core.errors import UserError
from llm_jepa.demo import add_arguments, build
from llm_jepa.vl.inference import VLJEPA
from tests.conftest import tiny_model
from tests.vl.watch.rooms import build as build_vl


@pytest.fixture
def folders(tmp_path, tokenizer):
    for name in ("lm", "lm2"):
        tiny_model(tokenizer).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    VLJEPA(*build_vl()).save_pretrained(tmp_path / "vl")
    return tmp_path


def options(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_the_kind_of_the_model_decides_the_page(folders):
    assert build(options(folders / "vl")).title == "vl · llm-jepa"
    page = build(options(folders / "lm", folders / "lm2"))
    assert page.title == "lm and lm2 · llm-jepa" and not page.analytics_enabled
    with pytest.raises(UserError, match="only if both are language models"):
        build(options(folders / "lm", folders / "vl"))
    with pytest.raises(UserError, match="--example is a film"):
        build(options(folders / "lm", "--example", "x.mp4"))
    with pytest.raises(UserError, match="missing.mp4: cannot be opened"):
        build(options(folders / "vl", "--example", "missing.mp4"))
    with pytest.raises(UserError, match="No model folder"):
        build(options(folders / "nothing" / "there"))


def test_it_listens_on_this_machine_alone():
    assert options("m").host == "127.0.0.1"


def test_a_missing_extra_is_one_line():
    code = "import sys; sys.modules['gradio'] = None; from llm_jepa.cli import main; sys.exit(main(['demo', 'm']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        'llm-jepa: error: this needs gradio: pip install "llm-jepa[demo]"\n'
    )
