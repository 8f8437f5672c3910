"""Claims about import paths of version 0.1: they work with a warning, or fail with a line that says where to look."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from llm_jepa._moved import GONE

ROOT = Path(__file__).parent.parent
# Old path -> names that its users import.
OLD = {
    "llm_jepa.losses": ["info_nce", "jepa_distance", "jepa_loss", "sigreg", "vicreg"],
    "llm_jepa.trainer": ["LLMJEPATrainer"],
    "llm_jepa.config": ["DataArguments", "LLMJEPAConfig", "ModelArguments"],
    "llm_jepa.packing": [
        "JEPACollator",
        "attention_mask",
        "embed_pairs",
        "evaluating",
        "lm_rows_only",
        "who_sees_whom",
    ],
    "llm_jepa.views": ["Views", "add_view_columns", "build_views", "end_of_turn_ids"],
    "llm_jepa.vl.config": ["VLDataArguments", "VLJEPATrainingArguments", "VLModelArguments"],
    "llm_jepa.vl.report": ["Timeline", "write_report"],
    "llm_jepa.vl.selective_decoding": ["Segment", "SelectiveDecoder", "WardSegmenter", "segment_offline"],
    "llm_jepa.vl.video": ["Frame", "Limits", "Window", "open_frames", "read_clip", "windows"],
    "llm_jepa.data.nl_rx": ["phrase", "to_regex", "write"],
    "llm_jepa.data.shapestream": ["captions", "clip", "stream", "write_clips"],
}
RENAMED = {
    ("llm_jepa.packing", "Example"): ("llm_jepa.lm.batching", "PackedExample"),
    ("llm_jepa.packing", "read"): ("llm_jepa.lm.reading", "gather_states"),
    ("llm_jepa.views", "Example"): ("llm_jepa.lm.rows", "ParsedRow"),
    ("llm_jepa.views", "as_example"): ("llm_jepa.lm.rows", "parse_row"),
}


def fresh_import(name: str):
    sys.modules.pop(name, None)
    return import_module(name)


@pytest.mark.parametrize("path", OLD)
def test_an_old_path_hands_out_its_names_and_warns_where_they_are(path):
    with pytest.warns(DeprecationWarning, match=f"{path} has moved; import from llm_jepa"):
        module = fresh_import(path)
    for name in OLD[path]:
        assert getattr(module, name).__module__.startswith("llm_jepa.")
        assert getattr(module, name).__module__ != path
    with pytest.raises(AttributeError, match="no_such_name.*look in llm_jepa"):
        _ = module.no_such_name


@pytest.mark.parametrize(("path", "name"), RENAMED)
def test_a_renamed_name_is_the_new_one_and_warns(path, name):
    home, new = RENAMED[path, name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = fresh_import(path)
    with pytest.warns(DeprecationWarning, match=f"{path}.{name} is now {home}.{new}"):
        thing = getattr(module, name)
    assert thing is getattr(import_module(home), new)


@pytest.mark.parametrize("path", sorted(GONE))
def test_another_old_path_says_where_the_module_is(path):
    with pytest.raises(ModuleNotFoundError, match=f"^{path} has moved; import from llm_jepa") as error:
        import_module(path)
    assert error.value.name == path
    for home in GONE[path].split(" and "):
        import_module(home)


def test_a_module_that_never_was_is_not_explained():
    with pytest.raises(ModuleNotFoundError, match="No module named 'llm_jepa.no_such_module'"):
        import_module("llm_jepa.no_such_module")


@pytest.mark.parametrize("module", ["llm_jepa.data.shapestream", "llm_jepa.data.nl_rx"])
def test_old_commands_still_run(module):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "usage: python -m llm_jepa.synthetic" in done.stdout, done.stderr
    name = module.rpartition(".")[2]
    assert f"{module} has moved; run python -m llm_jepa.synthetic.{name}." in done.stderr
