"""Claim: whatever a kill leaves of a feature cache or a y_decoder, it is the old one, the new one, or an error."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.faults.states import add_torn_files, watch
from llm_jepa.core.errors import UserError
from llm_jepa.vl import features as features_module
from llm_jepa.vl.data import ClipDataset
from llm_jepa.vl.features import cache_features
from llm_jepa.vl.y_decoder import MemoryProjection, PrefixDecoder, PrefixDecoderConfig, YDecoder
from tests.ranks import start
from tests.vl.runs import make_clips, parts, tokenizer


def states_of(function, folder: Path, *words) -> list[Path]:
    """Run `function(folder, *words)` in a child, and return what a kill would have left at each moment."""
    states = folder.with_name("states")
    states.mkdir()
    process = start(_recorded, function, str(folder), str(states), *words)
    process.join()
    assert process.exitcode == 0
    add_torn_files(states)
    return sorted(states.iterdir())


def _recorded(function, folder, states, *words):
    watch(Path(folder), Path(states))
    function(Path(folder), *words)


def again(state: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(state, folder, symlinks=True)


# -- feature caches ---------------------------------------------------------------------------------------------------


def build(folder: Path) -> tuple[Tensor, list[int]]:
    """The features of 10 clips in shards of 4, and the sizes of the batches that were encoded."""
    features_module.SHARD = 4
    _, processor = parts()
    given: list[int] = []

    def encode(pixels: Tensor) -> Tensor:
        given.append(len(pixels))
        return pixels.mean((3, 4))[:, :, :2].double().sin().float()

    dataset = ClipDataset(make_clips(), num_frames=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = cache_features(encode, dataset, processor, folder, encoder_hash="x", batch_size=4)
    return cache[range(10)], given


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_kills_of_a_feature_cache(every, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "SHARD", 4)
    run = tmp_path / "run"
    run.mkdir()
    states = states_of(build, run)
    expected, _ = build(run)
    assert len(states) > 20 and len(expected.unique()) > 10
    for state in states[::every]:
        again(state, run)
        whole = len(list(run.glob("*/features-*.safetensors")))
        found, given = build(run)
        assert torch.equal(found, expected), state.name
        assert given == [4, 4, 2][whole:], state.name
        assert build(run)[1] == []
        for stage in run.rglob(".stage-*"):
            os.utime(stage, (0, 0))
        build(run)
        assert not list(run.rglob(".stage-*")), state.name
        assert len(list(run.rglob("*.*"))) == 4, state.name  # three shards and the manifest


# -- y_decoders -------------------------------------------------------------------------------------------------------


def y_decoder(seed: int) -> YDecoder:
    """A memory and a prefix decoder of random weights. The memories have two and three texts."""
    torch.manual_seed(seed)
    texts = ("a", "b", "c")[: 2 + seed]
    words = {"vocab_size": len(tokenizer()), "bos_token_id": 0, "eos_token_id": 0}
    lm = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, **words}
    decoder = PrefixDecoder(PrefixDecoderConfig(lm_config=lm, embedding_dim=8))
    return YDecoder(f"model {seed}", MemoryProjection(torch.randn(len(texts), 8), texts), decoder, tokenizer())


def save(folder: Path, seed: int) -> None:
    y_decoder(seed).save_pretrained(folder / "y_decoder")


def is_like(decoder: YDecoder, seed: int) -> bool:
    """Whether all parts are those of `y_decoder(seed)`."""
    other = y_decoder(seed)
    ours, others = decoder.decoder.state_dict(), other.decoder.state_dict()
    return (
        decoder.made_for == other.made_for
        and decoder.memory.texts == other.memory.texts
        and torch.equal(decoder.memory.embeddings, other.memory.embeddings)
        and all(torch.equal(ours[name], others[name]) for name in others)
    )


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_there", [False, True])
def test_kills_of_a_y_decoder(is_there, every, tmp_path):
    """Saved for the first time, and over another one."""
    run = tmp_path / "run"
    run.mkdir()
    if is_there:
        save(run, 0)
    states = states_of(save, run, 1)
    assert is_like(YDecoder.from_pretrained(run), 1)
    assert len(states) > 20
    outcomes = set()
    for state in states[::every]:
        again(state, run)
        try:
            decoder = YDecoder.from_pretrained(run)
        except UserError as error:
            assert "is damaged: it was only written in part" in str(error)
            outcomes.add("error")
        else:
            kind = "none" if decoder is None else "old" if is_like(decoder, 0) else "new"
            assert kind != "new" or is_like(decoder, 1), f"{state.name}: a mixture"
            outcomes.add(kind)
        save(run, 1)
        assert is_like(YDecoder.from_pretrained(run), 1), state.name
    assert outcomes >= ({"old", "error"} if is_there else {"none"})


@pytest.mark.parametrize("damage", ["removed", "torn", "zeroed"])
def test_a_damaged_y_decoder_is_an_error_that_names_the_file(damage, tmp_path):
    """Each file in turn. Without its tokenizer, transformers would take that of the model."""
    save(tmp_path, 0)
    names = sorted(path.name for path in (tmp_path / "y_decoder").iterdir() if path.name != "manifest.json")
    assert {"memory.safetensors", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        path = tmp_path / "y_decoder" / name
        content = path.read_bytes()
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "torn" else bytes(len(content)))
        with pytest.raises(UserError, match=f"y_decoder of .* is damaged: {name} is (missing|damaged)"):
            YDecoder.from_pretrained(tmp_path)
        path.write_bytes(content)
    assert is_like(YDecoder.from_pretrained(tmp_path), 0)
