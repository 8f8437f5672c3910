"""What a model cannot read is one line with a count at every door; answers end where its positions do."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_jepa import UserError
from llm_jepa.lm import choose_batches, generate, inference
from llm_jepa.lm.inference import generate_batches
from llm_jepa.lm.limits import check_lengths, check_tokens, check_views, position_limit
from tests.conftest import MORE_FAMILIES, tiny_model

LIMIT = 24


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return tiny_model(tokenizer, "gpt2", n_positions=LIMIT, initializer_range=0.3).eval()


def greedy(model, ids, steps):
    """Argmax, one token after another, without a cache; ends at the last position."""
    new = []
    with torch.no_grad():
        while len(new) < steps and len(ids) + len(new) <= LIMIT:
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_end_where_the_positions_do(batch_size, model, tokenizer, monkeypatch):
    """A prompt of n tokens has LIMIT + 1 - n answer tokens, because the last one is not read. A long prompt in the same
    batch must not shorten the answer to a short one."""
    said = []
    monkeypatch.setattr(inference.logger, "warning", said.append)
    lengths = [24, 20, 19, 18, 5, 3]
    encoded = [[5 + (7 * i + n) % 300 for i in range(n)] for n in lengths]
    results = {}
    for batch in generate_batches(model, tokenizer, encoded, max_new_tokens=6, batch_size=batch_size):
        results.update(batch)
    for index, ids in enumerate(encoded):
        expected = greedy(model, ids, 6)
        assert tokenizer.eos_token_id not in expected, "it ends early: this would prove nothing"
        assert results[index].num_tokens == len(expected) == min(6, LIMIT + 1 - len(ids))
        assert results[index].text == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert not results[index].stopped
    assert len(said) == 1 and "2 of 6 prompts" in said[0] and "max_new_tokens=6" in said[0]


def test_prompts_beyond_the_positions_are_counted(model, tokenizer):
    prompts = ["a b c d e f g h i j k l m n", "a"]
    long = [prompts[0] * 4, "a", prompts[0] * 5]
    with pytest.raises(UserError, match=r"2 of 3 prompts are longer than the 24 positions .*the longest: \d+ tokens"):
        generate(model, tokenizer, long, max_new_tokens=2)


def test_a_prompt_with_its_choice_must_fit(model, tokenizer):
    prompts = ["?" * (LIMIT - 1)]  # a token each
    assert len(tokenizer(prompts[0])["input_ids"]) == LIMIT - 1
    (fits,) = choose_batches(model, tokenizer, prompts, [["a"]], batch_size=2)
    assert fits[0].log_likelihoods[0] < 0
    with pytest.raises(UserError, match="1 of 2 prompts with a choice are longer"):
        list(choose_batches(model, tokenizer, prompts, [["a", "a b c"]], batch_size=2))


def test_a_token_without_a_row_is_one_line(tokenizer):
    model = tiny_model(tokenizer)
    tokenizer.add_tokens(["<call>"])
    said = "hold the token 320, but the model has rows for 320 tokens"
    with pytest.raises(UserError, match=said):
        generate(model, tokenizer, ["lines", "<call>"])
    with pytest.raises(UserError, match=said):
        list(choose_batches(model, tokenizer, ["lines"], [["a", "<call>"]], batch_size=2))
    assert generate(model, tokenizer, ["lines"], max_new_tokens=2)


def test_views_count_with_their_longest_sequence_and_the_predictor_tokens():
    """Rows of 8 (LM row), 6 + 3 (context with predictors), 10 (target) at 9 positions: the third is too long."""
    config = AutoConfig.for_model("gpt2", n_positions=9)
    rows = []
    for lm, context, target in ((8, 2, 2), (5, 6, 2), (5, 2, 10)):
        rows.append({"input_ids": [0] * lm, "contexts": [[0] * context], "targets": [[0] * target]})
    check_views(config, rows[:2], "rows", 3, "")
    with pytest.raises(UserError, match=r"1 of 3 rows .* 9 positions .*10 tokens\); cut at 6"):
        check_views(config, rows, "rows", 3, "cut at {room}")
    with pytest.raises(UserError, match="1 of 2 rows"):
        check_views(config, rows[:2], "rows", 4, "")


def test_no_sequences_are_fine():
    config = AutoConfig.for_model("gpt2")
    check_lengths(config, [], "rows", "")
    check_tokens(config, [[]], "rows")


@pytest.mark.parametrize("family", ["gpt2", "opt", "biogpt", "gpt_neo"])
def test_a_table_of_positions_ends(family, tokenizer):
    """And the model really fails there, so the limit is not too low."""
    from tests.conftest import family_model

    options = {"n_positions": 16} if family == "gpt2" else {"max_position_embeddings": 16}
    model = family_model(tokenizer, family, torch.float32, **options)
    assert position_limit(model.config) == 16
    model(torch.tensor([list(range(5, 21))]))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([list(range(5, 22))]))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_neox", "bloom", "mamba2"])
def test_computed_positions_do_not_end(family):
    assert position_limit(AutoConfig.for_model(family, **MORE_FAMILIES[family])) is None


SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "family, options",
    [
        ("jamba", {**MORE_FAMILIES["jamba"], "max_position_embeddings": 16}),
        ("nemotron_h", {**SMALL, "num_key_value_heads": 4, "layers_block_type": ["mamba", "attention", "mamba"],
                        "mamba_num_heads": 4, "mamba_head_dim": 16, "head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
                        "chunk_size": 8}),
        ("zamba", {**SMALL, "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2,
                   "num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_d_state": 8}),
        ("rwkv", {**MORE_FAMILIES["rwkv"], "context_length": 16}),
        ("xglm", {"vocab_size": 320, "d_model": 32, "ffn_dim": 32, "num_layers": 1, "attention_heads": 4,
                  "max_position_embeddings": 16}),
        ("xlnet", {"vocab_size": 320, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 32}),
    ],
)  # fmt: skip
def test_a_stated_number_of_positions_is_no_limit_without_a_table(family, options):
    config = AutoConfig.for_model(family, **options)
    assert position_limit(config) is None
    AutoModelForCausalLM.from_config(config)(torch.tensor([list(range(5, 45))]))
