"""Claims about streamed clips: the run on the same clips read at once, an exact resume, a wrong clip is named when its
step comes."""

from __future__ import annotations

import json
import shutil

import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset
from safetensors.torch import load_file

from llm_jepa.cli import main
from llm_jepa.core.errors import UserError
from llm_jepa.vl.data import read_clips
from llm_jepa.vl.loading import load_vl_model
from llm_jepa.vl.streaming import clips_of, stream_clips
from llm_jepa.vl.trainer import VLJEPATrainer
from tests.conftest import FLOAT32, assert_same_weights, expect_refusal
from tests.ranks import on_ranks
from tests.vl import runs
from tests.vl.test_commands import SGD, assert_equal, compare, data, history, recipe, train, weights, write  # noqa: F401

STREAM = {"streaming": True, "max_steps": 10, "save_steps": 4}
FEATURES = Features(
    {"image": Image(), "target": List(Value("string")), "query": Value("string"), "end_s": Value("float64")}
)


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory):  # noqa: F811
    """The 16 images of clips.jsonl: as two manifests beside the files, and as two Parquet files that hold the files."""
    rows = [json.loads(line) for line in (data / "clips.jsonl").read_text().splitlines()]
    cut = next(i for i, row in enumerate(rows) if row["image"] == "7.png")
    folder = tmp_path_factory.mktemp("shards")
    for number, part in enumerate((rows[:cut], rows[cut:])):
        write(data / f"shard-{number}.jsonl", part)
        table = [
            {
                "image": {"bytes": (data / row["image"]).read_bytes(), "path": None},
                "target": [row["target"]],
                "query": row["query"],
                "end_s": None,
            }
            for row in part
        ]
        Dataset.from_list(table, features=FEATURES).to_parquet(folder / f"shard-{number}.parquet")
    return {"manifests": str(data / "shard-*.jsonl"), "tables": str(folder / "*.parquet")}


# -- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"y_encoder_lr_factor": 0}, {"pairs_per_clip": 1, "objective": "cosine"}])
def test_a_stream_is_the_run_on_the_same_clips_in_the_same_order(options, shards, recipe, data, tmp_path, caplog):  # noqa: F811
    """10 steps of 4 over 16 clips, so two passes and a half: other pairs are drawn in each. Bit for bit."""
    options = {**STREAM, **options, "validation_data": str(data / "other.jsonl"), "eval_strategy": "steps"}
    everything = recipe("all", **{**options, "streaming": None}, train_sampling_strategy="sequential")
    assert main(["train", everything]) == 0
    for kind, files in shards.items():
        assert main(["train", recipe(kind, **options, train_data=files)]) == 0
        assert history(tmp_path / kind, "loss") == history(tmp_path / "all", "loss")
        assert history(tmp_path / kind, "eval_loss") == history(tmp_path / "all", "eval_loss")
        assert_equal(tmp_path / kind, tmp_path / "all")
        assert "ended after 16 rows. It began again (pass 2), at step 5 of 10" in caplog.text
        card = (tmp_path / kind / "README.md").read_text()
        assert "40 streamed (pass 3 over the source)" in card and "epochs" not in card
        assert "streamed: the rows have no hash; sha256 of names and sizes of the files" in card
    whole, again = history(tmp_path / "all", "loss")[:4], history(tmp_path / "all", "loss")[4:8]
    assert whole != again


def test_python_takes_a_stream_or_a_data_set_of_datasets(shards, tmp_path):
    """With pictures that `datasets` would decode, and those that it has decoded."""
    model, processor = runs.parts(num_frames=1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    lazy = load_dataset("parquet", data_files=shards["tables"], split="train", streaming=True)
    ends = []
    for source in (stream_clips(shards["manifests"]), stream_clips(shards["tables"]), lazy):
        model.load_state_dict(start)
        trainer = VLJEPATrainer(model, runs.arguments(tmp_path, max_steps=5), source, processor=processor)
        trainer.train()
        assert trainer.position[:3] == (1, 4, 20)
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    for end in ends[1:]:
        assert_same_weights(end, ends[0], bound=0)
    with pytest.raises(UserError, match="needs max_steps"):
        VLJEPATrainer(model, runs.arguments(tmp_path, max_steps=-1), lazy, processor=processor)


def test_rows_of_a_clip_that_follow_each_other_are_one_clip(shards, data):  # noqa: F811
    expected = read_clips(data / "clips.jsonl")
    for files in shards.values():
        first = stream_clips(files).first
        assert [clip.pairs for clip in first] == [clip.pairs for clip in expected]
    assert [clip.video for clip in stream_clips(shards["manifests"]).first] == [clip.video for clip in expected]


def test_two_ranks_are_one_process(shards, recipe, tmp_path):  # noqa: F811
    """A shuffled stream over its end, with accumulation on the ranks. Each film is read by one rank only."""
    options = {
        **SGD,
        **STREAM,
        "save_strategy": "no",
        "max_steps": 3,
        "shuffle_buffer": 5,
        "train_data": shards["tables"],
    }
    assert main(["train", recipe("one", **options, per_device_train_batch_size=8)]) == 0
    two = recipe("two", **options, per_device_train_batch_size=4)
    assert on_ranks(2, train, two) == [0, 0]
    compare(tmp_path / "one", tmp_path / "two")
    again = recipe("three", **{**options, "data_seed": 1}, per_device_train_batch_size=8)
    assert main(["train", again]) == 0
    assert history(tmp_path / "three", "loss") != pytest.approx(history(tmp_path / "one", "loss"), rel=FLOAT32)


@pytest.mark.parametrize("buffer", [0, 5])
def test_a_resumed_stream_is_the_uninterrupted_one(buffer, shards, recipe, tmp_path, capsys):  # noqa: F811
    """From step 4, the end of the first pass, and from step 8 in the second. Changed files are noticed."""
    path = recipe(**STREAM, train_data=shards["manifests"], shuffle_buffer=buffer)
    assert main(["train", path]) == 0
    whole = load_file(tmp_path / "run" / "model.safetensors")
    losses = history(tmp_path / "run", "loss")
    for step in (8, 4):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{10 if step == 8 else 8}")
        for one in (tmp_path / "run").iterdir():  # as if it had been killed
            if one.is_file() and one.name != "run.json":
                one.unlink()
        shutil.rmtree(tmp_path / "run" / "checkpoint-10", ignore_errors=True)
        assert main(["train", path, "--resume_from_checkpoint", "true"]) == 0
        assert_same_weights(weights(tmp_path / "run"), whole, bound=0)
        assert history(tmp_path / "run", "loss") == losses
    changed = recipe(**STREAM, train_data=shards["tables"], shuffle_buffer=buffer)
    expect_refusal(capsys, ["train", changed, "--resume_from_checkpoint", "true"], "train_data")


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": None}, ["needs max_steps"]),
        ({"num_train_epochs": 2.0}, ["num_train_epochs", "remove it"]),
        ({"feature_cache": "cache"}, ["feature_cache", "streaming: true does not know"]),
        ({"validation_rows": 3}, ["set validation_data"]),
        ({"save_strategy": "epoch"}, ["set save_strategy: steps"]),
        ({"streaming": None, "shuffle_buffer": 4}, ["shuffle_buffer: 4 would be ignored"]),
        ({"streaming": None, "train_split": "test"}, ["train_split: test would be ignored"]),
        ({"train_data": "nowhere-*.jsonl"}, ["No file matches nowhere-*.jsonl"]),
    ],
)
def test_what_does_not_go_with_a_stream_is_refused_before_torch_is_imported(
    changes,
    words,
    shards,
    recipe,  # noqa: F811
    capsys,
    monkeypatch,
):
    monkeypatch.setattr("llm_jepa.cli.build_recipe", lambda checked: pytest.fail("torch would be imported"))
    options = {**STREAM, "train_data": shards["manifests"], **changes}
    expect_refusal(capsys, ["train", recipe(**options)], *words)


def test_a_wrong_clip_is_named_when_it_is_reached(recipe, data, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Row 14, behind the clips that are looked at before training; the steps before it are saved."""
    monkeypatch.setattr("llm_jepa.vl.streaming.WINDOW", 4)
    shutil.copytree(data, tmp_path / "data")
    rows = [{"image": f"{i}.png", "target": f"text {i}"} for i in range(13)]
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    options = {
        **STREAM,
        "save_steps": 1,
        "dataloader_num_workers": 1,
        "train_data": str(tmp_path / "data" / "rows.jsonl"),
    }
    for number, (row, said) in enumerate([
        ({"image": "none.png", "target": "x"}, "names 'none.png'"),
        ({"image": "5.png"}, "needs a 'target'"),
        ({"image": "5.png", "target": "x", "lable": "y"}, "unknown keys lable"),
        ({"image": "broken.png", "target": "x"}, "broken.png"),
    ]):  # fmt: skip
        write(tmp_path / "data" / "rows.jsonl", [*rows, row])
        path = recipe(f"run-{number}", **options)
        expect_refusal(capsys, ["train", path], "rows.jsonl, line 14", said)
        assert (tmp_path / f"run-{number}" / "checkpoint-1").is_dir()
    write(tmp_path / "data" / "rows.jsonl", [*rows, {"video": "film.mp4", "target": "x"}])
    path = recipe("mixed", **options, num_frames=2)
    expect_refusal(capsys, ["train", path], "line 14 is a video among images", "separate stage")


def test_of_several_rows_of_a_clip_the_wrong_one_is_named(recipe, data, tmp_path, capsys):  # noqa: F811
    shutil.copy(data / "0.png", tmp_path)
    write(tmp_path / "rows.jsonl", [{"image": "0.png", "target": "a"}, {"image": "0.png", "target": 3}])
    path = recipe(**STREAM, train_data=str(tmp_path / "rows.jsonl"))
    expect_refusal(capsys, ["train", path], "rows.jsonl, line 2 needs a 'target'")


def test_a_table_without_the_files_and_an_empty_one(recipe, tmp_path, capsys, caplog):  # noqa: F811
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{"image": "0.png", "target": "x", "note": 1}]).to_parquet(path)
    expect_refusal(
        capsys, ["train", recipe(**STREAM, train_data=str(path))], "rows.parquet, row 0", "content of a file"
    )
    assert "Columns that are not read: note" in caplog.text
    (tmp_path / "rows.csv").write_text("image,target\n0.png,x\n")
    expect_refusal(
        capsys, ["train", recipe(**STREAM, train_data=str(tmp_path / "rows.csv"))], "rows.csv is no manifest", ".jsonl"
    )
    with pytest.raises(UserError, match="holds no rows"):
        _ = clips_of(IterableDataset.from_generator(lambda: iter(()))).first
    assert not (tmp_path / "run").exists()


def test_the_dry_run_of_a_stream_shows_its_first_clip(shards, recipe, capsys):  # noqa: F811
    assert main(["train", recipe(**STREAM, train_data=shards["tables"]), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "a stream of unknown length; of its first clips 16 to train on" in out and "pixel_values_videos" in out


def test_parts_of_random_weights_read_texts_of_the_first_clips_only(shards, recipe, monkeypatch):  # noqa: F811
    from llm_jepa.families import parse_recipe

    monkeypatch.setattr("llm_jepa.vl.streaming.WINDOW", 2)
    stream = stream_clips(shards["manifests"])
    model, _ = load_vl_model(parse_recipe(recipe(**STREAM, train_data=shards["manifests"])).model, stream, seed=0)
    assert len(stream.first) == 2 and model.config.get_text_config().vocab_size >= 257
