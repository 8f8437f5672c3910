"""Claim: in any batch, every token sees exactly the view that it belongs to, and no token is lost or counted twice.

Nothing here looks at a model. A token's sequence is what the masks and positions of the batch let it see.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_jepa.core.errors import UserError
from llm_jepa.lm.attention import attention_of_lm_rows, attention_of_views, model_inputs, who_sees_whom
from llm_jepa.lm.batching import CONTEXT, IGNORE, KINDS, LM_ROW, PAD, TARGET, JEPACollator, keys_of, lm_rows_only
from tests.conftest import exact_model
from tests.properties import examples

PAD_TOKEN, BOS = 0, 1
PREDICTORS = st.sampled_from([(), (90,), (90, 91)])
TOKENS = st.lists(st.integers(2, 9), min_size=1, max_size=5)


@st.composite
def one_row(draw, number):
    """The columns of one example. Views share a beginning with the LM row, or BOS, or nothing, or all of it."""
    prompt, completion = [BOS, *draw(TOKENS)], draw(TOKENS)
    ids = prompt + completion

    def view():
        shared = draw(st.integers(0, len(ids)))
        return (ids[:shared] + draw(st.just([]) | TOKENS)) or [BOS]

    contexts = [view() for _ in range(draw(st.integers(1, 2)))]
    targets = [view() for _ in range(draw(st.integers(1, 2)))]
    key = st.integers(0, 3)
    return {
        "input_ids": ids,
        "labels": draw(st.sampled_from([[IGNORE] * len(prompt) + completion, ids])),
        "contexts": contexts,
        "targets": targets,
        "context_header": draw(st.integers(0, min(map(len, contexts)))),
        "target_header": draw(st.integers(0, min(map(len, targets)))),
        "context_key": draw(key),
        "target_key": draw(key),
        "context_text_keys": [draw(key) for _ in contexts],
        "target_text_keys": [draw(key) for _ in targets],
        "context_start": 1,
        "context_end": len(prompt),
        "target_start": len(prompt),
        "target_end": len(ids),
        "index": 100 + number,
    }


ROWS = st.integers(1, 4).flatmap(lambda count: st.tuples(*(one_row(i) for i in range(count)))).map(list)
COLLATORS = st.builds(
    JEPACollator,
    pad_token_id=st.just(PAD_TOKEN),
    predictor_ids=PREDICTORS,
    layout=st.sampled_from(["packed", "packed", "separate", "flat"]),
    pad_to_multiple_of=st.sampled_from([1, 1, 8]),
    row_cost=st.sampled_from([0, 0, 5, 10**9]),
    readout=st.sampled_from(["last", "mean"]),
    predictor_position=st.sampled_from(["last", "first"]),
    direction=st.sampled_from(["forward", "reverse"]),
    target_placement=st.sampled_from(["inside", "inside", "apart"]),
    with_tubes=st.booleans(),
)


class Seen:
    """What each token of a batch sees, by its flat place."""

    def __init__(self, batch, layout):
        doc = batch["doc"]
        if layout == "packed":
            self.mask = who_sees_whom(doc, batch["parent"], batch["visible"], batch["position_ids"])
            self.position = batch["position_ids"]
        else:
            self.position = torch.zeros_like(doc)  # from the start of each segment
            for r, c in (doc != PAD).nonzero().tolist():
                same = c and doc[r, c] == doc[r, c - 1]
                self.position[r, c] = self.position[r, c - 1] + 1 if same else 0
            order = torch.arange(doc.shape[1])
            self.mask = (doc[:, :, None] == doc[:, None, :]) & (order[:, None] >= order)
            if layout == "flat":
                assert torch.equal(batch["position_ids"], self.position)
        self.ids = batch["input_ids"]

    def sequence(self, place):
        """The tokens that a token sees, itself the last, by their positions, which must be 0, 1, 2, ..."""
        row, column = divmod(int(place), self.ids.shape[1])
        at = self.mask[row, column].nonzero()[:, 0]
        at = at[self.position[row, at].argsort()]
        assert self.position[row, at].tolist() == list(range(len(at))), "a position is missing or there twice"
        assert at[-1] == column
        return self.ids[row, at].tolist()


def places(at):
    """[P] or [P, W] flat places -> a list for each pair."""
    return [[place for place in row if place >= 0] for row in at.view(len(at), -1).tolist()]


def views_of(row, collator):
    """The contexts of a row with their predictor tokens, and its targets."""
    one, other = sides(collator)
    contexts = []
    for ids in row[f"{one}s"]:
        at = len(ids) if collator.predictor_position == "last" else row[f"{one}_header"]
        contexts.append([*ids[:at], *collator.predictor_ids, *ids[at:]])
    return contexts, row[f"{other}s"]


def sides(collator):
    return ("context", "target") if collator.direction == "forward" else ("target", "context")


def expected_pairs(rows, collator):
    """(example, context, target, keys) of every pair, written out."""
    pairs, (one, other) = [], sides(collator)
    for number, row in enumerate(rows):
        contexts, targets = views_of(row, collator)
        for i, context in enumerate(contexts):
            for j, target in enumerate(targets):
                keys = row[f"{other}_key"], row[f"{one}_key"], row[f"{other}_text_keys"][j], row[f"{one}_text_keys"][i]
                pairs.append((number, context, target, keys))
    return pairs


def keys_in(batch):
    """The four keys of each pair of a batch, in the order of `expected_pairs`."""
    keys = keys_of(batch)
    columns = keys.target[0], keys.context[0], keys.target[1], keys.context[1]
    return list(zip(*(column.tolist() for column in columns), strict=True))


@examples(150)
@given(ROWS, COLLATORS)
def test_every_embedding_is_read_from_its_view_alone(rows, collator):
    batch = collator(rows)
    seen = Seen(batch, collator.layout)
    pairs = expected_pairs(rows, collator)
    targets = places(batch["target_at"])
    assert batch["example_of_pair"].tolist() == [pair[0] for pair in pairs]
    assert keys_in(batch) == [pair[3] for pair in pairs]
    for (_, source, goal, _), context_at, target_at in zip(pairs, places(batch["context_at"]), targets, strict=True):
        assert [seen.sequence(place) for place in context_at] == read(source, collator.readout)
        if collator.target_placement == "inside":
            assert [seen.sequence(place) for place in target_at] == read(goal, collator.readout)
        else:
            ids, mask = batch["apart_input_ids"], batch["apart_attention_mask"]
            row = target_at[0] // ids.shape[1]
            assert ids[row][mask[row].bool()].tolist() == goal and mask[row].sum() == len(goal)
            assert (ids[row][~mask[row].bool()] == PAD_TOKEN).all()
            last = [len(sequence) - 1 for sequence in read(goal, collator.readout)]
            assert [place - row * ids.shape[1] for place in target_at] == last


def read(ids, readout):
    """The sequences of the tokens whose mean is the embedding: the last, or all."""
    return [ids] if readout == "last" else [ids[: i + 1] for i in range(len(ids))]


@examples(150)
@given(ROWS, COLLATORS, st.booleans())
def test_no_token_is_lost_or_counted_twice(rows, collator, with_views):
    collator = dataclasses.replace(collator, with_views=with_views)
    batch = collator(rows)
    seen, ids, doc = Seen(batch, collator.layout), batch["input_ids"], batch["doc"]
    labels = batch["labels"].flatten().tolist()
    is_lm_row = torch.zeros(doc.numel(), dtype=torch.bool)
    for row, start in zip(rows, batch["lm_at"].tolist(), strict=True):
        own = range(start, start + len(row["input_ids"]))
        assert [seen.sequence(place) for place in own] == read(row["input_ids"], "mean")
        assert labels[start : own.stop] == [IGNORE, *row["labels"][1:]], "the first token is never a label"
        is_lm_row[own.start : own.stop] = True
    assert torch.equal(is_lm_row.view_as(doc), (doc >= 0) & (doc % KINDS == LM_ROW))
    assert (batch["labels"][~is_lm_row.view_as(doc)] == IGNORE).all()
    is_padding = doc == PAD
    assert (ids[is_padding] == PAD_TOKEN).all() and not (is_padding[:, :-1] & ~is_padding[:, 1:]).any()
    assert not is_padding.all(dim=1).any(), "a row of padding alone"
    if collator.layout == "separate":
        assert all(len(set(row.tolist()) - {PAD}) == 1 for row in doc), "two segments share a row without a mask"
    if collator.layout == "flat":
        assert not is_padding.any() and len(doc) == 1
    else:
        multiple = collator.pad_to_multiple_of
        assert doc.shape[1] % multiple == 0 and is_padding.sum(dim=1).min() < multiple
    if collator.with_tubes:
        columns = ("context_start", "context_end", "target_start", "target_end", "index")
        found = torch.cat([batch["content"], batch["index"][:, None]], dim=1).tolist()
        assert found == [[row[column] for column in columns] for row in rows]
    if not with_views:
        assert is_lm_row.view_as(doc).equal(~is_padding) and "context_at" not in batch
        return
    # Outside of the LM rows: the ends of the views that begin unlike it, and the predictor tokens.
    there = collections.Counter(ids[~is_padding & ~is_lm_row.view_as(doc)].tolist())
    assert there == collections.Counter(tokens_beside(rows, collator))
    kinds = {int(kind) for kind in (doc[~is_padding] % KINDS).unique()}
    assert kinds <= {LM_ROW, CONTEXT, TARGET} and (TARGET not in kinds or collator.target_placement == "inside")


def tokens_beside(rows, collator):
    """The tokens that a batch must hold beside its LM rows."""
    tokens = []
    for row in rows:
        contexts, targets = views_of(row, collator)
        for view in [*contexts, *(targets if collator.target_placement == "inside" else [])]:
            shared = common(view, row["input_ids"])
            if collator.layout != "packed" and shared < len(view):
                shared = 0  # only packed rows can go on from the LM row
            tokens += view[shared:]
    return tokens


def common(one, other):
    """The length of the longest common beginning."""
    equal = [a == b for a, b in zip(one, other, strict=False)] + [False]
    return equal.index(False)


@examples(30)
@given(ROWS, COLLATORS)
def test_cached_targets_are_those_rows_of_the_table(rows, collator):
    collator = dataclasses.replace(collator, target_placement="cached", target_table=torch.arange(80.0).view(40, 2))
    goals = "targets" if collator.direction == "forward" else "contexts"
    numbers = itertools.count(3)
    rows = [{**row, "target_table_rows": [next(numbers) for _ in row[goals]]} for row in rows]
    batch = collator(rows)
    expected = []
    for row in rows:
        contexts, _ = views_of(row, collator)
        expected += row["target_table_rows"] * len(contexts)
    assert torch.equal(batch["target_embedding"], collator.target_table[expected])
    assert not set(batch) & {"target_at", "apart_input_ids"}
    assert keys_in(batch) == [pair[3] for pair in expected_pairs(rows, collator)]
    assert TARGET not in (batch["doc"][batch["doc"] != PAD] % KINDS)
    with pytest.raises(UserError, match="^target_encoder: base has targets only .* it started with; pass this one as "
                                        "eval_dataset at the start, or use target_encoder: self.$"):  # fmt: skip
        collator([{name: value for name, value in rows[0].items() if name != "target_table_rows"}])


def test_lm_rows_come_first_where_each_segment_has_its_own_row():
    """`lm_rows_only` and the readers of logits count on it. Padding of the places is -1."""
    ids = [BOS, 5, 6, 7]
    row = {
        "input_ids": ids, "labels": ids, "contexts": [[8, 9], [3]], "targets": [[4, 4, 4]], "context_header": 0,
        "target_header": 0, "context_key": 1, "target_key": 2, "context_text_keys": [1, 2], "target_text_keys": [3],
    }  # fmt: skip
    batch = JEPACollator(PAD_TOKEN, layout="separate", readout="mean")([row, row])
    assert (batch["doc"][:, 0] % KINDS == LM_ROW).tolist() == [True, True] + [False] * 6
    assert batch["context_at"].tolist()[0] == [8, 9] and batch["context_at"].tolist()[1] == [12, -1]
    assert len(batch["doc"]) == 8 and batch["lm_at"].tolist() == [0, 4]


def test_lm_rows_only_of_a_row_of_one_token_and_what_its_padding_holds():
    row = {
        "input_ids": [BOS], "labels": [BOS], "contexts": [[8, 9]], "targets": [[4]], "context_header": 0,
        "target_header": 0, "context_key": 1, "target_key": 2, "context_text_keys": [1], "target_text_keys": [3],
    }  # fmt: skip
    other = {**row, "input_ids": [BOS, 5, 6], "labels": [BOS, 5, 6]}
    kept = lm_rows_only(JEPACollator(PAD_TOKEN)([row, other]))
    assert kept["input_ids"].tolist() == [[BOS, 0, 0], [BOS, 5, 6]]
    assert kept["doc"].tolist() == [[0, PAD, PAD], [0, 0, 0]] and kept["lm_at"].tolist() == [0, 3]
    assert kept["labels"].tolist() == [[IGNORE] * 3, [IGNORE, 5, 6]]


@examples(60)
@given(ROWS, COLLATORS, st.randoms(use_true_random=False))
def test_the_order_of_the_examples_changes_only_the_order_of_the_pairs(rows, collator, random):
    def described(rows):
        batch = collator(rows)
        seen = Seen(batch, collator.layout)
        contexts = [[seen.sequence(place) for place in at] for at in places(batch["context_at"])]
        owners = [rows[number]["index"] for number in batch["example_of_pair"].tolist()]
        return sorted(zip(owners, keys_in(batch), contexts, strict=True)), (batch["labels"] != IGNORE).sum()

    assert described(rows) == described(random.sample(rows, len(rows)))


@examples(60)
@given(ROWS, COLLATORS)
def test_lm_rows_only_keeps_every_token_of_the_lm_rows_and_no_other(rows, collator):
    batch = collator(rows)
    kept = lm_rows_only(batch)
    seen = Seen(kept, collator.layout)
    assert not set(kept) & {"context_at", "target_at", "example_of_pair", "apart_input_ids"}
    assert (kept["doc"] != PAD).sum() == sum(len(row["input_ids"]) for row in rows), "no other token"
    assert (kept["doc"] != PAD).any(dim=0).all() and (kept["doc"] != PAD).any(dim=1).all(), "no longer than needed"
    for row, start in zip(rows, kept["lm_at"].tolist(), strict=True):
        own = range(start, start + len(row["input_ids"]))
        assert [seen.sequence(place) for place in own] == read(row["input_ids"], "mean")
        assert kept["labels"].flatten()[start : own.stop].tolist() == [IGNORE, *row["labels"][1:]]
    is_shared = collator.layout == "packed" and len(rows) > len(kept["doc"])
    expected = "segments" if is_shared else attention_of_views("separate" if collator.layout != "flat" else "flat")
    assert attention_of_lm_rows(collator.layout, kept) == expected


@pytest.fixture(scope="module")
def model():
    """Float64, with a spread of the weights that makes attention attend."""
    from llm_jepa.lm.from_scratch import train_tokenizer
    from llm_jepa.synthetic import nl_rx

    return exact_model(train_tokenizer(nl_rx.generate(48, seed=3), 320), initializer_range=0.3).eval()


@examples(25)
@given(rows=ROWS, collator=COLLATORS.filter(lambda c: c.layout == "packed" and c.target_placement == "inside"))
def test_packed_states_are_those_of_separate_passes(model, rows, collator):
    """Of the last layer, at every place that is read: each view alone in a forward pass of one row without padding."""
    with torch.no_grad():
        batch = collator(rows)
        states = states_of(model, **model_inputs(batch, model, "segments")).flatten(0, 1)
        for at, side in (("context_at", 1), ("target_at", 2)):
            for pair, place in zip(expected_pairs(rows, collator), places(batch[at]), strict=True):
                alone = states_of(model, input_ids=torch.tensor([pair[side]]), use_cache=False)[0]
                expected = alone if collator.readout == "mean" else alone[-1:]
                torch.testing.assert_close(states[place], expected, rtol=0, atol=1e-9)


def states_of(model, **inputs):
    return model(**inputs, output_hidden_states=True).hidden_states[-1]  # [R, L, D]
