"""Reranking and abstention: scores against hand-worked ones, log-probabilities against the model's own loss."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from eval.experiments.reranking import contrastive_head, embedded, log_probabilities, rerank, risk_coverage, sample
from llm_jepa import generate
from llm_jepa.lm.batching import JEPACollator
from llm_jepa.lm.from_scratch import random_model, train_tokenizer
from llm_jepa.lm.predictor_tokens import add_predictor_tokens, known_predictor_ids
from llm_jepa.lm.views import add_view_columns
from llm_jepa.synthetic import nl_rx
from tests.conftest import LLAMA


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = train_tokenizer(nl_rx.generate(40), 400)
    model = random_model(dict(LLAMA), tokenizer, seed=0)
    add_predictor_tokens(model, tokenizer, 1)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model.eval(), tokenizer


def test_risk_coverage_worked_by_hand():
    """Best first: right, wrong, right, wrong. Errors at coverages 1/4 .. 1: 0, 1/2, 1/3, 1/2."""
    found = risk_coverage([0.9, 0.1, 0.5, 0.7], [True, False, True, False])
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found["accuracy_at_half"] == pytest.approx(0.5)
    assert risk_coverage([4, 3, 2, 1], [True, True, False, False])["accuracy_at_half"] == 1.0


@pytest.mark.parametrize("correct", [[True, False, False], [False, False, True]])
def test_equal_scores_say_nothing_whatever_their_order(correct):
    assert risk_coverage([1.0, 1.0, 1.0], correct)["aurc"] == pytest.approx(2 / 3)


def test_rerank_takes_the_best_of_each_group():
    assert rerank([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]], [[False, True], [False, True], [True, False]]) == 2 / 3


def test_log_probability_is_minus_the_loss_of_the_completion_alone(model_and_tokenizer):
    """Row by row through the model's own loss."""
    model, tokenizer = model_and_tokenizer
    views = [add_view_columns(row, i, tokenizer=tokenizer) for i, row in enumerate(nl_rx.generate(5))]
    found = log_probabilities(model, views, tokenizer.pad_token_id)
    for view, value in zip(views, found, strict=True):
        logits = model(torch.tensor([view["input_ids"]])).logits[0, :-1]
        loss = F.cross_entropy(logits, torch.tensor(view["labels"])[1:], ignore_index=-100)
        assert float(value) == pytest.approx(-float(loss.detach()), rel=1e-4)


def test_samples_repeat_with_the_seed_vary_without_it_and_follow_the_model(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts = [row["messages"][:-1] for row in nl_rx.generate(3)]
    options = {"num_samples": 4, "max_new_tokens": 6}
    first = sample(model, tokenizer, prompts, seed=0, **options)
    assert first == sample(model, tokenizer, prompts, seed=0, **options)
    assert first != sample(model, tokenizer, prompts, seed=1, **options)
    assert [len(group) for group in first] == [4, 4, 4]
    with torch.no_grad():  # so sure of itself that sampling is greedy decoding
        kept = model.lm_head.weight.detach().clone()
        model.lm_head.weight.mul_(1000)
        try:
            sure = sample(model, tokenizer, prompts, seed=0, **options)
            greedy = generate(model, tokenizer, prompts, max_new_tokens=6)
        finally:
            model.lm_head.weight.copy_(kept)
    assert sure == [[g.text] * 4 for g in greedy]


def test_what_a_checkpoint_asks_of_decoding_is_not_done_and_its_mode_is_put_back(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts = [row["messages"][:-1] for row in nl_rx.generate(2)]
    plain = sample(model, tokenizer, prompts, num_samples=2, max_new_tokens=6, seed=0)
    model.generation_config.repetition_penalty = 50.0
    model.train()
    try:
        assert sample(model, tokenizer, prompts, num_samples=2, max_new_tokens=6, seed=0) == plain
        assert model.training
    finally:
        model.generation_config.repetition_penalty = 1.0
        model.eval()


def test_samples_are_drawn_at_temperature_one_from_all_tokens(model_and_tokenizer):
    """First tokens of 3,000 samples against the softmax: in total variation, where temperature 0.5 is far off."""
    model, tokenizer = model_and_tokenizer
    prompt = nl_rx.generate(1)[0]["messages"][:-1]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1]
    logits[known_predictor_ids(tokenizer)] = -torch.inf

    def texts(temperature: float) -> Counter:
        probability: Counter = Counter()
        for token, p in enumerate((logits / temperature).softmax(-1).tolist()):
            probability[tokenizer.decode([token], skip_special_tokens=True).strip()] += p
        return probability

    found = Counter(sample(model, tokenizer, [prompt], num_samples=3000, max_new_tokens=1, seed=0)[0])
    apart = {t: sum(abs(found[k] / 3000 - p) for k, p in texts(t).items()) / 2 for t in (0.5, 1.0, 2.0)}
    assert apart[1.0] < 0.7 * min(apart[0.5], apart[2.0]), apart


def test_a_head_finds_a_linear_relation_that_cosine_does_not_see():
    torch.manual_seed(0)
    predicted = torch.randn(600, 16)
    target = predicted @ torch.linalg.qr(torch.randn(16, 16)).Q
    head = contrastive_head(predicted[:500], target[:500], torch.arange(500), dim=16, steps=200)

    def recall(similarity) -> float:
        one, other = predicted[500:], target[500:]
        picks = torch.stack([similarity(row.expand(100, -1), other) for row in one]).argmax(dim=1)
        return (picks == torch.arange(100)).float().mean().item()

    assert recall(F.cosine_similarity) < 0.1
    assert recall(head) > 0.9


def test_embeddings_do_not_depend_on_the_batch(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    views = [add_view_columns(row, i, tokenizer=tokenizer) for i, row in enumerate(nl_rx.generate(7))]
    collator = JEPACollator(tokenizer.pad_token_id, known_predictor_ids(tokenizer))
    together = embedded(model, views, collator)
    alone = [torch.cat(side) for side in zip(*(embedded(model, [view], collator) for view in views), strict=True)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
