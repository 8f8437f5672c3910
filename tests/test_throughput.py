"""Claims about decoding many prompts: rows put aside say what they would alone, cost fewer steps, and the benchmark
compares two ways to the same texts."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_model
from test_generation import as_generation, messages, one_by_one, prompt_ids, stopping_model, table_model

from eval import throughput
from llm_jepa.from_scratch import train_tokenizer
from llm_jepa.generation import generate

WORDS = ["lines", "words", "digit", "vowel", "dog", "truck", "ring"]
PROMPTS = [f"{a} with {b}" for a in WORDS for b in WORDS]  # 49


def counting_rows(model):
    """Rows of each forward pass."""
    rows = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    return rows


def test_slow_rows_are_put_aside_and_finished_together():
    """From y, y for ever; from a, an end. Three batches of 16, one slow row each, 40 tokens of room. Each batch is left
    after 2 steps (half ends after 1), and one batch of three rows goes on: 38 steps instead of 3 x 40."""
    letters = train_tokenizer([{"prompt": "x", "completion": "y"}], 261)
    model = table_model(letters, {"a": "<|end|>"})
    prompts = ["y" if i % 16 == 5 else "a" for i in range(48)]
    rows = counting_rows(model)
    answers = generate(model, letters, prompts, max_new_tokens=40, batch_size=16)
    assert rows == [16] * 6 + [3] * 38
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == (("y" * 40, False, 40) if prompt == "y" else ("", True, 1))


def test_no_row_is_put_aside_while_many_go_on():
    """Three slow rows of 16 are more than an eighth, so their batch goes on to its 20th token; two are put aside."""
    letters = train_tokenizer([{"prompt": "x", "completion": "y"}], 261)
    model = table_model(letters, {"a": "<|end|>"})
    for slow, expected in ((3, [16] * 20 + [16]), (2, [16] * 2 + [16] + [2] * 18)):
        rows = counting_rows(model)
        prompts = ["y"] * slow + ["a"] * (32 - slow)  # equal lengths: the order stays
        generate(model, letters, prompts, max_new_tokens=20, batch_size=16)
        assert rows == expected
        model._forward_pre_hooks.clear()
        model._forward_pre_hooks_with_kwargs.clear()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_rows_put_aside_say_what_they_would_alone(family, tokenizer):
    """Against argmax without padding, cache and batch, in float64. Two long answers among thirty short ones, of prompts
    of several lengths, begin in one batch and end in another."""
    model = stopping_model(tokenizer, family, 12)
    everything = [messages(text) for text in PROMPTS]
    alone = [as_generation(tokenizer, *answer) for answer in one_by_one(model, tokenizer, everything, 12)]
    by_length = sorted(range(len(alone)), key=lambda i: -len(prompt_ids(tokenizer, everything[i])))
    long = [i for i in by_length if alone[i].num_tokens == 12][:2]
    short = [i for i in by_length if alone[i].num_tokens <= 5]
    short = [i for i in short if by_length.index(i) > by_length.index(long[1])] or short
    chosen = long + [short[i % len(short)] for i in range(30)]
    assert len({len(prompt_ids(tokenizer, everything[i])) for i in chosen}) > 2
    rows = counting_rows(model)
    answers = generate(model, tokenizer, [everything[i] for i in chosen], max_new_tokens=12, batch_size=16)
    assert answers == [alone[i] for i in chosen]
    assert 2 in rows and len(rows) < 12 + 5 + 12, "no row was put aside"


def test_the_benchmark_compares_two_ways_to_the_same_texts(tokenizer):
    model = tiny_model(tokenizer, "llama", torch.float64).eval()
    prompts = [messages(text) for text in PROMPTS]
    texts = throughput.one_by_one(model, tokenizer, prompts[:3], 6)
    assert texts == [answer.text for answer in generate(model, tokenizer, prompts[:3], max_new_tokens=6)]
    found = throughput.measure(model, tokenizer, prompts, repetitions=2, batch_size=16, max_new_tokens=6)
    assert found["equal_texts"] == found["compared_texts"] == 7 and found["prompts"] == 49
    assert len(found["ratios"]) == 2 and all(ratio > 0 for ratio in found["ratios"])
    json.dumps(found)


def test_a_folder_without_nl_rx_is_one_line(tmp_path, capsys):
    assert throughput.main(["--quick", "--data", str(tmp_path), "--out", str(tmp_path / "o.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
