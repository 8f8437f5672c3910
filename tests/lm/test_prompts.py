"""How prompts are asked: what the rows of a run share, and how it is saved with the model."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from llm_jepa.lm.prompts import (
    TRAINED,
    PromptForm,
    answer_row,
    encode,
    form_of,
    render,
    starting_form,
    template_that_asks,
    turn_end,
    up_to_content,
    without_opening,
)
from llm_jepa.lm.rows import parse_row

ASKED = [{"role": "user", "content": "the word dog"}]
# The tokenizer joins the space with the first word of an answer, so the generation prompt is no start of the row.
HEADED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m.role == 'assistant' %}Answer: {% endif %}{{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def form_of_texts(tokenizer, *rows):
    parsed = [parse_row({"prompt": prompt, "completion": completion}, "a row") for prompt, completion in rows]
    return starting_form(parsed, tokenizer)


def answer_text(tokenizer, prompt, answer, form):
    row = answer_row(tokenizer, prompt, answer, form, "a row")
    return tokenizer.decode(row.ids)


# -- in a model's config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [{"tools": [{"type": "function", "function": {"name": "f", "a": 1}}]}, {"dtype": ["a"], "b": {"dtype": 7}}],
)
def test_template_arguments_come_back_as_they_were(kwargs, tmp_path):
    """transformers sorts the keys of a config, and a template writes them in their order; it also rewrites dtypes."""
    config = LlamaConfig(llm_jepa={"prompt": PromptForm(format="messages", render_kwargs=kwargs).to_dict()})
    config.save_pretrained(tmp_path)
    assert json.dumps(form_of(AutoConfig.from_pretrained(tmp_path)).render_kwargs) == json.dumps(kwargs)


# -- the space in front of an answer ----------------------------------------------------------------------------------


def test_one_row_does_not_decide_about_the_space(tokenizer):
    usual, odd, other = ("the word:", " dog"), ("the word:", "dog"), ("the word: ", "dog")
    for rows in ([odd, usual, usual], [usual, usual, odd], [other, usual, usual], [usual, usual, other]):
        form = form_of_texts(tokenizer, *rows)
        assert answer_text(tokenizer, "the word:", "red", form) == "the word: red", rows


@pytest.mark.parametrize(
    "trained, prompt, text",
    [
        ([("the word=", "dog")], "the word=", "the word=red"),
        ([("the word: ", "dog")], "the word: ", "the word: red"),
        ([("the word: ", "dog")], "the word:", "the word: red"),
        ([("the word:", " dog")], "the word: ", "the word: red"),
        ([("the word\n", " dog")], "the word\n", "the word\n red"),
        ([("the word:\n", "dog"), ("the word:", " dog")], "the word:\n", "the word:\nred"),
    ],
)
def test_an_answer_stands_where_it_was_trained(trained, prompt, text, tokenizer):
    assert answer_text(tokenizer, prompt, "red", form_of_texts(tokenizer, *trained)) == text


# -- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["", "\n\n", "  ", "{{ bos_token }}\n"])
def test_the_template_that_asks_changes_no_row(start, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = start + HEADED
    row = [*ASKED, {"role": "assistant", "content": "red"}]
    trained, asked = render(tokenizer, row, {}, ""), up_to_content(tokenizer, ASKED, {}, "")
    for _ in ("first training", "second training"):
        tokenizer.chat_template = template_that_asks(tokenizer, [ASKED])
        assert render(tokenizer, row, {}, "") == trained
        assert render(tokenizer, ASKED, {}, "", generation_prompt=True) == asked


def test_a_tokenizer_with_several_templates(tokenizer, tmp_path):
    one, several = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    several.chat_template = {"default": one.chat_template, "tool_use": one.chat_template}
    several.save_pretrained(tmp_path)
    several = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(several.chat_template, dict)
    assert turn_end(several) == turn_end(one)
    assert encode(several, [ASKED], TRAINED) == encode(one, [ASKED], TRAINED)
    assert without_opening(several, [5, 6]) == [5, 6]
    assert template_that_asks(several, [ASKED]) is None
