"""Claims about VL-JEPA recipes and the command line: the main job works end to end, two ranks are one process, a
mistake is one line and exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel

from llm_jepa.cli import main
from llm_jepa.core.checks import SPEED, check_best_metric
from llm_jepa.core.diagnostics import SPACE_FIGURES
from llm_jepa.families import parse_recipe
from llm_jepa.vl.arguments import VLJEPATrainingArguments
from llm_jepa.vl.commands import build_trainer
from llm_jepa.vl.data import read_clips
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.keys import VLJEPAKeys, VLModelArguments
from llm_jepa.vl.modeling import VLJEPAModel
from llm_jepa.vl.y_decoder import PrefixDecoder, YDecoder
from tests.conftest import FLOAT32, assert_same_weights, expect_refusal
from tests.ranks import on_ranks

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.2}
VIT = {"model_type": "vit", **SMALL, "image_size": 16, "patch_size": 8, "num_hidden_layers": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RECIPE = {
    "family": "vl",
    "x_encoder": VIT,
    "predictor": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "num_hidden_layers": 2},
    "y_encoder": {"model_type": "bert", **SMALL, **NO_DROPOUT, "num_hidden_layers": 1},
    "frame_size": 16,
    "num_frames": 1,
    "shared_dim": 8,
    "num_predictor_layers": 1,
    "tokenizer_vocab_size": 290,
    "use_cpu": True,
    "learning_rate": 0.01,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "pairs_per_clip": 3,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "diagnostics_pairs": 8,
}
# Steps that are gradients, large enough to tell.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "save_strategy": "no", "max_steps": 3}
TEXTS = ("a red square", "it moves left", "blue", "two circles that meet and part", "yes")
QUERIES = (None, "what colour is it?", "where does it go?")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 images, image i with 1 + i % 3 pairs whose texts recur; clips.jsonl, other.jsonl, films.jsonl of 6 spans."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    rows = []
    for i in range(16):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows += [
            {"image": f"{i}.png", "target": TEXTS[(2 * i + j * (1 + i % 2)) % 5], "query": QUERIES[(i + j) % 3]}
            for j in range(1 + i % 3)
        ]
    write(folder / "clips.jsonl", rows)
    write(folder / "other.jsonl", rows[:9])
    write(folder / "silent.jsonl", [{key: row[key] for key in ("image", "target")} for row in rows])
    with av.open(str(folder / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 16
        for i in range(48):
            frame = np.full((16, 16, 3), 5 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    spans = [{"video": "film.mp4", "target": TEXTS[i % 5], "start_s": i, "end_s": i + 1} for i in range(6)]
    write(folder / "films.jsonl", spans)
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def recipe(tmp_path, data):
    """A function that writes a recipe (RECIPE with changes; None removes a key) and returns its path."""

    def write_recipe(name: str = "run", **changes) -> str:
        values = {**RECIPE, "train_data": str(data / "clips.jsonl"), "output_dir": str(tmp_path / name), **changes}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    """One model trained by the command line, for the tests that only read it."""
    folder = tmp_path_factory.mktemp("trained")
    values = {**RECIPE, "train_data": str(data / "clips.jsonl"), "output_dir": str(folder / "run")}
    values |= {"validation_rows": 6, "eval_strategy": "steps", "eval_steps": 2, "x_encoder_trainable_layers": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**values, "lr_scheduler_type": "cosine"}))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(a: Path, b: Path) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def history(folder: Path, key: str) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


# -- the main job -----------------------------------------------------------------------------------------------------


def test_a_trained_model_is_whole_safe_and_in_use(trained, data):
    """Loaded from disk, it ranks labels by the very weights that were saved. Only torch's own states are pickles."""
    assert {"config.json", "model.safetensors", "README.md", "run.json", "trainer_state.json"} <= {
        path.name for path in trained.iterdir()
    }
    assert list(trained.rglob("tokenizer.json")) and list(trained.glob("*processor_config.json"))
    pickles = {path.name for path in trained.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")}
    assert pickles <= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.parent.name for path in trained.rglob("optimizer.pt")} == {"checkpoint-2", "checkpoint-4"}

    used = VLJEPA.from_pretrained(trained, device="cpu")
    ranked = used.classify(str(data / "3.png"), list(TEXTS))
    assert sorted(match.text for match in ranked) == sorted(TEXTS)
    assert [match.score for match in ranked] == sorted((match.score for match in ranked), reverse=True)
    saved, loaded = weights(trained), AutoModel.from_pretrained(trained).state_dict()
    # Names may differ: transformers writes those of its version 4.
    assert sorted(value.sum().item() for value in saved.values()) == sorted(v.sum().item() for v in loaded.values())
    assert used.model.config.num_frames == 1 and used.model.config.predictor_config.num_hidden_layers == 1


def test_the_card_says_what_was_trained_and_measured(trained):
    card = (trained / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "llm-jepa", "transformers alone does not know the classes"
    assert 'pip install "llm-jepa[vl]"' in card
    assert head["pipeline_tag"] == "video-text-to-text" and {"vl-jepa", "jepa"} <= set(head["tags"])
    assert "| x_encoder (vit) | random weights |" in card and "| x_encoder_trainable_layers | 1 |" in card
    assert "| pairs_per_clip | 3 |" in card and "| lr_scheduler_type | cosine |" in card
    assert "Last evaluation on the validation clips (step 4)" in card and "| recall_at_1 | " in card
    loss = history(trained, "eval_loss")[-1]
    assert f"| loss |  | {loss:.4g} |" in card
    assert str(trained.parent) not in card, "a path of this machine"


AUTO = {
    "AutoConfig": ("AutoConfig.from_pretrained(sys.argv[1])", "VLJEPAConfig"),
    "AutoModel": ("AutoModel.from_pretrained(sys.argv[1])", "VLJEPAModel"),
    "AutoProcessor": ("AutoProcessor.from_pretrained(sys.argv[1])", "VLJEPAProcessor"),
    "pipeline": ("pipeline('vl-jepa', model=sys.argv[1])", "VLJEPAPipeline"),
}


@pytest.mark.parametrize(
    ("ours_comes", "word"),
    [*(("first", word) for word in AUTO), ("last", "AutoModel")],  # an interpreter takes seconds
)
def test_importing_the_package_is_enough_for_the_auto_classes(ours_comes, word, trained):
    """Each in an interpreter of its own, as the first thing that is asked of transformers."""
    imports = ["import llm_jepa", f"from transformers import {word}"]
    call, kind = AUTO[word]
    code = ["import sys", *(imports if ours_comes == "first" else imports[::-1]), f"print(type({call}).__name__)"]
    done = subprocess.run([sys.executable, "-c", "; ".join(code), str(trained)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, kind), done.stderr[-1000:]


@pytest.mark.parametrize(
    "argv", [["generate", "--prompt", "x"], ["embed", "--input", "x.jsonl", "--output", "o.safetensors"]]
)
def test_commands_of_language_models_say_what_a_vl_jepa_is(argv, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    expect_refusal(capsys, [argv[0], str(trained), *argv[1:]], "is a VL-JEPA, not a causal LM: caption a video with")


def test_without_pillow_transformers_is_still_importable():
    """The extra `vl` may be missing where the package is used for language models."""
    code = "import sys; sys.modules['PIL'] = None; import llm_jepa.vl; from transformers import AutoProcessor, pipeline"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_evaluations_begin_at_step_zero(trained):
    state = json.loads((trained / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_recall_at_1" in entry] == [0, 2, 4]
    assert len(history(trained, "loss")) == 4 and history(trained, "temperature")[-1] != 0.07


def test_dry_run_shows_clips_and_weights_and_writes_nothing(recipe, data, tmp_path, capsys):
    path = recipe(validation_rows=5, pairs_per_clip=1)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", path, "--dry-run", "--learning_rate", "0.25", "--x_encoder_trainable_layers=1"]) == 0
    out = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "learning_rate: 0.25" in out and "11 to train on, 5 for validation" in out
    assert "pixel_values_videos [2, 1, 3, 16, 16]" in out and "target_key [2]" in out
    train = [clip for clip in read_clips(data / "clips.jsonl")]
    assert any(f"  {pair.query!r} -> {pair.target!r}" in out for clip in train for pair in clip.pairs)
    trained = {name: int(count) for name, count in re.findall(r"  (\w+) +\d+  trained +(\d+)", out)}
    totals = {name: int(count) for name, count in re.findall(r"  (\w+) +(\d+)  trained", out)}
    assert 0 < trained["x_encoder"] < totals["x_encoder"] and trained["y_encoder"] == totals["y_encoder"] > 0


def test_help_names_the_keys_of_both(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for name in [
        *VLModelArguments.__annotations__,
        *VLJEPAKeys.__annotations__,
        *VLJEPATrainingArguments.__annotations__,
        "jepa_weight",
    ]:
        assert f"  {name} (" in out, name


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_run(recipe, tmp_path):
    """Blocks of the x_encoder are trained: transformers writes those of a ViT under other names than they have."""
    options = {"x_encoder_trainable_layers": 1, "gradient_accumulation_steps": 2, "pairs_per_clip": 1}
    assert main(["train", recipe("whole", **options)]) == 0
    path = recipe("cut", **options)
    assert main(["train", path]) == 0
    # As a kill during the second save would leave it: the newest checkpoint is torn, the one before is whole.
    torn = tmp_path / "cut" / "checkpoint-4" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    (tmp_path / "cut" / "model.safetensors").unlink()
    assert main(["train", path, "--resume_from_checkpoint", "true"]) == 0
    assert_equal(tmp_path / "whole", tmp_path / "cut")
    assert history(tmp_path / "whole", "loss") == history(tmp_path / "cut", "loss")


def test_resuming_a_finished_run_takes_no_step(recipe, tmp_path, capsys):
    path, file = recipe(x_encoder_trainable_layers=1), tmp_path / "run" / "model.safetensors"
    assert main(["train", path]) == 0
    before = file.read_bytes()
    assert main(["train", path, "--resume_from_checkpoint", "true"]) == 0
    assert "already finished (4 steps)" in capsys.readouterr().out and file.read_bytes() == before
    file.unlink()  # killed before the final save: it is made from the checkpoint
    assert main(["train", path, "--resume_from_checkpoint", "true"]) == 0
    assert file.read_bytes() == before


def test_the_best_weights_are_those_of_the_best_step(recipe, tmp_path, capsys):
    """A learning rate that helps and then harms, so that the last step is not the best."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    path = recipe(
        validation_rows=6, eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=6, optim="sgd",
        learning_rate=50.0, max_grad_norm=0.0, objective="cosine", x_encoder_trainable_layers=1, **best,
    )  # fmt: skip
    assert main(["train", path]) == 0
    out = tmp_path / "run"
    step = json.loads((out / "trainer_state.json").read_text())["best_global_step"]
    assert step < 6, "the last step is the best: this would prove nothing"
    assert_equal(out, out / f"checkpoint-{step}")
    assert (
        f"saved weights (step {step})" in capsys.readouterr().out
        and f"(step {step})" in (out / "README.md").read_text()
    )


def test_a_best_metric_that_no_evaluation_gives(recipe, tmp_path, capsys):
    path = recipe(validation_rows=6, eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_lm_loss")
    expect_refusal(capsys, ["train", path], "no evaluation of this run gives 'eval_lm_loss'; did you mean 'eval_loss'?")
    expect_refusal(capsys, ["train", path, "--dry-run"], "did you mean 'eval_loss'?")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{}, {"diagnostics_pairs": 0}])
def test_the_figures_that_may_choose_the_weights_are_those_of_an_evaluation(recipe, options):
    trainer, _ = build_trainer(parse_recipe(recipe(validation_rows=8, **options)))
    given = {name.removeprefix("eval_") for name in trainer.evaluate() if name.startswith("eval_")}
    space = SPACE_FIGURES if trainer.args.diagnostics_pairs else ()
    data_decides = {"linear_r2", "model_preparation_time"}
    assert given - data_decides == {*trainer.figure_names(trainer.args), *space, *SPEED} - data_decides
    for name in given - data_decides:
        trainer.args.metric_for_best_model = name
        check_best_metric(trainer.args, trainer.figure_names(trainer.args))


def test_a_run_goes_on_only_with_its_own_data(recipe, data, tmp_path, capsys):
    """The same clips in another folder are the same; another pixel, or another text, is not."""
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    path = recipe(max_steps=2)
    assert main(["train", path]) == 0
    resume = ["--resume_from_checkpoint", "true"]
    assert main(["train", path, "--train_data", str(moved / "clips.jsonl"), *resume]) == 0
    (moved / "3.png").write_bytes((data / "4.png").read_bytes())
    expect_refusal(capsys, ["train", path, "--train_data", str(moved / "clips.jsonl"), *resume], "train_data")
    expect_refusal(capsys, ["train", path, *resume, "--objective", "cosine"], "objective")
    expect_refusal(capsys, ["train", path], "holds a run already")


# -- going on, and features -------------------------------------------------------------------------------------------


def test_a_trained_model_can_be_trained_further(trained, recipe, data, tmp_path, capsys):
    """It starts with the weights, the processor and the scores it was left with."""
    new = {key: None for key in VLModelArguments.__annotations__}
    options = {"validation_rows": 6, "eval_strategy": "steps", "eval_steps": 4, **new, "vl_model": str(trained)}
    assert main(["train", recipe(**options)]) == 0
    first, second = (
        [
            {key: value for key, value in entry.items() if "recall" in key or "cosine" in key or "rank" in key}
            for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
            if "eval_recall_at_1" in entry
        ]
        for folder in (trained, tmp_path / "run")
    )
    assert second[0] == pytest.approx(first[-1], rel=1e-4, abs=1e-6) and second[1] != second[0]
    assert VLJEPA.from_pretrained(tmp_path / "run", device="cpu").classify(str(data / "0.png"), ["a", "b"])
    expect_refusal(
        capsys, ["train", recipe("bad", **{**options, "shared_dim": 4})], "shared_dim belongs to a new model"
    )
    expect_refusal(capsys, ["train", recipe("bad", **{**options, "vl_model": str(data)})], "no config.json")


def test_train_decoder_adds_a_decoder_that_captions_and_refuses_what_cannot_work(trained, data, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "model")
    texts = ["--texts", str(data / "clips.jsonl")]
    argv = ["train-decoder", str(folder), *texts]
    expect_refusal(capsys, [*argv, "--hidden_size", "200"], "--hidden_size 200 does not divide into 3 heads")
    expect_refusal(capsys, [*argv, "--memory_only", "--no_memory"], "leaves no y_decoder")
    expect_refusal(capsys, ["train-decoder", str(tmp_path / "none"), *texts], "No model folder")
    assert not (folder / "y_decoder").exists()
    assert main([*argv, "--steps", "2", "--hidden_size", "64", "--layers", "1", "--vocab_size", "300"]) == 0
    assert VLJEPA.from_pretrained(folder).caption(str(data / "0.png"), images=True).text is not None
    decoder = YDecoder.from_pretrained(folder)
    assert set(decoder.memory.texts) == {
        pair.target for clip in read_clips(data / "clips.jsonl") for pair in clip.pairs
    }
    assert decoder.decoder is not None
    expect_refusal(capsys, argv, "exists; move it away")


@pytest.mark.parametrize(("number", "code", "step"), [(signal.SIGTERM, 75, 3), (signal.SIGINT, 130, 8)])
def test_a_stopped_train_decoder_goes_on_bit_for_bit(number, code, step, trained, data, tmp_path, capsys):
    """Also if the signal comes in the last of its 8 steps."""
    folder = shutil.copytree(trained, tmp_path / "model")
    words = ["train-decoder", str(folder), "--texts", str(data / "clips.jsonl"), "--no_memory", "--hidden_size", "64"]
    words += ["--layers", "1", "--vocab_size", "300", "--batch_size", "2", "--steps", "8"]
    assert main(words) == 0
    (folder / "y_decoder").rename(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        prefix_of, calls = PrefixDecoder.prefix_of, []

        def stopping(self, embeddings):
            calls.append(1)
            if len(calls) == step:
                signal.raise_signal(number)
            return prefix_of(self, embeddings)

        patch.setattr(PrefixDecoder, "prefix_of", stopping)
        assert main(words) == code
        signal.signal(signal.SIGINT, before)
    said = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    unfinished = folder / "y_decoder.unfinished"
    saved = f"Saved last: {unfinished / f'checkpoint-{step}'}. The same command continues."
    assert f"llm-jepa: {said}. {saved}" in capsys.readouterr().err.splitlines()
    assert not (folder / "y_decoder").exists() and len(calls) == step
    expect_refusal(capsys, [*words, "--seed", "1"], "holds the unfinished training of another decoder")
    assert main([*words[:4], "--memory_only"]) == 0 and unfinished.exists(), "which is none of its own"
    shutil.rmtree(folder / "y_decoder")
    capsys.readouterr()
    assert main(words) == 0
    assert f"Continuing at {unfinished / f'checkpoint-{step}'}." in capsys.readouterr().out
    assert not unfinished.exists()
    assert_equal(folder / "y_decoder", tmp_path / "whole")


def test_a_stopped_caching_of_features_goes_on_at_its_shard(recipe, tmp_path, monkeypatch, capsys):
    """16 clips in shards of 4, which are encoded in batches of 2: the signal comes in the second shard."""
    monkeypatch.setattr("llm_jepa.vl.features.SHARD", 4)
    options = {"feature_cache": str(tmp_path / "cache"), "per_device_eval_batch_size": 2, "max_steps": 1}
    encode, encoded = VLJEPAModel.encode_frames, []

    def stopping(self, pixels):
        encoded.append(len(pixels))
        if len(encoded) == 4 and sum(encoded) == 8:
            signal.raise_signal(signal.SIGTERM)
        return encode(self, pixels)

    monkeypatch.setattr(VLJEPAModel, "encode_frames", stopping)
    assert main(["train", recipe(**options)]) == 75
    said = f"Nothing is saved yet (but the features in {tmp_path / 'cache'}); start again: llm-jepa train"
    assert f"llm-jepa: stopped by SIGTERM. {said}" in capsys.readouterr().err
    encoded.append(100)  # no more signals
    count = len(encoded)
    assert main(["train", recipe(**options)]) == 0
    assert sum(encoded[count:]) == 12, "the first shard is there"
    monkeypatch.undo()
    assert main(["train", recipe("whole", **{**options, "feature_cache": str(tmp_path / "other")})]) == 0
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_videos_by_span_with_cached_features(recipe, data, tmp_path):
    """V-JEPA 2 on an mp4: the first run fills the cache, the second only reads it, and they are the same run."""
    vjepa2 = {"model_type": "vjepa2", "hidden_size": 16, "crop_size": 16, "patch_size": 8, "mlp_ratio": 2,
              "num_hidden_layers": 1, "num_attention_heads": 2, "pred_hidden_size": 8, "pred_num_hidden_layers": 1,
              "pred_num_attention_heads": 2}  # fmt: skip
    cache = tmp_path / "cache"
    options = {"x_encoder": vjepa2, "num_frames": 4, "train_data": str(data / "films.jsonl"), "max_steps": 2}
    assert main(["train", recipe("a", **options, feature_cache=str(cache))]) == 0
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert len(list(cache.rglob("*.safetensors"))) == 1
    assert main(["train", recipe("b", **options, feature_cache=str(cache))]) == 0
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == files
    assert_equal(tmp_path / "a", tmp_path / "b")
    assert main(["train", recipe("c", **options)]) == 0
    assert history(tmp_path / "c", "loss") == pytest.approx(history(tmp_path / "a", "loss"), rel=1e-2)


@pytest.mark.parametrize("size", [16, 32])
def test_frame_size_is_what_an_x_encoder_of_random_weights_sees(size, recipe, capsys):
    """Its grid of tokens as well, which token_merge needs. A convolutional net halves 5 times here."""
    conv = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    for x_encoder in ({key: value for key, value in VIT.items() if key != "image_size"}, conv):
        path = recipe(x_encoder=x_encoder, frame_size=size, token_merge=[1, 2, 2], max_steps=1, save_strategy="no")
        assert main(["train", path, "--dry-run"]) == 0
        assert f"pixel_values_videos [2, 1, 3, {size}, {size}]" in capsys.readouterr().out
    assert main(["train", path]) == 0


# -- ranks ------------------------------------------------------------------------------------------------------------


def compare(one: Path, two: Path) -> None:
    assert_same_weights(weights(two), weights(one), bound=FLOAT32)
    assert history(two, "loss") == pytest.approx(history(one, "loss"), rel=FLOAT32)


def test_on_two_ranks_it_is_the_run_of_one_process(recipe, tmp_path, capsys):
    """Frozen x_encoder, slow y_encoder, a temperature that is learnt; texts recur across ranks."""
    assert main(["train", recipe("one", **SGD, per_device_train_batch_size=8)]) == 0
    assert on_ranks(2, train, recipe("two", **SGD)) == [0, 0]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["num_processes"] == 2
    compare(tmp_path / "one", tmp_path / "two")
    assert main(["train", recipe("zero", **{**SGD, "learning_rate": 0.0})]) == 0
    start, end = weights(tmp_path / "zero"), weights(tmp_path / "two")
    assert {"log_temperature", "vision_projection.weight"} <= {key for key in start if not start[key].equal(end[key])}
    assert history(tmp_path / "two", "temperature") == pytest.approx(
        history(tmp_path / "one", "temperature"), rel=FLOAT32
    )


def train(rank: int, recipe: str) -> int:
    return main(["train", recipe])


def test_other_trainings_on_two_ranks_are_those_of_one_process(recipe, data, tmp_path):
    """all: the whole x_encoder, with accumulation. frozen: a y_encoder read once, cached features, and an evaluation of
    5 clips in batches of 2, which one rank fills up with a clip of the other. mixed: one rank has a query, the other
    none. silent: no query at all, with activation checkpointing."""
    cases = {
        "all": {"x_encoder_trainable_layers": -1, "objective": "cosine", "regularizer": "vicreg", "max_steps": 2},
        "sigreg": {"regularizer": "sigreg", "regularizer_weight": 0.5, "learn_temperature": False, "max_steps": 1},
        "frozen": {"y_encoder_lr_factor": 0, "feature_cache": str(tmp_path / "cache"), "objective": "cosine",
                   "validation_data": str(data / "other.jsonl"), "eval_strategy": "steps", "eval_steps": 2,
                   "per_device_eval_batch_size": 2},
        "mixed": {"per_device_train_batch_size": 1, "pairs_per_clip": 1, "max_steps": 4},
        "silent": {"train_data": str(data / "silent.jsonl"), "activation_checkpointing": True, "max_steps": 2},
    }  # fmt: skip
    twos = []
    for name, options in cases.items():
        options = {**SGD, "per_device_train_batch_size": 4, **options}
        accumulation = {"gradient_accumulation_steps": 2} if name == "all" else {}
        twos.append(recipe(f"{name}-2", **options, **accumulation))
        options["per_device_train_batch_size"] *= 2
        assert main(["train", recipe(f"{name}-1", **options, **accumulation)]) == 0
    shutil.rmtree(tmp_path / "cache")
    for name, two in zip(cases, twos, strict=True):
        assert on_ranks(2, train, two) == [0, 0], name
        compare(tmp_path / f"{name}-1", tmp_path / f"{name}-2")
    one, two = (tmp_path / f"frozen-{count}" for count in (1, 2))
    assert history(two, "eval_loss") == pytest.approx(history(one, "eval_loss"), rel=FLOAT32)
    assert history(two, "eval_recall_at_1") == history(one, "eval_recall_at_1")


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pairs_per_clips": 2}, "did you mean 'pairs_per_clip'"),
        ({"y_encoder_lr_fact": 0.1}, "did you mean 'y_encoder_lr_factor'"),
        ({"jepa_weight": 1.0}, "unknown key 'jepa_weight'"),
        ({"objective": "infonce"}, "one of info_nce, cosine"),
        ({"num_frames": 1.5}, "num_frames: expected int"),
        ({"vl_model": "x"}, "belongs to a new model"),
        ({"x_encoder": None}, "names no x_encoder"),
        ({"y_encoder": None}, "names no y_encoder"),
        ({"predictor": None}, "names no predictor"),
        ({"frame_size": None}, "frame_size goes with an x_encoder of random weights"),
        ({"x_encoder": "facebook/x"}, "frame_size goes with an x_encoder of random weights"),
        ({"x_encoder": {**VIT, "image_size": 32}}, "image_size=32 must be 16"),
        ({"x_encoder": {"model_type": "vitt"}}, "not know model_type 'vitt'"),
        ({"x_encoder": {**VIT, "hidden_sise": 3}}, "vit has no hidden_sise"),
        ({"x_encoder": {**VIT, "hidden_size": "16"}}, "x_encoder"),
        ({"predictor": {**RECIPE["predictor"], "vocab_size": 999}}, "predictor: vocab_size=999 must be"),
        ({"predictor": {**RECIPE["predictor"], "model_type": "stablelm"}}, "stays causal"),
        ({"num_frames": 0}, "num_frames=0 must be 1 or more"),
        ({"num_predictor_layers": 3}, "the predictor has 2 layers"),
        ({"project_targets": False}, "without project_targets"),
        ({"shared_dim": 0}, "shared_dim"),
        ({"temperature": 0.0}, "temperature=0.0 must be 0.01 or more"),
        ({"max_target_tokens": 2}, "the limit is 2"),
        ({"max_query_tokens": 2}, "the limit is 2"),
        ({"tokenizer_vocab_size": 100}, "tokenizer_vocab_size=100"),
        ({"token_merge": [1, 3, 3]}, "cannot be merged"),
        ({"feature_cache": "c", "x_encoder_trainable_layers": 1}, "feature_cache keeps the features of a frozen"),
        ({"x_encoder_trainable_layers": 3}, "the x_encoder has 2 blocks"),
        ({"per_device_train_batch_size": 1, "pairs_per_clip": 1}, "needs other pairs as negatives"),
        ({"regularizer": "sigreg", "per_device_train_batch_size": 2}, "sigreg"),
        ({"regularizer_weight": 0.1}, "belongs to a regularizer"),
        ({"objective": "cosine", "learn_temperature": False}, "objective: info_nce"),
        ({"objective": "cosine", "temperature": 0.1}, "temperature: 0.1 would be ignored"),
        ({"eval_strategy": "steps", "eval_steps": 2}, "nothing to evaluate on"),
        ({"validation_rows": 16}, "leaves nothing of the 16 clips"),
        ({"validation_rows": -1}, "validation_rows=-1"),
        ({"train_data": None}, "no train_data"),
        ({"train_data": "nowhere.jsonl"}, "No manifest at nowhere.jsonl"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"torch_compile": True}, "torch_compile"),
        ({"report_to": "nothing_known"}, "nothing_known"),
    ],
)
def test_recipe_mistakes(changes, said, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expect_refusal(capsys, ["train", recipe(**changes)], said)
    left = [path for path in (tmp_path / "run").rglob("*") if path.name != "run.json"]
    assert not left, "a run that cannot start must leave the folder free"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"per_device_train_batch_size": 1, "pairs_per_clip": 1}, "needs other pairs as negatives"),
        ({"regularizer": "sigreg", "per_device_train_batch_size": 2}, "cannot estimate a distribution from"),
        ({"x_encoder_trainable_layers": 3}, "the x_encoder has 2 blocks"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(changes, said, recipe, capsys):
    expect_refusal(capsys, ["train", recipe(**changes), "--dry-run"], said)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "0.png", "target": "x", "lable": "y"}, "line 2 has unknown keys lable"),
        ({"image": "none.png", "target": "x"}, "line 2 names 'none.png'"),
        ({"video": "film.mp4", "target": "x", "start_s": 5, "end_s": 2}, "line 2"),
    ],
)
def test_bad_manifests_name_the_line(row, said, recipe, data, tmp_path, capsys):
    for name in ("0.png", "film.mp4"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    write(tmp_path / "bad.jsonl", [{"image": "0.png", "target": "x"}, row])
    expect_refusal(capsys, ["train", recipe(train_data=str(tmp_path / "bad.jsonl"))], "bad.jsonl", said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_clips_that_cannot_be_read_end_the_run_with_one_line(workers, recipe, data, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").write_bytes((data / "1.png").read_bytes())
    write(tmp_path / "rows.jsonl", [{"image": f"{name}.png", "target": name} for name in "ab"])
    path = recipe(train_data=str(tmp_path / "rows.jsonl"), dataloader_num_workers=workers)
    expect_refusal(capsys, ["train", path], "a.png")


def test_a_loss_that_is_not_finite_exits_with_3(recipe, capsys):
    path = recipe(max_steps=20)
    assert main(["train", path, "--learning_rate", "1e30", "--max_grad_norm", "0", "--optim", "sgd"]) == 3
    assert "not finite at step" in capsys.readouterr().err
