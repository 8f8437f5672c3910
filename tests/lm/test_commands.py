"""Claims about the commands of language models: the main job works; a mistake is one line, and nothing is lost."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llm_jepa.cli import main
from llm_jepa.core.checks import SPEED, check_best_metric
from llm_jepa.core.diagnostics import SPACE_FIGURES
from llm_jepa.families import parse_recipe
from llm_jepa.lm.commands import build_trainer
from llm_jepa.lm.trainer import LLMJEPATrainer
from tests.conftest import FLOAT32, LLAMA, expect_refusal

RECIPE = {
    "family": "lm",
    "model_config": LLAMA,
    "tokenizer_vocab_size": 320,
    "num_predictor_tokens": 1,
    "use_cpu": True,
    "activation_checkpointing": False,
    "learning_rate": 0.01,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "diagnostics_pairs": 8,
}


@pytest.fixture
def recipe(tmp_path, rows):
    """A function that writes a recipe (RECIPE with changes; None removes a key) and returns its path."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**changes):
        values = {**RECIPE, "train_data": str(data), "output_dir": str(tmp_path / "run"), **changes}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory, rows) -> Path:
    """One model trained by the command line, for the tests that only read it."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {**RECIPE, "train_data": str(data), "output_dir": str(folder / "run"), "validation_rows": 12}
    values |= {"eval_strategy": "steps", "eval_steps": 2, "num_predictor_tokens": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


# -- the main job ---------------------------------------------------------------------------------------------------


def test_trained_model_loads_in_a_fresh_process_with_plain_transformers(trained):
    """No import of llm_jepa; logits of a known input equal those of the weights on disk."""
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert not report["missing_keys"] and not report["unexpected_keys"], report
assert "llm_jepa" not in sys.modules and model.config.use_cache
turns = [{"role": "user", "content": "lines with a vowel"}]
text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print("TEXT", repr(tokenizer.decode(out[0, ids.shape[1]:])))
"""
    done = subprocess.run([sys.executable, "-c", script, str(trained)], capture_output=True, text=True)
    assert done.returncode == 0 and "TEXT" in done.stdout, done.stderr[-1500:]
    config = json.loads((trained / "tokenizer_config.json").read_text())
    assert "is_local" not in config and "local_files_only" not in config
    assert not list(trained.rglob("*.bin")), "a pickle was left behind"
    card = (trained / "README.md").read_text()
    assert "| num_predictor_tokens | 2 |" in card and "effective_rank_target" in card


def test_generate_prints_and_writes(trained, tmp_path, rows, capsys, recwarn):
    assert main(["generate", str(trained), "--prompt", "lines with a vowel", "--max_new_tokens", "4"]) == 0
    assert "'lines with a vowel' -> " in capsys.readouterr().out
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    assert main(["generate", str(trained), "--input", str(data), "--output", str(out), "--max_new_tokens", "4"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row["messages"][:-1] for row in rows[:5]]
    assert all(set(line) == {"prompt", "text", "stopped"} for line in lines)
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)], "noise for the user"


def test_embed_writes_what_the_model_computes(trained, tmp_path, rows):
    """Against separate forward passes: the context at its last predictor token, the target at its last token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_jepa.lm.views import build_views

    data, out = tmp_path / "rows.jsonl", tmp_path / "pairs.safetensors"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert main(["embed", str(trained), "--input", str(data), "--output", str(out), "--batch_size", "2"]) == 0
    saved = load_file(out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    predictors = tokenizer.convert_tokens_to_ids(["<|predictor_1|>", "<|predictor_2|>"])
    for i, row in enumerate(rows[:3]):
        views = build_views(row, tokenizer)
        for name, ids in (("context", views.contexts[0] + predictors), ("target", views.targets[0])):
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(saved[name][i], hidden, rtol=FLOAT32, atol=FLOAT32)


def test_embed_of_prompts_alone_is_the_context_of_whole_rows(trained, tmp_path, rows, capsys):
    """Whatever the completion is: as text, as turns, as messages that end with a question, as {"text"}."""
    whole = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows[:3]]
    texts = [{"prompt": row["messages"][1]["content"], "completion": " yes"} for row in rows[:3]]
    for name, pairs, alone in [
        ("turns", whole, [{"prompt": row["prompt"]} for row in whole]),
        ("messages", whole, [{"messages": row["prompt"]} for row in whole]),
        ("some", whole, [{"prompt": whole[0]["prompt"]}, *whole[1:]]),
        ("prompt", texts, [{"prompt": row["prompt"]} for row in texts]),
        ("text", whole, [{"text": row["prompt"][-1]["content"]} for row in whole]),  # as the model was trained
    ]:
        saved = []
        for kind, written in (("whole", pairs), ("alone", alone)):
            data, out = tmp_path / f"{name}-{kind}.jsonl", tmp_path / f"{name}-{kind}.safetensors"
            data.write_text("".join(json.dumps(row) + "\n" for row in written))
            assert main(["embed", str(trained), "--input", str(data), "--output", str(out)]) == 0
            saved.append(load_file(out))
        count = 1 if name == "some" else 3
        said = capsys.readouterr().out
        assert f"{count} of 3 rows have no completion" in said and "Wrote context (3, " in said
        assert set(saved[0]) == {"context", "target"} and set(saved[1]) == {"context"}
        torch.testing.assert_close(saved[1]["context"], saved[0]["context"], rtol=FLOAT32, atol=FLOAT32)


def test_embed_of_prompts_alone_for_a_model_of_the_reverse_direction(trained, tmp_path, rows):
    """There, the prompt is the target: what is predicted from the completion is not written."""
    shutil.copytree(trained, tmp_path / "reverse", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((trained / "config.json").read_text())
    config["llm_jepa"]["direction"] = "reverse"
    (tmp_path / "reverse" / "config.json").write_text(json.dumps(config))
    saved = []
    for name, written in (("whole", rows[:3]), ("alone", [{"messages": row["messages"][:-1]} for row in rows[:3]])):
        data, out = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.safetensors"
        data.write_text("".join(json.dumps(row) + "\n" for row in written))
        assert main(["embed", str(tmp_path / "reverse"), "--input", str(data), "--output", str(out)]) == 0
        saved.append(load_file(out))
    assert set(saved[1]) == {"target"}
    torch.testing.assert_close(saved[1]["target"], saved[0]["target"], rtol=FLOAT32, atol=FLOAT32)


def test_embed_without_a_prompt_is_refused(trained, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "x"}\n')
    command = ["embed", str(trained), "--input", str(data), "--output", str(tmp_path / "o.safetensors")]
    expect_refusal(capsys, command, "row 0: found the columns ['question'], need 'prompt'")


def test_rows_in_two_formats_and_columns_that_nothing_reads_are_said_once(recipe, tmp_path, rows, monkeypatch):
    """At training and in the dry run: a third of the rows would be trained without the template, silently."""
    mixed = rows[:8] + [{"prompt": f"p{i}", "completion": "c"} for i in range(4)]
    mixed[0] = {**mixed[0], "prompt": "p", "paraphrases": ["x"], "id": 7}
    data = tmp_path / "mixed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    path = recipe(train_data=str(data), validation_data=str(tmp_path / "train.jsonl"))
    for words in (["train", path, "--dry-run"], ["train", path]):
        messages = []
        monkeypatch.setattr("llm_jepa.lm.data.logger.warning", messages.append)
        assert main(words) == 0
        formats = [message for message in messages if "are conversations" in message]
        unused = [message for message in messages if "not used" in message]
        assert len(formats) == len(unused) == 1, "one line each, and none about the validation rows"
        assert "8 of 12 train rows" in formats[0] and "4 are plain texts" in formats[0]
        assert "paraphrases, id, prompt and completion of 1 rows that have messages" in unused[0]
        assert "other wordings belong in views" in unused[0]


def test_rows_with_a_byte_order_mark_train(recipe, tmp_path):
    path = recipe()
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "train.jsonl").read_bytes())
    assert main(["train", path, "--train_data", str(tmp_path / "bom.jsonl"), "--max_steps", "1"]) == 0


def test_training_data_are_a_list_or_a_pattern(recipe, tmp_path):
    """The same rows from one file and from two: the same data hash, so that the run resumes."""
    path = recipe(max_steps=1)
    assert main(["train", path]) == 0
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part-0.jsonl").write_text("".join(lines[:20]))
    (tmp_path / "part-1.jsonl").write_text("".join(lines[20:]))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    for data in (f"{tmp_path}/part-*.jsonl", f"[{tmp_path}/part-0.jsonl, {tmp_path}/part-1.jsonl]"):
        out = ["--output_dir", str(tmp_path / f"run{len(data)}")]
        assert main(["train", path, "--train_data", data, *out]) == 0
        again = json.loads((tmp_path / f"run{len(data)}" / "run.json").read_text())
        assert again == run


def test_dry_run_shows_recipe_row_and_cost_and_trains_nothing(recipe, tmp_path, capsys):
    assert main(["train", recipe(), "--dry-run", "--jepa_weight", "0.25"]) == 0
    out = capsys.readouterr().out
    assert "jepa_weight: 0.25" in out and "<|predictor_1|>" in out and "x (context_view prefix" in out
    assert re.search(
        r"context +1 tokens, positions (\d+)\.\.\1, sees itself and the first \1 tokens of the LM row", out
    )
    asked = out.split("# The first prompt, as the trained model is asked it\n")[1].splitlines()[0]
    assert re.fullmatch(r"\d+ tokens, up to the generation prompt: .*<\|assistant\|>.", asked)
    assert not (tmp_path / "run").exists()


def test_dry_run_tells_rows_steps_tokens_memory_and_needs_no_weights(trained, recipe, tmp_path, capsys):
    folder = tmp_path / "no weights"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*", "manifest.json"))
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": str(i)}) + "\n" for i in range(21)))
    path = recipe(
        model_config=None, tokenizer_vocab_size=None, model_name_or_path=str(folder), max_steps=None,
        num_train_epochs=2, train_data=str(data), gradient_accumulation_steps=2,
    )  # fmt: skip
    assert main(["train", path, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "# Steps\n6 steps, 2 epochs of 3 (21 rows, batches of 4 x 2 accumulated)" in out
    assert "21 of 21 train rows are plain texts, and the tokenizer has a chat template" in out
    weights = sum(tensor.numel() for tensor in load_file(trained / "model.safetensors").values())
    assert f"{weights:,} of {weights:,} weights are trained" in out and "# Time\nNot estimated" in out
    assert re.search(r"# Memory\nAbout [\d.]+ [MGk]B a process at the peak: weights [\d.]+ [MGk]B, optimizer", out)
    assert main(["train", path, "--dry-run", "--use_peft", "true", "--launch", "fsdp2", "--num_processes", "4"]) == 0
    out = capsys.readouterr().out
    assert "2 steps, 2 epochs of 1 (21 rows, batches of 4 x 2 accumulated x 4 processes)" in out and "gathered" in out
    assert main(["train", recipe(), "--dry-run"]) == 0
    assert "are plain texts" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_dry_run_refuses_rows_beyond_the_positions_of_the_model(recipe, capsys):
    """GPT-2 has a table of positions. Without this, only the run says so, after it has loaded the model."""
    model = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 8}
    for words in (["--dry-run"], []):
        expect_refusal(
            capsys, ["train", recipe(model_config=model), *words], "longer than the 8 positions of the model"
        )


def test_dry_run_of_the_baseline_adds_nothing(recipe, capsys):
    assert main(["train", recipe(), "--dry-run", "--jepa_weight", "0"]) == 0
    out = capsys.readouterr().out
    assert "1.00 x" in out and "plain SFT" in out and "predictor" not in out.split("# The first row")[1]


def test_resume_continues_and_equals_the_uninterrupted_run(recipe, tmp_path):
    assert main(["train", recipe(output_dir=str(tmp_path / "whole"))]) == 0
    path = recipe(output_dir=str(tmp_path / "cut"))
    assert main(["train", path]) == 0
    # As a kill during the second save would leave it: the newest checkpoint is torn, the one before is whole.
    weights = tmp_path / "cut" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "cut" / "model.safetensors").unlink()
    assert main(["train", path, "--resume_from_checkpoint", "true"]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("best", [False, True])
def test_resuming_a_finished_run_takes_no_step(best, recipe, tmp_path, capsys):
    """transformers would train one step more. If the final save is missing, it is made from the checkpoint to keep."""
    options = {"lr_scheduler_type": "constant", "validation_rows": 12, "eval_strategy": "steps", "eval_steps": 2}
    path = recipe(**options, load_best_model_at_end=best, metric_for_best_model="eval_lm_loss", greater_is_better=False)
    weights = tmp_path / "run" / "model.safetensors"
    assert main(["train", path]) == 0
    before = weights.read_bytes()
    assert main(["train", path, "--resume_from_checkpoint", "true"]) == 0
    assert "already finished (4 steps)" in capsys.readouterr().out and weights.read_bytes() == before
    weights.unlink()
    assert main(["train", path, "--resume_from_checkpoint", "true"]) == 0
    a, b = load_file(weights), load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert weights.read_bytes() == before and all(torch.equal(a[key], b[key]) for key in a)


def test_lora_run_leaves_a_plain_merged_model_and_the_adapter(recipe, trained, tmp_path):
    path = recipe(
        model_config=None, model_name_or_path=str(trained), use_peft=True, lora_r=4, lora_target_modules="all-linear"
    )
    assert main(["train", path]) == 0
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before, after = load_file(trained / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name]), "the adapter was not merged"
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_launch_with_a_file_that_asks_for_one_process_runs_once(recipe, tmp_path, capfd):
    """Such a file sets no LOCAL_RANK, so a child that saw --launch again would launch for ever."""
    config = tmp_path / "one.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\n")
    assert main(["train", recipe(max_steps=1), "--launch", str(config)]) == 0
    assert capfd.readouterr().out.count("Saved to") == 1


def test_saved_table_and_card_are_of_the_best_step(recipe, tmp_path, capsys):
    """A learning rate that helps first and harms then: the last evaluation is not that of the saved weights."""
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_lm_loss", "greater_is_better": False}
    path = recipe(
        validation_rows=12, eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=6, optim="sgd",
        learning_rate=3.0, lr_scheduler_type="constant", max_grad_norm=0.0, per_device_train_batch_size=8,
        objective="cosine", **options,
    )  # fmt: skip
    assert main(["train", path]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["best_global_step"] < 6, "the last step is the best: this would prove nothing"
    assert f"saved weights (step {state['best_global_step']})" in capsys.readouterr().out
    assert f"(step {state['best_global_step']})" in (tmp_path / "run" / "README.md").read_text()


# -- mistakes -------------------------------------------------------------------------------------------------------

MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]}
BAD_ROWS = {
    "no completion": ([{"prompt": "a", "completion": ""}], "row 0 has no completion"),
    "no known columns": ([{"text": "a"}], "row 0: found the columns ['text']"),
    "ends with the user": ([{"messages": MESSAGES["messages"][:1]}], "ends with role 'user'"),
    "content is no text": (
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]}],
        "has no text content",
    ),
    "a picture in one turn": (
        [{"messages": [{"role": "system", "content": [{"type": "image", "image": "s"}]}, *MESSAGES["messages"]]}],
        "row 0: the system turn holds a content part that is not a text (image)",
    ),
    "views of another turn": (
        [{**MESSAGES, "views": {"contexts": [[{"role": "assistant", "content": "x"}]]}}],
        "row 0: 'views' has contexts whose turns are not those of the row",
    ),
    "second row is bad": ([MESSAGES, {"messages": []}], "row 1"),
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"jepa_wieght": 1.0}, "did you mean 'jepa_weight'"),
        ({"warmup_ratio": 0.1}, "warmup_steps"),
        ({"num_predictor_tokens": 2.7}, "num_predictor_tokens: expected int, got 2.7"),
        ({"learning_rate": [1e-5]}, "learning_rate: expected float"),
        ({"objective": "cosin"}, "one of info_nce, cosine"),
        ({"use_peft": "yes"}, "use_peft: expected true or false"),
        ({"train_data": None}, "no train_data"),
        ({"output_dir": None}, "no output_dir"),
        ({"train_data": "nowhere.jsonl"}, "No data file at nowhere.jsonl"),
        ({"model_config": None}, "exactly one of model_name_or_path"),
        ({"model_config": {"model_type": "lama"}}, "not know model_type 'lama'"),
        ({"model_config": {**LLAMA, "hidden_sise": 3}}, "llama has no hidden_sise"),
        ({"model_config": {"model_type": "t5"}}, "model_type 't5'"),
        ({"model_config": {**LLAMA, "num_hidden_layers": 100_000}}, "num_hidden_layers is 100,000"),
        ({"model_config": {**LLAMA, "intermediate_size": 10**12}}, "lower intermediate_size"),
        (
            {"attn_implementation": "sdpa", "model_config": {"model_type": "bloom", "n_layer": 1, "hidden_size": 32}},
            "'bloom'",
        ),
        ({"train_sampling_strategy": "by_length"}, "one of random, sequential, group_by_length"),
        ({"lora_r": 8}, "use_peft: true"),
        ({"optim_args": "betas=zz"}, "optim_args: betas would be ignored"),
        ({"report_to": "wandb"}, "wandb"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be 1 or more"),
        ({"num_predictor_tokens": 0, "attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"model_config": None, "model_name_or_path": "./no/such/folder"}, "No model folder"),
        ({"tokenizer_vocab_size": 100}, "tokenizer_vocab_size=100"),
        ({"packing": True}, "packing=True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"jepa_weight": -1}, "jepa_weight"),
        ({"num_predictor_tokens": 11}, "0..10"),
        ({"max_length": 5}, "have a prompt that fills max_length=5"),
        ({"eval_strategy": "steps", "eval_steps": 2}, "nothing to evaluate on"),
        ({"validation_rows": 48}, "leaves nothing"),
        ({"chat_template_path": "none.jinja"}, "No chat template"),
        ({"chat_template_path": "some/model"}, ".jinja"),
        ({"eval_strategy": "sometimes"}, "sometimes"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"bf16": True, "fp16": True}, "fp16"),
        ({"report_to": "nothing_known"}, "nothing_known"),
    ],
)
def test_recipe_mistakes(changes, said, recipe, tmp_path, capsys):
    expect_refusal(capsys, ["train", recipe(**changes)], said)
    assert not list((tmp_path / "run").rglob("*")), "a run that cannot start must leave the folder free"


@pytest.mark.parametrize("case", list(BAD_ROWS))
def test_bad_rows_name_the_row_and_the_field(case, recipe, tmp_path, capsys):
    rows, said = BAD_ROWS[case]
    data = tmp_path / "bad.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expect_refusal(capsys, ["train", recipe(train_data=str(data))], said)
    assert not list((tmp_path / "run").rglob("*")), "a run that cannot start must leave the folder free"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "holds no rows"),
        (b'{"prompt": "a"', "line 1 is not JSON"),
        (b"[1]\n", "JSON object"),
    ],
)
def test_unreadable_data_files(content, said, recipe, tmp_path, capsys):
    data = tmp_path / "bad.jsonl"
    data.write_bytes(content)
    expect_refusal(capsys, ["train", recipe(train_data=str(data))], "bad.jsonl", said)


TWO_MACHINES = ("--num_machines", "2", "--main_process_ip", "127.0.0.1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--learning_rate"], "--learning_rate has no value"),
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["extra"], "Unexpected argument 'extra'"),
        (["--max_steps", "many"], "max_steps: expected int"),
        (["--num_processes", "2"], "--num_processes needs --launch"),
        (["--launch", "tpu"], "'tpu' is not one of cpu, ddp, fsdp2, zero3"),
        (["--launch", "cpu", "--num_processes", "none"], "must be a whole number"),
        (["--launch", "ddp"], "needs GPUs"),
        (["--machine_rank", "0"], "--machine_rank needs --launch"),
        (["--launch", "cpu", "--machine_rank", "0"], "need --num_machines"),
        (["--launch", "cpu", "--num_machines", "2"], "needs --machine_rank"),
        (["--launch", "cpu", *TWO_MACHINES, "--machine_rank", "2"], "must be 0 to 1"),
        (["--launch", "cpu", *TWO_MACHINES, "--machine_rank", "1", "--num_processes", "3"], "does not divide by the 2"),
    ],
)
def test_command_line_mistakes(arguments, said, recipe, capsys):
    expect_refusal(capsys, ["train", recipe(), *arguments], said)


def test_output_dir_of_another_run_is_left_alone(recipe, trained, tmp_path, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    expect_refusal(
        capsys, ["train", recipe(output_dir=str(trained))], "holds a run already", "--resume_from_checkpoint true"
    )
    expect_refusal(
        capsys, ["train", recipe(output_dir=str(trained)), "--resume_from_checkpoint", "true"], "the run has changed"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    expect_refusal(capsys, ["train", recipe(output_dir=str(tmp_path / "mine"))], "is not empty")
    expect_refusal(capsys, ["train", recipe(output_dir=str(tmp_path / "mine" / "thesis.txt"))], "is a file")
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(("strategy", "is_evaluated"), [("no", False), ("steps", True)])
def test_the_card_shows_figures_of_trained_weights_alone(strategy, is_evaluated, recipe, tmp_path):
    """20 validation rows, and diagnostics_pairs asks for 512. The start model is measured in both runs."""
    path = recipe(validation_rows=20, eval_strategy=strategy, eval_steps=2, diagnostics_pairs=512)
    assert main(["train", path]) == 0
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert "eval_recall_at_1" in log[0] and log[0]["step"] == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert ("measured on 20 pairs" in card) == ("| recall_at_1 |" in card) == is_evaluated
    assert ("Not evaluated" in card) != is_evaluated


# -- which runs are the same ----------------------------------------------------------------------------------------


def test_a_run_that_saved_nothing_leaves_the_folder_free(recipe, tmp_path, capsys):
    """It failed after it had claimed the folder and before its first checkpoint: another recipe may have it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"optim": "adamw_8bit"}))
    assert main(["train", recipe(), "--resume_from_checkpoint", "true"]) == 0
    assert "has no checkpoint yet: starting at step 0" in capsys.readouterr().out
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"optim": "adamw_8bit"}))
    assert main(["train", recipe()]) == 0
    assert "optim" not in json.loads((folder / "run.json").read_text())
    expect_refusal(capsys, ["train", recipe()], "holds a run already")


@pytest.mark.parametrize("words", [[], ["--resume_from_checkpoint", "true"]])
def test_a_folder_in_which_another_process_trains_is_not_taken(words, recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    lock = "fcntl.flock(file, fcntl.LOCK_EX); print(1, flush=True); input()"
    other = f"import fcntl; file = open({str(tmp_path / 'run' / 'run.json')!r}); {lock}"
    process = subprocess.Popen([sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    try:
        expect_refusal(capsys, ["train", recipe(), *words], "Another process trains in")
    finally:
        process.communicate("\n")
    assert main(["train", recipe(), *words]) == 0


def test_a_base_model_may_move_and_may_not_change(recipe, trained, tmp_path, capsys):
    """LoRA takes the frozen weights from the folder again, so a changed one would silently be another run."""
    options = {"model_config": None, "use_peft": True, "lora_r": 2, "max_steps": 2, "save_steps": 1}
    base = tmp_path / "base"
    shutil.copytree(trained, base, ignore=shutil.ignore_patterns("checkpoint-*"))
    assert main(["train", recipe(**options, model_name_or_path=str(base))]) == 0
    weights = load_file(tmp_path / "run" / "model.safetensors")
    run = json.loads((tmp_path / "run" / "run.json").read_text())

    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "model.safetensors").unlink()
    base.rename(tmp_path / "moved")
    moved = recipe(**options, model_name_or_path=str(tmp_path / "moved"))
    assert main(["train", moved, "--resume_from_checkpoint", "true"]) == 0
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["contents"] == run["contents"]

    # A run.json of an earlier version has no hash: it names the folder, and resumes from that one alone.
    old = {key: value for key, value in run.items() if key != "contents"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(old))
    expect_refusal(capsys, ["train", moved, "--resume_from_checkpoint", "true"], f"{base}' -> ")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**old, "model_name_or_path": str(tmp_path / "moved")}))
    assert main(["train", moved, "--resume_from_checkpoint", "true"]) == 0

    # The same name with one other weight.
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    changed = load_file(tmp_path / "moved" / "model.safetensors")
    changed[min(changed)] += 1
    save_file(changed, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    expect_refusal(
        capsys, ["train", moved, "--resume_from_checkpoint", "true"], "model_name_or_path", "the run has changed"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"logging_steps": 1},
        {"save_total_limit": 1},
        {"report_to": "tensorboard"},
        {"dataloader_num_workers": 1},
        {"dataloader_pin_memory": False},
        {"per_device_eval_batch_size": 3},
        {"weight_decay": 0.0},  # the default, written out
        {"too_long": "truncate"},
    ],
)
def test_what_does_not_change_the_result_may_change_at_a_resume(change, recipe, capsys):
    assert main(["train", recipe(validation_rows=8, eval_strategy="steps", eval_steps=2)]) == 0
    path = recipe(validation_rows=8, eval_strategy="steps", eval_steps=2, **change)
    assert main(["train", path, "--resume_from_checkpoint", "true"]) == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, {"eval_steps": 1}),  # an evaluation draws from the generator of dropout
        ({}, {"eval_strategy": "no"}),
        ({"load_best_model_at_end": True}, {"per_device_eval_batch_size": 3}),
        ({"target_encoder": "base"}, {"per_device_eval_batch_size": 3}),
        ({}, {"weight_decay": 0.1}),
        ({}, {"too_long": "drop"}),
        ({}, {"optim": "sgd"}),
    ],
)
def test_what_changes_the_result_may_not(options, change, recipe, capsys):
    options = {"validation_rows": 8, "eval_strategy": "steps", "eval_steps": 2, **options}
    assert main(["train", recipe(**options)]) == 0
    path = recipe(**{**options, **change})
    expect_refusal(
        capsys,
        ["train", path, "--resume_from_checkpoint", "true"],
        f"the run has changed in 1 place(s) ({next(iter(change))}",
    )


def test_a_longer_run_is_another_run_and_the_advice_works(recipe, tmp_path, capsys):
    """The learning rate depends on max_steps from the first step on."""
    assert main(["train", recipe()]) == 0
    words = ["train", recipe(max_steps=6), "--resume_from_checkpoint", "true"]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "max_steps: 4 -> 6" in message and "another run" in message
    advice = re.search("(--model_name_or_path .*) --output_dir NEW", message).group(1).split()
    assert main(["train", recipe(), *advice, "--output_dir", str(tmp_path / "further")]) == 0
    assert (tmp_path / "further" / "model.safetensors").exists()


def test_a_finished_run_says_so_before_views_are_built(recipe, tmp_path, monkeypatch, capsys):
    assert main(["train", recipe()]) == 0
    monkeypatch.setattr("llm_jepa.lm.loading.load_tokenizer", None)
    assert main(["train", recipe(), "--resume_from_checkpoint", "true"]) == 0
    assert "already finished (4 steps)" in capsys.readouterr().out


# -- rows that are too long -----------------------------------------------------------------------------------------


@pytest.fixture
def long_recipe(recipe, tmp_path, rows):
    """Rows 5 and 9 have a long prompt, row 7 a long completion. Every other row fits into 100 tokens."""
    data = [{"prompt": f"say {i}", "completion": f"{i} it is"} for i in range(20)]
    for i in (5, 9):
        data[i]["prompt"] = "far too long " * 100
    data[7]["completion"] = "so long " * 100

    def write(**changes):
        path = recipe(max_length=100, **changes)
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        return path

    return write


def test_prompts_that_are_too_long_are_counted_before_the_model_is_loaded(long_recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("llm_jepa.lm.loading.load_model", None)
    for words in (["train", long_recipe()], ["train", long_recipe(), "--dry-run"]):
        expect_refusal(
            capsys, words, "2 of 20 train rows have a prompt that fills max_length=100", "rows 5, 9; the first",
            "too_long: drop",
        )  # fmt: skip
    expect_refusal(
        capsys, ["train", long_recipe(too_long="refuse")], "3 of 20 train rows are longer", "rows 5, 7, 9", "truncate"
    )
    assert not (tmp_path / "run").exists()


def test_the_length_that_the_message_names_is_enough(long_recipe, capsys):
    assert main(["train", long_recipe(), "--dry-run"]) == 2
    tokens = re.search(r"the longest of these rows has (\d+) tokens", capsys.readouterr().err).group(1)
    assert main(["train", long_recipe(), "--max_length", tokens, "--dry-run"]) == 0
    assert "train: 20" in capsys.readouterr().out


def test_too_long_rows_can_be_left_out_and_are_counted_everywhere(long_recipe, tmp_path, capsys):
    counts = "17 (3 more left out, longer than max_length)"
    assert main(["train", long_recipe(too_long="drop"), "--dry-run"]) == 0
    assert f"train: {counts}\n" in capsys.readouterr().out
    assert main(["train", long_recipe(too_long="drop")]) == 0
    assert f"| train rows | {counts} |" in (tmp_path / "run" / "README.md").read_text()
    # Nothing but these three rows is missing: the run is the one without them.
    kept = [line for i, line in enumerate((tmp_path / "train.jsonl").read_text().splitlines()) if i not in (5, 7, 9)]
    (tmp_path / "kept.jsonl").write_text("\n".join(kept))
    tokenizer = str(tmp_path / "run")  # a new one would be trained on fewer rows
    for name, source in (("a", "train"), ("b", "kept")):
        words = ["--output_dir", str(tmp_path / name), "--train_data", str(tmp_path / f"{source}.jsonl")]
        assert main(["train", long_recipe(too_long="drop"), *words, "--tokenizer_name_or_path", tokenizer]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_cut_rows_are_counted_in_dry_run_and_card(long_recipe, tmp_path, capsys):
    path = long_recipe(max_steps=1)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(line for i, line in enumerate(lines) if i not in (5, 9)))
    assert main(["train", path, "--dry-run"]) == 0
    assert "train: 18 (1 of them cut to max_length)" in capsys.readouterr().out
    assert main(["train", path]) == 0
    assert "| train rows | 18 (1 of them cut to max_length) |" in (tmp_path / "run" / "README.md").read_text()


def test_when_every_row_is_too_long_nothing_is_trained(long_recipe, capsys):
    expect_refusal(capsys, ["train", long_recipe(too_long="drop"), "--max_length", "1"], "leaves no train row")
    expect_refusal(capsys, ["train", long_recipe(), "--max_length", "1"], "20 of 20 train rows")


# -- batches of one row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_device_train_batch_size": 1}, "objective: info_nce needs other pairs"),
        ({"objective": "cosine", "regularizer": "sigreg"}, "cannot estimate a distribution from 4 pair(s)"),
        ({"per_device_eval_batch_size": 1}, "per_device_eval_batch_size: 1 evaluates each row alone"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 100}, "dataloader_drop_last: true leaves no"),
    ],
)
def test_batches_that_compare_nothing_are_refused_before_a_model_is_loaded(options, said, recipe, monkeypatch, capsys):
    monkeypatch.setattr("llm_jepa.lm.loading.load_model", None)
    path = recipe(validation_rows=8, eval_strategy="steps", eval_steps=2, **options)
    for dry in ([], ["--dry-run"]):
        expect_refusal(capsys, ["train", path, *dry], said)


@pytest.mark.parametrize(
    ("rows_left", "options", "is_said"),
    [
        (9, {}, True),  # 4 + 4 + 1
        (10, {}, False),
        (9, {"dataloader_drop_last": True}, False),
        (9, {"jepa_weight": 0}, False),
        (9, {"objective": "cosine"}, False),
        (9, {"negatives": "optimizer_step", "gradient_accumulation_steps": 2}, True),  # (4 + 4) + 1
        (13, {"negatives": "optimizer_step", "gradient_accumulation_steps": 2}, False),  # (4 + 4) + (4 + 1)
    ],
)
def test_a_last_batch_of_one_row_is_said(rows_left, options, is_said, recipe, tmp_path, caplog, monkeypatch):
    """Its InfoNCE is 0: nothing is learnt from the pair."""
    path = recipe(**options)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()[:rows_left]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert main(["train", path, "--dry-run"]) == 0
    assert ("The last step of an epoch has a single row" in caplog.text) == is_said


def test_resume_mistakes(recipe, tmp_path, capsys):
    expect_refusal(capsys, ["train", recipe(), "--resume_from_checkpoint", "true"], "leave out --resume_from")
    assert main(["train", recipe()]) == 0
    expect_refusal(
        capsys, ["train", recipe(learning_rate=0.5), "--resume_from_checkpoint", "true"], "learning_rate: 0.01 -> 0.5"
    )
    expect_refusal(capsys, ["train", recipe(), "--resume_from_checkpoint", str(tmp_path / "x")], "no such folder")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    assert main(["train", recipe(), "--resume_from_checkpoint", "true"]) == 0  # finished; nothing to resume
    (tmp_path / "run" / "model.safetensors").unlink()
    expect_refusal(capsys, ["train", recipe(), "--resume_from_checkpoint", "true"], "optimizer.pt is missing")


def test_resume_on_another_number_of_processes_is_refused(recipe, tmp_path, capsys):
    assert main(["train", recipe()]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**run, "num_processes": 2}))
    expect_refusal(capsys, ["train", recipe(), "--resume_from_checkpoint", "true"], "num_processes: 2 -> 1")


def test_resume_without_optimizer_state_is_refused(recipe, tmp_path, capsys):
    assert main(["train", recipe(save_only_model=True)]) == 0
    (tmp_path / "run" / "model.safetensors").unlink()
    expect_refusal(
        capsys, ["train", recipe(save_only_model=True), "--resume_from_checkpoint", "true"], "no optimizer state"
    )


def test_processes_that_cannot_see_each_other_are_refused(recipe, monkeypatch, capsys):
    """torchrun on a machine without GPUs and without use_cpu: each rank would train into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    expect_refusal(capsys, ["train", recipe(use_cpu=None)], "2 processes were started and cannot see each other")


def test_existing_output_is_not_overwritten(trained, tmp_path, rows, capsys):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps(rows[0]) + "\n")
    out.write_text("kept")
    for command in (["generate", str(trained), "--prompt", "x"], ["embed", str(trained), "--input", str(data)]):
        expect_refusal(capsys, [*command, "--output", str(out)], "exists; name a new file")
        expect_refusal(capsys, [*command, "--output", str(tmp_path / "no" / "o")], "No folder")
    assert out.read_text() == "kept"


def test_a_best_metric_nobody_computes(recipe, tmp_path, capsys):
    path = recipe(
        validation_rows=12, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=True,
        metric_for_best_model="bleu",
    )  # fmt: skip
    expect_refusal(capsys, ["train", path], "metric_for_best_model", "'bleu'; choose one of eval_loss, eval_lm_loss,")
    expect_refusal(capsys, ["train", path, "--dry-run"], "metric_for_best_model", "bleu")
    misspelt = ["--metric_for_best_model", "eval_recal_at_1"]
    expect_refusal(capsys, ["train", path, *misspelt], "did you mean 'eval_recall_at_1'?")
    measured = ["--metric_for_best_model", "recall_at_1", "--diagnostics_pairs", "1"]
    expect_refusal(capsys, ["train", path, *measured], "eval_recall_at_1 is not measured; set diagnostics_pairs")
    assert not (tmp_path / "run").exists()


def test_a_best_metric_that_the_validation_rows_do_not_give(recipe, capsys, monkeypatch):
    """Before the first step: three pairs leave no two to fit."""
    monkeypatch.setattr(LLMJEPATrainer, "compute_loss", lambda *args, **kwargs: pytest.fail("a step was taken"))
    path = recipe(
        validation_rows=3, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=True,
        metric_for_best_model="eval_linear_r2",
    )  # fmt: skip
    expect_refusal(capsys, ["train", path], "the validation rows give no linear_r2")


def test_the_text_of_transformers_about_a_best_metric_has_no_quotes_around_it(recipe, capsys, monkeypatch):
    """A subclass may leave a figure out; then transformers says so after an evaluation."""
    figures = LLMJEPATrainer.figures

    def without_loss_of_lm(self, totals):
        return {key: value for key, value in figures(self, totals).items() if key != "lm_loss"}

    monkeypatch.setattr(LLMJEPATrainer, "figures", without_loss_of_lm)
    path = recipe(
        validation_rows=12, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=False,
        metric_for_best_model="lm_loss",
    )  # fmt: skip
    expect_refusal(capsys, ["train", path], "Training stopped: The `metric_for_best_model` training argument is set to")


@pytest.mark.parametrize("options", [{}, {"jepa_weight": 0.0}, {"diagnostics_pairs": 0}])
def test_the_figures_that_may_choose_the_weights_are_those_of_an_evaluation(recipe, options, monkeypatch):
    trainer, _ = build_trainer(parse_recipe(recipe(validation_rows=12, **options)))
    given = {name.removeprefix("eval_") for name in trainer.evaluate() if name.startswith("eval_")}
    space = SPACE_FIGURES if trainer.args.diagnostics_pairs else ()
    assert given - {"model_preparation_time"} == {*trainer.figure_names(trainer.args), *space, *SPEED}
    for name in (*given - {"model_preparation_time"}, "eval_loss"):
        trainer.args.metric_for_best_model = name
        check_best_metric(trainer.args, trainer.figure_names(trainer.args))


def test_a_model_that_is_no_causal_lm_or_does_not_fit_is_refused(trained, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    expect_refusal(capsys, ["generate", str(broken), "--prompt", "x"], "no config.json")
    expect_refusal(capsys, ["generate", "mistyped", "--prompt", "x"], "the current folder has no such folder")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((trained / name).read_bytes())
    expect_refusal(capsys, ["generate", str(broken), "--prompt", "x"], "has no model.safetensors")
    save_file({"nothing": torch.zeros(1)}, broken / "model.safetensors", metadata={"format": "pt"})
    expect_refusal(capsys, ["generate", str(broken), "--prompt", "x"], "partly random")
    (broken / "config.json").write_text(json.dumps({"model_type": "vit"}))
    expect_refusal(capsys, ["generate", str(broken), "--prompt", "x"], "not a causal LM")


def test_predictor_tokens_missing_from_the_tokenizer(trained, tmp_path, rows, capsys):
    from llm_jepa.lm.from_scratch import train_tokenizer

    for path in trained.iterdir():
        if path.is_file() and "token" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    train_tokenizer(rows, 320).save_pretrained(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(rows[0]) + "\n")
    expect_refusal(
        capsys,
        ["embed", str(tmp_path), "--input", str(data), "--output", str(tmp_path / "o.safetensors")],
        "lacks <|predictor_1|>",
    )


def test_pickled_weights_are_not_loaded(trained, tmp_path, capsys):
    """A .bin checkpoint could run code; only safetensors are read."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    torch.save(load_file(trained / "model.safetensors"), tmp_path / "pytorch_model.bin")
    expect_refusal(capsys, ["generate", str(tmp_path), "--prompt", "x"], "pickles (.bin) could run code")


def test_non_finite_loss_exits_with_3(recipe, capsys):
    """A learning rate that overflows float32 within a few steps."""
    assert main(["train", recipe(), "--learning_rate", "1e30", "--max_grad_norm", "0", "--optim", "sgd"]) == 3
    assert "not finite at step" in capsys.readouterr().err
