"""Claims about Semantic Tube Prediction: which displacements are drawn, how often, and what their distance is.

With one-hot states, h_p = e_p, a displacement *is* its list of signs, so drawn tubes are compared as vectors with those
of the two sources, written out here token by token.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.core.losses import jepa_distance
from llm_jepa.lm.tubes import Tube, draw_tube, stack_tubes, tube_distance

SPANS = [(3, 6), (9, 11)]  # user tokens 3, 4, 5; assistant tokens 9, 10; the template's between and around them
LENGTH = 13


def vector(entries):
    """The displacement as a tuple of LENGTH integers."""
    found = [0] * LENGTH
    for position, sign in entries:
        found[position] += sign
    return tuple(found)


def released(spans, a, b):
    """(patch, before + after) of stp.py, get_embeddings, in its own terms: states one before the first token, and three
    cases for where the patch lies."""
    state = torch.eye(LENGTH, dtype=torch.long)
    (user_start, user_end), (assistant_start, assistant_end) = spans
    at = lambda offset: (  # noqa: E731
        user_start + offset if user_start + offset < user_end else assistant_start + offset - (user_end - user_start)
    )
    start, end = at(a), at(b)
    h = lambda position: state[position - 1]  # noqa: E731
    if start >= assistant_start:
        before = h(user_end) - h(user_start) + h(start) - h(assistant_start)
        patch, after = h(end) - h(start), h(assistant_end) - h(end)
    elif end <= user_end:
        before, patch = h(start) - h(user_start), h(end) - h(start)
        after = h(user_end) - h(end) + h(assistant_end) - h(assistant_start)
    else:
        before, after = h(start) - h(user_start), h(assistant_end) - h(end)
        patch = h(user_end) - h(start) + h(end) - h(assistant_start)
    return tuple(patch.tolist()), tuple((before + after).tolist())


def drawn(spans, formula, count=6000):
    """How often each tube is drawn, as a pair of vectors."""
    rng = random.Random(0)
    tubes = [draw_tube(spans, formula, rng) for _ in range(count)]
    return Counter((vector(tube.first), vector(tube.second)) for tube in tubes)


# -- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spans", [SPANS, [(1, 2), (2, 6)], [(2, 6), (6, 7)], [(1, 2), (11, 12)]])
def test_the_code_formula_draws_the_tubes_of_the_released_code(spans):
    """All of them, each as often as a ~ U{0..L-1}, b ~ U{a+1..L} drawn again until the patch is not everything: the
    share of (a, b) is 1 / L times one over the number of b left. To 4 standard deviations of 6000 draws."""
    length = sum(end - start for start, end in spans)
    expected = Counter()
    for a in range(length):
        ends = [b for b in range(a + 1, length + 1) if (a, b) != (0, length)]
        for b in ends:
            expected[released(spans, a, b)] += 1 / length / len(ends)
    found = drawn(spans, "code")
    assert set(found) == set(expected)
    for tube, share in expected.items():
        assert abs(found[tube] / 6000 - share) < 4 * (share * (1 - share) / 6000) ** 0.5 + 1e-9


def test_the_code_formula_worked_by_hand():
    """Tokens 3 4 5 | 9 10. Offsets 1..4 are tokens 4, 5 and 9: the patch is h5 - h3 + h9 - h8, the rest h3 - h2 before
    and h10 - h9 after. Offsets 0..3 are the whole user message: h5 - h2, and h10 - h8 is left."""
    signs = lambda **at: tuple(at.get(f"h{p}", 0) for p in range(LENGTH))  # noqa: E731
    found = drawn(SPANS, "code")
    assert (signs(h5=1, h3=-1, h9=1, h8=-1), signs(h3=1, h2=-1, h10=1, h9=-1)) in found
    assert (signs(h5=1, h2=-1), signs(h10=1, h8=-1)) in found
    assert len(found) == 5 * 6 / 2 - 1


def test_the_code_formula_has_every_content_token_on_one_side():
    """Both displacements together are that of the whole content, h5 - h2 + h10 - h8; states between are never read."""
    for first, second in drawn(SPANS, "code", 300):
        assert [x + y for x, y in zip(first, second, strict=True)] == [0, 0, -1, 0, 0, 1, 0, 0, -1, 0, 1, 0, 0]
        assert not any(side[p] for side in (first, second) for p in (0, 1, 6, 7, 11, 12))


def test_the_paper_formula_draws_three_positions_from_the_first_to_the_last_content_token():
    """All 8 x 7 x 6 / 6 triples of 3..10, the template's 6, 7, 8 among them, equally often: 56 of 1 / 56."""
    axis = torch.eye(LENGTH, dtype=torch.long)
    expected = {
        (tuple((axis[r] - axis[s]).tolist()), tuple((axis[t] - axis[r]).tolist()))
        for s, r, t in combinations(range(3, 11), 3)
    }
    found = drawn(SPANS, "paper")
    assert set(found) == expected and len(expected) == 56
    assert all(abs(n / 6000 - 1 / 56) < 4 * (1 / 56 / 6000) ** 0.5 for n in found.values())


def test_a_tube_is_that_of_its_generator():
    """The same seed, the same tube; and nobody else's generator moves, or resumed runs would differ."""
    random.seed(3)
    state = random.getstate()
    for formula in ("paper", "code"):
        first, second = ([draw_tube(SPANS, formula, random.Random(seed)) for seed in range(20)] for _ in range(2))
        assert first == second and len({str(tube) for tube in first}) > 6
    assert random.getstate() == state


@pytest.mark.parametrize(
    "spans, paper, code",
    [
        ([], 0, 0),
        ([(4, 4), (7, 7)], 0, 0),
        ([(4, 5), (7, 7)], 0, 0),  # one token: L = 1, where the reference never ends
        ([(4, 6)], 0, 2),  # two: either is the patch
        ([(4, 5), (7, 8)], 4, 2),  # 4 5 6 7 have four triples
        ([(4, 7)], 1, 5),
        ([(4, 4), (7, 10)], 1, 5),  # an empty span neither counts nor stretches the row
        ([(4, 7), (9, 9)], 1, 5),
        ([(0, 3)], 1, 2),  # token 0 has no state before it: 1 and 2 are left
        ([(0, 2)], 0, 0),
        ([(0, 1), (1, 3)], 1, 2),
    ],
)
def test_short_rows_have_few_tubes_or_none(spans, paper, code):
    for formula, count in (("paper", paper), ("code", code)):
        if count:
            assert len(drawn(spans, formula, 400)) == count
        else:
            assert all(draw_tube(spans, formula, random.Random(seed)) is None for seed in range(20))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=4, max_size=4).map(sorted),
    st.sampled_from(["paper", "code"]),
    st.integers(0, 10**6),
)
def test_a_tube_stays_in_its_row(cuts, formula, seed):
    """From one state before the content (never before the row) to its last token; signs add up to nothing, so a
    constant added to all states changes nothing; neither side is empty."""
    spans = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
    tube = draw_tube(spans, formula, random.Random(seed))
    content = [p for start, end in spans for p in range(start, end)]
    if tube is None:
        assert len(content) < 4
        return
    for side in tube:
        assert side and sum(sign for _, sign in side) == 0 and {sign for _, sign in side} == {-1, 1}
        assert len({position for position, _ in side}) == len(side)
        assert max(content[0] - (formula == "code"), 0) <= min(side)[0] <= max(side)[0] <= content[-1]


def test_an_unknown_formula_is_refused_by_naming_the_known_ones():
    with pytest.raises(ValueError, match="paper or code"):
        draw_tube(SPANS, "released", random.Random(0))


@pytest.mark.parametrize("spans", [[(5, 8), (2, 4)], [(2, 6), (5, 8)], [(-1, 4)]])
def test_spans_out_of_order_are_a_mistake_of_ours(spans):
    with pytest.raises(AssertionError):
        draw_tube(spans, "code", random.Random(0))


# -- distance -------------------------------------------------------------------------------------------------------

# Displacements h1 - h0 = (3, 4), h2 - h1 = (4, 3), h3 - h2 = (-3, -4), h4 - h3 = (5, -12).
PATH = [[1.0, 1.0], [4.0, 5.0], [8.0, 8.0], [5.0, 4.0], [10.0, -8.0]]


def distance(hidden, tubes):
    return tube_distance(hidden, stack_tubes(tubes, hidden.shape[1]))


def paper_tube(s, r, t):
    return Tube([(r, 1), (s, -1)], [(t, 1), (r, -1)])


def states(rows=2, length=LENGTH, dimensions=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, dimensions, generator=generator, dtype=torch.float64).to(dtype)


def tubes(seed=4):
    """Of both formulas, in both rows: sides of 2, 4 and 6 entries."""
    rng = random.Random(seed)
    found = [(i % 2, 0, draw_tube(SPANS, ("paper", "code")[i // 2 % 2], rng)) for i in range(12)]
    assert {len(side) for _, _, tube in found for side in tube} == {2, 4, 6}
    return found


def one_by_one(hidden, row, offset, tube):
    """Each displacement summed entry by entry, and 1 - a.b / |a||b|."""
    a, b = (sum(sign * hidden[row, offset + position] for position, sign in side) for side in tube)
    return 1 - a @ b / (a.norm() * b.norm())


def test_distances_worked_by_hand():
    """(3, 4).(4, 3) = 24 of 25;  (4, 3).(-3, -4) = -24 of 25;  (7, 7).(-3, -4) = -49 of 5 sqrt 98;  (3, 4) + (5, -12) =
    (8, -8) against (4, 3): 8 of 5 sqrt 128."""
    hidden = torch.tensor([[[9.0, 9.0]] * 5, PATH], dtype=torch.float64)
    both = Tube([(1, 1), (0, -1), (4, 1), (3, -1)], [(2, 1), (1, -1)])
    given = [(1, 0, paper_tube(0, 1, 2)), (1, 0, paper_tube(1, 2, 3)), (1, 0, paper_tube(0, 2, 3)), (1, 0, both)]
    expected = [1 - 24 / 25, 1 + 24 / 25, 1 + 49 / (5 * 98**0.5), 1 - 8 / (5 * 128**0.5)]
    assert distance(hidden, given).tolist() == pytest.approx(expected, rel=1e-10)


def test_distances_and_gradients_are_those_of_each_tube_alone():
    """Tubes of two rows and of several widths in one call, weighted so that none can take another's place."""
    hidden, drawn_tubes = states().requires_grad_(), tubes()
    found = distance(hidden, drawn_tubes)
    expected = torch.stack([one_by_one(hidden, *tube) for tube in drawn_tubes])
    torch.testing.assert_close(found, expected)
    assert found.shape == (12,) and found.unique().numel() == 12
    weight = torch.arange(1.0, 13.0, dtype=hidden.dtype)
    (ours,), (theirs,) = (torch.autograd.grad(value @ weight, hidden) for value in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert ours[:, 2:11].abs().sum(dim=-1).gt(0).any(dim=1).all(), "a zero gradient would compare equal to anything"
    assert ours[:, :2].abs().max() == 0 and ours[:, 11:].abs().max() == 0


def test_the_gradient_is_the_numerical_one():
    hidden, drawn_tubes = states(dimensions=3).requires_grad_(), tubes()[:4]
    assert torch.autograd.gradcheck(lambda h: distance(h, drawn_tubes), (hidden,))


@pytest.mark.parametrize("formula", ["paper", "code"])
def test_a_straight_path_has_no_distance_and_one_that_turns_back_has_two(formula):
    """Whatever the steps' lengths, and the content tokens' displacements are along the line also where the template
    lies between. Turned: r at the far end."""
    steps = torch.tensor([0.3, 1.0, 0.1, 2.0, 0.5, 0.7, 0.2, 3.0, 0.4, 0.6, 1.5, 0.9, 0.8]).cumsum(0)
    hidden = (5 + steps[:, None] * torch.tensor([1.0, -2.0, 0.5]))[None]
    drawn_tubes = [(0, 0, draw_tube(SPANS, formula, random.Random(seed))) for seed in range(30)]
    assert distance(hidden, drawn_tubes).abs().max() < 1e-5
    assert distance(hidden, [(0, 0, paper_tube(3, 9, 4))]).item() == pytest.approx(2, abs=1e-5)


def test_distances_do_not_see_scale_rotation_or_translation():
    hidden, drawn_tubes = states(), tubes()
    rotation = torch.linalg.qr(states(1, 6, 6, seed=1)[0])[0]
    before = distance(hidden, drawn_tubes)
    for same in (7 * hidden, hidden @ rotation, hidden + 30 * rotation[0]):
        torch.testing.assert_close(distance(same, drawn_tubes), before)
    assert (distance(hidden * torch.tensor([5.0, 1, 1, 1, 1, 1]), drawn_tubes) - before).abs().min() > 1e-4


def test_a_packed_example_has_the_distance_it_has_alone():
    """Two rows of 13 tokens laid into one row of 40, from tokens 4 and 20."""
    hidden, packed = states(), states(1, 40, seed=9)
    packed[0, 4:17], packed[0, 20:33] = hidden[0], hidden[1]
    drawn_tubes = tubes()
    moved = [(0, (4, 20)[row], tube) for row, _, tube in drawn_tubes]
    torch.testing.assert_close(distance(packed, moved), distance(hidden, drawn_tubes), rtol=0, atol=0)


def test_states_that_are_not_the_tubes_own_do_not_matter():
    """NaN everywhere else, where the shorter side is padded too, leaves values and gradients finite."""
    tube = Tube([(3, 1), (2, -1), (9, 1), (8, -1)], [(5, 1), (3, -1)])
    hidden = states()
    own = hidden.new_zeros(2, LENGTH, 1).index_fill(1, torch.tensor([2, 3, 5, 8, 9]), 1).bool()
    own[0] = False
    broken = hidden.where(own, torch.nan).requires_grad_()
    found = distance(broken, [(1, 0, tube)])
    torch.testing.assert_close(found, distance(hidden, [(1, 0, tube)]))
    (slope,) = torch.autograd.grad(found.sum(), broken)
    assert slope.isfinite().all() and slope.gt(0).any()
    assert (slope != 0).any(dim=-1).nonzero()[:, 1].tolist() == [2, 3, 5, 8, 9]


def test_without_a_tube_there_is_no_distance():
    """[0], with a gradient of zero: a step whose rows are all too short adds nothing and breaks nothing."""
    hidden = states().requires_grad_()
    found = distance(hidden, [])
    assert found.shape == (0,)
    assert torch.autograd.grad(found.sum(), hidden)[0].abs().max() == 0


def test_states_that_stand_still_have_a_finite_distance_and_gradient():
    """Displacements of zero have no direction."""
    hidden = torch.ones(2, LENGTH, 4, requires_grad=True)
    found = distance(hidden, tubes())
    assert found.tolist() == [1.0] * 12
    assert torch.autograd.grad(found.sum(), hidden)[0].isfinite().all()


def test_bfloat16_states_are_subtracted_in_float32():
    """To 1e-5 of float64 on the same numbers, float32 out, bfloat16 gradients, also under autocast; displacements
    rounded to bfloat16 would be off by more than 1e-3."""
    hidden, drawn_tubes = states().bfloat16().requires_grad_(), tubes()
    expected = distance(hidden.detach().double(), drawn_tubes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distance(hidden, drawn_tubes)
    assert found.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    narrow = torch.stack([
        jepa_distance(*(sum(sign * hidden[row, p] for p, sign in side)[None] for side in tube))
        for row, _, tube in drawn_tubes
    ])  # fmt: skip
    assert (narrow[:, 0].double() - expected).abs().max() > 1e-3, "the inputs are no test of precision"
    (slope,) = torch.autograd.grad(found.sum(), hidden)
    assert slope.dtype == torch.bfloat16 and slope.abs().max() > 0


@pytest.mark.parametrize("offset, last", [(0, LENGTH), (4, 9), (-3, 9)])
def test_a_position_outside_its_row_is_a_mistake_of_ours(offset, last):
    """In the flattened states it would be the next row's or the previous one's."""
    with pytest.raises(AssertionError):
        distance(states(), [(0 if offset >= 0 else 1, offset, paper_tube(2, 5, last))])
