"""Render docs/results/, README.md's table of the families and model_cards/:  python -m eval.report [--check]

Every number comes from the committed files in eval/results/. --check changes nothing, and exits 1 if a rendered file is
stale. So no number in them can be typed by hand.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from llm_jepa import UserError

from .cost.step_cost import figures as step_figures
from .experiments import paraphrases, replication
from .experiments.paraphrases import analysis as paraphrase_analysis
from .experiments.replication import analysis as replication_analysis

ROOT = Path(__file__).parent.parent
README, PAGES, CARDS = ROOT / "README.md", ROOT / "docs" / "results", ROOT / "model_cards"
RESULTS = Path(__file__).parent / "results" / "tiny_nl_rx"
STEP_COST = Path(__file__).parent / "results" / "step_cost" / "cpu.json"
VL = Path(__file__).parent / "results" / "vl"
THROUGHPUT = Path(__file__).parent / "results" / "throughput" / "cpu.json"
BEGIN, END = "<!-- results: {} -->", "<!-- end of results -->"
ARMS = (("sft", "plain SFT"), ("info_nce", "LLM-JEPA, InfoNCE 0.1"), ("cosine", "LLM-JEPA, cosine 1.0"))
PROTOCOLS = ("completion", "paper")
COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...] = (
    ("synth exact", "{:.1f}", lambda r: 100 * r["metrics"]["original"]["exact"]),
    ("synth startswith", "{:.1f}", lambda r: 100 * r["metrics"]["original"]["startswith"]),
    ("synth stop rate", "{:.1f}", lambda r: 100 * r["metrics"]["original"]["stop_rate"]),
    ("turk startswith", "{:.1f}", lambda r: 100 * r["metrics"]["paraphrase"]["startswith"]),
    ("recall@1", "{:.2f}", lambda r: r["model"]["validation"]["recall_at_1"]),
    ("wrong-pair cosine", "{:.2f}", lambda r: r["model"]["validation"]["raw_cosine_mismatched"]),
    ("rank context", "{:.0f}", lambda r: r["model"]["validation"]["effective_rank_predicted"]),
    ("tokens / SFT", "{:.2f}", lambda r: r["model"]["train_tokens"]),
)


def load(folder: Path = RESULTS) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(protocol, arm) -> results, by seed."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        protocol, arm, _ = path.stem.split("-")
        runs.setdefault((protocol, arm), []).append(json.loads(path.read_text()))
    return runs


def table(runs: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Markdown: mean +- sample standard deviation over seeds, an arm a row."""
    lines = ["| labels | arm | " + " | ".join(name for name, _, _ in COLUMNS) + " |"]
    lines.append("|---|---|" + "---:|" * len(COLUMNS))
    for protocol in PROTOCOLS:
        for arm, title in ARMS:
            results = runs.get((protocol, arm), [])
            if not results:
                continue
            cells = []
            for name, form, value in COLUMNS:
                values = [value(result) for result in results]
                if name == "tokens / SFT":
                    baseline = statistics.mean(value(result) for result in runs[protocol, "sft"])
                    cells.append(form.format(statistics.mean(values) / baseline))
                else:
                    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
                    cells.append(form.format(statistics.mean(values)) + spread)
            lines.append(f"| {protocol} | {title} | " + " | ".join(cells) + " |")
    lines += ["", *_differences(runs)]
    every = [result for results in runs.values() for result in results]
    if every:
        seeds = sorted({result["model"]["run"]["seed"] for result in every})
        commits = sorted({result["environment"]["commit"][:7] for result in every})
        items, dropped = every[0]["items"], every[0]["dropped_as_known_from_train"]
        versions = every[0]["environment"]
        lines += [
            "",
            f"Mean ± sd over seeds {', '.join(map(str, seeds))} on {items} test lines ({dropped} of "
            f"{items + dropped} left out because the regex or a text stands in train); % of lines; "
            f"commit {', '.join(commits)}; torch {versions['torch']}, transformers {versions['transformers']}, "
            f"trl {versions['trl']}. One file a run: `eval/results/tiny_nl_rx/`.",
        ]
    return "\n".join(lines)


def _differences(runs: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """LLM-JEPA minus SFT of the same seed (same weights at the start, same order of data), startswith, in points."""
    lines = ["| labels | arm minus SFT of the same seed, startswith | synth | turk |", "|---|---|---:|---:|"]
    for protocol in PROTOCOLS:
        for arm, title in ARMS[1:]:
            if (protocol, arm) not in runs or (protocol, "sft") not in runs:
                continue
            cells = []
            for wording in ("original", "paraphrase"):
                of = lambda result, w=wording: 100 * result["metrics"][w]["startswith"]  # noqa: E731
                sft = {result["model"]["run"]["seed"]: of(result) for result in runs[protocol, "sft"]}
                gaps = [of(result) - sft[result["model"]["run"]["seed"]] for result in runs[protocol, arm]]
                spread = f" ± {statistics.stdev(gaps):.1f}" if len(gaps) > 1 else ""
                cells.append(f"{statistics.mean(gaps):+.1f}{spread} ({', '.join(f'{gap:+.1f}' for gap in gaps)})")
            lines.append(f"| {protocol} | {title} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else []


STEP_ARMS = (
    ("ours", "LLM-JEPA, one predictor token"),
    ("ours_k0", "without predictor tokens"),
    ("ours_message", "`context_view: message`"),
    ("ours_forward_only", "`target_encoder: stop_gradient`"),
    ("ours_cached", "`target_encoder: base`"),
    ("ours_dropout75", "`jepa_dropout: 0.75`"),
    ("sft_packed", "plain SFT, `share_rows: true`"),
    ("ours_packed", "LLM-JEPA, `share_rows: true`"),
    ("two_rows", "two rows and an additive mask (published option)"),
    ("three_rows", "three rows (published default)"),
    ("three_rows_512", "three rows padded to 512 (published)"),
)


def step_table(path: Path = STEP_COST) -> str:
    """Markdown: a step of each arm over plain SFT's, a column per data set of the body-dominated model."""
    result = json.loads(path.read_text())
    cells = {cell["data"]: cell for cell in result["cells"] if cell["model"] == "body"}
    names = {"nl_rx": "NL-RX", "longer": "Spider"}
    lines = [
        "| a step over plain SFT's | " + " | ".join(f"{names[d]}: time | tokens | memory" for d in cells) + " |",
        "|---|" + "---:|---:|---:|" * len(cells),
    ]
    for arm, title in STEP_ARMS:
        shown = []
        for cell in cells.values():
            arms = cell["arms"]
            time = step_figures.paired(arms, arm, "sft", result["clock"])
            memory = sum(arms[arm]["peak_memory"]) / sum(arms["sft"]["peak_memory"][: len(arms[arm]["peak_memory"])])
            tokens = step_figures.token_ratio(arms, arm, "sft")
            shown.append(f"{time.median:.2f} [{time.low:.2f}, {time.high:.2f}] | {tokens:.2f} | {memory:.2f}")
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    some = next(iter(cells.values()))
    e = result["environment"]
    return "\n".join(lines) + (
        f"\n\nMedian [min, max] of {len(some['arms']['sft']['wall_s'])} interleaved repetitions (CPU time, one thread, "
        f"forward and backward of a micro-batch of {result['config']['batch_size']}), padded tokens, peak memory above "
        f"the resting model. A {some['parameters'] / 1e6:.0f}M-parameter Llama in float32, 8k tokenizer, Llama-3-like "
        f"template; every arm scores label positions only and computes the same loss. Commit {e['commit'][:7]}; torch "
        f"{e['torch']}, transformers {e['transformers']}. Data: `eval/results/step_cost/`."
    )


SHAPESTREAM: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...] = (
    ("kind of event, 13-way", "{:.3f}", lambda r: r["test"]["kind_accuracy"]),
    ("the same, by one wording of a kind", "{:.3f}", lambda r: r["test"]["kind_accuracy_one_wording"]),
    ("the same, trained wordings", "{:.3f}", lambda r: r["trained_wordings"]["kind_accuracy"]),
    ("the same, unseen compositions", "{:.3f}", lambda r: r["compose"]["kind_accuracy"]),
    ("text to video, same event, R@1", "{:.3f}", lambda r: r["test"]["same_event_recall_at_1"]),
    ("questions, mean of all types", "{:.3f}", lambda r: r["test"]["questions_mean"]),
    ("of these: presence", "{:.3f}", lambda r: r["test"]["questions"]["presence"]),
    ("of these: where", "{:.3f}", lambda r: r["test"]["questions"]["where"]),
    ("training, process seconds", "{:.0f}", lambda r: r["summary"]["process_seconds"]),
)


def shapestream_runs(folder: Path = VL) -> dict[str, list[dict[str, Any]]]:
    """Text encoder -> results, by seed."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("shapestream-*-seed*.json")):
        runs.setdefault(path.stem.split("-")[1], []).append(json.loads(path.read_text()))
    return runs


def shapestream_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a text encoder a column, and where the figures come from."""
    titles = {"scratch": "all from scratch, trained wordings", "minilm": "frozen MiniLM, wordings never trained"}
    shown = [name for name in titles if name in runs]
    lines = ["| ShapeStream, test split | " + " | ".join(titles[name] for name in shown) + " |"]
    lines.append("|---|" + "---:|" * len(shown))
    lines.append("| seeds | " + " | ".join(str(len(runs[name])) for name in shown) + " |")
    for name, form, value in SHAPESTREAM:
        lines.append(f"| {name} | " + " | ".join(_mean_and_spread(runs[arm], value, form) for arm in shown) + " |")
    one = runs[shown[0]][0]
    commits = sorted({r["environment"]["commit"][:7] for arm in shown for r in runs[arm]})
    lines += [
        "",
        f"Mean ± sd over seeds, {one['test']['num_clips']} clips a split, "
        f"{sum(one['weights'].values()) / 1e6:.2f}M weights, trained in bfloat16 by one CPU thread; chance is 0.077 "
        f"for kinds; commit {', '.join(commits)}. A kind is the mean of its wordings, as in CLIP's protocol. The clips "
        "measured serve published figures alone; the wordings never trained were looked at in development, on other "
        "clips. Every question type and kind: `eval/results/vl/`.",
    ]
    return "\n".join(lines)


def vl_tables(folder: Path = VL) -> str:
    """Markdown: ShapeStream by text encoder, then one line for each of the other benchmarks."""
    photos, cost, clips = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("coco_photos", "vl_cost", "real_clips")
    )
    r1, r5 = ([100 * recall for recall in photos["folds"][f"text_to_image_recall_at_{k}"]] for k in (1, 5))
    c = photos["cider"]
    small, *large = cost["training"]
    stream = cost["streaming"]
    lines = [
        shapestream_table(shapestream_runs(folder)),
        "",
        decoding_line([json.loads(path.read_text()) for path in sorted(folder.glob("selective_decoding-seed*.json"))]),
        f"- **Photos** ({len(r1)} folds of {len(photos['captions'])} COCO photos, MobileNetV2 and MiniLM frozen): text "
        f"to image R@1 {statistics.mean(r1):.1f} ± {statistics.stdev(r1):.1f} %, R@5 {statistics.mean(r5):.1f} ± "
        f"{statistics.stdev(r5):.1f} % (chance {100 * photos['chance_recall_at_1']:.1f} and five times that). CIDEr-D "
        f"of the y_decoder {c['projected on the memory']:.2f} from the projected embedding, {c['as predicted']:.2f} "
        f"from the prediction as it is, {c['nearest caption of the memory']:.2f} for the memory's nearest caption, "
        f"{c['a human caption against the four others']:.2f} for a human. MiniLM itself was trained on COCO captions; "
        "no caption of a test photo is in the decoder's training or the memory.",
        f"- **Real clips** ({', '.join(sorted(clips['clips']))}), boundary F1 at ± 1 s: "
        + "; ".join(f"{way} {value:.2f}" for way, value in clips["summary"].items())
        + ". Too few clips to rank the ways.",
        f"- **Cost**: cached features train {small['cached_over_plain']:.1f} times as many samples a second "
        f"({small['shape']})"
        + "".join(f", {row['cached_over_plain']:.2f} times at {row['shape']}" for row in large)
        + f". A window takes {1000 * stream['window_latency_s']:.0f} ms, a decode {1000 * stream['decode_s']:.0f} ms "
        f"({stream['model']}): the decoder's share of a stream is {100 * stream['decoder_share_selective']:.0f} % "
        f"instead of {100 * stream['decoder_share_every_window']:.0f} %.",
    ]
    return "\n".join(lines)


def decoding_line(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: selective decoding with the models of several seeds."""
    one = runs[0]

    def of(value: Callable[[dict[str, Any]], float], form: str = "{:.2f}") -> str:
        return _mean_and_spread(runs, value, form)

    def ratio(kind: str) -> str:
        never = sum(run[kind]["uniform_never_reaches_it"] for run in runs)
        bound = f", at least: in {never} of {len(runs)} uniform never gets there" if never else ""
        return of(lambda run: run[kind]["uniform_over_online"]) + bound

    return (
        f"- **Selective decoding**, {one['settings']['streams']} sparse streams of {one['sparse']['seconds']:.0f} s, "
        f"models of {len(runs)} seeds: online {of(lambda run: run['sparse']['online']['decodes'], '{:.1f}')} decodes, "
        f"{of(lambda run: run['sparse']['online_over_oracle_decodes'])} times those of the true boundaries, for a slot "
        f"accuracy of {of(lambda run: run['sparse']['online']['slot_accuracy'], '{:.3f}')} (true boundaries: "
        f"{of(lambda run: run['sparse']['curves']['oracle'][0]['slot_accuracy'], '{:.3f}')}); uniform needs "
        f"{ratio('sparse')} times as many for the same. Boundary F1 "
        f"{of(lambda run: run['sparse']['online']['boundary_f1'], '{:.3f}')} at ± 1 s; a caption of the "
        f"right kind {of(lambda run: run['sparse']['latency']['seconds_to_right_caption_median'], '{:.1f}')} s after "
        "the start of an event in the median, "
        f"{of(lambda run: 100 * run['sparse']['latency']['share_with_a_right_caption'], '{:.0f}')} % of events get one "
        f"within 6 s. Dense streams, the control: {ratio('dense')} times."
    )


@functools.cache  # the hierarchical bootstrap takes seconds
def paraphrase_tables() -> str:
    """Markdown: the plan's analysis of the confirmatory runs, and what the embeddings were good for."""
    plan = yaml.safe_load(paraphrases.PLAN.read_text())
    runs = paraphrase_analysis.confirmed(plan)
    figures = paraphrase_analysis.analyse(plan)
    commits = sorted({run["environment"]["commit"][:7] for run in runs.values()})
    same = figures["primary"]["equivalence"]
    inside = "lies" if same["within_margin"] else "does not lie"
    extra = figures["sensitivity"]
    clean, once = extra["language not in base"], extra["each language once"]
    return "\n".join(
        [
            paraphrase_analysis.table(figures),
            "",
            f"Mean ± sd over {len(figures['seeds'])} seeds of {len(plan['seeds'])} planned, {figures['lines']:,} test "
            f"lines of {extra['languages']} languages. Equivalence: the 90 % interval of the primary difference, "
            f"{same['interval_90']['low']:+.1f} to {same['interval_90']['high']:+.1f}, {inside} within the ± "
            f"{plan['margin_points']:g} points named beforehand. *Detectable*: found with 80 % power, a secondary "
            "one at the level that the first of them must pass. Not planned: the primary difference is "
            f"{clean['estimate']:+.1f} ({clean['low']:+.1f} to {clean['high']:+.1f}) on the "
            f"{extra['lines of a language not in base']} lines whose language the base has not seen, "
            f"{once['estimate']:+.1f} ({once['low']:+.1f} to {once['high']:+.1f}) if each language counts once. Commit "
            f"{', '.join(commits)}; plan: `eval/plans/paraphrases.yaml`; a file a run: `eval/results/paraphrases/`.",
            "",
            paraphrase_analysis.space_table([run for run in runs.values() if run["space"]]),
            "",
            f"In %, the first {plan['rerank']['lines']} test lines in turk wording. AURC: mean error over all "
            "coverages, answering the best-scored first; smaller is better.",
        ]
    )


@functools.cache
def replication_tables() -> str:
    """Markdown: the plan's analysis over the whole seeds there are."""
    plan = yaml.safe_load(replication.PLAN.read_text())
    figures = replication_analysis.analyse(plan, replication.RESULTS)
    seeds = replication_analysis.seeds_of(figures, plan)
    return (
        f"{replication_analysis.table(figures)}\n\nMean ± sd over {seeds}. In brackets the 95 % t interval over seeds; "
        "*detectable*: found with 80 % power at the level that the first of the adjusted tests must pass. Plan: "
        "`eval/plans/replication.yaml`; a file a run: `eval/results/replication/`."
    )


def throughput_line(path: Path = THROUGHPUT) -> str:
    result = json.loads(path.read_text())
    ratios, e = result["ratios"], result["environment"]
    return (
        f"Batched decoding answers {result['summary']['batched_over_single']:.1f} times as many prompts as one "
        f"at a time does ({min(ratios):.1f} to {max(ratios):.1f} in {len(ratios)} interleaved runs; batches of "
        f"{result['batch_size']}, {result['parameters'] / 1e6:.1f}M parameters, one CPU thread), with "
        f"{result['equal_texts']} of {result['compared_texts']} texts equal (`python -m eval.cost.throughput`, commit "
        f"{e['commit'][:7]})."
    )


# -- cards ------------------------------------------------------------------------------------------------------------

LLM_CARD = """# {name}

A Llama of {layers} layers of {width} from random weights, trained on NL-RX-SYNTH (a regular expression from English)
with [LLM-JEPA](https://arxiv.org/abs/2509.14252): the causal-LM loss plus {weight:g} times InfoNCE between the
embeddings of request and answer. It is a plain `transformers` causal LM, and its states at the end of a request
embed it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
```

Made by `make results NL_RX=FOLDER` (`recipes/lm/tiny-llama/nl-rx-synth.yaml`, labels on the answer and its end of
turn). Beside it plain SFT of the same seeds, and the arm that collapses:

{table}

What it is not: more accurate than plain SFT. Nor has it read anything but requests for regexes; it is here to show
plumbing and geometry. Do not run a regex that a model wrote without limits.
"""

VL_CARD = """# {name}

A VL-JEPA ([arXiv:2512.10942](https://arxiv.org/abs/2512.10942)) of {parameters:.2f}M weights, all from random: it
predicts the embedding of a text from a clip and a query. Trained in {minutes:.0f} minutes of one CPU core on
ShapeStream, a generated world of plain shapes.

```python
from llm_jepa.vl import VLJEPA

model = VLJEPA.from_pretrained("{name}")
model.classify(frames, ["the red star moves left", "the red star spins"])  # frames: [T, H, W, 3] uint8
```

Made by `python -m eval.vl.shapestream --out {name}`. Beside it the same with a frozen MiniLM as y_encoder:

{table}

What it is not: a model of anything but this world. A thing's place is its weakest answer, and depends on the seed; a
move past another thing is now and then taken for one beside it.
"""


def cards() -> dict[str, str]:
    """File name -> the whole card of a checkpoint that committed results are of; its figures also as model-index."""
    runs = {key: results for key, results in load().items() if key[0] == "completion"}
    llm, name = runs["completion", "info_nce"], "tiny-llama-nl-rx-info-nce"
    recipe = llm[0]["model"]["run"]
    shape = recipe["model_config"]
    figures = [
        ("exact_match", f"exact match, {wording}, mean of {len(llm)} seeds",
         statistics.mean(run["metrics"][key]["exact"] for run in llm))
        for wording, key in (("synth", "original"), ("turk", "paraphrase"))
    ]  # fmt: skip
    found = {f"{name}.md": _card(
        LLM_CARD.format(
            name=name, layers=shape["num_hidden_layers"], width=shape["hidden_size"], weight=recipe["jepa_weight"],
            table=table(runs),
        ),
        "text-generation", name, ("nl_rx", "NL-RX-SYNTH, lines not known from training"), figures,
    )}  # fmt: skip
    vl, name = shapestream_runs(), "vl-jepa-shapestream"
    one = vl["scratch"][0]
    figures = [
        (kind, f"{title}, mean of {len(vl['scratch'])} seeds", statistics.mean(r["test"][key] for r in vl["scratch"]))
        for kind, title, key in (
            ("accuracy", "kind of event, 13-way", "kind_accuracy"),
            ("recall_at_1", "text to video, same event", "same_event_recall_at_1"),
            ("accuracy", "questions, mean of all types", "questions_mean"),
        )
    ]
    parameters = sum(one["weights"].values()) / 1e6
    minutes = statistics.mean(run["summary"]["process_seconds"] for run in vl["scratch"]) / 60
    found[f"{name}.md"] = _card(
        VL_CARD.format(name=name, parameters=parameters, minutes=minutes, table=shapestream_table(vl)),
        "video-text-to-text", name, ("generated", f"ShapeStream {one['world_version']}"), figures,
    )  # fmt: skip
    return found


def _card(text: str, task: str, name: str, data: tuple[str, str], figures: Sequence[tuple[str, str, float]]) -> str:
    """data: (type, name) as the Hub has them; figures: (metric type, title, value)."""
    results = [
        EvalResult(
            task_type=task, dataset_type=data[0], dataset_name=data[1],
            metric_type=kind, metric_name=title, metric_value=round(value, 4),
        )
        for kind, title, value in figures
    ]  # fmt: skip
    about = ModelCardData(
        library_name="transformers", pipeline_tag=task, license="apache-2.0", tags=["llm-jepa", "jepa"],
        model_name=name, eval_results=results,
    )  # fmt: skip
    return f"---\n{about.to_yaml()}\n---\n{text}"


def _mean_and_spread(runs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float], form: str) -> str:
    values = [value(run) for run in runs]
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread


def families_table() -> str:
    """Markdown: what each family of models does, one command and one measured figure."""
    runs = load()
    sft, info_nce = runs["completion", "sft"], runs["completion", "info_nce"]
    scratch = shapestream_runs()["scratch"]

    def recall(result: dict[str, Any]) -> float:
        value: float = result["model"]["validation"]["recall_at_1"]
        return value

    def exact(result: dict[str, Any]) -> float:
        return 100 * float(result["metrics"]["original"]["exact"])

    def kind(result: dict[str, Any]) -> float:
        value: float = result["test"]["kind_accuracy"]
        return value

    of = _mean_and_spread
    what_lm_does = (
        "Fine-tunes a causal LM so that it also predicts the embedding of a target view "
        "([LLM-JEPA](https://arxiv.org/abs/2509.14252))."
    )
    what_vl_does = (
        "Trains a vision-language model that predicts the embedding of a text, and decodes text only when it is needed "
        "([VL-JEPA](https://arxiv.org/abs/2512.10942))."
    )
    lm_figure = (
        f"[NL-RX](docs/results/nl_rx.md), {len(info_nce)} seeds: recall@1 {of(info_nce, recall, '{:.2f}')} (plain SFT "
        f"{of(sft, recall, '{:.2f}')}); exact match {of(info_nce, exact, '{:.1f}')} % (plain SFT "
        f"{of(sft, exact, '{:.1f}')} %)."
    )
    vl_figure = (
        f"[ShapeStream](docs/results/vl.md), {len(scratch)} seeds: {of(scratch, kind, '{:.3f}')} of the test clips get "
        "the right one of 13 kinds of event (chance 0.077)."
    )
    return "\n".join(
        [
            "| family | what it does | one command | measured |",
            "|---|---|---|---|",
            f"| `lm` | {what_lm_does} | `llm-jepa train recipes/lm/tiny-llama/nl-rx-quickstart.yaml` | {lm_figure} |",
            f"| `vl` | {what_vl_does} | `llm-jepa train recipes/vl/shapestream.yaml` | {vl_figure} |",
        ]
    )


def rendered_blocks() -> dict[Path, dict[str, str]]:
    """File -> block name -> the Markdown that belongs between the block's markers."""
    return {
        README: {"families": families_table()},
        PAGES / "nl_rx.md": {"tiny_nl_rx": table(load())},
        PAGES / "paraphrases.md": {"paraphrases": paraphrase_tables()},
        PAGES / "replication.md": {"replication": replication_tables()},
        PAGES / "step_cost.md": {"step_cost": step_table()},
        PAGES / "vl.md": {"vl": vl_tables()},
        PAGES / "throughput.md": {"throughput": throughput_line()},
    }


def with_blocks(text: str, blocks: dict[str, str], source: str) -> str:
    """The text with every block between its markers replaced. Raises UserError if a marker is missing or repeated."""
    for name, rendered in blocks.items():
        begin = BEGIN.format(name)
        before, *rest = text.split(begin)
        if len(rest) != 1 or END not in rest[0]:
            raise UserError(f"{source} must hold `{begin}` and, after it, `{END}`, exactly once.")
        text = f"{before}{begin}\n{rendered}\n{END}{rest[0].split(END, 1)[1]}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether every file is up to date")
    options = parser.parse_args(argv)
    fresh = {CARDS / name: card for name, card in cards().items()}
    try:
        for path, blocks in rendered_blocks().items():
            fresh[path] = with_blocks(path.read_text(), blocks, path.name)
    except UserError as error:
        print(f"eval.report: error: {error}", file=sys.stderr)
        return 2
    stale = [path for path, text in fresh.items() if not path.is_file() or path.read_text() != text]
    names = ", ".join(path.name for path in stale)
    if not stale:
        print("README.md, docs/results/ and model_cards/ are up to date.")
    elif options.check:
        print(f"These files differ from eval/results: {names}; run python -m eval.report.", file=sys.stderr)
        return 1
    else:
        for path in stale:
            path.parent.mkdir(exist_ok=True)
            path.write_text(fresh[path])
        print(f"Rewritten: {names}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
