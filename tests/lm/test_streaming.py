"""Claims about streamed training rows: the same run as with rows that are all there, and an exact resume."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from safetensors.torch import load_file

from llm_jepa.cli import main
from llm_jepa.core.errors import UserError
from llm_jepa.core.row_files import RowLimits
from llm_jepa.core.sources import read_rows, stream_of, stream_rows
from llm_jepa.lm.data import prepare_rows
from llm_jepa.lm.trainer import LLMJEPATrainer
from tests.conftest import EXACT, LOGGED, assert_same_weights, config, expect_refusal, tiny_model
from tests.lm.test_commands import RECIPE
from tests.lm.test_ranks import log, recipe_file, train_and_count_wrapped_models
from tests.lm.test_trainer import history, make, weights
from tests.ranks import on_ranks


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def streaming_trainer(path, tokenizer, args, *, shuffle_buffer=0, model=None, eval_dataset=None):
    tokenizer = copy.deepcopy(tokenizer)
    stream = stream_rows(str(path), shuffle_buffer=shuffle_buffer)
    rows, held_out, preparation = prepare_rows(stream, eval_dataset, tokenizer, args)
    return LLMJEPATrainer(model or tiny_model(tokenizer), args, rows, held_out, tokenizer, preparation=preparation)


# -- the same run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"objective": "info_nce"}, {"objective": "stp", "max_length": 80}])
def test_a_stream_is_the_run_on_the_same_rows_in_the_same_order(options, rows, tokenizer, tmp_path):
    """Two passes and a half over 12 rows, some of them cut: losses and weights of the sequential run, bit for bit."""
    path, count = written(tmp_path / "rows.jsonl", rows[:12]), 15  # 15 steps of 2 rows
    options = {**options, "jepa_weight": 1.0, "max_steps": count, "per_device_train_batch_size": 2}
    args = config(tmp_path / "all", train_sampling_strategy="sequential", **options)
    there = make(read_rows(str(path)), tokenizer, args)
    start = weights(there)
    there.train()
    streamed = streaming_trainer(path, tokenizer, config(tmp_path / "streamed", **options))
    streamed.train()
    python = make(load_dataset("json", data_files=str(path), split="train", streaming=True), tokenizer,
                  config(tmp_path / "python", **options))  # fmt: skip
    python.train()
    assert max(float((value - start[name]).abs().max()) for name, value in weights(there).items()) > 1e-3
    for other in (streamed, python):
        assert history(other, "loss") == history(there, "loss")
        assert history(other, "num_tokens") == history(there, "num_tokens")
        for name, value in weights(there).items():
            assert torch.equal(value, weights(other)[name]), name
        assert other.position[:3] == (2, 6, 30)
    if "max_length" in options:
        assert there.row_counts["train"].cut > 0 and streamed.position.cut > 2 * there.row_counts["train"].cut


@pytest.mark.parametrize("batches", [(4, 1), (2, 2)])
def test_two_ranks_are_one_process(batches, rows, tmp_path):
    """A shuffled stream of which rows are left out, over its end: 4 steps of 8 of the rows that fit."""
    options = {
        "streaming": True, "shuffle_buffer": 5, "too_long": "drop", "max_length": 80, "max_steps": 4, "eval_steps": 4,
        "validation_rows": 0, "validation_data": str(tmp_path / "train.jsonl"), "objective": "cosine",
    }  # fmt: skip
    case = "a coin and a moving average"
    recipe, one = recipe_file(tmp_path, rows[:30], "one", case, per_device_train_batch_size=8, **options)
    assert main(["train", recipe]) == 0
    batch, accumulation = batches
    options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    recipe, two = recipe_file(tmp_path, rows[:30], "two", case, **options)
    assert on_ranks(2, train_and_count_wrapped_models, recipe) == [0, 0]
    assert json.loads((two / "run.json").read_text())["num_processes"] == 2
    assert_same_weights(load_file(two / "model.safetensors"), load_file(one / "model.safetensors"))
    for key, bound in {"loss": LOGGED, "num_tokens": 0, "grad_norm": EXACT}.items():
        ours, theirs = ([entry[key] for entry in log(folder) if key in entry] for folder in (one, two))
        assert ours and theirs == pytest.approx(ours, rel=bound, abs=0), key
    (line,) = (line for line in (one / "README.md").read_text().splitlines() if "train rows" in line)
    assert "32 streamed" in line and "left out" in line and "pass 2" in line
    assert line in (two / "README.md").read_text()


# -- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("buffer", [0, 7])
def test_resumed_run_is_the_uninterrupted_run(buffer, workers, rows, tokenizer, tmp_path):
    """AdamW, accumulation, rows that are left out, over the end of the stream: equal bit for bit from every save."""
    path = written(tmp_path / "rows.jsonl", rows[:20])

    def trainer():
        args = config(
            tmp_path / "run", max_steps=6, save_strategy="steps", save_steps=1, optim="adamw_torch", max_length=80,
            learning_rate=0.01, lr_scheduler_type="linear", gradient_accumulation_steps=2, too_long="drop",
            per_device_train_batch_size=3, jepa_weight=1.0, diagnostics_pairs=8, dataloader_num_workers=workers,
        )  # fmt: skip
        return streaming_trainer(path, tokenizer, args, shuffle_buffer=buffer, eval_dataset=Dataset.from_list(rows))

    whole = trainer()
    whole.train()
    assert whole.position.passes >= 2 and whole.position.left_out > 2, "proves nothing"
    for step in (1, 4, 5) if not workers else (4,):
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 6 and resumed.position == whole.position
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(resumed)[name]), (step, name)
        assert history(resumed, "loss") == history(whole, "loss")


def test_a_resumed_run_runs_no_views_again(rows, tokenizer, tmp_path, monkeypatch):
    """Steps 1 to 4 had 16 rows; of the last two steps and the batch that is read ahead there are 12."""
    from llm_jepa.lm import streaming

    path, asked = written(tmp_path / "rows.jsonl", rows), []
    views = streaming.views_or_length
    monkeypatch.setattr(
        streaming, "views_or_length", lambda row, index, **o: asked.append(index) or views(row, index, **o)
    )

    def trainer():
        args = config(tmp_path / "run", max_steps=6, save_strategy="steps", save_steps=4, per_device_train_batch_size=4)
        return streaming_trainer(path, tokenizer, args)

    trainer().train()
    assert asked == list(range(28))
    asked.clear()
    trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert asked == list(range(16, 28))


# -- files ----------------------------------------------------------------------------------------------------------


def test_streams_have_the_rows_of_read_rows(rows, tmp_path):
    """Shards in the order of their names, packed, CSV with other names of columns, tables with their types."""
    written(tmp_path / "b.jsonl", rows[4:9])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((json.dumps(rows[:4]) + "\n").encode()))
    written(tmp_path / "c.jsonl", rows[9:12])
    source = str(tmp_path / "*.jsonl*")
    stream = stream_rows(source)
    assert [row for _, row in stream.rows(0)] == list(read_rows(source)) == rows[:12]
    assert [place for place, _ in stream.rows(1)][4] == f"{tmp_path / 'b.jsonl'}, line 1"
    assert list(stream.first(5)) == rows[:5]

    mixed = [{"prompt": "a", "completion": "b", "views": ["c"], "extra": 1}, {"prompt": "d", "completion": "e"}]
    there = read_rows(
        str(written(tmp_path / "mixed.jsonl", [*mixed, {"prompt": "f", "completion": "g", "extra": "5"}]))
    )
    for suffix, write in ((".parquet", there.to_parquet), (".csv", Dataset.from_list(mixed[1:]).to_csv)):
        write(str(tmp_path / f"table{suffix}"))
        source = str(tmp_path / f"table{suffix}")
        assert [row for _, row in stream_rows(source).rows(0)] == list(read_rows(source)), suffix
    (tmp_path / "qa.csv").write_text("question,answer,prompt\nwhy,because,no\n")
    columns = {"prompt": "question", "completion": "answer"}
    stream = stream_rows(str(tmp_path / "qa.csv"), columns=columns)
    assert [row for _, row in stream.rows(0)] == [{"prompt": "why", "completion": "because"}]
    with pytest.raises(UserError, match="has no column 'reply'"):
        replace(stream, columns={"completion": "reply"}).first(10)


def test_limits_of_a_row_hold_in_a_stream(tmp_path):
    rows = [{"prompt": "a", "completion": "b" * size} for size in (10, 3000)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    written(tmp_path / "rows.jsonl", rows)
    for name, place in (("rows.jsonl", "line 2"), ("rows.parquet", "row 1")):
        # One row is no limit: max_rows is for data that are read whole.
        stream = stream_rows(str(tmp_path / name), limits=RowLimits(max_rows=1, max_row_bytes=2000))
        with pytest.raises(UserError, match=f"{name}, {place} has .* the limit is max_row_bytes: 2000"):
            list(stream.rows(0))


# -- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, rows):
    """A function that writes a recipe with two shards (None removes a key), and returns its path."""
    written(tmp_path / "data-0.jsonl", rows[:10])
    written(tmp_path / "data-1.jsonl", rows[10:24])
    values = {**RECIPE, "train_data": str(tmp_path / "data-*.jsonl"), "output_dir": str(tmp_path / "run")}
    values |= {"streaming": True, "shuffle_buffer": 6, "seed": 1}

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**values, **changes}.items() if v is not None}))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": None}, ["needs max_steps"]),
        ({"num_train_epochs": 3.0}, ["num_train_epochs", "remove it"]),
        ({"save_strategy": "epoch"}, ["save_strategy: epoch", "set save_strategy: steps"]),
        ({"validation_rows": 4}, ["set validation_data"]),
        ({"train_sampling_strategy": "group_by_length"}, ["group_by_length needs all rows"]),
        ({"dataloader_num_workers": 2}, ["dataloader_num_workers: 2", "set 1 or 0"]),
        ({"shuffle_dataset": True}, ["set shuffle_buffer"]),
        ({"target_encoder": "base"}, ["target_encoder: base", "choose stop_gradient or ema"]),
        ({"max_rows": 10}, ["max_rows: 10 would be ignored"]),
        ({"streaming": None}, ["shuffle_buffer: 6 would be ignored"]),
        ({"shuffle_buffer": -1}, ["shuffle_buffer=-1 must be 0 or more"]),
    ],
)
def test_what_does_not_go_with_a_stream_is_refused_before_torch_is_imported(
    changes, words, recipe, capsys, monkeypatch
):
    monkeypatch.setattr("llm_jepa.cli.build_recipe", lambda checked: pytest.fail("torch would be imported"))
    expect_refusal(capsys, ["train", recipe(**changes)], *words)


def test_a_streamed_run_resumes_and_says_what_it_read(recipe, tmp_path, caplog):
    """24 rows, 8 steps of 4: the second pass begins at step 7. The card has no hash of rows."""
    assert main(["train", recipe(max_steps=8)]) == 0
    assert "those of its first 24 rows" in caplog.text
    assert "ended after 24 rows. It began again (pass 2), at step 7 of 8" in caplog.text
    assert "Rows of the training stream: 32 streamed (pass 2 over the source)" in caplog.text
    card = (tmp_path / "run" / "README.md").read_text()
    assert "32 streamed (pass 2 over the source)" in card and "epochs" not in card
    assert "streamed: the rows have no hash; sha256 of names and sizes of the files" in card
    whole = load_file(tmp_path / "run" / "model.safetensors")
    for path in (tmp_path / "run").iterdir():  # as if it had been killed in step 7
        if path.is_file() and path.name != "run.json":
            path.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    assert main(["train", recipe(max_steps=8), "--resume_from_checkpoint", "true"]) == 0
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert "32 streamed" in (tmp_path / "run" / "README.md").read_text()


def test_changed_files_and_another_shuffle_are_noticed_at_a_resume(recipe, tmp_path, capsys):
    assert main(["train", recipe()]) == 0
    resume = ["--resume_from_checkpoint", "true"]
    expect_refusal(capsys, ["train", recipe(shuffle_buffer=5), *resume], "shuffle_buffer: 6 -> 5")
    with (tmp_path / "data-1.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    expect_refusal(capsys, ["train", recipe(), *resume], "the run has changed", "train_data")


def test_a_wrong_row_is_named_when_its_step_comes(recipe, rows, tmp_path, capsys, monkeypatch):
    """Row 14 of the second shard, behind the first rows that are looked at before training; step 4 is saved."""
    monkeypatch.setattr("llm_jepa.lm.data.WINDOW", 8)
    monkeypatch.setattr("llm_jepa.lm.loading.TOKENIZER_ROWS", 20)
    written(tmp_path / "data-1.jsonl", [*rows[10:23], {"prompt": "no answer"}])
    path = recipe(max_steps=20, shuffle_buffer=0)
    expect_refusal(capsys, ["train", path], f"{tmp_path / 'data-1.jsonl'}, line 14: found the columns ['prompt']")
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    written(tmp_path / "data-1.jsonl", [*rows[10:23], {"prompt": "why " * 200, "completion": "because"}])
    expect_refusal(
        capsys, ["train", recipe(max_steps=20, shuffle_buffer=0, max_length=100, output_dir=str(tmp_path / "long"))],
        "data-1.jsonl, line 14: the prompt fills max_length=100", "too_long: drop",
    )  # fmt: skip
    assert (tmp_path / "long" / "checkpoint-4").is_dir()


def test_a_stream_that_gives_nothing_is_refused_at_once(recipe, tmp_path, capsys):
    expect_refusal(capsys, ["train", recipe(max_length=2, too_long="drop")], "too_long: drop leaves no train row")
    (tmp_path / "data-0.jsonl").write_text("")
    expect_refusal(capsys, ["train", recipe()], "data-0.jsonl is empty")
    assert not (tmp_path / "run").exists()


def test_the_same_target_in_all_first_rows_is_refused(recipe, rows, tmp_path, capsys):
    same = [{"prompt": f"{index} is", "completion": "yes"} for index in range(10)]
    written(tmp_path / "data-0.jsonl", same)
    written(tmp_path / "data-1.jsonl", same)
    expect_refusal(capsys, ["train", recipe()], "objective: info_nce needs different targets")


def test_the_dry_run_of_a_stream_shows_its_first_row(recipe, capsys):
    assert main(["train", recipe(), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "train: a stream of unknown length; of its first rows 24" in out
    assert "4 steps of 4 rows (batches of 4); a stream has no known number of rows and epochs" in out
    assert "tokens per example" in out and "tokens an epoch" not in out and "at the peak" in out


def test_a_stream_of_validation_rows_is_refused(dataset, tokenizer, tmp_path):
    with pytest.raises(UserError, match="only training data are streamed"):
        make(dataset, tokenizer, config(tmp_path), dataset.to_iterable_dataset())
    with pytest.raises(UserError, match="needs max_steps"):
        make(dataset.to_iterable_dataset(), tokenizer, config(tmp_path, max_steps=-1))
    with pytest.raises(UserError, match="target_encoder: base"):
        make(dataset.to_iterable_dataset(), tokenizer, config(tmp_path, target_encoder="base"))


def test_a_hub_data_set_is_streamed_and_known_by_its_commit(rows, monkeypatch):
    """A double of the Hub: `datasets` resolves file names to ones that hold the commit."""
    commits = iter(["1a", "1a", "2b"])

    def builder(*source):
        files = {"train": [f"hf://datasets/anna/rows@{next(commits)}/train.jsonl"]}
        return SimpleNamespace(config=SimpleNamespace(data_files=files))

    def load(source, config, *, split, revision, streaming):
        assert (source, split, streaming) == ("anna/rows", "train", True)
        if config == "gone":
            raise ConnectionError("no network")
        return Dataset.from_list(rows[:3]).to_iterable_dataset()

    monkeypatch.setattr("llm_jepa.core.sources._builder", builder)
    monkeypatch.setattr("llm_jepa.core.sources.load_dataset", load)
    first, same, gone = stream_rows("anna/rows"), stream_rows("anna/rows"), stream_rows("anna/rows", config="gone")
    assert first.files_sha256 == same.files_sha256 != gone.files_sha256
    assert list(first.rows(0)) == list(first.rows(1)) == [(f"anna/rows, row {i}", rows[i]) for i in range(3)]
    with pytest.raises(UserError, match=r"Cannot read the data set 'anna/rows' \(split train\): no network"):
        list(gone.rows(0))


def test_an_iterable_data_set_that_is_shuffled_has_another_order_in_each_pass(rows):
    stream = stream_of(Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=3, buffer_size=20))
    passes = [[row for _, row in stream.rows(number)] for number in (0, 1, 0)]
    assert passes[0] != rows and passes[0] != passes[1] and passes[0] == passes[2]
    assert all(row in passes[1] for row in rows) and len(passes[1]) == len(rows)
