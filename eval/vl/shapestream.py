"""A VL-JEPA from scratch on ShapeStream, in five to ten minutes of one CPU core: its accuracy, measured.

    python -m eval.vl.shapestream --out runs/shapestream                        # everything from scratch
    python -m eval.vl.shapestream --out runs/minilm --text-encoder FOLDER       # a frozen sentence encoder as y_encoder

Training has stages, as in the paper: first images, then clips (see `STAGES`). Vision is learned from images alone. The
features of the clips are computed once and cached. Vision and predictor always start from random weights.

They train in bfloat16 autocast, which takes two thirds of the time on a CPU with AVX512-BF16 or AMX. On a CPU without
such instructions --float32 may be faster.

With a pretrained text encoder, a stage of text alone comes first (`separate_events`), and the test asks captions in
wordings that training never had. From scratch such wordings cannot be known, so the test asks in trained wordings.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, BertConfig, LlamaConfig, PreTrainedTokenizerBase, ResNetConfig, set_seed

from llm_jepa import compare_pairs
from llm_jepa.core.files import write_json
from llm_jepa.lm import train_tokenizer
from llm_jepa.synthetic import shapestream as world
from llm_jepa.vl import (
    VLJEPA,
    Clip,
    ClipDataset,
    Pair,
    VLJEPAModel,
    VLJEPAProcessor,
    VLJEPATrainer,
    VLJEPATrainingArguments,
    plain_frames,
)

from ..command import ArgumentParser, check_writable, number, one_line_errors, seed_number, whole
from ..provenance import environment, weights_sha256
from .shapestream_figures import QUERY, SIZE, measure

DIM = 128
STILL_QUERY = "what is there?"
OF_THE_END = ("count", "shape_of", "colour_of", "presence", "where")  # questions that a still image can answer
STILL_QUESTIONS = 3  # of a clip, in addition to the two or three about its event


class Stage(NamedTuple):
    """`steps` steps of `batch` images or clips, with up to `pairs` (query, target) pairs of each."""

    steps: int
    batch: int
    pairs: int


# In this order each stage is learned in a minute or two. If all are trained at once, the questions in which an object
# must be found by its name (presence, where, ...) stay at chance for ten minutes. With one `where` question per image,
# mixed with the other questions, the model learns to name an occupied place, but not which object is there. With all
# places of an image asked at once, some seeds learn it.
STAGES = {
    "images": Stage(300, 96, 1),  # captions of what is there
    "attributes": Stage(300, 96, 2),  # also the shape of the red one or the colour of the star
    "places": Stage(150, 48, 4),  # captions, and where each thing is
    "scenes": Stage(170, 96, 2),  # captions, and every question about an image
    "clips": Stage(850, 96, 2),  # captions, and a question; vision is frozen and its features are cached
}
# Settings of `separate_events`. Steps and temperature were chosen on trained phrases, with one phrase of each kind held
# out in turn. Three choices were made while looking at the wordings that are never trained, on other clips than the
# measured ones: the whitening, the number of trained phrases (eight), and the clips' temperature, which stays at 0.07.
WHITENED, SHRINKAGE = 64, 0.03
TEXT_STEPS, TEXT_BATCH, TEXT_TEMPERATURE = 1000, 256, 0.1
SEED_STRIDE = 1_000_000  # each seed trains on different clips
# Some kinds are drawn more often. In a meeting the two things are one of 552 pairs, the moves look similar, and rest
# must be distinguished from a spin.
KINDS_DRAWN = (*world.KINDS, "left", "right", "up", "down", "spin", "hit", "pass", "pass", "idle")
SAME_ACTOR = 6  # clips of one actor in a row; a batch of 96 has 16 such runs
# The questions of each image stage.
QUESTIONS_OF_STAGE = {
    "images": (),
    "attributes": ("shape_of", "colour_of"),
    "places": ("where",),
    "scenes": OF_THE_END,
}
PATHS = ("out", "result", "text_encoder")  # options that name a path; result files hold none
QUICK = {"clips": 500, "streams": 1, "effort": 0.02, "test_clips": 100}


def training_clips(
    clips: Sequence[world.Clip], num_streams: int, *, wordings_per_event: int | None, seed: int
) -> list[Clip]:
    """Clips with captions and questions, then windows of training streams with captions alone."""
    rng = random.Random(seed)

    @functools.cache
    def wordings(kind: str, actor: world.Thing | None, patient: world.Thing | None) -> tuple[Pair, ...]:
        texts = world.captions(world.Event(kind, 0.0, 1.0, actor, patient))
        if wordings_per_event is not None:
            texts = rng.sample(texts, min(wordings_per_event, len(texts)))
        return tuple(Pair(QUERY, text) for text in texts)

    def captions(event: world.Event) -> tuple[Pair, ...]:
        return wordings(event.kind, event.actor, event.patient)

    windows = []
    for index in range(num_streams):
        stream = world.stream(index, split="train", size=SIZE)
        moving, resting = [], []
        for start, event in world.stream_windows(stream, stride=4):
            if event is None:
                continue
            if event.kind == "idle":
                resting.append((start, event))
            else:
                moving.append((start, event))
        for start, event in moving + rng.sample(resting, len(moving) // 2):
            windows.append(Clip(stream.frames[start : start + world.NUM_FRAMES], captions(event)))

    with_questions = []
    for clip in clips:
        of_the_end = [question for question in clip.questions if question.kind in OF_THE_END]
        questions = [question for question in clip.questions if question.kind not in OF_THE_END]
        questions += rng.sample(of_the_end, min(STILL_QUESTIONS, len(of_the_end)))
        answers = [Pair(question.question, question.answer) for question in questions]
        with_questions.append(Clip(clip.frames, (*captions(clip.event), *answers)))
    return with_questions + windows


def still_images(
    clips: Sequence[world.Clip], kinds: Sequence[str], *, seed: int, few_texts: bool = False
) -> list[Clip]:
    """The last frames of the clips, with captions of what is there, and with their questions of these kinds.

    There are three captions of each image, in random orders: one without places ("a red star and a blue circle"), two
    with places ("a red star at the top left and ..."). An object without a clear place is named without one.
    few_texts: one caption of each image, in one order; every eighth has places.
    """
    rng, images = random.Random(seed), []
    for index, clip in enumerate(clips):
        if few_texts:
            texts = [_scene(clip, clip.objects, with_places=index % 8 == 0)]
        else:
            texts = []
            for with_places in (False, True, True):
                order = rng.sample(clip.objects, len(clip.objects))
                texts.append(_scene(clip, order, with_places=with_places))
        pairs = [Pair(STILL_QUERY, text) for text in texts]
        pairs += [Pair(question.question, question.answer) for question in clip.questions if question.kind in kinds]
        images.append(Clip(clip.frames[-1:], tuple(pairs)))
    return images


def _scene(clip: world.Clip, objects: Sequence[world.Thing], *, with_places: bool) -> str:
    """The caption of a still: its objects in this order, with the places that are clear."""
    places = {question.question: question.answer for question in clip.questions if question.kind == "where"}
    parts = []
    for colour, shape in objects:
        part = f"a {colour} {shape}"
        place = places.get(f"where is the {colour} {shape} at the end?")
        if with_places and place:
            part += f" {place}"
        parts.append(part)
    return " and ".join(parts)


def build(
    tokenizer: PreTrainedTokenizerBase, text_encoder: str | None, *, seed: int, stills: VLJEPAModel | None = None
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """A model with a CNN for each frame and two layers of predictor.

    stills: the model of the image stages to continue from. Its tokens are single cells of one frame. In a clip, a token
    holds the same cell of all 16 frames. At first only the last frame counts, so a clip is answered as its last image
    was. Changes between the frames have a separate projection. The temperature starts at its default again.
    """
    set_seed(seed)
    small: dict[str, Any] = {
        "hidden_size": DIM, "num_attention_heads": 4, "intermediate_size": 2 * DIM, "vocab_size": len(tokenizer),
        "initializer_range": DIM**-0.5,  # the usual 0.02 suits a width of 2,500
        "attn_implementation": "eager",  # for 34 tokens in bfloat16 on a CPU; sdpa takes 1.5 times as long
    }  # fmt: skip
    scratch = BertConfig(num_hidden_layers=1, hidden_dropout_prob=0.0, **small)
    cnn = ResNetConfig(embedding_size=24, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic")
    num_frames = world.NUM_FRAMES if stills else 1
    model = VLJEPAModel.from_parts(
        x_encoder=stills.x_encoder if stills else cnn,
        predictor=stills.predictor if stills else LlamaConfig(num_hidden_layers=2, **small),
        y_encoder=stills.y_encoder if stills else text_encoder or scratch,
        shared_dim=DIM,
        frame_size=SIZE,
        token_merge=[num_frames, 1, 1],
        grid_positions=True,
        motion_dim=DIM if stills else 0,
        num_frames=num_frames,
        default_query=QUERY if stills else STILL_QUERY,
        y_pooling="mean",
    )
    if stills is not None:
        inflated = torch.zeros_like(model.vision_projection.weight)
        inflated[:, -stills.vision_projection.in_features :] = stills.vision_projection.weight.detach()
        learned = {name: value for name, value in stills.state_dict().items() if name != "log_temperature"}
        model.load_state_dict({**model.state_dict(), **learned, "vision_projection.weight": inflated})
    targets = AutoTokenizer.from_pretrained(text_encoder) if text_encoder else tokenizer
    return model, VLJEPAProcessor.from_parts(
        model.config, image_processor=plain_frames(SIZE), tokenizer=tokenizer, target_tokenizer=targets
    )


def separate_events(model: VLJEPAModel, processor: VLJEPAProcessor, wordings: Sequence[Sequence[str]]) -> None:
    """Train the target projection on text alone: wordings of one event come together, different events apart.

    In the space of a sentence encoder, "moves left" and "moves right" are neighbours. The predictions of a small model
    are too coarse to separate them, so the projection must do it before. It starts from the whitening of the WHITENED
    largest axes, shrunk. A random start would also use axes that only the trained wordings have.
    """
    projection = model.target_projection
    assert isinstance(projection, torch.nn.Linear)
    texts = sorted(set(itertools.chain.from_iterable(wordings)), key=len)
    with torch.no_grad():
        batches = (processor(target=texts[i : i + 128]) for i in range(0, len(texts), 128))
        pooled = torch.cat([model.pool_text(**batch) for batch in batches])  # [texts, width of the encoder]
        mean = pooled.mean(dim=0)
        variances, axes = torch.linalg.eigh((pooled - mean).T @ (pooled - mean) / len(pooled))  # ascending
        whitening = (axes[:, -WHITENED:] / (variances[-WHITENED:] + SHRINKAGE).sqrt()).T
        turned = torch.linalg.qr(torch.randn(model.config.shared_dim, len(whitening))).Q @ whitening
        projection.weight.copy_(turned)
        projection.bias.copy_(-turned @ mean)
    row_of = {text: row for row, text in enumerate(texts)}
    optimizer = torch.optim.AdamW(projection.parameters(), lr=2e-3, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEXT_STEPS)
    rng = random.Random(0)
    for _ in range(TEXT_STEPS):
        pairs = [rng.sample(group, 2) for group in rng.sample(wordings, min(TEXT_BATCH, len(wordings)))]
        one = projection(pooled[[row_of[first] for first, _ in pairs]])
        other = projection(pooled[[row_of[second] for _, second in pairs]])
        loss = compare_pairs(
            one, other, torch.arange(len(pairs)), objective="info_nce", temperature=TEXT_TEMPERATURE
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


class RowsInRuns(torch.utils.data.Sampler[int]):
    """Every row once, in a new order for each pass: `length` rows of one group in a row, rows of group None singly."""

    def __init__(self, groups: Sequence[Any], length: int, *, seed: int) -> None:
        self.groups, self.length, self.rng = groups, length, random.Random(seed)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        members: dict[Any, list[int]] = {}
        for row in self.rng.sample(range(len(self.groups)), len(self.groups)):
            members.setdefault(self.groups[row], []).append(row)
        runs = [[row] for row in members.pop(None, [])]
        for rows in members.values():
            runs += [rows[start : start + self.length] for start in range(0, len(rows), self.length)]
        self.rng.shuffle(runs)
        return itertools.chain.from_iterable(runs)


class FewActorsAtATime(VLJEPATrainer):
    """Puts clips of one actor into a batch. So the negatives of a caption are other events of the same thing."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        actors = []
        for clip in self.train_dataset.clips:
            caption = next(pair.target for pair in clip.pairs if pair.query == QUERY)
            slots = world.slots(caption)  # (kind, actor, patient)
            actors.append(slots and slots[1])
        return RowsInRuns(actors, SAME_ACTOR, seed=self.args.seed)


def train(
    model: VLJEPAModel, processor: VLJEPAProcessor, clips: Sequence[Clip], stage: Stage, options: argparse.Namespace, *,
    cache: Path | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train one stage; return the log.

    cache: the folder for the features of clips, whose vision is frozen. The temperature of clips is fixed. If it were
    learned, it would fall to half of its value. A prediction then only has to be far from the other texts of training,
    and not near its own text.
    """
    args = VLJEPATrainingArguments(
        output_dir=str(options.out), max_steps=max(1, round(options.effort * stage.steps)),
        per_device_train_batch_size=stage.batch, pairs_per_clip=stage.pairs,
        learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=30, weight_decay=0.2, max_grad_norm=1.0,
        x_encoder_trainable_layers=0 if cache else -1, feature_cache=str(cache) if cache else None,
        y_encoder_lr_factor=0.0 if options.text_encoder else 1.0, logging_steps=100, save_strategy="no",
        learn_temperature=cache is None, seed=options.seed, use_cpu=True, bf16=not options.float32,
    )  # fmt: skip
    trainer_class = FewActorsAtATime if cache else VLJEPATrainer
    trainer = trainer_class(model, args, ClipDataset(clips, num_frames=model.config.num_frames), processor=processor)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def training_rows(options: argparse.Namespace) -> dict[str, list[Clip]]:
    """The images or clips of every stage."""
    first = SEED_STRIDE * options.seed
    kinds = [KINDS_DRAWN[index % len(KINDS_DRAWN)] for index in range(options.clips)]
    drawn = [world.clip(first + index, kind=kind, size=SIZE) for index, kind in enumerate(kinds)]
    few_texts = bool(options.text_encoder)  # each distinct text costs the sentence encoder 4 ms
    wordings_per_event = 4 if few_texts else None
    clips = training_clips(drawn, options.streams, wordings_per_event=wordings_per_event, seed=options.seed)
    rows = {}
    for name, questions in QUESTIONS_OF_STAGE.items():
        rows[name] = still_images(drawn, questions, seed=options.seed, few_texts=few_texts)
    return {**rows, "clips": clips}


def all_wordings(clips: Sequence[Clip]) -> list[tuple[str, ...]]:
    """The wordings of every event that has several, without repetitions."""
    events = set()
    for clip in clips:
        wordings = tuple(pair.target for pair in clip.pairs if pair.query == QUERY)
        if len(wordings) > 1:
            events.add(wordings)
    return sorted(events)


def tokenizer_of(rows: dict[str, list[Clip]]) -> PreTrainedTokenizerBase:
    """Byte-level BPE of all queries and targets."""
    texts = []
    for clip in itertools.chain.from_iterable(rows.values()):
        texts += [{"prompt": pair.query or "", "completion": pair.target} for pair in clip.pairs]
    return train_tokenizer(texts, 700)


def train_all(
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, list[Clip]],
    options: argparse.Namespace,
    seconds: dict[str, float],
) -> tuple[VLJEPA, dict[str, list[dict[str, float]]]]:
    """Train all stages. Returns (model, log by stage) and writes the process seconds of each stage into `seconds`."""
    before = time.process_time()
    model, processor = build(tokenizer, options.text_encoder, seed=options.seed)
    if options.text_encoder:
        separate_events(model, processor, all_wordings(rows["clips"]))
        seconds["targets"] = time.process_time() - before
    log = {}
    for name, stage in STAGES.items():
        before = time.process_time()
        cache = None
        if name == "clips":
            model, processor = build(tokenizer, options.text_encoder, seed=options.seed, stills=model)
            cache = options.out / "features"
        log[name] = train(model, processor, rows[name], stage, options, cache=cache)
        seconds[name] = time.process_time() - before
    return VLJEPA(model, processor), log


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--result", type=Path, help="JSON file for the figures (default: OUT/result.json)")
    parser.add_argument("--text-encoder", help="folder of a sentence encoder, which is frozen (default: from scratch)")
    parser.add_argument("--clips", type=whole(1), default=9500)
    parser.add_argument("--streams", type=whole(1), default=6)
    parser.add_argument(
        "--effort", type=number(0, 1000, above=True), default=1.0, help="factor for the steps of each stage"
    )
    parser.add_argument("--test-clips", type=whole(1), default=3000)
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for a CPU without AVX512-BF16 or AMX")
    parser.add_argument("--quick", action="store_true", help="a test run in under 45 s; its figures mean nothing")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    return options


@one_line_errors("eval.vl.shapestream")
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    check_writable(options.result)
    torch.set_num_threads(1)
    start = time.process_time()
    rows = training_rows(options)
    tokenizer = tokenizer_of(rows)
    seconds = {"making clips": time.process_time() - start}
    model, log = train_all(tokenizer, rows, options, seconds)
    training_seconds = time.process_time() - start
    model.save_pretrained(options.out)
    wordings = "held_out" if options.text_encoder else "train"
    test = measure(model, "test", wordings, num_clips=options.test_clips)
    trained_wordings = test
    if options.text_encoder:
        trained_wordings = measure(model, "test", "train", num_clips=options.test_clips)
    compose = measure(model, "compose", wordings, num_clips=options.test_clips)
    text_encoder = Path(options.text_encoder) if options.text_encoder else None
    result: dict[str, Any] = {
        "summary": {
            "process_seconds": training_seconds,
            "kind_accuracy": test["kind_accuracy"],
            "same_event_recall_at_1": test["same_event_recall_at_1"],
            "questions_mean": test["questions_mean"],
            "presence": test["questions"]["presence"],
            "compose_kind_accuracy": compose["kind_accuracy"],
        },
        "seconds": seconds,
        "test": test,
        "trained_wordings": trained_wordings,
        "compose": compose,
        "weights": {name: _num_weights(part) for name, part in model.model.named_children()},
        "settings": {name: value for name, value in vars(options).items() if name not in PATHS},
        "text_encoder": text_encoder.parent.name if text_encoder else "from scratch",
        "weights_sha256": weights_sha256(options.out),
        "text_encoder_sha256": weights_sha256(text_encoder) if text_encoder else None,
        "world_version": world.VERSION,
        "log": log,
        "environment": environment(),
    }
    write_json(options.result or options.out / "result.json", result)
    print(json.dumps(result["summary"], indent=1))
    print(json.dumps({"test": test["questions"], "compose": compose["questions"]}, indent=1))
    return 0


def _num_weights(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


if __name__ == "__main__":
    sys.exit(main())
