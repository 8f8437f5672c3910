"""Claims about the benchmark of steps: its arms compute one loss, so that only the layout differs; it counts right."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from eval.cost.step_cost import arms, command, data, figures, measuring
from eval.cost.step_cost.arms import Arm, Tokens
from llm_jepa import LLMJEPAConfig, LLMJEPATrainer

TOY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 768,
}
NUMBERS = range(3)
FIGURES = {
    "ours_over_sft", "ours_over_three_rows", "ours_over_two_rows", "ours_packed_over_packed_sft",
    "ours_message_over_three_rows", "ours_forward_only_over_sft", "ours_cached_over_sft", "ours_dropout75_over_sft",
    "token_ratio", "token_ratio_packed", "ours_memory_over_sft", "sft_over_matrix_products",
    "sft_packed_over_matrix_products", "ours_over_matrix_products", "ours_packed_over_matrix_products",
}  # fmt: skip


@dataclass
class Bench:
    model: torch.nn.Module
    arms: dict[str, Arm]
    rows: list[dict]  # views: prefix contexts
    messages: list[dict]
    predictor_id: int


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    """All arms of a toy float64 model over three rows of different length."""
    folder = tmp_path_factory.mktemp("step_cost")
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "GENERATED_ROWS", 60)
    patch.setattr(data, "TOKENIZER_SIZE", 640)
    rows = data.load_data("nl_rx", None, seed=0)
    model = data.random_llama(TOY, rows.tokenizer, seed=0).double()
    trainers = []
    make = arms.rows_arm
    patch.setattr(arms, "rows_arm", lambda trainer, *a, **o: trainers.append(trainer) or make(trainer, *a, **o))
    options = argparse.Namespace(device="cpu", dtype="float32", batch_size=3, quick=False)
    every_arm = arms.make_arms(model, rows, rows.rows[:3], folder, options)
    trainer = trainers[-1]
    message = LLMJEPATrainer(
        model=model,
        args=LLMJEPAConfig(
            str(folder), use_cpu=True, bf16=False, jepa_weight=1.0, objective="cosine", context_view="message"
        ),
        train_dataset=Dataset.from_list(rows.rows[:3]),
        processing_class=trainer.processing_class,
    )
    every_arm["three_rows_message"] = make(message, arms.three_rows)
    every_arm["two_rows_message"] = make(message, arms.two_rows)
    yield Bench(
        model, every_arm, trainer.train_dataset.to_list(), message.train_dataset.to_list(), trainer.predictor_ids[0]
    )
    patch.undo()


def terms(
    bench: Bench, rows: list[dict], *, predictors: Sequence[int], constant_target: bool = False
) -> tuple[Tensor, Tensor]:
    """LM loss and cosine distance from one unpadded pass per sequence: what every arm must compute."""
    lm, labels, distances = torch.zeros((), dtype=torch.float64), 0, []

    def last_state(ids: list[int]) -> Tensor:
        return bench.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]

    for row in rows:
        logits = bench.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        if predictors:
            logits = logits.index_fill(-1, torch.tensor(predictors), -1e30)
        target = torch.tensor(row["labels"][1:])
        lm = lm + F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        labels += int((target != -100).sum())
        goal = last_state(row["targets"][0])
        goal = goal.detach() if constant_target else goal
        distances.append(1 - F.cosine_similarity(last_state(row["contexts"][0] + list(predictors)), goal, dim=0))
    return lm / labels, torch.stack(distances).mean()


def gradient(bench: Bench) -> Tensor:
    return torch.cat([p.grad.flatten() for p in bench.model.parameters()])


@pytest.mark.parametrize(
    ("name", "k", "context_view", "constant_target", "with_jepa"),
    [
        ("sft", 0, "prefix", False, False),
        ("sft_packed", 0, "prefix", False, False),
        ("sft_trl", 0, "prefix", False, False),
        ("three_rows", 1, "prefix", False, True),
        ("three_rows_512", 1, "prefix", False, True),
        ("three_rows_message", 1, "message", False, True),
        ("two_rows", 1, "prefix", False, True),
        ("two_rows_message", 1, "message", False, True),
        ("ours", 1, "prefix", False, True),
        ("ours_packed", 1, "prefix", False, True),
        ("ours_k0", 0, "prefix", False, True),
        ("ours_message", 1, "message", False, True),
        ("ours_forward_only", 1, "prefix", True, True),
        ("ours_cached", 1, "prefix", True, True),
        ("ours_dropped", 1, "prefix", False, False),
    ],
)
def test_every_arm_computes_the_loss_and_gradient_of_sequences_alone(
    bench, name, k, context_view, constant_target, with_jepa
):
    """LM and cosine of unpadded sequences, one at a time. 1e-6: RMSNorm is float32 inside a float64 model."""
    rows = bench.messages if context_view == "message" else bench.rows
    bench.model.zero_grad()
    lm, cosine = terms(bench, rows, predictors=[bench.predictor_id][:k], constant_target=constant_target)
    expected = lm + cosine if with_jepa else lm
    expected.backward()
    wanted = gradient(bench)
    assert wanted.norm() > 0.1 and cosine > 0.05, "nothing to compare: this test would prove nothing"
    bench.model.zero_grad()
    loss = bench.arms[name].step(NUMBERS)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert (gradient(bench) - wanted).norm() / wanted.norm() < 2e-6


def test_the_jepa_term_weighs_in_both_views(bench):
    """The two context views are two objectives, and neither is plain SFT: an arm on the wrong one would be seen."""
    losses = {name: float(bench.arms[name].step(NUMBERS)) for name in ("ours", "ours_message", "ours_dropped")}
    assert len({round(loss, 4) for loss in losses.values()}) == 3


def test_tokens_by_hand(bench):
    """Of rows with LM, context c, target t, the latter with two tokens of the LM row's start (BOS, and what opens a
    header): SFT computes LM; three rows LM + c + 1 + t, padded to 9 rows of the longest; ours LM + 1 + (t - 2)."""
    lm, c, t = ([len(ids) for ids in ids_of] for ids_of in (
        [row["input_ids"] for row in bench.rows],
        [row["contexts"][0] for row in bench.rows],
        [row["targets"][0] for row in bench.rows],
    ))  # fmt: skip
    assert len(set(lm)) > 1, "no padding: this test would prove nothing"
    for row in bench.rows:
        assert row["targets"][0][:2] == row["input_ids"][:2] and row["targets"][0][2] != row["input_ids"][2]
    m = [len(row["contexts"][0]) for row in bench.messages]
    views = sum(c) + 3 + sum(t)
    ours = [a + b - 1 for a, b in zip(lm, t, strict=True)]
    message = [a + b - 2 for a, b in zip(ours, m, strict=True)]
    pair = max(max(lm), *(a + 1 + b for a, b in zip(c, t, strict=True)))
    wanted = {
        "sft": Tokens(sum(lm), 3 * max(lm)),
        "sft_trl": Tokens(sum(lm), 3 * max(lm)),
        "three_rows": Tokens(sum(lm) + views, 9 * max(lm)),
        "three_rows_512": Tokens(sum(lm) + views, 9 * 512),
        "two_rows": Tokens(sum(lm) + views, 6 * pair),
        "ours": Tokens(sum(ours), 3 * max(ours)),
        "ours_k0": Tokens(sum(ours) - 3, 3 * max(ours) - 3),
        "ours_message": Tokens(sum(message), 3 * max(message)),
        "ours_forward_only": Tokens(sum(lm) + 3 + sum(t), 3 * max(lm) + 3 + 3 * max(t)),
        "ours_cached": Tokens(sum(lm) + 3, 3 * max(lm) + 3),
        "ours_dropped": Tokens(sum(lm), 3 * max(lm)),
    }
    found = {name: bench.arms[name].tokens(NUMBERS) for name in wanted}
    assert found == wanted
    assert bench.arms["ours_packed"].tokens(NUMBERS).real == sum(ours)
    assert bench.arms["ours_packed"].tokens(NUMBERS).padded <= 3 * max(ours)


def test_two_rows_by_hand():
    """LM 5 6 7; context 5, predictor 9, target 8: the second row is [5 9][8], and the target sees itself alone."""
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "contexts": [[5]], "targets": [[8]]}
    rows = arms.two_rows([row], [9], 0)
    assert rows.inputs["input_ids"].tolist() == [[5, 6, 7], [5, 9, 8]]
    assert rows.inputs["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    sees = (rows.inputs["attention_mask"][:, 0] == 0).int().tolist()
    assert sees == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    assert rows.labels.tolist() == [[-100, 6, 7], [-100] * 3]
    assert (rows.context_at.tolist(), rows.target_at.tolist(), rows.real_tokens) == ([4], [5], 6)


def test_dropout_is_the_mean_step():
    """Kept 3 s, dropped 1 s: half of each is 2 s, a quarter kept 1.5 s. The peak is that of a kept step."""
    of = lambda seconds, peak: {"cpu_s": [seconds], "padded_tokens": [10 * seconds], "peak_memory": [peak]}  # noqa: E731
    mixed = measuring.add_dropout({"ours": of(3.0, 7), "ours_dropped": of(1.0, 5)})
    assert mixed["ours_dropout50"] == {"cpu_s": [2.0], "padded_tokens": [20.0], "peak_memory": [7]}
    assert mixed["ours_dropout75"] == {"cpu_s": [1.5], "padded_tokens": [15.0], "peak_memory": [7]}


def test_ratios_are_paired_within_repetitions():
    """4/2, 9/3, 2/2: median 2. The ratio of sums, 15/7, would let the slow repetition decide."""
    times = {"a": {"cpu_s": [4.0, 9.0, 2.0]}, "b": {"cpu_s": [2.0, 3.0, 2.0, 8.0]}}
    assert figures.paired(times, "a", "b", "cpu_s") == (2.0, 1.0, 3.0)


def test_verdicts(capsys):
    """1.06 x 1.3 = 1.378; memory may be 1.1 x 1.3 = 1.43; packed goes by its own ratio, 1.06 x 1.2 = 1.272."""
    ratios = {"ours_over_sft": 1.37, "ours_packed_over_packed_sft": 1.28, "ours_over_three_rows": 0.5}
    ratios |= {"token_ratio": 1.3, "token_ratio_packed": 1.2, "ours_memory_over_sft": 1.44}
    lines = [line.split()[1:] for line in figures.bounds_table(ratios).splitlines()]
    assert lines == [
        ["1.370", "<=", "1.378", "ok"],
        ["1.280", "<=", "1.272", "MISSED"],
        ["0.500", "<=", "0.500", "ok"],
        ["1.300"],
        ["1.200"],
        ["1.440", "<=", "1.430", "MISSED"],
    ]


def test_peak_memory_by_hand():
    """Two tensors of 4096 bytes, the first freed before a third of 8192 comes: 12288. Twice the same."""

    def step(numbers: Sequence[int]) -> Tensor:
        a, b = torch.zeros(1024), torch.zeros(1024)
        del a
        return b.sum() + torch.zeros(2048)[0]

    arm = Arm(step, lambda numbers: Tokens(0, 0))
    model = torch.nn.Linear(2, 2)
    model.device = torch.device("cpu")
    peaks = {measuring.peak_memory(arm, [0], model) for _ in range(3)}
    assert len(peaks) == 1 and 0 <= peaks.pop() - 12288 <= 512  # and scalars, in blocks of 64 bytes


def test_longer_rows_hold_every_request_and_answer(monkeypatch):
    rows = data.nl_rx.generate(12)
    longer = data._several_in_one_turn(rows)
    assert len(longer) == 3 and [turn["role"] for turn in longer[0]["messages"]] == ["system", "user", "assistant"]
    answer = longer[1]["messages"][2]["content"].split("\n")
    assert answer == [f"{n}. {row['messages'][2]['content']}" for n, row in enumerate(rows[2:10], 1)]


def test_toy_run_writes_every_figure(tmp_path, monkeypatch, capsys):
    """Both models and data sets at toy size, as the command line runs them."""
    monkeypatch.setattr(data, "SHAPES", {"body": TOY, "vocabulary": {**TOY, "vocab_size": 1024}})
    monkeypatch.setattr(data, "GENERATED_ROWS", 60)
    monkeypatch.setattr(data, "TOKENIZER_SIZE", 640)
    out, picture = tmp_path / "new" / "result.json", tmp_path / "new" / "result.png"
    argv = ["--quick", "--batch-size", "2", "--repetitions", "2", "--out", str(out), "--plot", str(picture)]
    assert command.main([*argv, "--data", "nl_rx", "longer"]) == 0
    said = capsys.readouterr().out
    assert "ours_over_sft" in said and ("ok" in said or "MISSED" in said) and "these are others" in said
    result = json.loads(out.read_text())
    assert set(result["summary"]) == FIGURES
    assert all(math.isfinite(figure) and figure > 0 for figure in result["summary"].values())
    assert result["summary_of"]["data"] == "nl_rx" and [cell["data"] for cell in result["cells"]] == ["nl_rx", "longer"]
    assert {"commit", "torch", "uncommitted_changes"} <= set(result["environment"])
    for cell in result["cells"]:
        assert len(cell["rows_sha256"]) == 64
        assert {name: len(arm["cpu_s"]) for name, arm in cell["arms"].items()} == {
            name: 1 if name in ("sft_trl", "ours_k0") else 2 for name in cell["arms"]
        }
        assert "three_rows_512" not in cell["arms"] and len(cell["arms"]["sft"]["peak_memory"]) == 1
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert str(tmp_path) not in out.read_text(), "a result file names a path of this machine"


def test_a_model_folder_is_measured_in_its_own_tokens_and_in_bfloat16(tmp_path, monkeypatch, capsys):
    """With autocast, the products of the weights are bfloat16, as in `train`. The file names no path."""
    monkeypatch.setattr(data, "GENERATED_ROWS", 60)
    monkeypatch.setattr(data, "TOKENIZER_SIZE", 640)
    rows = data.load_data("nl_rx", None, seed=0)
    folder, out = tmp_path / "some-model", tmp_path / "result.json"
    data.random_llama({**TOY, "vocab_size": len(rows.tokenizer)}, rows.tokenizer, seed=0).save_pretrained(folder)
    rows.tokenizer.save_pretrained(folder)
    seen = set()
    measure = measuring.over_matrix_products

    def watch(arm, numbers, model):
        handle = model.lm_head.register_forward_hook(lambda module, given, logits: seen.add(logits.dtype))
        try:
            return measure(arm, numbers, model)
        finally:
            handle.remove()

    monkeypatch.setattr(measuring, "over_matrix_products", watch)
    argv = ["--quick", "--batch-size", "2", "--repetitions", "2", "--model", str(folder), "--out", str(out)]
    assert command.main([*argv, "--dtype", "bfloat16"]) == 0 and seen == {torch.bfloat16}
    (cell,) = json.loads(out.read_text())["cells"]
    assert cell["model"] == "some-model" and cell["tokenizer_size"] == len(rows.tokenizer)
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--quick", "--repetitions", "2", "--model", "nowhere"], "nowhere"),
        (["--nl-rx", "nowhere"], "no folder at nowhere"),
        (["--repetitions", "0"], "--repetitions: '0' must be a whole number, 1 or more"),
        (["--repetitions", "2", "--memory-batches", "3"], "more than the 2 batches; lower it"),
        (["--quick", "--repetitions", "5000"], "need 20000 rows"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(data, "GENERATED_ROWS", 20)
    assert command.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("eval.step_cost: error:") and len(error.splitlines()) == 1
