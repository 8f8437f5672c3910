"""Claims about `Embedder`: its vectors are those of training, whatever is left out, and do not depend on the batch."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm_jepa import UserError
from llm_jepa.cli import main
from llm_jepa.lm import Embedder, JEPACollator, add_predictor_tokens, build_views, embed_pairs
from tests.conftest import UNIT32, expect_refusal, tiny_model

SYSTEM = "You write regular expressions."


def chat_rows(rows: list[dict]) -> list[dict]:
    """Prompts of several lengths, one with an earlier turn, one with other wordings on both sides."""
    odd = [
        {"prompt": [{"role": "user", "content": "lines"}], "completion": [{"role": "assistant", "content": ".*"}]},
        {"messages": [*rows[0]["messages"], {"role": "user", "content": "and b?"}, rows[1]["messages"][-1]]},
        {**rows[2], "views": {"contexts": ["a wording", "another"], "targets": ["b+", "(b)+"]}},
    ]
    return [*odd, *rows[3:6]]


TEXT_ROWS = [{"prompt": f"lines with {n * 'a '}", "completion": f" {'a' * n}.*"} for n in (1, 2, 5)]
RECORDS = {
    "no predictor token": {"num_predictor_tokens": 0},
    "one": {"num_predictor_tokens": 1},
    "three, first": {"num_predictor_tokens": 3, "predictor_position": "first"},
    "mean": {"num_predictor_tokens": 3, "readout": "mean"},
    "message": {"num_predictor_tokens": 1, "context_view": "message", "readout_layer": 1},
    "reverse": {"num_predictor_tokens": 3, "direction": "reverse"},
    "reverse, first": {"num_predictor_tokens": 1, "direction": "reverse", "predictor_position": "first"},
}


def made(tokenizer, record: dict, *, family: str = "llama", rows_are: str = "messages", **form) -> Embedder:
    """A random model that says that it was trained like this. Its weights are so large that attention attends."""
    model = tiny_model(tokenizer, family, initializer_range=0.3).eval()
    add_predictor_tokens(model, tokenizer, record["num_predictor_tokens"])
    ends = {"format": rows_are, "ends": "content", "answer_begins": "a", **form}
    model.config.llm_jepa = {"objective": "cosine", **record, "prompt": ends}
    return Embedder(model, tokenizer)


def as_in_training(embedder: Embedder, rows: list[dict], layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`predicted` and `target` by the collator and the forward pass of the trainer."""
    reading, tokenizer = embedder.sides.reading, embedder.sides.tokenizer
    views = [asdict(build_views(row, tokenizer, context_view=reading.context_view)) for row in rows]
    predictors = tokenizer.convert_tokens_to_ids(
        [f"<|predictor_{i + 1}|>" for i in range(reading.num_predictor_tokens)]
    )
    collator = JEPACollator(
        tokenizer.pad_token_id, predictors, layout=layout, readout=reading.readout, direction=reading.direction,
        predictor_position=reading.predictor_position,
    )  # fmt: skip
    model = embedder.model
    return embed_pairs(model, model, [collator(views)], layout=layout, layer=reading.readout_layer)[:2]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape and expected.norm(dim=-1).min() > 0.1
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < UNIT32, error


@pytest.mark.parametrize("record", list(RECORDS))
@pytest.mark.parametrize(("family", "layout"), [("llama", "packed"), ("gpt2", "separate")])
def test_rows_give_the_vectors_of_training(tokenizer, rows, record, family, layout):
    embedder, rows = made(tokenizer, RECORDS[record], family=family), chat_rows(rows)
    predicted, target = as_in_training(embedder, rows, layout)
    embedded = embedder.encode_rows(rows, batch_size=3)
    assert_close(embedded.views["context"], predicted)
    assert_close(embedded.views["target"], target)
    assert len(predicted) == len(rows) + 3 * 3 - 1, "every context of the third row with every target of it"
    assert not torch.allclose(predicted[0], predicted[-1], atol=0.1), "a space of one point would prove nothing"


@pytest.mark.parametrize("record", ["one", "mean", "message", "reverse"])
def test_a_side_alone_gives_its_vector_in_a_whole_row(tokenizer, rows, record):
    """The other side is a stand-in that the side does not see; a text is put into the form of the training rows."""
    embedder = made(tokenizer, RECORDS[record], system=SYSTEM)
    turns = [row["messages"] for row in rows[:4]]
    whole = [{"prompt": [{"role": "system", "content": SYSTEM}, t[-2]], "completion": t[-1:]} for t in turns]
    views = embedder.encode_rows(whole).views
    prompts, completions = views["context"], views["target"]
    if record == "reverse":
        prompts, completions = completions, prompts
    for form in ([t[-2]["content"] for t in turns], [row["prompt"] for row in whole], [{**row} for row in whole]):
        given = [{"prompt": one["prompt"]} if isinstance(one, dict) else one for one in form]
        assert_close(embedder.encode_prompts(given), prompts)
    for form in ([t[-1]["content"] for t in turns], [row["completion"] for row in whole]):
        assert_close(embedder.encode_completions(form), completions)


def test_plain_texts_are_asked_as_plain_texts(tokenizer):
    embedder = made(tokenizer, RECORDS["one"], rows_are="text")
    views = embedder.encode_rows(TEXT_ROWS).views
    predicted, target = as_in_training(embedder, TEXT_ROWS, "packed")
    assert_close(views["context"], predicted)
    assert_close(views["target"], target)
    assert_close(embedder.encode_prompts([row["prompt"] for row in TEXT_ROWS]), predicted)
    assert_close(embedder.encode_completions([row["completion"] for row in TEXT_ROWS]), target)


def test_no_vector_depends_on_its_batch_or_on_the_side_of_the_padding(tokenizer):
    embedder = made(tokenizer, RECORDS["mean"], family="gpt2")
    texts = ["a", "lines with a vowel and a digit", "b", "a", "lines"]
    together = embedder.encode_prompts(texts, batch_size=8)
    tokenizer.padding_side = "left"
    assert_close(embedder.encode_prompts(texts, batch_size=2), together)
    alone = torch.cat([embedder.encode_prompts([text]) for text in texts])
    assert_close(alone, together)
    assert torch.equal(together[0], together[3]) and not torch.allclose(together[0], together[2], atol=0.01)
    assert together.dtype == torch.float32 and together.numpy().shape == (5, 32)


def test_other_turns_and_template_arguments_change_a_prompt(tokenizer):
    """An earlier turn is read, and `tools` reach the template."""
    tokenizer.chat_template = "{{ tools | length if tools else '' }}" + tokenizer.chat_template
    embedder = made(tokenizer, RECORDS["one"])
    turn = [{"role": "user", "content": "lines"}]
    plain, tools, later = embedder.encode_prompts(
        [turn, {"prompt": turn, "tools": [{"name": "f"}]}, [*turn, {"role": "assistant", "content": "a"}, *turn]]
    )
    assert min((plain - tools).norm(), (plain - later).norm(), (tools - later).norm()) > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.encode_prompts("lines"), r"Give a list of texts: \['lines'\]"),
        (lambda e: e.encode_prompts([]), "no text to embed"),
        (lambda e: e.encode_prompts(["a", " "]), "prompt 1"),
        (lambda e: e.encode_completions(["a", ""]), "completion 1"),
        (lambda e: e.encode_prompts(["word " * 400]), "1 of 1 prompts are longer than the 256 positions"),
        (lambda e: e.encode_rows([{"question": "x"}]), r"row 0: found the columns \['question'\]"),
        (lambda e: e.encode_rows([{"text": "x"}, {"completion": "y"}]), "1 rows have no completion and 1 have no pro"),
    ],
)
def test_what_cannot_be_embedded_is_one_line(tokenizer, call, message):
    with pytest.raises(UserError, match=message):
        call(made(tokenizer, RECORDS["one"], family="gpt2"))


def test_the_command_writes_what_the_class_computes(tokenizer, tmp_path, capsys):
    """Rows with a prompt or a completion alone; .npz for NumPy; another suffix is refused before a model is loaded."""
    embedder = made(tokenizer, RECORDS["one"])
    embedder.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["a+", "[aeiou]"]
    prompts, completions = embedder.encode_prompts(texts), embedder.encode_completions(texts)
    for column, name, expected in (("text", "context", prompts), ("completion", "target", completions)):
        data = tmp_path / f"{column}.jsonl"
        data.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
        for suffix in (".safetensors", ".npz"):
            out = tmp_path / f"{column}{suffix}"
            command = ["embed", str(tmp_path / "model"), "--input", str(data), "--output"]
            assert main([*command, str(out)]) == 0
            saved = load_file(out) if suffix == ".safetensors" else dict(np.load(out))
            assert set(saved) == {name}
            assert_close(torch.as_tensor(saved[name]), expected)
            side = "completion" if column == "text" else "prompt"
            assert f"2 of 2 rows have no {side}" in capsys.readouterr().out
    expect_refusal(capsys, [*command, str(tmp_path / "x.npy")], "x.npy: this command writes two tensors", ".npz")
