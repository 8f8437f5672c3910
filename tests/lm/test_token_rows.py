"""An added token starts from the same row in both arms and is trained in both, under LoRA too."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from llm_jepa import LLMJEPATrainer, UserError
from llm_jepa.lm import token_rows
from llm_jepa.lm.token_rows import add_missing_rows, vocabulary_size
from tests.conftest import config, tiny_model

ADDED = ["<call>", "</call>", "<unused>"]
ARMS = {"baseline": {"jepa_weight": 0.0}, "JEPA": {"jepa_weight": 1.0, "num_predictor_tokens": 2}}


@pytest.fixture
def with_calls(rows) -> Dataset:
    """Two of the three added tokens are in every prompt and completion."""
    changed = []
    for row in rows:
        question, answer = row["messages"][-2:]
        prompt = {**question, "content": f"<call> {question['content']}"}
        changed.append({"messages": [prompt, {**answer, "content": f"<call> {answer['content']} </call>"}]})
    return Dataset.from_list(changed)


@pytest.fixture
def added(tokenizer):
    """The ids of the added tokens; the tokenizer is then larger than the models made before."""
    tokenizer.add_tokens(ADDED)
    return tokenizer.convert_tokens_to_ids(ADDED)


def lora(**options):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **options})


def trainer_of(arm, model, rows, tokenizer, tmp_path, adapter=None, **options):
    args = config(tmp_path, **{**ARMS[arm], "learning_rate": 0.5, "max_steps": 2, **options})
    return LLMJEPATrainer(model, args, rows, None, tokenizer, peft_config=adapter)


def weights(trainer):
    """[V, D] of the embedding and of the head, as the model uses them."""
    model = trainer.base_model
    return torch.stack(
        [model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()]
    ).clone()


def moved(before, after):
    """The ids of the rows that moved, of the embedding and of the head."""
    return [(a - b).abs().sum(dim=1).nonzero()[:, 0].tolist() for a, b in zip(after, before, strict=True)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("with_lora", [True, False])
def test_both_arms_start_an_added_token_alike_and_train_it(with_lora, tied, with_calls, tmp_path, rows):
    from llm_jepa.lm import train_tokenizer

    starts = {}
    for arm in ARMS:
        tokenizer = train_tokenizer(rows, 320)
        model = tiny_model(tokenizer, tie_word_embeddings=tied)
        old = len(tokenizer)
        tokenizer.add_tokens(ADDED)
        call, end, unused = tokenizer.convert_tokens_to_ids(ADDED)
        trainer = trainer_of(arm, model, with_calls, tokenizer, tmp_path, lora() if with_lora else None)
        start = weights(trainer)
        starts[arm] = start[:, old : old + 3]
        trainer.train()
        embedding, head = moved(start, weights(trainer))
        predictors = set(trainer.predictor_ids)
        assert {call, end} <= set(embedding) & set(head)
        assert unused in head, "a softmax moves the row of every token that it may not choose"
        if with_lora and not tied:  # the head is frozen but for the new rows; the last token of a row is not read
            assert set(embedding) <= {call, end, unused} | predictors and predictors <= set(embedding)
            assert set(head) == {call, end, unused}
        if with_lora and tied:
            assert set(embedding) == set(head) == {call, end, unused} | predictors
    assert torch.equal(starts["baseline"], starts["JEPA"])
    assert starts["JEPA"].std() > 0


def test_new_rows_look_like_the_old_ones(tokenizer):
    """Mean and spread of 400 drawn rows, per dimension, are those of the old rows; the old rows keep their values."""
    model = tiny_model(tokenizer)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) * 0.3 + 2.0)
    old = weight.detach().clone()
    tokenizer.add_tokens([f"<{i}>" for i in range(400)])
    seed = torch.random.get_rng_state()
    new = add_missing_rows(model, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), seed), "the training seed moved"
    now = model.get_input_embeddings().weight.detach()
    assert new == list(range(320, 720)) and len(now) == 720 == vocabulary_size(tokenizer)
    assert torch.equal(now[:320], old)
    torch.testing.assert_close(now[320:].mean(0), old.mean(0), atol=0.3 * 6 / 20, rtol=0)  # 6 standard errors
    torch.testing.assert_close(now[320:].std(0), old.std(0), atol=0, rtol=0.3)
    again = now.clone()
    assert add_missing_rows(model, tokenizer) == []
    assert torch.equal(model.get_input_embeddings().weight, again)


def test_growing_is_one_line_with_the_count(tokenizer, added, monkeypatch):
    said = []
    monkeypatch.setattr(token_rows.logger, "warning", said.append)
    tokenizer.add_tokens(["<one more>"])
    add_missing_rows(tiny_model_of(320, tokenizer), tokenizer)
    assert len(said) == 1 and "4 tokens" in said[0] and "'<call>'" in said[0]
    add_missing_rows(tiny_model(tokenizer), tokenizer)
    assert len(said) == 1


def tiny_model_of(size, tokenizer):
    """A model with `size` rows, fewer than the tokenizer has."""
    model = tiny_model(tokenizer)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


TIED, UNTIED = (True,), (False,)
COLLISIONS = [
    (lora(target_modules=["q_proj", "embed_tokens"]), TIED, "embed_tokens.*also those of the head"),
    (lora(target_modules=["q_proj", "embed_tokens"]), UNTIED, "embed_tokens.*new tokens"),
    (lora(target_modules=r".*\.(q_proj|embed_tokens)"), UNTIED, "embed_tokens.*new tokens"),
    (lora(target_modules=["q_proj", "lm_head"]), (True, False), "the head, lm_head"),
    (lora(modules_to_save=["embed_tokens"]), TIED, "one tied weight"),
    (lora(modules_to_save=["lm_head"]), TIED, "one tied weight"),
    (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), (True, False),
     "IA3Config cannot train the rows"),
    (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), (True, False), "PromptTuningConfig.*use LoRA"),
    (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), (True, False), "PrefixTuningConfig.*use LoRA"),
    (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), (True, False), "PromptEncoderConfig.*use LoRA"),
]  # fmt: skip


@pytest.mark.parametrize("arm", list(ARMS))
@pytest.mark.parametrize(("adapter", "tied", "said"), COLLISIONS)
def test_an_adapter_that_collides_is_one_line_in_both_arms(
    adapter, tied, said, arm, with_calls, tokenizer, tmp_path, rows
):
    for is_tied in tied:
        model = tiny_model(tokenizer, tie_word_embeddings=is_tied)
        longer = copy.deepcopy(tokenizer)
        longer.add_tokens(ADDED)
        with pytest.raises(UserError, match=said):
            trainer_of(arm, model, with_calls, longer, tmp_path, copy.deepcopy(adapter))


@pytest.mark.parametrize(
    "adapter", [COLLISIONS[0][0], COLLISIONS[3][0], COLLISIONS[4][0], *(case[0] for case in COLLISIONS[7:])]
)
@pytest.mark.parametrize("options", [{"jepa_weight": 0.0}, {"jepa_weight": 1.0, "num_predictor_tokens": 0}])
def test_without_new_tokens_too(options, adapter, dataset, tokenizer, tmp_path):
    """Tied weights and virtual tokens do not depend on new rows."""
    model = tiny_model(tokenizer, tie_word_embeddings=True)
    with pytest.raises(UserError):
        trainer_of("baseline", model, dataset, tokenizer, tmp_path, copy.deepcopy(adapter), **options)


def test_a_head_with_a_bias_is_refused(with_calls, tokenizer, tmp_path):
    """PEFT would train its rows and forget the bias."""
    model = tiny_model(tokenizer, tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(320))
    tokenizer.add_tokens(ADDED)
    with pytest.raises(UserError, match="has a bias"):
        trainer_of("baseline", model, with_calls, tokenizer, tmp_path, lora())


WORKS = {
    "all-linear": (lora(target_modules="all-linear"), (True, False)),
    "the embedding as a whole": (lora(modules_to_save=["embed_tokens"]), UNTIED),
    "both as a whole": (lora(modules_to_save=["embed_tokens", "lm_head"]), UNTIED),
    "both as a whole, tied": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), TIED),
    "rows of the user": (lora(trainable_token_indices=[3]), (True, False)),
    "rows of the user, by the whole name": (lora(trainable_token_indices={"model.embed_tokens": [3]}), (True, False)),
    "rows of the user, of the head": (lora(trainable_token_indices={"lm_head": [3]}), (True, False)),
}


@pytest.mark.parametrize("arm", list(ARMS))
@pytest.mark.parametrize("name", list(WORKS))
def test_what_works_trains_the_new_rows_and_merges_to_what_was_trained(
    name, arm, with_calls, tokenizer, tmp_path, rows
):
    adapter, tied = WORKS[name]
    for is_tied in tied:
        model = tiny_model(tokenizer, tie_word_embeddings=is_tied)
        longer = copy.deepcopy(tokenizer)
        longer.add_tokens(ADDED)
        call = longer.convert_tokens_to_ids("<call>")
        trainer = trainer_of(arm, model, with_calls, longer, tmp_path, copy.deepcopy(adapter), learning_rate=0.1)
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        embedding, head = moved(before, after)
        assert call in embedding and (call in head or "embedding as a whole" in name)
        if "rows of the user" in name:
            assert 3 in (head if "head" in name else embedding)
        ids = torch.tensor([trainer.train_dataset[0]["input_ids"]])
        trainer.model.eval()
        with torch.no_grad():
            trained = trainer.model(ids).logits
            merged = trainer.model.merge_and_unload()
            merged.save_pretrained(tmp_path / "merged")
            again = type(merged).from_pretrained(tmp_path / "merged")
            # Rounding after two steps of 0.1 in float32; a lost row or a broken tie is off by 0.1 and more.
            torch.testing.assert_close(again(ids).logits, trained, atol=1e-4, rtol=1e-4)
