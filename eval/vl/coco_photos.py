"""VL-JEPA on real photos with real, frozen encoders: retrieval and captions of unseen photos.

    python -m eval.vl.coco_photos --data DIR --text-encoder FOLDER [--out FILE]

DIR holds coco_open_256/ (118 photos, 5 captions each), coco_val2017_captions.json and mobilenet_v2/. FOLDER is a
sentence encoder (all-MiniLM-L6-v2).

- There are 5 folds. The predictor is trained on four of them and tested on the fifth.
- It is also trained on the 1000 rows of the ImageNet classifier, as if each were the feature of a photo of its class.
- The y_decoder and its memory are made once, from the captions of the other images of val2017. No caption of the 118
  photos, nor any caption with the same text, is in either.

Limit of these numbers: all-MiniLM-L6-v2 was itself trained on COCO captions (828,395 pairs; see its model card).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, LlamaConfig, set_seed

from llm_jepa import UserError
from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.core.json_files import read_json
from llm_jepa.core.row_files import json_rows
from llm_jepa.lm import train_tokenizer
from llm_jepa.vl import (
    VLJEPA,
    Clip,
    ClipDataset,
    Pair,
    VLJEPAModel,
    VLJEPAProcessor,
    VLJEPATrainer,
    VLJEPATrainingArguments,
    YDecoder,
    open_frames,
    train_y_decoder,
)

from ..command import ArgumentParser, check_writable, one_line_errors, seed_number, whole
from ..graders.cider import cider_d
from ..provenance import environment, weights_sha256

FOLDS = 5
HUMAN = "a human caption against the four others"


class Photos(NamedTuple):
    names: list[str]  # file names, sorted
    images: list[np.ndarray]  # [H, W, 3] uint8
    captions: list[list[str]]  # 5 for each photo

    def all_captions(self) -> set[str]:
        return {text.strip() for text in itertools.chain.from_iterable(self.captions)}


def load_photos(data: Path) -> Photos:
    folder = data / "coco_open_256"
    rows = [row for _, row in json_rows(folder / "captions.jsonl")]
    rows.sort(key=lambda row: row["file_name"])
    names = [row["file_name"] for row in rows]
    images = [next(open_frames(folder / name)).image for name in names]
    return Photos(names, images, [row["captions"] for row in rows])


@torch.no_grad()
def encode_images(model: VLJEPA, images: Iterable[np.ndarray]) -> Tensor:
    """[images, 1, 1280]: the features of the frozen x_encoder, one image at a time."""
    pixels = (model.processor(images=[image])["pixel_values_videos"] for image in images)
    return torch.cat([model.model.encode_frames(image) for image in pixels])


def build(data: Path, text_encoder: str, *, seed: int) -> VLJEPA:
    """A model with a fresh predictor. Targets are not projected: photos are predicted in the text encoder's space."""
    tokenizer = train_tokenizer([{"prompt": "a photo", "completion": "of something"}], 300)
    set_seed(seed)
    model = VLJEPAModel.from_parts(
        x_encoder=str(data / "mobilenet_v2"),
        predictor=LlamaConfig(
            hidden_size=512,
            num_hidden_layers=2,
            num_attention_heads=8,
            intermediate_size=1024,
            vocab_size=len(tokenizer),
        ),
        y_encoder=text_encoder,
        shared_dim=384,
        project_targets=False,
        pool_frames=True,
        num_frames=1,
        default_query="",
    )
    return VLJEPA(model, VLJEPAProcessor.from_parts(model.config, tokenizer=tokenizer))


def class_rows(data: Path) -> tuple[Tensor, list[str]]:
    """The weight rows [1000, 1280] of the ImageNet classifier, and the names of their classes."""
    classifier = AutoModelForImageClassification.from_pretrained(str(data / "mobilenet_v2"), dtype=torch.float32)
    rows = classifier.classifier.weight.detach()
    names = [classifier.config.id2label[i].split(",")[0] for i in range(len(rows))]
    return rows[1:], names[1:]  # 0 is "background"


def train_predictor(
    model: VLJEPA,
    features: Tensor,
    captions: Sequence[Sequence[str]],
    class_weights: Tensor,
    class_names: Sequence[str],
    *,
    seed: int,
    steps: int,
) -> None:
    """Train on photos and on class rows.

    features: [photos, 1, 1280]. The class rows [1000, 1280] are scaled to the mean and spread of the features.
    """
    centred = (class_weights - class_weights.mean()) / class_weights.std()
    scaled = centred * features.std() + features.mean()
    all_features = torch.cat([features, scaled[:, None].clamp_min(0)])
    clips = [Clip(None, tuple(Pair(None, text) for text in texts)) for texts in captions]
    clips += [Clip(None, (Pair(None, f"a photo of a {name}"),)) for name in class_names]
    repeats = max(1, len(class_names) // len(captions))  # a batch then has as many photos as class rows
    order = [*list(range(len(captions))) * repeats, *range(len(captions), len(clips))]
    with tempfile.TemporaryDirectory() as scratch:
        args = VLJEPATrainingArguments(
            output_dir=scratch, max_steps=steps, per_device_train_batch_size=64, learning_rate=5e-4,
            lr_scheduler_type="cosine", warmup_steps=20, weight_decay=0.1, y_encoder_lr_factor=0.0, save_strategy="no",
            logging_steps=steps, seed=seed, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        dataset = ClipDataset([clips[i] for i in order], num_frames=1, features=all_features[order])
        VLJEPATrainer(model.model, args, dataset, processor=model.processor).train()
    model.model.eval()


def make_decoder(model: VLJEPA, photos: Photos, options: argparse.Namespace) -> YDecoder:
    """Train a y_decoder, or load the one in --decoder. Raises UserError if a caption of the photos is in its memory."""
    decoder = None
    if options.decoder and options.decoder.is_dir():
        decoder = YDecoder.from_pretrained(options.decoder)
    if decoder is None:
        texts = other_captions(options.data, photos)
        decoder = train_y_decoder(model, texts, steps=options.decoder_steps, seed=options.seed)
        if options.decoder:
            decoder.save_pretrained(options.decoder / "y_decoder")
    assert decoder.memory is not None and decoder.decoder is not None
    leaked = photos.all_captions() & set(decoder.memory.texts)
    if leaked:
        raise UserError(
            f"{len(leaked)} captions of the photos are in the memory of {options.decoder}; remove that folder."
        )
    return decoder


def other_captions(data: Path, photos: Photos) -> list[str]:
    """The captions of val2017, without those of our photos and without any that has the same text as one of them."""
    coco = read_json(data / "coco_val2017_captions.json")
    names = set(photos.names)
    our_images = {image["id"] for image in coco["images"] if image["file_name"] in names}
    texts = [row["caption"].strip() for row in coco["annotations"] if row["image_id"] not in our_images]
    our_texts = photos.all_captions()
    return [text for text in dict.fromkeys(texts) if text not in our_texts]


def make_folds(num_photos: int, seed: int) -> tuple[list[int], list[list[int]]]:
    """(all photo numbers in random order, the numbers of each fold)."""
    order = list(range(num_photos))
    random.Random(seed).shuffle(order)
    return order, [sorted(order[i::FOLDS]) for i in range(FOLDS)]


def retrieval_ranks(model: VLJEPA, predicted: Tensor, captions: Sequence[Sequence[str]]) -> list[int]:
    """For each caption: the rank of the first photo that has it. 0 is the best. predicted: [photos, D]."""
    texts: list[str] = []
    owners: dict[str, set[int]] = {}  # text -> the photos that it describes
    for photo, of_photo in enumerate(captions):
        texts += of_photo
        for text in of_photo:
            owners.setdefault(text.strip(), set()).add(photo)
    ranked = (model.embed_texts(texts) @ predicted.T).argsort(dim=1, descending=True).tolist()
    ranks = []
    for text, row in zip(texts, ranked, strict=True):
        ranks.append(min(row.index(photo) for photo in owners[text.strip()]))
    return ranks


def cross_validate(
    photos: Photos, features: Tensor, folds: list[list[int]], order: list[int], options: argparse.Namespace
) -> tuple[dict[str, list[float]], Tensor]:
    """Train and test one model for each fold. Returns (recalls by fold, the prediction of every photo [photos, D])."""
    class_weights, class_names = class_rows(options.data)
    recalls: dict[str, list[float]] = {"text_to_image_recall_at_1": [], "text_to_image_recall_at_5": []}
    predictions: dict[int, Tensor] = {}
    for number, fold in enumerate(folds):
        train = [i for i in order if i not in fold]
        model = build(options.data, options.text_encoder, seed=options.seed + number)
        train_predictor(
            model, features[train], [photos.captions[i] for i in train], class_weights, class_names,
            seed=options.seed, steps=options.steps,
        )  # fmt: skip
        predicted = model.embed([photos.images[i] for i in fold], images=True)
        predictions.update(zip(fold, predicted, strict=True))
        ranks = np.array(retrieval_ranks(model, predicted, [photos.captions[i] for i in fold]))
        for k in (1, 5):
            recalls[f"text_to_image_recall_at_{k}"].append(float(np.mean(ranks < k)))
        print(f"fold {number}: R@1 {recalls['text_to_image_recall_at_1'][-1]:.3f}", flush=True)
    return recalls, torch.stack([predictions[i] for i in range(len(photos.names))])


def human_cider(references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a human caption against the four others, as a mean over the first four captions."""
    scores = []
    for k in range(4):
        others = [[*texts[:k], *texts[k + 1 :]] for texts in references]
        scores.append(cider_d([texts[k] for texts in references], others)[0])
    return float(np.mean(scores))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with coco_open_256/, mobilenet_v2/, ...")
    parser.add_argument("--text-encoder", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--decoder", type=Path, help="folder to save the y_decoder in, or to load it from")
    parser.add_argument("--steps", type=whole(1), default=300)
    parser.add_argument("--decoder-steps", type=whole(1), default=1700)
    parser.add_argument("--seed", type=seed_number, default=0)
    return parser.parse_args(argv)


@one_line_errors("eval.vl.coco_photos")
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    check_writable(options.out)
    torch.set_num_threads(1)
    start = time.process_time()
    photos = load_photos(options.data)
    model = build(options.data, options.text_encoder, seed=options.seed)
    features = encode_images(model, photos.images)
    decoder = make_decoder(model, photos, options)
    order, folds = make_folds(len(photos.names), options.seed)
    recalls, predicted = cross_validate(photos, features, folds, order, options)
    assert decoder.memory is not None and decoder.decoder is not None
    written = {
        "projected on the memory": decoder.decode(predicted),
        "as predicted": decoder.decoder.decode(predicted, decoder.tokenizer),
        "nearest caption of the memory": decoder.memory.nearest(predicted),
    }
    cider = {}
    for way, texts in written.items():
        cider[way] = cider_d([caption.text for caption in texts], photos.captions)[0]
    captions = []
    for name, caption in zip(photos.names, written["projected on the memory"], strict=True):
        captions.append({"photo": name, "caption": caption.text, "score": caption.score})
    result = {
        "summary": {
            **{name: float(np.mean(values)) for name, values in recalls.items()},
            "cider": cider["projected on the memory"],
        },
        "folds": recalls,
        "chance_recall_at_1": float(np.mean([1 / len(fold) for fold in folds])),
        "cider": {**cider, HUMAN: human_cider(photos.captions)},
        "captions": captions,
        "memory_texts": len(decoder.memory.texts),
        "process_seconds": time.process_time() - start,
        "settings": {"steps": options.steps, "decoder_steps": options.decoder_steps, "seed": options.seed},
        "captions_sha256": file_sha256(options.data / "coco_open_256" / "captions.jsonl"),
        "x_encoder_sha256": weights_sha256(options.data / "mobilenet_v2"),
        "text_encoder_sha256": weights_sha256(Path(options.text_encoder)),
        "environment": environment(),
    }
    if options.out:
        write_json(options.out, result)
    print(json.dumps({key: result[key] for key in ("summary", "cider", "folds")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
