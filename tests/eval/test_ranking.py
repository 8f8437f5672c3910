"""Ranks worked by hand, and against sentence-transformers' own evaluator."""

from __future__ import annotations

import pytest
import torch

from eval.ranking import figures, ranks
from llm_jepa import UserError


def test_ranks_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.1, 0.5], [0.3, 0.3, 0.3]])
    assert ranks(similarity, "abc", "abc").tolist() == [1, 3, 3], "an equal wrong document counts as better"
    assert ranks(similarity, "aab", "abb").tolist() == [1, 2, 2]
    found = figures(torch.tensor([1, 3, 20]))
    assert found == pytest.approx({"recall_at_1": 1 / 3, "recall_at_10": 2 / 3, "mrr": (1 + 1 / 3 + 1 / 20) / 3})


def test_ranks_agree_with_sentence_transformers():
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(40, 8, generator=generator), torch.randn(60, 8, generator=generator)
    keys_of_queries = [i % 25 for i in range(40)]
    keys_of_documents = [i % 30 for i in range(60)]  # two right documents a query

    evaluator = evaluation.InformationRetrievalEvaluator(
        {f"q{i}": str(i) for i in range(40)},
        {f"d{i}": str(i) for i in range(60)},
        {f"q{i}": {f"d{j}" for j in range(60) if keys_of_documents[j] == keys_of_queries[i]} for i in range(40)},
        accuracy_at_k=[1, 10], mrr_at_k=[60], score_functions={"dot": lambda a, b: a @ b.T},
        batch_size=64,
    )  # fmt: skip

    class Fixed:
        """Vectors by number; the evaluator asks nothing else of a model."""

        similarity_fn_name = "dot"

        def encode_query(self, texts, **_):
            return queries[[int(text) for text in texts]]

        def encode_document(self, texts, **_):
            return documents[[int(text) for text in texts]]

    theirs = evaluator.compute_metrices(Fixed())["dot"]
    ours = figures(ranks(queries @ documents.T, keys_of_queries, keys_of_documents))
    assert ours["recall_at_1"] == pytest.approx(theirs["accuracy@k"][1])
    assert ours["recall_at_10"] == pytest.approx(theirs["accuracy@k"][10])
    assert ours["mrr"] == pytest.approx(theirs["mrr@k"][60])


@pytest.mark.parametrize(
    ("similarity", "documents", "message"),
    [
        (torch.ones(2, 3), "ab", "one column for each document"),
        (torch.full((2, 2), torch.nan), "ab", "NaN"),
        (torch.ones(2, 2), "ac", "1 of 2 queries have no right document"),
    ],
)
def test_what_cannot_be_ranked_is_refused(similarity, documents, message):
    with pytest.raises(UserError, match=message):
        ranks(similarity, "ab", documents)
