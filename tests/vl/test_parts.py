"""Parts of a new VL-JEPA: loaded with their weights, shortened, recorded, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    set_seed,
)

from llm_jepa.core.errors import UserError
from llm_jepa.vl.configuration import VLJEPAConfig
from llm_jepa.vl.modeling import VLJEPAModel
from llm_jepa.vl.parts import last_layers
from tests.vl.tiny import (
    BASE,
    BERT,
    FAMILIES,
    HIDDEN,
    IMAGE_ENCODERS,
    SHARED,
    VISUAL,
    VIT,
    VJEPA2,
    VOCABULARY,
    Y_HIDDEN,
    assert_close,
    assert_same,
    build,
    fresh,
    predictor_config,
    random,
    texts,
)


def test_last_layers_equal_a_loop_over_the_last_layers() -> None:
    set_seed(0)
    full = LlamaModel(LlamaConfig(**{**BASE, "num_hidden_layers": 5})).double().eval()
    for weight in full.parameters():
        nn.init.normal_(weight, std=0.3)
    shorter = last_layers(full, 2)
    tokens, places = random(2, 6, HIDDEN), torch.arange(6)[None]
    states = tokens
    mask = torch.full((6, 6), -math.inf, dtype=torch.float64).triu(1)[None, None]
    for layer in full.layers[3:]:
        states = layer(
            states, attention_mask=mask, position_ids=places, position_embeddings=full.rotary_emb(states, places)
        )
    assert_close(shorter(inputs_embeds=tokens).last_hidden_state, full.norm(states))
    assert torch.equal(shorter.embed_tokens.weight, full.embed_tokens.weight)
    assert torch.equal(shorter.norm.weight, full.norm.weight)
    assert shorter.config.num_hidden_layers == len(shorter.layers) == 2 and full.config.num_hidden_layers == 5
    assert shorter.dtype == torch.float64 and not shorter.training


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3", "mistral", "phi3"])
@torch.no_grad()
def test_last_layers_keep_the_kind_of_each_layer(family: str) -> None:
    """Five layers of two kinds, cut to three: equal to the whole whose first two layers pass on what they get."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] + ["sliding_attention"] * 2 + ["full_attention"]}
    config = predictor_config(family, num_hidden_layers=5, **(kinds if "layer_types" in FAMILIES[family] else {}))
    config.is_causal = False
    set_seed(0)
    full = AutoModel.from_config(config, dtype=torch.float64).eval()
    tokens = random(2, 12, HIDDEN)
    found = last_layers(full, 3)(inputs_embeds=tokens, use_cache=False).last_hidden_state
    for layer in full.layers[:2]:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    assert_close(found, full(inputs_embeds=tokens, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("count", [0, -1, 3])
def test_more_or_fewer_layers_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(UserError, match="choose 1 to 2"):
        build(num_predictor_layers=count)


def test_from_parts_keeps_the_last_layers() -> None:
    assert build(num_predictor_layers=1).config.predictor_config.num_hidden_layers == 1


def test_parts_keep_their_weights(tmp_path: Path) -> None:
    """As a model, from a folder, and as the base of a causal LM: never drawn anew when they are put together."""
    set_seed(1)
    lm, text = LlamaForCausalLM(LlamaConfig(**BASE)), BertModel(fresh(BERT))
    for part in (lm, text):
        for weight in part.parameters():
            nn.init.normal_(weight)
    lm.save_pretrained(tmp_path / "lm")
    text.save_pretrained(tmp_path / "text")
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    words = text.embeddings.word_embeddings.weight.clone()
    for predictor, y_encoder in ((str(tmp_path / "lm"), str(tmp_path / "text")), (lm, text), (lm.model, text)):
        model = build(predictor=predictor, y_encoder=y_encoder, dtype=torch.float32)
        assert type(model.predictor) is LlamaModel
        assert all(torch.equal(value, weights[name]) for name, value in model.predictor.state_dict().items())
        assert torch.equal(model.y_encoder.embeddings.word_embeddings.weight, words)


def test_revisions_are_recorded_as_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub cache with two commits of a predictor: a branch may be another commit tomorrow."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commits = {"main": "a" * 40, "v1": "b" * 40}
    cached = tmp_path / "models--us--lm"
    (cached / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        LlamaModel(LlamaConfig(**BASE)).save_pretrained(cached / "snapshots" / commit)
        (cached / "refs" / name).write_text(commit)
    asked_and_got: list[tuple[dict[str, str], str]] = [
        ({}, commits["main"]), ({"predictor": "v1"}, commits["v1"]), ({"predictor": commits["v1"]}, commits["v1"]),
    ]  # fmt: skip
    for asked, commit in asked_and_got:
        model = build(predictor="us/lm", revisions=asked, dtype=torch.float32)
        assert model.config.revisions == {"predictor": {"name": "us/lm", "revision": commit}}
        here = LlamaModel.from_pretrained(cached / "snapshots" / commit)
        assert torch.equal(model.predictor.embed_tokens.weight, here.embed_tokens.weight)


def test_revisions_are_recorded_and_saved(tmp_path: Path) -> None:
    LlamaModel(LlamaConfig(**BASE)).save_pretrained(tmp_path / "lm")
    model = build(predictor=str(tmp_path / "lm"), revisions={"predictor": "v1.2"}, dtype=torch.float32)
    model.save_pretrained(tmp_path / "vl")
    expected = {"predictor": {"name": str(tmp_path / "lm"), "revision": "v1.2"}}
    assert AutoConfig.from_pretrained(tmp_path / "vl").revisions == expected
    with pytest.raises(UserError, match="revisions names vision"):
        build(revisions={"vision": "v1"})


@torch.no_grad()
def test_of_a_clip_the_tower_that_was_asked_for_is_taken(tmp_path: Path) -> None:
    set_seed(0)
    tower = {**VIT, "initializer_range": 0.3}
    clip = CLIPModel(CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        text_config={**tower, "hidden_size": Y_HIDDEN, "vocab_size": VOCABULARY, "eos_token_id": 2},
    ))  # fmt: skip
    clip.save_pretrained(tmp_path)
    frames, ids = random(1, 1, 3, 32, 32).float(), texts(4)[0]
    for part in (str(tmp_path), clip):
        model = build(part, y_encoder=part, dtype=torch.float32)
        assert torch.equal(model.encode_frames(frames), clip.vision_model(pixel_values=frames[0]).last_hidden_state)
        text = clip.text_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert torch.allclose(model.pool_text(ids), text.mean(dim=1), atol=1e-6)
        model.save_pretrained(tmp_path / "vl")
        assert_same(AutoModel.from_pretrained(tmp_path / "vl"), model)


@pytest.mark.parametrize("part", ["x_encoder", "predictor", "y_encoder"])
def test_a_part_that_cannot_be_loaded_is_named(part: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"Cannot load the {part}"):
        build(**{part: str(tmp_path)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"project_targets": False}, f"shared_dim={SHARED} is not the y_encoder's {Y_HIDDEN}"),
        ({"shared_dim": 0}, "must be 1 or more"),
        ({"num_frames": 0}, "must be 1 or more"),
        ({"max_query_tokens": 0}, "must be 1 or more"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 0.005}, "0.01 or more"),
        ({"y_pooling": "max"}, "y_pooling='max'"),
        ({"y_poling": "last"}, "no option y_poling"),
        ({"token_merge": [2, 2]}, "three numbers"),
        ({"grid_positions": True, "pool_frames": True}, "tokens of a frame on a grid"),
        ({"token_merge": [1, 0, 1]}, "1 or more"),
        ({"motion_dim": 8}, "motion_dim=8 needs several frames in one token"),
        ({"motion_dim": -1, "token_merge": [2, 1, 1]}, "motion_dim=-1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


@torch.no_grad()
def test_each_part_keeps_its_own_attention(tmp_path: Path) -> None:
    parts = {
        "x_encoder": AutoModel.from_config(fresh(VJEPA2), attn_implementation="eager"),
        "y_encoder": AutoModel.from_config(fresh(BERT), attn_implementation="sdpa"),
    }

    def kinds(model: VLJEPAModel) -> list[str]:
        return [getattr(model, name).config._attn_implementation for name in ("x_encoder", "predictor", "y_encoder")]

    for attention in ("eager", "sdpa"):
        model = build(**parts, attention=attention, dtype=torch.float32)
        assert kinds(model) == ["eager", attention, "sdpa"]
        assert model.predictor.layers[0].self_attn.config._attn_implementation == attention
    model.save_pretrained(tmp_path)
    chosen = {"x_encoder_config": "sdpa", "predictor_config": "eager", "y_encoder_config": "sdpa"}
    assert kinds(VLJEPAModel.from_pretrained(tmp_path, attn_implementation=chosen)) == ["sdpa", "eager", "sdpa"]


def test_a_config_alone_knows_its_visual_size() -> None:
    parts = {"predictor_config": predictor_config(), "y_encoder_config": fresh(BERT)}
    for x_encoder in (fresh(VJEPA2), AutoConfig.for_model("resnet", **IMAGE_ENCODERS["resnet"])):
        assert VLJEPAConfig(x_encoder_config=x_encoder, **parts).visual_dim == VISUAL
    with pytest.raises(ValueError, match="give visual_dim"):
        VLJEPAConfig(x_encoder_config=AutoConfig.for_model("mobilenet_v2"), **parts)


def sentence_folder(path: Path, *modes: str, dense: bool = False) -> str:
    BertModel(fresh(BERT)).save_pretrained(path)
    names = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {f"pooling_mode_{mode}": mode in modes for mode in known}
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": Y_HIDDEN, **pooling, "include_prompt": True})
    )
    return str(path)


@pytest.mark.parametrize(("mode", "expected"), [("mean_tokens", "mean"), ("cls_token", "first"), ("lasttoken", "last")])
def test_a_sentence_transformers_folder_says_how_it_pools(tmp_path: Path, mode: str, expected: str) -> None:
    folder = sentence_folder(tmp_path, mode)
    assert build(y_encoder=folder).config.y_pooling == expected
    assert build(y_encoder=folder, y_pooling="first").config.y_pooling == "first", "what is said goes first"


def test_dense_layers_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(y_encoder=sentence_folder(tmp_path / "plain", "mean_tokens"))
    assert "Dense" not in caplog.text
    build(y_encoder=sentence_folder(tmp_path / "dense", "mean_tokens", dense=True))
    assert "Dense layers are left out" in caplog.text


@pytest.mark.parametrize("modes", [("max_tokens",), ("mean_tokens", "cls_token"), ()])
def test_pooling_that_is_not_possible_is_refused(tmp_path: Path, modes: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="pools by"):
        build(y_encoder=sentence_folder(tmp_path, *modes))


def test_a_folder_that_says_nothing_is_pooled_by_the_mean(tmp_path: Path) -> None:
    BertModel(fresh(BERT)).save_pretrained(tmp_path)
    assert build(y_encoder=str(tmp_path)).config.y_pooling == "mean"
