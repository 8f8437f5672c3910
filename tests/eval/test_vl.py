"""The arithmetic of the VL-JEPA benchmarks, by hand."""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import pytest
import torch

from eval.cost.vl_cost import ideal_windows, share_right
from eval.vl import shapestream
from eval.vl.selective_decoding import Embedded, decodes_for, quality
from eval.vl.shapestream import (
    FewActorsAtATime,
    RowsInRuns,
    Stage,
    build,
    separate_events,
    still_images,
    training_clips,
)
from eval.vl.shapestream_figures import QUERY, kind_prompts, nearest, predict
from llm_jepa.lm.from_scratch import train_tokenizer
from llm_jepa.stream.segments import segment_at, segment_uniform
from llm_jepa.synthetic import shapestream as world
from llm_jepa.vl.arguments import VLJEPATrainingArguments
from llm_jepa.vl.data import ClipDataset
from llm_jepa.vl.inference import VLJEPA
from llm_jepa.vl.y_decoder import MemoryProjection


def points(*rows):
    return [{"decodes": decodes, "slot_accuracy": accuracy} for decodes, accuracy in rows]


def test_decodes_for_joins_the_best_points_so_far():
    """0.5 at 10 and 0.7 at 30: 0.6 is half way, at 20. The dip at 20 is passed over, and 0.8 is never reached."""
    curve = points((30, 0.7), (10, 0.5), (20, 0.4))
    assert decodes_for(curve, 0.6) == pytest.approx(20)
    assert decodes_for(curve, 0.25) == pytest.approx(5)
    assert decodes_for(curve, 0.7) == pytest.approx(30)
    assert decodes_for(curve, 0.8) is None


def test_quality_is_that_of_the_decode_nearest_to_the_middle_of_an_event():
    """Three events. Of the hit kind and actor are right, the patient is not: 2 slots of 3. Of a wrong kind, none."""
    a, b = ("red", "star"), ("blue", "circle")
    events = (
        world.Event("idle", 0.0, 4.0),
        world.Event("hit", 4.0, 6.0, a, b),
        world.Event("left", 6.0, 8.0, b),
    )
    wrong = ("green", "square")
    said = (world.Event("idle", 0, 1), world.Event("hit", 0, 1, a, wrong), world.Event("right", 0, 1, b))
    memory = MemoryProjection(torch.eye(3), tuple(world.captions(event)[0] for event in said))
    times = np.arange(0.25, 8, 0.5)
    shown = [next(i for i, event in enumerate(events) if t < event.end_s) for t in times]
    embeddings = np.eye(3)[shown]
    stream = Embedded(world.Stream(np.zeros((1, 8, 8, 3), np.uint8), events, 8), times - 1, embeddings)
    segments = segment_at(embeddings, times, boundaries_s=[4.0, 6.0])
    assert quality(stream, segments, memory, of="embedding") == (
        pytest.approx((1 + 2 / 3 + 0) / 3),
        pytest.approx(2 / 3),
    )
    one = segment_uniform(embeddings, times, num_segments=1)  # its mean is mostly rest, and so is what it says of all
    assert quality(stream, one, memory, of="embedding") == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_ideal_windows_are_right_at_the_true_boundaries_and_wrong_in_one_segment():
    stream = world.stream(0, split="test", seconds=60, size=32)
    times, windows, codes = ideal_windows(stream, np.random.default_rng(0))
    rests = [code for code, event in zip(codes, stream.events, strict=True) if event.kind == "idle"]
    assert len(rests) > 3 and all(np.array_equal(code, rests[0]) for code in rests)
    inside = [i for i, t in enumerate(times) if stream.events[0].end_s - 1 > t]  # windows of the first rest alone
    assert len(inside) > 3 and ((windows[inside] - codes[0]) ** 2).sum(axis=1) == pytest.approx(0.09, rel=0.8)
    boundaries = [event.end_s for event in stream.events[:-1] if times[0] < event.end_s < times[-1]]
    assert share_right(stream, segment_at(windows, times, boundaries_s=boundaries), codes) > 0.8
    rest = sum(event.kind == "idle" for event in stream.events) / len(stream.events)
    assert share_right(stream, segment_uniform(windows, times, num_segments=1), codes) == pytest.approx(rest)


def test_candidates_are_compared_row_by_row():
    predicted = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    assert nearest(predicted, candidates) == [1, 0]


def test_training_sees_no_held_out_wording_and_the_right_one_is_among_the_kinds():
    originals = [world.clip(index, size=40) for index in range(30)]
    clips = training_clips(originals, 1, wordings_per_event=None, seed=0)
    held_out = {text for clip in originals for text in world.captions(clip.event, wordings="held_out")}
    targets = {pair.target for clip in clips for pair in clip.pairs}
    assert targets and not targets & held_out
    assert len(clips) > 40 and all(pair.query == QUERY for clip in clips[30:] for pair in clip.pairs)
    for clip, original in zip(clips, originals, strict=False):
        assert clip.video is original.frames and clip.pairs[0].query == QUERY  # the one that is always drawn
        answers = {(question.question, question.answer) for question in original.questions}
        assert all(pair.query == QUERY or pair in answers for pair in clip.pairs)
        assert [pair.target for pair in clip.pairs if pair.query == QUERY] == world.captions(original.event)
    for index in range(20):
        clip = world.clip(index)
        prompts = kind_prompts(clip, "train")
        assert prompts[world.KINDS.index(clip.event.kind)] == world.captions(clip.event) and len(prompts) == 13


def test_stills_say_what_is_there_and_where_it_is():
    originals, num_placed = [world.clip(index, size=40) for index in range(5)], 0
    for index, clip in enumerate(still_images(originals, ("shape_of",), seed=0)):
        original = originals[index]
        assert (clip.video == original.frames[-1:]).all()
        asked = [(q.question, q.answer) for q in original.questions if q.kind == "where"]
        shapes = [(q.question, q.answer) for q in original.questions if q.kind == "shape_of"]
        assert clip.pairs[3:] == tuple(shapes)
        for pair in clip.pairs[:3]:
            said = [part.split(" at the ") for part in pair.target.split(" and ")]
            assert sorted(name for name, *_ in said) == sorted(f"a {c} {s}" for c, s in original.objects)
            for name, *place in said:
                where = f"where is the {name.removeprefix('a ')} at the end?"
                assert not place or (where, f"at the {place[0]}") in asked
                num_placed += len(place)
    assert num_placed > 10
    few = still_images(originals, (), seed=0, few_texts=True)
    assert [len(clip.pairs) for clip in few] == [1] * 5
    assert [" at the " in clip.pairs[0].target for clip in few] == [True] + [False] * 4
    for clip, original in zip(few[1:], originals[1:], strict=True):
        assert clip.pairs[0].target == " and ".join(f"a {c} {s}" for c, s in original.objects)


@torch.no_grad()
def test_the_video_stage_starts_from_what_the_image_stages_learnt():
    """A clip is answered as its last image was: embeddings and their targets are equal. The temperature starts anew."""
    tokenizer = train_tokenizer([{"prompt": "what is there?", "completion": "a red star"}], 270)
    stills, processor = build(tokenizer, None, seed=0)
    stills.log_temperature.fill_(np.log(0.03))
    clips, _ = build(tokenizer, None, seed=1, stills=stills)
    frames = torch.rand(2, 16, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    texts = processor(query=["what is there?"] * 2, target=["a red star", "a star"])
    first, second = (
        model.eval()(pixel_values_videos=pixels, **texts)
        for model, pixels in ((stills, frames[:, -1:]), (clips, frames))
    )
    torch.testing.assert_close(second.predicted, first.predicted)
    torch.testing.assert_close(second.target, first.target)
    assert (first.predicted[0] - first.predicted[1]).abs().max() > 1e-3
    assert clips.temperature.item() == pytest.approx(0.07)


def test_the_temperature_of_clips_stays_and_that_of_images_is_learnt(tmp_path):
    drawn = [world.clip(index, size=40) for index in range(12)]
    images, clips = still_images(drawn, (), seed=0), training_clips(drawn, 0, wordings_per_event=2, seed=0)
    texts = [{"prompt": p.query, "completion": p.target} for clip in images + clips for p in clip.pairs]
    model, processor = build(train_tokenizer(texts, 400), None, seed=0)
    options = argparse.Namespace(out=tmp_path, effort=1.0, text_encoder=None, seed=0, float32=True)
    shapestream.train(model, processor, images, Stage(3, 6, 1), options)
    assert model.temperature.item() != pytest.approx(0.07, abs=1e-5)
    model, processor = build(processor.tokenizer, None, seed=0, stills=model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    shapestream.train(model, processor, clips, Stage(3, 6, 2), options, cache=tmp_path / "features")
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert "motion_projection.0.weight" in moved and "predictor.layers.0.mlp.up_proj.weight" in moved
    assert not [name for name in moved if name.startswith(("x_encoder", "log_temperature"))]


def test_each_query_is_predicted_from_its_own_clip():
    """One by one or many at once, in any order and with clips that nobody asks about."""
    tokenizer = train_tokenizer([{"prompt": "what is there?", "completion": "a red star"}], 270)
    model = VLJEPA(*build(tokenizer, None, seed=0))
    features = torch.randn(7, 25, 64, generator=torch.Generator().manual_seed(0))
    clip_of_query, queries = [5, 0, 5, 2], ["what?", "is there?", "what is there?", "red?"]
    together = predict(model, features, clip_of_query, queries)
    for row, (clip, query) in enumerate(zip(clip_of_query, queries, strict=True)):
        alone = predict(model, features[clip : clip + 1], [0], [query])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_boundaries_of_the_oracle_have_windows_on_both_sides():
    """Windows are centred at 1.0 to 4.0 s: an event that ends at the first or the last centre leaves none beside it."""
    ends = (1.0, 2.5, 4.0, 5.0)
    events = tuple(world.Event("idle", start, end) for start, end in zip((0.0, *ends[:-1]), ends, strict=True))
    stream = Embedded(world.Stream(np.zeros((40, 1, 1, 3), np.uint8), events, 8), np.arange(0, 3.1, 0.5), np.eye(7))
    assert stream.boundaries_s == [2.5]
    assert len(segment_at(stream.embeddings, stream.times_s, boundaries_s=stream.boundaries_s)) == 2


def test_rows_in_runs_are_every_row_once_and_neighbours_of_one_group():
    groups = ["a"] * 12 + ["b"] * 6 + [None] * 7 + ["c"] * 2
    sampler = RowsInRuns(groups, 3, seed=0)
    orders = [list(sampler), list(sampler)]
    assert orders[0] != orders[1]
    for order in orders:
        assert sorted(order) == list(range(27)) and len(sampler) == 27
        runs = [len(list(run)) for group, run in itertools.groupby(groups[row] for row in order) if group in ("a", "b")]
        assert all(length % 3 == 0 for length in runs)
        resting = [len(list(run)) for group, run in itertools.groupby(groups[row] for row in order) if group is None]
        assert max(resting) < 7, "rest is spread over the batches"
    assert list(RowsInRuns(groups, 3, seed=0)) == orders[0]


def test_clips_come_in_runs_of_one_actor(tmp_path):
    drawn = [world.clip(index, kind=kind, size=32) for index, kind in enumerate(("left", "up") * 100)]
    clips = training_clips(drawn, 0, wordings_per_event=2, seed=0)
    texts = [{"prompt": pair.query or "", "completion": pair.target} for clip in clips for pair in clip.pairs]
    model, processor = build(train_tokenizer(texts, 400), None, seed=0)
    args = VLJEPATrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=10)
    trainer = FewActorsAtATime(model, args, ClipDataset(clips, num_frames=16), processor=processor)
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert sorted(itertools.chain(*batches)) == list(range(200))
    actors = [len({drawn[row].event.actor for row in batch}) for batch in batches]
    assert np.mean(actors) < 5, "at random it would be 8"


@torch.no_grad()
def test_wordings_of_an_event_come_together_and_events_apart(monkeypatch):
    """Of a text encoder of random weights: each sentence is nearer to its own wordings than to any other event."""
    monkeypatch.setattr(shapestream, "TEXT_STEPS", 300)
    kinds = ("left", "right", "up", "grow", "spin")
    wordings = [world.captions(world.Event(kind, 0, 1, ("red", "star")))[::3] for kind in kinds]
    texts = [text for group in wordings for text in group]
    tokenizer = train_tokenizer([{"prompt": text, "completion": text} for text in texts], 400)
    model, processor = build(tokenizer, None, seed=0)

    def wrong() -> int:
        z = VLJEPA(model, processor).embed_texts(texts)
        near = (z @ z.T).fill_diagonal_(-2).argmax(dim=1).tolist()
        group = [i for i, texts_of in enumerate(wordings) for _ in texts_of]
        return sum(group[i] != group[j] for i, j in enumerate(near))

    before = wrong()
    with torch.enable_grad():
        separate_events(model, processor, wordings)
    assert before > 5 and wrong() <= 1
