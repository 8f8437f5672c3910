"""One checkpoint, two jobs: equal tokens for every arm, the two libraries on the same weights, and searches by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("sqlglot")

from eval.experiments import small_runs
from eval.experiments.two_jobs import PLAN as PLAN_FILE
from eval.experiments.two_jobs import analysis, runs, specialist
from eval.experiments.two_jobs.__main__ import main
from eval.experiments.two_jobs.data import load
from eval.experiments.two_jobs.runs import Cell, run_cell, searches
from eval.pages.pretrained import of_two_jobs
from llm_jepa import UserError
from llm_jepa.core.strict_yaml import dump_yaml, load_yaml
from llm_jepa.lm import random_model, read_rows, train_tokenizer
from llm_jepa.synthetic import nl_rx

TRAINING = {
    "per_device_train_batch_size": 4, "share_rows": True, "activation_checkpointing": False,
    "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "adam_beta2": 0.999,
}  # fmt: skip
PLAN = {
    "validation": 8, "learning_rate": 1e-3,
    "training": TRAINING, "model": {}, "settled": {"learning_rate": 1e-3, "pooling": "mean"},
    "arms": {
        "sft": {},
        "specialist": {"contrastive": 1.0},
        "both": {"contrastive": 0.5},
        "jepa": {"objective": "info_nce", "jepa_weight": 0.5},
    },
    "selection": {"job": "nl_rx", "learning_rate": [1e-4, 1e-2], "pooling": ["mean", "lasttoken"], "seeds": [100]},
    "jobs": {
        "nl_rx": {
            "steps": 6, "rows": 24, "lines": 6, "max_new_tokens": 8,
            "arms": ["sft", "specialist", "both", "jepa"], "seeds": [0],
        },
    },
}  # fmt: skip
QUERIES = [("How many singers are there?", "SELECT count(*) FROM singer"), ("Names?", "SELECT name FROM singer")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "nl_rx").mkdir()
    (folder / "spider").mkdir()
    for name, wording in (("synth", 0), ("turk", 4)):
        for part, number in (("train", 60), ("test", 12)):
            rows = nl_rx.generate(number, split=part, wordings=(wording,))
            (folder / "nl_rx" / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part, first, last in (("train", 0, 40), ("test", 36, 52)):
        lines = []
        for i in range(first, last):
            question, query = QUERIES[i % 2]
            user = {"role": "user", "content": f"{question} ({i})"}
            lines.append({"messages": [user, {"role": "assistant", "content": f"{query} WHERE c{i // 4 * 4} = 1"}]})
        (folder / "spider" / f"spider_{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def start(data, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("start")
    rows = [dict(row) for row in read_rows(str(data / "nl_rx" / "synth_train.jsonl"))]
    tokenizer = train_tokenizer(rows, 400)
    model = random_model(small_runs.SHARED["model_config"], tokenizer, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def results(data, start, tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("out")
    for arm in PLAN["arms"]:
        run_cell(Cell("nl_rx", arm, 0, "test", start, out / f"nl_rx-{arm}-seed0.json"), data, PLAN)
    return {arm: json.loads((out / f"nl_rx-{arm}-seed0.json").read_text()) for arm in PLAN["arms"]}


def test_every_arm_costs_the_same_tokens(results):
    tokens = {arm: result["cost"]["tokens"] for arm, result in results.items()}
    for arm, count in tokens.items():
        assert count == pytest.approx(tokens["jepa"], rel=0.12), (arm, tokens)
    assert [len(results[arm]["cost"]["stages"]) for arm in PLAN["arms"]] == [1, 1, 2, 1]
    assert (
        results["sft"]["cost"]["stages"][0]["steps"]
        > results["jepa"]["cost"]["stages"][0]["steps"]
        == PLAN["jobs"]["nl_rx"]["steps"]
    )


def test_every_arm_is_judged_in_both_jobs(results):
    for arm, result in results.items():
        assert {"synth", "turk", "both"} == result["generation"].keys()
        assert len(result["bits"]["turk"]["equivalent"]) == result["lines"] == 6
        is_searcher = arm in ("specialist", "both")
        assert set(result["retrieval"]) == ({"specialist"} if is_searcher else {"views", "mean"})
        for by_search in result["retrieval"].values():
            assert set(by_search) == {"synth to answer", "turk to answer", "synth to turk", "turk to synth"}
    assert results["sft"]["bytes_to_serve"] == results["both"]["bytes_to_serve"]
    assert "jepa_loss" in results["jepa"]["cost"]["stages"][0]["log"][0]
    assert "jepa_loss" not in results["sft"]["cost"]["stages"][0]["log"][0]


def test_a_run_is_not_repeated_nor_mistaken(results, data, start, tmp_path):
    out = tmp_path / "cell.json"
    out.write_text(json.dumps(results["sft"]))
    run_cell(Cell("nl_rx", "sft", 0, "test", start, out), data, PLAN)
    with pytest.raises(UserError, match="holds another run"):
        run_cell(Cell("nl_rx", "sft", 0, "test", start, out), data, {**PLAN, "learning_rate": 1e-4})


def test_the_language_model_gets_the_weights_that_search(data, start, tmp_path):
    """After `put_into`, the mean of the language model's last states is the vector of sentence-transformers."""
    job = load("nl_rx", data, rows=24, validation=8, lines=6)
    requests = [row["messages"][-2]["content"] for row in job.train]
    searcher, cost = specialist.fine_tune(
        Path(start), requests, [small_runs.answer_of(row) for row in job.train], tokens=1000, pooling="mean", seed=0,
        training={**runs._optimiser(PLAN), "learning_rate": 1e-2}, model_options={}, output_dir=tmp_path,
    )  # fmt: skip
    assert cost["tokens"] == pytest.approx(1000, rel=0.1)
    model, tokenizer = runs.model_from(start), runs._tokenizer(start)

    def by_hand():
        ids = tokenizer(requests[:1], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model.base_model(input_ids=ids).last_hidden_state[0].mean(dim=0)

    vector = specialist.encode(searcher, requests[:1])[0]
    assert not torch.allclose(by_hand(), vector, atol=1e-2)
    specialist.put_into(model, searcher)
    torch.testing.assert_close(by_hand(), vector, atol=1e-5, rtol=1e-5)
    again = specialist.encode(specialist.mean_of_states(model, tokenizer), requests[:1])[0]
    torch.testing.assert_close(again, vector, atol=1e-5, rtol=1e-5)
    assert model.lm_head.weight is model.base_model.embed_tokens.weight


def test_the_answers_are_those_of_the_model_that_searches(data, start, tmp_path, monkeypatch):
    """The specialist's weights are asked, not those it started from."""
    asked = []

    def judge(model, *_):
        asked.append(model.get_input_embeddings().weight.detach().clone())
        return small_runs.Judged({"synth": {"equivalent": 0}}, {}, {})

    monkeypatch.setattr(small_runs, "judge", judge)
    run_cell(Cell("nl_rx", "specialist", 0, "test", start, tmp_path / "cell.json"), data, PLAN)
    assert not torch.equal(asked[0], runs.model_from(start).get_input_embeddings().weight)


def test_half_of_the_requests_come_in_each_wording_and_nothing_leaks(data):
    job = load("nl_rx", data, rows=24, validation=8, lines=6)
    wordings = {name: set() for name in ("synth", "turk")}
    for name, texts in wordings.items():
        for row in read_rows(str(data / "nl_rx" / f"{name}_train.jsonl")):
            texts.add(row["messages"][-2]["content"])
    asked = [row["messages"][-2]["content"] for row in job.train]
    assert sum(text in wordings["synth"] for text in asked) == sum(text in wordings["turk"] for text in asked) == 12
    answers = {small_runs.answer_of(row) for row in job.train}
    assert not answers & {*job.validation.golds, *job.test.golds}


def test_spider_leaves_out_what_training_knows(data):
    job = load("spider", data, rows=20, validation=4, lines=100)
    assert len(job.test.golds) == 12, "rows 36 to 39 stand in both files"
    grade = job.grade(job.test.golds[0], job.test.golds[0], True)
    assert grade.scores["equivalent"] == 1


def test_searches_by_hand():
    """Three answers in the plane; the second request lies on the third answer, and two golds are equal."""
    answers = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    requests = {"one": torch.tensor([[2.0, 0.1], [-1.0, 0.1], [-3.0, 0.0]]), "other": answers}
    ranks = dict(searches(requests, answers, ["a", "b", "c"]))
    assert ranks["one to answer"].tolist() == [1, 2, 1] == ranks["one to other"].tolist()
    assert ranks["other to answer"].tolist() == [1, 1, 1]
    assert dict(searches(requests, answers, ["a", "b", "b"]))["one to answer"].tolist() == [1, 1, 1]
    alone = dict(searches({"one": requests["one"]}, answers, ["a", "b", "b"]))
    assert alone["one to one"].tolist() == [1, 1], "the first has no partner"
    apart = dict(searches({"one": requests["one"]}, answers, ["b", "a", "b"]))
    assert apart["one to one"].tolist() == [2, 2], "a request does not find itself"


def test_selection_takes_the_best_recall_on_validation(data, start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "side_by_side", lambda run, cells, jobs, *shared: [run(cell, *shared) for cell in cells])
    runs.select(data, {**PLAN, "settled": None}, start, tmp_path, 1)
    best = load_yaml(capsys.readouterr().out.split("settled:")[1])
    recalls = {}
    for path in (tmp_path / "selection").glob("*.json"):
        result = json.loads(path.read_text())
        assert result["part"] == "validation" and not result["generation"]
        found = result["retrieval"]["specialist"]
        recalls[path.stem] = (found["synth to answer"]["recall_at_1"] + found["turk to answer"]["recall_at_1"]) / 2
    assert len(recalls) == 4
    assert recalls[f"contrastive-{best['learning_rate']:g}-{best['pooling']}-seed100"] == max(recalls.values())


def test_nothing_is_compared_before_it_is_settled(data, start, tmp_path):
    with pytest.raises(UserError, match="no `settled` settings yet"):
        runs.compare(data, {**PLAN, "settled": None}, start, tmp_path, 1)


# -- analysis ----------------------------------------------------------------------------------------------------------


def made_up(arm: str, seed: int, right: float, recall: float, tokens: int = 1000) -> dict:
    """A result file of a run with these shares of 100; the turk wording is 2 points worse in both jobs."""
    searches_of = {
        "synth to answer": (recall + 1) / 100, "turk to answer": (recall - 1) / 100,
        "synth to turk": 0.3, "turk to synth": 0.5,
    }  # fmt: skip
    found = {name: {"recall_at_1": value, "recall_at_10": 0.9, "mrr": 0.8} for name, value in searches_of.items()}
    readouts = ("specialist",) if "contrastive" in arm else ("views", "mean")
    generation = {"synth": {"equivalent": (right + 1) / 100}, "turk": {"equivalent": (right - 1) / 100}, "both": {}}
    return {
        "arm": arm, "seed": seed, "part": "test", "start": "model", "start_sha256": "0", "data_sha256": {},
        "lines": 300,
        "setup": {"steps": 50, "options": {"arm": arm}}, "generation": generation,
        "retrieval": dict.fromkeys(readouts, found), "cost": {"tokens": tokens}, "bytes_to_serve": 500,
    }  # fmt: skip


@pytest.fixture
def known(tmp_path) -> tuple[dict, Path]:
    """A plan and its result files: `jepa_good` is as good as two specialists, `jepa_answers` in one job alone."""
    arms = ["sft", "contrastive", "jepa_good", "jepa_answers"]
    plan = {
        "jobs": {"nl_rx": {"arms": arms, "seeds": [0, 1, 2, 3, 4]}, "spider": {"arms": ["sft"], "seeds": [0, 1]}},
        "selection": {"job": "nl_rx"}, "margins": {"right": 1.0, "recall_at_1": 3.0},
    }  # fmt: skip
    (tmp_path / "compare").mkdir()
    for seed in range(5):
        wobble = 0.1 * (seed - 2)
        values = {
            "sft": (50 + seed, 5), "contrastive": (0, 80 + seed),
            "jepa_good": (50.5 + seed + wobble, 79 + seed + wobble), "jepa_answers": (52 + seed - wobble, 60 + seed),
        }  # fmt: skip
        for arm, (right, recall) in values.items():
            path = runs.result_file("nl_rx", arm, seed, tmp_path)
            path.write_text(json.dumps(made_up(arm, seed, right, recall)))
    return plan, tmp_path


def test_the_analysis_finds_what_was_planted(known):
    plan, out = known
    figures = analysis.analyse(plan, out)
    assert list(figures) == ["nl_rx"], "spider has no whole seeds yet"
    found = figures["nl_rx"]
    assert found["seeds"] == [0, 1, 2, 3, 4]
    two = found["arms"]["two specialists"]
    assert two["right"] == pytest.approx([50, 51, 52, 53, 54]) and two["recall_at_1"] == pytest.approx(
        [80, 81, 82, 83, 84]
    )
    assert (two["tokens"], two["bytes_to_serve"]) == (2000, 1000)
    assert found["arms"]["sft (mean of the bare text)"]["request_to_request"] == pytest.approx([40] * 5)
    good, answers = (found["tests"]["arms"][arm] for arm in ("jepa_good", "jepa_answers"))
    assert good["right"]["by_seed"] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert good["recall_at_1"]["by_seed"] == pytest.approx([-1.2, -1.1, -1.0, -0.9, -0.8])
    assert good["passes"] and good["share_of_tokens"] == 0.5
    assert answers["right"]["p_not_worse"] < 0.001 and not answers["passes"], "one job alone is not enough"
    assert answers["p_holm"] == pytest.approx(1, abs=1e-3)
    assert found["frontier"] == ["contrastive", "jepa_good", "jepa_answers"], "sft is beaten in both jobs"
    text = analysis.table(figures)
    assert "| jepa_good | +0.5 (" in text and "| holds |" in text and "| not shown |" in text


def test_holm_counts_all_weights(known):
    """t of -1.0 +- 0.158 against -3 over 5 seeds, times the two weights."""
    plan, out = known
    test = analysis.analyse(plan, out)["nl_rx"]["tests"]["arms"]["jepa_good"]
    larger = max(test[metric]["p_not_worse"] for metric in ("right", "recall_at_1"))
    assert test["p_holm"] == pytest.approx(2 * larger)


def test_seeds_that_an_arm_lacks_and_runs_of_other_settings(known):
    plan, out = known
    runs.result_file("nl_rx", "jepa_good", 1, out).unlink()
    assert analysis.analyse(plan, out)["nl_rx"]["seeds"] == [0, 2, 3, 4]
    odd = runs.result_file("nl_rx", "sft", 3, out)
    odd.write_text(json.dumps(made_up("sft", 3, 50, 5) | {"setup": {"steps": 51, "options": {}}}))
    with pytest.raises(UserError, match="2 settings or data sets"):
        analysis.analyse(plan, out)
    for path in (out / "compare").glob("*-seed[023].json"):
        path.unlink()
    with pytest.raises(UserError, match="no data set with two whole seeds"):
        analysis.analyse(plan, out)


def test_the_plot_is_drawn(known):
    pytest.importorskip("matplotlib")
    plan, out = known
    analysis.draw(analysis.analyse(plan, out), out / "frontier.png")
    assert (out / "frontier.png").stat().st_size > 10_000


def test_the_committed_plan_is_one_that_the_command_takes(tmp_path, capsys):
    plan = load_yaml(PLAN_FILE.read_text())
    for of_job in plan["jobs"].values():
        assert {*of_job["arms"]} <= plan["arms"].keys()
    assert main(["compare", "--data", str(tmp_path), "--start", str(tmp_path)]) == 2
    assert "lacks nl_rx/synth_train.jsonl" in capsys.readouterr().err
    (tmp_path / "nl_rx").mkdir()
    (tmp_path / "nl_rx" / "synth_train.jsonl").write_text("{}")
    assert main(["compare", "--data", str(tmp_path), "--start", str(tmp_path)]) == 2
    assert "is not the file of the plan" in capsys.readouterr().err
    assert main(["compare", "--data", str(tmp_path)]) == 2
    for path in tmp_path.rglob("*"):
        assert path.name in ("nl_rx", "synth_train.jsonl"), "nothing is started"
    assert main(["select", "--data", str(tmp_path), "--start", "nowhere"]) == 2


def test_the_page_says_what_the_runs_say(known):
    plan, out = known
    plan_file = out / "plan.yaml"
    plan_file.write_text(dump_yaml(plan))
    for path in (out / "compare").glob("*.json"):
        run = json.loads(path.read_text())
        packages = {"commit": "0123456789", "torch": "2", "transformers": "5", "sentence_transformers": "6"}
        path.write_text(json.dumps({**run, "environment": packages}))
    page = of_two_jobs(plan_file, out)
    assert "It holds for jepa_good." in page and "5 of 5 seeds and 300 test lines (nl_rx)." in page
    assert "frontier.png" not in page, "there is no picture yet"
    (out / "frontier.png").touch()
    assert "frontier.png" in of_two_jobs(plan_file, out)
    for path in (out / "compare").glob("*-seed[1234].json"):
        path.unlink()
    assert of_two_jobs(plan_file, out).startswith("**The runs are under way.**")
