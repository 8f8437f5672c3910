"""A VL-JEPA from scratch on ShapeStream, in five to ten minutes of one CPU core: what it learns, measured.

    python -m eval.vl.shapestream --out runs/shapestream                        # everything from scratch
    python -m eval.vl.shapestream --out runs/minilm --text-encoder FOLDER       # a frozen sentence encoder as y_encoder

In stages, as the paper has them, see `STAGES`: images, then clips. Vision is learnt from images alone, and the clips'
features are computed once and cached. Vision and predictor always start from random weights. They train in bfloat16
autocast: two thirds of the time on a CPU with AVX512-BF16; one without such instructions may prefer --float32. With a
pretrained text encoder a stage of text alone comes first (`separate_events`), and the captions asked at test time are
wordings that training never had; from scratch they cannot be known, and trained wordings are asked.
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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, LlamaConfig, PreTrainedTokenizerBase, ResNetConfig, set_seed

from llm_jepa.core.files import write_json
from llm_jepa.core.pairs import compare_pairs
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.synthetic import shapestream as world
from llm_jepa.vl.arguments import VLJEPATrainingArguments
from llm_jepa.vl.data import Clip, ClipDataset, Pair
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.loading import plain_frames
from llm_jepa.vl.modeling import VLJEPAModel
from llm_jepa.vl.processing import VLJEPAProcessor
from llm_jepa.vl.trainer import VLJEPATrainer

from ..provenance import environment, weights_sha256

SIZE = 40  # pixels
DIM = 128
QUERY = "what happens in the video?"
STILL_QUERY = "what is there?"
OF_THE_END = ("count", "shape_of", "colour_of", "presence", "where")  # a still can answer these
STILL_QUESTIONS = 3  # of a clip, beside the two or three about its event


class Stage(NamedTuple):
    """steps of `batch` images or clips with up to `pairs` (query, target) pairs of each."""

    steps: int
    batch: int
    pairs: int


# In this order each is learnt in a minute or two; all at once, the questions that need a thing to be found by its name
# (presence, where, ...) stay at chance for ten. Asked for one place of an image at a time, among all that can be asked,
# it learns to name a place where there is something, and never whose it is; asked for all at once, some seeds learn it.
STAGES = {
    "images": Stage(300, 96, 1),  # what is there
    "attributes": Stage(300, 96, 2),  # that, and the shape of the red one or the colour of the star
    "places": Stage(150, 48, 4),  # that, and where each thing is
    "scenes": Stage(170, 96, 2),  # that, and anything that can be asked about an image
    "clips": Stage(850, 96, 2),  # captions, and a question; vision is frozen and its features are cached
}
# Of `separate_events`. Steps and temperature were chosen on trained phrases, of which one a kind was held out in turn;
# the whitening, that there are eight trained phrases, and that the clips' temperature stays at 0.07, while looking at
# the wordings that are never trained, on other clips than the measured ones.
WHITENED, SHRINKAGE = 64, 0.03
TEXT_STEPS, TEXT_BATCH, TEXT_TEMPERATURE = 1000, 256, 0.1
SEED_STRIDE = 1_000_000  # each seed trains on clips of its own
FIRST_MEASURED = 4_000_000  # of a split: the stages were chosen while looking at earlier ones
# Two things that meet are one of 552 pairs, the moves look alike, and rest must be told from a spin: drawn more often.
KINDS_DRAWN = (*world.KINDS, "left", "right", "up", "down", "spin", "hit", "pass", "pass", "idle")
SAME_ACTOR = 6  # clips in a row; a batch of 96 has 16 such runs


def training_clips(
    clips: Sequence[world.Clip], num_streams: int, *, wordings_per_event: int | None, seed: int
) -> list[Clip]:
    """Clips with captions and questions; and windows of training streams, with captions alone."""
    rng = random.Random(seed)

    @functools.cache
    def wordings(kind: str, actor: world.Thing | None, patient: world.Thing | None) -> tuple[Pair, ...]:
        texts = world.captions(world.Event(kind, 0.0, 1.0, actor, patient))
        texts = texts if wordings_per_event is None else rng.sample(texts, min(wordings_per_event, len(texts)))
        return tuple(Pair(QUERY, text) for text in texts)

    def captions(event: world.Event) -> tuple[Pair, ...]:
        return wordings(event.kind, event.actor, event.patient)

    windows = []
    for index in range(num_streams):
        stream = world.stream(index, split="train", size=SIZE)
        shown = [(start, event) for start, event in world.stream_windows(stream, stride=4) if event is not None]
        moving = [row for row in shown if row[1].kind != "idle"]
        still = rng.sample([row for row in shown if row[1].kind == "idle"], len(moving) // 2)
        windows += [Clip(stream.frames[at : at + world.NUM_FRAMES], captions(event)) for at, event in moving + still]

    found = []
    for clip in clips:
        of_the_end = [question for question in clip.questions if question.kind in OF_THE_END]
        asked = [question for question in clip.questions if question.kind not in OF_THE_END]
        asked += rng.sample(of_the_end, min(STILL_QUESTIONS, len(of_the_end)))
        found.append(Clip(clip.frames, (*captions(clip.event), *(Pair(q.question, q.answer) for q in asked))))
    return found + windows


def still_images(
    clips: Sequence[world.Clip], kinds: Sequence[str], *, seed: int, few_texts: bool = False
) -> list[Clip]:
    """The last frames of the clips, with what is there in any order ("a red star and a blue circle", and, where their
    places are clear, "a red star at the top left and ..."), and their questions of these kinds. few_texts: in one
    order, and every eighth image with places alone."""
    rng, found = random.Random(seed), []
    for index, clip in enumerate(clips):
        places = {q.question: q.answer for q in clip.questions if q.kind == "where"}
        texts = []
        for placed in (index % 8 == 0,) if few_texts else (False, True, True):
            parts = []
            for colour, shape in clip.objects if few_texts else rng.sample(clip.objects, len(clip.objects)):
                place = places.get(f"where is the {colour} {shape} at the end?")
                parts.append(f"a {colour} {shape} {place}" if placed and place else f"a {colour} {shape}")
            texts.append(" and ".join(parts))
        questions = [Pair(q.question, q.answer) for q in clip.questions if q.kind in kinds]
        found.append(Clip(clip.frames[-1:], (*(Pair(STILL_QUERY, text) for text in texts), *questions)))
    return found


def build(
    tokenizer: PreTrainedTokenizerBase, text_encoder: str | None, *, seed: int, stills: VLJEPAModel | None = None
) -> tuple[VLJEPAModel, VLJEPAProcessor]:
    """A CNN for each frame, and two layers of predictor. `stills` is the model of the image stage to go on from: its
    cells are single tokens; in a clip the 16 frames of a cell lie side by side in one, and at first the last one alone
    counts, so that the clip is answered as its last image was. How they change has a projection of its own. The
    temperature starts anew."""
    set_seed(seed)
    small: dict[str, Any] = {
        "hidden_size": DIM, "num_attention_heads": 4, "intermediate_size": 2 * DIM, "vocab_size": len(tokenizer),
        "initializer_range": DIM**-0.5,  # the usual 0.02 is that of a width of 2,500
        "attn_implementation": "eager",  # for 34 tokens in bfloat16 on a CPU; sdpa takes half as long again
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
        kept = {name: value for name, value in stills.state_dict().items() if name != "log_temperature"}
        model.load_state_dict({**model.state_dict(), **kept, "vision_projection.weight": inflated})
    targets = AutoTokenizer.from_pretrained(text_encoder) if text_encoder else tokenizer
    return model, VLJEPAProcessor.from_parts(
        model.config, image_processor=plain_frames(SIZE), tokenizer=tokenizer, target_tokenizer=targets
    )


def separate_events(model: VLJEPAModel, processor: VLJEPAProcessor, wordings: Sequence[Sequence[str]]) -> None:
    """Teach the target projection, on text alone, that the wordings of an event mean the same and others do not.

    In a sentence encoder's space "moves left" and "moves right" are neighbours. The predictions of a small model are
    too coarse to spread them by themselves, and what does not tell them apart cannot learn to. It starts from the
    whitening of the WHITENED largest axes, shrunk: from a random start, axes that only trained wordings have serve too.
    """
    projection = model.target_projection
    assert isinstance(projection, torch.nn.Linear)
    texts = sorted({text for group in wordings for text in group}, key=len)
    with torch.no_grad():
        pooled = torch.cat([model.pool_text(**processor(target=texts[i : i + 128])) for i in range(0, len(texts), 128)])
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
        said = [rng.sample(group, 2) for group in rng.sample(wordings, min(TEXT_BATCH, len(wordings)))]
        one, other = (projection(pooled[[row_of[pair[side]] for pair in said]]) for side in (0, 1))
        loss = compare_pairs(
            one, other, torch.arange(len(said)), objective="info_nce", temperature=TEXT_TEMPERATURE
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


class RowsInRuns(torch.utils.data.Sampler[int]):
    """Every row once, in a new order each time: `length` of a group in turn, and those of group None one by one."""

    def __init__(self, groups: Sequence[Any], length: int, *, seed: int) -> None:
        self.groups, self.length, self.rng = groups, length, random.Random(seed)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        members: dict[Any, list[int]] = {}
        for row in self.rng.sample(range(len(self.groups)), len(self.groups)):
            members.setdefault(self.groups[row], []).append(row)
        runs = [[row] for row in members.pop(None, [])]
        runs += [rows[at : at + self.length] for rows in members.values() for at in range(0, len(rows), self.length)]
        self.rng.shuffle(runs)
        return itertools.chain.from_iterable(runs)


class FewActorsAtATime(VLJEPATrainer):
    """For captions: its negatives are what else a thing might have done, more than what other things did."""

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        events = [
            next(world.slots(pair.target) for pair in clip.pairs if pair.query == QUERY)
            for clip in self.train_dataset.clips
        ]
        return RowsInRuns([event and event[1] for event in events], SAME_ACTOR, seed=self.args.seed)


def train(
    model: VLJEPAModel, processor: VLJEPAProcessor, clips: Sequence[Clip], stage: Stage, options: argparse.Namespace, *,
    cache: Path | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """cache: of clips, whose vision is frozen; its features are kept there. Their temperature stays: left to itself it
    falls to half, where a prediction need not lie where its text does, only apart from the other texts of training."""
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


def kind_prompts(clip: world.Clip, wordings: str) -> list[list[str]]:
    """The captions of each kind, about the things of the event (others of the scene where it has fewer)."""
    event = clip.event
    others = [thing for thing in (*clip.objects, *world.THINGS) if thing != event.actor]
    actor = event.actor or others[0]
    patient = event.patient or next(thing for thing in others if thing != actor)
    found = []
    for kind in world.KINDS:
        roles = world.NUM_ROLES[kind]
        said = world.Event(kind, 0.0, 1.0, actor if roles else None, patient if roles == 2 else None)
        found.append(world.captions(said, wordings=wordings))
    return found


def measure(model: VLJEPA, split: str, wordings: str, *, num_clips: int, seed: int = 0) -> dict[str, Any]:
    """Event kind (13-way, CLIP's protocol: a kind is the mean of its wordings; and with one wording of each), text to
    video retrieval of the same event, questions by candidates."""
    rng = random.Random(seed)
    measured = range(FIRST_MEASURED, FIRST_MEASURED + num_clips)
    clips = [world.clip(index, split=split, size=SIZE) for index in measured]
    features = encode(model, [clip.frames for clip in clips])
    asked = predict(model, features, list(range(num_clips)), [QUERY] * num_clips)

    prompts = [texts for clip in clips for texts in kind_prompts(clip, wordings)]
    of_kinds = {
        "all": torch.stack([F.normalize(embed(model, texts).mean(dim=0), dim=-1) for texts in prompts]),
        "one": embed(model, [rng.choice(texts) for texts in prompts]),
    }
    right = {
        name: [
            world.KINDS[kind] == clip.event.kind
            for kind, clip in zip(nearest(asked, kinds.unflatten(0, (num_clips, -1))), clips, strict=True)
        ]
        for name, kinds in of_kinds.items()
    }

    texts = [rng.choice(world.captions(clip.event, wordings=wordings)) for clip in clips]
    order = (embed(model, texts) @ asked.T).argsort(dim=1, descending=True)
    meaning = [(clip.event.kind, clip.event.actor, clip.event.patient) for clip in clips]
    ranks = [
        next(r for r, i in enumerate(row) if meaning[i] == meaning[text]) for text, row in enumerate(order.tolist())
    ]

    rows = [(i, question) for i, clip in enumerate(clips) for question in clip.questions]
    answers = predict(model, features, [i for i, _ in rows], [question.question for _, question in rows])
    by_kind: dict[str, list[bool]] = {}
    for predicted, (_, question) in zip(answers, rows, strict=True):
        best = int((embed(model, question.candidates) @ predicted).argmax())
        by_kind.setdefault(question.kind, []).append(question.candidates[best] == question.answer)
    questions = {kind: float(np.mean(hits)) for kind, hits in sorted(by_kind.items())}
    return {
        "num_clips": num_clips,
        "wordings": wordings,
        "kind_accuracy": float(np.mean(right["all"])),
        "kind_accuracy_one_wording": float(np.mean(right["one"])),
        "same_event_recall_at_1": float(np.mean([rank == 0 for rank in ranks])),
        "same_event_recall_at_10": float(np.mean([rank < 10 for rank in ranks])),
        "questions": questions,
        "questions_mean": float(np.mean(list(questions.values()))),
        "kinds": {
            kind: float(
                np.mean([hit for hit, clip in zip(right["all"], clips, strict=True) if clip.event.kind == kind])
            )
            for kind in world.KINDS
            if any(clip.event.kind == kind for clip in clips)
        },
    }


_EMBEDDED: dict[tuple[int, str], Tensor] = {}


def embed(model: VLJEPA, texts: Sequence[str]) -> Tensor:
    """[N, D]; each text through the y_encoder once a process, because candidates repeat."""
    new = sorted({text for text in texts if (id(model), text) not in _EMBEDDED}, key=len)
    for text, embedding in zip(new, model.embed_texts(new), strict=True):
        _EMBEDDED[id(model), text] = embedding
    return torch.stack([_EMBEDDED[id(model), text] for text in texts])


@torch.no_grad()
def encode(model: VLJEPA, clips: Sequence[np.ndarray]) -> Tensor:
    parts = [
        model.model.encode_frames(model.processor(videos=clips[i : i + 32])["pixel_values_videos"])
        for i in range(0, len(clips), 32)
    ]
    return torch.cat(parts)


@torch.no_grad()
def predict(model: VLJEPA, features: Tensor, clip_of_query: Sequence[int], queries: Sequence[str]) -> Tensor:
    """[B, D] of unit norm: several queries of a clip share its vision."""
    parts = []
    for start in range(0, len(queries), 128):
        batch = model.processor(query=queries[start : start + 128])
        shown, places = torch.tensor(clip_of_query[start : start + 128]).unique(return_inverse=True)
        parts.append(model.model.predict(features[shown], batch["query_ids"], batch["query_mask"], places))
    return F.normalize(torch.cat(parts), dim=-1)


def nearest(predicted: Tensor, candidates: Tensor) -> list[int]:
    """[B, D] against its own candidates [B, K, D]."""
    found: list[int] = torch.einsum("bd,bkd->bk", predicted, candidates).argmax(dim=1).tolist()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--result", type=Path, help="JSON file for the figures (default: OUT/result.json)")
    parser.add_argument("--text-encoder", help="folder of a sentence encoder, frozen; default: one from scratch")
    parser.add_argument("--clips", type=int, default=9500)
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--effort", type=float, default=1.0, help="times the steps of each stage")
    parser.add_argument("--test-clips", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for a CPU without AVX512-BF16 or AMX")
    parser.add_argument("--quick", action="store_true", help="under 45 s, to see that it runs: its figures say nothing")
    options = parser.parse_args(argv)
    if options.quick:
        options.clips, options.streams, options.effort, options.test_clips = 500, 1, 0.02, 100

    torch.set_num_threads(1)
    start = time.process_time()
    wordings_per_event = 4 if options.text_encoder else None  # each distinct text costs the sentence encoder 4 ms
    first = SEED_STRIDE * options.seed
    kinds = [KINDS_DRAWN[index % len(KINDS_DRAWN)] for index in range(options.clips)]
    drawn = [world.clip(first + index, kind=kind, size=SIZE) for index, kind in enumerate(kinds)]
    clips = training_clips(drawn, options.streams, wordings_per_event=wordings_per_event, seed=options.seed)
    asked_of = {"images": (), "attributes": ("shape_of", "colour_of"), "places": ("where",), "scenes": OF_THE_END}
    few = bool(options.text_encoder)
    rows = {
        **{name: still_images(drawn, kinds, seed=options.seed, few_texts=few) for name, kinds in asked_of.items()},
        "clips": clips,
    }
    pairs = [pair for stage in rows.values() for clip in stage for pair in clip.pairs]
    tokenizer = train_tokenizer([{"prompt": pair.query or "", "completion": pair.target} for pair in pairs], 700)
    seconds, log = {"making clips": time.process_time() - start}, {}
    model, processor = build(tokenizer, options.text_encoder, seed=options.seed)
    if options.text_encoder:
        events = {said for clip in clips if len(said := tuple(p.target for p in clip.pairs if p.query == QUERY)) > 1}
        separate_events(model, processor, sorted(events))
        seconds["targets"] = time.process_time() - start - seconds["making clips"]
    for name, stage in STAGES.items():
        before = time.process_time()
        if name == "clips":
            model, processor = build(tokenizer, options.text_encoder, seed=options.seed, stills=model)
        cache = options.out / "features" if name == "clips" else None
        log[name] = train(model, processor, rows[name], stage, options, cache=cache)
        seconds[name] = time.process_time() - before
    trained = time.process_time()
    used = VLJEPA(model, processor)
    used.save_pretrained(options.out)
    asked = "held_out" if options.text_encoder else "train"
    test = measure(used, "test", asked, num_clips=options.test_clips)
    trained_wordings = measure(used, "test", "train", num_clips=options.test_clips) if options.text_encoder else test
    result: dict[str, Any] = {
        "summary": {"process_seconds": trained - start},
        "seconds": seconds,
        "test": test,
        "trained_wordings": trained_wordings,
        "compose": measure(used, "compose", asked, num_clips=options.test_clips),
        "weights": {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()},
        "settings": {
            key: value for key, value in vars(options).items() if key not in ("out", "result", "text_encoder")
        },
        "text_encoder": Path(options.text_encoder).parent.name if options.text_encoder else "from scratch",
        "text_encoder_sha256": weights_sha256(Path(options.text_encoder)) if options.text_encoder else None,
        "world_version": world.VERSION,
        "log": log,
        "environment": environment(),
    }
    compose = result["compose"]
    result["summary"] |= {
        "kind_accuracy": test["kind_accuracy"],
        "same_event_recall_at_1": test["same_event_recall_at_1"],
        "questions_mean": test["questions_mean"],
        "presence": test["questions"]["presence"],
        "compose_kind_accuracy": compose["kind_accuracy"],
    }
    write_json(options.result or options.out / "result.json", result)
    print(json.dumps(result["summary"], indent=1))
    print(json.dumps({"test": test["questions"], "compose": compose["questions"]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
