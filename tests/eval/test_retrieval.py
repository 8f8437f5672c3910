"""Claims about `eval.retrieval`: its figures are those of other evaluators, and bad data is one line."""

from __future__ import annotations

import json
import math

import pytest
import torch

from eval.ranking import Found, figures_of_query, places_of_right
from eval.retrieval import load, main, score, similarity_of_bm25
from llm_jepa import UserError
from tests.lm.test_embedder import RECORDS, made

ROWS = [
    {"query": "a vowel", "positive": ["[aeiou]", "a|e|i|o|u"]},
    {"query": "a digit", "positive": "[0-9]"},
    {"query": "a digit", "positive": "digit or number"},
    {"query": "the letter b", "positive": "letter b"},
]


def write(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_places_and_figures_by_hand():
    """Documents 0 and 3 are right; 2 is as similar as 3, so it counts as better: places 1 and 4."""
    found = places_of_right(torch.tensor([0.9, 0.7, 0.5, 0.5]), {0: 1.0, 3: 2.0})
    assert found == [Found(1, 1.0), Found(4, 2.0)]
    figures = figures_of_query(found, ks=(1, 4))
    gained, ideal = 1 + 2 / math.log2(5), 2 + 1 / math.log2(3)
    assert figures == pytest.approx({"recall_at_1": 0.5, "recall_at_4": 1.0, "ndcg_at_10": gained / ideal, "mrr": 1.0})
    equal = places_of_right(torch.zeros(12), {4: 1.0, 5: 3.0})
    assert equal == [Found(11, 1.0), Found(12, 3.0)], "a space of one point finds nothing"
    assert figures_of_query(equal)["ndcg_at_10"] == 0
    with pytest.raises(UserError, match="1 similarities of a query are NaN"):
        places_of_right(torch.tensor([0.0, math.nan]), {0: 1.0})


def test_figures_agree_with_sentence_transformers():
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(40, 8, generator=generator), torch.randn(200, 8, generator=generator)
    right = [{int(n): 1.0 for n in torch.randperm(200, generator=generator)[: 1 + i % 4]} for i in range(40)]

    class Fixed:
        similarity_fn_name = "dot"

        def encode_query(self, texts, **_):
            return queries[[int(text) for text in texts]]

        def encode_document(self, texts, **_):
            return documents[[int(text) for text in texts]]

    theirs = evaluation.InformationRetrievalEvaluator(
        {str(i): str(i) for i in range(40)},
        {str(i): str(i) for i in range(200)},
        {str(i): {str(n) for n in gains} for i, gains in enumerate(right)},
        ndcg_at_k=[10], mrr_at_k=[200], precision_recall_at_k=[5, 100], batch_size=64,
        score_functions={"dot": lambda a, b: a @ b.T},
    ).compute_metrices(Fixed())["dot"]  # fmt: skip
    ours = [figures_of_query(places_of_right(s, r)) for s, r in zip(queries @ documents.T, right, strict=True)]
    for mine, name, k in (
        ("recall_at_5", "recall@k", 5), ("recall_at_100", "recall@k", 100), ("ndcg_at_10", "ndcg@k", 10),
        ("mrr", "mrr@k", 200),
    ):  # fmt: skip
        assert sum(figures[mine] for figures in ours) / 40 == pytest.approx(theirs[name][k]), mine


def test_equal_queries_are_one_and_share_their_documents(tmp_path):
    questions = load(write(tmp_path / "rows.jsonl", ROWS))
    assert questions.queries == ["a vowel", "a digit", "the letter b"]
    assert questions.right == [{0: 1.0, 1: 1.0}, {2: 1.0, 3: 1.0}, {4: 1.0}]
    trained = [{"prompt": row["query"], "completion": row["positive"]} for row in ROWS[1:]]
    assert load(write(tmp_path / "pairs.jsonl", trained)).documents == questions.documents[2:]
    turns = [{"role": "user", "content": "lines"}, {"role": "assistant", "content": ".*"}]
    conversation = load(write(tmp_path / "messages.jsonl", [{"messages": turns}]))
    assert conversation.queries == [turns[:1]] and conversation.texts == ["lines"] and conversation.documents == [".*"]


def test_a_folder_in_the_layout_of_beir(tmp_path):
    write(tmp_path / "corpus.jsonl", [{"_id": 7, "title": "Vowels", "text": "[aeiou]"}, {"_id": "d", "text": "[0-9]"}])
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "a vowel"}, {"_id": "unjudged", "text": "x"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t7\t2\nq\td\t0\n")
    questions = load(str(tmp_path))
    assert questions.documents == ["Vowels [aeiou]", "[0-9]"] and questions.queries == ["a vowel"]
    assert questions.right == [{0: 2.0}], "a judgement of 0 says that it is wrong"
    with pytest.raises(UserError, match="lacks qrels/dev.tsv"):
        load(str(tmp_path), "dev")
    for line, message in (("q\t8\t1\n", "names the document '8'"), ("q\t7\n", "line 2: needs query-id")):
        (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + line)
        with pytest.raises(UserError, match=message):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "x"}], "row 0: give {'query'"),
        ([{"query": "x", "positive": []}], "row 0: give {'query'"),
        ([{"query": " ", "positive": "a"}], "row 0: give {'query'"),
        ([{"query": "x", "positive": ["a", " "]}], "1 of 2 documents of .* are blank"),
        ([{"question": "x"}], "row 0: found the columns"),
    ],
)
def test_bad_rows_are_one_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "rows.jsonl", rows))


def test_bm25_finds_common_words_and_nothing_without_any(tmp_path):
    pytest.importorskip("bm25s")
    questions = load(write(tmp_path / "rows.jsonl", ROWS))
    scores = similarity_of_bm25(questions)(slice(0, 3))
    assert scores.shape == (3, 5) and scores[0].abs().sum() == 0, "no document has the word vowel"
    assert scores[1].argmax() == 3 and scores[2].argmax() == 4
    figures = score(similarity_of_bm25(questions), questions, ks=(1,))
    assert figures["recall_at_1"] == [0.0, 0.5, 1.0] and figures["mrr"] == [pytest.approx(1 / 4), 1.0, 1.0]


def test_the_command_scores_models_beside_the_bars(tokenizer, tmp_path, capsys):
    """By hand: the similarities are cosines of prompts and completions. (The last layer has states of one length.)"""
    pytest.importorskip("bm25s")
    embedder = made(tokenizer, RECORDS["message"])
    embedder.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "figures.json"
    words = ["--data", data, "--out", str(out), "--bars", "bm25", "--k", "1", "2"]
    assert main(["--model", f"jepa={tmp_path / 'model'}", *words]) == 0
    said = capsys.readouterr().out
    assert "3 queries, 5 documents" in said and "jepa" in said and "bm25" in said and "95 % bootstrap" in said
    result = json.loads(out.read_text())
    assert result["num_queries"] == 3 and set(result["arms"]) == {"jepa", "bm25"}
    assert str(tmp_path) not in out.read_text(), "no path of this machine"
    questions = load(data)
    prompts, completions = embedder.encode_prompts(questions.queries), embedder.encode_completions(questions.documents)
    cosines = torch.nn.functional.cosine_similarity(prompts[:, None], completions, dim=-1)
    by_hand = [figures_of_query(places_of_right(c, r), (1, 2)) for c, r in zip(cosines, questions.right, strict=True)]
    for name, cell in result["arms"]["jepa"]["figures"].items():
        assert cell["estimate"] == pytest.approx(sum(figures[name] for figures in by_hand) / 3), name
        assert cell["low"] <= cell["estimate"] <= cell["high"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No model is given"),
        (["--model", "x=a", "--model", "x=b"], "Two arms are called 'x'"),
        (["--model", "bm25=a"], "Two arms are called 'bm25'"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--sentence-transformer", "a", "--limit", "0"], "--limit"),
    ],
)
def test_bad_commands_are_one_line_and_exit_code_2(tmp_path, words, message, capsys):
    data = write(tmp_path / "rows.jsonl", ROWS)
    try:
        code = main([*words, "--data", data, "--bars"])
    except SystemExit as ended:
        code = ended.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err, err
