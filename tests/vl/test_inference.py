"""Claims about the y_decoder and about `VLJEPA` in use: what is compared, what is decoded, and what never is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainingArguments,
    ViTImageProcessorPil,
    VJEPA2Config,
    pipeline,
    set_seed,
)

from llm_jepa.core.errors import UserError
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.vl.decoder_stage import read_texts
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.modeling import VLJEPAModel
from llm_jepa.vl.processing import VLJEPAProcessor
from llm_jepa.vl.y_decoder import (
    DecodedText,
    MemoryProjection,
    PrefixDecoder,
    PrefixDecoderConfig,
    YDecoder,
    fingerprint,
    train_prefix_decoder,
)
from tests.conftest import FLOAT32, UNIT32

TEXTS = ("a red ball falls", "the dog sleeps", "rain", "two birds fly over a lake", "a door opens", "she laughs")
SHARED, WORDS = 16, 300


# --- the memory


def test_projection_onto_two_texts_by_hand() -> None:
    """z = (3, 4) -> unit (0.6, 0.8), on m = (1, 0), (0, 1) at 0.5: weights softmax(1.2, 1.6)."""
    memory = MemoryProjection(torch.eye(2), ("east", "north"), temperature=0.5)
    east, north = math.exp(1.2), math.exp(1.6)
    expected = torch.tensor([[east, north]]) / math.hypot(east, north)
    torch.testing.assert_close(memory.project(torch.tensor([[3.0, 4.0]])), expected)


def test_a_small_temperature_is_the_nearest_text_and_a_large_one_their_mean() -> None:
    vectors = F.normalize(torch.tensor([[1.0, 0.2, 0.0], [0.9, -0.5, 0.3], [-0.2, 1.0, 0.7]]), dim=1)
    z = torch.tensor([[0.9, 0.6, 0.1], [-1.0, 0.9, 0.5]])
    cold = MemoryProjection(vectors, ("a", "b", "c"), temperature=1e-4).project(z)
    torch.testing.assert_close(cold, vectors[[0, 2]])
    hot = MemoryProjection(vectors, ("a", "b", "c"), temperature=1e6).project(z)
    torch.testing.assert_close(hot, F.normalize(vectors.mean(dim=0), dim=0).expand(2, 3), atol=UNIT32, rtol=0)
    between = MemoryProjection(vectors, ("a", "b", "c"), temperature=0.3).project(z)
    torch.testing.assert_close(between.norm(dim=1), torch.ones(2))
    assert (between - cold).abs().max() > 0.05 and (between - hot).abs().max() > 0.05


def test_the_nearest_text_and_its_cosine() -> None:
    memory = MemoryProjection(torch.eye(2), ("east", "north"))
    first, second = memory.nearest(torch.tensor([[3.0, 4.0], [2.0, -9.0]]))
    assert (first.text, second.text) == ("north", "east")
    assert first.score == pytest.approx(0.8) and second.score == pytest.approx(2 / math.sqrt(85))


@pytest.mark.parametrize(
    ("embeddings", "texts", "temperature"),
    [(torch.eye(2), ("a",), 0.1), (torch.empty(0, 2), (), 0.1), (torch.ones(2), ("a", "b"), 0.1),
     (torch.eye(2), ("a", "b"), 0.0), (torch.eye(2), ("a", "b"), math.nan)],
)  # fmt: skip
def test_a_memory_that_cannot_be_one_is_refused(embeddings: Tensor, texts: tuple[str, ...], temperature: float) -> None:
    with pytest.raises(ValueError, match="memory"):
        MemoryProjection(embeddings, texts, temperature)


# --- the prefix decoder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([{"prompt": text, "completion": text} for text in TEXTS], WORDS)


def gpt2(**options: Any) -> GPT2Config:
    defaults = {
        "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": WORDS, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    return GPT2Config(**{**defaults, **options})


def random_decoder(
    num_prefix: int = 3, *, noise: float = 0.0, spread: float = 0.4, words: int = WORDS
) -> PrefixDecoder:
    set_seed(0)
    config = PrefixDecoderConfig(
        lm_config=gpt2(vocab_size=words), embedding_dim=SHARED, num_prefix=num_prefix, noise=noise
    )
    decoder = PrefixDecoder(config).double().eval()
    for weight in decoder.parameters():
        torch.nn.init.normal_(weight, std=spread)
    return decoder


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_prefix", [1, 3])
def test_the_loss_is_that_of_the_texts_after_the_prefix(num_prefix: int) -> None:
    """- log p(token i | prefix, tokens before i), token by token without any padding; mean over all real tokens."""
    decoder = random_decoder(num_prefix)
    z = random(2, SHARED).requires_grad_()
    ids, lengths = torch.tensor([[5, 9, 7, 1], [8, 1, 1, 1]]), (4, 2)
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    found = decoder(z, ids, mask)
    total = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(lengths):
        unit = z[row].detach() / z[row].detach().norm()
        prefix = (decoder.prefix.weight @ unit + decoder.prefix.bias).view(num_prefix, 32)
        for i in range(length):
            context = torch.cat([prefix, decoder.lm.transformer.wte(ids[row, :i])])[None]
            scores = decoder.lm(inputs_embeds=context).logits[0, -1]
            torch.testing.assert_close(found.logits[row, i], scores)
            total = total - scores.log_softmax(-1)[ids[row, i]]
    assert found.loss.item() == pytest.approx(total.item() / 6, rel=FLOAT32)
    found.loss.backward()
    for gradient in (decoder.prefix.weight.grad, decoder.lm.transformer.h[0].attn.c_attn.weight.grad, z.grad):
        assert gradient.abs().sum() > 0
    other = ids.clone()
    other[1, 2:] = 77
    assert decoder(z, other, mask).loss.item() == found.loss.item(), "what stands in the padding is no matter"


def test_noise_is_as_long_as_it_says_and_only_in_training() -> None:
    """On a unit embedding of 16 numbers, noise 0.3: a vector of length 0.3 in the mean square."""
    decoder = random_decoder(1, noise=0.3)
    decoder.config.num_prefix = 2  # 2 x 8 instead of 1 x 32: the prefix is the embedding itself
    decoder.prefix = torch.nn.Identity()
    decoder.prefix.weight = torch.zeros((), dtype=torch.float64)
    z = random(4000, SHARED) * 7
    unit = F.normalize(z, dim=1)
    torch.testing.assert_close(decoder.prefix_of(z).flatten(1), unit)
    off = decoder.train().prefix_of(z).flatten(1) - unit
    assert off.square().sum(dim=1).mean().sqrt().item() == pytest.approx(0.3, rel=0.02)


def greedy(decoder: PrefixDecoder, z: Tensor, end: int, limit: int) -> tuple[list[int], list[float]]:
    """One row by hand: tokens without the end, log-probabilities with it."""
    context, tokens, logs = decoder.prefix_of(z[None]), [], []
    while len(logs) < limit:
        scores = decoder.lm(inputs_embeds=context).logits[0, -1].log_softmax(-1)
        best = int(scores.argmax())
        logs.append(scores[best].item())
        if best == end:
            break
        tokens.append(best)
        context = torch.cat([context, decoder.lm.transformer.wte(torch.tensor([[best]]))], dim=1)
    return tokens, logs


@pytest.mark.parametrize("pad", ["the end", "another token"])
@torch.no_grad()
def test_decoding_is_greedy_and_the_score_the_geometric_mean_probability(pad: str) -> None:
    """Some rows end early, at different places, others at the limit: each as if decoded alone."""
    words = train_tokenizer([{"prompt": "a", "completion": "b"}], WORDS)
    decoder = random_decoder(spread=0.5, words=len(words))
    z = random(12, SHARED)
    endless = [greedy(decoder, row, -1, 8)[0] for row in z]
    end = next(row[2] for row in endless if row[2] not in (0, *row[:2]))  # one row ends third, and others do not
    words.add_special_tokens({"eos_token": words.convert_ids_to_tokens(end)})
    words.add_special_tokens({"pad_token": words.eos_token if pad == "the end" else words.convert_ids_to_tokens(0)})
    expected = [greedy(decoder, row, end, 8) for row in z]
    lengths = {len(logs) for _, logs in expected}
    assert {3, 8} <= lengths, "rows that all end alike would prove little"
    for (tokens, logs), found in zip(expected, decoder.decode(z, words, max_new_tokens=8), strict=True):
        assert found.text == words.decode(tokens, skip_special_tokens=True).strip()
        assert found.score == pytest.approx(math.exp(sum(logs) / len(logs)), rel=FLOAT32)


@pytest.mark.parametrize("given", ["a config", "a model", "a model in a training"])
@torch.no_grad()
def test_the_decoder_is_causal(given: str, trained: PrefixDecoder) -> None:
    """Another token changes the logits after it, and none before: or it would learn to copy, and not to write."""
    if given == "a config":
        decoder = random_decoder().float()
    elif given == "a model":
        lm = GPT2LMHeadModel(gpt2(initializer_range=0.3))
        decoder = PrefixDecoder(PrefixDecoderConfig(lm_config=lm.config, embedding_dim=SHARED), lm).eval()
    else:
        decoder = trained
    z, ids = random(1, SHARED).float(), torch.tensor([[5, 9, 7, 8]])
    other = ids.clone()
    other[0, 2] = 44
    moved = (decoder(z, ids).logits - decoder(z, other).logits).abs().amax(dim=-1)[0]
    assert (moved[:3] < 1e-5).all() and moved[3] > 1e-3


@torch.no_grad()
def test_saved_decoders_write_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = random_decoder().float()
    decoder.save_pretrained(tmp_path)
    loaded = PrefixDecoder.from_pretrained(tmp_path)
    ours, theirs = decoder.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    z = random(5, SHARED).float()
    assert loaded.decode(z, tokenizer, max_new_tokens=6) == decoder.decode(z, tokenizer, max_new_tokens=6)


# --- training it


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder), "max_steps": 120, "per_device_train_batch_size": 6, "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine", "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "logging_steps": 60, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **options})


def embeddings_of(texts: Any) -> Tensor:
    """Unit vectors, one direction per text, whatever else is asked for at the same time."""
    return torch.stack([F.normalize(random(SHARED, seed=sum(map(ord, text))).float(), dim=0) for text in texts])


@pytest.fixture(scope="module")
def trained(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> PrefixDecoder:
    folder = tmp_path_factory.mktemp("decoder")
    set_seed(0)
    return train_prefix_decoder(embeddings_of, TEXTS, tokenizer, gpt2(), arguments(folder), noise=0.1)


def test_six_texts_are_written_from_their_embeddings(trained: PrefixDecoder, tokenizer: Any) -> None:
    order = [3, 0, 5, 1, 4, 2]
    found = trained.decode(embeddings_of([TEXTS[i] for i in order]), tokenizer)
    assert [text for text, _ in found] == [TEXTS[i] for i in order]
    assert all(score > 0.8 for _, score in found) and not trained.training


def test_a_prediction_near_a_text_is_written_as_that_text(trained: PrefixDecoder, tokenizer: Any) -> None:
    """Half of another direction added, cosine 0.89 to its text: the memory pulls it back, and then it is written."""
    z = embeddings_of(TEXTS)
    off = z + 0.5 * F.normalize(random(6, SHARED, seed=9).float(), dim=1)
    memory = MemoryProjection(z, TEXTS)
    assert (memory.project(off) * z).sum(dim=1).min() > 0.99
    y_decoder = YDecoder("x", memory, trained, tokenizer)
    assert [text for text, _ in y_decoder.decode(off)] == list(TEXTS) and y_decoder.num_calls == 6


def test_evaluation_on_other_texts_reports_a_loss(tokenizer: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
                     save_strategy="steps", save_steps=1)  # fmt: skip
    train_prefix_decoder(embeddings_of, TEXTS[:4], tokenizer, gpt2(), args, eval_texts=TEXTS[4:])
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert len([entry for entry in state["log_history"] if "eval_loss" in entry]) == 2


def test_texts_that_are_empty_or_too_long_are_counted(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    length = len(tokenizer(TEXTS[3])["input_ids"]) + 1  # and its end
    args = arguments(tmp_path, max_steps=1)
    asked: list[list[str]] = []

    def embed(texts: Any) -> Tensor:
        asked.append(list(texts))
        return embeddings_of(texts)

    train_prefix_decoder(embed, [TEXTS[3], "", "rain"], tokenizer, gpt2(), args, max_tokens=length)
    train_prefix_decoder(embed, [TEXTS[3], "", "rain"], tokenizer, gpt2(), args, max_tokens=length - 1)
    assert asked == [[TEXTS[3], "rain"], ["rain"]]
    assert "1 of 3 texts" in caplog.text and "2 of 3 texts" in caplog.text
    with pytest.raises(UserError, match="raise max_tokens"):
        train_prefix_decoder(embed, TEXTS, tokenizer, gpt2(), args, max_tokens=1)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    endless = train_tokenizer([{"prompt": "a", "completion": "b"}], WORDS)
    endless.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        train_prefix_decoder(embeddings_of, TEXTS, endless, gpt2(), arguments(tmp_path))


def test_a_given_language_model_keeps_its_weights(tokenizer: Any, tmp_path: Path) -> None:
    set_seed(3)
    lm = GPT2LMHeadModel(gpt2())
    torch.nn.init.normal_(lm.transformer.wte.weight, std=0.7)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0)
    decoder = train_prefix_decoder(embeddings_of, TEXTS, tokenizer, lm, args)
    assert all(torch.equal(value, before[name]) for name, value in decoder.lm.state_dict().items())
    spread = decoder.prefix_of(embeddings_of(TEXTS)).std().item()
    assert spread == pytest.approx(0.7, rel=0.2), "the prefix starts at the scale of the tokens it stands for"


# --- a y_decoder


def test_a_y_decoder_without_anything_or_without_words_is_refused(trained: PrefixDecoder) -> None:
    with pytest.raises(UserError, match="memory of texts, a prefix decoder, or both"):
        YDecoder("x")
    with pytest.raises(UserError, match="come together"):
        YDecoder("x", decoder=trained)


@pytest.mark.parametrize("kind", ["memory", "decoder", "both"])
def test_a_saved_y_decoder_decodes_the_same(tmp_path: Path, kind: str, trained: PrefixDecoder, tokenizer: Any) -> None:
    memory = MemoryProjection(embeddings_of(TEXTS), TEXTS, temperature=0.2) if kind != "decoder" else None
    decoder, words = (trained, tokenizer) if kind != "memory" else (None, None)
    ours = YDecoder("made for this", memory, decoder, words)
    ours.save_pretrained(tmp_path / "y_decoder")
    theirs = YDecoder.from_pretrained(tmp_path)
    assert theirs is not None and theirs.made_for == "made for this" and theirs.num_calls == 0
    assert (theirs.memory is None, theirs.decoder is None) == (kind == "decoder", kind == "memory")
    assert theirs.memory is None or (theirs.memory.temperature, theirs.memory.texts) == (0.2, TEXTS)
    z = random(4, SHARED, seed=5).float()
    for found, expected in zip(theirs.decode(z, max_new_tokens=9), ours.decode(z, max_new_tokens=9), strict=True):
        assert found.text == expected.text and found.score == pytest.approx(expected.score, rel=FLOAT32)
    assert not [path for path in (tmp_path / "y_decoder").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_a_folder_without_a_y_decoder_has_none(tmp_path: Path) -> None:
    assert YDecoder.from_pretrained(tmp_path) is None


def test_a_y_decoder_that_lacks_weights_is_refused(tmp_path: Path, trained: PrefixDecoder, tokenizer: Any) -> None:
    YDecoder("x", None, trained, tokenizer).save_pretrained(tmp_path / "y_decoder")
    (tmp_path / "y_decoder" / "manifest.json").unlink()  # as earlier versions saved
    drop(tmp_path / "y_decoder" / "model.safetensors", "prefix.weight")
    with pytest.raises(UserError, match=r"do not fit its config .*prefix.weight"):
        YDecoder.from_pretrained(tmp_path)


# --- a model in use


def begins_texts(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's do: every text begins with a token of its own, the empty one too."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    return tokenizer


def make_model(seed: int = 0, **options: Any) -> VLJEPA:
    """Random weights spread so widely that clips, questions and texts all differ."""
    set_seed(seed)
    tiny = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.4}
    model = VLJEPAModel.from_parts(
        VJEPA2Config(crop_size=16, patch_size=8, frames_per_clip=4, hidden_size=24, num_hidden_layers=1,
                     num_attention_heads=2, initializer_range=0.3, pred_hidden_size=12, pred_num_hidden_layers=1,
                     pred_num_attention_heads=1, pred_num_mask_tokens=1),
        LlamaConfig(**tiny, hidden_size=32, num_key_value_heads=1, vocab_size=WORDS),
        BertConfig(**tiny, hidden_size=16, vocab_size=WORDS),
        **{"shared_dim": SHARED, "num_frames": 4, **options},
    )  # fmt: skip
    for part in (model.vision_projection, model.output_projection, model.target_projection):
        torch.nn.init.normal_(part.weight, std=0.5)
    words = [{"prompt": "What happens in the video?", "completion": text} for text in TEXTS]
    processor = VLJEPAProcessor.from_parts(
        model.config,
        image_processor=ViTImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer=begins_texts(train_tokenizer(words, WORDS)),
        target_tokenizer=train_tokenizer(words[1:], WORDS - 10),
    )
    return VLJEPA(model, processor)


def clips(count: int, frames: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8) for _ in range(count)]


def drop(path: Path, name: str, value: Tensor | None = None) -> None:
    """The file without one tensor, or with another in its place."""
    state = {key: weight.clone() for key, weight in load_file(path).items()}
    assert name in state
    del state[name]
    save_file(state if value is None else {**state, name: value}, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def used() -> VLJEPA:
    return make_model()


@pytest.fixture(scope="module")
def saved(used: VLJEPA, trained: PrefixDecoder, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a y_decoder of a memory alone: the nearest of six texts."""
    folder = tmp_path_factory.mktemp("model")
    used.save_pretrained(folder)
    memory = MemoryProjection(used.embed_texts(TEXTS), TEXTS)
    YDecoder(fingerprint(used.model), memory).save_pretrained(folder / "y_decoder")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def cosines(used: VLJEPA, clip: np.ndarray, query: str, texts: Any) -> dict[str, float]:
    """One by one, from the model's outputs."""
    batch = used.processor(videos=[clip]) | used.processor(query=query)
    with torch.no_grad():
        predicted = used.model(**batch).predicted[0]
        targets = [used.model(**used.processor(target=text)).target[0] for text in texts]
    return {
        text: (predicted @ target / predicted.norm() / target.norm()).item()
        for text, target in zip(texts, targets, strict=True)
    }


def assert_ranked(found: Any, expected: dict[str, float]) -> None:
    assert [text for text, _ in found] == sorted(expected, key=lambda text: -expected[text])
    assert [score for _, score in found] == pytest.approx([expected[text] for text, _ in found], abs=UNIT32)
    assert found[0].score - found[-1].score > 0.05, "scores that are all alike could be in any order"


def same(found: Any, expected: Any) -> None:
    assert found.text == expected.text and found.score == pytest.approx(expected.score, abs=UNIT32)


def test_classify_and_answer_rank_by_cosine(used: VLJEPA) -> None:
    (clip,) = clips(1)
    assert_ranked(used.classify(clip, TEXTS), cosines(used, clip, used.model.config.default_query, TEXTS))
    assert_ranked(used.classify(clip, TEXTS, query="Where?"), cosines(used, clip, "Where?", TEXTS))
    answers = used.answer(clip, "Why does she laugh?", TEXTS)
    assert_ranked(answers, cosines(used, clip, "Why does she laugh?", TEXTS))
    assert answers != used.classify(clip, TEXTS), "a question must matter"


def test_retrieve_ranks_all_clips_for_each_text(used: VLJEPA) -> None:
    videos = clips(5)
    found = used.retrieve(TEXTS[:3], videos, query="Where?")
    assert len(found) == 3
    table = [cosines(used, clip, "Where?", TEXTS[:3]) for clip in videos]
    for text, ranked in zip(TEXTS, found, strict=False):
        expected = {i: row[text] for i, row in enumerate(table)}
        assert [clip for clip, _ in ranked] == sorted(expected, key=lambda i: -expected[i])
        assert [score for _, score in ranked] == pytest.approx([expected[i] for i, _ in ranked], abs=UNIT32)
    assert len({ranked[0].clip for ranked in found} | {ranked[-1].clip for ranked in found}) > 1


def test_batches_equal_one_by_one(used: VLJEPA) -> None:
    """Queries of different lengths, an empty one among them; batches that do not come out even."""
    videos, queries = clips(5), ["Where?", "", "What happens in the video and why?", "Who", "a"]
    alone = torch.cat([used.embed([clip], query) for clip, query in zip(videos, queries, strict=True)])
    for size in (2, 5):
        torch.testing.assert_close(used.embed(videos, queries, batch_size=size), alone, atol=UNIT32, rtol=0)
    texts = used.embed_texts(TEXTS, batch_size=4)
    torch.testing.assert_close(texts, torch.cat([used.embed_texts([text]) for text in TEXTS]), atol=UNIT32, rtol=0)
    for found in (alone, texts):
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
        assert (found @ found.T - torch.eye(len(found))).max() < 0.999, "all different"


def test_without_a_query_the_default_one_is_asked_and_the_empty_one_asks_nothing(used: VLJEPA) -> None:
    videos = clips(2)
    assert torch.equal(used.embed(videos), used.embed(videos, used.model.config.default_query))
    with torch.no_grad():
        nothing = F.normalize(used.model(**used.processor(videos=videos)).predicted, dim=-1)
    torch.testing.assert_close(used.embed(videos, ""), nothing, atol=UNIT32, rtol=0)
    assert (used.embed(videos) - nothing).abs().max() > 0.01


def test_nothing_gives_no_embeddings(used: VLJEPA) -> None:
    assert used.embed([]).shape == used.embed_texts([]).shape == (0, SHARED)


def test_images_are_clips_of_one_frame(used: VLJEPA, tmp_path: Path) -> None:
    """Arrays, PIL images and paths of them; a path without `images` too, one frame as in training."""
    frames = [clip[0] for clip in clips(3)]
    expected = used.embed([frame[None] for frame in frames])
    Image.fromarray(frames[1]).save(tmp_path / "second.png")
    mixed = [frames[0], str(tmp_path / "second.png"), Image.fromarray(frames[2])]
    torch.testing.assert_close(used.embed(mixed, images=True), expected, atol=UNIT32, rtol=0)
    torch.testing.assert_close(used.embed([tmp_path / "second.png"]), expected[[1]], atol=UNIT32, rtol=0)
    assert used.classify(frames[0], TEXTS, images=True) == used.classify(frames[:1], TEXTS)
    assert used.answer(frames[0], "Why?", TEXTS, images=True) == used.answer(frames[:1], "Why?", TEXTS)
    assert used.retrieve(TEXTS, frames, images=True) == used.retrieve(TEXTS, [frame[None] for frame in frames])


def test_half_precision_ranks_too() -> None:
    used = make_model()
    expected = [text for text, _ in used.classify(clips(1)[0], TEXTS)]
    used.model.bfloat16()
    found = used.classify(clips(1)[0], TEXTS)
    assert found[0].text == expected[0] and used.embed(clips(1)).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda used, clip: used.classify(clip, []), "No labels"),
        (lambda used, clip: used.classify(clip, "a dog"), "No labels"),
        (lambda used, clip: used.classify(clip, ["a dog", ""]), "target 1 is empty"),
        (lambda used, clip: used.answer(clip, "Why?", []), "No candidates"),
        (lambda used, clip: used.answer(clip, "  ", ["a"]), "question is empty"),
        (lambda used, clip: used.retrieve([], [clip]), "0 texts and 1 clips"),
        (lambda used, clip: used.retrieve(["a"], []), "1 texts and 0 clips"),
        (lambda used, clip: used.retrieve("a dog", [clip]), "list of texts"),
        (lambda used, clip: used.embed_texts("a dog"), "list of texts"),
        (lambda used, clip: used.embed([clip], ["a", "b"]), "2 queries for 1 clips"),
        (lambda used, clip: used.embed([clip, clip[:2]]), "2 and of 4 frames"),
        (lambda used, clip: used.embed(clip), "which is an image"),
    ],
)
def test_what_cannot_be_compared_is_refused(used: VLJEPA, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(used, clips(1)[0])


# --- what is decoded, and what never is


def test_only_captions_call_the_y_decoder(saved: Path) -> None:
    used = VLJEPA.from_pretrained(saved)
    videos = clips(3)
    y_decoder = used.y_decoder
    used.classify(videos[0], TEXTS)
    used.answer(videos[0], "Why?", TEXTS)
    used.retrieve(TEXTS, videos)
    used.embed(videos)
    used.embed_texts(TEXTS)
    assert y_decoder.num_calls == 0
    for i, clip in enumerate(videos, start=1):
        found = used.caption(clip)
        assert y_decoder.num_calls == i
        same(found, used.classify(clip, TEXTS)[0])  # a memory alone: the nearest of its texts
    for found, clip in zip(used.decode(used.embed(videos)), videos, strict=True):
        same(found, used.classify(clip, TEXTS)[0])
    assert y_decoder.num_calls == 6 and used.y_decoder is y_decoder, "loaded once"
    same(used.caption(videos[0], "Where?"), used.classify(videos[0], TEXTS, query="Where?")[0])
    same(used.caption(videos[0][0], images=True), used.caption(videos[0][:1]))


@pytest.mark.parametrize("damage", ["deleted", "corrupt"])
def test_without_decoding_the_y_decoder_is_not_even_read(folder: Path, damage: str) -> None:
    whole = VLJEPA.from_pretrained(folder)
    expected = (whole.classify(clips(1)[0], TEXTS), whole.retrieve(TEXTS, clips(2)))
    if damage == "deleted":
        shutil.rmtree(folder / "y_decoder")
    else:
        for path in (folder / "y_decoder").iterdir():
            path.write_text("not what it was")
    used = VLJEPA.from_pretrained(folder)
    for found, before in zip(used.classify(clips(1)[0], TEXTS), expected[0], strict=True):
        same(found, before)
    assert [row[0].clip for row in used.retrieve(TEXTS, clips(2))] == [row[0].clip for row in expected[1]]
    with pytest.raises(ValueError if damage == "corrupt" else UserError):
        used.caption(clips(1)[0])


def test_a_caption_without_a_y_decoder_says_what_to_do(folder: Path) -> None:
    for none in (make_model(), VLJEPA.from_pretrained(folder)):
        shutil.rmtree(folder / "y_decoder", ignore_errors=True)
        with pytest.raises(UserError, match="has no y_decoder.*train-decoder.*classify, answer or retrieve"):
            none.caption(clips(1)[0])


def test_captions_are_written_by_the_prefix_decoder(used: VLJEPA, tokenizer: Any, tmp_path: Path) -> None:
    """Trained on this model's own texts: their embeddings are written as they are, before and after saving."""
    set_seed(0)
    decoder = train_prefix_decoder(used.embed_texts, TEXTS, tokenizer, gpt2(), arguments(tmp_path / "run"), noise=0.1)
    memory = MemoryProjection(used.embed_texts(TEXTS), TEXTS, temperature=0.005)  # texts of random weights are alike
    whole = VLJEPA(used.model, used.processor, y_decoder=YDecoder(fingerprint(used.model), memory, decoder, tokenizer))
    assert [text for text, _ in whole.decode(used.embed_texts(TEXTS))] == list(TEXTS)
    whole.save_pretrained(tmp_path / "model")
    loaded = VLJEPA.from_pretrained(tmp_path / "model")
    assert [text for text, _ in loaded.decode(used.embed_texts(TEXTS))] == list(TEXTS)
    (clip,) = clips(1)
    found, expected = loaded.caption(clip, max_new_tokens=5), whole.caption(clip, max_new_tokens=5)
    assert found.text == expected.text and found.score == pytest.approx(expected.score, rel=FLOAT32)
    assert isinstance(found, DecodedText)


def test_a_y_decoder_made_for_another_y_encoder_is_refused(folder: Path, used: VLJEPA) -> None:
    """Loaded or given; after a change of one weight of the y_encoder, of its projection, or of the pooling."""
    memory = MemoryProjection(torch.eye(SHARED)[:2], ("a", "b"))
    with pytest.raises(UserError, match="another y_encoder"):
        VLJEPA(used.model, used.processor, y_decoder=YDecoder("of another", memory))
    for part in ("y_encoder.embeddings.word_embeddings.weight", "target_projection.bias", "pooling"):
        changed = VLJEPA.from_pretrained(folder)
        if part == "pooling":
            changed.model.config.y_pooling = "last"
        else:
            with torch.no_grad():
                changed.model.get_parameter(part).view(-1)[3] += 0.5
        with pytest.raises(UserError, match="another y_encoder.*train-decoder"):
            changed.caption(clips(1)[0])
    other = VLJEPA.from_pretrained(folder)
    with torch.no_grad():
        for name in ("predictor.norm.weight", "output_projection.bias", "log_temperature"):
            other.model.get_parameter(name).add_(0.5)
    assert other.caption(clips(1)[0]).text in TEXTS, "what places no text is no matter"


def test_a_model_cast_to_bfloat16_keeps_its_y_decoder(saved: Path) -> None:
    used = VLJEPA.from_pretrained(saved)
    used.model.bfloat16()
    assert used.caption(clips(1)[0]).text in TEXTS


# --- saving and loading


def test_a_saved_model_answers_the_same(saved: Path, used: VLJEPA) -> None:
    loaded = VLJEPA.from_pretrained(saved, device="cpu")
    assert not loaded.model.training and loaded.model.device.type == "cpu"
    torch.testing.assert_close(loaded.embed(clips(3)), used.embed(clips(3)), atol=UNIT32, rtol=0)
    torch.testing.assert_close(loaded.embed_texts(TEXTS), used.embed_texts(TEXTS), atol=UNIT32, rtol=0)


def test_a_model_saved_again_keeps_its_y_decoder(saved: Path, tmp_path: Path) -> None:
    """Asked for text before or not."""
    for asked in (False, True):
        used = VLJEPA.from_pretrained(saved)
        expected = used.caption(clips(1)[0]) if asked else None
        used.save_pretrained(tmp_path / str(asked))
        again = VLJEPA.from_pretrained(tmp_path / str(asked)).caption(clips(1)[0])
        assert again.text in TEXTS and (expected is None or again.text == expected.text)


def test_missing_weights_are_refused(folder: Path) -> None:
    for name in ("output_projection.bias", "predictor.norm.weight"):
        before = (folder / "model.safetensors").read_bytes()
        drop(folder / "model.safetensors", name)
        with pytest.raises(UserError, match=name):
            VLJEPA.from_pretrained(folder)
        (folder / "model.safetensors").write_bytes(before)
    VLJEPA.from_pretrained(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    drop(folder / "model.safetensors", "output_projection.bias", torch.zeros(3))
    with pytest.raises(UserError, match="do not fit its config .*output_projection.bias"):
        VLJEPA.from_pretrained(folder)


def test_what_is_no_vl_jepa_is_refused(tmp_path: Path, folder: Path) -> None:
    """A Llama above all: its config would be read as one of a VL-JEPA of 8 billion random weights. (Config alone here:
    with weights beside it, a loader that does not look takes all memory there is.)"""
    LlamaConfig(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="Cannot load a VL-JEPA from .*llama.*it is a llama"):
        VLJEPA.from_pretrained(tmp_path / "llama")
    (tmp_path / "broken").mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["predictor_config"]["hidden_size"] = "wide"
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="Cannot load a VL-JEPA.*hidden_size"):
        VLJEPA.from_pretrained(tmp_path / "broken")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no config.json"):
        VLJEPA.from_pretrained(tmp_path / "empty")
    with pytest.raises(UserError, match="Cannot load a VL-JEPA"):
        VLJEPA.from_pretrained("no-such/model")
    (folder / "processor_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="Cannot load a VL-JEPA"):
        VLJEPA.from_pretrained(folder)


def test_each_revision_has_its_own_y_decoder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub cache with two revisions that differ in the texts of the memory alone."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        snapshot = tmp_path / "models--us--vl" / "snapshots" / commit
        shutil.copytree(saved, snapshot)
        (snapshot / "y_decoder" / "manifest.json").unlink()
        texts = snapshot / "y_decoder" / "memory.json"
        texts.write_text(json.dumps([f"{name}: {text}" for text in json.loads(texts.read_text())]))
        reference = tmp_path / "models--us--vl" / "refs" / name
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
    here = VLJEPA.from_pretrained(saved)
    for revision, name in ((None, "main"), ("v2", "v2"), ("main", "main"), ("b" * 40, "v2")):
        used = VLJEPA.from_pretrained("us/vl", revision=revision)
        assert used.caption(clips(1)[0]).text.startswith(f"{name}: ")
        assert torch.equal(used.processor(target=TEXTS)["target_ids"], here.processor(target=TEXTS)["target_ids"])
    with pytest.raises(UserError, match="Cannot load a VL-JEPA"):
        VLJEPA.from_pretrained("us/vl", revision="v3")


# --- the pipeline


def rows(found: Any) -> list[dict[str, Any]]:
    return [{"text": text, "score": pytest.approx(score, abs=UNIT32)} for text, score in found]


def test_the_pipeline_classifies_answers_and_captions(saved: Path) -> None:
    used, pipe = VLJEPA.from_pretrained(saved), pipeline("vl-jepa", model=str(saved), device="cpu")
    first, second = clips(2)
    assert pipe({"video": first, "labels": TEXTS}) == rows(used.classify(first, TEXTS))
    assert pipe({"video": first, "labels": TEXTS, "query": "Where?"}) == rows(
        used.classify(first, TEXTS, query="Where?")
    )
    asked = {"video": first, "question": "Why?", "candidates": list(TEXTS)}
    assert pipe(asked) == rows(used.answer(first, "Why?", TEXTS))
    assert pipe({"video": first}) == pipe(first) == rows([used.caption(first)])
    assert pipe(first, labels=TEXTS) == rows(used.classify(first, TEXTS))
    assert pipe([{"video": first}, {"video": second}]) == [rows([used.caption(clip)]) for clip in (first, second)]
    image = {"video": first[0], "images": True, "labels": TEXTS}
    assert pipe(image) == rows(used.classify(first[0], TEXTS, images=True))


def test_a_pipeline_that_only_compares_needs_no_y_decoder(folder: Path) -> None:
    shutil.rmtree(folder / "y_decoder")
    pipe = pipeline("vl-jepa", model=str(folder), device="cpu")
    assert len(pipe({"video": clips(1)[0], "labels": TEXTS})) == 6
    with pytest.raises(UserError, match="has no y_decoder"):
        pipe({"video": clips(1)[0]})


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"labels": ["a"]}, {}, "'video'"),
        ({"video": 0, "label": ["a"]}, {}, "does not know label"),
        ({"video": 0, "labels": []}, {}, "No labels"),
        ({"video": 0, "question": "Why?"}, {}, "No candidates"),
        ({"video": 0}, {"top_k": 3}, "does not know top_k"),
    ],
)
def test_a_pipeline_input_that_cannot_work_is_refused(saved: Path, row: Any, options: Any, message: str) -> None:
    pipe = pipeline("vl-jepa", model=str(saved), device="cpu")
    row = {**row, "video": clips(1)[0]} if "video" in row else row
    with pytest.raises(UserError, match=message):
        pipe(row, **options)


# --- texts to learn to write


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.txt", "\ufeffone\r\n\n two \none\n".encode(), ["one", "two"]),
        ("a.jsonl", '{"target": "a\u2028b"}\n{"text": ["c", "d"]}\n'.encode(), ["a\u2028b", "c", "d"]),
    ],
)
def test_texts_are_read_line_by_line(tmp_path: Path, name: str, content: bytes, found: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == found


def test_texts_that_no_tokenizer_reads_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("good\nf\u00fcr".encode("latin-1"))
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        read_texts(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "half a pair: \\ud800"}')
    with pytest.raises(UserError, match="line 2 holds half of a surrogate pair"):
        read_texts(tmp_path / "a.jsonl")
