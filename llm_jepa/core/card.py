"""Model cards for all families: the facts of a run, rendered by the family's `card.md.jinja`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from markupsafe import Markup, escape
from transformers import TrainingArguments

from .files import write_whole
from .printing import escaped, shown

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

    No name or setting becomes markup: each text among the facts is in one line, and HTML and Markdown in it are
    escaped.
    """
    path = Path(output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts |= {"name": Path(output_dir).name, "not_evaluated": NOT_EVALUATED}
    facts = {key: _as_text(value) for key, value in facts.items()}
    for key, value in vars(metadata).items():
        if isinstance(value, str):
            setattr(metadata, key, escaped(value))  # YAML quotes the rest
        elif isinstance(value, list):
            setattr(metadata, key, [escaped(item) if isinstance(item, str) else item for item in value])
    card = ModelCard.from_template(metadata, template_path=str(template), **facts)
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
