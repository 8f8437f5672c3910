"""A cached feature is the feature; a cache belongs to its clips, weights and preprocessing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from llm_jepa.core.errors import UserError
from llm_jepa.vl import features as features_module
from llm_jepa.vl.data import Clip, ClipCollator, ClipDataset, Pair
from llm_jepa.vl.features import FeatureCache, cache_features, encoder_sha256
from llm_jepa.vl.loading import plain_frames
from tests.conftest import FLOAT32
from tests.vl.runs import make_clips, parts, processor_of


def cache_of(folder, dataset=None, model=None, processor=None, **options):
    """A cache of the clips, and how many clips its encoder was given."""
    if model is None:
        model, processor = parts()
    given: list[int] = []

    def encode(pixels: Tensor) -> Tensor:
        given.append(len(pixels))
        return model.eval().encode_frames(pixels)

    dataset = dataset or ClipDataset(make_clips(), num_frames=2)
    options = {"encoder_hash": encoder_sha256(model.x_encoder), "batch_size": 4, **options}
    return cache_features(encode, dataset, processor, folder, **options), given


@pytest.mark.parametrize("x", ["vit", "vjepa2", "resnet"])
def test_cached_features_are_the_features(x, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "SHARD", 4)  # 10 clips: 4, 4, 2
    model, processor = parts(x)
    fresh = model.eval().encode_frames(processor(videos=[clip.video for clip in make_clips()])["pixel_values_videos"])
    exact, given = cache_of(tmp_path, model=model, processor=processor, dtype=torch.float32, batch_size=3)
    assert given == [3, 1, 3, 1, 2] and len(exact) == 10
    chosen = [9, 0, 3, 4, 7, 3]
    assert exact[chosen].dtype == torch.float32
    torch.testing.assert_close(exact[chosen], fresh[chosen], rtol=FLOAT32, atol=FLOAT32)
    half, _ = cache_of(tmp_path, model=model, processor=processor)
    assert torch.equal(half[chosen], exact[chosen].half().float())
    assert not torch.equal(half[chosen], exact[chosen])
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            exact[[wrong]]


def test_a_cache_is_used_again_and_only_for_what_it_was_made(tmp_path):
    """Clips, weights, preprocessing, number of frames, type: any other one makes another cache."""
    model, processor = parts()

    def made(count: int, **options) -> Path:
        cache, given = cache_of(tmp_path, **{"model": model, "processor": processor, **options})
        assert sum(given) == count, options
        return cache.folder

    folders = [made(10)]
    assert made(0) == folders[0]
    clips = make_clips()
    clips[7].video[1, 2, 3, 0] ^= 1
    folders.append(made(10, dataset=ClipDataset(clips, num_frames=2)))
    folders.append(made(10, dataset=ClipDataset(make_clips()[::-1], num_frames=2)))
    folders.append(made(9, dataset=ClipDataset(make_clips()[:9], num_frames=2)))
    folders.append(made(10, dtype=torch.float32))
    other = plain_frames(16)
    other.image_mean = [0.5, 0.5, 0.4]
    folders.append(made(10, processor=processor_of(model, frames=other)))
    processor.num_frames = 1
    folders.append(made(10))
    processor.num_frames = 2
    with torch.no_grad():
        model.x_encoder.layernorm.bias[3] += 1e-3
    folders.append(made(10))
    assert len(set(folders)) == len(folders)
    assert made(0) == folders[-1]


def test_frames_of_the_same_bytes_in_another_shape_are_other_frames(tmp_path):
    """What is black or white throughout, or was reshaped, has the same bytes."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    pairs = (Pair(None, "blue"),)
    sets = [ClipDataset([Clip(video, pairs)], num_frames=2) for video in (frames, frames.reshape(2, 32, 8, 3))]
    caches = [cache_of(tmp_path, dataset)[0] for dataset in sets]
    assert not torch.equal(caches[0][[0]], caches[1][[0]])


def test_files_are_known_by_size_time_and_span(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(make_clips(1)[0].video[0]).save(path)
    os.utime(path, ns=(0, 10**18))

    def folder(**options) -> Path:
        clip = Clip(str(path), (Pair(None, "blue"),), **options)
        return cache_of(tmp_path / "cache", ClipDataset([clip], num_frames=2))[0].folder

    first = folder()
    assert folder() == first
    assert folder(end_s=5.0) != first and folder(start_s=0.0) != first
    os.utime(path, ns=(0, 10**18 + 1))
    assert folder() != first


def test_an_interrupted_build_goes_on_at_its_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "SHARD", 4)
    model, processor = parts()
    whole, _ = cache_of(tmp_path / "whole", model=model, processor=processor)
    encode, given = model.encode_frames, []

    def stops(pixels: Tensor) -> Tensor:
        given.append(len(pixels))
        if len(given) == 4:  # 4 clips of the first shard in 2 + 2, then 2 of the second
            raise KeyboardInterrupt
        return encode(pixels)

    options = {"encoder_hash": encoder_sha256(model.x_encoder), "batch_size": 2}
    dataset = ClipDataset(make_clips(), num_frames=2)
    with pytest.raises(KeyboardInterrupt):
        cache_features(stops, dataset, processor, tmp_path / "cut", **options)
    assert len(list((tmp_path / "cut").rglob("*.safetensors"))) == 1
    with pytest.raises(UserError, match="not a complete feature cache"):
        cache_features(stops, dataset, processor, tmp_path / "cut", rank=1, world=1, **options)
    given.clear()
    cut, _ = cache_of(tmp_path / "cut", dataset, model, processor, batch_size=2)
    assert torch.equal(cut[range(10)], whole[range(10)])


def test_a_torn_shard_of_an_unfinished_build_is_made_again(tmp_path, monkeypatch):
    """A machine that lost power may leave a file of the right name and half its bytes."""
    monkeypatch.setattr(features_module, "SHARD", 4)
    model, processor = parts()
    cache, _ = cache_of(tmp_path, model=model, processor=processor)
    expected = cache[range(10)]
    torn = cache.folder / "features-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(UserError, match="features of clip 5 in .*00001.safetensors are damaged. That file is rem"):
        FeatureCache(cache.folder)[[5]]
    (cache.folder / "manifest.json").unlink()
    (cache.folder / "features-00002.tmp").write_bytes(b"half of it")
    again, given = cache_of(tmp_path, model=model, processor=processor)
    assert given == [4] and torch.equal(again[range(10)], expected)


DAMAGE = (
    "removed",
    "torn",
    "zeroed features",
    "one bit",
    "zeros",
    "another cache's",
    "another shard's",
    "no hashes",
    "{}",
)


def damage(path: Path, how: str, other: Path) -> None:
    """Damage a shard of 4 clips in a way that a crash, a bad disk or a careless copy does."""
    content = path.read_bytes()
    tensors = load_file(path)
    if how == "removed":
        path.unlink()
    elif how == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif how == "zeros":
        path.write_bytes(bytes(len(content)))
    elif how == "{}":
        path.write_bytes(struct.pack("<Q", 2) + b"{}")
    elif how == "one bit":
        start = content.index(tensors["features"].numpy().tobytes())
        path.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
    elif how == "another cache's":
        shutil.copy(other / path.name, path)
    elif how == "another shard's":
        shutil.copy(path.with_name("features-00000.safetensors"), path)
    else:
        if how == "no hashes":
            del tensors["sha256"]
        else:
            tensors["features"] = torch.zeros_like(tensors["features"])
        features_module.save_file(tensors, path, metadata={"reading": features_module.READING})


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_features_never_train(how, is_complete, tmp_path, monkeypatch):
    """A complete cache is used again: what its header shows is computed again at once, the rest is an error when it is
    read. Shards without a manifest are checked by their hashes."""
    monkeypatch.setattr(features_module, "SHARD", 4)
    model, processor = parts()
    cache, _ = cache_of(tmp_path, model=model, processor=processor)
    expected = cache[range(10)]
    clips = make_clips(seed=1)
    other, _ = cache_of(tmp_path, ClipDataset(clips, num_frames=2), model, processor)
    assert not torch.equal(other[range(10)], expected)
    path = cache.folder / "features-00001.safetensors"
    damage(path, how, other.folder)
    if not is_complete:
        (cache.folder / "manifest.json").unlink()
    is_seen = not is_complete or how in ("removed", "torn", "zeros", "{}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, given = cache_of(tmp_path, model=model, processor=processor)
    assert given == ([4] if is_seen else [])
    if not is_seen:
        assert torch.equal(again[range(4)], expected[:4])
        with pytest.raises(
            UserError, match="features of clip [4-7] in .*00001.safetensors are damaged. That file is removed"
        ):
            again[range(4, 8)]
        with pytest.warns(UserWarning, match="1 of 3 files in .* are damaged; computing"):
            again, given = cache_of(tmp_path, model=model, processor=processor)
        assert given == [4]
    assert torch.equal(again[range(10)], expected)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"count": -1}', "[" * 100_000])
def test_a_manifest_of_another_form_is_none(content, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "SHARD", 4)
    cache, _ = cache_of(tmp_path)
    (cache.folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="is not a complete feature cache"):
        FeatureCache(cache.folder)
    again, given = cache_of(tmp_path)
    assert given == [] and torch.equal(again[range(10)], cache[range(10)])


def test_a_cache_of_an_earlier_version_has_no_hashes_and_says_so(tmp_path):
    cache, _ = cache_of(tmp_path)
    expected = cache[range(10)]
    path = cache.folder / "features-00000.safetensors"
    damage(path, "no hashes", cache.folder)
    manifest = cache.folder / "manifest.json"
    manifest.write_text(json.dumps({key: v for key, v in cache.manifest.items() if key != "hashed_with"}))
    expected = load_file(path)["features"].float()
    with pytest.warns(UserWarning, match="no hashes, so damage to its files is not noticed"):
        kept, given = cache_of(tmp_path)
    assert given == [] and torch.equal(kept[range(10)], expected)
    manifest.unlink()
    assert cache_of(tmp_path)[1] == [4, 4, 2]


def test_a_clip_is_hashed_once(tmp_path, monkeypatch):
    cache, _ = cache_of(tmp_path)
    hashed, real = [], features_module._hash_of
    monkeypatch.setattr(
        features_module, "_hash_of", lambda f, name, index: (hashed.append(index), real(f, name, index))[1]
    )
    cache = FeatureCache(cache.folder)
    for _ in range(2):
        cache[[7, 2]]
    assert hashed == [7, 2]


def test_features_are_not_written_through_links(tmp_path):
    cache, _ = cache_of(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    cache.folder.rename(elsewhere)
    cache.folder.symlink_to(elsewhere)
    assert cache_of(tmp_path)[1] == []  # it is read
    (elsewhere / "manifest.json").unlink()
    (elsewhere / "features-00000.safetensors").unlink()
    with pytest.raises(UserError, match="is a link, and features are not written through links"):
        cache_of(tmp_path)
    cache.folder.unlink()
    cache.folder.mkdir()
    for name in ("manifest.json", "features-00000.safetensors"):
        (cache.folder / name).symlink_to(elsewhere / name)
    assert cache_of(tmp_path)[1] == [4, 4, 2]
    assert not list(elsewhere.iterdir())


def test_a_stage_is_removed_when_its_writer_cannot_be_alive(tmp_path, capsys):
    cache, _ = cache_of(tmp_path)
    (cache.folder / "manifest.json").unlink()
    old, young = cache.folder / ".stage-old", cache.folder / ".stage-young"
    for stage in (old, young):
        stage.mkdir()
    os.utime(old, (0, 0))
    cache_of(tmp_path)
    assert not old.exists() and young.exists()
    assert "Removed 1 leftover(s) of a killed process" in capsys.readouterr().out


def test_two_runs_may_build_one_cache_at_the_same_time(tmp_path, monkeypatch):
    """A sweep starts several at once. Here the second run starts, and ends, while the first writes its shard."""
    model, processor = parts()
    real, others = features_module.save_file, []

    def save_file(tensors, path, **options):
        if not others:
            others.append(None)
            others[0], _ = cache_of(tmp_path, model=model, processor=processor)
        real(tensors, path, **options)

    monkeypatch.setattr(features_module, "save_file", save_file)
    cache, _ = cache_of(tmp_path, model=model, processor=processor)
    assert torch.equal(cache[range(10)], others[0][range(10)])
    names = []

    def named(tensors, path, **options):
        names.append(path)
        real(tensors, path, **options)

    monkeypatch.setattr(features_module, "save_file", named)
    for run in ("1", "2"):
        cache_of(tmp_path / run, model=model, processor=processor)
    # A private stage each; the folders of the caches themselves have one name.
    assert len({Path(name).parent.name for name in names}) == 2, "both would write into one file"


def test_a_cache_made_by_older_rules_of_reading_is_kept_with_a_warning_and_completed_by_none(tmp_path, monkeypatch):
    """Films of constant rate are read as before, so a complete cache stays; a half one gets no second half."""
    monkeypatch.setattr(features_module, "SHARD", 4)
    model, processor = parts()
    cache, given = cache_of(tmp_path, model=model, processor=processor)
    assert sum(given) == 10 and cache.manifest["reading"] == features_module.READING
    monkeypatch.setattr(features_module, "READING", "another")
    with pytest.warns(UserWarning, match="variable frame rate.*remove the folder"):
        kept, given = cache_of(tmp_path, model=model, processor=processor)
    assert kept.folder == cache.folder and given == []
    (cache.folder / "manifest.json").unlink()
    (cache.folder / "features-00002.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, given = cache_of(tmp_path, model=model, processor=processor)
        assert again.folder == cache.folder and sum(given) == 10
        assert cache_of(tmp_path, model=model, processor=processor)[1] == []


def test_features_beyond_float16_are_refused_and_float32_keeps_them(tmp_path):
    _, processor = parts()
    dataset, options = ClipDataset(make_clips(3), num_frames=2), {"encoder_hash": "x"}

    def large(pixels: Tensor) -> Tensor:
        return torch.full((len(pixels), 2, 4), 65_600.0)

    with pytest.raises(UserError, match="6.56e.04 does not fit float16.*Remove feature_cache"):
        cache_features(large, dataset, processor, tmp_path, **options)
    kept = cache_features(large, dataset, processor, tmp_path, dtype=torch.float32, **options)
    assert kept[[1]].max() == 65_600


def test_clips_whose_features_differ_in_shape_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "SHARD", 2)
    clips = make_clips(4)
    clips[3] = Clip(clips[3].video[:1], clips[3].pairs)
    with pytest.raises(UserError, match="Clips 3-3 give features .* earlier ones"):
        cache_of(tmp_path, ClipDataset(clips, num_frames=2), batch_size=1)


def test_a_cache_is_read_in_workers_and_survives_pickling(tmp_path):
    model, processor = parts()
    cache, _ = cache_of(tmp_path, model=model, processor=processor)
    expected = cache[range(10)]
    dataset = ClipDataset(make_clips(), num_frames=2, pairs_per_clip=3, features=cache)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=ClipCollator(processor))
    assert torch.equal(torch.cat([batch["visual_features"] for batch in loader]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(cache))[range(10)], expected)


def test_a_cache_names_its_clips_and_is_no_pickle(tmp_path):
    cache, _ = cache_of(tmp_path)
    assert sorted(path.suffix for path in cache.folder.iterdir()) == [".json", ".safetensors"]
    head = (cache.folder / "features-00000.safetensors").read_bytes()
    length = struct.unpack("<Q", head[:8])[0]
    assert json.loads(head[8 : 8 + length])["features"]["shape"] == [10, *cache.manifest["shape"]]


def caches_of_ranks(folder, world: int) -> tuple[list[FeatureCache], list[int]]:
    """The caches that `world` ranks get, each a thread, and how many clips each encoded."""
    model, processor = parts()
    barrier = threading.Barrier(world, timeout=60)

    def one(rank: int) -> tuple[FeatureCache, int]:
        cache, given = cache_of(
            folder, model=model, processor=processor, batch_size=3, rank=rank, world=world, wait=barrier.wait
        )
        return cache, sum(given)

    with ThreadPoolExecutor(world) as ranks:
        caches, counts = zip(*ranks.map(one, range(world)), strict=True)
    return list(caches), list(counts)


def test_several_ranks_write_the_files_of_one(tmp_path, monkeypatch):
    """10 clips in files of 4, 4, 2: rank 0 of 2 computes the first and the last. Byte for byte the files of one."""
    monkeypatch.setattr(features_module, "SHARD", 4)
    (one,), counts = caches_of_ranks(tmp_path / "one", 1)
    assert counts == [10]
    caches, counts = caches_of_ranks(tmp_path / "two", 2)
    assert counts == [6, 4]
    names = sorted(path.name for path in one.folder.iterdir())
    assert len(names) == 4 and one.folder.name == caches[0].folder.name
    for name in names:
        assert (one.folder / name).read_bytes() == (caches[0].folder / name).read_bytes(), name
    for cache in caches:
        assert torch.equal(cache[range(10)], one[range(10)])


def test_ranks_go_on_with_the_files_that_are_not_there(tmp_path, monkeypatch):
    """One rank was killed after two files; three ranks compute the third only. A damaged file is computed again."""
    monkeypatch.setattr(features_module, "SHARD", 4)
    (one,), _ = caches_of_ranks(tmp_path, 1)
    files = {path.name: path.read_bytes() for path in one.folder.iterdir()}
    (one.folder / "manifest.json").unlink()
    (one.folder / "features-00002.safetensors").unlink()
    assert caches_of_ranks(tmp_path, 3)[1] == [0, 0, 2]
    assert caches_of_ranks(tmp_path, 3)[1] == [0, 0, 0]
    (one.folder / "features-00001.safetensors").write_bytes(files["features-00001.safetensors"][:-5])
    with pytest.warns(UserWarning, match="1 of 3 files in .* are damaged"):
        assert caches_of_ranks(tmp_path, 3)[1] == [0, 4, 0]
    assert {path.name: path.read_bytes() for path in one.folder.iterdir()} == files


def test_a_file_that_a_rank_has_not_left_is_named(tmp_path, monkeypatch):
    """Rank 0 of 2 alone, as if the other had ended without an error."""
    monkeypatch.setattr(features_module, "SHARD", 4)
    with pytest.raises(UserError, match="features-00001.safetensors is not there or damaged"):
        cache_of(tmp_path, rank=0, world=2)
    with pytest.raises(UserError, match="not a complete feature cache"):
        cache_of(tmp_path / "other", rank=1, world=2)
