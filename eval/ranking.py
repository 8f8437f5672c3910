"""How well a similarity ranks documents: recall at k and the mean reciprocal rank."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

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
