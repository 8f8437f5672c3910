"""The page of VL-JEPA: ShapeStream by text encoder, then a paragraph for each of the other benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llm_jepa.core.json_files import read_json

from ..figures.tables import markdown_table, mean_spread
from . import RESULTS, render, short_commits
from .nl_rx import Column, Result

FOLDER = RESULTS / "vl"
TEXT_ENCODERS = {"scratch": "all from scratch, trained wordings", "minilm": "frozen MiniLM, wordings never trained"}
ROWS = (
    Column("kind of event, 13-way", ".3f", lambda result: result["test"]["kind_accuracy"]),
    Column("the same, by one wording of a kind", ".3f", lambda result: result["test"]["kind_accuracy_one_wording"]),
    Column("the same, trained wordings", ".3f", lambda result: result["trained_wordings"]["kind_accuracy"]),
    Column("the same, unseen compositions", ".3f", lambda result: result["compose"]["kind_accuracy"]),
    Column("text to video, same event, R@1", ".3f", lambda result: result["test"]["same_event_recall_at_1"]),
    Column("questions, mean of all types", ".3f", lambda result: result["test"]["questions_mean"]),
    Column("of these: presence", ".3f", lambda result: result["test"]["questions"]["presence"]),
    Column("of these: where", ".3f", lambda result: result["test"]["questions"]["where"]),
    Column("training, process seconds", ".0f", lambda result: result["summary"]["process_seconds"]),
)


def read_all(pattern: str) -> list[Result]:
    return [read_json(path, is_finite=False) for path in sorted(FOLDER.glob(pattern))]


def shapestream_runs() -> dict[str, list[Result]]:
    """Text encoder -> results by seed."""
    return {name: read_all(f"shapestream-{name}-seed*.json") for name in TEXT_ENCODERS}


def shapestream_table(runs: dict[str, list[Result]]) -> str:
    """Markdown: a column for each text encoder, then the origin of the figures."""
    rows = [["seeds", *(str(len(runs[name])) for name in TEXT_ENCODERS)]]
    for row in ROWS:
        rows.append([row.title, *(row.cell(runs[name]) for name in TEXT_ENCODERS)])
    one = runs["scratch"][0]
    return render(
        "shapestream",
        table=markdown_table(["ShapeStream, test split", *TEXT_ENCODERS.values()], rows),
        num_clips=one["test"]["num_clips"],
        weights=sum(one["weights"].values()),
        commits=short_commits([*runs["scratch"], *runs["minilm"]]),
    )


def vl_tables() -> str:
    """Markdown: the whole page."""
    photos, cost, clips = (read_all(f"{name}.json")[0] for name in ("coco_photos", "vl_cost", "real_clips"))
    recall = {}
    for k in (1, 5):
        recall[k] = mean_spread([100 * share for share in photos["folds"][f"text_to_image_recall_at_{k}"]])
    small, *large = cost["training"]
    return render(
        "vl",
        shapestream=shapestream_table(shapestream_runs()),
        decoding=decoding_figures(read_all("selective_decoding-seed*.json")),
        photos=photos,
        recall=recall,
        clips=clips,
        commits={"photos": short_commits([photos]), "clips": short_commits([clips])},
        small=small,
        large=large,
        stream=cost["streaming"],
    )


def decoding_figures(runs: Sequence[Result]) -> dict[str, Any]:
    """The figures of selective decoding, as mean ± sd over the models of several seeds."""

    def over_seeds(value: Callable[[Result], float], form: str = ".2f") -> str:
        return mean_spread([value(run) for run in runs], form)

    def uniform_over_online(density: str) -> str:
        """If uniform never reaches the accuracy in some runs, the ratio is a lower bound."""
        ratio = over_seeds(lambda run: run[density]["uniform_over_online"])
        never = sum(run[density]["uniform_never_reaches_it"] for run in runs)
        if never:
            ratio += f" (at least: in {never} of {len(runs)} uniform never gets there)"
        return ratio

    def oracle_accuracy(run: Result) -> float:
        accuracy: float = run["sparse"]["curves"]["oracle"][0]["slot_accuracy"]
        return accuracy

    return {
        "seeds": len(runs),
        "streams": runs[0]["settings"]["streams"],
        "seconds": runs[0]["sparse"]["seconds"],
        "decodes": over_seeds(lambda run: run["sparse"]["online"]["decodes"], ".1f"),
        "over_oracle": over_seeds(lambda run: run["sparse"]["online_over_oracle_decodes"]),
        "accuracy": over_seeds(lambda run: run["sparse"]["online"]["slot_accuracy"], ".3f"),
        "oracle_accuracy": over_seeds(oracle_accuracy, ".3f"),
        "sparse_ratio": uniform_over_online("sparse"),
        "dense_ratio": uniform_over_online("dense"),
        "boundary_f1": over_seeds(lambda run: run["sparse"]["online"]["boundary_f1"], ".3f"),
        "seconds_to_caption": over_seeds(
            lambda run: run["sparse"]["latency"]["seconds_to_right_caption_median"], ".1f"
        ),
        "share": over_seeds(lambda run: 100 * run["sparse"]["latency"]["share_with_a_right_caption"], ".0f"),
    }
