"""The README.md of a trained checkpoint: what was trained, on what, and what was measured. No number typed by hand."""

from __future__ import annotations

import html
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..core.card import last_evaluation, settings_table, write_card
from .arguments import LLMJEPAConfig

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
