"""The README.md of a trained checkpoint: what was trained, on what, and what was measured. No number typed by hand."""

from __future__ import annotations

import html
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from .config import LLMJEPAConfig

ALWAYS_SHOWN = ("jepa_weight", "objective", "num_predictor_tokens", "context_view", "label_protocol")
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets")

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
{base_line}tags: [llm-jepa, jepa, sft]
---
# {name}

{start}, {trained}. It is a plain `transformers` causal LM:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

| setting | value |
|---|---|
{settings}

Last evaluation on the validation split (step {step}):

| figure | step 0 | now |
|---|---|---|
{figures}

Recall and effective rank depend on the number of pairs measured ({pairs}). Predictor tokens are inputs only: their
logits are suppressed in generation. Nothing else is known about this model until it has been evaluated on a task.

Versions: {versions}.
"""


def write_model_card(
    output_dir: str | Path, model: PreTrainedModel, args: LLMJEPAConfig, log_history: list[dict[str, Any]]
) -> Path:
    """Write README.md from the run's own configuration and log."""
    base = model.config._name_or_path
    defaults = {name: field.default for name, field in LLMJEPAConfig.__dataclass_fields__.items()}
    own = {k: v for k, v in model.config.llm_jepa.items() if k in ALWAYS_SHOWN or v != defaults[k]}
    step, figures = last_evaluation(log_history)
    text = TEMPLATE.format(
        base_line=f"base_model: {base}\n" if base and not Path(base).exists() else "",
        name=html.escape(Path(output_dir).name),
        start=f"Start: `{html.escape(base)}`" if base else f"A {model.config.model_type} model from random weights",
        trained="trained with [LLM-JEPA](https://arxiv.org/abs/2509.14252): the causal-LM loss plus an embedding-space "
        "loss between two views of each example"
        if args.uses_jepa
        else "trained with the causal-LM loss alone: the plain SFT baseline of an LLM-JEPA run",
        settings=settings_table(args, own),
        step=step,
        figures=figures,
        pairs=args.diagnostics_pairs,
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
    )
    return write_card(output_dir, text)


def settings_table(args: TrainingArguments, own: dict[str, Any]) -> str:
    """Markdown rows of the trainer's own settings and of those every run has."""
    settings = {
        **own,
        "learning_rate": args.learning_rate,
        "batch per device x accumulation x ranks": f"{args.per_device_train_batch_size} x "
        f"{args.gradient_accumulation_steps} x {args.world_size}",
        "seed": args.seed,
    }
    plain = {key: getattr(value, "value", value) for key, value in settings.items()}  # the word of an enum
    return "\n".join(f"| {key} | {html.escape(str(value))} |" for key, value in plain.items())


def last_evaluation(log_history: list[dict[str, Any]]) -> tuple[int, str]:
    """The step of the last evaluation, and Markdown rows of its figures beside those of step 0."""
    evaluations = [entry for entry in log_history if any(key.startswith("eval_") for key in entry)]
    start = evaluations[0] if evaluations and evaluations[0].get("step") == 0 else {}
    last = evaluations[-1] if evaluations else {}
    keys = sorted(key for key in last if key.startswith("eval_") and "_per_second" not in key and "runtime" not in key)
    rows = [
        f"| {key.removeprefix('eval_')} | {f'{start[key]:.4g}' if key in start else ''} | {last[key]:.4g} |"
        for key in keys
    ]
    return last.get("step", 0), "\n".join(rows) or "| none measured | | |"


def write_card(output_dir: str | Path, text: str) -> Path:
    path = Path(output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
