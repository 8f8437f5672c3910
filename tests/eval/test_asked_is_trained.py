"""What is asked is what was trained: a tiny model that has memorised its rows scores 1.0, under every chat template.

Each cell trains with `LLMJEPATrainer`, saves, and asks the saved folder by `eval.run`, written and with choices, in two
wordings. A template under which that cannot work is refused in one line before the first step.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers import AutoTokenizer

from eval import robustness
from eval.run import evaluate_model
from eval.tasks import TASKS
from llm_jepa import UserError, cli
from llm_jepa.lm import LLMJEPATrainer, form_from
from llm_jepa.lm.from_scratch import random_model
from llm_jepa.lm.prompts import render, up_to_content
from tests.conftest import config

TEMPLATES = sorted(path.stem for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
# One of each kind: plain, an empty think block in front of the answer, a channel header, a generation prompt that no
# row has, an end that is several tokens, an end that is the next turn's header.
KINDS = ["qwen2_5", "qwen3", "gptoss", "deepseek_r1_distill", "llama3", "glm4moe", "glm4moe_training", "smolvlm"]
LONG = ("cohere2", "cohere2_training")  # a preamble of 1,600 tokens: minutes of training
TAKES_PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")  # content as a list of parts (pictures)
ANSWERS = [".*a.*", "(x)|y", "red", "7", "No way"]
WORDINGS = ("plain", "polite")
MODEL = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}


def question(number: int, wording: str) -> str:
    word = ("dog", "vowel", "digit", "word", "string")[number]
    return f"the {word}" if wording == "plain" else f"lines with {word}"


def conversation(number: int, wording: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question(number, wording)}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def memorise(rows: list[dict], tokenizer, folder: Path) -> Path:
    """Train on the rows until the model knows them, and save it."""
    args = config(
        folder,
        jepa_weight=0.0,
        max_steps=50,
        max_length=None,
        optim="adamw_torch",
        adam_beta2=0.98,
        per_device_train_batch_size=len(rows),
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_grad_norm=1.0,
        logging_steps=50,
    )
    trainer = LLMJEPATrainer(random_model(MODEL, tokenizer, seed=0), args, Dataset.from_list(rows), None, tokenizer)
    trainer.train()
    trainer.save_model(folder / "model")
    return folder / "model"


def scores(model: Path, groups: list[dict], folder: Path, choices: list[str] = ANSWERS) -> list[float]:
    """The accuracy of each wording, written and chosen."""
    figures = []
    for name, more in (("written", {}), ("chosen", {"choices": choices})):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(group | more) + "\n" for group in groups))
        data = TASKS["groups"].load(str(file))
        result, _ = evaluate_model(str(model), TASKS["groups"], data, out=None, progress=False, max_new_tokens=48)
        figures += [metrics["correct"] for metrics in result["metrics"].values()]
    return figures


def rows_and_groups(system: str | None = None, **more) -> tuple[list[dict], list[dict]]:
    rows, groups = [], []
    for number, answer in enumerate(ANSWERS):
        prompts = [conversation(number, wording, system) for wording in WORDINGS]
        rows += [{"messages": [*turns, {"role": "assistant", "content": answer}], **more} for turns in prompts]
        groups.append({"id": str(number), "prompts": prompts, "wordings": WORDINGS, "answer": answer, **more})
    return rows, groups


def templated(tokenizer, name: str):
    """The tokenizer, which has no tokens for what the templates write, under a template of TRL."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


ASKS_WHAT_IS_NOT_TRAINED = pytest.mark.filterwarnings("error:.*the start of the row:UserWarning")


@ASKS_WHAT_IS_NOT_TRAINED
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in TEMPLATES if name not in LONG],
)
def test_memorised_rows_score_one_or_the_template_is_refused(name, tokenizer, tmp_path):
    tokenizer = templated(tokenizer, name)
    rows, groups = rows_and_groups()
    if name.startswith(TAKES_PARTS_ONLY) or name == "glm4moe":
        with pytest.raises(UserError, match="row 0: |nothing after an answer"):
            memorise(rows, tokenizer, tmp_path)
        return
    model = memorise(rows, tokenizer, tmp_path)
    assert scores(model, groups, tmp_path) == [1.0] * 4
    # Tools that know only the saved template ask the same text.
    saved, turns = AutoTokenizer.from_pretrained(model), conversation(0, "plain")
    asked = render(saved, turns, {}, "", generation_prompt=True)
    assert asked == up_to_content(tokenizer, turns, {}, "")
    assert render(saved, turns, {}, "") == render(tokenizer, turns, {}, "")


TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
TRAVELLERS = {
    "thinking off": {"chat_template_kwargs": {"enable_thinking": False}},
    "thinking on": {"chat_template_kwargs": {"enable_thinking": True}},
    "tools": {"tools": TOOLS},
    "a system turn": {"system": "Answer briefly."},
}


@ASKS_WHAT_IS_NOT_TRAINED
@pytest.mark.parametrize("name", TRAVELLERS)
def test_what_a_row_brings_travels_with_the_question(name, tokenizer, tmp_path, capsys):
    """In a groups file, in `generate --input`, and in `generate --prompt`, which asks what all rows shared."""
    if name == "tools":  # TRL's templates write hundreds of tokens about them
        tokenizer.chat_template = "{% if tools %}{{ tools[0].function.name }} {% endif %}" + tokenizer.chat_template
    else:
        tokenizer = templated(tokenizer, "qwen3")
    rows, groups = rows_and_groups(**TRAVELLERS[name])
    model = memorise(rows, tokenizer, tmp_path)
    assert scores(model, groups, tmp_path) == [1.0] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "answers.jsonl"
    assert cli.main(["generate", str(model), "--input", str(tmp_path / "rows.jsonl"), "--output", str(output)]) == 0
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert texts == [row["messages"][-1]["content"] for row in rows]
    capsys.readouterr()
    assert cli.main(["generate", str(model), "--prompt", question(2, "plain")]) == 0
    assert capsys.readouterr().out == f"{question(2, 'plain')!r} -> 'red'\n"
    options = ["--data", str(tmp_path / "written.jsonl"), "--task", "groups", "--embeddings"]
    assert robustness.main(["--models", f"it={model}", *options, "--out", str(tmp_path / "report")]) == 0
    figures = json.loads((tmp_path / "report/results.json").read_text())["models"]["it"]["metrics"]
    assert figures["accuracy"]["estimate"] == figures["worst_of_k"]["estimate"] == 1.0


@ASKS_WHAT_IS_NOT_TRAINED
@pytest.mark.parametrize("name", ["qwen3", pytest.param("nemotron_3_nano", marks=pytest.mark.slow)])
def test_a_reasoning_is_generated_and_not_graded(name, tokenizer, tmp_path):
    """With a reasoning in the rows, the prompt ends at the generation prompt; the answer is what follows."""
    tokenizer = templated(tokenizer, name)
    rows, groups = rows_and_groups()
    for row in rows:
        row["messages"][-1]["reasoning_content"] = "so a"
    model = memorise(rows, tokenizer, tmp_path)
    assert form_from(str(model)).ends == "generation_prompt"
    with pytest.raises(UserError, match="was trained to write a reasoning between the prompt and the answer"):
        scores(model, groups, tmp_path)
    data = TASKS["groups"].load(str(tmp_path / "written.jsonl"))
    result, _ = evaluate_model(str(model), TASKS["groups"], data, out=None, progress=False, max_new_tokens=48)
    assert [figures["correct"] for figures in result["metrics"].values()] == [1.0, 1.0]


SPACES = {  # prompt, completion
    "none": ("{}:", "{}"),
    "at the start of the completion": ("{}:", " {}"),
    "at the end of the prompt": ("{}: ", "{}"),
    "on both sides": ("{}: ", " {}"),
    "a line": ("{}:\n", "{}"),
    "a line before the completion": ("{}:", "\n{}"),
}


@ASKS_WHAT_IS_NOT_TRAINED
@pytest.mark.parametrize("spaces", SPACES)
def test_plain_prompts_are_asked_with_the_boundary_that_training_saw(spaces, tokenizer, tmp_path, capsys):
    prompt, completion = SPACES[spaces]
    tokenizer = templated(tokenizer, "qwen2_5")  # a chat template that these rows do not use
    asked = [[prompt.format(question(number, wording)) for wording in WORDINGS] for number in range(len(ANSWERS))]
    answers = ["red", "the", "word", "lines", "natural"]  # the tokenizer joins their first letters with a space
    rows = [
        {"prompt": text, "completion": completion.format(answer)}
        for texts, answer in zip(asked, answers, strict=True)
        for text in texts
    ]
    groups = [
        {"id": str(number), "prompts": texts, "wordings": WORDINGS, "answer": answer}
        for number, (texts, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    model = memorise(rows, tokenizer, tmp_path)
    assert scores(model, groups, tmp_path, answers) == [1.0] * 4
    capsys.readouterr()
    assert cli.main(["generate", str(model), "--prompt", asked[0][0]]) == 0, "as text, as it was trained"
    assert capsys.readouterr().out.endswith("-> 'red'\n")


def test_a_boundary_that_depends_on_the_answer_is_said_before_training_and_when_asked(tokenizer, tmp_path, caplog):
    """The tokenizer has " r" and no " 7": no prompt is the start of both rows."""
    rows = [{"prompt": "the digit: ", "completion": "7"}, {"prompt": "the dog: ", "completion": "red"},
            {"prompt": "the word: ", "completion": "red"}]  # fmt: skip
    model = memorise(rows, tokenizer, tmp_path)
    assert "1 of 3 train rows do not begin with the prompt that will be asked" in caplog.text
    assert "2 of 3 train rows: the prompt ends in white space that is a part of" in caplog.text
    groups = [{"id": str(i), "prompts": [row["prompt"]], "answer": row["completion"]} for i, row in enumerate(rows)]
    with pytest.warns(UserWarning, match="1 of 3 prompts are not, token for token, the start of the row"):
        scores(model, groups, tmp_path, ["red", "7"])


def test_a_format_that_was_not_trained_is_said(tokenizer, tmp_path, recwarn, capsys):
    model = memorise([{"prompt": f"line {i}", "completion": "red"} for i in range(4)], tokenizer, tmp_path)
    scores(model, [{"id": "0", "prompts": [conversation(0, "plain")], "answer": "red"}], tmp_path, ["red"])
    said = "1 of 1 prompts are messages, but the model was trained on plain prompts."
    assert said in str(recwarn[0].message)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": conversation(0, "plain")}) + "\n")
    chat = ["--input", str(tmp_path / "chat.jsonl"), "--output"]
    for verb, output in (("generate", "answers.jsonl"), ("embed", "prompts.safetensors")):
        assert cli.main([verb, str(model), *chat, str(tmp_path / output)]) == 0
        assert f"Note: {said}" in capsys.readouterr().err


def test_a_template_that_drops_a_part_of_the_answer_is_said(tokenizer, tmp_path, caplog):
    tokenizer = templated(tokenizer, "deepseek_r1_distill")
    rows = [{"messages": [*conversation(0, "plain"), {"role": "assistant", "content": "so</think>red"}]}] * 4
    memorise(rows, tokenizer, tmp_path)
    assert "4 of 4 train rows: the chat template leaves out a part of the answer" in caplog.text


def test_a_stop_token_inside_an_answer_is_said(tokenizer, tmp_path, caplog):
    """The template closes the reasoning with this tokenizer's eos."""
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{{ message.thinking + '<|end|>' if message.thinking else '' }}{{ message['content'] }}",
    )
    rows = [{"messages": [*conversation(0, "plain"), {"role": "assistant", "content": "red", "thinking": "so"}]}] * 4
    memorise(rows, tokenizer, tmp_path)
    assert "4 of 4 train rows: a token at which generation stops is a trained token before the end" in caplog.text


def test_tools_that_the_template_does_not_write_are_said(tokenizer, tmp_path, caplog):
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": TOOLS[0]["function"]}]}
    answer = {"role": "assistant", "content": "red"}
    rows = [
        {"messages": [*conversation(0, "plain"), answer], "tools": TOOLS},
        {"messages": [*conversation(1, "plain"), call, {"role": "user", "content": "and?"}, answer], "tools": None},
        {"messages": [*conversation(2, "plain"), answer], "tools": None},
    ]
    memorise(rows, tokenizer, tmp_path)
    assert "2 of 3 train rows: the chat template writes nothing of the row's tools or tool calls" in caplog.text
