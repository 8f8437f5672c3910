"""VL-JEPA on real photos with real encoders, frozen: retrieval and captions of photos it never saw.

    python -m eval.vl.coco_photos --data DIR --text-encoder FOLDER [--out FILE]

DIR holds coco_open_256/ (118 photos, 5 captions each), coco_val2017_captions.json and mobilenet_v2/; FOLDER is a
sentence encoder (all-MiniLM-L6-v2). 5 folds: the predictor is trained on four of them, and on the 1000 rows of the
ImageNet classifier as if each were the feature of a photo of its class. The y_decoder and its memory are made once, of
the captions of the other images of val2017 alone: no caption of any of the 118 photos, nor its text, is in either.

What the numbers do not say: all-MiniLM-L6-v2 was itself trained on COCO captions (828,395 pairs, its model card).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification, LlamaConfig, set_seed

from llm_jepa.core.files import file_sha256, write_json
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.vl.arguments import VLJEPATrainingArguments
from llm_jepa.vl.data import Clip, ClipDataset, Pair
from llm_jepa.vl.decoder_stage import train_y_decoder
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.modeling import VLJEPAModel
from llm_jepa.vl.processing import VLJEPAProcessor
from llm_jepa.vl.trainer import VLJEPATrainer
from llm_jepa.vl.y_decoder import YDecoder

from ..graders.cider import cider_d
from ..provenance import environment, weights_sha256

FOLDS = 5


def build(data: Path, text_encoder: str, *, seed: int) -> VLJEPA:
    """Photos and texts in the space of the text encoder itself: no projection on the target side."""
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
    """The classifier's weight rows [1000, 1280], and the names of their classes."""
    classifier = AutoModelForImageClassification.from_pretrained(str(data / "mobilenet_v2"), dtype=torch.float32)
    rows = classifier.classifier.weight.detach()
    names = [classifier.config.id2label[i].split(",")[0] for i in range(len(rows))]
    return rows[1:], names[1:]  # 0 is "background"


def train_predictor(
    used: VLJEPA, features: Tensor, captions: Sequence[Sequence[str]], rows: Tensor, names: Sequence[str], *, seed: int,
    steps: int,
) -> None:  # fmt: skip
    """features [photos, 1, 1280]; class rows are given their mean and spread."""
    scaled = (rows - rows.mean()) / rows.std() * features.std() + features.mean()
    clips = [Clip(None, tuple(Pair(None, text) for text in texts)) for texts in captions]
    clips += [Clip(None, (Pair(None, f"a photo of a {name}"),)) for name in names]
    share = max(1, len(names) // len(captions))  # as many photos as class rows in a batch
    order = [*list(range(len(captions))) * share, *range(len(captions), len(clips))]
    everything = torch.cat([features, scaled[:, None].clamp_min(0)])
    with tempfile.TemporaryDirectory() as scratch:
        args = VLJEPATrainingArguments(
            output_dir=scratch, max_steps=steps, per_device_train_batch_size=64, learning_rate=5e-4,
            lr_scheduler_type="cosine", warmup_steps=20, weight_decay=0.1, y_encoder_lr_factor=0.0, save_strategy="no",
            logging_steps=steps, seed=seed, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        dataset = ClipDataset([clips[i] for i in order], num_frames=1, features=everything[order])
        VLJEPATrainer(used.model, args, dataset, processor=used.processor).train()
    used.model.eval()


def decoder_of(used: VLJEPA, data: Path, rows: list[dict[str, Any]], *, steps: int, seed: int) -> YDecoder:
    """A y_decoder of the captions of val2017 without those of our photos, and without any that reads like one."""
    photos = {row["file_name"] for row in rows}
    own = {text.strip() for row in rows for text in row["captions"]}
    coco = json.loads((data / "coco_val2017_captions.json").read_text(encoding="utf-8"))
    ours = {image["id"] for image in coco["images"] if image["file_name"] in photos}
    texts = [row["caption"].strip() for row in coco["annotations"] if row["image_id"] not in ours]
    texts = [text for text in dict.fromkeys(texts) if text not in own]
    return train_y_decoder(used, texts, steps=steps, seed=seed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with coco_open_256/, mobilenet_v2/, ...")
    parser.add_argument("--text-encoder", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--decoder", type=Path, help="folder to keep the y_decoder in, and to take it from")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--decoder-steps", type=int, default=1700)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.process_time()

    folder = options.data / "coco_open_256"
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["file_name"])
    photos = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows]
    used = build(options.data, options.text_encoder, seed=options.seed)
    with torch.no_grad():
        features = torch.cat(
            [used.model.encode_frames(used.processor(images=[photo])["pixel_values_videos"]) for photo in photos]
        )
    kept = YDecoder.from_pretrained(options.decoder) if options.decoder and options.decoder.is_dir() else None
    if kept is not None:
        decoder = kept
    else:
        decoder = decoder_of(used, options.data, rows, steps=options.decoder_steps, seed=options.seed)
        if options.decoder:
            decoder.save_pretrained(options.decoder / "y_decoder")
    assert decoder.memory is not None and decoder.decoder is not None
    if leaked := {text.strip() for row in rows for text in row["captions"]} & set(decoder.memory.texts):
        parser.error(f"{len(leaked)} captions of the photos are in the memory of {options.decoder}")

    weights, class_names = class_rows(options.data)
    order = list(range(len(rows)))
    random.Random(options.seed).shuffle(order)
    folds = [sorted(order[i::FOLDS]) for i in range(FOLDS)]
    recalls: dict[str, list[float]] = {"text_to_image_recall_at_1": [], "text_to_image_recall_at_5": []}
    raw: dict[int, Tensor] = {}
    for number, fold in enumerate(folds):
        train = [i for i in order if i not in fold]
        used = build(options.data, options.text_encoder, seed=options.seed + number)
        train_predictor(
            used, features[train], [rows[i]["captions"] for i in train], weights, class_names, seed=options.seed,
            steps=options.steps,
        )  # fmt: skip
        predicted = used.embed([photos[i] for i in fold], images=True)
        raw.update(zip(fold, predicted, strict=True))
        texts = [(place, text) for place, i in enumerate(fold) for text in rows[i]["captions"]]
        ranked = (used.embed_texts([text for _, text in texts]) @ predicted.T).argsort(dim=1, descending=True).tolist()
        ranks = [row.index(place) for row, (place, _) in zip(ranked, texts, strict=True)]
        for k in (1, 5):
            recalls[f"text_to_image_recall_at_{k}"].append(float(np.mean([rank < k for rank in ranks])))
        print(f"fold {number}: R@1 {recalls['text_to_image_recall_at_1'][-1]:.3f}", flush=True)

    everything = torch.stack([raw[i] for i in range(len(rows))])
    references = [row["captions"] for row in rows]
    written = {
        "projected on the memory": decoder.decode(everything),
        "as predicted": decoder.decoder.decode(everything, decoder.tokenizer),
        "nearest caption of the memory": decoder.memory.nearest(everything),
    }
    cider = {way: cider_d([found.text for found in texts], references)[0] for way, texts in written.items()}
    human = [
        cider_d([refs[k] for refs in references], [[*refs[:k], *refs[k + 1 :]] for refs in references])[0]
        for k in range(4)
    ]
    summary = {
        **{name: float(np.mean(values)) for name, values in recalls.items()},
        "cider": cider["projected on the memory"],
    }
    result = {
        "summary": summary,
        "folds": recalls,
        "chance_recall_at_1": float(np.mean([1 / len(fold) for fold in folds])),
        "cider": {**cider, "a human caption against the four others": float(np.mean(human))},
        "captions": [
            {"photo": row["file_name"], "caption": found.text, "score": found.score}
            for row, found in zip(rows, written["projected on the memory"], strict=True)
        ],
        "memory_texts": len(decoder.memory.texts),
        "process_seconds": time.process_time() - start,
        "settings": {"steps": options.steps, "decoder_steps": options.decoder_steps, "seed": options.seed},
        "captions_sha256": file_sha256(folder / "captions.jsonl"),
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
