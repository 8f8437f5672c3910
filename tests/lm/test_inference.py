"""Claims about decoding: a batch says what each prompt alone would, and stops where the template ends a turn.

The reference is an argmax loop without padding, cache or batch. Where the answer must be known beforehand, the model is
a table: attention and MLP are silenced and the head maps every token to the one that follows it.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from llm_jepa.core.errors import UserError
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.lm.inference import Generation, generate
from llm_jepa.lm.predictor_tokens import add_predictor_tokens
from llm_jepa.lm.prompts import end_of_turn_ids
from tests.conftest import FAMILIES, tiny_model

PROMPTS = ["lines", "words that have a digit", "a", "the lines with the word dog at least twice or more", "b or not"]


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def prompt_ids(tokenizer, prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]


@torch.no_grad()
def one_by_one(model, tokenizer, prompts, max_new_tokens, never=()) -> list[tuple[list[int], bool]]:
    """Token ids and whether a stop token ended them."""
    stops, results = end_of_turn_ids(tokenizer), []
    for prompt in prompts:
        ids, new = prompt_ids(tokenizer, prompt), []
        while len(new) < max_new_tokens and not (new and new[-1] in stops):
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].clone()
            logits[list(never)] = -torch.inf
            new.append(int(logits.argmax()))
        results.append((new, new[-1] in stops))
    return results


def as_generation(tokenizer, new: list[int], stopped: bool) -> Generation:
    return Generation(tokenizer.decode(new, skip_special_tokens=True).strip(), stopped, len(new))


def stopping_model(tokenizer, family: str, max_new_tokens: int, **options) -> PreTrainedModel:
    """A random model in float64 that ends some answers: eos gets a copy, a bit longer, of a head row it often picks."""
    model = tiny_model(tokenizer, family, torch.float64, tie_word_embeddings=False, **options).eval()
    picked = [new for new, _ in one_by_one(model, tokenizer, map(messages, PROMPTS), max_new_tokens)]
    head, eos = model.get_output_embeddings().weight, tokenizer.eos_token_id
    with torch.no_grad():
        head[eos] = head[picked[0][3]] * 1.01
    ends = one_by_one(model, tokenizer, map(messages, PROMPTS), max_new_tokens)
    assert len({len(new) for new, _ in ends}) > 1, "all answers have one length"
    assert {stopped for _, stopped in ends} == {True, False}, "not both endings occur"
    return model


def table_model(tokenizer, follows: dict[str, str]) -> PreTrainedModel:
    """A Llama whose next token depends on the last one alone: `follows`, else the token itself again."""
    size = -(-len(tokenizer) // 8) * 8
    model = tiny_model(
        tokenizer, hidden_size=size, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    table = {tokenizer.convert_tokens_to_ids(a): tokenizer.convert_tokens_to_ids(b) for a, b in follows.items()}
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
        for silenced in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            silenced.weight.zero_()
        model.lm_head.weight.zero_()
        for token in range(len(tokenizer)):
            model.lm_head.weight[table.get(token, token), token] = 1.0
    return model.eval()


@pytest.fixture
def letters() -> PreTrainedTokenizerFast:
    """No merges: every letter is a token of its own."""
    return train_tokenizer([{"prompt": "x", "completion": "y"}], 261)


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_messages", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_batch_says_what_each_prompt_alone_would(family, as_messages, tokenizer):
    """Unequal prompts in batches of 1, 2 and 5, in the order given, against argmax without padding and cache."""
    model = stopping_model(tokenizer, family, 8)
    prompts = [messages(text) for text in PROMPTS] if as_messages else PROMPTS
    assert len({len(prompt_ids(tokenizer, prompt)) for prompt in prompts}) == len(prompts)
    expected = [as_generation(tokenizer, *answer) for answer in one_by_one(model, tokenizer, prompts, 8)]
    assert len({answer.text for answer in expected}) > 2, "one answer to everything would hide a wrong order"
    for batch_size in (1, 2, 5):
        assert generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=batch_size) == expected
    back = generate(model, tokenizer, prompts[::-1], max_new_tokens=8, batch_size=2)
    assert back == expected[::-1]


@pytest.mark.parametrize("pad", ["left", "right", "none", "own token"])
def test_padding_settings_change_nothing(pad, tokenizer):
    model = stopping_model(tokenizer, "llama", 8)
    prompts = [messages(text) for text in PROMPTS]
    expected = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=3)
    changed = copy.deepcopy(tokenizer)
    if pad in ("left", "right"):
        changed.padding_side = pad
    else:
        changed.pad_token = None if pad == "none" else "a"
    assert generate(model, changed, prompts, max_new_tokens=8, batch_size=3) == expected


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.5},  # Qwen2.5-Instruct ships 1.05 to 1.1
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 8},
        {"bad_words_ids": [[token] for token in range(160, 320)]},
        {"begin_suppress_tokens": list(range(160, 320))},
        {"do_sample": True, "temperature": 9.0, "top_k": 0},
        {"num_beams": 4},
        {"max_length": 4},
        {"use_cache": False},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_decoding_is_greedy_whatever_the_checkpoint_prefers(setting, tokenizer):
    """A score must not depend on the advice in a generation_config.json."""
    model = stopping_model(tokenizer, "llama", 8)
    prompts = [messages(text) for text in PROMPTS]
    plain = one_by_one(model, tokenizer, prompts, 8)
    expected = [as_generation(tokenizer, *answer) for answer in plain]
    for key, value in setting.items():
        setattr(model.generation_config, key, value)
    if not {"max_length", "use_cache"} & set(setting):
        ids = [torch.tensor([prompt_ids(tokenizer, prompt)]) for prompt in prompts]
        steered = [model.generate(i, max_new_tokens=8)[0, i.shape[1] :].tolist() for i in ids]
        assert steered != [new for new, _ in plain], "the setting changes nothing here"
    for batch_size in (1, 5):
        assert generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=batch_size) == expected


def test_no_prompts_no_answers(tokenizer):
    assert generate(tiny_model(tokenizer), tokenizer, []) == []


# -- where an answer ends -----------------------------------------------------------------------------------------


def test_stopped_and_num_tokens_by_hand(letters):
    """d -> a -> b -> c -> end, z -> z. Three tokens from a: b, c, end; from d: a, b, c, the end would be a fourth."""
    model = table_model(letters, {"a": "b", "b": "c", "c": "<|end|>", "d": "a"})
    answers = generate(model, letters, ["xa", "z", "xxc", "xxxd", "b"], max_new_tokens=3, batch_size=5)
    assert answers == [
        Generation("bc", True, 3),
        Generation("zzz", False, 3),
        Generation("", True, 1),
        Generation("abc", False, 3),
        Generation("c", True, 2),
    ]
    longer = generate(model, letters, ["xxxd", "z"], max_new_tokens=4, batch_size=2)
    assert longer == [Generation("abc", True, 4), Generation("zzzz", False, 4)]


def test_end_of_turn_stops_even_if_it_is_not_eos(letters):
    """Gemma and Llama-3 close a turn with another token than eos; both end the answer, whichever comes first."""
    letters.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    letters.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    model = table_model(letters, {"a": "b", "b": "<|eot|>", "c": "d", "d": "<|end|>", "<|eot|>": "q", "<|end|>": "q"})
    model.generation_config.eos_token_id = letters.eos_token_id  # the checkpoint knows one of the two
    answers = generate(model, letters, ["a", "c", "q"], max_new_tokens=4, batch_size=3)
    assert answers == [Generation("b", True, 2), Generation("d", True, 2), Generation("qqqq", False, 4)]


def test_a_pad_token_in_an_answer_is_no_end(letters):
    """Decoding pads what has ended; a pad token that the model itself writes is content like any other."""
    letters.pad_token = "p"
    model = table_model(letters, {"a": "p", "p": "b", "b": "<|end|>"})
    answers = generate(model, letters, ["a", "xxb", "z"], max_new_tokens=4, batch_size=3)
    assert [(a.stopped, a.num_tokens) for a in answers] == [(True, 3), (True, 1), (False, 4)]


def test_a_tokenizer_without_eos_never_stops(letters):
    """No token means end, so none may end an answer: not the one that the model's config still names either."""
    model = table_model(letters, {"a": "b", "b": "<|end|>", "<|end|>": "c", "c": "d"})
    letters.eos_token = letters.pad_token = letters.chat_template = None
    assert model.generation_config.eos_token_id is not None
    (answer,) = generate(model, letters, ["a"], max_new_tokens=5)
    assert answer == Generation("bcdd", False, 5)


def test_text_has_no_special_tokens_and_no_edge_whitespace(letters):
    model = table_model(letters, {"a": "Ġ", "Ġ": "<|user|>", "<|user|>": "b", "b": "Ċ", "Ċ": "<|end|>"})
    (answer,) = generate(model, letters, ["a"], max_new_tokens=9)
    assert answer == Generation("b", True, 5)


# -- predictor tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reloaded", [False, True])
def test_predictor_tokens_are_never_generated(reloaded, tokenizer, tmp_path):
    """Their head rows are made the largest everywhere; the answers are those of the model without the tokens."""
    model = stopping_model(tokenizer, "llama", 8)
    prompts = [messages(text) for text in PROMPTS]
    before = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=2)
    predictors = add_predictor_tokens(model, tokenizer, 2)
    head = model.get_output_embeddings().weight
    stop = tokenizer.eos_token_id
    with torch.no_grad():
        often = [new[0] for new, _ in one_by_one(model, tokenizer, prompts, 1, never=predictors)]
        head[predictors[0]], head[predictors[1]] = head[often[0]] * 9, head[stop] * 9
    unmasked = one_by_one(model, tokenizer, prompts, 8)
    assert any(set(predictors) & set(new) for new, _ in unmasked), "they would not have been generated anyway"
    if reloaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=2) == before


# -- the model afterwards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", [{"cache_implementation": "static"}, {"stop_strings": ["a"]}, {"return_dict_in_generate": True}]
)
def test_a_generation_config_that_plain_generate_cannot_take(setting, tokenizer):
    model = stopping_model(tokenizer, "llama", 8)
    prompts = [messages(text) for text in PROMPTS]
    expected = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=3)
    model.generation_config.update(**setting)
    assert generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=3) == expected


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_put_back(training, tokenizer):
    """And is off while decoding: with dropout at 0.9 two runs would differ."""
    model = tiny_model(tokenizer, "gpt2", resid_pdrop=0.9, embd_pdrop=0.9)
    model.train(training)
    first = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert first == generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert model.training is training and model.transformer.drop.training is training


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_put_back_after_an_error(training, tokenizer):
    """A prompt longer than GPT-2's position table fails inside the forward pass."""
    model = tiny_model(tokenizer, "gpt2")
    model.train(training)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        generate(model, tokenizer, ["word " * 300], max_new_tokens=2)
    assert model.training is training and model.transformer.drop.training is training


def test_decoding_does_not_change_the_model(tokenizer):
    model = tiny_model(tokenizer)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    settings = model.generation_config.to_dict()
    generate(model, tokenizer, PROMPTS, max_new_tokens=3, batch_size=2)
    assert model.generation_config.to_dict() == settings
    assert all(torch.equal(p, weights[name]) and p.requires_grad for name, p in model.named_parameters())
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()


def test_decoding_with_an_adapter_keeps_the_generation_config_of_the_base_model(tokenizer):
    """PEFT's `generate` writes its own into it; merged, the model would generate its predictor tokens."""
    model = tiny_model(tokenizer)
    model.generation_config.suppress_tokens = [5, 6]
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    generate(adapted, tokenizer, PROMPTS, max_new_tokens=3)
    assert adapted.generation_config.suppress_tokens == [5, 6]
    assert adapted.merge_and_unload().generation_config.suppress_tokens == [5, 6]


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["", []], ids=["string", "messages"])
def test_an_empty_prompt_is_named(empty, tokenizer):
    with pytest.raises(UserError, match="Prompt 1 is empty"):
        generate(tiny_model(tokenizer), tokenizer, ["a", empty])


def test_messages_without_a_template_are_named(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="Prompt 1 .*no chat template"):
        generate(tiny_model(tokenizer), tokenizer, ["a", messages("b")])
