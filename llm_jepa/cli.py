"""llm-jepa train | train-decoder | generate | embed | watch.

Errors a user can cause are one line on stderr and exit code 2 (LLM_JEPA_TRACEBACK=1 shows where they come from); a
non-finite loss is 3; Ctrl-C is 130; a reader of our output that left (`| head`) is 141, without a word.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .core.errors import NonFiniteLossError, UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from .core.recipe import Recipe
    from .core.trainer import SafeTrainer
    from .lm.trainer import LLMJEPATrainer
    from .vl.trainer import VLJEPATrainer

LAUNCH_CONFIGS = ("cpu", "ddp", "fsdp2", "zero3")
TRAIN_HELP = """\
Fine-tune a causal LM as a recipe says. Any recipe key can be overridden: --learning_rate 1e-5 --jepa_weight 0.

  llm-jepa train recipes/lm/tiny-llama/nl-rx-synth.yaml --dry-run
  llm-jepa train recipes/lm/tiny-llama/nl-rx-synth.yaml --output_dir runs/first
  llm-jepa train recipes/lm/tiny-llama/nl-rx-synth.yaml --output_dir runs/first --resume_from_checkpoint true
  llm-jepa train RECIPE.yaml --launch ddp --num_processes 8
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    # Waiting threads that spin make small CPU steps up to 100 times slower as soon as a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # `| head` has what it wanted; nor must Python's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as the shell says of SIGPIPE: a training that wrote to it did not end
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        if os.environ.get("LLM_JEPA_TRACEBACK"):  # for those who suspect a bug of ours behind the message
            raise
        said = str(error).rpartition("llm_jepa.core.errors.UserError: ")[
            2
        ]  # a DataLoader worker puts its traceback before
        print(f"llm-jepa: error: {' '.join(said.split())}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"llm-jepa: stopped: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("llm-jepa: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    parser = _Parser(prog="llm-jepa", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="fine-tune a model as a recipe says", description=TRAIN_HELP, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
    )  # fmt: skip
    train.add_argument("recipe", nargs="?", help="recipe YAML")
    train.add_argument("-h", "--help", action="store_true", help="show this help and every recipe key of ours")
    train.add_argument("--dry-run", action="store_true", help="show the resolved recipe, one packed row and the cost")
    train.add_argument("--launch", help="cpu, ddp, fsdp2, zero3 or an accelerate config file: several processes")
    train.add_argument("--num_processes", "--num-processes", help="how many (default: one per GPU)")

    generate = commands.add_parser("generate", help="decode greedily", allow_abbrev=False)
    generate.add_argument("model", help="model folder or Hub id")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a user turn (repeatable)")
    source.add_argument("--input", help="rows with 'prompt' or 'messages' (a last assistant turn is left out)")
    generate.add_argument("--system", help="system prompt for --prompt")
    generate.add_argument("--output", help="write JSON lines here instead of printing")
    generate.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=128)
    generate.add_argument("--batch_size", "--batch-size", type=int, default=32)

    embed = commands.add_parser("embed", help="embed the context and target view of rows", allow_abbrev=False)
    embed.add_argument("model", help="model folder or Hub id")
    embed.add_argument("--input", required=True, help="rows with 'prompt' and 'completion', or 'messages'")
    embed.add_argument("--output", required=True, help=".safetensors file for `context` and `target`, both [N, D]")
    embed.add_argument("--batch_size", "--batch-size", type=int, default=32)

    wanted = next((word for word in argv if not word.startswith("-")), None)
    decoder = commands.add_parser(
        "train-decoder", help="give a VL-JEPA its y_decoder, on text alone", allow_abbrev=False
    )
    watcher = commands.add_parser("watch", help="caption a video or camera as its scenes change", allow_abbrev=False)
    if wanted == "train-decoder":  # their options live with them, and need torch
        from .vl import decoder_stage

        decoder_stage.add_arguments(decoder)
    elif wanted == "watch":
        from .vl import watch_command

        watch_command.add_arguments(watcher)

    options, rest = parser.parse_known_args(argv)
    if options.command == "train":
        if options.help or options.recipe is None:
            if not options.help:
                raise UserError("Which recipe? Write llm-jepa train RECIPE.yaml (see llm-jepa train --help).")
            from .families import describe_keys

            train.print_help()
            print(describe_keys())
            return 0
        return _train(options, rest)
    if rest:
        raise UserError(f"unknown arguments {' '.join(rest)} (see llm-jepa {options.command} --help)")
    if options.command == "train-decoder":
        return decoder_stage.run(options)
    if options.command == "watch":
        return watch_command.run(options)
    if options.batch_size < 1 or getattr(options, "max_new_tokens", 1) < 1:
        raise UserError("--batch_size and --max_new_tokens must be 1 or more.")
    if getattr(options, "system", None) and options.input:
        raise UserError("--system goes with --prompt; the rows of --input carry their own system turns.")
    if options.output and not Path(options.output).absolute().parent.is_dir():
        raise UserError(f"No folder for --output {options.output}; make it first.")
    if options.output and Path(options.output).exists():
        raise UserError(f"--output {options.output} exists; name a new file.")
    return _generate(options) if options.command == "generate" else _embed(options)


# -- train ---------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.num_processes is not None and options.launch is None:
        raise UserError("--num_processes needs --launch (cpu, ddp, fsdp2, zero3 or a file).")
    from .families import parse_recipe

    # Without use_cpu, each gloo process would train a model of its own into the same folder.
    said = any(word.replace("-", "_").startswith("__use_cpu") for word in overrides)
    on_cpu = ["--use_cpu", "true"] if options.launch == "cpu" and not said else []
    recipe = parse_recipe(options.recipe, [*overrides, *on_cpu])
    if options.dry_run:
        return _dry_run(recipe)
    if options.launch is not None:
        named = any(word.startswith("--family") for word in overrides)
        return _launch(options, [*overrides, *on_cpu, *([] if named else ["--family", recipe.family])])
    if int(os.environ.get("WORLD_SIZE", "1")) != recipe.training.world_size:
        # Otherwise each process would train a model of its own into the same folder, without a word.
        raise UserError(
            f"{os.environ['WORLD_SIZE']} processes were started and cannot see each other: without a GPU each, add "
            "--use_cpu true."
        )
    _run_training(recipe)
    _leave_group()
    return 0


def _run_training(recipe: Recipe) -> None:
    trainer, resume = _build_vl_trainer(recipe) if recipe.family == "vl" else _build_trainer(recipe)
    if resume is not None and _restored_if_finished(trainer, resume):
        if (Path(recipe.training.output_dir) / "model.safetensors").exists():
            print(f"{recipe.training.output_dir} is already finished ({trainer.state.global_step} steps).")
        else:  # killed between the last checkpoint and the final save
            _finish(trainer)
        return
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (ImportError, KeyError) as error:  # an optimizer without its package, a metric nobody computes
        if isinstance(error, KeyError) and "metric_for_best_model" not in str(error):
            raise
        raise UserError(f"Training stopped: {error}") from error
    _finish(trainer)


def _leave_group() -> None:
    """A rank says good-bye, when the trainer is gone (so not by `Trainer.end`): a DistributedDataParallel that outlives
    its group waits, holding Python's lock, for gloo's threads, and these may need that lock to end."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # trainer and model are parts of cycles
        torch.distributed.barrier()  # none leaves while another still waits for its answer
        torch.distributed.destroy_process_group()


def _build_trainer(recipe: Recipe) -> tuple[LLMJEPATrainer, str | None]:
    """The trainer and the checkpoint to resume from. The folder becomes ours last, when nothing is refused any more."""
    from transformers import set_seed

    from .lm.loading import data_sha256, load_data, load_model, load_tokenizer, lora_config
    from .lm.trainer import LLMJEPATrainer

    training = recipe.training
    set_seed(training.seed)
    train, validation = load_data(recipe.data, seed=_data_seed(recipe))
    run, resume = _run_of(recipe, data_sha256(train), data_sha256(validation))
    tokenizer = load_tokenizer(recipe.model, training, train)
    model = load_model(recipe.model, tokenizer, seed=training.seed)
    try:
        trainer = LLMJEPATrainer(model, training, train, validation, tokenizer, peft_config=lora_config(recipe.model))
    except (ValueError, ImportError, RuntimeError) as error:  # transformers' and TRL's own checks
        if isinstance(error, UserError) or isinstance(error, RuntimeError) and "install" not in str(error):
            raise
        raise UserError(str(error)) from error  # report_to without its package, ...
    _claim(trainer, run)
    return trainer, resume


def _build_vl_trainer(recipe: Recipe) -> tuple[VLJEPATrainer, str | None]:
    """The same for a recipe with an x_encoder or a vl_model."""
    from transformers import set_seed

    from .vl.data import ClipDataset, clips_sha256
    from .vl.loading import load_clips, load_vl_model
    from .vl.trainer import VLJEPATrainer

    training = recipe.training
    set_seed(training.seed)
    train, validation = load_clips(recipe.data, seed=_data_seed(recipe))
    run, resume = _run_of(recipe, clips_sha256(train), clips_sha256(validation) if validation else None)
    model, processor = load_vl_model(recipe.model, train, seed=training.seed)
    num_frames = model.config.num_frames
    held_out = ClipDataset(validation, num_frames=num_frames) if validation else None
    try:
        trainer = VLJEPATrainer(model, training, ClipDataset(train, num_frames=num_frames), held_out, processor)
    except (ValueError, ImportError, RuntimeError) as error:  # transformers' own checks
        if isinstance(error, UserError) or isinstance(error, RuntimeError) and "install" not in str(error):
            raise
        raise UserError(str(error)) from error
    _claim(trainer, run)
    return trainer, resume


def _run_of(
    recipe: Recipe, train_sha256: str | None, validation_sha256: str | None
) -> tuple[dict[str, Any], str | None]:
    """What the run is, and the checkpoint to resume it from. Writes nothing. Raises UserError."""
    from .core.checkpoint import find_resume

    training = recipe.training
    if validation_sha256 is None and (training.eval_strategy != "no" or training.load_best_model_at_end):
        raise UserError(
            "There is nothing to evaluate on: set validation_data or validation_rows, or eval_strategy: no."
        )
    run = {**recipe.identity(), "train_sha256": train_sha256, "validation_sha256": validation_sha256}
    run |= {"num_processes": training.world_size}
    run = json.loads(json.dumps(run))
    resume = find_resume(training.output_dir, run, resume=training.resume_from_checkpoint)
    if resume is not None and training.save_only_model:
        raise UserError(
            "save_only_model: true left no optimizer state to resume from; start a new run in another output_dir."
        )
    return run, resume


def _claim(trainer: SafeTrainer, run: dict[str, Any]) -> None:
    from .core.checkpoint import RUN_FILE
    from .core.files import write_json

    trainer.accelerator.wait_for_everyone()  # until every process has seen the folder as it was
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir) / RUN_FILE, run)


def _data_seed(recipe: Recipe) -> int:
    """One held-out set for all seeds of an arm, unless the recipe sets data_seed."""
    return recipe.training.data_seed if recipe.training.data_seed is not None else 0


def _restored_if_finished(trainer: SafeTrainer, resume: str) -> bool:
    """Load the state and the weights to keep of a run that has no step left; `Trainer.train` would take one more."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(os.path.join(resume, "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer.state = state
    keep_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    trainer._load_from_checkpoint(state.best_model_checkpoint if keep_best else resume)
    return True


def _finish(trainer: SafeTrainer) -> None:
    """Leave a plain, loadable model in output_dir (LoRA merged, the adapter beside it) and say what happened."""
    from peft import PeftModel

    args = trainer.args
    if isinstance(trainer.model, PeftModel):
        if trainer.is_world_process_zero():
            folder = os.path.join(args.output_dir, "adapter")
            trainer.model.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)  # the base needs resize_token_embeddings(len(tokenizer))
        merged = trainer.model.merge_and_unload()
        trainer.model = trainer._base_model = merged
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        last: dict[str, Any] = next(
            (entry for entry in reversed(trainer.history_of_saved_weights()) if "eval_loss" in entry), {}
        )
        start = trainer._start_diagnostics or {}
        if last:
            title = f"Validation, saved weights (step {last['step']})"
            print(f"\n{title:40s}{'step 0':>12s}{'saved':>12s}")
            for key in sorted(key for key in last if key.startswith("eval_")):
                name = key.removeprefix("eval_")
                if name not in ("runtime", "samples_per_second", "steps_per_second"):
                    before = f"{start[name]:.3g}" if name in start else ""
                    print(f"  {name:38s}{before:>12s}{last[key]:>12.3g}")
        print(f"Saved to {args.output_dir}")


def _launch(options: argparse.Namespace, overrides: list[str]) -> int:
    """Start this command once per process through Accelerate. The recipe has been validated already."""
    import importlib.resources
    import importlib.util
    import socket
    import subprocess

    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if options.launch in LAUNCH_CONFIGS:
        gpus = torch.cuda.device_count()
        if options.launch != "cpu" and gpus == 0:
            raise UserError(f"--launch {options.launch} needs GPUs and none is visible; use --launch cpu.")
        if options.launch == "zero3" and importlib.util.find_spec("deepspeed") is None:
            raise UserError("--launch zero3 needs DeepSpeed: pip install deepspeed")
        config = str(importlib.resources.files("llm_jepa") / "accelerate_configs" / f"{options.launch}.yaml")
        processes = options.num_processes or str(gpus or 2)
    elif os.path.isfile(options.launch):
        config, processes = options.launch, options.num_processes
    else:
        raise UserError(f"--launch {options.launch!r} is none of {', '.join(LAUNCH_CONFIGS)} and no file.")
    if processes is not None and (not processes.isdigit() or int(processes) < 1):
        raise UserError(f"--num_processes {processes!r} must be a whole number of 1 or more.")
    from accelerate.commands.launch import launch_command, launch_command_parser

    with socket.socket() as free:  # Accelerate's fixed default port fails as soon as two runs share a machine
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    command = ["--config_file", config, "--main_process_port", port]
    command += ["--num_processes", processes] if processes else []
    # No --launch: a file that asks for one process would launch itself for ever.
    command += ["-m", "llm_jepa.cli", "train", options.recipe, *overrides]
    if options.launch == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"llm-jepa: rank {rank} ended with exit code {failure.exitcode}; its message stands above.", file=sys.stderr
        )
        return failure.exitcode if failure.exitcode > 0 else 1
    except subprocess.CalledProcessError as error:  # a file that asks for one process
        return error.returncode if error.returncode > 0 else 1
    return 0


def _dry_run(recipe: Recipe) -> int:
    import yaml

    if recipe.family == "vl":
        return _dry_run_vl(recipe)
    from .lm.dry_run import describe_row, token_cost
    from .lm.loading import load_data, load_tokenizer
    from .lm.predictor_tokens import predictor_token_names

    train, _ = load_data(recipe.data, seed=_data_seed(recipe))
    tokenizer = load_tokenizer(recipe.model, recipe.training, train)
    tokenizer.pad_token = recipe.training.pad_token or tokenizer.pad_token or tokenizer.eos_token
    predictors = predictor_token_names(recipe.training.num_predictor_tokens if recipe.training.uses_views else 0)
    tokenizer.add_tokens(predictors, special_tokens=True)
    print("# Resolved recipe\n" + yaml.safe_dump(json.loads(json.dumps(recipe.given)), sort_keys=False))
    print("# The first row, packed\n" + describe_row(train[0], tokenizer, recipe.training, color=sys.stdout.isatty()))
    print("\n# Cost\n" + token_cost(train, tokenizer, recipe.training))
    return 0


def _dry_run_vl(recipe: Recipe) -> int:
    import yaml

    from .vl.data import ClipCollator, ClipDataset
    from .vl.loading import load_clips, load_vl_model
    from .vl.trainer import check_clips, choose_trained_parts

    train, validation = load_clips(recipe.data, seed=_data_seed(recipe))
    model, processor = load_vl_model(recipe.model, train, seed=recipe.training.seed)
    choose_trained_parts(model, recipe.training)
    dataset = ClipDataset(
        train, num_frames=model.config.num_frames, pairs_per_clip=recipe.training.pairs_per_clip,
        seed=recipe.training.seed,
    )  # fmt: skip
    check_clips(dataset, recipe.training)
    batch = ClipCollator(processor)([dataset[i] for i in range(min(2, len(dataset)))])
    print("# Resolved recipe\n" + yaml.safe_dump(json.loads(json.dumps(recipe.given)), sort_keys=False))
    print(f"# Clips\n{len(train)} to train on, {len(validation)} for validation; the first one:")
    for query, target in dataset.draw(0):
        print(f"  {query!r} -> {target!r}")
    print("# Two clips as a batch\n" + "\n".join(f"  {key} {list(value.shape)}" for key, value in batch.items()))
    print("# Weights (in thousands)")
    for name, part in model.named_children():
        weights = list(part.parameters())
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        print(f"  {name:20s}{sum(weight.numel() for weight in weights) // 1000:>12,}  trained {trained // 1000:>12,}")
    return 0


# -- generate and embed --------------------------------------------------------------------------------------------


def _load(source: str) -> tuple[Any, Any]:
    import torch

    from .lm.loading import model_from, tokenizer_from

    tokenizer = tokenizer_from(source)
    on_gpu = torch.cuda.is_available()
    model = model_from(source, dtype=torch.bfloat16 if on_gpu else torch.float32)
    return model.to("cuda" if on_gpu else "cpu").eval(), tokenizer


def _generate(options: argparse.Namespace) -> int:
    from .lm.inference import generate
    from .lm.loading import read_rows

    prompts: list[Any]
    rows = read_rows(options.input) if options.input is not None else None
    model, tokenizer = _load(options.model)
    if rows is not None:
        prompts = _prompts_of(rows)
    elif tokenizer.chat_template is None:
        if options.system:
            raise UserError("--system needs a tokenizer with a chat template; put it into --prompt.")
        prompts = options.prompt
    else:
        system = [{"role": "system", "content": options.system}] if options.system else []
        prompts = [[*system, {"role": "user", "content": text}] for text in options.prompt]
    results = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        progress=len(prompts) > options.batch_size,
    )
    lines = [
        json.dumps({"prompt": prompt, "text": result.text, "stopped": result.stopped}, ensure_ascii=False)
        for prompt, result in zip(prompts, results, strict=True)
    ]
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n")
        print(f"Wrote {len(lines)} generations to {options.output}")
    else:
        for prompt, result in zip(prompts, results, strict=True):
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            cut = "" if result.stopped else f"  [cut at {options.max_new_tokens} tokens]"
            print(f"{asked!r} -> {result.text!r}{cut}")
    return 0


def _prompts_of(rows: Dataset) -> list[Any]:
    prompts: list[Any] = []
    for index, row in enumerate(rows):
        prompt = row.get("messages") or row.get("prompt")
        if not prompt:
            raise UserError(f"row {index} has neither 'prompt' nor 'messages'.")
        if isinstance(prompt, list) and all(
            isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in prompt
        ):
            answered = row.get("messages") and prompt[-1].get("role") == "assistant"
            prompts.append(prompt[:-1] if answered else prompt)
        elif isinstance(prompt, str) and not row.get("messages"):
            prompts.append(prompt)
        else:
            raise UserError(f"row {index}: give 'prompt' as text, or turns of {{'role', 'content'}}.")
    return prompts


def _embed(options: argparse.Namespace) -> int:
    from safetensors.torch import save_file

    from .lm.batching import JEPACollator, embed_pairs
    from .lm.loading import read_rows
    from .lm.predictor_tokens import predictor_token_ids
    from .lm.probe import choose_layout
    from .lm.views import add_view_columns

    rows = read_rows(options.input)
    model, tokenizer = _load(options.model)
    how = getattr(model.config, "llm_jepa", None)
    if how is None:
        print("Note: this model was not trained by llm-jepa; reading both views at their last content token.")
        how = {"num_predictor_tokens": 0, "context_view": "prefix"}
    layout = choose_layout(model, how["num_predictor_tokens"])
    predictors = predictor_token_ids(tokenizer, how["num_predictor_tokens"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    views = [
        add_view_columns(row, index, tokenizer=tokenizer, context_view=how["context_view"])
        for index, row in enumerate(rows)
    ]
    reads = {key: how[key] for key in ("readout", "predictor_position", "direction") if key in how}
    collator = JEPACollator(tokenizer.pad_token_id, predictors, layout=layout, **reads)
    size = options.batch_size
    batches = [collator(views[i : i + size]) for i in range(0, len(views), size)]
    context, target, _ = embed_pairs(model, model, batches, layer=how.get("readout_layer", -1))
    save_file({"context": context.cpu(), "target": target.cpu()}, options.output)
    print(f"Wrote context and target {tuple(context.shape)} to {options.output}")
    return 0


if __name__ == "__main__":
    exit_code = main()
    if "LOCAL_RANK" in os.environ:
        # gloo threads abort the interpreter's own exit in one of eight successful runs: leave without it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
