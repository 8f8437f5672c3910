"""llm-jepa train | train-decoder | generate | embed | export | push | watch | demo | recipes.

An error is one line on stderr and exit code 2; with --traceback, where it was raised comes before the line. All exit
codes are in a table of docs/lm.md. If the reader of our output leaves (`| head`), it is 141 and nothing is printed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from .core.errors import (
    LAUNCHED,
    TRACEBACK,
    ArgumentParser,
    NonFiniteLossError,
    UserError,
    is_panic,
    print_error,
    report,
    show_traceback,
    traceback_flag,
)
from .core.failures import machine_failure
from .core.printing import safe_output
from .core.signals import INTERRUPTED, Stopped, ending_at_once
from .families import FAMILIES, build_recipe, check_recipe, commands_of, describe_keys
from .shipped import CHECKPOINTS, PACKAGE, checkpoint_names, model_source, recipe_names

if TYPE_CHECKING:
    from .core.recipe import Recipe

ALLOW = "--allow_changed"
TRAIN_HELP = """\
Train a model as a recipe says. Any recipe key can be overridden: --learning_rate 1e-5 --jepa_weight 0.

  llm-jepa train recipes/lm/tiny-llama/nl-rx-synth.yaml --dry-run
  llm-jepa train recipes/lm/tiny-llama/nl-rx-synth.yaml --output_dir runs/first
  llm-jepa train recipes/lm/tiny-llama/nl-rx-synth.yaml --output_dir runs/first --resume_from_checkpoint true
  llm-jepa train RECIPE.yaml --launch ddp --num_processes 8
"""
LAUNCH_OPTIONS = (
    "launch", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Threads that spin while they wait make small CPU steps up to 100 times slower as soon as a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with traceback_flag(sys.argv[1:] if argv is None else argv) as words, safe_output():
        return _exit_code_of(words)


def _exit_code_of(argv: list[str]) -> int:
    try:
        _run(argv)
        return 0
    except _ProcessFailed as failure:
        return failure.exit_code
    except BrokenPipeError:  # `| head` has what it wanted; Python's last flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # the shell's code for SIGPIPE, because a training that wrote to it did not end
    except NonFiniteLossError as error:
        return report("llm-jepa", f"stopped: {error}", 3)
    except _MachineFailed as failure:
        if failure.__cause__ is not None:
            show_traceback(failure.__cause__)
        return report("llm-jepa", str(failure), failure.exit_code)
    except (_Ended, Stopped, KeyboardInterrupt) as end:
        if LAUNCHED not in os.environ and os.environ.get("RANK", "0") == "0":  # the launcher says it once for all
            print(f"llm-jepa: {'interrupted' if isinstance(end, KeyboardInterrupt) else end}", file=sys.stderr)
        return INTERRUPTED if isinstance(end, KeyboardInterrupt) else end.exit_code
    except Exception as error:  # a model's own code may raise anything
        return print_error("llm-jepa", error)
    except BaseException as error:
        if not is_panic(error):
            raise
        return print_error("llm-jepa", error)


class _ProcessFailed(Exception):
    """One of several processes failed. It has printed its message; its exit code becomes ours."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


class _MachineFailed(Exception):
    """The disk is full, memory ran out, or another process is lost. The message says what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Ended(BaseException):
    """A training was asked to stop. The message says what is saved, and how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _run(argv: list[str]) -> None:
    parser = ArgumentParser(prog="llm-jepa", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(TRACEBACK, action="store_true", help="after an error, show where it was raised")
    parser.add_argument("--version", action="version", version=_version(), help="show the version and where it is")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=ArgumentParser, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="train a model as a recipe says", description=TRAIN_HELP, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
    )  # fmt: skip
    train.add_argument("recipe", nargs="?", help="recipe YAML, or the name of one of ours (llm-jepa recipes)")
    train.add_argument("-h", "--help", action="store_true", help="show this help and every recipe key of ours")
    train.add_argument("--dry-run", action="store_true", help="show the resolved recipe, one batch and the cost")
    train.add_argument("--launch", help="cpu, ddp, fsdp2, zero3 or an accelerate config file: several processes")
    train.add_argument("--num_processes", "--num-processes", help="how many (default: one per GPU of all machines)")
    train.add_argument("--num_machines", "--num-machines", type=int, help="of the run; the same command on each")
    train.add_argument("--machine_rank", "--machine-rank", type=int, help="of this machine: 0, 1, ...")
    train.add_argument("--main_process_ip", "--main-process-ip", help="the address of machine 0")
    train.add_argument("--main_process_port", "--main-process-port", type=int, help="a free port of it (29500)")
    train.add_argument(
        ALLOW, ALLOW.replace("_", "-"), action="append", default=[], metavar="NAME",
        help="resume although NAME differs from before (repeatable); the refusal says the name",
    )  # fmt: skip

    listings = {"recipes": recipe_names, "checkpoints": checkpoint_names}
    for what in listings:
        commands.add_parser(what, help=f"list the {what} that come with the package", allow_abbrev=False)

    command = next((word for word in argv if not word.startswith("-")), None)
    run = None
    for name, family in FAMILIES.items():
        for verb, summary in family.verbs.items():
            verb_parser = commands.add_parser(verb, help=summary, allow_abbrev=False)
            if verb == command:  # only this verb's module is imported
                add_arguments, run = commands_of(name).VERBS[verb]
                add_arguments(verb_parser)
    push_parser = commands.add_parser("push", help="publish a model folder on the Hub", allow_abbrev=False)
    if command == "push":
        from . import push

        push.add_arguments(push_parser)
        run = push.run
    demo_parser = commands.add_parser("demo", help="try a model in the browser", allow_abbrev=False)
    if command == "demo":
        from . import demo

        demo.add_arguments(demo_parser)
        run = demo.run

    options, rest = parser.parse_known_args(argv)
    if run is not None:
        if rest:
            raise UserError(f"unknown arguments {' '.join(rest)} (see llm-jepa {options.command} --help)")
        if options.command != "train-decoder":  # it writes into the folder
            for option in ("model", "second"):
                if word := getattr(options, option, None):
                    setattr(options, option, model_source(word))
        with ending_at_once():
            run(options)
    elif listing := listings.get(options.command):
        if rest:
            raise UserError(f"unknown arguments {' '.join(rest)} (llm-jepa {options.command} takes none)")
        names = listing()
        for name, title in names.items():
            print(f"{name:{max(map(len, names))}s}  {title}")
        if options.command == "checkpoints":
            print(f"\nThey are in {CHECKPOINTS}.")
    elif options.help:
        train.print_help()
        print(describe_keys())
    elif options.recipe is None:
        raise UserError("Which recipe? Write llm-jepa train RECIPE.yaml (see llm-jepa train --help).")
    else:
        _train(options, rest)


def _version() -> str:
    try:
        return f"llm-jepa {version('llm-jepa')} ({PACKAGE})"
    except PackageNotFoundError:
        return f"llm-jepa, not installed ({PACKAGE})"


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    for name in LAUNCH_OPTIONS[1:]:
        if getattr(options, name) is not None and options.launch is None:
            raise UserError(f"--{name} needs --launch (cpu, ddp, fsdp2, zero3 or a file).")
    if options.launch == "cpu" and not _overrides_key("use_cpu", overrides):
        # Without use_cpu, each gloo process would train a separate model into the same folder.
        overrides = [*overrides, "--use_cpu", "true"]
    checked = check_recipe(options.recipe, overrides)
    family = commands_of(checked.family)
    family.check_files(checked)  # the last line that answers before torch is imported
    recipe = replace(build_recipe(checked), allowed=frozenset(options.allow_changed))
    from .core.checks import check_library_options, check_packages

    check_packages(recipe.training)
    check_library_options(recipe.training)
    if options.dry_run:
        from .core.strict_yaml import dump_yaml

        print("# Resolved recipe\n" + dump_yaml({"family": recipe.family, **recipe.written}))
        family.dry_run(recipe, launch=options.launch, processes=_planned_processes(options, recipe))
        return
    try:
        with ending_at_once():
            _train_here_or_launch(options, overrides, recipe, family)
    except (KeyboardInterrupt, Stopped) as end:
        stopped = end if isinstance(end, Stopped) else Stopped(signal.SIGINT)
        message = f"{stopped}{_how_to_go_on(options, overrides, recipe)}"
        raise _Ended(message, stopped.exit_code) from None
    except Exception as error:
        failure = machine_failure(error, recipe)
        if failure is None:
            raise
        raise _MachineFailed(*failure) from error


def _planned_processes(options: argparse.Namespace, recipe: Recipe) -> int:
    if options.launch is None:
        return 1
    from .launch import planned_processes

    machines = options.num_machines
    return planned_processes(
        options.launch, options.num_processes, use_cpu=recipe.training.use_cpu, num_machines=machines
    )


def _train_here_or_launch(
    options: argparse.Namespace, overrides: list[str], recipe: Recipe, family: ModuleType
) -> None:
    if options.launch is not None:
        from .launch import Machines, launch

        if not _overrides_key("family", overrides):
            overrides = [*overrides, "--family", recipe.family]  # or each process would guess it again
        words = [word for name in options.allow_changed for word in (ALLOW, name)]
        code = launch(
            options.launch,
            options.num_processes,
            options.recipe,
            [*overrides, *words],
            use_cpu=recipe.training.use_cpu,
            machines=Machines(*(getattr(options, name) for name in Machines._fields)),
        )
        if code != 0:
            raise _ProcessFailed(code)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) != recipe.training.world_size:
        # Otherwise each process would silently train a separate model into the same folder.
        raise UserError(
            f"{os.environ['WORLD_SIZE']} processes were started and cannot see each other: without a GPU each, add "
            "--use_cpu true."
        )
    from .core.run import hide_bars, leave_process_group, set_timeout

    hide_bars(recipe.training)
    set_timeout(recipe.training)
    family.train(recipe)

    leave_process_group()


def _how_to_go_on(options: argparse.Namespace, overrides: list[str], recipe: Recipe) -> str:
    """What an interrupted training has saved, and the command that continues it."""
    from .core.checkpoint import newest_sealed

    newest = newest_sealed(recipe.training.output_dir)
    command = ["llm-jepa", "train", options.recipe, *_without_key("resume_from_checkpoint", overrides)]
    for name in LAUNCH_OPTIONS:
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    if newest is None:
        cache = getattr(recipe.training, "feature_cache", None)
        kept = f" (but the features in {cache})" if cache is not None else ""
        return f". Nothing is saved yet{kept}; start again: {shlex.join(command)}"
    command += ["--resume_from_checkpoint", "true"]
    return f". Saved last: {newest}. Continue: {shlex.join(command)}"


def _without_key(key: str, overrides: list[str]) -> list[str]:
    """Overrides without `--key value` and `--key=value`."""
    kept, words = [], iter(overrides)
    for word in words:
        if not _overrides_key(key, [word]):
            kept.append(word)
        elif "=" not in word:
            next(words, None)  # its value
    return kept


def _overrides_key(key: str, overrides: list[str]) -> bool:
    return any(word.replace("-", "_").partition("=")[0] == f"__{key}" for word in overrides)


def command() -> NoReturn:
    """The installed command: `main`, and the end of the process."""
    exit_code = main()
    is_launcher = any(word.startswith("--launch") for word in sys.argv[1:])
    if "LOCAL_RANK" in os.environ or is_launcher:
        # gloo's threads abort the interpreter's normal exit in one of eight successful runs. In the launcher, it takes
        # seconds on a busy machine, which a frozen run would add to its ddp_timeout. So skip that exit.
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it is closed
            stream.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


if __name__ == "__main__":
    command()
