"""The README.md of a trained VL-JEPA. No number typed by hand."""

from __future__ import annotations

import html
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..core.card import last_evaluation, settings_table, write_card
from .arguments import VLJEPATrainingArguments
from .modeling import VLJEPAModel

ALWAYS_SHOWN = ("objective", "y_encoder_lr_factor", "x_encoder_trainable_layers")
PACKAGES = ("torch", "transformers", "accelerate")

TEMPLATE = """---
library_name: transformers
pipeline_tag: video-text-to-text
{base_lines}tags: [vl-jepa, jepa, llm-jepa]
---
# {name}

A VL-JEPA ([arXiv:2512.10942](https://arxiv.org/abs/2512.10942)): it predicts the embedding of a text from a clip and a
query, and decodes that to text only when asked.

```python
from llm_jepa.vl import VLJEPA
model = VLJEPA.from_pretrained("{name}")
model.classify(frames, ["a label", "another one"])       # frames: [T, H, W, 3] uint8, or the path of a video
model.answer(frames, "a question?", ["yes", "no"])
```

| part | from | weights |
|---|---|---|
{parts}

| setting | value |
|---|---|
{settings}

Last evaluation on the validation clips (step {step}):

| figure | step 0 | now |
|---|---|---|
{figures}

Recall and effective rank depend on the number of pairs measured (at most {pairs}). Nothing else is known about this
model until it has been evaluated on a task.

Versions: {versions}.
"""


def write_vl_model_card(
    output_dir: str | Path, model: VLJEPAModel, args: VLJEPATrainingArguments, log_history: list[dict[str, Any]]
) -> Path:
    """Write README.md from the run's own configuration and log."""
    named = {part: source["name"] for part, source in model.config.revisions.items()}
    bases = [name for name in named.values() if not Path(name).exists()]
    parts = []
    for part in ("x_encoder", "predictor", "y_encoder"):
        config = getattr(model.config, f"{part}_config")
        count = sum(weight.numel() for weight in getattr(model, part).parameters())
        revision = model.config.revisions.get(part, {}).get("revision")
        shown = Path(named[part]).name if part in named and Path(named[part]).exists() else named.get(part)
        source = f"{shown}{f' @ {revision[:12]}' if revision else ''}" if shown else "random weights"
        parts.append(f"| {part} ({config.model_type}) | {html.escape(source)} | {count:,} |")
    defaults = {name: field.default for name, field in VLJEPATrainingArguments.__dataclass_fields__.items()}
    own = {
        name: getattr(args, name)
        for name in VLJEPATrainingArguments.__annotations__
        if name in ALWAYS_SHOWN or getattr(args, name) != defaults[name]
    }
    own.pop("feature_cache", None)  # a path of one machine
    step, figures = last_evaluation(log_history)
    text = TEMPLATE.format(
        base_lines="base_model:\n" + "".join(f"- {base}\n" for base in bases) if bases else "",
        name=html.escape(Path(output_dir).name),
        parts="\n".join(parts),
        settings=settings_table(args, own),
        step=step,
        figures=figures,
        pairs=args.diagnostics_pairs,
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
    )
    return write_card(output_dir, text)
