"""Hostile models, tokenizers and rows at every door: each cell works, or is one line that says what is wrong."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import trl
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaMLP

from eval.run import main as eval_main
from llm_jepa import LLMJEPATrainer, UserError
from llm_jepa.cli import main
from llm_jepa.lm import choose_batches, generate, model_from, train_tokenizer
from tests.conftest import config, tiny_model

RECIPE = {
    "family": "lm", "num_predictor_tokens": 1, "use_cpu": True, "activation_checkpointing": False, "max_steps": 1,
    "save_strategy": "no", "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True,
    "diagnostics_pairs": 0, "model_name_or_path": "model", "train_data": "rows.jsonl",
}  # fmt: skip
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


class Strange(Exception):
    """What the code of a model might raise."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Setup:
    """The folder `model`, the file `rows.jsonl`, and a recipe; a setup changes one of them."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows[:8]
        self.tokenizer = train_tokenizer(rows, 320)
        self.family, self.options, self.changes = "llama", {}, {}
        self.generation: dict = {}
        self.first_tokenizer: PreTrainedTokenizerBase | None = None  # that of the model, if another is saved with it

    def write(self) -> None:
        model = tiny_model(self.first_tokenizer or self.tokenizer, self.family, **self.options)
        model.save_pretrained("model")
        self.tokenizer.save_pretrained("model")
        if self.generation:
            path = Path("model/generation_config.json")
            path.write_text(json.dumps({**json.loads(path.read_text()), **self.generation}))
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        groups = [
            {"id": str(i), "prompts": [row["messages"][:-1]], "answer": "a", "choices": ["a", "b"]}
            for i, row in enumerate(self.rows[:3])
        ]
        Path("choices.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
        written = [{key: value for key, value in group.items() if key != "choices"} for group in groups]
        Path("groups.jsonl").write_text("".join(json.dumps(group) + "\n" for group in written))
        Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **self.changes}))


# -- setups -----------------------------------------------------------------------------------------------------------


def nothing_odd(setup: Setup) -> None:
    """The control: every door is open."""


def short_positions(setup: Setup) -> None:
    setup.family, setup.options = "gpt2", {"n_positions": 40}


def added_token(setup: Setup) -> None:
    setup.first_tokenizer = copy.deepcopy(setup.tokenizer)
    setup.tokenizer.add_tokens(["<call>"])
    for row in setup.rows:
        row["messages"][-2]["content"] += " <call>"


def broken_template(setup: Setup) -> None:
    setup.tokenizer.chat_template = "{{ 'a' + 1 }}"


def arguments_as_an_object(setup: Setup) -> None:
    setup.tokenizer.chat_template = (TEMPLATES / "deepseekv3.jinja").read_text()
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    for row in setup.rows:
        question, answer = row["messages"][-2:]
        row["messages"] = [question, {"role": "assistant", "content": "", "tool_calls": [call]}, question, answer]


def no_template(setup: Setup) -> None:
    setup.tokenizer.chat_template = None


def odd_decoding(setup: Setup) -> None:
    setup.generation = {
        "cache_implementation": "static", "stop_strings": ["a"], "return_dict_in_generate": True, "num_beams": 3,
        "do_sample": True, "num_return_sequences": 2, "output_scores": True, "max_length": 3, "temperature": 9.0,
        "watermarking_config": {"bias": 9.0}, "prompt_lookup_num_tokens": 3, "suppress_tokens": [10**6],
    }  # fmt: skip


def no_end_of_text(setup: Setup) -> None:
    setup.tokenizer.pad_token = setup.tokenizer.eos_token = None
    setup.tokenizer.chat_template = setup.tokenizer.chat_template.replace("{{ eos_token }}", "<|end|>")


def embedding_as_target(setup: Setup) -> None:
    setup.options = {"tie_word_embeddings": True}
    setup.changes = {"use_peft": True, "lora_target_modules": ["q_proj", "embed_tokens"]}


def lora(setup: Setup) -> None:
    setup.changes = {"use_peft": True, "lora_target_modules": "all-linear"}


# -- doors ------------------------------------------------------------------------------------------------------------


def load():
    return model_from("model"), AutoTokenizer.from_pretrained("model")


def prompts_of(setup: Setup) -> list:
    return [row["messages"][:-1] for row in setup.rows[:3]]


def api_trainer(setup: Setup, **options) -> None:
    model, tokenizer = load()
    targets = setup.changes.get("lora_target_modules")
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets) if targets else None
    args = config("api", max_steps=1, per_device_train_batch_size=4, **options)
    LLMJEPATrainer(model, args, Dataset.from_list(setup.rows), None, tokenizer, peft_config=adapter).train()


def api_choices(setup: Setup) -> None:
    model, tokenizer = load()
    prompts = prompts_of(setup)
    list(choose_batches(model, tokenizer, prompts, [["a", "b"]] * len(prompts), batch_size=4))


def api_generate(setup: Setup) -> None:
    model, tokenizer = load()
    assert len(generate(model, tokenizer, prompts_of(setup), max_new_tokens=2)) == 3


COMMANDS = {
    "train": (main, ["train", "recipe.yaml", "--output_dir", "jepa"]),
    "train the baseline": (main, ["train", "recipe.yaml", "--output_dir", "plain", "--jepa_weight", "0"]),
    "dry run": (main, ["train", "recipe.yaml", "--output_dir", "dry", "--dry-run"]),
    "generate": (main, ["generate", "model", "--input", "rows.jsonl", "--max_new_tokens", "2"]),
    "generate --prompt": (main, ["generate", "model", "--prompt", "lines", "--max_new_tokens", "2"]),
    "embed": (main, ["embed", "model", "--input", "rows.jsonl", "--output", "pairs.safetensors"]),
    "eval": (eval_main, ["--model", "model", "--task", "groups", "--data", "groups.jsonl", "--out", "out.json"]),
    "eval choices": (eval_main, ["--model", "model", "--task", "groups", "--data", "choices.jsonl", "--out", "c.json"]),
}  # fmt: skip
FUNCTIONS = {
    "LLMJEPATrainer": lambda setup: api_trainer(setup, jepa_weight=1.0, num_predictor_tokens=1),
    "LLMJEPATrainer, baseline": lambda setup: api_trainer(setup, jepa_weight=0.0),
    "lm.generate": api_generate,
    "lm.choose_batches": api_choices,
}
DOORS = [*COMMANDS, *FUNCTIONS]
TRAINING = ["train", "train the baseline", "LLMJEPATrainer", "LLMJEPATrainer, baseline"]
BUT_PROMPT = [door for door in DOORS if door != "generate --prompt"]  # it has no rows
WEIGHTS = [door for door in BUT_PROMPT if door != "dry run"]  # a dry run loads no model

# setup: the words of its line, and the doors at which it is said; the other doors work.
TABLE = {
    nothing_odd: ("", []),
    short_positions: ("positions", BUT_PROMPT),
    added_token: ("rows for 320 tokens", [door for door in WEIGHTS if door not in TRAINING]),
    broken_template: ("TypeError", DOORS),
    arguments_as_an_object: ("TypeError|none of them empty", BUT_PROMPT),
    no_template: ("no chat template", BUT_PROMPT),
    odd_decoding: ("", []),
    no_end_of_text: ("pad", [*TRAINING, "dry run"]),
    embedding_as_target: ("embed_tokens", TRAINING),
    lora: ("", []),
}


@pytest.mark.parametrize("odd", list(TABLE), ids=lambda odd: odd.__name__)
def test_every_cell_works_or_is_one_line(odd, rows, capsys):
    words, refusing = TABLE[odd]
    setup = Setup(json.loads(json.dumps(rows)))
    odd(setup)
    setup.write()
    for door in DOORS:
        code, said = enter(door, setup, capsys)
        if door in refusing:
            assert code == 2 and len(said) == 1 and re.search(words, said[0]), (door, code, said)
        else:
            assert code == 0, (door, said)


def enter(door: str, setup: Setup, capsys) -> tuple[int, list[str]]:
    """(0, ...) if the door works; else 2 and the lines of its error. Any other exception of a function passes."""
    if door in FUNCTIONS:
        try:
            FUNCTIONS[door](setup)
        except UserError as error:
            return 2, str(error).splitlines()
        return 0, []
    command, words = COMMANDS[door]
    capsys.readouterr()
    code = command(words)
    err = capsys.readouterr().err
    assert "Traceback" not in err, err
    return code, [line for line in err.splitlines() if ": error: " in line]


@pytest.mark.parametrize("door", [door for door in COMMANDS if door != "dry run"])
def test_a_models_own_error(door, rows, capsys, monkeypatch):
    """A forward pass may raise anything: one line with the type and where to find the rest, at every command."""
    setup = Setup(json.loads(json.dumps(rows)))
    setup.write()

    def fail(self, hidden):
        raise Strange("the device\nis on fire")

    monkeypatch.setattr(LlamaMLP, "forward", fail)
    code, said = enter(door, setup, capsys)
    assert code == 2 and len(said) == 1 and "Strange: the device" in said[0], said
