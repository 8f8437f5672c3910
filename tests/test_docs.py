"""Claims about README, docs and CONTRIBUTING: snippets run, commands parse, links resolve, the minimal page is true."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from eval import pretrained
from llm_jepa import cli
from llm_jepa.core import recipe
from llm_jepa.families import FAMILIES, groups_of, keys_of, parse_recipe
from llm_jepa.lm.trainer import LLMJEPATrainer
from llm_jepa.lm.views import PREDICTOR_TOKEN, build_views
from llm_jepa.vl import Clip, ClipDataset, Pair, VLJEPAModel, VLJEPAProcessor, VLJEPATrainer, VLJEPATrainingArguments
from llm_jepa.vl.loading import plain_frames
from tests.conftest import config

ROOT = Path(__file__).parent.parent
MINIMAL = ROOT / "docs" / "minimal.md"
SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


# -- docs/minimal.md ----------------------------------------------------------------------------------------------


@functools.cache
def minimal(number: int) -> dict:
    """The names of a program of docs/minimal.md after it has run."""
    names: dict = {"__name__": "minimal"}
    exec(compile(python_blocks(MINIMAL)[number], f"{MINIMAL}, block {number}", "exec"), names)
    return names


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same_step(start: dict, ours: dict, gradients: dict, rates: dict[str, float] | None = None) -> None:
    """SGD at rate 1 moves each weight by minus its gradient, so the weights after a step tell every gradient."""
    assert len(gradients) > 10 and sum(g.abs().sum() for g in gradients.values()) > 0.1, "no gradient: nothing is shown"
    for name, before in start.items():
        rate = (rates or {}).get(name, 1.0)
        expected = before - rate * gradients[name] if name in gradients else before
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def letter_tokenizer(letters: list[str]) -> PreTrainedTokenizerFast:
    """One token a letter, with the ids of docs/minimal.md."""
    special = ["<pad>", "<s>", "</s>", PREDICTOR_TOKEN.format(1)]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special[3:],
    )


def test_the_minimal_llm_jepa_learns(capsys):
    """At the end of its loop the LM loss is below 1 nat (ln 27 = 3.3 at the start), and recall@1 near 1."""
    page = minimal(0)
    with torch.no_grad():
        _, lm_loss, _, recall = page["loss_of"](page["model"], [page["views"](*row) for row in page["ROWS"]], 0.1)
    assert lm_loss < 1 and recall > 0.8


def test_the_minimal_llm_jepa_is_ours(tmp_path, monkeypatch):
    """Same rows, same weights: the same sequences, loss and gradients as LLMJEPATrainer, in float64."""
    # transformers' own RMSNorm rounds to float32 inside, which would hide errors below 1e-6 of a gradient.
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
    )
    page = minimal(0)
    model = page["LlamaForCausalLM"](page["model"].config).double()
    tokenizer = letter_tokenizer(page["LETTERS"])
    rows = [page["ROWS"][n] for n in (3, 14, 15, 92, 65, 35)]
    batch = [page["views"](*row) for row in rows]
    columns = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    for row, sequences in zip(columns, batch, strict=True):
        views = build_views(row, tokenizer)
        assert views.input_ids == sequences["lm"] and views.labels == sequences["labels"]
        assert [*views.contexts[0], page["PREDICTOR"]] == sequences["context"]
        assert views.targets[0] == sequences["target"]

    loss, lm_loss, jepa_loss, _ = page["loss_of"](model, batch, jepa_weight=0.7)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    start = weights_of(model)

    args = config(
        tmp_path, jepa_weight=0.7, per_device_train_batch_size=len(rows), logging_steps=1, save_strategy="no", **SGD
    )
    trainer = LLMJEPATrainer(model, args, Dataset.from_list(columns), None, tokenizer)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    assert log["lm_loss"] == pytest.approx(lm_loss, rel=1e-6)  # summed in float32
    assert log["jepa_loss"] == pytest.approx(jepa_loss, rel=1e-6)
    assert_same_step(start, weights_of(trainer.model), gradients)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=words[0])


def test_the_minimal_vl_jepa_learns():
    """On clips it has not seen it picks the right one of 19 texts in more than 4 of 10 cases; chance is 1 in 19."""
    page = minimal(1)
    held_out = list(range(200, 256))
    queries, texts = page["questions"](held_out)
    candidates = sorted(set(texts))
    with torch.no_grad():
        predicted = page["model"].predict(page["FEATURES"][held_out], queries)
        scores = F.normalize(predicted) @ F.normalize(page["model"].embed(candidates)).T
    right = [candidates[i] == text for i, text in zip(scores.argmax(dim=1).tolist(), texts, strict=True)]
    assert sum(right) / len(right) > 0.4


def test_the_minimal_vl_jepa_is_ours(tmp_path):
    """Same features, texts and weights: the loss and gradients of VLJEPATrainer, in float64; two learning rates."""
    page = minimal(1)
    torch.manual_seed(5)
    model = page["VLJEPA"]().double()
    clips = [page["draw_clip"]() for _ in range(6)]
    pixels = torch.stack([clip for clip, _, _ in clips]).double()
    seen = model.see(pixels)
    queries = (list(page["QUERIES"]) * 2)[: len(clips)]
    texts = [page["QUERIES"][query].format(*clip[1:]) for query, clip in zip(queries, clips, strict=True)]
    texts[3] = texts[0]  # equal texts are positives of each other
    loss = page["loss_of"](model, seen, queries, texts)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    ours = VLJEPAModel.from_parts(
        model.x_encoder,
        model.predictor,
        model.y_encoder,
        shared_dim=64,
        num_frames=4,
        frame_size=16,
        dtype=torch.float64,
    )
    ours.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(ours.encode_frames(pixels), seen, rtol=1e-12, atol=1e-12)
    start = weights_of(ours)
    words = word_tokenizer(page["VOCABULARY"])
    processor = VLJEPAProcessor.from_parts(
        ours.config, image_processor=plain_frames(16), tokenizer=words, target_tokenizer=words
    )
    pairs = [Clip(None, (Pair(query, text),)) for query, text in zip(queries, texts, strict=True)]
    args = VLJEPATrainingArguments(
        str(tmp_path), per_device_train_batch_size=len(pairs), y_encoder_lr_factor=0.05, logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, **SGD,
    )  # fmt: skip
    trainer = VLJEPATrainer(ours, args, ClipDataset(pairs, num_frames=4, features=seen), processor=processor)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "temperature" in entry]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)  # summed in float32
    rates = {name: 0.05 for name in start if name.startswith("y_encoder.")}
    assert_same_step(start, weights_of(trainer.model), gradients, rates)


# -- every page -----------------------------------------------------------------------------------------------------

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "model_cards").glob("*.md")),
]
COMMAND_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "model_cards"]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_is_short():
    """As `wc -w` counts."""
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_the_tree_of_the_readme_is_the_tree():
    """Every path of "Where things are" exists; an indented one lies in the folder above it."""
    tree = (ROOT / "README.md").read_text().partition("## Where things are")[2].split("```")[1]
    folder, paths = "", []
    for line in tree.strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folder = "/".join([*folder.split("/")[:depth], name.rstrip("/")])
        paths.append(ROOT / folder)
    assert len(paths) > 20 and not [path for path in paths if not path.exists()]


def anchors(page: Path) -> set[str]:
    """Of its headings, as Git hosts make them: lower case, no punctuation, a hyphen for each space."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_pictures_resolve(page):
    """Files exist in the repository, and so do the headings that a link names."""
    targets = re.findall(r"\]\(([^()\s]+)\)", page.read_text())
    for target in targets:
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page_id(page)} links to {target}, which does not exist"
        assert file.resolve().is_relative_to(ROOT), f"{page_id(page)} links to {target}, outside the repository"
        if heading:
            assert heading in anchors(file), f"{page_id(page)} links to {target}: {file.name} has no such heading"


# -- Python ---------------------------------------------------------------------------------------------------------


SNIPPETS = [(page, number) for page in COMMAND_PAGES for number in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), SNIPPETS, ids=lambda x: x if isinstance(x, int) else page_id(x))
def test_python_snippets_compile_and_name_what_exists(page, number):
    """Every name imported from the package exists, and every keyword of a call to one of these names is known."""
    tree = ast.parse(blocks(page, "python")[number])
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ("llm_jepa", "eval"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:  # a module is an attribute of its package once it was imported
                if hasattr(module, "__path__") and importlib.util.find_spec(f"{node.module}.{alias.name}"):
                    importlib.import_module(f"{node.module}.{alias.name}")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{page_id(page)} imports {missing} from {node.module}, which has no such names"
            imported |= {alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            unknown = [alias.name for alias in node.names if importlib.util.find_spec(alias.name) is None]
            assert not unknown, f"{page_id(page)} imports {unknown}, which are not installed"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            bound = inspect.signature(imported[node.func.id]).bind_partial(*node.args, **keywords)
            assert keywords.keys() <= bound.arguments.keys() | bound.kwargs.keys()


def marked_snippets() -> list[tuple[Path, str]]:
    """Blocks after `<!-- run -->`; those of docs/minimal.md have their own tests."""
    pattern = re.compile(r"^<!-- run -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(page, code) for page in COMMAND_PAGES if page != MINIMAL for code in pattern.findall(page.read_text())]


@pytest.mark.parametrize(("page", "code"), marked_snippets(), ids=lambda x: page_id(x) if isinstance(x, Path) else "")
def test_marked_snippets_run(page, code):
    names = {"__name__": "snippet"}
    exec(compile(code, str(page), "exec"), names)
    assert len(names) > 2, "the snippet defined nothing: it did not run"


def test_something_is_marked():
    assert len(marked_snippets()) >= 2 and len(python_blocks(MINIMAL)) == 2


# -- command lines ----------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Command lines of bash blocks and of inline code, with `$R` filled in and continued lines joined."""
    lines, variables = [], {}
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r"(\w+)=(\S+)", line.strip()):
                variables[assigned[1]] = assigned[2]
                continue
            lines.append(re.sub(r"\$(\w+)", lambda match: variables[match[1]], line))
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:llm-jepa|python -m|make) [^`]+)`", " ".join(prose.split()))
    return [line for line in lines if shlex.split(line, comments=True)]


COMMANDS = [(page, line) for page in COMMAND_PAGES for line in commands(page)]


class Parsed(BaseException):
    """A real parser has accepted its arguments; nothing runs after that. (A command catches every `Exception`.)"""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """argparse as it is, but the outermost parser hands its result to the test instead of to the program."""
    depth = 0

    def stopping(original):
        def parse(self, *args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                result = original(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                raise Parsed(result)
            return result

        return parse

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))


def check_module(words: list[str], monkeypatch) -> None:
    """`python -m MODULE ...`; a bare `python -m MODULE` may be a mention, so it is asked for its help."""
    words = words if len(words) > 1 else [*words, "--help"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises((Parsed, SystemExit)) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module is loaded already
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    assert ended.type is Parsed or ended.value.code == 0, f"{words[0]} refuses these arguments"


def check_llm_jepa(words: list[str], capsys) -> None:
    """`llm-jepa COMMAND ...`; of `train` also the recipe and every override."""
    try:
        code = cli.main(words)
        assert code == 0, capsys.readouterr().err
        assert "--help" in words
        return
    except SystemExit as ended:
        assert ended.code == 0 and {"--help", "--version"} & set(words)
        return
    except Parsed as parsed:
        options, rest = parsed.args[0]
    if options.command != "train":
        assert not rest, f"unknown arguments {rest}"
    elif not options.help and options.recipe.partition(".")[0] not in ("RECIPE", "my"):
        on_cpu = [] if "--use_cpu" in rest else ["--use_cpu", "true"]  # bf16 is refused without a GPU
        parse_recipe(options.recipe, [*rest, *on_cpu])
        assert options.launch is None or options.launch in ("cpu", "ddp", "fsdp2", "zero3", "FILE")


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda x: page_id(x) if isinstance(x, Path) else x[:60])
def test_commands_parse(page, line, stop_after_parsing, monkeypatch, capsys):
    """By the real parsers: options, choices and numbers of arguments, recipes and their keys, make's targets."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if words[0] == "llm-jepa":
        check_llm_jepa(words[1:], capsys)
    elif words[:2] == ["python", "-m"]:
        check_module(words[2:], monkeypatch)
    elif words[0] == "python" and words[1].startswith("docs/examples/"):
        assert (ROOT / words[1]).is_file()  # tests/test_examples.py runs it
    elif words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
        assert len(words) == 1 or words[1] in targets or "=" in words[1], f"there is no target {words[1]}"
    elif words[:2] == ["pip", "install"]:
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        extras = re.findall(r"\[([\w,]+)\]", line)
        assert {extra for group in extras for extra in group.split(",")} <= known.keys()
    elif words[:2] == ["pip", "download"]:
        assert line == pretrained.DOWNLOAD
    else:
        assert words[0] in ("source", "git"), f"{page_id(page)}: no test knows how to check {line!r}"


def test_the_readers_find_commands():
    programs = {line.split()[0] for _, line in COMMANDS}
    assert {"llm-jepa", "python", "make", "pip"} <= programs and len(COMMANDS) > 30


# -- YAML, keys -------------------------------------------------------------------------------------------------------


YAML = [(page, number) for page in COMMAND_PAGES for number in range(len(blocks(page, "yaml")))]


@pytest.mark.parametrize(("page", "number"), YAML, ids=lambda x: x if isinstance(x, int) else page_id(x))
def test_yaml_blocks_are_recipes(page, number, tmp_path):
    """A whole recipe parses; of a part every key exists and takes its value."""
    file = tmp_path / "recipe.yaml"
    file.write_text(blocks(page, "yaml")[number])
    keys = recipe.read_yaml(file)
    assert keys, "an empty block is not a recipe"
    if {"family", "train_data", "output_dir"} <= keys.keys():
        assert parse_recipe(file, ["--use_cpu", "true"]).family == keys["family"]
        return
    known = {key: hint for name in FAMILIES for key, (_, hint) in recipe.recipe_fields(groups_of(name)).items()}
    for key, value in keys.items():
        if key not in (recipe.EXTENDS, recipe.FAMILY):
            assert key in known, f"{page_id(page)}: {key} is not a key of any family"
            assert recipe.coerce(key, value, known[key]) == value


@pytest.mark.parametrize(("family", "groups"), [("lm", slice(2, 3)), ("vl", slice(0, 1)), ("vl", slice(2, 3))])
def test_every_key_of_ours_is_documented(family, groups):
    text = (ROOT / "docs" / f"{family}.md").read_text()
    ours = [key for group in keys_of(family)[groups] for key in group.__annotations__]
    ours = [key for key in ours if not key.endswith("_revision")]
    inherited = {"logging_nan_inf_filter", "remove_unused_columns", "learning_rate", "lr_scheduler_type"}
    missing = [key for key in ours if key not in inherited and f"`{key}`" not in text and f"`{key}:" not in text]
    assert not missing, f"docs/{family}.md does not name {missing}"


@pytest.mark.parametrize(("family", "heading"), [("lm", "Keys"), ("lm", "Views"), ("vl", "Training")])
def test_the_tables_of_keys_name_keys(family, heading):
    """Every word in code type in the first column is a key of the family."""
    text = (ROOT / "docs" / f"{family}.md").read_text()
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    named = [key for row in re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
    fields = recipe.recipe_fields(groups_of(family))
    assert named and not [key for key in named if key not in fields]
