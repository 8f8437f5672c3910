"""Claims about CIDEr-D: numbers worked by hand, and equality with coco-caption's scorer where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.graders.cider import cider_d, tokenize
from tests.properties import examples

LN2, LN3 = math.log(2), math.log(3)


def test_the_reference_itself_scores_ten_from_four_words_on_and_less_below():
    """Four words: 4 of 4 n-gram orders have a cosine of 1. Three words: no 4-gram, so 3/4."""
    mean, scores = cider_d(["a b c d", "e f g"], [["a b c d"], ["e f g"]])
    assert scores == pytest.approx([10, 7.5]) and mean == pytest.approx(8.75)


def test_a_partial_match_worked_by_hand():
    """Two documents that share nothing: every idf is ln 2 and cancels. c = "a b x", r = "a b c d", gap 1 word.

    1-grams: 2 shared, norms sqrt 3 and 2: 1 / sqrt 3. 2-grams: 1 shared of 2 and of 3: 1 / sqrt 6. Others: 0.
    """
    _, scores = cider_d(["a b x", "q"], [["a b c d"], ["r s"]])
    expected = 10 / 4 * (1 / math.sqrt(3) + 1 / math.sqrt(6)) * math.exp(-1 / 72)
    assert scores == pytest.approx([expected, 0])


def test_rare_words_weigh_more_and_words_of_every_document_nothing():
    """Three documents: "the" in all (0), "cat" in two (ln 3/2), "sat" in one (ln 3).

    c = "the cat" has 1-grams (0, ln 3/2), r = "cat sat" (ln 3/2, ln 3): cosine ln 3/2 / hypot(ln 3/2, ln 3). No 2-gram.
    """
    _, scores = cider_d(["the cat", "x", "x"], [["cat sat", "the"], ["the cat"], ["the dog"]])
    w = math.log(1.5)
    against_first = 10 / 4 * w / math.hypot(w, LN3)
    assert scores[0] == pytest.approx(against_first / 2)  # "the" alone has weight 0: similarity 0, but it counts


def test_a_repeated_word_is_clipped_to_the_reference():
    """c = "a a a", r = "a b": weights 3 and (1, 1), times ln 2. min(3, 1) * 1 / (3 sqrt 2), not 3 / (3 sqrt 2)."""
    _, scores = cider_d(["a a a", "q"], [["a b"], ["r"]])
    assert scores[0] == pytest.approx(10 / 4 / (3 * math.sqrt(2)) * math.exp(-1 / 72))


def test_too_short_and_too_long_captions_lose_alike():
    """Swapped texts have the same cosine and the same gap of two words, exp(-4 / 72)."""
    _, scores = cider_d(["a b", "a b c d"], [["a b c d"], ["a b"]], document_frequency=[["z"], ["y"]])
    expected = 10 / 4 * (2 / math.sqrt(8) + 1 / math.sqrt(3)) * math.exp(-4 / 72)
    assert scores == pytest.approx([expected, expected])


def test_a_corpus_gives_one_item_its_score():
    """idf from three documents: "a" in two, ln 3/2, "b" in none, taken as one, ln 3."""
    _, scores = cider_d(["b"], [["a b"]], document_frequency=[["a", "a a"], ["a c"], ["d"]])
    expected = 10 / 4 * LN3 / math.hypot(math.log(1.5), LN3) * math.exp(-1 / 72)
    assert scores == pytest.approx([expected])


def test_a_document_counts_once_however_often_it_says_a_word():
    """ "a" five times in one document of two has document frequency 1: r = "a b", c = "a", both words ln 2."""
    _, scores = cider_d(["a"], [["a b"]], document_frequency=[["a a", "a", "a a b"], ["c"]])
    assert scores == pytest.approx([10 / 4 / math.sqrt(2) * math.exp(-1 / 72)])


@pytest.mark.parametrize(
    ("candidates", "references", "corpus", "said"),
    [
        (["a"], [["a"]], None, "document_frequency="),
        (["a"], [["a"]], [["a"]], "0 for one document"),
        ([], [], None, "0 item"),
        (["a"], [["a"], ["b"]], None, "1 candidates and 2"),
        (["a", "b"], [["a"], []], None, "Item 1 has no list"),
        (["a", "b"], [["a"], "b"], None, "Item 1 has no list"),
        (["a"], [["a"]], ["a", "b"], "one list per document"),
    ],
)
def test_what_has_no_score_is_refused(candidates, references, corpus, said):
    with pytest.raises(ValueError, match=said):
        cider_d(candidates, references, document_frequency=corpus)


def test_tokens_are_lower_case_words_without_punctuation():
    text = "A man's T-shirt, (red); isn't   it? 2 dogs -- 'yes'… Éclair!"
    assert tokenize(text) == ["a", "man's", "t-shirt", "red", "isn't", "it", "2", "dogs", "yes", "éclair"]
    assert tokenize(" .,!") == []


WORDS = st.sampled_from(["a", "man", "rides", "the", "red", "bike", "dog"])
CAPTION = st.lists(WORDS, max_size=9).map(" ".join)
ITEM = st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=3))


@examples(150)
@given(st.lists(ITEM, min_size=2, max_size=6))
def test_equal_to_coco_caption(items):
    """Any captions, empty and repeated ones too: the same number per item and in the mean."""
    scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    candidates, references = [c for c, _ in items], [r for _, r in items]
    if not any(text for texts in references for text in texts):
        references[0] = ["a"]  # coco-caption takes the maximum over all n-grams of all references
    expected_mean, expected = scorer.compute_score(
        dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)}
    )
    mean, scores = cider_d(candidates, references)
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-9)  # ln a - ln b there, ln(a / b) here
    assert mean == pytest.approx(expected_mean, abs=1e-9)


@examples(100)
@given(st.lists(ITEM, min_size=2, max_size=5))
def test_scores_lie_between_0_and_10(items):
    _, scores = cider_d([c for c, _ in items], [r for _, r in items])
    assert (scores >= 0).all() and (scores <= 10 + 1e-9).all()
