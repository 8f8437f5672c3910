"""Claims about the page of language models: answers and embeddings are the models' own, and the counts are right."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("gradio")

from llm_jepa.demo import lm
from llm_jepa.lm.embedder import Embedder
from llm_jepa.lm.inference import Generation, generate
from llm_jepa.lm.prompts import as_prompts, form_of
from tests.conftest import tiny_model

PROMPTS = ["lines with a vowel", "lines that contain a vowel", "a vowel is in the line"]


def reply(*texts, name="m", embeddings=None):
    return lm.Reply(name, [Generation(text, True, 1) for text in texts], embeddings, "it was exported")


def test_answers_and_embeddings_are_those_of_generate_and_of_the_embedder(tokenizer):
    model = lm.Model("tiny", tiny_model(tokenizer), tokenizer)
    asked = lm.ask(model, PROMPTS, max_new_tokens=5)
    prompts = as_prompts(PROMPTS, tokenizer, form_of(model.model.config))
    assert asked.answers == generate(model.model, tokenizer, prompts, max_new_tokens=5)
    assert torch.equal(asked.embeddings, Embedder(model.model, tokenizer).encode_prompts(PROMPTS))
    page = lm.compare([model, lm.Model("other", model.model, tokenizer)], "\n".join([*PROMPTS, "", PROMPTS[0]]), 5)
    assert page.count("<tr>") == 4 and page.count("<svg") == 2 and page.count("<circle") == 6
    assert "<b>3 of 3</b><small>prompts get the same answer from both" in page


def test_agreement_by_hand():
    """a a a is one answer, a b b are two. Both say the same to the first."""
    page = lm.render(PROMPTS, [reply("a", "a ", "a", name="one"), reply("a", "b", "b", name="two")])
    facts = re.findall(r"<b>(.*?)</b><small>(.*?)</small>", page)
    assert facts == [
        ("1", "answer of one to all prompts: they agree"), ("2", "different answers of two to 3 prompts"),
        ("1 of 3", "prompts get the same answer from both"),
    ]  # fmt: skip
    assert reply("a", "b", "a").groups == [0, 1, 0]
    assert "No map: it was exported" in page


def test_pca_by_hand():
    """Points at 0, 2 and 7 on the line (3, 4) / 5 in a plane: their mean is 3. All variance is on one axis."""
    line = np.array([0.0, 2.0, 7.0])[:, None] * np.array([0.6, 0.8, 0.0])
    places, shares = lm.pca(line + [5, -1, 2])
    assert places == pytest.approx(np.array([[-3, 0], [-1, 0], [4, 0]]), abs=1e-12)
    assert shares == pytest.approx([1, 0])
    places, shares = lm.pca(np.ones((4, 3)))
    assert not places.any() and not shares.any()
    assert lm.pca(np.array([[0.0, 0.0], [0.0, 2.0]]))[0] == pytest.approx(np.array([[0, -1], [0, 1]]).T[::-1].T)


def test_a_map_keeps_the_distances_of_a_plane():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(6, 2)) @ np.linalg.qr(rng.normal(size=(8, 2)))[0].T  # [6, 8] of rank 2
    places, shares = lm.pca(plane)
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (plane, places)]
    assert distances[0] == pytest.approx(distances[1]) and shares.sum() == pytest.approx(1)


def test_no_text_of_a_stranger_becomes_markup():
    evil = "<b onclick=x> ${1} {{2}} @children \u202e"
    page = lm.render([evil, evil], [reply(evil, "x", name=evil, embeddings=torch.eye(2))])
    assert "&lt;b onclick" in page and "<b onclick" not in page and not set("${}@`\u202e") & set(page)
    assert "Mean cosine of two prompts: 0.00" in page


def test_errors_are_one_line(tokenizer):
    model = lm.Model("tiny", tiny_model(tokenizer, max_position_embeddings=16), tokenizer)
    for text, message in (
        ("", "There is no prompt"),
        ("\n".join(map(str, range(33))), "33 prompts; give at most 32"),
        ("x" * 2001, "more than 2000 characters"),
    ):
        page = lm.compare([model], text, 5)
        assert page.count('role="alert"') == 1 and message in page
