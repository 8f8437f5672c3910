"""The analysis of plans that name their primary metrics, on made-up runs whose truth is known, and by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest

from eval.experiments.replication import planned_analysis, planned_tables, runs
from eval.experiments.replication.__main__ import main
from eval.experiments.replication.planned_analysis import (
    analyse,
    hypothesis,
    names_its_primary,
    parts_of_change,
    verdict,
    within_margin,
)
from eval.figures.inference import Interval, detectable_difference, show_p
from eval.pages import pretrained
from llm_jepa import UserError
from llm_jepa.core.strict_yaml import dump_yaml, load_yaml

from . import made_up_runs


def plan_of(name: str, **settled) -> dict:
    plan = load_yaml((pretrained.PLANS / f"pretrained-{name}.yaml").read_text())
    return plan | {"settled": {"learning_rate": 2e-4, "weights": settled}}


PUBLISHED = plan_of("published", cosine=1.0, mismatched=1.0, stp_code=0.02)
COMPLETION = plan_of("completion", info_nce=0.1)
for _set in ("synth", "turk"):  # the arm that joins if info_nce gains
    COMPLETION["protocols"][_set]["arms"] = ["sft", "info_nce", "sft_equal_tokens"]
SFT = {"starts": 0.55, "stops": 0.1, "ends": 0.9}
# The truth: cosine stops more, and knows as much; mismatched stops as often, and knows less; stp_code is plain SFT.
TRUTH = {
    "sft": SFT,
    "cosine": SFT | {"stops": 0.3},
    "mismatched": SFT | {"stops": 0.3, "starts": 0.45},
    "stp_code": SFT,
    "sft_equal_tokens": SFT,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("published")
    made_up_runs.write(PUBLISHED, out, TRUTH)
    return out


@pytest.fixture(scope="module")
def figures(published) -> dict:
    return analyse(PUBLISHED, published)["paper"]


def path_of(out: Path, arm: str, seed: int, protocol: str = "paper") -> Path:
    return runs.result_file(protocol, arm, seed, out)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- planted effects -----------------------------------------------------------------------------------


def test_a_planted_gain_in_stopping_is_found_as_one(figures):
    """Exact: 0.55 x 0.9 of 20 more points that stop, 9.9. Content is the same. stp_code is plain SFT."""
    cosine = figures["wordings"]["synth"]["minus_sft"]["cosine - sft"]
    assert cosine["exact"]["verdict"] == cosine["stop_rate"]["verdict"] == "gain"
    assert cosine["stop_rate"]["t_interval"]["estimate"] == pytest.approx(20, abs=2.5)
    assert cosine["exact"]["t_interval"]["estimate"] == pytest.approx(9.9, abs=2.5)
    assert cosine["contains"]["within_margin"] == "yes"
    gain = figures["wordings"]["synth"]["gain"]
    parts = gain["cosine - sft"]["by_stopping"]
    assert parts["condition"]["t_interval"]["low"] > 6
    assert abs(parts["exact_given_it"]["t_interval"]["estimate"]) < 2
    starts = gain["cosine - sft"]["by_start"]
    assert starts["exact_given_it"]["t_interval"]["low"] > 6 and abs(starts["condition"]["t_interval"]["estimate"]) < 1
    assert [gain[f"{arm} - sft"]["hypothesis"] for arm in ("cosine", "mismatched", "stp_code")] == [
        "confirmed", "refuted", "no gain",
    ]  # fmt: skip


def test_the_planned_contrast_is_about_the_pairing_alone(figures):
    """cosine and mismatched stop alike; mismatched knows 10 points less. It is the only test of its family."""
    contrasts = figures["wordings"]["synth"]["contrasts"]
    assert list(contrasts) == ["cosine - mismatched"], "an arm that the protocol lacks is in no contrast"
    contains = contrasts["cosine - mismatched"]["contains"]
    assert contains["t_interval"]["estimate"] == pytest.approx(10, abs=2.5) and contains["within_margin"] == "no"
    for metric in ("exact", "stop_rate", "contains"):
        assert contrasts["cosine - mismatched"][metric]["p_holm"] == contrasts["cosine - mismatched"][metric]["p"]


def test_a_planted_gain_in_content_refutes_the_hypothesis(tmp_path):
    made_up_runs.write(PUBLISHED, tmp_path, TRUTH | {"sft": SFT | {"stops": 0.5}, "cosine": SFT | {
        "stops": 0.5, "starts": 0.75}})  # fmt: skip
    synth = analyse(PUBLISHED, tmp_path)["paper"]["wordings"]["synth"]
    gain = synth["gain"]["cosine - sft"]
    assert synth["minus_sft"]["cosine - sft"]["exact"]["verdict"] == "gain" and gain["hypothesis"] == "refuted"
    assert gain["by_stopping"]["exact_given_it"]["t_interval"]["low"] > 5
    assert gain["by_start"]["condition"]["t_interval"]["low"] > 5
    assert abs(gain["by_start"]["exact_given_it"]["t_interval"]["estimate"]) < 2


def test_arms_are_means_over_seeds_of_the_bits(figures, published):
    """Mean and sd of the shares that the result files say, in %; exact of stopped from the bits of both."""
    arm = figures["wordings"]["synth"]["arms"]["cosine"]
    results = [json.loads(path_of(published, "cosine", seed).read_text()) for seed in range(5)]
    for metric in planned_analysis.METRICS:
        shares = [100 * result["metrics"]["synth"][metric] for result in results]
        assert arm[metric]["by_seed"] == pytest.approx(shares)
        assert (arm[metric]["mean"], arm[metric]["sd"]) == pytest.approx((np.mean(shares), np.std(shares, ddof=1)))
    bits = [result["bits"]["synth"] for result in results]
    stopped = [of["stop_rate"].count("1") for of in bits]
    both = [sum(a == b == "1" for a, b in zip(of["exact"], of["stop_rate"], strict=True)) for of in bits]
    shares = [100 * b / s for b, s in zip(both, stopped, strict=True)]
    assert arm["exact_of_stopped"]["mean"] == pytest.approx(np.mean(shares))
    assert (arm["exact_of_stopped"]["stopped"], arm["exact_of_stopped"]["seeds"]) == (sum(stopped), 5)
    assert figures["tokens"]["cosine"] == 100_002 and figures["weight"]["stp_code"] == 0.02


def test_differences_worked_by_hand(tmp_path):
    """Two seeds of 100 lines: exact of cosine is 6 and 5 points above sft; the others are sft.

    One degree of freedom: mean 5.5, standard error 0.5, t = 11, p = 2 / pi * atan(1 / 11). Holm over three arms.
    """
    plan = copy.deepcopy(PUBLISHED)
    plan["protocols"]["paper"]["seeds"] = [0, 1]
    made_up_runs.write(plan, tmp_path, dict.fromkeys(TRUTH, SFT), lines=100)
    for arm in plan["protocols"]["paper"]["arms"]:
        for seed in (0, 1):
            right = (10 if arm != "cosine" else 16 - seed) + 3 * seed
            bits = {"synth": dict.fromkeys(planned_analysis.METRICS, ("1" * right).ljust(100, "0"))}
            metrics = {"synth": dict.fromkeys(planned_analysis.METRICS, right / 100)}
            change(path_of(tmp_path, arm, seed), bits=bits, metrics=metrics)
    cosine = analyse(plan, tmp_path)["paper"]["wordings"]["synth"]["minus_sft"]["cosine - sft"]["exact"]
    p = 2 / math.pi * math.atan(1 / 11)
    assert cosine["by_seed"] == pytest.approx([6.0, 5.0])
    assert (cosine["p"], cosine["p_holm"]) == pytest.approx((p, 3 * p))
    half = 12.7062 * 0.5  # t of one degree of freedom
    assert list(cosine["t_interval"].values()) == pytest.approx([5.5, 5.5 - half, 5.5 + half], abs=1e-3)
    assert cosine["detectable"] == pytest.approx(detectable_difference(0.5**0.5, 2, num_tests=3))
    crossed = cosine["hierarchical"]
    assert crossed["low"] < 5 and crossed["high"] > 6 and crossed["estimate"] == pytest.approx(5.5)
    assert cosine["verdict"] == "undecided"


# -- the split of a change -----------------------------------------------------------------------------------


def bits(text: str) -> np.ndarray:
    return np.array([float(bit) for bit in text])


def test_the_split_worked_by_hand():
    """Stops: 4 of 10 against 2 of 10; exact of those: 3/4 against 1/2.

    (0.4 - 0.2)(0.75 + 0.5)/2 = 0.125 and (0.75 - 0.5)(0.4 + 0.2)/2 = 0.075: the change is 0.3 - 0.1 = 0.2.
    """
    stopped, base_stopped = bits("1111000000"), bits("0000000011")
    split = parts_of_change(bits("1110000000"), stopped, bits("0000000001"), base_stopped)
    assert split == pytest.approx((0.125, 0.075, 0.0))
    back = parts_of_change(bits("0000000001"), base_stopped, bits("1110000000"), stopped)
    assert back == pytest.approx((-0.125, -0.075, 0.0)), "the split depends on which arm is called the first"


def test_the_parts_sum_to_the_change_even_if_some_exact_answers_did_not_stop():
    rng, seen = np.random.default_rng(0), 0.0
    for _ in range(200):
        exact, stopped, base, base_stopped = (rng.uniform(size=(4, 30)) < rng.uniform(size=(4, 1))).astype(float)
        parts = parts_of_change(exact, stopped, base, base_stopped)
        if not math.isnan(parts[0]):
            assert sum(parts) == pytest.approx(exact.mean() - base.mean(), abs=1e-12)
            seen += abs(parts[2])
    assert seen > 1, "there was no exact answer without a stop"


def test_an_exact_answer_that_did_not_stop_is_not_one_of_those_that_stopped():
    """2 of 4 that stopped are exact; a third exact one did not stop. In the second seed nothing stopped."""
    answers = {
        "exact": np.stack([bits("110010"), bits("100000")]),
        "stop_rate": np.stack([bits("111100"), bits("000000")]),
    }
    shares = planned_analysis.exact_of_stopped(answers)
    assert shares[0] == 50 and math.isnan(shares[1])


def test_seeds_in_which_nothing_stopped_are_counted_and_left_out(tmp_path):
    """sft of seeds 0 to 3 never stops: one seed is left, too few for an interval. stp_code loses seed 0 alone."""
    made_up_runs.write(PUBLISHED, tmp_path, TRUTH)
    never = {"stop_rate": "0" * 300, "exact": "0" * 300}
    for arm, seeds in (("sft", range(4)), ("stp_code", [0])):
        for seed in seeds:
            run = json.loads(path_of(tmp_path, arm, seed).read_text())
            run["bits"]["synth"] |= never
            run["metrics"]["synth"] |= {"stop_rate": 0.0, "exact": 0.0}
            change(path_of(tmp_path, arm, seed), **run)
    figures = analyse(PUBLISHED, tmp_path)
    synth = figures["paper"]["wordings"]["synth"]
    assert [synth["arms"][arm]["exact_of_stopped"]["seeds"] for arm in ("sft", "cosine", "stp_code")] == [1, 5, 4]
    parts = synth["gain"]["cosine - sft"]["by_stopping"]
    assert parts["condition"] == parts["change"] == {"seeds": 1, "t_interval": None}
    assert synth["gain"]["cosine - sft"]["by_start"]["condition"]["seeds"] == 5, "what starts right is always defined"
    assert synth["minus_sft"]["cosine - sft"]["exact"]["verdict"] == "gain"
    json.dumps(figures, allow_nan=False)
    tables = planned_tables.tables(figures, PUBLISHED)
    assert ", 1 seeds)" in tables["arms"] and "undefined, 1 seeds" in tables["gain"] and "nan" not in str(tables)


# -- tables ------------------------------------------------------------------------------------------------------------


def rows_of(table: str) -> dict[str, dict[str, str]]:
    """The first cells of a row, up to the difference -> header -> cell."""
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    names = header.index("difference") + 1
    return {" ".join(cells[2:names]): dict(zip(header, cells, strict=True)) for cells in lines}


def test_every_cell_of_a_difference_is_its_figure(published, figures):
    """One arm and the contrast, whose corrected p, words and parts all differ."""
    tables = planned_tables.tables({"paper": figures}, PUBLISHED)
    synth = figures["wordings"]["synth"]
    primary, beside, gain = (rows_of(tables[name]) for name in ("primary", "beside", "gain"))
    assert len(primary) == 2 * 4 and len(beside) == 4 and len(gain) == 3
    for family, name in (("minus_sft", "mismatched - sft"), ("contrasts", "cosine - mismatched")):
        of, row = synth[family][name], primary[f"exact {name}"]
        exact = of["exact"]
        assert row["points"] == "{:+.1f} ({:+.1f} to {:+.1f})".format(*exact["t_interval"].values())
        assert row["seeds and lines"] == "{low:+.1f} to {high:+.1f}".format(**exact["hierarchical"])
        assert row["by seed"] == ", ".join(f"{gain:+.1f}" for gain in exact["by_seed"]).replace("-0.0", "+0.0")
        assert (row["p"], row["p (Holm)"]) == (show_p(exact["p"]), show_p(exact["p_holm"]))
        assert (row["detectable"], row["verdict"]) == (f"{exact['detectable']:.1f}", f"**{exact['verdict']}**")
        assert beside[name]["contains within ± 3"] == of["contains"]["within_margin"]
        assert beside[name]["contains"].endswith(f", {of['contains']['verdict']}")
    assert primary["exact mismatched - sft"]["p"] != primary["exact mismatched - sft"]["p (Holm)"], "nothing is shown"
    stops, starts = (synth["gain"]["mismatched - sft"][key] for key in ("by_stopping", "by_start"))
    columns = {
        "by stopping": stops["condition"],
        "by being right when it stops": stops["exact_given_it"],
        "exact without a stop": stops["exact_without"],
        "by ending after the right start": starts["exact_given_it"],
        "by starting right": starts["condition"],
    }
    row = gain["mismatched - sft"]
    for title, part in columns.items():
        assert row[title] == "{:+.1f} ({:+.1f} to {:+.1f})".format(*part["t_interval"].values()), title
    for gain_of in (stops, starts):
        estimates = {key: part["t_interval"]["estimate"] for key, part in gain_of.items()}
        assert estimates.pop("change") == pytest.approx(sum(estimates.values()), abs=1e-9)
    assert len({row[title] for title in columns}) == 5 and row["hypothesis"] == "**refuted**"
    assert row["change of exact"] == primary["exact mismatched - sft"]["points"] + ", 5 seeds"


# -- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "p", "word"),
    [
        ((2.0, 1.0, 3.5), 0.01, "gain"),
        ((-2.0, -3.0, -1.0), 0.01, "loss"),
        ((2.0, 0.5, 3.5), 0.06, "undecided"),
        ((2.0, 0.5, 2.9), 0.06, "no gain"),
        ((-9.0, -20.0, 2.0), 0.3, "no gain"),
        ((0.0, -3.0, 3.0), 0.9, "undecided"),
    ],
)
def test_words_follow_from_the_numbers(interval, p, word):
    assert verdict(Interval(*interval), p, 3.0) == word


@pytest.mark.parametrize(
    ("by_seed", "word"),
    [
        ([0.0, 0.1, -0.1, 0.2], "yes"),
        ([-1.0, -1.1, -0.9, -1.2], "yes"),
        ([2.9, 2.6, 3.1, 2.5], "undecided"),  # the mean is inside, the interval is not
        ([2.45, 2.6, 2.8, 2.95], "undecided"),  # 2.7 +- 0.35 at 95 %, +- 0.26 at 90 %
        ([3.4, 3.5, 3.6, 3.5], "no"),
        ([-4.0, -4.1, -4.2, -3.9], "no"),
        ([0.0, 0.1, 6.0, -6.0], "undecided"),
    ],
)
def test_the_margin_is_about_the_whole_95_interval(by_seed, word):
    assert within_margin(by_seed, 3.0) == word
    assert within_margin([-gain for gain in by_seed], 3.0) == word


@pytest.mark.parametrize(
    ("exact", "stops", "stops_high", "content", "word"),
    [
        ("gain", "gain", 9.0, "yes", "confirmed"),
        ("gain", "gain", 9.0, "no", "refuted"),
        ("gain", "gain", 9.0, "undecided", "undecided"),
        ("gain", "no gain", 1.9, "yes", "refuted"),  # exact rises by 2 to 4
        ("gain", "no gain", 2.1, "yes", "undecided"),
        ("gain", "gain", 1.9, "yes", "refuted"),
        ("no gain", "gain", 9.0, "yes", "no gain"),
        ("loss", "gain", 9.0, "no", "no gain"),
        ("undecided", "gain", 9.0, "yes", "undecided"),
    ],
)
def test_the_hypothesis_needs_a_gain_that_stopping_can_explain(exact, stops, stops_high, content, word):
    of_arm = {
        "exact": {"verdict": exact, "t_interval": {"low": 2.0, "high": 4.0}},
        "stop_rate": {"verdict": stops, "t_interval": {"low": -1.0, "high": stops_high}},
        "contains": {"within_margin": content},
    }
    assert hypothesis(of_arm, "contains") == word


# -- which runs -----------------------------------------------------------------------------------


def test_only_whole_seeds_count(published, tmp_path):
    """Without one arm of seeds 1 and 4: the figures are those of a plan with the seeds 0, 2 and 3."""
    made_up_runs.write(PUBLISHED, tmp_path, TRUTH)
    path_of(tmp_path, "mismatched", 1).unlink()
    path_of(tmp_path, "sft", 4).unlink()
    plan = copy.deepcopy(PUBLISHED)
    plan["protocols"]["paper"]["seeds"] = [0, 2, 3]
    found, wanted = analyse(PUBLISHED, tmp_path), analyse(plan, published)
    assert found["paper"].pop("planned_seeds") == 5 and wanted["paper"].pop("planned_seeds") == 3
    assert found == wanted and found["paper"]["seeds"] == [0, 2, 3]


@pytest.fixture
def plan_file(tmp_path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(dump_yaml(PUBLISHED))
    return path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"weight": 0.5}, "weight 0.5 instead of 1.0"),
        ({"learning_rate": 1e-4}, "learning_rate 0.0001 instead of 0.0002"),
        ({"steps": 60}, "steps 60 instead of 125"),
        ({"part": "validation"}, "part 'validation' instead of 'test'"),
        ({"setup": {"rows": 800}}, "holds another run (setup"),
        ({"start_sha256": "c4" * 32}, "2 starts or data sets"),
        ({"start": "another"}, "2 starts or data sets"),
        ({"data_sha256": {"synth_train.jsonl": "00"}}, "other data than the plan's"),
        ({"metrics": {"synth": dict.fromkeys(planned_analysis.METRICS, 0.99)}}, "do not give its figure"),
        ({"lines": 299}, "do not give its figure"),
        ({"bits": {}}, "do not give its figure"),
    ],
)
def test_runs_of_other_settings_are_one_line(values, words, plan_file, published, tmp_path, capsys):
    out = tmp_path / "out"
    made_up_runs.write(PUBLISHED, out, TRUTH)
    change(path_of(out, "cosine", 2), **values)
    assert main(["analyse", "--plan", str(plan_file), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1, said
    assert not (out / "summary.json").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"primary": ["exactness"]}, "primary: ['exactness'] must be a list of metrics"),
        ({"primary": []}, "primary: []"),
        ({"margin": None}, "margin: None must be"),
        ({"margin": {"metric": "contains", "points": 0}}, "0 points must be a number above 0"),
        ({"margin": {"metric": "bleu", "points": 3}}, "with a metric that is one of exact"),
        ({"contrasts": [["cosine", "vicreg"]]}, "contrasts: ['cosine', 'vicreg'] must be two arms"),
        ({"protocols": {"paper": {"arms": ["cosine"], "seeds": [0, 1]}}}, "must have the arm sft"),
        ({"primary": None}, "has `margin` or `contrasts`, but no `primary`"),
    ],
)
def test_keys_that_do_not_belong_together_are_refused(keys, words):
    with pytest.raises(UserError) as raised:
        names_its_primary(PUBLISHED | keys)
    assert words in str(raised.value)


def test_a_plan_without_a_primary_metric_keeps_the_other_analysis():
    assert names_its_primary(PUBLISHED) and names_its_primary(COMPLETION)
    assert not names_its_primary(load_yaml((pretrained.PLANS / "replication.yaml").read_text()))


def test_one_row_can_be_repeated_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eval.experiments.replication.__main__._check_data", lambda *_: None)
    asked = []
    monkeypatch.setattr(
        "eval.experiments.replication.__main__.compare",
        lambda data, plan, start, out, jobs: asked.append([c.out.stem for c, _ in runs.planned_runs(plan, start, out)]),
    )
    path = tmp_path / "plan.yaml"
    path.write_text(dump_yaml(COMPLETION))
    words = ["compare", "--data", "x", "--start", "x", "--plan", str(path), "--out", str(tmp_path / "out")]
    assert main([*words, "--protocol", "turk", "--arm", "info_nce", "--seed", "1"]) == 0
    assert main([*words, "--arm", "sft_equal_tokens", "--seed", "2"]) == 0
    assert main(words) == 0
    assert asked[:2] == [
        ["turk-info_nce-seed1"],
        ["synth-sft_equal_tokens-seed2", "turk-sft_equal_tokens-seed2"],
    ]
    assert len(asked[2]) == 24
    for choice in (["--seed", "7"], ["--protocol", "synth_250", "--arm", "sft_equal_tokens"], ["--arm", "vicreg"]):
        assert main([*words, *choice]) == 2
        said = capsys.readouterr().err
        assert f"The plan has no run of {' '.join(choice)};" in said and said.count("\n") == 1
    assert len(asked) == 3


# -- the page -----------------------------------------------------------------------------------


def test_the_page_says_what_is_not_there_yet(published, tmp_path, plan_file):
    """No result file, then one whole seed: no figures. From two on: figures, and how many seeds there are."""
    assert "under way" in pretrained.question(plan_file, tmp_path / "nothing")
    out = tmp_path / "out"
    made_up_runs.write(PUBLISHED, out, TRUTH)
    for seed in (1, 2, 3, 4):
        path_of(out, "cosine", seed).rename(path_of(out, "cosine", seed).with_suffix(".later"))
    assert "under way" in pretrained.question(plan_file, out)
    path_of(out, "cosine", 3).with_suffix(".later").rename(path_of(out, "cosine", 3))
    assert "2 of 5 seeds of paper" in pretrained.question(plan_file, out)
    unsettled = tmp_path / "unsettled.yaml"
    unsettled.write_text(dump_yaml(PUBLISHED | {"settled": None}))
    assert "under way" in pretrained.question(unsettled, tmp_path / "nothing")
    with pytest.raises(UserError, match="no `settled` settings"):
        pretrained.question(unsettled, published)


def test_the_page_of_stopping_has_its_tables_and_pictures(published, tmp_path, plan_file, capsys):
    before = pretrained.question(plan_file, published)
    assert "![" not in before, "a picture that does not exist is not linked"
    assert main(["analyse", "--plan", str(plan_file), "--out", str(published)]) == 0
    assert "5 of 5 seeds of paper" in capsys.readouterr().out
    json.loads((published / "summary.json").read_text())
    page = pretrained.question(plan_file, published)
    for name in ("stops.png", "differences.png"):
        assert (published / name).read_bytes().startswith(b"\x89PNG") and f"/{name})" in page
    assert "| paper | synth (trained) | exact | cosine - sft | +" in page and "**confirmed**" in page
    assert "contains within ± 3" in page and "5 of 5 seeds of paper" in page and "abababa" in page
    assert before.replace("\n", "") == "".join(line for line in page.splitlines() if not line.startswith("!["))


def test_the_page_of_correct_labels_is_about_both_wordings(tmp_path):
    """In turk wording info_nce knows 10 points less, wherever it is trained; equal tokens know 10 more in both."""
    ends = {"starts": 0.55, "stops": 1.0, "ends": 1.0}
    truth = {"sft": ends, "info_nce": ends, "info_nce turk": ends | {"starts": 0.45}}
    truth["sft_equal_tokens"] = ends | {"starts": 0.65}
    made_up_runs.write(COMPLETION, tmp_path / "runs", truth, lines=1200)
    path = tmp_path / "plan.yaml"
    path.write_text(dump_yaml(COMPLETION))
    figures = analyse(COMPLETION, tmp_path / "runs")
    assert [of["trained"] for of in figures.values()] == ["synth", "turk", "synth"]
    for name, of in figures.items():
        for wording, sign in (("synth", 0), ("turk", -10)):
            arm = of["wordings"][wording]["minus_sft"]["info_nce - sft"]["equivalent"]
            assert arm["t_interval"]["estimate"] == pytest.approx(sign, abs=2.5)
            assert arm["within_margin"] == ("yes" if sign == 0 else "no"), (name, wording, arm)
        assert list(of["wordings"]["turk"]["contrasts"]) == ([] if name == "synth_250" else [
            "info_nce - sft_equal_tokens"])  # fmt: skip
        assert "gain" not in of["wordings"]["turk"], "nothing is asked about stopping"
    page = pretrained.question(path, tmp_path / "runs")
    assert "| turk | turk (trained) | equal language | info_nce - sft | -" in page
    assert "| synth_250 | turk | equal language | info_nce - sft | -" in page and "hypothesis" not in page.lower()


def test_committed_runs_are_those_of_their_plans():
    """`load` refuses other settings, other data, and figures that the bits do not give. Question 1 is finished."""
    for name, is_finished in (("published", True), ("completion", False)):
        plan = load_yaml((pretrained.PLANS / f"pretrained-{name}.yaml").read_text())
        whole = planned_analysis.whole_seeds(plan, pretrained.FOLDER / name)
        if is_finished:
            assert whole == {protocol: of["seeds"] for protocol, of in plan["protocols"].items()}
        if min(map(len, whole.values())) >= 2:
            for protocol, by_arm in planned_analysis.load(plan, pretrained.FOLDER / name).items():
                assert by_arm.keys() == set(plan["protocols"][protocol]["arms"])
                assert all([run["seed"] for run in runs] == whole[protocol] for runs in by_arm.values())
