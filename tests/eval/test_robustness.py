"""Claims about `eval.robustness`: its figures are those of the answers on disk, finished work is kept, and what cannot
be compared is refused before anything is computed."""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from eval import robustness
from eval.figures.groups import embedding_view
from eval.figures.inference import bootstrap
from eval.figures.robustness_plots import plot_phrasing, plot_worst
from eval.figures.robustness_report import report
from eval.robustness import analyse, main, parse_arms, read_scored
from llm_jepa import UserError
from llm_jepa.core.card import NOT_EVALUATED, SHARED, SHARED_PART
from llm_jepa.lm.from_scratch import random_model, train_tokenizer
from tests.conftest import FAMILIES

WORDINGS = ("plain", "polite", "terse")
ASKED = ("Is {} an even number?", "Could you tell me whether {} is even, please?", "{} even?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows) -> Path:
    """Twelve questions in three wordings, and three random models, whose likeliest choice depends on the question."""
    folder = tmp_path_factory.mktemp("robustness")
    tokenizer = train_tokenizer(rows, 320)
    for seed, name in zip((1, 2, 5), "abc", strict=True):
        random_model({**FAMILIES["llama"], "initializer_range": 0.3}, tokenizer, seed=seed).save_pretrained(
            folder / name
        )
        tokenizer.save_pretrained(folder / name)
    write_groups(folder / "groups.jsonl", [[text.format(n) for text in ASKED] for n in range(12)])
    return folder


def write_groups(path, groups):
    rows = [
        {"id": f"q{n}", "wordings": WORDINGS[: len(texts)], "choices": list("YNM"), "answer": "YNM"[n % 3],
         "prompts": [[{"role": "user", "content": text}] for text in texts]} for n, texts in enumerate(groups)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def command(folder, tmp_path, capsys):
    """Runs the command in-process: options -> (exit code, stdout, stderr). Models and data by their short names."""

    def run(*options, out="out", data="groups.jsonl", task="groups"):
        argv = [str(o).replace("@", f"{folder}/") for o in options]
        if "--models" in argv:
            argv += ["--task", task, "--data", str(folder / data)]
        code = main([*argv, "--out", str(tmp_path / out)])
        return code, *capsys.readouterr()

    return run


def answers_by_hand(path):
    """group -> wording -> (right, key), read off the file."""
    answers: dict = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        answers.setdefault(row["group"], {})[row["wording"]] = (row["scores"]["correct"], row["answer_key"])
    return answers


def test_the_command_writes_the_figures_of_the_answers(command, tmp_path):
    """accuracy, worst of three, consistency and the difference, counted again from samples.jsonl."""
    code, output, _ = command("--models", "@a", "@b")
    assert code == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    by_hand = {}
    for name in "ab":
        groups = answers_by_hand(tmp_path / "out" / name / "samples.jsonl")
        assert len(groups) == 12 and all(tuple(group) == WORDINGS for group in groups.values())
        right = [[score for score, _ in group.values()] for group in groups.values()]
        keys = [[key for _, key in group.values()] for group in groups.values()]
        by_hand[name] = {
            "accuracy": statistics.mean(map(statistics.mean, right)),
            "worst_of_k": statistics.mean(map(min, right)),
            "consistency": statistics.mean(((x == y) + (y == z) + (x == z)) / 3 for x, y, z in keys),
        }
        for metric, value in by_hand[name].items():
            figure = result["models"][name]["metrics"][metric]
            assert figure["estimate"] == pytest.approx(value), (name, metric)
            assert figure["low"] <= value <= figure["high"]
        wordings = result["models"][name]["wordings"]
        assert wordings["terse"]["estimate"] == pytest.approx(statistics.mean(row[2] for row in right))
    assert by_hand["a"] != by_hand["b"], "equal models would hide a sign"
    difference = result["comparisons"]["b"]["metrics"]["accuracy"]["estimate"]
    assert difference == pytest.approx(by_hand["b"]["accuracy"] - by_hand["a"]["accuracy"]) and difference != 0
    assert set(result["comparisons"]["b"]["mcnemar"]) == set(WORDINGS) and result["finished"] is True
    shown = f"{100 * by_hand['a']['accuracy']:.1f} ["
    text = (tmp_path / "out" / "report.md").read_text()
    assert shown in output and shown in text
    for needed in ("12 requests, each in 3 wordings (plain, polite, terse", "McNemar", "Published: none: your data",
                   "## What cannot be concluded", "these trained weights"):  # fmt: skip
        assert needed in text
    for plot in ("accuracy-worst.png", "phrasing.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG") and f"({plot})" in text


def test_finished_models_are_kept_and_others_added(command, folder, tmp_path):
    """A third model joins: the answers of the first two are not written again, and the baseline may change."""
    assert command("--models", "@a", "@b")[0] == 0
    before = {name: (tmp_path / "out" / name / "samples.jsonl").stat().st_mtime_ns for name in "ab"}
    code, output, _ = command("--models", "@a", "@b", "@c", "--baseline", "b")
    assert code == 0 and output.count("holds this run already") == 2
    assert before == {name: (tmp_path / "out" / name / "samples.jsonl").stat().st_mtime_ns for name in "ab"}
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["order"] == ["a", "b", "c"] and set(result["comparisons"]) == {"a", "c"}


@pytest.mark.parametrize("place", ["eval.run._sample", "llm_jepa.lm.embedder.Embedder.encode_rows"])
def test_a_stopped_command_goes_on(place, command, tmp_path, monkeypatch):
    """Stopped in the answers of the second model, and in its embeddings, for which `llm-jepa embed` runs inside."""
    assert command("--models", "@a", "@b", "--embeddings", out="whole")[0] == 0
    with monkeypatch.context() as patch:
        owner, name = resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
        call, calls = getattr(owner, name), []

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == (50 if name == "_sample" else 2):
                signal.raise_signal(signal.SIGTERM)
            return call(*args, **kwargs)

        patch.setattr(owner, name, stopping)
        code, _, said = command("--models", "@a", "@b", "--embeddings")
    assert code == 75
    assert said.splitlines()[-1] == (
        "eval.robustness: stopped by SIGTERM. The answers so far are kept; the same command continues."
    )
    code, output, _ = command("--models", "@a", "@b", "--embeddings")
    assert code == 0 and "holds this run already" in output
    for file in ("report.md", "a/samples.jsonl", "b/samples.jsonl"):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "whole" / file).read_text()


def test_a_folder_made_with_other_settings_is_refused_and_left_as_it_is(command, folder, tmp_path):
    write_groups(folder / "other.jsonl", [[text.format(n) for text in ASKED] for n in range(4)])
    assert command("--models", "@a")[0] == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    for options, message in (
        ({"data": "other.jsonl"}, "another data_sha256"),
        ({}, "another limit (null, now 3)"),
    ):
        code, _, error = command("--models", "@a", *([] if options else ["--limit", "3"]), **options)
        assert code == 2 and error.count("\n") == 1 and message in error and "choose another --out" in error
    # the same name for other weights
    code, _, error = command("--models", "a=@b")
    assert code == 2 and "model.name" in error and error.count("\n") == 1
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("chapter 1")
    code, _, error = command("--models", "@a", out="mine")
    assert code == 2 and "holds something else" in error and len(list((tmp_path / "mine").iterdir())) == 1


def test_seeds_of_an_arm_are_averaged_and_compared_by_pairs(command, tmp_path):
    """Two arms of two runs (the second arm in the other order): mean and spread by hand, and the p value of a paired t
    test of differences d and -d: mean 0, so p = 1."""
    code, output, _ = command("--models", "one=@a,@b", "two=@b,@a")
    assert code == 0 and " ± " in output
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    figure = result["models"]["one"]["metrics"]["accuracy"]
    alone = [
        statistics.mean(score for group in answers_by_hand(path).values() for score, _ in group.values())
        for path in (tmp_path / "out" / "one" / str(number) / "samples.jsonl" for number in (1, 2))
    ]
    assert figure["by_seed"] == pytest.approx(alone) and alone[0] != alone[1]
    assert figure["estimate"] == pytest.approx(statistics.mean(alone))
    pair = result["comparisons"]["two"]
    assert pair["over_seeds"]["accuracy"]["by_seed"] == pytest.approx([alone[1] - alone[0], alone[0] - alone[1]])
    assert pair["over_seeds"]["accuracy"]["p"] == pytest.approx(1) and pair["mcnemar"] == {}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "paired t" in text and "would be missed more often" in text


def test_scored_runs_give_the_same_report_without_a_model(command, tmp_path):
    assert command("--models", "@a", "@b")[0] == 0
    assert command("--samples", tmp_path / "out" / "a", f"b={tmp_path / 'out' / 'b'}", out="again")[0] == 0
    first, second = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("out", "again"))
    assert first.pop("environment")["torch"] == second.pop("environment")["torch"]
    assert first == second
    assert (tmp_path / "out" / "report.md").read_text() == (tmp_path / "again" / "report.md").read_text()
    assert not (tmp_path / "again" / "a").exists()
    # as eval.run leaves them: FILE.json and FILE.samples.jsonl
    for name, suffix in (("results.json", ".json"), ("samples.jsonl", ".samples.jsonl")):
        (tmp_path / f"run{suffix}").write_bytes((tmp_path / "out" / "a" / name).read_bytes())
    assert parse_arms([str(tmp_path / "run.json")]) == {"run": [str(tmp_path / "run.json")]}
    assert read_scored(str(tmp_path / "run.json")) == read_scored(str(tmp_path / "out" / "a"))


def scored(folder, name="m", groups=4, k=2, right=lambda g, w: (g + w) % 3 > 0, **changes):
    """A scored run on disk, as eval.run writes it."""
    rows = [
        {"group": f"g{g}", "wording": f"w{w}", "scores": {"exact": float(right(g, w))}, "answer_key": str(right(g, w))}
        for g in range(groups)
        for w in range(k)
    ]
    result = {
        "schema": 1, "task": "nl_rx", "primary": "exact", "limit": None, "groups": groups, "model": {"name": name},
        "wordings": [f"w{w}" for w in range(k)], "data_sha256": {"test.jsonl": "0" * 64},
        "decoding": {"greedy": True, "max_new_tokens": 64, "batch_size": 8, "stop_token_ids": [1]},
        **changes,
    }  # fmt: skip
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(result))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_sha256": {"test.jsonl": "1" * 64}}, "data_sha256"),
        ({"groups": 5}, "differ in groups (4 and 5)"),
        ({"task": "gsm8k"}, 'differ in task ("nl_rx" and "gsm8k")'),
        ({"k": 3}, "differ in wordings"),
        ({"decoding": {"greedy": True, "max_new_tokens": 9}}, "differ in max_new_tokens (64 and 9)"),
        ({"primary": None, "schema": None}, None),
        ({"decoding": {"greedy": True, "max_new_tokens": 64, "stop_token_ids": [7], "batch_size": 1}}, None),
    ],
)
def test_runs_that_are_not_alike_are_refused(changes, message, command, tmp_path):
    """Another tokenizer's stop tokens and another batch size are no reason; everything that moves the figures is."""
    one, other = scored(tmp_path / "one"), scored(tmp_path / "other", **changes)
    code, _, error = command("--samples", one, other)
    assert (code, message in error if message else error) == ((2, True) if message else (0, ""))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--models", "@a", "--limit", "0"), "--limit: '0' must be a whole number, 1 or more"),
        (("--models", "@a", "--limit", "1"), "1 group(s) to ask"),
        (("--models", "@a", "@a"), "Two models are named 'a'"),
        (("--models", "x=@a,@a"), "names a run twice"),
        (("--models", "@a", "--baseline", "sft"), "none of a"),
        (("--models", "@nothing"), "No model folder"),
        (("--models", "me/hub-model", "--write-card"), "me/hub-model is not a folder"),
        ((), "No model is given"),
        (("--samples", "@a"), "There is no"),
        (("--samples", "@a", "--embeddings"), "--embeddings goes with --models"),
        (("--models", "@a", "--metric", "bleu"), "No sample has the metric 'bleu'; there is contains, correct"),
    ],
)
def test_mistakes_are_one_line(options, message, command):
    code, _, error = command(*options)
    line = error.splitlines()[-1]  # after the progress bar, if any answer was given
    assert code == 2 and line.startswith("eval.robustness: error: ") and message in line and "Traceback" not in error


def test_unknown_tasks_and_groups_of_one_are_named(command, folder):
    code, _, error = command("--models", "@a", task="grups")
    assert code == 2 and "did you mean 'groups'" in error
    write_groups(folder / "one.jsonl", [["Is 1 even?", "1 even?"], ["Is 2 even?"], ["Is 3 even?"]])
    code, output, error = command("--models", "@a", data="one.jsonl")
    assert code == 2 and "2 of 3 groups have a single wording" in error and "a:" not in output


def test_results_of_a_truncated_file_are_refused(tmp_path):
    path = tmp_path / "run"
    scored(path)
    lines = (path / "samples.jsonl").read_text().splitlines(keepends=True)
    (path / "samples.jsonl").write_text("".join(lines[:-2]))
    with pytest.raises(UserError, match="does not hold the 4 groups"):
        read_scored(str(path))


def test_names_of_arms():
    assert parse_arms(["org/model-1b", "sft=x,y/z", "jepa=runs/a=b"]) == {
        "model-1b": ["org/model-1b"], "sft": ["x", "y/z"], "jepa": ["runs/a=b"],
    }  # fmt: skip
    for bad in ("=x", "a b=x", "x=", "x=a,,b", ".hidden=x", "../up=x"):
        with pytest.raises(UserError):
            parse_arms([bad])


# -- report and plots --------------------------------------------------------------------------------------------------


def test_what_a_report_warns_of_depends_on_what_was_measured(tmp_path):
    """A constant answer, a limit, different templates: consistency 1 beside 0, each caveat only where it holds."""
    constant = scored(tmp_path / "one", right=lambda g, w: False, limit=4, template_sha256="x")
    other = scored(tmp_path / "other", limit=4, template_sha256="y")
    arms = {"constant": [read_scored(constant)], "other": [read_scored(other)]}
    analysis = analyse(arms, baseline="other", metric="exact")
    text = report(analysis)
    assert "only the first 4 groups" in text and "chat template" in text
    assert "0 of 4 is compatible with a true rate of up to 52.7 %" in text  # (1 - 0.527)^4 = 0.05
    figures = analysis["models"]["constant"]["metrics"]
    assert (figures["consistency"]["estimate"], figures["consistent_and_correct"]["estimate"]) == (1, 0)
    assert figures["drop_rate"] == {"estimate": None, "low": None, "high": None, "by_seed": [None]}
    json.dumps(analysis, allow_nan=False)
    same = scored(tmp_path / "same", groups=6)
    alone = report(analyse({"m": [read_scored(same)]}, baseline="m", metric="exact"))
    assert (
        "is compatible with" not in alone
        and "only the first" not in alone
        and "chat template" not in alone
        and "Holm" not in alone
    )


def test_p_values_are_adjusted_over_all_that_are_shown(tmp_path):
    """Two models x two wordings against a baseline that is always wrong: the four p values are one family."""
    base = scored(tmp_path / "base", groups=8, right=lambda g, w: False)
    runs = {"base": base}
    for name, n in (("good", 8), ("fair", 6)):
        runs[name] = scored(tmp_path / name, groups=8, right=lambda g, w, n=n: g < n - w)
    analysis = analyse({name: [read_scored(path)] for name, path in runs.items()}, baseline="base", metric="exact")
    p = {(name, w): analysis["comparisons"][name]["mcnemar"][w] for name in ("good", "fair") for w in ("w0", "w1")}
    assert [test["p"] for test in p.values()] == [2 / 2**8, 2 / 2**7, 2 / 2**6, 2 / 2**5]
    assert [test["p_holm"] for test in p.values()] == pytest.approx(
        [4 * 2 / 2**8, 3 * 2 / 2**7, 2 * 2 / 2**6, 2 / 2**5]
    )


def test_plots_draw_the_figures(tmp_path):
    """Points and lines at 100 times the figures, every model in the legend, everything inside the axes."""
    names = [f"model-{i}" for i in range(6)]
    runs = {n: read_scored(scored(tmp_path / n, groups=20, k=3, right=lambda g, w, i=i: (g + w) % (i + 2) > 0))
            for i, n in enumerate(names)}  # fmt: skip
    analysis = analyse({name: [run] for name, run in runs.items()}, baseline=names[0], metric="exact")
    for draw in (plot_worst, plot_phrasing):
        figure = draw(analysis)
        [axes] = figure.axes
        lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
        assert list(lines) == names and [text.get_text() for text in figure.legends[0].get_texts()] == names
        assert len({line.get_color() for line in lines.values()}) == len({x.get_marker() for x in lines.values()}) == 6
        for name, line in lines.items():
            model = analysis["models"][name]
            if draw is plot_worst:
                expected = [model["metrics"]["accuracy"]["estimate"]], [model["metrics"]["worst_of_k"]["estimate"]]
                assert list(line.get_xdata()) == pytest.approx([100 * x for x in expected[0]])
                assert list(line.get_ydata()) == pytest.approx([100 * y for y in expected[1]])
            else:
                assert list(line.get_ydata()) == pytest.approx(
                    [100 * model["wordings"][w]["estimate"] for w in ("w0", "w1", "w2")]
                )
            low, high = axes.get_ylim()
            assert all(low < y < high for y in line.get_ydata())


# -- embeddings --------------------------------------------------------------------------------------------------------


def test_embeddings_are_those_of_the_prompts_by_group(command, tmp_path):
    """The figures are those of the kept embeddings, three rows a group in a row; a second call keeps them."""
    assert command("--models", "@a", "--embeddings")[0] == 0
    path = tmp_path / "out" / "a" / "embeddings.safetensors"
    context = load_file(path)["context"]
    assert context.shape == (36, 32) and torch.unique(context, dim=0).shape[0] == 36
    expected = embedding_view(context, torch.arange(12).repeat_interleave(3))
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["models"]["a"]["embedding"]
    for name, interval in expected.items():
        assert figures[name]["estimate"] == pytest.approx(interval.estimate), name
        assert (figures[name]["low"] is None) == math.isnan(interval.low)
    assert "Embeddings of the prompts" in (tmp_path / "out" / "report.md").read_text()
    before = path.stat().st_mtime_ns
    assert command("--models", "@a", "--embeddings")[0] == 0
    assert path.stat().st_mtime_ns == before and sorted(p.name for p in path.parent.iterdir()) == [
        "embeddings.safetensors", "results.json", "samples.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("right", [False, True])
def test_models_of_one_score_are_shown_on_the_whole_scale(right, tmp_path):
    """All at 0 or all at 100: an axis of 2 points around them would say nothing."""
    runs = {n: [read_scored(scored(tmp_path / n, groups=4, right=lambda g, w: right))] for n in ("a", "b")}
    analysis = analyse(runs, baseline="a", metric="exact")
    for axes, sides in ((plot_worst(analysis).axes[0], "xy"), (plot_phrasing(analysis).axes[0], "y")):
        for side in sides:
            low, high = getattr(axes, f"get_{side}lim")()
            ticks = [tick for tick in getattr(axes, f"get_{side}ticks")() if low <= tick <= high]
            assert -5 < low <= 0 and 100 <= high < 105 and (ticks[0], ticks[-1]) == (0, 100)


def test_the_command_names_the_file_that_it_leaves(command, tmp_path):
    code, output, _ = command("--models", "@a", "--embeddings")
    assert code == 0 and f"to {tmp_path / 'out' / 'a' / 'embeddings.safetensors'}" in output
    assert "partial" not in output and "tmp." not in output


@pytest.mark.parametrize("wrong", ["a folder", "its config", "its tokenizer", "its card"])
def test_a_model_that_cannot_be_used_is_found_before_another_is_scored(wrong, command, folder, tmp_path):
    second = tmp_path / "second"
    if wrong != "a folder":
        shutil.copytree(folder / "b", second)
    if wrong == "its config":
        (second / "config.json").write_text('{"model_type": "vit"}')
    if wrong == "its tokenizer":
        (second / "tokenizer.json").write_text("{}")
    if wrong == "its card":
        (second / "README.md").write_text("---\nmodel-index: nonsense\n---\n# x\n")
    code, output, error = command("--models", "@a", str(second), *(["--write-card"] if wrong == "its card" else []))
    assert code == 2 and error.count("\n") == 1 and "second" in error
    assert not output and not (tmp_path / "out").exists()


# -- model card --------------------------------------------------------------------------------------------------------

CARD = """---
library_name: transformers
tags: [llm-jepa, jepa]
my_own_key: {kept: true}
model-index:
- name: my-model
  results:
  - task: {type: text-generation, name: Text Generation}
    dataset: {type: squad, name: SQuAD, args: {n: 5}}
    metrics:
    - {type: f1, value: 81.5, name: F1}
    source: {url: "https://example.com", name: somewhere}
  - task: {type: text-generation}
    dataset: {type: nl_rx, name: old name}
    metrics:
    - {type: accuracy, value: 0.1, name: accuracy (exact)}
    - {type: bleu, value: 0.7}
---
# My model

Text with a --- line:

---
and an end.
"""


def test_a_card_keeps_everything_else_and_is_the_same_after_a_second_run(tmp_path):
    """The accuracy of the same task and data set is replaced in its place, bleu beside it and the rest stay."""
    run = read_scored(scored(tmp_path / "scored"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_text(CARD)
    path = robustness.write_card(model, run, dataset="nl_rx", metric="exact")
    text = path.read_text()
    old, new = (yaml.safe_load(t.split("---\n")[1]) for t in (CARD, text))
    assert text.split("---\n", 2)[2].startswith(CARD.split("---\n", 2)[2])
    assert {k: v for k, v in new.items() if k != "model-index"} == {k: v for k, v in old.items() if k != "model-index"}
    squad, ours = new["model-index"][0]["results"]
    assert squad == old["model-index"][0]["results"][0] and new["model-index"][0]["name"] == "my-model"
    metrics = {(metric["type"], metric.get("name")): metric for metric in ours["metrics"]}
    assert len(metrics) == len(ours["metrics"]) == 6 and metrics["bleu", None]["value"] == 0.7
    # right: (g + w) % 3 > 0 over 4 groups x 2 wordings: 0,1 / 1,1 / 1,0 / 0,1
    assert ours["metrics"][0]["type"] == "accuracy" and ours["metrics"][0]["value"] == 0.625
    assert metrics["worst_of_k", "worst of k (exact)"]["value"] == 0.25
    assert metrics["worst_of_k", "worst of k (exact)"]["args"]["groups"] == 4
    robustness.write_card(model, run, dataset="nl_rx", metric="exact")
    assert path.read_text() == text
    results = ModelCard.load(path).data.eval_results  # the Hub's own reader takes it
    assert {(r.dataset_type, r.metric_type, r.metric_value) for r in results} >= {
        ("squad", "f1", 81.5), ("nl_rx", "accuracy", 0.625), ("nl_rx", "consistency", 0.25),
    }  # fmt: skip


def test_the_command_writes_cards_of_folders_with_and_without_one(command, folder, tmp_path):
    (folder / "b" / "README.md").write_text("# No metadata here\n")
    for _ in range(2):
        assert command("--models", "@a", "@b", "--write-card")[0] == 0
    for name, text in (("a", "# a\n"), ("b", "# No metadata here\n")):
        card = ModelCard.load(folder / name / "README.md")
        assert card.text.startswith(text) and card.data.model_name == name
        assert card.text.count("<!-- robustness: ") == card.text.count("in several wordings") == 1
        values = {r.metric_type: r.metric_value for r in card.data.eval_results}
        result = json.loads((tmp_path / "out" / "results.json").read_text())
        assert values["accuracy"] == round(result["models"][name]["metrics"]["accuracy"]["estimate"], 4)
        assert len(card.data.eval_results) <= 5


def test_a_reader_sees_the_figures_and_no_longer_that_nothing_is_known(tmp_path):
    """The table is replaced in its place; one of other data or another metric comes after it. In percent, with its
    interval."""
    run = read_scored(scored(tmp_path / "scored"))
    sentence = NOT_EVALUATED.replace(" model until", "\nmodel until")
    (tmp_path / "README.md").write_text(f"---\n{{}}\n---\n# m\n\nPairs (8). {sentence}\n\nVersions: 1.\n")
    path = robustness.write_card(tmp_path, run, dataset="nl_rx", metric="exact")
    text = path.read_text()
    assert "Nothing else" not in text and "Pairs (8).\n\nVersions: 1.\n\n<!-- robustness: " in text
    interval = robustness_card_interval(run)
    assert f"| accuracy (exact) | 62.5 | {interval} |" in text and "4 requests, each in 2 wordings" in text
    path.write_text(text.replace("| 62.5 |", "| 99.9 |") + "\nMy own words.\n")
    robustness.write_card(tmp_path, run, dataset="nl_rx", metric="exact")
    assert path.read_text() == text + "\nMy own words.\n"
    robustness.write_card(tmp_path, run, dataset="x --> <script>", metric="exact")
    both = path.read_text()
    assert both.count("| accuracy (exact) | 62.5 |") == 2 and both.index("My own") < both.rindex("<!-- robustness")
    assert "--> <script>" not in both.split("---\n", 2)[2]


def robustness_card_interval(run) -> str:
    """Of the accuracy by the bootstrap, as the index of the card has it."""
    right = [[score["scores"]["exact"] for score in run.samples[2 * g : 2 * g + 2]] for g in range(4)]
    low, high = bootstrap(right)[1:]
    return f"{100 * low:.1f} to {100 * high:.1f}"


def test_every_fresh_card_has_the_sentence_that_goes(tmp_path):
    """In the words of the constant, or it would stay for ever."""
    for family in ("lm", "vl"):
        template = Path(robustness.__file__).parents[1] / "llm_jepa" / family / "card.md.jinja"
        assert SHARED_PART in template.read_text() and "Nothing else is known" not in template.read_text()
    assert "{{ not_evaluated }}" in SHARED.read_text() and "Nothing else is known" not in SHARED.read_text()


def test_a_card_that_cannot_be_read_is_refused_and_left(tmp_path):
    run = read_scored(scored(tmp_path / "scored"))
    (tmp_path / "README.md").write_text("---\nmodel-index: nonsense\n---\n# x\n")
    with pytest.raises(UserError, match="metadata of"):
        robustness.write_card(tmp_path, run, dataset="nl_rx", metric="exact")
    assert "nonsense" in (tmp_path / "README.md").read_text()
