"""What the command line does for `family: vl`: train, dry run, `train-decoder` and `watch`.

Modules that need torch are imported inside the functions, so that help and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..core.recipe import Recipe
    from .trainer import VLJEPATrainer


def train(recipe: Recipe) -> None:
    """Train as the recipe says. Leaves a VL-JEPA in output_dir."""
    from ..core import run

    run.train(*build_trainer(recipe))


def build_trainer(recipe: Recipe) -> tuple[VLJEPATrainer, str | None]:
    """The trainer and the checkpoint to resume from. Raises UserError before anything is written."""
    from transformers import set_seed

    from ..core import run
    from .data import ClipDataset, clips_sha256
    from .loading import load_clips, load_vl_model
    from .trainer import VLJEPATrainer

    training = recipe.training
    set_seed(training.seed)
    clips, validation = load_clips(recipe.data, seed=run.data_seed(recipe))
    identity, resume = run.identify(recipe, clips_sha256(clips), clips_sha256(validation) if validation else None)
    model, processor = load_vl_model(recipe.model, clips, seed=training.seed)
    num_frames = model.config.num_frames
    held_out = ClipDataset(validation, num_frames=num_frames) if validation else None
    with run.library_refusals():
        trainer = VLJEPATrainer(model, training, ClipDataset(clips, num_frames=num_frames), held_out, processor)
    run.claim(trainer, identity)
    return trainer, resume


def dry_run(recipe: Recipe) -> None:
    """Print the first clip, the shapes of a batch of two and the size of each part. Trains and writes nothing."""
    from ..core.run import data_seed
    from .data import ClipCollator, ClipDataset
    from .loading import load_clips, load_vl_model
    from .objective import check_clips, choose_trained_parts

    training = recipe.training
    clips, validation = load_clips(recipe.data, seed=data_seed(recipe))
    model, processor = load_vl_model(recipe.model, clips, seed=training.seed)
    choose_trained_parts(model, training)
    dataset = ClipDataset(
        clips, num_frames=model.config.num_frames, pairs_per_clip=training.pairs_per_clip, seed=training.seed
    )
    check_clips(dataset, training)
    batch = ClipCollator(processor)([dataset[i] for i in range(min(2, len(dataset)))])
    print(f"# Clips\n{len(clips)} to train on, {len(validation)} for validation; the first one:")
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
