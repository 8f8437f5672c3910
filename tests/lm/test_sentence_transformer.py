"""Claims about the files for sentence-transformers: it gives the vectors of `Embedder`, or refuses with a reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch
import trl
import yaml

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer

from llm_jepa.cli import main
from llm_jepa.lm import Embedder
from llm_jepa.lm.predictor_tokens import predictor_token_names
from llm_jepa.lm.sentence_transformer import plan, write_files
from tests.lm.test_commands import RECIPE
from tests.lm.test_embedder import RECORDS, SYSTEM, assert_close, made

TEXTS = ["lines with a vowel", "a.", " (led)", "lines that do not have the letter b, or end in 7?\n", "x"]
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SOME = ("cohere", "deepseekv3", "gemma3", "gptoss", "llama3_2", "phi3", "qwen2_5", "qwen3")
PICTURES = ("idefics3", "llava_next", "smolvlm")  # templates that take no text
MARK = re.compile(
    r"<\|[^|<>\s]+\|>|<\|?[a-z]+(?:_of_[a-z]+)?\|?>|</?s>|\[/?INST\]|<｜[^｜]+｜>|\[gMASK\]|<sop>|<\|[A-Z_]+\|>"
)


def saved(embedder: Embedder, folder: Path) -> Path:
    embedder.model.save_pretrained(folder)
    embedder.sides.tokenizer.save_pretrained(folder)
    write_files(folder, embedder.sides.tokenizer, embedder.model.config)
    return folder


def assert_same_vectors(folder: Path, embedder: Embedder, texts=TEXTS) -> SentenceTransformer:
    model = SentenceTransformer(str(folder), device="cpu")
    prompts, completions = embedder.encode_prompts(texts), embedder.encode_completions(texts)
    assert (prompts - completions).norm(dim=-1).min() > 0.1, "one vector for both sides would prove nothing"
    assert_close(model.encode_query(texts, convert_to_tensor=True, batch_size=3), prompts)
    assert_close(model.encode_document(texts, convert_to_tensor=True, batch_size=3), completions)
    assert_close(model.encode(texts[:1], convert_to_tensor=True), prompts[:1])
    assert_close(model.encode(texts[-1:], prompt_name="document", convert_to_tensor=True), completions[-1:])
    return model


@pytest.mark.parametrize("record", list(RECORDS))
def test_the_library_gives_the_vectors_of_the_embedder(tokenizer, tmp_path, record):
    tokenizer.padding_side = "left"  # of the saved tokenizer: absolute positions would be others
    family = "gpt2" if record in ("one", "mean") else "llama"
    embedder = made(tokenizer, RECORDS[record], family=family, system=SYSTEM if "r" in record else None)
    assert_same_vectors(saved(embedder, tmp_path), embedder)


def test_plain_texts_too(tokenizer, tmp_path):
    """With a BOS token, which the library's tokenizer call leaves out of what a template writes."""
    tokenizer.chat_template = None
    for i, record in enumerate(("mean", "three, first", "reverse")):
        embedder = made(tokenizer, RECORDS[record], rows_are="text")
        model = assert_same_vectors(saved(embedder, tmp_path / str(i)), embedder)
    with pytest.raises(jinja2.TemplateError, match="one text at a time"):
        model.encode(TEXTS, prompt="Instruct: ")


def test_conversations_and_a_prompt_of_ones_own(tokenizer, tmp_path):
    embedder = made(tokenizer, RECORDS["one"], system=SYSTEM)
    model = SentenceTransformer(str(saved(embedder, tmp_path)), device="cpu")
    turns = [*TURN, {"role": "assistant", "content": "a"}, {"role": "user", "content": "and b?"}]
    own = [{"role": "system", "content": "Be brief."}, *TURN]
    # The library takes a system turn of a conversation as it is; the one of the training rows goes with the others.
    wanted = embedder.encode_prompts([[{"role": "system", "content": SYSTEM}, *turns], own])
    assert_close(model.encode_query([turns], convert_to_tensor=True), wanted[:1])
    assert_close(model.encode_query([own], convert_to_tensor=True), wanted[1:])
    assert_close(model.encode([TURN[0]["content"]], prompt="Be brief.", convert_to_tensor=True), wanted[1:])
    with pytest.raises(jinja2.TemplateError, match="one text at a time"):
        model.encode_document([turns])


TURN = [{"role": "user", "content": "lines"}]


def test_template_arguments_of_all_training_rows_go_with_a_text(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ tools[0]['name'] if tools else '' }}{{ mode }}" + tokenizer.chat_template
    kwargs = json.dumps({"tools": [{"name": "it's \\ a\n", "strict": True, "n": None}], "mode": "dé🙂"})
    embedder = made(tokenizer, RECORDS["one"], render_kwargs=kwargs)
    assert_same_vectors(saved(embedder, tmp_path), embedder)


def planned(tokenizer, path: Path, **record):
    """The plan for a template of TRL, with its markers as special tokens."""
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    tokenizer.add_tokens(sorted(set(MARK.findall(tokenizer.chat_template))), special_tokens=True)
    tokenizer.add_tokens(predictor_token_names(2), special_tokens=True)
    record = {"num_predictor_tokens": 2, "prompt": {"format": "messages", "ends": "content"}, **record}
    return plan(tokenizer, SimpleNamespace(model_type="llama", llm_jepa=record))


@pytest.mark.parametrize("path", [path for path in TEMPLATES if path.stem in SOME], ids=lambda path: path.stem)
def test_the_library_writes_a_view_under_templates_of_trl(tokenizer, path):
    """`plan` compares the tokens of sample texts, so without a refusal they are equal."""
    assert planned(tokenizer, path).refusal is None


@pytest.mark.slow
@pytest.mark.parametrize("view", ["prefix", "message"])
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_library_writes_a_view_under_every_template_of_trl(tokenizer, path, view):
    refusal = planned(tokenizer, path, context_view=view).refusal
    assert (refusal is not None) == path.stem.startswith(PICTURES), refusal


def test_where_tokens_would_differ_every_text_is_refused_with_the_reason(tokenizer, tmp_path):
    """The tokenizer joins what closes a turn here with the end of some contents: "*" with ")"."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }})*{% else %}\nA {{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    embedder = made(tokenizer, RECORDS["one"])
    refusal = plan(tokenizer, embedder.model.config).refusal
    assert refusal is not None and "the tokens of a prompt alone differ" in refusal and "lm.Embedder" in refusal
    model = SentenceTransformer(str(saved(embedder, tmp_path)), device="cpu")
    for encode in (model.encode_query, model.encode_document, model.encode):
        with pytest.raises(jinja2.TemplateError, match="the tokens of a prompt alone differ"):
            encode(["a text"])


def test_the_snippets_of_the_page_run(tokenizer, tmp_path, capsys):
    """All but the one that needs FAISS, with a model in place of runs/mine."""
    folder = saved(made(tokenizer, RECORDS["one"]), tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "embeddings.md").read_text()
    codes = [
        code for code in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "faiss" not in code
    ]
    for code in codes:
        exec(code.replace("runs/mine", str(folder)), {})
    assert len(codes) == 2 and len(capsys.readouterr().out.splitlines()) == 2, "two hits"


@pytest.mark.parametrize("lora", [False, True])
def test_a_trained_folder_loads_without_this_package(tmp_path, rows, lora):
    """The final model; the one with a merged adapter in a process that cannot import llm_jepa."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {**RECIPE, "train_data": str(data), "output_dir": str(tmp_path / "run"), "max_steps": 2, "save_steps": 1}
    values |= {"use_peft": True, "lora_target_modules": "all-linear"} if lora else {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    embedder = Embedder.from_pretrained(str(tmp_path / "run"))
    assert embedder.sides.reading.num_predictor_tokens == 1 and embedder.sides.form.format == "messages"
    card = (tmp_path / "run" / "README.md").read_text()
    assert 'SentenceTransformer("run")' in card and "encode_query" in card
    assert (tmp_path / "run" / "checkpoint-1" / "modules.json").is_file() != lora  # an adapter is not a whole model
    if not lora:
        assert_same_vectors(tmp_path / "run", embedder)
        return
    script = """
import json, sys
sys.modules["llm_jepa"] = None
from sentence_transformers import SentenceTransformer
model, texts = SentenceTransformer(sys.argv[1], device="cpu"), json.loads(sys.argv[2])
print(json.dumps([model.encode_query(texts).tolist(), model.encode_document(texts).tolist()]))
"""
    words = [sys.executable, "-c", script, str(tmp_path / "run"), json.dumps(TEXTS)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-1500:]
    prompts, completions = map(torch.tensor, json.loads(done.stdout.splitlines()[-1]))
    assert_close(prompts, embedder.encode_prompts(TEXTS))
    assert_close(completions, embedder.encode_completions(TEXTS))
