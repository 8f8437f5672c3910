"""Model cards for all families: the facts of a run, rendered by the family's `card.md.jinja`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from markupsafe import Markup, escape
from transformers import TrainerState, TrainingArguments

from .files import write_whole
from .identity import TRAIN_FILES
from .printing import escaped, shown

SHARED, SHARED_PART = Path(__file__).with_name("card_run.md.jinja"), "{# card_run.md.jinja #}\n"
CURVE = "loss_curve.png"
MAX_HEAD = 1 << 16  # characters of a card that are searched for its licence
MIN_POINTS = 3  # of a curve that is worth a picture
# In every fresh card. `eval.robustness --write-card` takes it out again.
NOT_EVALUATED = "Nothing else is known about this model until it has been evaluated on a task."


@dataclass(frozen=True)
class Evaluation:
    """The last evaluation of a run.

    step: the optimizer step that was evaluated; None if no trained weights ever were.
    saved_step: the step of the saved weights, which may be a later one.
    rows: (figure, value at step 0 or "", value at `step`).
    pairs: how many pairs the geometry was measured on; 0 if it was not measured.
    """

    step: int | None
    saved_step: int
    rows: list[tuple[str, str, str]]
    pairs: int


def settings_of(args: TrainingArguments, own: dict[str, Any]) -> dict[str, Any]:
    """The family's own settings and those that every run has, with enums as their words."""
    batches = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    settings = {
        **own,
        "learning_rate": args.learning_rate,
        "batch per device x accumulation x ranks": " x ".join(map(str, batches)),
        "seed": args.seed,
    }
    return {key: getattr(value, "value", value) for key, value in settings.items()}


def data_facts(given: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """Which data a recipe named, without the path on this machine, their hashes, and the adapter that was trained.

    given: the keys of the recipe, and those that it leaves as they are.  record: of the run (`identity.describe_run`).
    """
    facts = {}
    for kind, key in (("train", "train_data"), ("validation", "validation_data")):
        source, sha256 = given.get(key), record.get(f"{kind}_sha256")
        if source is None and kind == "validation" and sha256 is not None:
            source = "drawn from the train data"
        if source is not None:
            sources = source if isinstance(source, list) else [source]
            name = ", ".join(Path(each).name if Path(each).exists() else each for each in sources)
            facts[f"{kind} data"] = f"{name} (sha256 {sha256[:16]})" if sha256 else name
            if kind == "train" and (files := record.get(TRAIN_FILES)):
                facts["train data"] = (
                    f"{name} (streamed: the rows have no hash; sha256 of names and sizes of the files {files[:16]})"
                )
    if given.get("use_peft"):
        adapter = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "modules": "lora_target_modules"}
        parts = [f"{name} {_words(given[key])}" for name, key in adapter.items() if key in given]
        facts["LoRA"] = ", ".join([*parts, *(["base model in 4 bits"] if given.get("load_in_4bit") else [])])
    return facts


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def training_facts(state: TrainerState, args: TrainingArguments, *, saved_step: int, began_at: int) -> dict[str, str]:
    """How long a run trained, and on what. began_at: the step at which this process began; not 0 if it was resumed."""
    facts = {"steps": str(saved_step)}
    if saved_step != state.global_step:
        facts["steps"] += f" (the best of {state.global_step})"
    entry: dict[str, Any] = next((e for e in reversed(state.log_history) if "train_runtime" in e), {})
    if state.epoch is not None and saved_step == state.global_step:
        facts["epochs"] = f"{state.epoch:.3g}"
    if "num_tokens" in entry:
        facts["tokens"] = f"{entry['num_tokens']:,.0f}"
    if "train_runtime" in entry:
        minutes = f"{entry['train_runtime'] / 60:.1f} minutes"
        since = f", since it was resumed at step {began_at}" if began_at else ""
        facts["time"] = f"{minutes} on {args.world_size} x {args.device.type}{since}; energy was not measured"
    return facts


def draw_curve(log_history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw the losses of a trainer's log over its steps. False without matplotlib, or with fewer than 3 entries."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if key.endswith("loss") and key != "train_loss":
                series.setdefault(key, []).append((entry["step"], value))
    if len(series.get("loss", [])) < MIN_POINTS or find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # pyplot would keep it, and choose a window system

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for key, points in series.items():
        style = "o--" if key.startswith("eval_") else "-"
        axes.plot(*zip(*points, strict=True), style, markersize=4, label=key.replace("_", " "))
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def licence_of(base: str | None) -> str | None:
    """The licence that the card of the start model states: in its folder, or as it lies in the Hub's cache. Or None.

    No card is downloaded: a save must not depend on a network. The head is not parsed as YAML, which a stranger wrote.
    """
    if not base:
        return None
    try:
        found = Path(base) / "README.md" if Path(base).is_dir() else try_to_load_from_cache(base, "README.md")
        if not isinstance(found, (str, Path)) or not Path(found).is_file():
            return None
        with open(found, encoding="utf-8") as file:
            head = file.read(MAX_HEAD).split("\n---", 1)[0]
    except (HFValidationError, OSError, UnicodeDecodeError):
        return None
    line = re.search(r"^license: *([\w.-]+) *$", head, re.MULTILINE) if head.startswith("---") else None
    return line[1] if line else None


def last_evaluation(log_history: list[dict[str, Any]], saved_step: int, pairs: int) -> Evaluation:
    """The figures of the last evaluation in a trainer's log, and those of step 0.

    Figures of step 0 alone are those of the start model, so such a run was not evaluated. Several validation sets have
    an entry each at the same step.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        figures = {key: value for key, value in entry.items() if key.startswith("eval_")}
        if figures:
            by_step.setdefault(entry["step"], {}).update(figures)
    start = by_step.pop(0, {})
    if not by_step:
        return Evaluation(None, saved_step, [], 0)
    step = max(by_step)
    rows = []
    for key, value in sorted(by_step[step].items()):
        if "_per_second" not in key and "runtime" not in key:
            before = f"{start[key]:.4g}" if key in start else ""
            rows.append((key.removeprefix("eval_"), before, f"{value:.4g}"))
    was_measured = any(key.endswith("recall_at_1") for key in by_step[step])
    return Evaluation(step, saved_step, rows, pairs if was_measured else 0)


def versions_of(packages: Sequence[str]) -> str:
    return ", ".join(f"{name} {version(name)}" for name in packages)


def write_card(output_dir: str | Path, template: Path, metadata: ModelCardData, **facts: Any) -> Path:
    """Render `template` into README.md. `metadata` becomes the YAML head; `facts` are the template's variables.

    Where a template says so, the part that all families share, `card_run.md.jinja`, is put in.

    No name or setting becomes markup: each text among the facts is in one line, and HTML and Markdown in it are
    escaped.
    """
    path = Path(output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts |= {"name": Path(output_dir).name, "not_evaluated": NOT_EVALUATED, "package": version("llm-jepa")}
    facts = {key: _as_text(value) for key, value in facts.items()}
    for key, value in vars(metadata).items():
        if isinstance(value, str):
            setattr(metadata, key, escaped(value))  # YAML quotes the rest
        elif isinstance(value, list):
            setattr(metadata, key, [escaped(item) if isinstance(item, str) else item for item in value])
    text = template.read_text(encoding="utf-8").replace(SHARED_PART, SHARED.read_text(encoding="utf-8"))
    card = ModelCard.from_template(metadata, template_str=text, **facts)
    write_whole(path, f"{card}\n")
    return path


def _as_text(fact: Any) -> Any:
    """A fact with its texts escaped for Markdown; numbers and objects of ours stay."""
    if isinstance(fact, Evaluation):
        return replace(fact, rows=_as_text(fact.rows))
    if isinstance(fact, dict):
        return {_as_text(key): _as_text(value) for key, value in fact.items()}
    if isinstance(fact, list) and all(isinstance(item, (dict, tuple)) for item in fact):
        return [_as_text(item) for item in fact]
    if type(fact) is tuple:
        return tuple(_as_text(item) for item in fact)
    if isinstance(fact, list) and not all(isinstance(item, (int, float)) for item in fact):
        fact = str(fact)
    if not isinstance(fact, str):
        return fact
    # Not `_` and `*`: names hold them, also in the lines of code that a reader copies.
    text = str(escape(shown(fact)))
    for mark in "|`[]":
        text = text.replace(mark, f"&#{ord(mark)};")
    return Markup(text)
