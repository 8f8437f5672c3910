"""The experiment on unlabelled paraphrases: an arm sees only the labels and pairs that it is meant to see."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from eval.experiments import paraphrases, small_runs
from eval.experiments.paraphrases import analysis, data, runs, space
from eval.experiments.paraphrases.__main__ import main
from eval.experiments.paraphrases.arms import ARMS, Consistency, Settings, training_rows
from eval.experiments.paraphrases.data import Line, messages, part_of, prepared, split_lines
from eval.experiments.paraphrases.runs import Cell, run_cell
from eval.graders.regexes import language
from llm_jepa import UserError
from llm_jepa.lm.from_scratch import random_model, train_tokenizer
from llm_jepa.lm.loading import model_from, tokenizer_from
from llm_jepa.synthetic import nl_rx

SETTINGS = Settings(12_000, 1e-3, 0.3, "last", 1.0, 0.5)
PLAN = {"labels": 40, "arms": list(ARMS), "seeds": [0, 1], "margin_points": 2.0, "primary": ["info_nce", "rewriting"]}
PLAN |= {"rerank": {"arms": ["rewriting", "info_nce"], "lines": 5, "samples": 3}}
PLAN |= {"secondary": [["info_nce", "shuffled"], ["rewriting", "sft"]]}


def rows_in(folder: Path, num_rows: int) -> None:
    """An NL-RX folder of generated rows: two wordings of the same regexes; the last quarter is the test files."""
    folder.mkdir()
    for name, wording in (("synth", 0), ("turk", 4)):
        rows = [json.dumps(row) for row in nl_rx.generate(num_rows, wordings=(wording,))]
        cut = 3 * num_rows // 4
        (folder / f"{name}_train.jsonl").write_text("\n".join(rows[:cut]) + "\n")
        (folder / f"{name}_test.jsonl").write_text("\n".join(rows[cut:]) + "\n")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """What `prepare` leaves behind, with an untrained base."""
    folder = tmp_path_factory.mktemp("paraphrases")
    rows_in(folder / "data", 160)
    lines = split_lines(folder / "data")
    rows = [row for line in lines if line.part == "train" for row in data.rows_of(line)]
    tokenizer = train_tokenizer(rows, 400)
    model = random_model({"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "max_position_embeddings": 256}, tokenizer, seed=0)  # fmt: skip
    for part in (model, tokenizer):
        part.save_pretrained(folder / "base")
    data.save_prepared(folder, folder / "data", lines)
    return folder


@pytest.fixture(scope="module")
def views(work) -> tuple[list[Line], Dataset]:
    saved = prepared(work)
    return saved.part("train"), saved.views


def test_a_language_is_in_one_part_only_and_a_known_text_is_not_judged(tmp_path):
    rows_in(tmp_path / "data", 200)
    lines = split_lines(tmp_path / "data")
    parts: dict[str, set[str]] = {}
    for line in lines:
        parts.setdefault(language(line.regex).key, set()).add(line.part)
    assert {len(found) for found in parts.values()} == {1}
    share = Counter(line.part for line in lines)
    assert 0.5 < share["train"] / len(lines) < 0.85 and min(share["validation"], share["test"]) > 5

    known = next(line for line in lines if line.part == "train").turk
    victim = next(i for i, line in enumerate(lines) if line.part == "test")
    path = tmp_path / "data" / ("turk_train.jsonl" if victim < 150 else "turk_test.jsonl")
    rows = path.read_text().splitlines()
    row = json.loads(rows[victim % 150])
    row["messages"][1]["content"] = known
    path.write_text("\n".join([*rows[: victim % 150], json.dumps(row), *rows[victim % 150 + 1 :]]) + "\n")
    assert len(split_lines(tmp_path / "data")) == len(lines) - 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [(["{}"], "line 1"), (["{"], "turk_train.jsonl, line 1 is not JSON"), ([], "150 lines and turk_train.jsonl 0")],
)
def test_files_that_do_not_line_up_are_named(rows, message, tmp_path):
    rows_in(tmp_path / "data", 200)
    (tmp_path / "data" / "turk_train.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=message):
        split_lines(tmp_path / "data")


@pytest.mark.parametrize("regex", ["(dog)&(truck)", "~(.*)", ".*", "(.*)|(dog)"])
def test_languages_that_match_nothing_or_everything_are_never_judged(regex):
    assert part_of(regex) == "train"


@pytest.mark.parametrize("arm", ["sft", "rewriting", "info_nce", "shuffled", "consistency"])
def test_an_arm_sees_the_labels_of_its_few_lines_in_one_wording_only(arm, work, views):
    lines, all_views = views
    tokenizer = tokenizer_from(str(work / "base"))
    few, others, rows = training_rows(ARMS[arm], 3, all_views, num_labels=6)
    texts = Counter(tokenizer.decode(ids, skip_special_tokens=False) for ids in rows["input_ids"])
    labelled = {text for text in texts if nl_rx.SYSTEM_PROMPT in text}
    assert len(few) == 6 and len(labelled) == 6
    assert all(any(lines[i].synth in text and lines[i].regex in text for text in labelled) for i in few)
    assert all(lines[i].turk not in text for i in few for text in texts), "an unlabelled wording of a labelled line"
    if arm == "sft":
        assert set(texts) == labelled and others == []
    else:
        assert sorted(few + others) == list(range(len(lines)))
        assert sum(texts[text] for text in labelled) == len(rows) / 2
        assert len(texts) - 6 == 2 * len(others)


def test_all_arms_of_a_seed_have_the_same_labels_and_rows(views):
    found = {name: training_rows(arm, 5, views[1], num_labels=40) for name, arm in ARMS.items()}
    assert len({tuple(few) for few, _, _ in found.values()}) == 1
    rows = [found[name][2]["index"][:] for name in ("rewriting", "info_nce", "shuffled", "consistency")]
    assert rows[0] == rows[1] == rows[2] == rows[3]


def test_a_cell_is_judged_on_its_part_in_both_wordings(work, tmp_path, monkeypatch):
    asked = {}

    def judge(model, tokenizer, prompts, golds):
        asked.update(prompts=prompts, golds=golds)
        return small_runs.Judged({"turk": {"equivalent": 0, "exact": 0}, "synth": {"equivalent": 0}}, {})

    monkeypatch.setattr(small_runs, "judge", judge)
    monkeypatch.setattr(runs, "train", lambda *_: (None, None, {"steps": 0, "tokens": 0}))
    run_cell(Cell("sft", 0, SETTINGS, "validation", tmp_path / "cell.json"), work, PLAN)
    lines = prepared(work).part("validation")
    assert asked["golds"] == [line.regex for line in lines] and len(lines) > 3
    for wording in ("synth", "turk"):
        assert [prompt[-1]["content"] for prompt in asked["prompts"][wording]] == [getattr(x, wording) for x in lines]


def test_a_finished_cell_of_other_settings_is_refused(work, tmp_path):
    cell = Cell("sft", 0, SETTINGS, "test", tmp_path / "cell.json")
    cell.out.write_text(json.dumps({"arm": "sft", "seed": 0, "part": "test", "settings": {"budget_tokens": 1}}))
    with pytest.raises(UserError, match="holds another run"):
        run_cell(cell, work, PLAN)


def test_the_head_that_comes_afterwards_sees_training_rows_only(work, views, tmp_path, monkeypatch):
    seen = []
    real = space.contrastive_head

    def spy(predicted, target, target_key, **options):
        seen.append((len(predicted), set(target_key.tolist())))
        return real(predicted, target, target_key, steps=5, **options)

    monkeypatch.setattr(space, "contrastive_head", spy)
    run_cell(Cell("rewriting", 0, SETTINGS, "test", tmp_path / "cell.json"), work, PLAN)
    rows = training_rows(ARMS["rewriting"], 0, views[1], num_labels=40)[2]
    assert seen == [(len(rows), set(rows["target_key"][:]))]


def test_another_seed_draws_other_labels(views):
    few = [training_rows(ARMS["sft"], seed, views[1], num_labels=6)[0] for seed in (0, 1)]
    assert few[0] != few[1]


def test_shuffled_pairs_are_the_same_texts_and_none_is_its_own(views):
    _, own = training_rows(ARMS["info_nce"], 0, views[1], num_labels=6)[1:]
    _, wrong = training_rows(ARMS["shuffled"], 0, views[1], num_labels=6)[1:]
    for name in own.column_names:
        if name not in ("targets", "target_key", "target_text_keys"):
            assert own[name] == wrong[name]
    half = len(own) // 2
    assert own["targets"][:half] == wrong["targets"][:half], "labelled rows keep their targets"
    assert all(one != other for one, other in zip(own["target_key"][half:], wrong["target_key"][half:], strict=True))
    assert sorted(own["target_key"][half:]) == sorted(wrong["target_key"][half:])
    assert sorted(map(str, own["targets"][half:])) == sorted(map(str, wrong["targets"][half:]))
    key_of = dict(zip(map(str, own["targets"]), own["target_key"], strict=True))
    assert all(key_of[str(t)] == key for t, key in zip(wrong["targets"], wrong["target_key"], strict=True))


def test_consistency_is_kl_of_both_answers_and_moves_the_turk_side_only(work, views):
    """Against probabilities computed one row at a time; and no gradient reaches a model of the synth side."""
    lines, _ = views
    model, tokenizer = model_from(str(work / "base"), dtype=torch.float64), tokenizer_from(str(work / "base"))
    for parameter in model.parameters():  # a fresh model answers the same to everything
        parameter.data.mul_(5)
    term = Consistency(lines[:5], tokenizer, seed=0, weight=0.7)
    term.PAIRS, term.start = 5, 0
    term.answers = ["(dog).*", "a", "([0-9])|(b)", "", "x{3}"]

    def log_probabilities(text: str, answer: str) -> torch.Tensor:
        prompt = tokenizer.apply_chat_template(
            messages(nl_rx.SYSTEM_PROMPT, text), tokenize=False, add_generation_prompt=True
        )
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        return logits.float().log_softmax(-1)

    total, count = torch.zeros(()), 0
    for line, answer in zip(term.lines, term.answers, strict=True):
        if answer:
            p, q = log_probabilities(line.synth, answer).detach(), log_probabilities(line.turk, answer)
            total, count = total + (p.exp() * (p - q)).sum(), count + len(p)
    expected = torch.autograd.grad(0.7 * total / count, list(model.parameters()))
    loss = term.loss(model, step=0)
    assert loss is not None and float(loss.detach()) == pytest.approx(0.7 * float(total.detach()) / count, rel=1e-5)
    assert float(loss.detach()) > 1e-3
    found = torch.autograd.grad(loss, list(model.parameters()))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_consistency_of_equal_wordings_is_zero_and_starts_when_it_says(work, views):
    model, tokenizer = model_from(str(work / "base"), dtype=torch.float32), tokenizer_from(str(work / "base"))
    term = Consistency([replace(line, turk=line.synth) for line in views[0]], tokenizer, seed=0, weight=1.0)
    steps = term.plan_steps(20_000, 1_000, views[0][:10])
    assert term.start == round(steps / 4) and term.loss(model, term.start - 1) is None and term.tokens == 0
    loss = term.loss(model, term.start)
    assert loss is None or abs(float(loss.detach())) < 1e-6
    assert len(term.answers) == len(term.lines)
    # A greedy answer for every pair costs a third of its row; of this step's pairs one side is learnt, one only read.
    lengths = [len(term._turn(line.synth, answer).ids) for line, answer in zip(term.lines, term.answers, strict=True)]
    first = [length for length, answer in zip(lengths[:16], term.answers, strict=False) if answer]
    assert term.tokens == pytest.approx(sum(lengths) / 3 + sum(first) * (1 + 1 / 3))


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_costs_the_budget(arm, work, tmp_path):
    """What the trainer counted, against the budget the steps were chosen for; and a finished cell is left alone."""
    cell = Cell(arm, 0, SETTINGS, "test", tmp_path / f"{arm}-seed0.json")
    run_cell(cell, work, PLAN)
    result = json.loads(cell.out.read_text())
    budget = SETTINGS.budget_tokens * (SETTINGS.sft_share if arm == "sft" else 1)
    step = result["cost"]["tokens"] / result["cost"]["steps"]
    slack = 0.15 * budget if arm == "consistency" else 0.6 * step  # how many answers there will be is a guess
    assert abs(result["cost"]["tokens"] - budget) < slack
    assert len(result["correct"]["turk"]) == result["lines"] > 3
    assert result["metrics"]["turk"]["equivalent"] == result["correct"]["turk"].count("1") / result["lines"]
    assert (result["space"] is not None) == (arm in PLAN["rerank"]["arms"])
    if result["space"] is not None:
        assert set(result["space"]["reranked"]) == {"similarity", "log_probability", "votes"}
    has_pairs = any("jepa_loss" in entry for entry in result["cost"]["log"])
    assert has_pairs == (arm in ("info_nce", "shuffled"))
    before = cell.out.stat().st_mtime_ns
    assert f"{arm}-seed0" in run_cell(cell, work, PLAN)
    assert cell.out.stat().st_mtime_ns == before


def write_runs(folder: Path, gain: int, *, lines: int = 200) -> None:
    """Runs in which info_nce has `gain` more lines right than rewriting, and seed 1 one more than seed 0."""
    right = {"sft": 20, "rewriting": 60, "info_nce": 60 + gain, "shuffled": 50, "consistency": 60, "ceiling": 150}
    folder.mkdir()
    metrics = dict.fromkeys(("equivalent", "exact", "startswith", "contains", "stop_rate"), 0.5)
    for seed in (0, 1):
        for arm, number in right.items():
            number += seed * (arm == "info_nce")
            run = {"metrics": {"synth": metrics, "turk": metrics | {"equivalent": number / lines},
                               "both": {"consistent": 0.2, "consistent_and_correct": 0.1}},
                   "correct": {"turk": "1" * number + "0" * (lines - number)}, "cost": {"tokens": 100, "steps": 7},
                   "arm": arm, "space": None, "data_sha256": {}, "base_sha256": "b", "settings": {}, "part": "test",
                   "lines": lines}  # fmt: skip
            (folder / f"{arm}-seed{seed}.json").write_text(json.dumps(run))
    # Two languages of 50 and 150 lines; the base has seen the second.
    facts = {"language": ["a"] * 50 + ["b"] * 150, "in_base": [False] * 50 + [True] * 150}
    (folder.parent / "test_lines.json").write_text(json.dumps(facts))


def test_analysis_worked_by_hand(tmp_path):
    write_runs(tmp_path / "runs", gain=20)
    found = analysis.analyse(PLAN, tmp_path / "runs")
    assert found["seeds"] == [0, 1] and found["lines"] == 200
    assert found["primary"]["by_seed"] == [10.0, 10.5]
    assert found["primary"]["hierarchical"]["estimate"] == pytest.approx(10.25)
    # t with one degree of freedom: mean 10.25, standard error 0.25, so t = 41 and p = 2 / pi * atan(1 / 41)
    assert found["primary"]["p"] == pytest.approx(0.015525, abs=1e-5)
    assert not found["primary"]["equivalence"]["within_margin"]
    assert found["secondary"]["info_nce - shuffled"]["by_seed"] == [15.0, 15.5]
    assert found["secondary"]["rewriting - sft"]["p_holm"] == 0.0
    assert found["arms"]["rewriting"]["turk equivalent"] == [pytest.approx(0.3), 0.0]
    # The gained lines are 60..80: all of the second language, so none of the first, and half of that by language.
    assert found["sensitivity"]["language not in base"]["estimate"] == 0
    assert found["sensitivity"]["each language once"]["estimate"] == pytest.approx(100 * 20.5 / 150 / 2)
    rows = analysis.table(found).splitlines()
    assert any(row.startswith("| **info_nce - rewriting** (primary) | +10.2 | +7.1 to +13.4 |") for row in rows)
    p = {name: row["p"] for name, row in found["secondary"].items()}
    assert found["secondary"]["info_nce - shuffled"]["p_holm"] == pytest.approx(max(p.values()))
    analysis.draw(analysis.confirmed(PLAN, tmp_path / "runs"), tmp_path / "turk.png")
    assert (tmp_path / "turk.png").stat().st_size > 10_000


def test_analysis_refuses_runs_that_do_not_belong_together(tmp_path):
    write_runs(tmp_path / "runs", gain=1)
    path = tmp_path / "runs" / "sft-seed1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_sha256": "another"}))
    with pytest.raises(UserError, match="2 data sets, bases or settings"):
        analysis.analyse(PLAN, tmp_path / "runs")
    path.unlink()
    with pytest.raises(UserError, match="1 whole seed"):
        analysis.analyse(PLAN, tmp_path / "runs")


def test_the_plan_holds_every_setting():
    plan = yaml.safe_load(paraphrases.PLAN.read_text())
    assert set(plan["arms"]) == set(ARMS) and not set(plan["seeds"]) & set(plan["selection_seeds"])
    names = set(Settings.__dataclass_fields__)
    assert set(plan["start"]) == names and (plan["settled"] is None or set(plan["settled"]) == names)
    assert all(set(stage["values"]) <= names for stage in plan["grid"])
    assert {arm for pair in [plan["primary"], *plan["secondary"]] for arm in pair} <= set(ARMS)


def test_command_line_says_what_is_missing(tmp_path, capsys):
    assert main(["prepare", "--work", str(tmp_path)]) == 2
    assert main(["prepare", "--data", str(tmp_path), "--work", str(tmp_path / "w")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "--data FOLDER" in lines[0] and "lacks synth_train.jsonl" in lines[1]
