"""Claims about a Hub user: what `export` and `push` publish is loaded by its name, by us and by transformers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from llm_jepa.cli import main
from llm_jepa.core.errors import UserError
from llm_jepa.lm.loading import model_from, tokenizer_from
from llm_jepa.vl.inference import VLJEPA
from tests.conftest import UNIT32, config, expect_refusal, tiny_model
from tests.hub_double import BOB, WRITE
from tests.test_push import hub  # noqa: F401
from tests.vl.runs import parts

ROOT = Path(__file__).parent.parent
IDS = torch.arange(5, 45).reshape(1, 40)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def language_model(tokenizer, dataset) -> str:
    """A trained model, exported."""
    from llm_jepa.lm.trainer import LLMJEPATrainer

    trainer = LLMJEPATrainer(tiny_model(tokenizer), config("run", num_predictor_tokens=2), dataset, None, tokenizer)
    trainer.train()
    trainer.save_model("run")
    assert main(["export", "run", "out", "--to", "transformers"]) == 0
    return "out"


@torch.no_grad()
def test_a_language_model_is_loaded_by_its_name(language_model, hub, capsys):  # noqa: F811
    """Pinned to the commit that `push` prints, too; and the commands take the name."""
    assert main(["push", "out", "anna/lm", "--private", "--license", "apache-2.0"]) == 0
    first = hub.repositories["anna/lm"].head
    expected = AutoModelForCausalLM.from_pretrained("out").eval()(IDS).logits
    for model in (model_from("anna/lm"), AutoModelForCausalLM.from_pretrained("anna/lm", revision=first)):
        assert torch.equal(model.eval()(IDS).logits, expected)
    assert tokenizer_from("anna/lm").get_vocab() == AutoTokenizer.from_pretrained("out").get_vocab()
    assert main(["generate", "anna/lm", "--prompt", "lines with a dog", "--max_new_tokens", "2"]) == 0
    row = {"prompt": "lines with a dog", "completion": ".*dog.*"}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("anna/lm", "out"):
        out = f"{name.replace('/', '_')}.safetensors"
        assert main(["embed", name, "--input", "rows.jsonl", "--output", out]) == 0
    ours, theirs = load_file("out.safetensors"), load_file("anna_lm.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in ("context", "target"))


def test_names_that_cannot_be_loaded_are_one_line(language_model, hub, capsys, monkeypatch):  # noqa: F811
    """One that does not exist, one of somebody else, and one that became unreadable."""
    assert main(["push", "out", "anna/lm", "--private", "--license", "apache-2.0"]) == 0
    for name, token in (("anna/missing", WRITE), ("anna/lm", BOB)):
        monkeypatch.setenv("HF_TOKEN", token)
        expect_refusal(capsys, ["generate", name, "--prompt", "x"], f"'{name}'")
    expect_refusal(capsys, ["generate", "anna/lm", "--prompt", "x"], "Cannot load")


def test_a_vl_model_is_loaded_by_its_name(hub, capsys):  # noqa: F811
    """Model, processor and y_decoder come from one commit; `import llm_jepa` is enough for transformers."""
    from llm_jepa.vl.y_decoder import MemoryProjection, YDecoder, fingerprint
    from tests.vl.test_inference import TEXTS, clips

    model, processor = parts()
    used = VLJEPA(model, processor)
    memory = MemoryProjection(used.embed_texts(TEXTS), TEXTS)
    VLJEPA(model, processor, y_decoder=YDecoder(fingerprint(model), memory)).save_pretrained("vl")
    Path("vl/README.md").write_text("---\nlibrary_name: llm-jepa\nlicense: apache-2.0\n---\n# vl\n")
    assert main(["push", "vl", "anna/vl", "--private"]) == 0
    (clip,) = clips(1)
    loaded = VLJEPA.from_pretrained("anna/vl", device="cpu")
    torch.testing.assert_close(loaded.embed([clip]), used.embed([clip]), rtol=0, atol=UNIT32)
    torch.testing.assert_close(loaded.embed_texts(TEXTS), used.embed_texts(TEXTS), rtol=0, atol=UNIT32)
    assert loaded.caption(clip).text in TEXTS
    ranked = pipeline("vl-jepa", model="anna/vl", device="cpu")({"video": clip, "labels": TEXTS})
    assert [row["text"] for row in ranked] == [match.text for match in used.classify(clip, TEXTS)]
    expect_refusal(capsys, ["generate", "anna/vl", "--prompt", "x"], "is a VL-JEPA, not a causal LM")
    with pytest.raises(UserError, match="Cannot load a VL-JEPA"):
        VLJEPA.from_pretrained("anna/other")


@pytest.mark.slow  # an interpreter that imports torch
def test_a_reader_in_a_process_of_its_own(language_model, hub):  # noqa: F811
    """transformers alone, with nothing but HF_ENDPOINT and a token."""
    assert main(["push", "out", "anna/lm", "--private", "--license", "apache-2.0"]) == 0
    code = (
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('anna/lm')\n"
        "print(type(model).__name__, model.config.rope_theta if hasattr(model.config, 'rope_theta') else '')"
    )
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_CACHE": "cache2", "NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": "",
    }  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.startswith("LlamaForCausalLM"), run.stderr[-2000:]
