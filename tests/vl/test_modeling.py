"""Claims about `VLJEPAConfig` and `VLJEPAModel`: who sees whom, what is averaged, what a saved model is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    ViTConfig,
)

from llm_jepa.core.errors import UserError
from llm_jepa.core.losses import info_nce
from llm_jepa.vl.modeling import VLJEPAModel, merge_tokens
from tests.vl.tiny import (
    BASE,
    BERT,
    FAMILIES,
    GEMMA,
    HIDDEN,
    IMAGE_ENCODERS,
    SHARED,
    VISUAL,
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


@pytest.fixture(scope="module")
def model() -> VLJEPAModel:
    return build()


# --- the prediction


@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 2, 4)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prediction_and_gradients_equal_a_decoder_with_a_mask_that_shows_all(
    attention: str, lengths: tuple[int, ...]
) -> None:
    """A plain causal LlamaModel, its mask replaced by an explicit [B, 1, S, S]; concatenation, mean and map by hand."""
    model = build(attention=attention)
    ids, mask = texts(*lengths)
    features = random(3, 8, VISUAL).requires_grad_()
    weight = random(3, SHARED, seed=2)
    predicted = model.predict(features, ids, mask)
    (predicted * weight).sum().backward()

    config = LlamaConfig(**BASE)
    config._attn_implementation = attention
    llama = LlamaModel(config).double().eval()
    llama.load_state_dict(model.predictor.state_dict())
    assert getattr(config, "is_causal", True), "the mask alone must make it bidirectional"
    visual = features.detach().clone().requires_grad_()
    project, out = (
        nn.Linear(*layer.weight.T.shape).double() for layer in (model.vision_projection, model.output_projection)
    )
    project.load_state_dict(model.vision_projection.state_dict())
    out.load_state_dict(model.output_projection.state_dict())
    tokens = torch.cat([project(visual), F.embedding(ids, llama.embed_tokens.weight)], dim=1)
    seen = torch.cat([torch.ones(3, 8, dtype=torch.long), mask], dim=1).bool()
    size = seen.shape[1]
    shown = torch.zeros(3, 1, size, size, dtype=torch.float64)
    shown.masked_fill_(~seen[:, None, None, :], torch.finfo(torch.float64).min)
    states = llama(inputs_embeds=tokens, attention_mask=shown, use_cache=False).last_hidden_state
    expected = out(torch.stack([row[keep].mean(dim=0) for row, keep in zip(states, seen, strict=True)]))
    (expected * weight).sum().backward()

    assert predicted.std() > 0.1, "flat predictions would agree with anything"
    assert_close(predicted, expected)
    assert_close(features.grad, visual.grad)
    assert_close(model.vision_projection.weight.grad, project.weight.grad)
    assert_close(model.output_projection.weight.grad, out.weight.grad)
    for name, parameter in llama.named_parameters():
        assert_close(model.predictor.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("y_encoder", [BERT, GEMMA], ids=["bert", "gemma"])
@torch.no_grad()
def test_padding_changes_nothing(y_encoder: PreTrainedConfig, attention: str, lengths: tuple[int, ...]) -> None:
    """The trap: a batch without padding has no mask, and a decoder without a mask falls back to a causal one."""
    model = build(y_encoder=AutoModel.from_config(fresh(y_encoder), attn_implementation=attention), attention=attention)
    tolerance = 1e-10 if attention == "sdpa" else 1e-5  # eager attention takes its softmax in float32
    ids, mask = texts(*lengths)
    features = random(2, 8, VISUAL)
    batch = {"query_ids": ids, "query_mask": mask, "target_ids": ids, "target_mask": mask}
    plain = model(visual_features=features, **batch)
    padded = model(
        visual_features=features,
        **{name: F.pad(value, (0, 3), value=7 if name.endswith("ids") else 0) for name, value in batch.items()},
    )
    assert_close(padded.predicted, plain.predicted, tolerance)
    assert_close(padded.target, plain.target, tolerance)
    for row, length in enumerate(lengths):
        alone = model(visual_features=features[[row]], query_ids=ids[[row], :length], target_ids=ids[[row], :length])
        assert_close(alone.predicted[0], plain.predicted[row], tolerance)
        assert_close(alone.target[0], plain.target[row], tolerance)


@torch.no_grad()
def test_a_mask_left_out_means_no_padding_and_a_query_left_out_no_tokens(model: VLJEPAModel) -> None:
    features, (ids, mask) = random(2, 8, VISUAL), texts(3, 3)
    assert_close(model.predict(features, ids), model.predict(features, ids, mask))
    nothing = model.predict(features)
    assert_close(model.predict(features, ids[:, :0], mask[:, :0]), nothing)
    assert_close(model.predict(features, ids, torch.zeros_like(mask)), nothing)
    assert (model.predict(features, ids) - nothing).abs().max() > 1e-3


@torch.no_grad()
def test_the_mean_is_over_visual_and_real_query_tokens(model: VLJEPAModel) -> None:
    """8 visual tokens and 3, then 1, query tokens: the mean of 11 and of 9 states, padding left out."""
    states = []
    hook = model.predictor.register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
    predicted = model.predict(random(2, 8, VISUAL), *texts(3, 1))
    hook.remove()
    (found,) = states
    by_hand = torch.stack([found[0, :11].sum(0) / 11, found[1, :9].sum(0) / 9])
    assert_close(predicted, model.output_projection(by_hand))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_families_see_both_ways(family: str) -> None:
    """Another last query token moves the state of the first visual one: with a window of 4, over two layers. As the
    same model with is_causal does not."""
    model = build(predictor=predictor_config(family))
    features = random(2, 3, VISUAL)
    for lengths in ((2, 2), (2, 1)):
        ids, mask = texts(*lengths)
        other = ids.clone()
        other[0, 1] = (ids[0, 1] + 1) % VOCABULARY
        first = []
        hook = model.predictor.register_forward_hook(lambda *call, to=first: to.append(call[2].last_hidden_state[0, 0]))
        for causal in (False, True):
            model.predictor.config.is_causal = causal
            model.predict(features, ids, mask)
            model.predict(features, other, mask)
        hook.remove()
        model.predictor.config.is_causal = False
        assert (first[0] - first[1]).abs().max() > 1e-3
        assert torch.equal(first[2], first[3]), "the last token must be what moved it"


@pytest.mark.parametrize("family", ["stablelm", "mamba"])
def test_a_family_that_stays_causal_is_refused(family: str) -> None:
    """stablelm drops is_causal on its way to sdpa, and is causal exactly where nothing is padded."""
    options = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "state_size": 4, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model("mamba", **options) if family == "mamba" else predictor_config("stablelm")
    with pytest.raises(UserError, match=f"{family} predictor stays causal"):
        build(predictor=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_norms_do_not_hide_that_a_family_sees_both_ways(dtype: torch.dtype) -> None:
    """A constant added to a token vanishes in GPT-2's LayerNorm; what tells the families apart must not."""
    config = AutoConfig.for_model("gpt2", n_embd=HIDDEN, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    assert build(predictor=config, dtype=dtype).predictor.config.is_causal is False


@torch.no_grad()
def test_the_predictor_stays_bidirectional_after_reloading(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["predictor_config"]["is_causal"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    features, (ids, _) = random(1, 8, VISUAL).float(), texts(4)
    assert_close(VLJEPAModel.from_pretrained(tmp_path).predict(features, ids), model.predict(features, ids), 1e-5)


# --- the x_encoder


@torch.no_grad()
def test_vjepa2_reads_the_clip_as_a_whole() -> None:
    model = build()
    clip = random(2, 4, 3, 32, 32)
    found = model.encode_frames(clip)
    assert found.shape == (2, 2 * 4, VISUAL)
    assert_close(found, model.x_encoder(pixel_values_videos=clip, skip_predictor=True).last_hidden_state)
    other = clip.clone()
    other[:, 3] += 1
    assert (model.encode_frames(other)[:, :4] - found[:, :4]).abs().max() > 1e-3, "the first tubelet sees the last"
    assert_close(model.encode_frames(clip[:, :1]), model.encode_frames(clip[:, :1].repeat(1, 2, 1, 1, 1)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 3, 48, 48), "crop_size 32"),
        ((1, 4, 3, 32, 48), "32 x 48"),
        ((1, 3, 3, 32, 32), "3 frames"),
        ((1, 5, 3, 32, 32), "groups of 2"),
        ((1, 3, 4, 32, 32), "Clips are"),
        ((4, 3, 32, 32), "Clips are"),
    ],
)
def test_clips_that_vjepa2_would_misread_are_refused(model: VLJEPAModel, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.encode_frames(random(*shape))


@pytest.mark.parametrize("family", IMAGE_ENCODERS)
@torch.no_grad()
def test_image_encoders_see_each_frame_by_itself(family: str) -> None:
    """Equal to the encoder on one frame, a map [C, h, w] read row by row; frames permuted permute blocks of tokens."""
    config = AutoConfig.for_model(family, **IMAGE_ENCODERS[family])
    model = build(x_encoder=config)
    side = getattr(config, "image_size", 32)
    clip = random(2, 3, 3, side, side)
    found = model.encode_frames(clip)
    per_frame = []
    for frame in clip[1]:
        states = model.x_encoder(pixel_values=frame[None]).last_hidden_state[0]
        if states.dim() == 3:
            states = torch.stack([states[:, y, x] for y in range(states.shape[1]) for x in range(states.shape[2])])
        per_frame.append(states)
    assert_close(found[1], torch.cat(per_frame))
    assert model.config.visual_dim == found.shape[2] == per_frame[0].shape[1]
    blocks = found.unflatten(1, (3, -1))
    assert (blocks[:, 0] - blocks[:, 1]).abs().max() > 1e-4, "frames that look alike could be permuted at will"
    order = [2, 0, 1]
    assert_close(model.encode_frames(clip[:, order]).unflatten(1, (3, -1)), blocks[:, order])
    grid = model.config.visual_grid
    if grid is not None and family != "resnet":  # whose config names no size
        assert grid[0] * grid[1] == blocks.shape[2]
    assert (grid is None) == (family in ("vit", "clip_vision_model", "dinov2")), "a class token has no place on a grid"


@torch.no_grad()
def test_pool_frames_is_the_mean_of_each_frame_or_tubelet() -> None:
    clip = random(2, 4, 3, 32, 32)
    for x_encoder, places in ((None, 2), (AutoConfig.for_model("ijepa", **IMAGE_ENCODERS["ijepa"]), 4)):
        whole, pooled = build(x_encoder), build(x_encoder, pool_frames=True)
        tokens = whole.encode_frames(clip)
        by_hand = torch.stack([tokens[:, 4 * i : 4 * i + 4].sum(dim=1) / 4 for i in range(places)], dim=1)
        assert_close(pooled.encode_frames(clip), by_hand)
    with pytest.raises(UserError, match="pool_frames leaves none"):
        build(pool_frames=True, token_merge=[1, 2, 1])


# --- token_merge


@torch.no_grad()
def test_token_merge_by_hand() -> None:
    """2 frames of 2 x 4 tokens, token (f, y, x) = [n, -n] with n = 10f + 4y + x, merged in blocks."""
    number = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17], dtype=torch.float64)
    features = torch.stack([number, -number], dim=1)[None]

    def merged(*blocks: int) -> list[list[float]]:
        model = build(visual_dim=2, visual_grid=[2, 4], token_merge=list(blocks))
        assert model.vision_projection.in_features == 2 * math.prod(blocks)
        return merge_tokens(model.config, features)[0, :, ::2].tolist()

    assert merged(1, 2, 2) == [[0, 1, 4, 5], [2, 3, 6, 7], [10, 11, 14, 15], [12, 13, 16, 17]]
    assert merged(2, 1, 2) == [[0, 1, 10, 11], [2, 3, 12, 13], [4, 5, 14, 15], [6, 7, 16, 17]]
    assert merged(1, 1, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13], [14, 15, 16, 17]]
    assert merged(1, 1, 1) == [[n] for n in number.tolist()]


@torch.no_grad()
def test_merged_tokens_are_what_the_predictor_gets() -> None:
    model = build(token_merge=[2, 1, 2])  # 2 tubelets of 2 x 2 -> 2 tokens
    features = random(1, 8, VISUAL)
    lengths = []
    hook = model.predictor.register_forward_hook(lambda *call: lengths.append(call[2].last_hidden_state.shape[1]))
    first = model.predict(features)
    hook.remove()
    assert lengths == [2]
    swapped = features[:, [1, 0, 2, 3, 4, 5, 6, 7]]  # two tokens of one block: laid side by side, their order matters
    assert (model.predict(swapped) - first).abs().max() > 1e-3


@pytest.mark.parametrize("merge", [[1, 3, 1], [1, 1, 3], [3, 1, 1]])
def test_blocks_that_do_not_divide_are_refused(merge: list[int]) -> None:
    with pytest.raises(UserError, match="cannot be merged"):
        build(token_merge=merge).predict(random(1, 8, VISUAL))


def test_merging_around_a_class_token_is_refused() -> None:
    config = ViTConfig(**IMAGE_ENCODERS["vit"])
    with pytest.raises(UserError, match="set visual_grid"):
        build(x_encoder=config, token_merge=[1, 2, 2]).predict(random(1, 10, VISUAL))


# --- grid_positions


@torch.no_grad()
def test_each_place_of_the_grid_has_its_own_embedding_in_every_frame() -> None:
    """A grid of 2 x 4 in blocks of 1 x 1 x 2: four places, row by row, the same in each of three frames."""
    plain = build(visual_grid=[2, 4], token_merge=[1, 1, 2])
    model = build(visual_grid=[2, 4], token_merge=[1, 1, 2], grid_positions=True)
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    given = []
    for each in (plain, model):
        each.predictor.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        each.predict(random(2, 24, VISUAL))
    assert_close(given[1] - given[0], model.grid_positions.weight.repeat(3, 1).expand(2, -1, -1))
    with pytest.raises(UserError, match="6 visual tokens do not fill a grid of 4"):
        build(visual_grid=[2, 2], grid_positions=True).predict(random(1, 6, VISUAL))


# --- motion_dim


def with_motion() -> tuple[VLJEPAModel, list[Tensor]]:
    """A model that merges two tubelets, and the visual tokens that its predictor is given from now on."""
    model, given = build(token_merge=[2, 1, 1], motion_dim=7), []
    model.predictor.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    return model, given


@torch.no_grad()
def test_motion_adds_nothing_at_first() -> None:
    model, given = with_motion()
    features = random(1, 8, VISUAL)
    model.predict(features)
    assert_close(given[0], model.vision_projection(merge_tokens(model.config, features)))


@torch.no_grad()
def test_motion_is_seen_apart_by_hand() -> None:
    """Each cell's tokens of two tubelets, less their mean, through a layer, GELU and a layer; added to the linear map.

    The tokens of a clip of (y, x) cells are [tubelet, y, x]."""
    model, given = with_motion()
    first, _, last = model.motion_projection
    last.weight.copy_(random(*last.weight.shape, seed=2))
    last.bias.copy_(random(*last.bias.shape, seed=3))
    features = random(1, 8, VISUAL)
    model.predict(features)
    for cell in range(4):
        one, two = features[0, cell], features[0, 4 + cell]
        change = torch.cat([one - (one + two) / 2, two - (one + two) / 2])
        hidden = F.gelu(first.weight @ change + first.bias)
        linear = model.vision_projection(torch.cat([one, two]))
        assert_close(given[0][0, cell], linear + last.weight @ hidden + last.bias)


@torch.no_grad()
def test_all_that_stands_still_looks_alike_to_the_motion_projection() -> None:
    """Whatever it shows; and of a change, the two directions do not cancel, as they do in a linear map."""
    model, given = with_motion()
    model.motion_projection[2].weight.copy_(random(HIDDEN, 7, seed=2))
    frame, change = random(1, 4, VISUAL), 0.1 * random(1, 4, VISUAL, seed=5)
    clips = torch.cat([torch.cat(pair, dim=1) for pair in (
        (frame, frame), (-3 * frame, -3 * frame), (frame - change, frame + change), (frame + change, frame - change)
    )])  # fmt: skip
    model.predict(clips)
    seen = given[0] - model.vision_projection(merge_tokens(model.config, clips))
    assert_close(seen[0], seen[1])
    there_and_back = seen[2] + seen[3] - 2 * seen[0]
    assert there_and_back.abs().max() > 0.1 * (seen[2] - seen[0]).abs().max()


# --- pairs and caches


def pair_loss(model: VLJEPAModel, **batch: Any) -> Tensor:
    output = model(**batch)
    return info_nce(output.predicted, output.target, temperature=output.temperature).sum()


def gradients(model: VLJEPAModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_shared_clips_and_targets_equal_repeated_rows(model: VLJEPAModel) -> None:
    """Five pairs of two clips and three texts: loss and every gradient are those of five clips and five texts."""
    clips, (queries, query_mask), (targets, target_mask) = random(2, 2, 3, 32, 32), texts(3, 1, 2, 4, 2), texts(2, 5, 3)
    clip_of_pair, target_of_pair = torch.tensor([1, 0, 0, 1, 1]), torch.tensor([2, 0, 1, 1, 0])
    asked = {"query_ids": queries, "query_mask": query_mask}
    found = []
    for batch in (
        {"pixel_values_videos": clips, "target_ids": targets, "target_mask": target_mask,
         "clip_of_pair": clip_of_pair, "target_of_pair": target_of_pair},
        {"pixel_values_videos": clips[clip_of_pair], "target_ids": targets[target_of_pair],
         "target_mask": target_mask[target_of_pair]},
    ):  # fmt: skip
        model.zero_grad()
        loss = pair_loss(model, **asked, **batch)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in found[0][1].items():
        assert_close(gradient, found[1][1][name], 1e-9)
    model.zero_grad()


@torch.no_grad()
def test_cached_features_equal_computing_them(model: VLJEPAModel) -> None:
    clips, (ids, mask) = random(2, 2, 3, 32, 32), texts(3, 5)
    whole = model(pixel_values_videos=clips, query_ids=ids, query_mask=mask, target_ids=ids, target_mask=mask)
    cached = model(
        visual_features=model.encode_frames(clips), query_ids=ids, query_mask=mask,
        target_features=model.pool_text(ids, mask),
    )  # fmt: skip
    assert_close(cached.predicted, whole.predicted)
    assert_close(cached.target, whole.target)
    only_text = model(target_ids=ids, target_mask=mask)
    assert only_text.predicted is None and model(pixel_values_videos=clips).target is None
    assert_close(only_text.target, whole.target)


@pytest.mark.parametrize(("pooling", "by_hand"), [
    ("mean", lambda states: torch.stack([states[0, :4].sum(0) / 4, states[1, :2].sum(0) / 2])),
    ("first", lambda states: states[:, 0]),
    ("last", lambda states: torch.stack([states[0, 3], states[1, 1]])),
])  # fmt: skip
@torch.no_grad()
def test_pooling_by_hand(pooling: str, by_hand: Any) -> None:
    model = build(y_pooling=pooling)
    ids, mask = texts(4, 2, extra=1)
    expected = by_hand(model.y_encoder(input_ids=ids, attention_mask=mask).last_hidden_state)
    assert_close(model.pool_text(ids, mask), expected)
    assert_close(model(target_ids=ids, target_mask=mask).target, model.target_projection(expected))


@torch.no_grad()
def test_without_a_projection_targets_are_the_encoders_own() -> None:
    model = build(project_targets=False, shared_dim=Y_HIDDEN)
    ids, mask = texts(4, 2)
    assert_close(model(target_ids=ids, target_mask=mask).target, model.pool_text(ids, mask))
    assert model.predict(random(1, 8, VISUAL)).shape == (1, Y_HIDDEN)


# --- what is trained


def test_frozen_parts_have_no_graph_and_stay_in_evaluation_mode() -> None:
    model = build()
    model.x_encoder.requires_grad_(False)
    model.y_encoder.requires_grad_(False)
    model.train()
    assert model.training and model.predictor.training
    assert not any(module.training for part in (model.x_encoder, model.y_encoder) for module in part.modules())
    clips, (ids, mask) = random(2, 2, 3, 32, 32), texts(3, 3)
    assert not model.encode_frames(clips).requires_grad and not model.pool_text(ids, mask).requires_grad
    assert_close(model.pool_text(ids, mask), model.pool_text(ids, mask))  # no dropout
    pair_loss(model, pixel_values_videos=clips, target_ids=ids).backward()
    trained = {name for name in gradients(model) if gradients(model)[name].abs().sum() > 0}
    assert {name.partition(".")[0] for name in trained} == {
        "predictor", "vision_projection", "output_projection", "target_projection", "log_temperature",
    }  # fmt: skip
    model.eval()
    assert not any(module.training for module in model.modules())


def test_statistics_of_a_frozen_cnn_do_not_move_and_those_of_a_trained_one_do() -> None:
    model = build(x_encoder=AutoConfig.for_model("resnet", **IMAGE_ENCODERS["resnet"]))

    def moved() -> set[str]:
        before = {name: value.clone() for name, value in model.x_encoder.named_buffers()}
        model.train()
        model.encode_frames(random(2, 2, 3, 32, 32))
        return {name for name, value in model.x_encoder.named_buffers() if not torch.equal(value, before[name])}

    everything = moved()
    assert len(everything) == len(list(model.x_encoder.named_buffers())) > 0
    model.x_encoder.requires_grad_(False)
    assert moved() == set()
    for weight in model.x_encoder.encoder.stages[1].parameters():
        weight.requires_grad_(True)
    assert moved() == {name for name in everything if name.startswith("encoder.stages.1.")}


def test_dropout_of_a_frozen_block_is_off_and_of_a_trained_one_on() -> None:
    model = build(y_encoder=fresh(BERT))
    model.y_encoder.embeddings.requires_grad_(False)
    model.train()
    assert not model.y_encoder.embeddings.dropout.training
    assert model.y_encoder.encoder.layer[0].output.dropout.training


# --- temperature


def test_temperature_starts_as_configured_and_gets_its_gradient() -> None:
    """d loss / d log t = t d loss / d t; a finite difference of the whole loss."""
    model = build(temperature=0.2)
    assert model.temperature.item() == pytest.approx(0.2, rel=1e-6)
    batch = {"visual_features": random(3, 8, VISUAL), "target_ids": texts(3, 3, 3)[0]}
    pair_loss(model, **batch).backward()
    gradient = float(model.log_temperature.grad)
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            model.log_temperature.fill_(math.log(0.2) + step)
            values.append(float(pair_loss(model, **batch)))
    assert gradient == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5) and abs(gradient) > 1e-3


def test_temperature_stops_at_the_floor_and_can_leave_it() -> None:
    """Below 0.01 it is 0.01, and still has a gradient: a step that raises it must be possible."""
    model = build()
    with torch.no_grad():
        model.log_temperature.fill_(math.log(0.001))
    temperature = model(visual_features=random(1, 8, VISUAL)).temperature
    assert temperature.item() == pytest.approx(0.01, rel=1e-6)
    temperature.backward()
    assert float(model.log_temperature.grad) == pytest.approx(0.01, rel=1e-6)


# --- saving


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("y_encoder", [BERT, GEMMA], ids=["bert", "gemma"])
@torch.no_grad()
def test_a_saved_model_loads_bit_equal(tmp_path: Path, y_encoder: PreTrainedConfig, shard: str) -> None:
    options = {
        "num_predictor_layers": 1,
        "token_merge": [2, 1, 2],
        "grid_positions": True,
        "motion_dim": 6,
        "default_query": "Why?",
        "y_pooling": "last",
    }
    model = build(y_encoder=fresh(y_encoder), dtype=torch.float32, **options)
    model.log_temperature.fill_(math.log(0.3))  # learnt since
    model.save_pretrained(tmp_path, max_shard_size=shard)
    weights = sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".json",))
    assert all(name.endswith(".safetensors") for name in weights) and (len(weights) > 3) == (shard == "20KB")
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is VLJEPAModel and not loaded.training
    assert_same(model, loaded)
    assert loaded.temperature.item() == pytest.approx(0.3)
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    assert loaded.config.default_query == "Why?" and loaded.config.y_pooling == "last"
    clips, (ids, mask) = random(2, 4, 3, 32, 32).float(), texts(9, 14)
    batch = {"query_ids": ids, "query_mask": mask, "target_ids": ids, "target_mask": mask}
    first, second = (each(pixel_values_videos=clips, **batch) for each in (model, loaded))
    # Where the weights lie in memory may decide the order of a sum.
    assert_close(first.predicted, second.predicted, 1e-5)
    assert_close(first.target, second.target, 1e-5)


def test_saving_twice_changes_no_config(tmp_path: Path) -> None:
    """Gemma halves its window when it is made bidirectional; once, not at every save."""
    build(y_encoder=fresh(GEMMA), dtype=torch.float32).save_pretrained(tmp_path / "a")
    AutoModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


def test_what_is_never_run_is_not_saved(tmp_path: Path) -> None:
    """V-JEPA 2's own predictor, and the poolers of BERT and ViT."""
    for x_encoder in (None, ViTConfig(**IMAGE_ENCODERS["vit"])):
        model = build(x_encoder, dtype=torch.float32)
        model.save_pretrained(tmp_path)
        keys = AutoModel.from_pretrained(tmp_path).state_dict().keys()
        assert not [key for key in keys if key.startswith("x_encoder.predictor") or ".pooler." in key]
        assert [key for key in keys if key.startswith("x_encoder.")]


def test_every_weight_gets_a_gradient(model: VLJEPAModel) -> None:
    """So that DistributedDataParallel waits for none in vain."""
    model.zero_grad()
    pair_loss(
        model, pixel_values_videos=random(2, 2, 3, 32, 32), query_ids=texts(2, 2)[0], target_ids=texts(3, 3)[0]
    ).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    model.zero_grad()


# --- gradient checkpointing


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = build(y_encoder=fresh(GEMMA))
    model.train()
    (ids, mask), clips = texts(5, 2, 4), random(3, 2, 3, 32, 32)
    batch = {"pixel_values_videos": clips, "query_ids": ids, "query_mask": mask, "target_ids": ids, "target_mask": mask}
    found, calls = [], []
    model.predictor.layers[0].self_attn.q_proj.register_forward_hook(lambda *call: calls.append(1))
    for on in (False, True):
        model.zero_grad()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls.clear()
        pair_loss(model, **batch).backward()
        assert len(calls) == 1 + on, "checkpointed layers run twice"
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert_close(gradient, found[1][name])
