"""What the command line does for `family: lm`: train, dry run, `generate` and `embed`.

Modules that need torch are imported inside the functions, so that help and wrong arguments are answered at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import UserError
from ..core.folders import check_path
from ..core.options import pair_of_names, plain_text, whole
from ..core.source_files import check_source

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..core.recipe import CheckedRecipe, Recipe
    from ..core.run import Beginning
    from ..core.sources import RowStream
    from ..core.trainer import JEPATrainer
    from .prompts import Prompt, PromptForm
    from .trainer import LLMJEPATrainer

# Recipe keys that name a folder, a file or a Hub repository -> the key of its revision. A run is the same if they hold
# the same.
SOURCES = {"model_name_or_path": "model_revision", "tokenizer_name_or_path": None, "chat_template_path": None}


# -- train ------------------------------------------------------------------------------------------------------------


def check_files(recipe: CheckedRecipe) -> None:
    """Raises UserError if a file or folder that the recipe names is not there."""
    for source in (recipe.data.train_data, recipe.data.validation_data):
        if source is not None:
            check_source(source)
    for model in (recipe.model.model_name_or_path, recipe.model.tokenizer_name_or_path):
        if model is not None:
            check_path(model)


def train(recipe: Recipe) -> None:
    """Train as the recipe says. Leaves a plain causal LM in output_dir; LoRA is merged into it, but not into 4 bits."""
    from ..core import run

    start = _begin(recipe)
    if not run.is_finished(recipe, start.run):
        run.train(_trainer(recipe, start), start.run.resume, before_saving=_merge_adapter)


def build_trainer(recipe: Recipe) -> tuple[LLMJEPATrainer, str | None]:
    """The trainer and the checkpoint to resume from. Raises UserError before anything is written."""
    start = _begin(recipe)
    return _trainer(recipe, start), start.run.resume


class _Start(NamedTuple):
    """What is known of a run before its model is loaded."""

    rows: Dataset | RowStream
    validation: Dataset | None
    run: Beginning


def _begin(recipe: Recipe) -> _Start:
    from transformers import set_seed

    from ..core import run
    from ..core.checks import check_best_metric
    from ..core.sources import RowStream, data_sha256
    from .arguments import check_pairs
    from .loading import load_data
    from .trainer import LLMJEPATrainer

    check_pairs(recipe.training)
    check_best_metric(recipe.training, LLMJEPATrainer.figure_names(recipe.training))
    set_seed(recipe.training.seed)
    rows, validation = load_data(recipe.data, seed=run.data_seed(recipe))
    beginning = run.identify(
        recipe,
        None if isinstance(rows, RowStream) else data_sha256(rows),
        data_sha256(validation),
        sources=SOURCES,
        further=_further(recipe),
        needs_length=_needs_length(recipe),
        train_files_sha256=rows.files_sha256 if isinstance(rows, RowStream) else None,
    )
    return _Start(rows, validation, beginning)


def _needs_length(recipe: Recipe) -> str | None:
    """What of the JEPA term depends on the number of steps of the run."""
    training = recipe.training
    if training.uses_views and training.target_encoder == "ema":
        return "target_encoder: ema (its decay)"
    return None if training.jepa_weight_end in (None, training.jepa_weight) else "jepa_weight_end"


def _further(recipe: Recipe) -> str:
    """How to train a finished model for more steps."""
    model = f"--model_name_or_path {recipe.training.output_dir}"
    if recipe.model.model_config is not None:
        model += " --model_config null"
    return f"train its model further as a new run: {model} --output_dir NEW"


def _trainer(recipe: Recipe, start: _Start) -> LLMJEPATrainer:
    from ..core import run
    from .data import prepare_rows
    from .loading import load_model, load_tokenizer, lora_config
    from .trainer import LLMJEPATrainer

    training = recipe.training
    tokenizer = load_tokenizer(recipe.model, training, start.rows)
    rows, validation, preparation = prepare_rows(start.rows, start.validation, tokenizer, training)
    model = load_model(recipe.model, tokenizer, seed=training.seed, bf16=training.bf16)
    with run.library_refusals():
        trainer = LLMJEPATrainer(
            model, training, rows, validation, tokenizer, lora_config(recipe.model, model), preparation=preparation
        )
    run.claim(trainer, recipe, start.run.record, sources=SOURCES)
    return trainer


def _merge_adapter(trainer: JEPATrainer, folder: Path) -> None:
    """Save a LoRA adapter into folder/adapter and merge it into the model; nothing for other models.

    An adapter of a model in 4 bits stays apart, and is what the run saves: merged, it would be rounded to 4 bits.
    """
    from peft import PeftModel

    from .adapter import is_in_4bit, save_adapter

    if not isinstance(trainer.model, PeftModel) or is_in_4bit(trainer.base_model):
        return
    if trainer.args.should_save:
        with trainer.template_to_save():
            save_adapter(trainer.model, trainer.processing_class, folder / "adapter")
    trainer.model = trainer.base_model = trainer.model.merge_and_unload()


def dry_run(recipe: Recipe, *, launch: str | None = None, processes: int = 1) -> None:
    """Print the first row as the trainer would pack it, rows, steps, tokens, and memory. Trains and writes nothing.

    Args:
        launch: of the command line. Then the batch of one process is not yet known to be too small.
        processes: that will train.
    """
    from ..core import printing
    from ..core.checks import check_best_metric
    from ..core.run import data_seed
    from . import dry_run as show
    from .arguments import check_pairs
    from .data import prepare_rows
    from .limits import check_views
    from .loading import config_of_model, load_data, load_tokenizer
    from .predictor_tokens import predictor_token_names
    from .trainer import LLMJEPATrainer

    training = recipe.training
    check_best_metric(training, LLMJEPATrainer.figure_names(training))
    if launch is None:
        check_pairs(training)
    train, validation = load_data(recipe.data, seed=data_seed(recipe))
    tokenizer = load_tokenizer(recipe.model, training, train)
    rows, _, preparation = prepare_rows(train, validation, tokenizer, training)
    streamed = preparation.streamed
    raw: Any = train if streamed is None else streamed.raw
    predictors = predictor_token_names(training.num_predictor_tokens) if training.uses_views else []
    tokenizer.add_tokens(predictors, special_tokens=True)
    config = config_of_model(recipe.model, tokenizer)
    check_views(config, rows, "train rows", len(predictors), "set max_length: {room}, or remove them")
    print("# Rows")
    for name, count in preparation.counts.items():
        is_stream = streamed is not None and name == "train"
        print(f"{name}: {'a stream of unknown length; of its first rows ' * is_stream}{count}")
    if note := show.plain_texts(raw, tokenizer):
        print(note)
    described = show.describe_row(rows[0], tokenizer, training, color=sys.stdout.isatty())
    print(
        "\n# The first row, packed\n" + described, file=printing.raw(sys.stdout)
    )  # with colors; texts in it are quoted
    asked = show.describe_prompt(raw[0], tokenizer, preparation.form)
    print("\n# The first prompt, as the trained model is asked it\n" + asked)
    print("\n# Steps\n" + show.describe_steps(None if streamed else len(rows), training, processes))
    print("\n# Cost\n" + show.token_cost(rows, tokenizer, training, is_stream=streamed is not None))
    sharing = launch if launch in ("fsdp2", "zero3") else "ddp"
    memory = show.describe_memory(rows, tokenizer, recipe.model, training, config, sharing, processes)
    print(f"\n# Memory\n{memory}\n\n# Time\n{show.NO_TIME}")


# -- generate and embed -----------------------------------------------------------------------------------------------


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llm-jepa generate`."""
    parser.add_argument("model", help="model folder or Hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", type=plain_text, help="a user turn (repeatable)")
    source.add_argument(
        "--input", nargs="+", help="files or a folder of rows with 'prompt' or 'messages' (a last answer is left out)"
    )
    parser.add_argument(
        "--system", type=plain_text, help="system prompt for --prompt (default: that of all training rows)"
    )
    _add_columns(parser)
    parser.add_argument("--output", help="write JSON lines here instead of printing")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=whole(1), default=128)
    parser.add_argument("--batch_size", "--batch-size", type=whole(1), default=32)


def generate(options: argparse.Namespace) -> None:
    """Continue each prompt greedily; print the texts or write JSON lines."""
    if options.columns and options.input is None:
        raise UserError("--columns goes with --input; --prompt has no columns.")
    if options.system and options.input:
        raise UserError("--system goes with --prompt; the rows of --input carry their own system turns.")
    _check_output(options, (".jsonl",), "JSON lines: name a file that ends in .jsonl")
    from ..core.files import write_whole
    from . import inference
    from .loading import load_to_use
    from .prompts import form_of, other_format

    rows = _rows_of_options(options) if options.input is not None else None
    model, tokenizer = load_to_use(options.model)
    form = form_of(model.config)
    prompts = _prompts_of_options(options, tokenizer, form) if rows is None else _prompts_of_rows(rows)
    if note := other_format(prompts, form):
        print(f"Note: {note}", file=sys.stderr)
    generations = inference.generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        progress=len(prompts) > options.batch_size,
    )
    if options.output:
        lines = []
        for prompt, generation in zip(prompts, generations, strict=True):
            line = {"prompt": prompt, "text": generation.text, "stopped": generation.stopped}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_whole(options.output, "".join(lines))
        print(f"Wrote {len(lines)} generations to {options.output}")
        return
    for prompt, generation in zip(prompts, generations, strict=True):
        turns = prompt["prompt"] if isinstance(prompt, dict) else prompt
        question = turns if isinstance(turns, str) else turns[-1]["content"]
        cut = "" if generation.stopped else f"  [cut at {options.max_new_tokens} tokens]"
        print(f"{question!r} -> {generation.text!r}{cut}")


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--columns", nargs="+", type=pair_of_names, metavar="NAME=YOURS",
        help="other names of the columns of --input: prompt=question completion=answer",
    )  # fmt: skip


def add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llm-jepa embed`."""
    parser.add_argument("model", help="model folder or Hub id")
    parser.add_argument(
        "--input", nargs="+", required=True,
        help="files or a folder of rows with 'prompt' and 'completion', or 'messages'; or only one of 'prompt', "
        "'text' (a prompt) and 'completion'",
    )  # fmt: skip
    _add_columns(parser)
    parser.add_argument(
        "--output", required=True, help=".safetensors or .npz file for `context` and `target`, [N, D] each"
    )
    parser.add_argument("--batch_size", "--batch-size", type=whole(1), default=32)


def embed(options: argparse.Namespace) -> None:
    """Write the embeddings of both views of each row, read as the model was trained to read them.

    If a row has only a prompt or a text, only the embeddings of the prompts are written; if it has only a completion,
    only those of the completions.
    """
    kinds = "two tensors: name a file that ends in .safetensors, or in .npz for NumPy"
    _check_output(options, (".safetensors", ".npz"), kinds)
    from .embedder import Embedder

    rows = _rows_of_options(options)
    embedder = Embedder.from_pretrained(options.model)
    if getattr(embedder.model.config, "llm_jepa", None) is None:
        print("Note: this model was not trained by llm-jepa; reading both views at their last content token.")
    size = options.batch_size
    embedded = embedder.encode_rows(rows, batch_size=size, progress=len(rows) > size)
    if embedded.note:
        print(f"Note: {embedded.note}", file=sys.stderr)
    for side, count in (("completion", embedded.without_completion), ("prompt", embedded.without_prompt)):
        if count:
            alone = "prompts" if side == "completion" else "completions"
            print(f"{count} of {len(rows)} rows have no {side}, so only the {alone} are embedded.")
    _save_tensors(embedded.views, options.output)
    (shape, *_) = (tuple(tensor.shape) for tensor in embedded.views.values())
    print(f"Wrote {' and '.join(embedded.views)} {shape} to {options.output}")


def _save_tensors(tensors: dict[str, Tensor], path: str) -> None:
    """Write .safetensors, or .npz for NumPy."""
    from ..core.files import written_whole

    with written_whole(path) as temporary:
        if Path(path).suffix == ".npz":
            import numpy as np

            with temporary.open("wb") as file:  # to the name of a file, NumPy would add a suffix
                np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
        else:
            from safetensors.torch import save_file

            save_file(tensors, temporary)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `llm-jepa export`."""
    from . import export

    export.add_arguments(parser)


def export_model(options: argparse.Namespace) -> None:
    """Write a model for other programs."""
    from . import export

    export.run(options)


VERBS = {
    "generate": (add_generate_arguments, generate),
    "embed": (add_embed_arguments, embed),
    "export": (add_export_arguments, export_model),
}


def _check_output(options: argparse.Namespace, suffixes: tuple[str, ...], kind: str) -> None:
    """Raises UserError for a file that cannot be written, or whose name promises another format."""
    if options.output and not Path(options.output).absolute().parent.is_dir():
        raise UserError(f"No folder for --output {options.output}; make it first.")
    if options.output and Path(options.output).exists():
        raise UserError(f"--output {options.output} exists; name a new file.")
    if options.output and Path(options.output).suffix not in suffixes:
        raise UserError(f"--output {options.output}: this command writes {kind}.")


def _rows_of_options(options: argparse.Namespace) -> Dataset:
    """The rows of --input, under the names of --columns. A note says which other formats were recognized."""
    from ..core.sources import read_rows
    from .formats import check_columns, count_formats, notes_on_formats

    columns = dict(options.columns or ())
    check_columns(columns)
    if len(columns) < len(options.columns or ()):
        raise UserError("--columns gives one name twice; leave one out.")
    rows = read_rows(options.input, columns=columns)
    counts, _ = count_formats(rows)
    for note in notes_on_formats(counts, "rows"):
        print(f"Note: {note}", file=sys.stderr)
    return rows


def _prompts_of_options(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, form: PromptForm
) -> list[Prompt]:
    """The prompts of --prompt and --system, in the format of the training rows.

    A model that was not trained here gets messages if its tokenizer has a chat template, else text. A system turn,
    tools and template arguments that all training rows shared go with each prompt; --system replaces that turn.
    """
    from .prompts import as_prompts, is_asked_as_text

    is_text = is_asked_as_text(tokenizer, form)
    if is_text and options.system:
        raise UserError("--system needs a model that was trained on messages; put it into --prompt.")
    if not is_text and options.system is None and form.system:
        print(
            f"Note: every training row had this system turn, so it goes with --prompt: {form.system!r}", file=sys.stderr
        )
    return as_prompts(options.prompt, tokenizer, form, system=options.system)


def _prompts_of_rows(rows: Dataset) -> list[Prompt]:
    """The prompt of each row: its text, or its messages without a last assistant turn, with its template arguments."""
    from .formats import standard_row
    from .rows import render_kwargs_of, with_kwargs

    prompts: list[Prompt] = []
    for index, row in enumerate(rows):
        row = standard_row(row, f"row {index}")
        prompt = row.get("messages") or row.get("prompt")
        if not prompt:
            raise UserError(f"row {index} has neither 'prompt' nor 'messages'.")
        if isinstance(prompt, str) and not row.get("messages"):
            prompts.append(prompt)
        elif isinstance(prompt, list) and all(isinstance(turn, dict) and "role" in turn for turn in prompt):
            is_answered = row.get("messages") and prompt[-1].get("role") == "assistant"
            turns = prompt[:-1] if is_answered else prompt
            prompts.append(with_kwargs(turns, render_kwargs_of(row, f"row {index}")))
        else:
            raise UserError(f"row {index}: give 'prompt' as text, or turns of {{'role', 'content'}}.")
    return prompts
