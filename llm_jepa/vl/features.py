"""Visual features of a frozen x_encoder, computed once: later epochs do not run the x_encoder at all.

A cache is a folder of safetensors shards and a manifest. Its name is a hash of the data, the encoder's weights and the
preprocessing. If one of them changes, so does the folder, and an old feature is never mistaken for a new one.

A shard also holds a SHA-256 of the features of each clip. A process checks a clip when it reads it for the first time,
so a cache of terabytes is not read before training. (A hash of a whole shard would be.)

The rules by which files are read have a version, `READING`, which is in the shards and not in the name: a change of the
rules moves few films, and a cache of others stays good. So a complete cache of an older version is used with a warning,
and the shards of one that was never completed are computed again, because a cache must not hold both.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..core.errors import UserError
from ..core.files import flush, write_json, written_whole
from ..core.json_files import read_json
from ..core.publish import MANIFEST, remove_leftovers

SHARD = 512  # clips in a file
ABANDONED_S = 3600  # a stage lives as long as a file is written, not computed
# 2: frames are uniform in time in films of variable rate; alpha is laid on white; EXIF, mirroring, pixel aspect and
#    the start of the film are obeyed. Nothing changed for upright films of constant rate with square pixels.
READING = "2"


class Clips(Protocol):
    """The part of a `ClipDataset` that a cache needs."""

    def __len__(self) -> int: ...
    def frames(self, index: int) -> Any: ...
    def identity(self) -> Iterator[bytes]: ...


class FeatureCache:
    """Features [count, N, D_x] on disk, memory mapped. `cache[[3, 7]]` -> [2, N, D_x] float32.

    Raises UserError for a folder that is not a complete cache, and for features that are not those that were stored.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = _manifest_of(self.folder)
        if manifest is None:
            raise UserError(f"{folder} is not a complete feature cache: it has no readable {MANIFEST}.")
        self.manifest = manifest
        self._open: dict[int, Any] = {}
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return int(self.manifest["count"])

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._one(int(index)) for index in indices]).float()

    def _one(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of a cache of {len(self)}")
        shard, row = divmod(index, self.manifest["clips_per_file"])
        path = self.folder / _shard_name(shard)
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(path, "pt").__enter__()
            features: Tensor = self._open[shard].get_slice("features")[row]
            is_right = index in self._checked or "hashed_with" not in self.manifest
            if not is_right:
                stored = self._open[shard].get_slice("sha256")[row].tolist()
                is_right = stored == _hash_of(features, self.manifest["hashed_with"], index)
        except (OSError, SafetensorError, IndexError):
            is_right = False
        if not is_right:
            raise UserError(f"The features of clip {index} in {path} are damaged. {self._set_aside(path)}")
        self._checked.add(index)
        return features

    def _set_aside(self, path: Path) -> str:
        """Remove a damaged file, so that the next start computes it again. Returns what to do."""
        try:
            if self.folder.is_symlink():  # it may belong to somebody else
                raise OSError
            path.unlink(missing_ok=True)
        except OSError:
            return "Remove that file and start again: it is computed again."
        return "That file is removed; start again: it is computed again."

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each worker of a data loader opens the files again


def cache_features(
    encode: Callable[[Tensor], Tensor],
    clips: Clips,
    processor: Any,
    folder: str | Path,
    *,
    encoder_hash: str,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float16,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> FeatureCache:
    """Compute the features of these clips under `folder`, or open them if they are there; finished shards are kept.

    Several ranks compute a shard each in turn, and each writes whole files. Rank 0 writes the manifest, which makes
    them a cache, when all are there. The files are those of one rank, whatever the number of ranks.

    Args:
        encode: pixels [B, T, 3, H, W] -> features [B, N, D_x], without gradient.
        encoder_hash: of the encoder's weights, see `encoder_sha256`.
        dtype: of the stored features; they come back as float32. float16 holds 3 decimal digits and magnitudes up to
            65,504; larger features are refused.
        rank, world: this process, and how many share the work. A rank of `world` or more computes nothing.
        wait: returns when all processes have called it, those that compute nothing, too.

    Raises UserError for clips whose features differ in shape, for features that the dtype cannot hold, for a file that
    a rank has not left, and if the cache's own folder is a link and not complete.
    """
    digest = hashlib.sha256()
    for identity in clips.identity():
        digest.update(identity)
    key = {
        "data": digest.hexdigest(),
        "x_encoder": encoder_hash,
        "processor": hashlib.sha256(_settings(processor).encode()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        "clips_per_file": SHARD,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    here = Path(folder) / name
    if rank == 0 and (count := remove_leftovers(here, min_age_s=ABANDONED_S)):
        print(f"Removed {count} leftover(s) of a killed process from {here}.")
    shards = [range(start, min(start + SHARD, len(clips))) for start in range(0, len(clips), SHARD)]
    is_complete = _is_complete(here, key, shards, len(clips), is_first=rank == 0)
    wait()  # all have looked, so from here on files may change
    if not is_complete and rank < world:
        if here.is_symlink():
            raise UserError(f"{here} is a link, and features are not written through links; remove it.")
        here.mkdir(parents=True, exist_ok=True)
        _compute_shards(shards[rank::world], encode, clips, processor, here, batch_size, dtype, shows=rank == 0)
    wait()
    if not is_complete and rank == 0:
        shape = _shape_of_all(here, shards)
        manifest = {**key, "reading": READING, "hashed_with": name, "count": len(clips), "shape": list(shape)}
        write_json(here / MANIFEST, manifest)
    wait()
    return FeatureCache(here)


def _is_complete(here: Path, key: dict[str, Any], shards: list[range], count: int, *, is_first: bool) -> bool:
    """Whether a folder holds the cache of this key. is_first: warn of damaged files and of an older version."""
    manifest = _manifest_of(here)
    if manifest is None or {**manifest, **key, "count": count} != manifest:
        return False
    broken = [rows for rows in shards if not _fits(here / _shard_name(rows.start // SHARD), rows, manifest)]
    if is_first and not broken:
        _warn_of_older(here, manifest)
    elif is_first:
        warnings.warn(
            f"{len(broken)} of {len(shards)} files in {here} are damaged; computing them again.", stacklevel=3
        )
    return not broken


def _compute_shards(
    shards: list[range],
    encode: Callable[[Tensor], Tensor],
    clips: Clips,
    processor: Any,
    here: Path,
    batch_size: int,
    dtype: torch.dtype,
    *,
    shows: bool,
) -> None:
    """Write the shards that are not there. shows: a progress bar."""
    name, shape = here.name, None  # [N, D_x], the same for all clips
    total = sum(map(len, shards))
    with tqdm(total=total, desc=f"visual features -> {here}", unit="clip", disable=not shows) as progress:
        for rows in shards:
            path = here / _shard_name(rows.start // SHARD)
            finished = _shape_of(path, name, rows)
            if finished is not None:
                shape = finished
                progress.update(len(rows))
                continue
            batches = []
            for first in range(rows.start, rows.stop, batch_size):
                batch = range(first, min(first + batch_size, rows.stop))
                features = _features_of(batch, encode, clips, processor, shape, dtype)
                shape = tuple(features.shape[1:])
                batches.append(features)
                progress.update(len(batch))
            _write_shard(path, name, rows, torch.cat(batches))


def _shape_of_all(here: Path, shards: list[range]) -> tuple[int, ...]:
    """[N, D_x] of every clip, by the headers of the shards. Raises UserError if one is not there or differs."""
    shape: tuple[int, ...] | None = None
    for rows in shards:
        path = here / _shard_name(rows.start // SHARD)
        try:
            with safe_open(path, "pt") as file:
                count, *sizes = file.get_slice("features").get_shape()
        except (OSError, SafetensorError):
            count, sizes = 0, []
        if count != len(rows):
            raise UserError(f"{path} is not there or damaged, although a process has written it; start again.")
        if shape is not None and tuple(sizes) != shape:
            raise UserError(_other_shape(rows, tuple(sizes), shape))
        shape = tuple(sizes)
    return shape or ()


def _other_shape(rows: range, sizes: tuple[int, ...], shape: tuple[int, ...]) -> str:
    return (
        f"Clips {rows.start}-{rows.stop - 1} give features {sizes}, earlier ones {shape}. "
        "The clips of a cache need equally many frames; sample them in the same way."
    )


def _warn_of_older(here: Path, manifest: dict[str, Any]) -> None:
    if manifest.get("reading") != READING:
        warnings.warn(
            f"{here} was computed when films of variable frame rate, pictures with transparency or EXIF "
            "orientation, mirrored films and pixels that are not square were read in another way. If there are "
            "such among the clips, remove the folder, and the features are computed again.",
            stacklevel=3,
        )
    elif "hashed_with" not in manifest:
        warnings.warn(
            f"{here} was computed by an earlier version, which stored no hashes, so damage to its files is not "
            "noticed. Remove the folder, and the features are computed again.",
            stacklevel=3,
        )


def encoder_sha256(x_encoder: torch.nn.Module) -> str:
    """Hash of an encoder's config and weights."""
    digest = hashlib.sha256(repr(sorted(x_encoder.config.to_dict().items(), key=str)).encode())  # type: ignore[union-attr,operator]
    for name, value in sorted(x_encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _features_of(
    batch: range,
    encode: Callable[[Tensor], Tensor],
    clips: Clips,
    processor: Any,
    shape: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Features [B, N, D_x] of the clips `batch`, on the CPU in `dtype`. shape: [N, D_x] of earlier clips.

    Raises UserError for another shape and for values that `dtype` cannot hold.
    """
    pixels = processor(videos=[clips.frames(index) for index in batch])["pixel_values_videos"]  # [B, T, 3, H, W]
    with torch.no_grad():
        features = encode(pixels).cpu()
    if shape is not None and tuple(features.shape[1:]) != shape:
        raise UserError(_other_shape(batch, tuple(features.shape[1:]), shape))
    stored = features.to(dtype)
    if not stored.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"A feature of {features.abs().max():.3g} does not fit {name}, in which features are stored. "
            "Remove feature_cache from the recipe: then they are computed in every epoch, and not stored. (In Python, "
            "cache_features(dtype=torch.float32) stores them.)"
        )
    return stored


def _settings(processor: Any) -> str:
    """The preprocessing as text."""
    return json.dumps(
        {"frames": processor.num_frames, "image_processor": processor.image_processor.to_dict()},
        sort_keys=True,
        default=str,
    )


def _manifest_of(here: Path) -> dict[str, Any] | None:
    """The manifest of a complete cache; None if there is none of that form."""
    try:
        manifest = read_json(here / MANIFEST)
    except (OSError, ValueError):
        return None
    count, size, shape = (manifest.get(key) for key in ("count", "clips_per_file", "shape"))
    is_valid = type(count) is int and count >= 0 and type(size) is int and size > 0 and isinstance(shape, list)
    return manifest if is_valid else None


def _fits(path: Path, rows: range, manifest: dict[str, Any]) -> bool:
    """Whether a file of a complete cache is there, by its size and header; its features are checked when they are read.

    safetensors compares the size of a file with its header.
    """
    try:
        with safe_open(path, "pt") as file:
            return bool(file.get_slice("features").get_shape() == [len(rows), *manifest["shape"]])
    except (OSError, SafetensorError):
        return False


def _shape_of(path: Path, name: str, rows: range) -> tuple[int, ...] | None:
    """[N, D_x] of a shard; None if there is none, if it is damaged, or if it was read by other rules."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("reading") != READING:
                return None
            features, hashes = file.get_tensor("features"), file.get_tensor("sha256")
    except (OSError, SafetensorError):
        return None
    is_right = features.ndim > 1 and torch.equal(hashes, _hashes(features, name, rows))
    return tuple(features.shape[1:]) if is_right else None


def _write_shard(path: Path, name: str, rows: range, features: Tensor) -> None:
    with written_whole(path) as temporary:  # another run may write to the same cache
        tensors = {"features": features, "sha256": _hashes(features, name, rows)}
        save_file(tensors, temporary, metadata={"reading": READING})
        flush(temporary)


def _hashes(features: Tensor, name: str, rows: range) -> Tensor:
    """[n, 32] bytes: the hash of each clip's features."""
    hashes = [_hash_of(row, name, index) for row, index in zip(features, rows, strict=False)]
    return torch.tensor(hashes, dtype=torch.uint8)


def _hash_of(features: Tensor, name: str, index: int) -> list[int]:
    """SHA-256 of the features [N, D_x] of a clip, of its cache and of its number there."""
    digest = hashlib.sha256(f"{name} {index} ".encode())
    digest.update(features.contiguous().view(-1).view(torch.uint8).numpy().data)
    return list(digest.digest())


def _shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"
