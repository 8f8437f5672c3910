"""CIDEr-D: similarity of a caption to human captions, by their n-grams, weighted by how rare these are.

(Vedantam et al. 2015, arXiv:1411.5726, sections 4 and 5; the details are those of coco-caption's `Cider`, which
computes CIDEr-D under that name.) A score is in 0..10 and already has the factor 10; human captions of COCO are near 1.
Papers print it as it is (1.2) or times 100 (120). Compare only scores over the same references and documents: both the
idf and the mean depend on them.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from .text import safe_to_normalize

MAX_N = 4
SIGMA = 6.0  # words; of the Gaussian penalty on a difference in length
Ngrams = Counter[tuple[str, ...]]


def cider_d(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    document_frequency: Sequence[Sequence[str]] | None = None,
) -> tuple[float, np.ndarray]:
    """(mean, [items] float64): the CIDEr-D of each candidate against its own references.

    With g(c), g(r) the tf-idf vectors of the n-grams of a candidate c and a reference r, and l their lengths in words,

        score = 10 * mean over n = 1..4 and over r of  exp(-(l(c) - l(r))^2 / (2 * 6^2))
                    * sum of min(g(c), g(r)) * g(r) / (||g(c)|| ||g(r)||)

    tf is the count of an n-gram, idf = ln(documents / max(1, documents with the n-gram)), and a document is all the
    references of one item. A pair that lacks n-grams of some n counts 0 for it, so a perfect caption of three words
    scores 7.5.

    Args:
        candidates: one caption per item.
        references: per item one or more captions.
        document_frequency: documents to count instead of `references`, for few items. An n-gram that none of
            them has weighs as much as one that a single document has.

    Raises ValueError if the lengths differ, an item has no reference, or there is only one document: every idf would be
    0, and no score is defined.
    """
    documents = references if document_frequency is None else document_frequency
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates and {len(references)} items of references: give one for each.")
    if empty := [i for i, texts in enumerate(references) if isinstance(texts, str) or not texts]:
        raise ValueError(f"Item {empty[0]} has no list of references; CIDEr compares a caption with human ones.")
    if any(isinstance(texts, str) for texts in documents):
        raise ValueError("document_frequency must hold lists of captions, one list per document, not captions.")
    if not candidates or len(documents) < 2:
        raise ValueError(
            f"{len(candidates)} item(s), {len(documents)} document(s): an n-gram's idf is ln(documents / documents "
            "with it), 0 for one document. Pass document_frequency=<references of a larger set>."
        )
    idf = _inverse_frequency(documents)
    scores = []
    for candidate, texts in zip(candidates, references, strict=True):
        scores.append(np.mean([_similarity(candidate, text, idf) for text in texts]))
    return float(np.mean(scores)), np.array(scores)


def _inverse_frequency(documents: Sequence[Sequence[str]]) -> Callable[[tuple[str, ...]], float]:
    """idf of an n-gram."""
    num_with: Ngrams = Counter()
    for texts in documents:
        num_with.update(set().union(*map(_ngrams, texts)))
    return lambda gram: math.log(len(documents) / max(1, num_with[gram]))


def tokenize(text: str) -> list[str]:
    """Lower-case words: letters, digits, and apostrophes and hyphens inside a word. All other punctuation goes.

    All Unicode forms of a letter count as one, and so do both apostrophes. Without NFC, an accent would end a word.
    Stands in for coco-caption's PTBTokenizer, which needs Java. They differ in contractions ("isn't" is "is n't"
    there) and in rare symbols.
    """
    text = unicodedata.normalize("NFC", safe_to_normalize(text.lower())).replace("\u2019", "'")
    return re.findall(r"\w+(?:['-]\w+)*", text)


def _ngrams(text: str) -> Ngrams:
    """How often the text has each n-gram, for n = 1..MAX_N."""
    words = tokenize(text)
    grams: Ngrams = Counter()
    for n in range(1, MAX_N + 1):
        grams.update(zip(*(words[start:] for start in range(n)), strict=False))
    return grams


def _tf_idf(text: str, n: int, idf: Callable[[tuple[str, ...]], float]) -> dict[tuple[str, ...], float]:
    return {gram: count * idf(gram) for gram, count in _ngrams(text).items() if len(gram) == n}


def _norm(weights: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(weight**2 for weight in weights.values()))


def _similarity(candidate: str, reference: str, idf: Callable[[tuple[str, ...]], float]) -> float:
    total = 0.0
    for n in range(1, MAX_N + 1):
        c, r = _tf_idf(candidate, n, idf), _tf_idf(reference, n, idf)
        norms = _norm(c) * _norm(r)
        if norms > 0:
            # min: repeating a word of the reference gains nothing (the D of CIDEr-D)
            overlap = sum(min(weight, r.get(gram, 0.0)) * r.get(gram, 0.0) for gram, weight in c.items())
            total += overlap / norms
    gap = len(tokenize(candidate)) - len(tokenize(reference))
    return 10 * total / MAX_N * math.exp(-(gap**2) / (2 * SIGMA**2))
