"""Claims about decoding many prompts: rows put aside, and prompts that share a prefix, say what they would alone; and
the benchmark compares two ways to the same texts."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from eval.cost import throughput
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.lm.inference import _shared_prefix, encode, generate
from tests.conftest import family_model, tiny_model
from tests.lm.test_inference import as_generation, messages, one_by_one, prompt_ids, stopping_model, table_model

WORDS = ["lines", "words", "digit", "vowel", "dog", "truck", "ring"]
PROMPTS = [f"{a} with {b}" for a in WORDS for b in WORDS]  # 49


@pytest.fixture
def letters():
    """No merges: every letter is a token of its own."""
    return train_tokenizer([{"prompt": "x", "completion": "y"}], 261)


def counting_rows(model):
    """Rows of each forward pass."""
    rows = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    return rows


def test_slow_rows_are_put_aside_and_finished_together(letters):
    """From y, y for ever; from a, an end. Three batches of 16, one slow row each, 40 tokens of room. Each batch is left
    after 2 steps (half ends after 1), and one batch of three rows goes on: 38 steps instead of 3 x 40."""
    model = table_model(letters, {"a": "<|end|>"})
    prompts = ["y" if i % 16 == 5 else "a" for i in range(48)]
    rows = counting_rows(model)
    answers = generate(model, letters, prompts, max_new_tokens=40, batch_size=16)
    assert rows == [16] * 6 + [3] * 38
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == (("y" * 40, False, 40) if prompt == "y" else ("", True, 1))


def test_no_row_is_put_aside_while_many_go_on(letters):
    """Three slow rows of 16 are more than an eighth, so their batch goes on to its 20th token; two are put aside."""
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


SYSTEM = {"role": "system", "content": "Convert natural language to regular expression, please."}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "cohere", "deepseek_v3"])
def test_a_prefix_that_all_prompts_share_is_read_once(family, tokenizer):
    """In batches of 4 and 2, prompts of five lengths, each as alone, where nothing is shared; float64."""
    model = family_model(tokenizer, family)
    prompts = [[SYSTEM, *messages(text)] for text in (*PROMPTS[:4], "a line that has a dog or a truck", "b")]
    lengths = [len(prompt_ids(tokenizer, prompt)) for prompt in prompts]
    assert len(set(lengths)) > 3
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert alone == [as_generation(tokenizer, *answer) for answer in one_by_one(model, tokenizer, prompts, 8)]
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    assert generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=4) == alone
    (one, shared), *others = [shape for shape in shapes if shape[1] > 1]
    assert one == 1 and shared >= 8
    assert others == [(4, max(lengths) - shared), (2, sorted(lengths)[1] - shared)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_that_have_ended_are_dropped(family, tokenizer):
    """40 of 128 rows go on to the end, and the batch gets smaller when 64 have ended. Each answer is that of its prompt
    alone; float64."""
    model = tiny_model(tokenizer, family, torch.float64, tie_word_embeddings=False).eval()
    everything = [[SYSTEM, *messages(text)] for text in PROMPTS]
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # eos gets a copy, a bit longer, of the row of a token that some answers hold
        picked = [new for new, _ in one_by_one(model, tokenizer, everything, 12)]
        counts = Counter(token for new in picked for token in set(new))
        head[tokenizer.eos_token_id] = head[min(counts, key=lambda token: abs(counts[token] - 24))] * 1.01
    alone = [as_generation(tokenizer, *answer) for answer in one_by_one(model, tokenizer, everything, 12)]
    long = [i for i in range(49) if alone[i].num_tokens == 12]
    short = [i for i in range(49) if alone[i].num_tokens < 12]
    chosen = [(part := long if n % 16 < 5 else short)[n % len(part)] for n in range(128)]
    rows = counting_rows(model)
    answers = generate(model, tokenizer, [everything[i] for i in chosen], max_new_tokens=12, batch_size=128)
    assert answers == [alone[i] for i in chosen]
    assert rows[:2] == [1, 128] and 40 <= rows[-1] <= 64 and len(rows) == 13, rows


def test_how_far_a_batch_shrinks(letters):
    """From a, b, c, an end: 128 rows, of which 70 end after one step, 18 after three, 40 never. The 58 that go on are a
    batch of their own, and the 40 are too many of them to be another."""
    model = table_model(letters, {"a": "b", "b": "c", "c": "<|end|>"})
    prompts = ["x" * 9 + ("c" if n < 70 else "a" if n < 88 else "y") for n in range(128)]
    rows = counting_rows(model)
    answers = generate(model, letters, prompts, max_new_tokens=10, batch_size=128)
    assert [answer.num_tokens for answer in answers] == [1] * 70 + [3] * 18 + [10] * 40
    assert rows == [1, 128] + [58] * 9


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "bloom", "mamba2", "recurrent_gemma", "falcon"])
def test_no_prefix_is_shared_where_padding_behind_it_would_count(family, tokenizer):
    """Learned positions, windows, ALiBi, recurrence: as before, without a shared prefix."""
    model = family_model(tokenizer, family, **({"alibi": True} if family == "falcon" else {}))
    encoded = encode(tokenizer, [[SYSTEM, *messages(text)] for text in PROMPTS[:3]])
    assert _shared_prefix(model, encoded) == (0, None)


def test_a_prompt_that_begins_another_is_not_read_away(letters):
    """`a a a a a a a a a` is all of the first prompt and the beginning of the second: its last token is still read."""
    model = table_model(letters, {"a": "b", "b": "c", "c": "<|end|>"})
    answers = generate(model, letters, ["a" * 9, "a" * 9 + "b", "a" * 20], max_new_tokens=4, batch_size=3)
    assert [answer.text for answer in answers] == ["bc", "c", "bc"]


def test_the_benchmark_compares_two_ways_to_the_same_texts(tokenizer):
    model = tiny_model(tokenizer, "llama", torch.float64).eval()
    prompts = [messages(text) for text in PROMPTS]
    texts = throughput.one_by_one(model, tokenizer, prompts[:3], 6)
    assert texts == [answer.text for answer in generate(model, tokenizer, prompts[:3], max_new_tokens=6)]
    found, batched = throughput.measure(model, tokenizer, prompts, repetitions=2, batch_size=16, max_new_tokens=6)
    assert found["equal_texts"] == found["compared_texts"] == 7 + 6 and found["prompts"] == 49 == len(batched)
    assert batched[:3] == texts
    assert len(found["ratios"]) == 2 and all(ratio > 0 for ratio in found["ratios"])
    json.dumps(found)
    model.generation_config.repetition_penalty = 9.0  # the published evaluator follows it, ours does not
    other, _ = throughput.measure(model, tokenizer, prompts, repetitions=1, batch_size=16, max_new_tokens=6)
    assert other["equal_texts"] < other["compared_texts"] == 7


def test_the_benchmark_of_a_model_folder(tokenizer, tmp_path, capsys):
    """Both dtypes; each counts the texts that are those of one prompt at a time, and those of float32."""
    tiny_model(tokenizer, "llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "o.json"
    assert throughput.main(["--quick", "--model", str(tmp_path / "model"), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["model"] == "model" and len(result["weights_sha256"]) == 64
    assert result["float32"]["equal_texts"] == result["float32"]["compared_texts"] == 8
    assert result["float32"]["equal_to_float32"] == 64 >= result["bfloat16"]["equal_to_float32"]
    assert set(result["summary"]) == {"float32", "bfloat16"} and capsys.readouterr().out.count("as one by one") == 2


def test_a_folder_without_nl_rx_is_one_line(tmp_path, capsys):
    assert throughput.main(["--quick", "--data", str(tmp_path), "--out", str(tmp_path / "o.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
