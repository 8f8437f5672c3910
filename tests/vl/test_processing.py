"""Claims about `VLJEPAProcessor`: frames as transformers' own processors make them, texts whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    BertConfig,
    CLIPImageProcessorPil,
    LlamaConfig,
    MobileNetV2ImageProcessorPil,
    PreTrainedTokenizerFast,
    VideoMAEImageProcessorPil,
    ViTConfig,
    ViTImageProcessorPil,
    VJEPA2Config,
)

from llm_jepa.core.errors import UserError
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.vl.configuration import VLJEPAConfig
from llm_jepa.vl.processing import VLJEPAProcessor, frame_processor, vjepa2_frames

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's
SENTENCES = ["What happens in the video?", "a red ball falls down", "the dog sleeps"]
SMALL = {"height": 16, "width": 16}
IMAGE_PROCESSORS = {
    "vit": ViTImageProcessorPil(size=SMALL),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size=SMALL),
    "videomae": VideoMAEImageProcessorPil(size={"shortest_edge": 18}, crop_size=SMALL),
    "mobilenet_v2": MobileNetV2ImageProcessorPil(size={"shortest_edge": 20}, crop_size=SMALL),
    "crop only": ViTImageProcessorPil(do_resize=False, do_center_crop=True, crop_size=SMALL),
    "plain": ViTImageProcessorPil(do_resize=False),
    "no mean": ViTImageProcessorPil(do_resize=False, do_normalize=False),
    "no scale": ViTImageProcessorPil(do_resize=False, do_rescale=False),
    "other scale": ViTImageProcessorPil(do_resize=False, rescale_factor=1 / 100, image_mean=MEAN, image_std=STD),
}


def clip(frames: int = 4, height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([{"prompt": text, "completion": text} for text in SENTENCES], 300)


@pytest.fixture(scope="module")
def target_tokenizer() -> PreTrainedTokenizerFast:
    """Another vocabulary, and one that begins every text with a token of its own, as Llama's and Gemma's do."""
    other = train_tokenizer([{"prompt": "zebra zebra", "completion": "zebra"}], 270)
    return begins_texts(other)


def begins_texts(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    return tokenizer


def make(tokenizer: Any, target_tokenizer: Any = None, image_processor: Any = None, **options: Any) -> VLJEPAProcessor:
    return VLJEPAProcessor(
        image_processor or IMAGE_PROCESSORS["vit"], tokenizer, target_tokenizer or tokenizer,
        **{"num_frames": 4, **options},
    )  # fmt: skip


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast, target_tokenizer: PreTrainedTokenizerFast) -> VLJEPAProcessor:
    return make(tokenizer, target_tokenizer)


def pixels(processor: VLJEPAProcessor, *clips: Any) -> torch.Tensor:
    return processor(videos=list(clips))["pixel_values_videos"]


# --- pixels


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_frames_are_what_the_image_processor_makes_of_them_one_by_one(name: str, tokenizer: Any) -> None:
    """Two clips of three frames, in their order; with and without resizing, which takes a shorter way."""
    image_processor = IMAGE_PROCESSORS[name]
    clips = [clip(3, seed=1), clip(3, seed=2)]
    found = pixels(make(tokenizer, image_processor=image_processor), *clips)
    assert found.dtype == torch.float32 and found.shape[:3] == (2, 3, 3)
    for row, frames in enumerate(clips):
        for place, frame in enumerate(frames):
            alone = image_processor([Image.fromarray(frame)], return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(found[row, place], alone.reshape(found.shape[2:]).float(), atol=2e-6, rtol=2e-6)
    assert (found[0, 0] - found[0, 1]).abs().max() > 0.1


def test_without_resizing_frames_are_scaled_and_centred(tokenizer: Any) -> None:
    """By hand, channel by channel: (255 / 255 - 0.485) / 0.229 for a white pixel's red."""
    image_processor = ViTImageProcessorPil(do_resize=False, image_mean=list(MEAN), image_std=list(STD))
    frame = np.zeros((1, 4, 5, 3), dtype=np.uint8)
    frame[0, 1, 2] = [255, 51, 0]
    found = pixels(make(tokenizer, image_processor=image_processor), frame)[0, 0]
    assert found.shape == (3, 4, 5)
    expected = [(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    torch.testing.assert_close(found[:, 1, 2], torch.tensor(expected))
    torch.testing.assert_close(found[:, 2, 1], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (40, 40), (20, 30)])
def test_vjepa2_frames_equal_a_pipeline_by_hand(size: tuple[int, int], tokenizer: Any) -> None:
    """Crop 32: the shorter side becomes int(32 * 256 / 224) = 36, the middle 32 x 32 of it is kept."""
    frames = clip(2, *size)
    found = pixels(make(tokenizer, image_processor=vjepa2_frames(32)), frames)[0]
    assert found.shape == (2, 3, 32, 32)
    for frame, ours in zip(frames, found, strict=True):
        height, width = (36, int(36 * size[1] / size[0])) if size[0] <= size[1] else (int(36 * size[0] / size[1]), 36)
        image = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
        top, left = (height - 32) // 2, (width - 32) // 2
        image = image[top : top + 32, left : left + 32]
        expected = ((image / 255 - MEAN) / STD).transpose(2, 0, 1)
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_vjepa2_frames_of_256_come_from_292() -> None:
    assert vjepa2_frames().size["shortest_edge"] == 292 and vjepa2_frames(384).size["shortest_edge"] == 438


def test_arrays_tensors_and_images_are_the_same_clip(processor: VLJEPAProcessor) -> None:
    frames = clip()
    expected = pixels(processor, frames)
    for same in (torch.from_numpy(frames), list(frames), [Image.fromarray(frame) for frame in frames], tuple(frames)):
        assert torch.equal(pixels(processor, same), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_images_of_every_mode_are_read_as_rgb(processor: VLJEPAProcessor, mode: str) -> None:
    """A palette image holds numbers of colours, not colours."""
    image = Image.fromarray(clip(1)[0]).convert(mode)
    expected = pixels(processor, [image.convert("RGB")])
    assert torch.equal(pixels(processor, [image]), expected)
    assert torch.equal(processor(images=[image])["pixel_values_videos"], expected)


def test_16_bit_grey_is_its_high_byte_and_wider_values_are_refused(processor: VLJEPAProcessor) -> None:
    """PIL would turn all values above 255 to white."""
    values = np.arange(0, 64000, 1000, np.uint16).reshape(8, 8)
    expected = np.stack([values // 256] * 3, axis=2).astype(np.uint8)
    assert torch.equal(pixels(processor, [Image.fromarray(values)]), pixels(processor, [expected]))
    with pytest.raises(UserError, match="mode I does not say which value is white"):
        processor(images=[Image.fromarray(values.astype(np.int32))])


def test_grey_and_rgba_arrays(processor: VLJEPAProcessor) -> None:
    """Alpha 9 on white: 9/255 of the picture, and 246/255 of white."""
    frame = clip(1)[0]
    grey = frame[..., 0]
    assert torch.equal(pixels(processor, [grey]), pixels(processor, [np.stack([grey] * 3, axis=2)]))
    for alpha, expected in ((9, (np.round(frame * (9 / 255) + 246)).astype(np.uint8)), (255, frame), (0, frame | 255)):
        rgba = np.concatenate([frame, np.full((20, 30, 1), alpha, dtype=np.uint8)], axis=2)
        assert torch.equal(pixels(processor, [rgba]), pixels(processor, [expected]))
        assert torch.equal(pixels(processor, [Image.fromarray(rgba)]), pixels(processor, [expected]))


def test_images_are_clips_of_one_frame(processor: VLJEPAProcessor) -> None:
    """Also for an x_encoder that takes pairs of frames: it repeats a single one itself."""
    processor.frames_multiple = 2
    frames = clip(3)
    found = processor(images=[Image.fromarray(frames[0]), frames[1], frames[2]])["pixel_values_videos"]
    assert found.shape == (3, 1, 3, 16, 16)
    for i in range(3):
        assert torch.equal(found[i], pixels(processor, frames[i : i + 1])[0])


@pytest.mark.parametrize(
    ("length", "kept"),
    [
        (4, [0, 1, 2, 3]),
        (3, [0, 1, 2]),
        (8, [1, 3, 5, 7]),
        (10, [1, 3, 6, 8]),
        (5, [0, 1, 3, 4]),
        (100, [12, 37, 62, 87]),
    ],
)
def test_longer_clips_are_sampled_at_the_middle_of_equal_parts(
    processor: VLJEPAProcessor, length: int, kept: list[int]
) -> None:
    """(i + 0.5) length / 4, rounded down; shorter ones stay as they are."""
    frames = np.stack([np.full((8, 8, 3), i, dtype=np.uint8) for i in range(length)])
    expected = pixels(processor, frames[kept])
    assert torch.equal(pixels(processor, frames), expected)
    assert torch.equal(pixels(processor, list(frames)), expected)
    assert torch.equal(pixels(processor, torch.from_numpy(frames)), expected)


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([clip(1)[0]], "Clip 0 has the shape .*which is an image"),
        ([clip(), clip(1)[0]], "Clip 1"),
        ([clip().transpose(0, 3, 1, 2)], "not a clip"),
        ([clip(0)], "no frames"),
        ([[]], "no frames"),
        ([Image.fromarray(clip(1)[0])], "Clip 0 is a Image"),
        (["film.mp4"], "Clip 0 is a str.*read_clip"),
        ([clip(2), clip(4)], "2 and of 4 frames"),
        ([], "no clips"),
        ([[clip(1)[0].transpose(2, 0, 1)]], "uint8 of shape \\(3, 20, 30\\)"),
        ([[clip(1)]], "shape \\(1, 20, 30, 3\\)"),
        ([clip() / np.float32(255)], "float32"),
        ([[clip(1)[0].astype(np.int64)]], "int64"),
    ],
)
def test_what_is_no_clip_is_refused(processor: VLJEPAProcessor, videos: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        processor(videos=videos)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([clip(3)], "shape \\(3, 20, 30, 3\\)"),
        ([clip(1)[0].transpose(2, 0, 1)], "shape \\(3, 20, 30\\)"),
        ([], "no images"),
    ],
)
def test_what_is_no_image_is_refused(processor: VLJEPAProcessor, images: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        processor(images=images)


def test_frames_that_would_be_dropped_are_refused(tokenizer: Any) -> None:
    processor = make(tokenizer, frames_multiple=2)
    for count in (1, 2, 4, 7):
        assert pixels(processor, clip(count)).shape[1] == min(count, 4)
    with pytest.raises(UserError, match="Clip 1 has 3 frames; the x_encoder takes multiples of 2, and up to 4"):
        processor(videos=[clip(4), clip(3)])
    with pytest.raises(UserError, match="5 frames"):
        make(tokenizer, frames_multiple=2, num_frames=5)(videos=[clip(9)])


def test_videos_and_images_in_one_batch_are_refused(processor: VLJEPAProcessor) -> None:
    with pytest.raises(UserError, match="not both"):
        processor(videos=[clip()], images=[clip(1)[0]])


# --- texts


def test_texts_are_padded_right_by_the_tokenizer_of_their_side(
    processor: VLJEPAProcessor, tokenizer: Any, target_tokenizer: Any
) -> None:
    batch = processor(query=SENTENCES, target=SENTENCES[1:])
    for name, own, given in (("query", tokenizer, SENTENCES), ("target", target_tokenizer, SENTENCES[1:])):
        ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
        alone = [own(text)["input_ids"] for text in given]
        assert ids.shape == mask.shape == (len(given), max(map(len, alone))) and ids.dtype == mask.dtype == torch.long
        for row, tokens in enumerate(alone):
            assert ids[row, : len(tokens)].tolist() == tokens
            assert mask[row].tolist() == [1] * len(tokens) + [0] * (ids.shape[1] - len(tokens))
            assert (ids[row, len(tokens) :] == own.pad_token_id).all()
    assert set(processor(target=["a"])) == {"target_ids", "target_mask"}


def test_one_text_is_a_list_of_one(processor: VLJEPAProcessor) -> None:
    for name in ("query", "target"):
        one, listed = processor(**{name: SENTENCES[0]}), processor(**{name: SENTENCES[:1]})
        assert torch.equal(one[f"{name}_ids"], listed[f"{name}_ids"])


def test_an_empty_query_is_no_token_alone_and_among_others(target_tokenizer: Any) -> None:
    """Not even the token its tokenizer begins every text with: who asks nothing gets the same in every batch."""
    processor = make(target_tokenizer)
    assert processor(query="a")["query_mask"].sum() == 2
    assert processor(query="")["query_ids"].shape == (1, 0)
    assert processor(query=["", "a"])["query_mask"].sum(dim=1).tolist() == [0, 2]


@pytest.mark.parametrize("name", ["query", "target"])
def test_texts_beyond_the_limit_are_refused_not_cut(tokenizer: Any, name: str) -> None:
    length = len(tokenizer(SENTENCES[0])["input_ids"])
    limits = {"max_query_tokens": 100, "max_target_tokens": 100}
    kept = make(tokenizer, **{**limits, f"max_{name}_tokens": length})(**{name: SENTENCES[0]})
    assert kept[f"{name}_ids"].shape == (1, length)
    with pytest.raises(UserError, match=rf"{name} 1 has {length} tokens, the limit is {length - 1}.*What happens"):
        make(tokenizer, **{**limits, f"max_{name}_tokens": length - 1})(**{name: ["a", SENTENCES[0]]})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"query": ["a", 3]}, "query 1 is int"),
        ({"target": [None]}, "target 0 is NoneType"),
        ({"target": ["a", ""]}, "target 1 is empty"),
        ({"target": " \n"}, "target 0 is empty"),
        ({"query": []}, "no query"),
        ({"target": []}, "no target"),
    ],
)
def test_what_is_no_text_is_refused(processor: VLJEPAProcessor, texts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        processor(**texts)


def test_a_tokenizer_without_padding_pads_with_its_end(tokenizer: Any) -> None:
    other = train_tokenizer([{"prompt": "a", "completion": "b"}], 270)
    other.pad_token, other.padding_side = None, "left"
    make(other)
    assert other.pad_token == other.eos_token and other.padding_side == "right"


# --- saving, and where the pieces come from


def test_a_saved_processor_makes_the_same_tensors(tmp_path: Path, tokenizer: Any, target_tokenizer: Any) -> None:
    options = {"num_frames": 6, "frames_multiple": 2, "max_query_tokens": 30, "max_target_tokens": 40}
    processor = make(tokenizer, target_tokenizer, vjepa2_frames(32), **options)
    processor.save_pretrained(tmp_path)
    loaded = VLJEPAProcessor.from_pretrained(tmp_path)
    assert {key: getattr(loaded, key) for key in options} == options
    videos = [clip(9, seed=3), clip(6, seed=4)]
    first, second = (each(videos=videos, query=SENTENCES, target=SENTENCES) for each in (processor, loaded))
    assert first.keys() == second.keys() and first["pixel_values_videos"].shape == (2, 6, 3, 32, 32)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["query_ids"], first["target_ids"]), "two tokenizers, two vocabularies"


def model_config(**options: Any) -> VLJEPAConfig:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return VLJEPAConfig(**{
        "x_encoder_config": VJEPA2Config(crop_size=32),
        "predictor_config": LlamaConfig(**tiny),
        "y_encoder_config": BertConfig(**tiny),
        "num_frames": 6, "max_query_tokens": 7, "max_target_tokens": 9,
        **options,
    })  # fmt: skip


def test_auto_processor_finds_it_by_the_model(tmp_path: Path, tokenizer: Any) -> None:
    model_config().save_pretrained(tmp_path)
    make(tokenizer).save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is VLJEPAProcessor


def test_the_processor_of_a_model_follows_its_config(tokenizer: Any, target_tokenizer: Any) -> None:
    pieces = {"image_processor": vjepa2_frames(32), "tokenizer": tokenizer, "target_tokenizer": target_tokenizer}
    found = VLJEPAProcessor.from_parts(model_config(), **pieces)
    assert (found.num_frames, found.frames_multiple, found.max_query_tokens, found.max_target_tokens) == (6, 2, 7, 9)
    assert found.tokenizer is tokenizer and found.target_tokenizer is target_tokenizer
    assert VLJEPAProcessor.from_parts(model_config(x_encoder_config=ViTConfig()), **pieces).frames_multiple == 1


def test_pieces_come_from_where_the_parts_came_from(tmp_path: Path, tokenizer: Any, target_tokenizer: Any) -> None:
    for name, piece in (
        ("x_encoder", IMAGE_PROCESSORS["clip"]), ("predictor", tokenizer), ("y_encoder", target_tokenizer)
    ):  # fmt: skip
        piece.save_pretrained(tmp_path / name)
    (tmp_path / "x_encoder" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    sources = {
        name: {"name": str(tmp_path / name), "revision": None} for name in ("x_encoder", "predictor", "y_encoder")
    }
    found = VLJEPAProcessor.from_parts(model_config(revisions=sources))
    assert found.tokenizer(SENTENCES)["input_ids"] == tokenizer(SENTENCES)["input_ids"]
    assert found.target_tokenizer(SENTENCES)["input_ids"] == target_tokenizer(SENTENCES)["input_ids"]
    expected = pixels(make(tokenizer, image_processor=IMAGE_PROCESSORS["clip"]), clip(2))
    assert torch.equal(pixels(found, clip(2)), expected)
    other = VLJEPAProcessor.from_parts(model_config(revisions=sources), tokenizer=str(tmp_path / "y_encoder"))
    assert other.tokenizer(SENTENCES)["input_ids"] == target_tokenizer(SENTENCES)["input_ids"], (
        "what is given goes first"
    )


@pytest.mark.parametrize("missing", ["image_processor", "tokenizer", "target_tokenizer"])
def test_a_piece_that_cannot_be_found_is_named(tokenizer: Any, missing: str) -> None:
    pieces = {"image_processor": vjepa2_frames(32), "tokenizer": tokenizer, "target_tokenizer": tokenizer}
    del pieces[missing]
    with pytest.raises(UserError, match=f"give the processor its {missing}"):
        VLJEPAProcessor.from_parts(model_config(), **pieces)


@pytest.mark.parametrize(
    "written",
    [
        {
            "image_processor_type": "ViTImageProcessor",
            "size": SMALL,
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4] * 3,
        },
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 18}, "crop_size": SMALL},
    ],
    ids=["vit", "clip"],
)
def test_a_preprocessor_config_is_followed(tmp_path: Path, tokenizer: Any, written: dict[str, Any]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    kind = ViTImageProcessorPil if "ViT" in written["image_processor_type"] else CLIPImageProcessorPil
    expected = kind(**{key: value for key, value in written.items() if key != "image_processor_type"})
    found = frame_processor(str(tmp_path))
    assert type(found) is kind
    assert torch.equal(
        pixels(make(tokenizer, image_processor=found), clip(2)),
        pixels(make(tokenizer, image_processor=expected), clip(2)),
    )


@pytest.mark.parametrize("file", ["video_preprocessor_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("key", ["video_processor_type", "image_processor_type"])
@pytest.mark.parametrize("crop", [32, {"height": 32, "width": 32}])
def test_a_video_processor_of_vjepa2_becomes_a_pil_one(
    tmp_path: Path, tokenizer: Any, file: str, key: str, crop: Any
) -> None:
    """The one that ships needs torchvision. Its own size is the crop's times 256 / 224, whatever the file says."""
    written = {key: "VJEPA2VideoProcessor", "crop_size": crop, "size": {"shortest_edge": 292},
               "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}  # fmt: skip
    (tmp_path / file).write_text(json.dumps(written))
    found = frame_processor(str(tmp_path))
    expected = vjepa2_frames(32, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    first, second = (pixels(make(tokenizer, image_processor=each), clip(2, 60, 80)) for each in (found, expected))
    assert first.shape == (1, 2, 3, 32, 32) and torch.equal(first, second)
    assert not torch.equal(first, pixels(make(tokenizer, image_processor=vjepa2_frames(32)), clip(2, 60, 80)))


def test_a_folder_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot load an image processor from"):
        frame_processor(str(tmp_path))
