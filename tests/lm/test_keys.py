"""Claims about equality: rows that ask the same, or have the same answer, are never negatives of each other.

The loss of the trainer is compared with InfoNCE in loops over *texts* (`by_hand`), which knows nothing of keys.
"""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from llm_jepa.core.errors import UserError
from llm_jepa.core.losses import jepa_distance
from llm_jepa.lm import add_view_columns, build_views
from llm_jepa.lm.batching import JEPACollator, keys_of
from tests.conftest import EXACT, LOGGED, assert_same_weights, config, exact_model
from tests.core.test_losses import by_hand
from tests.lm.test_objective import embeddings
from tests.lm.test_trainer import history, make, run, weights


def row(prompt: str, completion: str, *, contexts=None, targets=None, target_key=None) -> dict:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return {"messages": turns, "views": {"contexts": contexts, "targets": targets}, "target_key": target_key}


# Neighbours are in one micro-batch of two, and what is equal is not.
ROWS = [
    row("lines with a", ".*a.*"),
    row("lines with b", ".*b.*", targets=["b"]),  # another wording is the answer to "a b"
    row("a vowel", "[aeiou]"),
    row("a digit", "[0-9]", target_key="digit"),
    row("lines with a", ".*a+.*"),  # a second right answer
    row("a letter e", "(.*b.*)", contexts=["with a or b"]),
    row("a b ", "b"),
    row("a number", r"\d", target_key=" digit"),  # the same language as [0-9]
    row("has b", " .*b.*"),  # one completion, but for white space
    row("with a or b", "[ab]"),  # the prompt is another wording of a row above
]


def names(rows: list[dict], direction: str) -> tuple[list[set[str]], list[set[str]]]:
    """The texts by which the context and the target of each pair are known."""
    contexts, targets = [], []
    for one in rows:
        prompts = [one["messages"][0]["content"].strip(), *(one["views"]["contexts"] or [])]
        answers = [one["messages"][1]["content"].strip(), *(one["views"]["targets"] or [])]
        of_row = answers[0] if one["target_key"] is None else f"key {one['target_key'].strip()}"
        sides = [({text, prompts[0]} for text in prompts), ({text, of_row} for text in answers)]
        sources, goals = map(list, sides if direction == "forward" else sides[::-1])
        contexts += [source for source in sources for _ in goals]
        targets += goals * len(sources)
    return contexts, targets


def loss_by_hand(trainer, model, columns: list[dict], rows: list[dict]) -> torch.Tensor:
    """[P], of pairs that are all compared with each other."""
    args = trainer.args
    predicted, target, *_ = embeddings(model, args, columns, trainer.predictor_ids)
    if args.objective == "info_nce":
        return by_hand(predicted, target, *names(rows, args.direction), args.temperature)
    return jepa_distance(predicted, target, kind=args.objective)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("target_encoder", ["self", "stop_gradient", "ema", "base"])
@pytest.mark.parametrize("objective", ["info_nce", "mse"])
def test_training_and_evaluation_know_equal_texts(direction, target_encoder, objective, tokenizer, tmp_path):
    """The first step over all rows, in one batch and in micro-batches of two, and `eval_jepa_loss` before it."""
    options = {
        "direction": direction, "target_encoder": target_encoder, "objective": objective, "jepa_weight": 1.0,
        "max_steps": 1, "per_device_train_batch_size": 10, "per_device_eval_batch_size": 10,
    }  # fmt: skip
    if objective == "info_nce":
        options["temperature"] = 0.3
    data = Dataset.from_list(ROWS)
    trainer = make(
        data, tokenizer, config(tmp_path / "big", **options), eval_dataset=data, model=exact_model(tokenizer)
    )
    columns = trainer.train_dataset.to_list()
    with torch.no_grad():
        expected = loss_by_hand(trainer, trainer.model, columns, ROWS)
        every_text_its_own = by_hand(*embeddings(trainer.model, trainer.args, columns, trainer.predictor_ids)[:2],
                                     *[[{i} for i in range(len(expected))]] * 2, trainer.args.temperature)  # fmt: skip
    trainer.term.start_averaging(trainer.model)
    assert trainer.evaluate()["eval_jepa_loss"] == pytest.approx(expected.mean().item(), rel=EXACT)
    start = weights(trainer)
    trainer.train()
    assert history(trainer, "jepa_loss") == pytest.approx([expected.mean().item()], rel=LOGGED)
    if objective == "info_nce":
        assert every_text_its_own.mean() > 1.3 * expected.mean(), "equal texts change little: this proves nothing"
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5, "negatives": "optimizer_step"}
        small, _ = run(data, tokenizer, tmp_path / "small", **options)
        assert history(small, "jepa_loss") == pytest.approx([expected.mean().item()], rel=LOGGED)
        assert_same_weights(weights(small), weights(trainer), start=start)


def test_the_gradient_is_that_of_the_loops(tokenizer, tmp_path):
    options = {"temperature": 0.3, "jepa_weight": 1.0, "max_steps": 1, "per_device_train_batch_size": 10}
    trainer = make(Dataset.from_list(ROWS), tokenizer, config(tmp_path, **options), model=exact_model(tokenizer))
    columns = trainer.train_dataset.to_list()
    batch = trainer.data_collator(columns)
    trainer.model.train()
    full = trainer.compute_loss(trainer.model, batch)
    trainer.args.jepa_weight = 0.0  # the difference is the JEPA term alone
    (full - trainer.compute_loss(trainer.model, trainer.data_collator(columns))).backward()
    ours = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    loss_by_hand(trainer, trainer.model, columns, ROWS).mean().backward()
    theirs = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-9 + 1e-6 * float(gradient.abs().max()))
    assert max(float(g.abs().max()) for g in theirs.values()) > 1e-3, "no gradient: proves nothing"


def test_the_case_of_two_right_answers_to_one_prompt(tokenizer, tmp_path):
    """Both predictions are equal, and either answer is right: the rows that a forward pass picks from are equal."""
    rows = [ROWS[0], ROWS[4], ROWS[2]]
    args = config(tmp_path, temperature=0.5, per_device_train_batch_size=2, diagnostics_pairs=3)
    trainer = make(Dataset.from_list(rows), tokenizer, args, Dataset.from_list(rows), model=exact_model(tokenizer))
    predicted, target, keys = trainer.embed_bank(None)
    assert predicted[0].equal(predicted[1]) and not target[0].equal(target[1])
    cosine = torch.nn.functional.cosine_similarity(predicted[:, None], target[None], dim=-1) / 0.5
    e = cosine.double().exp()
    first = -(((e[0, 0] + e[0, 1]) / e[0].sum()).log() + ((e[0, 0] + e[1, 0]) / e[:, 0].sum()).log()) / 2
    losses = trainer.term.compare(predicted, target, keys, step=0)
    assert losses[0].item() == pytest.approx(first.item(), rel=1e-5)
    figures = trainer.measure_space()
    wrong = [cosine[i, j].item() / 2 for i, j in ((0, 2), (1, 2), (2, 0), (2, 1))]
    assert figures["raw_cosine_mismatched"] == pytest.approx(sum(wrong) / 4, rel=1e-4)


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_view", ["prefix", "message"])
@pytest.mark.parametrize("kind", ["messages", "plain"])
def test_white_space_around_a_text_does_not_count(kind, context_view, tokenizer):
    """Of prompts, completions and other wordings. In the middle it does, and so does a letter."""

    def keys(prompt, completion, **views):
        turns = {"prompt": prompt, "completion": completion}
        if kind == "messages":
            turns = {"messages": row(prompt, completion)["messages"]}
        view = build_views({**turns, "views": views or None}, tokenizer, context_view=context_view)
        assert view.context_key == view.context_text_keys[0] and view.target_key == view.target_text_keys[0]
        return view.context_text_keys, view.target_text_keys

    expected = keys("a fox", "over")
    for prompt, completion in (("a fox ", " over"), ("\na fox", "over\n"), (" a fox\t", "\tover  ")):
        assert keys(prompt, completion) == expected
    more = keys("x", "y", contexts=[" a fox", "a fox "], targets=["over ", "\nover"])
    assert more[0][1:] == expected[0] * 2 and more[1][1:] == expected[1] * 2
    for prompt, completion in (("a  fox", "ov er"), ("A fox", "Over")):
        other = keys(prompt, completion)
        assert other[0] != expected[0] and other[1] != expected[1]


def test_a_column_target_key_is_never_a_text(tokenizer):
    keyed = build_views(row("p", "x", target_key="same"), tokenizer)
    assert keyed.target_key == build_views(row("q", "y", target_key=" same\n"), tokenizer).target_key
    texts = {build_views(row("p", text), tokenizer).target_key for text in ("same", "x", "target_key same")}
    assert keyed.target_key not in texts and keyed.target_text_keys[0] in texts


@pytest.mark.parametrize("value", [3, "", "  ", ["a"], 0, True])
def test_a_target_key_that_is_not_a_text_is_refused(value, tokenizer):
    with pytest.raises(UserError, match="row 7: 'target_key' is .*, but must be a text"):
        add_view_columns({**ROWS[0], "target_key": value}, 7, tokenizer=tokenizer)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_every_pair_of_a_batch_has_the_keys_of_its_own_views(direction, tokenizer):
    rows = [row("p", "x", contexts=["q"], targets=["y", "z"]), row("q", "z")]
    views = [add_view_columns(one, i, tokenizer=tokenizer) for i, one in enumerate(rows)]
    batch = JEPACollator(tokenizer.pad_token_id, direction=direction)(views)
    target, context = keys_of(batch)
    assert len(target[0]) == 2 * 3 + 1 == len(batch["target_at"])
    last = 6
    equal_targets = [j for j in range(6) if target[1][j] == target[1][last]]
    equal_contexts = [j for j in range(6) if context[1][j] == context[1][last]]
    # Contexts vary slowest: (p, x), (p, y), (p, z), (q, x), ...; in reverse (x, p), (x, q), (y, p), ...
    expected = ([2, 5], [3, 4, 5]) if direction == "forward" else ([1, 3, 5], [4, 5])
    assert (equal_targets, equal_contexts) == expected
    assert not (target[0][:6] == target[0][last]).any() and not (context[0][:6] == context[0][last]).any()


def test_rows_of_one_prompt_leave_no_negatives(tokenizer, tmp_path):
    rows = [row("say a word", word) for word in ("one", "two", "three", "four")]
    args = config(tmp_path, per_device_train_batch_size=2)
    with pytest.raises(UserError, match="has no negatives, because every training row has the same prompt"):
        make(Dataset.from_list(rows), tokenizer, args)
    labels = [row(f"question {i}", ("yes", "no")[i % 2]) for i in range(8)]
    with pytest.raises(
        UserError, match="needs different targets as negatives, and the training rows have 2 for batches"
    ):
        make(Dataset.from_list(labels), tokenizer, config(tmp_path))
    back = [row(word, "say a word") for word in ("one", "two", "three", "four")]
    args = config(tmp_path, per_device_train_batch_size=2, direction="reverse")
    with pytest.raises(UserError, match="every training row has the same completion"):
        make(Dataset.from_list(back), tokenizer, args)
