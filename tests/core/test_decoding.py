"""No field of a checkpoint's generation config changes what is decoded."""

import pytest
import torch
from transformers import GenerationConfig

from llm_jepa.core.decoding import generate_as_asked, suppressed_ids
from llm_jepa.core.diagnostics import evaluating
from tests.conftest import tiny_model

LENGTH = 8
# Values of other types; every field that is not here is set to 3.
ODD = {
    "early_stopping": "never", "max_time": 1e-9, "stop_strings": ["a", "b"], "do_sample": True, "use_mtp": True,
    "use_cache": False, "cache_implementation": "static", "cache_config": {"backend": "quanto"}, "temperature": 9.0,
    "top_p": 0.5, "min_p": 0.5, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5,
    "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0, "length_penalty": 9.0, "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(160, 320)], "renormalize_logits": True, "remove_invalid_values": True,
    "exponential_decay_length_penalty": [1, 9.0], "begin_suppress_tokens": list(range(160, 320)),
    "sequence_bias": [[[5], 99.0]], "token_healing": True, "guidance_scale": 9.0,
    "watermarking_config": {"bias": 99.0}, "output_attentions": True, "output_hidden_states": True,
    "output_scores": True, "output_logits": True, "return_dict_in_generate": True, "is_assistant": True,
    "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.5, "compile_config": {},
    "disable_compile": True, "continuous_batching_config": {}, "low_memory": True, "penalty_alpha": 0.5,
    "dola_layers": "high", "diversity_penalty": 0.5, "constraints": [1], "force_words_ids": [[1]],
    "suppress_tokens": [-1, 10**6], "eos_token_id": list(range(320)), "speculation_type": "mtp",
}  # fmt: skip
BOOKKEEPING = {"_from_model_config", "transformers_version", "_commit_hash", "_original_object_hash", "_mask_length"}
FIELDS = sorted(set(vars(GenerationConfig())) - BOOKKEEPING)


@pytest.fixture(scope="module")
def model(rows):
    from llm_jepa.lm.from_scratch import train_tokenizer

    torch.manual_seed(0)
    model = tiny_model(train_tokenizer(rows, 320), initializer_range=0.3)
    model.train()
    return model


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(10, 300, (3, 9), generator=torch.Generator().manual_seed(1))


def greedy(model, prompts, never=()):
    """One token after another, by argmax, without `generate` and without a cache."""
    ids = prompts
    with torch.no_grad(), evaluating(model):
        for _ in range(LENGTH):
            logits = model(ids).logits[:, -1].clone()
            logits[:, list(never)] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def decode(model, prompts):
    decoding = GenerationConfig(max_new_tokens=LENGTH, pad_token_id=0, suppress_tokens=suppressed_ids(model) or None)
    with torch.no_grad(), evaluating(model):
        return generate_as_asked(model, decoding, input_ids=prompts, attention_mask=torch.ones_like(prompts))


@pytest.mark.parametrize("field", [*FIELDS, "a_field_of_a_model"])
def test_an_odd_field_changes_nothing(field, model, prompts):
    expected = greedy(model, prompts)
    own = model.generation_config
    model.generation_config = GenerationConfig()
    setattr(model.generation_config, field, ODD.get(field, 3))
    try:
        assert torch.equal(decode(model, prompts), expected)
        assert getattr(model.generation_config, field) == ODD.get(field, 3), "the model did not get its own back"
    finally:
        model.generation_config = own


def test_all_of_them_at_once(model, prompts):
    expected = greedy(model, prompts)
    own = model.generation_config
    model.generation_config = GenerationConfig()
    for field in FIELDS:
        setattr(model.generation_config, field, ODD.get(field, 3))
    try:
        assert torch.equal(decode(model, prompts), expected)
    finally:
        model.generation_config = own


def test_suppressed_tokens_are_kept(model, prompts):
    """The first choice of the first row is suppressed, so the second choice comes; ids out of range are left out."""
    first = int(greedy(model, prompts)[0, 9])
    model.generation_config.suppress_tokens = [first, 10**6]
    try:
        assert suppressed_ids(model) == [first]
        assert torch.equal(decode(model, prompts), greedy(model, prompts, never=[first]))
    finally:
        model.generation_config.suppress_tokens = None


def test_stop_strings_are_one_line(model, prompts, monkeypatch):
    from llm_jepa.core import decoding

    said = []
    monkeypatch.setattr(decoding.logger, "warning_once", said.append)
    decode(model, prompts)
    assert not said
    model.generation_config.stop_strings = ["\nQ:"]
    try:
        decode(model, prompts)
    finally:
        model.generation_config.stop_strings = None
    assert len(said) == 1 and repr(["\nQ:"]) in said[0]


def test_the_models_own_config_comes_back_after_an_error(model, prompts):
    own = model.generation_config
    with pytest.raises(Exception, match="no_such_input"):
        generate_as_asked(model, GenerationConfig(max_new_tokens=1), input_ids=prompts, no_such_input=1)
    assert model.generation_config is own
