"""Claims about robustness figures: worked by hand with asymmetric values, planted effects found, null effects not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.figures.groups import (
    DEFINITIONS,
    compare,
    embedding_view,
    figures,
    per_group,
    read_answers,
    robustness,
)
from eval.figures.inference import mcnemar
from llm_jepa import UserError


def samples(table, wordings=None):
    """One row per (group, wording) from [[(score, key), ...], ...]; None where a group lacks the wording."""
    return [
        {"group": f"g{g}", "wording": (wordings or "abcdefgh")[w], "scores": {"exact": cell[0]}, "answer_key": cell[1]}
        for g, row in enumerate(table)
        for w, cell in enumerate(row)
        if cell is not None
    ]


def answers(table, wordings=None):
    return read_answers(samples(table, wordings), "exact")


def half_scored():
    return [{"group": "g0", "wording": "b", "scores": {"other": 1}, "answer_key": "r"}]


def estimates(one):
    return {name: value for (kind, name), value in figures(one).items() if kind == "metrics"}


def random_answers(rng, right, *, flip=0.0, k=2):
    """Groups right or wrong as a whole [G]; then each wording flips with probability `flip`. Wrong answers differ."""
    scores = right[:, None] ^ (rng.random((len(right), k)) < flip)
    table = [[(int(x), "gold" if x else f"wrong{rng.integers(1000)}") for x in row] for row in scores]
    return answers(table)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_two_wordings_worked_by_hand():
    """Five groups: both right; only the first; only the first; only the second; both wrong with one answer.

    a: 3 of 5, b: 2 of 5. All pairs: 2 of 5 the same, 1 of 5 the same and right. Drop: 1 - (2/5) / (3/5) = 1/3.
    """
    one = answers([
        [(1, "r"), (1, "r")],
        [(1, "r"), (0, "x")],
        [(1, "r"), (0, "y")],
        [(0, "x"), (1, "r")],
        [(0, "z"), (0, "z")],
    ])  # fmt: skip
    assert estimates(one) == pytest.approx(
        {
            "accuracy": 0.5,
            "worst_of_k": 0.2,
            "best_of_k": 0.8,
            "spread_in_groups": 0.6,
            "consistency": 0.4,
            "consistent_and_correct": 0.2,
            "spread_of_wordings": 0.2,
            "drop_rate": 1 / 3,
        }
    )
    assert figures(one)["wordings", "a"] == pytest.approx(0.6) and figures(one)["wordings", "b"] == pytest.approx(0.4)


def test_five_wordings_worked_by_hand():
    """g0: right in 1, 2, 3 (one key), two different wrong answers: 3 of 10 pairs the same, all of them right.
    g1: right in 1 alone, the four others one wrong answer: 6 of 10 pairs the same, none right.
    Drop: first 1, others (2/4 + 0/4) / 2 = 1/4, so 3/4. By wording 1, 1/2, 1/2, 0, 0."""
    one = answers([
        [(1, "r"), (1, "r"), (1, "r"), (0, "x"), (0, "y")],
        [(1, "q"), (0, "w"), (0, "w"), (0, "w"), (0, "w")],
    ])  # fmt: skip
    assert estimates(one) == pytest.approx(
        {
            "accuracy": 0.4,
            "worst_of_k": 0.0,
            "best_of_k": 1.0,
            "spread_in_groups": 1.0,
            "consistency": 0.45,
            "consistent_and_correct": 0.15,
            "spread_of_wordings": 1.0,
            "drop_rate": 0.75,
        }
    )


def test_right_answers_of_different_keys_are_not_the_same_answer():
    """Two right answers may differ (a lenient metric): consistency 0, and so consistent_and_correct 0."""
    figure = estimates(answers([[(1, "ab"), (1, "ab.*")]] * 3))
    assert (figure["worst_of_k"], figure["consistency"], figure["consistent_and_correct"]) == (1, 0, 0)


def test_half_points_are_not_correct():
    figure = estimates(answers([[(0.5, "same"), (0.5, "same")], [(1.0, "s"), (0.25, "t")]]))
    assert figure["accuracy"] == pytest.approx((0.5 + 0.625) / 2) and figure["worst_of_k"] == pytest.approx(0.375)
    assert (figure["consistency"], figure["consistent_and_correct"]) == (0.5, 0)


def test_a_constant_answer_is_consistent_and_never_both_consistent_and_correct():
    figure = estimates(answers([[(0, "always")] * 3] * 4))
    assert (figure["consistency"], figure["consistent_and_correct"], figure["accuracy"]) == (1, 0, 0)
    assert math.isnan(figure["drop_rate"]), "1 - 0 / 0 has no value"


def test_groups_of_different_sizes_weigh_the_same():
    """g0 has two wordings (1, 0), g1 has three (1, 1, 1). Accuracy (1/2 + 1) / 2, not 4/5; b 1 of 2, c 1 of 1."""
    one = answers([[(1, "r"), (0, "x"), None], [(1, "r"), (1, "r"), (1, "r")]])
    figure = figures(one)
    assert figure["metrics", "accuracy"] == 0.75 and figure["metrics", "consistency"] == 0.5
    assert [figure["wordings", name] for name in "abc"] == [1, 0.5, 1]
    assert figure["metrics", "drop_rate"] == pytest.approx(1 - 0.5 / 1)
    # g0 lacks the first wording: its own first is b.
    late = answers([[(1, "r"), (1, "r"), (0, "x")], [None, (0, "x"), (1, "r")]])
    assert estimates(late)["drop_rate"] == pytest.approx(1 - (0.5 + 1) / 2 / 0.5)


@given(st.integers(2, 5).flatmap(
    lambda k: st.lists(st.lists(st.tuples(st.integers(0, 1), st.sampled_from("xyz")), min_size=k, max_size=k),
                       min_size=1, max_size=6)
))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_relations_that_hold_for_all_answers(table):
    """Keys and scores as they come. worst <= mean <= best; consistent_and_correct <= consistency and <= mean; and the
    order of the wordings changes nothing but the drop rate."""
    one = answers(table)
    for name, values in per_group(one).items():
        assert ((values >= 0) & (values <= 1)).all(), name
    f = per_group(one)
    assert (f["worst_of_k"] <= f["accuracy"]).all() and (f["accuracy"] <= f["best_of_k"]).all()
    assert (f["consistent_and_correct"] <= f["consistency"]).all()
    assert (f["consistent_and_correct"] <= f["accuracy"] + 1e-12).all()
    backwards = estimates(answers([row[::-1] for row in table]))
    for name, value in estimates(one).items():
        if name != "drop_rate":
            assert backwards[name] == pytest.approx(value), name


def test_groups_that_a_metric_does_not_count_are_left_out_and_counted():
    rows = samples([[(1, "r"), (0, "x")], [(1, "r"), (1, "r")], [(0, "x"), (0, "x")]])
    for row in rows[2:4]:
        del row["scores"]["exact"]
        row["scores"]["other"] = 1
    one = read_answers(rows, "exact")
    assert one.groups == ("g0", "g2") and one.left_out == 1 and estimates(one)["accuracy"] == 0.25


# -- intervals and comparisons -----------------------------------------------------------------------------------------


def test_intervals_hold_the_estimate_and_shrink_with_groups():
    rng = np.random.default_rng(0)
    few, many = (robustness([random_answers(rng, rng.random(n) < 0.6, flip=0.1, k=3)]) for n in (50, 800))
    assert list(few.metrics) == list(DEFINITIONS) and list(few.wordings) == ["a", "b", "c"]
    for name, interval in many.metrics.items():
        assert interval.low <= interval.estimate <= interval.high, name
        width = (interval.high - interval.low) / (few.metrics[name].high - few.metrics[name].low)
        if name != "spread_of_wordings":  # a maximum: its interval is not of the order 1 / sqrt(n)
            assert 0.14 < width < 0.4, name  # sqrt(50 / 800) = 0.25


def test_interval_of_the_accuracy_is_that_of_group_means():
    """Wordings that stand or fall together: 1.96 sqrt(p (1 - p) / G), as if each group had one row."""
    rng = np.random.default_rng(1)
    right = np.arange(400) < 120
    low, high = robustness([random_answers(rng, right, k=4)]).metrics["accuracy"][1:]
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.3 * 0.7 / 400), rel=0.06)


def test_the_drop_is_from_a_group_s_own_first_wording():
    """Each group is right in its first wording alone; the second one has them the other way round."""
    rows = samples([[(1, "r"), (0, "x")], [(0, "x"), (1, "r")]])
    one = read_answers([*rows[:2], *rows[:1:-1]], "exact")
    assert one.first.tolist() == [0, 1] and estimates(one)["drop_rate"] == pytest.approx(1.0)


def test_a_drop_rate_that_resamples_leave_undefined_has_no_interval():
    interval = robustness([answers([[(1, "r"), (0, "x")], [(0, "x"), (0, "y")], [(0, "x"), (1, "r")]])])
    drop = interval.metrics["drop_rate"]
    assert drop.estimate == pytest.approx(0.0) and math.isnan(drop.low) and math.isnan(drop.high)


def test_planted_sensitivity_is_found_and_a_null_is_not():
    """Two models right on the same 60 % of groups; one loses its second wording in 20 % of those. Null: other seeds of
    the same noise. Over 60 draws each, at most 3 of 8 figures' null intervals may be off at once in few of them."""
    rng, false = np.random.default_rng(2), {name: 0 for name in DEFINITIONS}
    for _ in range(60):
        right = rng.random(300) < 0.6
        base = random_answers(rng, right, flip=0.05)
        null = compare([random_answers(rng, right, flip=0.05)], [base], num_resamples=400)
        for name, interval in null.metrics.items():
            false[name] += not interval.low <= 0 <= interval.high
    assert all(count <= 9 for count in false.values()), false  # 60 x 5 % = 3, P(> 9) < 0.1 %
    assert sum(false.values()) >= 5, "some false findings must come, or the intervals are too wide"
    scores = base.scores.copy()
    scores[np.flatnonzero(right)[::5], 1] = 0
    worse = compare([base.__class__(**{**base.__dict__, "scores": scores})], [base])
    assert worse.metrics["worst_of_k"].high < 0 and worse.metrics["drop_rate"].low > 0
    assert worse.wordings["a"] == (0, 0, 0) and worse.wordings["b"].high < 0


def test_comparison_is_paired_and_signed_model_minus_baseline():
    """The model gains one wording in 3 of 40 groups, loses none: accuracy + 3 / 80, and no resample below 0."""
    rng = np.random.default_rng(3)
    table = [[(int(x), "r" if x else "w"), (0, "w")] for x in rng.random(40) < 0.5]
    better = [list(row) for row in table]
    for g in (4, 5, 6):
        better[g][1] = (1, "r")
    comparison = compare([answers(better)], [answers(table)])
    assert comparison.metrics["accuracy"].estimate == pytest.approx(3 / 80) and comparison.metrics["accuracy"].low >= 0
    assert comparison.mcnemar["a"] == (0, 0, 1.0) and comparison.mcnemar["b"] == (3, 0, 0.25)
    assert comparison.over_seeds == {}


def test_mcnemar_is_done_by_wording_and_for_right_and_wrong_only():
    rng = np.random.default_rng(4)
    right = rng.random(100) < 0.9
    a, b = (random_answers(rng, right, flip=f) for f in (0.05, 0.3))
    tests = compare([a], [b], num_resamples=50).mcnemar
    assert tests["b"] == mcnemar(a.scores[:, 1], b.scores[:, 1]) and tests["b"].p < 0.05
    half = answers([[(0.5, "x"), (1, "y")], [(0, "x"), (1, "y")]])
    assert compare([half], [half], num_resamples=50).mcnemar == {}


def test_seeds_are_averaged_and_their_differences_tested():
    """Accuracy differences 0.25, 0.5 and 0 by seed: mean 0.25, sd 0.25, t = sqrt(3), p = 1 - sqrt(3 / 5) (df 2)."""
    wrong, right = [(0, "w"), (0, "w")], [(1, "r"), (1, "r")]
    base = [answers([wrong, wrong, right, wrong])] * 3
    model = [answers([right, wrong, right, wrong]), answers([right, right, right, wrong]), base[0]]
    comparison = compare(model, base)
    seeds = comparison.over_seeds["accuracy"]
    assert seeds.by_seed == (0.25, 0.5, 0) and seeds.p == pytest.approx(1 - math.sqrt(3 / 5))
    assert comparison.metrics["accuracy"].estimate == seeds.t.estimate == seeds.crossed.estimate == pytest.approx(0.25)
    assert comparison.mcnemar == {} and comparison.over_seeds["drop_rate"].crossed is None
    both = robustness(model[:2]).metrics["accuracy"]
    assert both.estimate == pytest.approx(0.625)
    assert robustness([model[0]] * 5).metrics == robustness([model[0]]).metrics, "equal runs add no certainty"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: answers([[(1, "r"), (0, "x")], [(1, "r"), None], [None, (1, "r")]]), "2 of 3 groups"),
        (lambda: answers([]), "there is none"),
        (lambda: read_answers(samples([[(1, "r"), (0, "x")]]), "f1"), "metric 'f1'; there is exact"),
        (lambda: read_answers(samples([[(1, "r")] * 2])[:1] + half_scored(), "exact"), "'g0'.*some of its wordings"),
        (lambda: read_answers(samples([[(1, "r"), (0, "x")]]) * 2, "exact"), "two answers"),
        (lambda: answers([[(1, "r"), (math.nan, "x")]]), "not a number"),
        (lambda: compare([answers([[(1, "r")] * 2] * 3)], [answers([[(1, "r")] * 2] * 2)]), "1 groups.*'g2'"),
        (lambda: compare([answers([[(1, "r")] * 2], "ab")], [answers([[(1, "r")] * 2], "ac")]), "other wordings"),
    ],
)
def test_answers_that_cannot_be_compared(call, message):
    with pytest.raises(UserError, match=message):
        call()


# -- embeddings --------------------------------------------------------------------------------------------------------


def test_embedding_view_worked_by_hand():
    """Raw, two groups at 0 and 60 degrees, and at 90 and 90: within (1/2 + 1) / 2 = 3/4; between: cosines of 0 degrees
    to 90 (0, 0) and of 60 to 90 (sqrt(3) / 2 twice): sqrt(3) / 4. Lengths do not matter."""
    x = torch.tensor([[2.0, 0.0], [0.5, math.sqrt(3) / 2], [0.0, 1.0], [0.0, 7.0]])
    view = embedding_view(x, torch.tensor([0, 0, 1, 1]))
    assert view["raw_cosine_within"].estimate == pytest.approx(0.75)
    assert view["raw_cosine_between"].estimate == pytest.approx(math.sqrt(3) / 4)


def test_cosines_and_recall_against_the_matrix_of_all_pairs():
    """Ragged groups in a mixed order, against the definition written out over all pairs."""
    torch.manual_seed(0)
    group = torch.tensor([3, 1, 1, 0, 3, 0, 1, 2, 2, 3])
    x = torch.randn(10, 4) + 0.8 * torch.eye(4)[group]
    view = embedding_view(x, group)
    for name, z in (("", x - x.mean(dim=0)), ("raw_", x)):
        cosine = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=-1)
        same = group[:, None] == group[None]
        off = ~torch.eye(10, dtype=torch.bool)
        within = [cosine[same & off & (group == g)[:, None]].mean() for g in range(4)]
        assert view[f"{name}cosine_within"].estimate == pytest.approx(float(torch.stack(within).mean()), abs=1e-6)
        assert view[f"{name}cosine_between"].estimate == pytest.approx(float(cosine[~same].mean()), abs=1e-6)
    z = x - x.mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=-1).fill_diagonal_(-2)
    hit = group[cosine.argmax(dim=1)] == group
    by_group = [hit[group == g].float().mean() for g in range(4)]
    assert 0 < float(hit.float().mean()) < 1, "all hits or none would prove little"
    assert view["recall_at_1"].estimate == pytest.approx(float(torch.stack(by_group).mean()))


def test_collapse_and_clusters_are_told_apart():
    """One direction for all: raw cosines both near 1, and no recall. Clusters: within 1, between below, recall 1."""
    torch.manual_seed(1)
    group = torch.arange(30).repeat_interleave(2)
    collapsed = embedding_view(torch.ones(60, 16) + 1e-3 * torch.randn(60, 16), group)
    assert collapsed["raw_cosine_within"].estimate > 0.999 and collapsed["raw_cosine_between"].estimate > 0.999
    assert collapsed["recall_at_1"].high < 0.4
    clusters = embedding_view(torch.randn(30, 16)[group] + 1e-3 * torch.randn(60, 16), group)
    assert clusters["recall_at_1"] == (1, 1, 1) and clusters["cosine_within"].low > 0.999
    assert abs(clusters["cosine_between"].estimate) < 0.1 and math.isnan(clusters["cosine_between"].low)
    assert 10 < clusters["effective_rank"].estimate < 16


def test_recall_in_slices_is_recall_at_once():
    """1,030 groups: more rows than one slice of 1,024. Pairs that share a direction of their own are all found; of
    random rows hardly any is, and no row finds itself."""
    torch.manual_seed(2)
    group = torch.arange(1030).repeat(2)
    x = torch.randn(1030, 24)[group] + 0.01 * torch.randn(2060, 24)
    assert embedding_view(x, group)["recall_at_1"].estimate == 1
    assert embedding_view(torch.randn(2060, 24), group)["recall_at_1"].estimate < 0.02
    with pytest.raises(UserError, match="3 groups, 1 with a single wording"):
        embedding_view(torch.randn(5, 2), torch.tensor([0, 0, 1, 1, 2]))
