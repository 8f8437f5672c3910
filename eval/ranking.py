"""How well a similarity ranks documents: recall at k, nDCG and the mean reciprocal rank."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm_jepa import UserError


def ranks(similarity: Tensor, query_keys: Sequence[Hashable], document_keys: Sequence[Hashable]) -> Tensor:
    """[Q] ints: the place, from 1, of the best right document of every query in the order of similarity [Q, N].

    Documents with the key of the query are right. A wrong document that is as similar counts as better, so a space in
    which all points are equal ranks every right document last. Raises UserError for a query without a right document,
    for a NaN, and for another number of keys.
    """
    if similarity.shape != (len(query_keys), len(document_keys)):
        raise UserError(
            f"Similarities of shape {tuple(similarity.shape)} for {len(query_keys)} queries and {len(document_keys)} "
            "documents; give one row for each query and one column for each document."
        )
    if similarity.isnan().any():
        raise UserError(f"{int(similarity.isnan().any(dim=1).sum())} queries have a similarity of NaN; nothing ranks.")
    number = {key: i for i, key in enumerate(dict.fromkeys([*query_keys, *document_keys]))}
    right = torch.tensor([number[key] for key in query_keys])[:, None] == torch.tensor(
        [number[key] for key in document_keys]
    )  # [Q, N]
    if lost := int((~right.any(dim=1)).sum()):
        raise UserError(f"{lost} of {len(query_keys)} queries have no right document, so no rank.")
    similarity = similarity.cpu()
    best = similarity.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values
    return 1 + ((similarity >= best) & ~right).sum(dim=1)


def figures(places: Tensor) -> dict[str, float]:
    """recall_at_1, recall_at_10 and mrr (the mean of 1/rank) of the ranks [Q]."""
    places = places.double()
    return {
        "recall_at_1": float((places <= 1).double().mean()),
        "recall_at_10": float((places <= 10).double().mean()),
        "mrr": float((1 / places).mean()),
    }


class Found(NamedTuple):
    """A right document of a query. place: from 1. gain: how right it is, above 0."""

    place: int
    gain: float


def places_of_right(similarity: Tensor, right: Mapping[int, float]) -> list[Found]:
    """The right documents of a query in the order of its similarities [N], best first.

    right: number of a document -> its gain. Of equally similar documents the less right one counts as better, so that
    a space in which all points are equal finds nothing. Raises UserError for a NaN.
    """
    if similarity.isnan().any():
        raise UserError(f"{int(similarity.isnan().sum())} similarities of a query are NaN; nothing ranks.")
    numbers = torch.tensor(sorted(right))
    is_right = torch.zeros(len(similarity), dtype=torch.bool)
    is_right[numbers] = True
    wrong = similarity[~is_right].sort().values
    scores = similarity[numbers]
    better = len(wrong) - torch.searchsorted(wrong, scores, side="left")  # or equal
    order = sorted(range(len(numbers)), key=lambda i: (-float(scores[i]), right[int(numbers[i])]))
    return [Found(n + 1 + int(better[i]), right[int(numbers[i])]) for n, i in enumerate(order)]


def figures_of_query(found: Sequence[Found], ks: Sequence[int] = (1, 5, 10, 100)) -> dict[str, float]:
    """Figures of one query, of all its right documents, best first.

    recall_at_k: the share of the right documents among the first k. ndcg_at_10: with the gain itself, as trec_eval and
    BEIR do, and the discount log2(place + 1). mrr: 1 / place of the best one.
    """
    recalls = {f"recall_at_{k}": sum(one.place <= k for one in found) / len(found) for k in ks}
    gained = sum(one.gain / math.log2(one.place + 1) for one in found if one.place <= 10)
    ideal = sorted((one.gain for one in found), reverse=True)[:10]
    possible = sum(gain / math.log2(place + 1) for place, gain in enumerate(ideal, start=1))
    return {**recalls, "ndcg_at_10": gained / possible, "mrr": 1 / found[0].place}
