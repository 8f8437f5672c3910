"""What the command line does for `family: vl`: train, dry run, `train-decoder` and `watch`.

Modules that need torch are imported inside the functions, so that help and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from ..core.folders import check_path
from ..core.source_files import check_source
from .keys import manifests

if TYPE_CHECKING:
    from ..core.recipe import CheckedRecipe, Recipe
    from ..core.run import Beginning
    from .arguments import VLJEPATrainingArguments
    from .data import Clip
    from .streaming import ClipStream
    from .trainer import VLJEPATrainer

# Recipe keys that may name a folder or a Hub repository -> the key of its revision. A run is the same if they hold the
# same.
SOURCES = {
    "vl_model": None,
    "x_encoder": "x_encoder_revision",
    "predictor": "predictor_revision",
    "y_encoder": "y_encoder_revision",
}


def check_files(recipe: CheckedRecipe) -> None:
    """Raises UserError if a file or folder that the recipe names is not there."""
    data = recipe.data
    if data.streaming:
        check_source(data.train_data)
    else:
        manifests(data.train_data)
    if data.validation_data is not None:
        manifests(data.validation_data)
    for key in SOURCES:
        model = getattr(recipe.model, key)
        if isinstance(model, str):
            check_path(model)


def train(recipe: Recipe) -> None:
    """Train as the recipe says. Leaves a VL-JEPA in output_dir."""
    from ..core import run

    start = _begin(recipe)
    if not run.is_finished(recipe, start.run):
        run.train(_trainer(recipe, start), start.run.resume)


def build_trainer(recipe: Recipe) -> tuple[VLJEPATrainer, str | None]:
    """The trainer and the checkpoint to resume from. Raises UserError before anything is written."""
    start = _begin(recipe)
    return _trainer(recipe, start), start.run.resume


class _Start(NamedTuple):
    """What is known of a run before its model is loaded."""

    clips: list[Clip] | ClipStream
    validation: list[Clip]
    run: Beginning


def _begin(recipe: Recipe) -> _Start:
    from transformers import set_seed

    from ..core import run
    from ..core.checks import check_best_metric
    from .data import clips_sha256
    from .loading import load_clips
    from .streaming import ClipStream
    from .trainer import VLJEPATrainer

    training = recipe.training
    check_best_metric(training, VLJEPATrainer.figure_names(training))
    set_seed(training.seed)
    clips, validation = load_clips(recipe.data, seed=run.data_seed(recipe))
    _check_batches(training, clips, validation)
    beginning = run.identify(
        recipe,
        None if isinstance(clips, ClipStream) else clips_sha256(clips),
        clips_sha256(validation) if validation else None,
        sources=SOURCES,
        further=f"train its model further as a new run: a recipe with vl_model: {training.output_dir} in place of the "
        "parts, and another output_dir",
        train_files_sha256=clips.files_sha256 if isinstance(clips, ClipStream) else None,
    )
    return _Start(clips, validation, beginning)


def _trainer(recipe: Recipe, start: _Start) -> VLJEPATrainer:
    from ..core import run
    from .data import ClipDataset
    from .loading import load_vl_model
    from .streaming import ClipStream
    from .trainer import VLJEPATrainer

    training, train = recipe.training, start.clips
    model, processor = load_vl_model(recipe.model, train, seed=training.seed)
    frames = model.config.num_frames
    clips = train if isinstance(train, ClipStream) else ClipDataset(train, num_frames=frames)
    held_out = ClipDataset(start.validation, num_frames=frames) if start.validation else None
    with run.library_refusals():
        trainer = VLJEPATrainer(model, training, clips, held_out, processor)
    run.claim(trainer, recipe, start.run.record, sources=SOURCES)
    return trainer


def _check_batches(training: VLJEPATrainingArguments, clips: list[Clip] | ClipStream, validation: list[Clip]) -> None:
    """What can be refused before a model is loaded: batches with too few pairs."""
    from ..core.checks import check_batches
    from .objective import check_pairs
    from .streaming import ClipStream, known_clips

    pairs = check_pairs(known_clips(clips), training)
    compares = training.objective == "info_nce" or training.regularizer is not None
    step = training.per_device_train_batch_size * training.world_size
    evaluated = len(validation) if training.eval_strategy != "no" else 0
    rows = None if isinstance(clips, ClipStream) else len(clips)
    check_batches(training, rows, evaluated, compares_rows=compares and pairs == step, step=step)


def dry_run(recipe: Recipe, *, launch: str | None = None, processes: int = 1) -> None:
    """Print the first clip, the shapes of a batch of two and the size of each part. Trains and writes nothing.

    launch: of the command line. If several processes train, the batch of one is not yet known to be too small.
    """
    from ..core.checks import check_best_metric
    from ..core.run import data_seed
    from .data import ClipCollator, ClipDataset
    from .loading import load_clips, load_vl_model
    from .objective import choose_trained_parts
    from .streaming import known_clips
    from .trainer import VLJEPATrainer

    training = recipe.training
    check_best_metric(training, VLJEPATrainer.figure_names(training))
    train, validation = load_clips(recipe.data, seed=data_seed(recipe))
    if launch is None:
        _check_batches(training, train, validation)
    clips = known_clips(train)
    model, processor = load_vl_model(recipe.model, train, seed=training.seed)
    choose_trained_parts(model, training)
    dataset = ClipDataset(
        clips, num_frames=model.config.num_frames, pairs_per_clip=training.pairs_per_clip, seed=training.seed
    )
    batch = ClipCollator(processor)([dataset[i] for i in range(min(2, len(dataset)))])
    stream = "a stream of unknown length; of its first clips " * recipe.data.streaming
    print(f"# Clips\n{stream}{len(clips)} to train on, {len(validation)} for validation; the first one:")
    for query, target in dataset.draw(0):
        print(f"  {query!r} -> {target!r}")
    print("# Two clips as a batch\n" + "\n".join(f"  {key} {list(value.shape)}" for key, value in batch.items()))
    print("# Weights (in thousands)")
    for name, part in model.named_children():
        weights = list(part.parameters())
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        print(f"  {name:20s}{sum(weight.numel() for weight in weights) // 1000:>12,}  trained {trained // 1000:>12,}")


def add_train_decoder_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llm-jepa train-decoder`."""
    from . import decoder_stage

    decoder_stage.add_arguments(parser)


def train_decoder(options: argparse.Namespace) -> None:
    """Give a trained VL-JEPA its y_decoder."""
    from . import decoder_stage

    decoder_stage.run(options)


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llm-jepa watch`."""
    from . import watch_command

    watch_command.add_arguments(parser)


def watch(options: argparse.Namespace) -> None:
    """Caption a video or a camera."""
    from . import watch_command

    watch_command.run(options)


VERBS = {"train-decoder": (add_train_decoder_arguments, train_decoder), "watch": (add_watch_arguments, watch)}
