"""Files that let plain `SentenceTransformer(FOLDER)` compute the vectors of `Embedder`, without this package.

sentence-transformers (6.2) can be told which state to read, to pool the last token or the mean, and which chat template
to write a text with. That template is kept in `sentence_bert_config.json`, beside the tokenizer's own: it writes a view
up to the end of its content, and the predictor tokens. `encode_query` embeds a prompt and `encode_document` a
completion; the two are told apart by the library's own prompts, which it passes on as a system turn.

A template writes text, and the text is tokenized again. So the sequences of sample texts are compared with those of
`Sides` before the files are written. If they differ, the template refuses every text with the reason: without any file
the library would load the folder silently and give other vectors.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from ..core.errors import UserError
from ..core.files import write_json
from ..core.templates import budget
from .embedder import Sides, reading_of
from .predictor_tokens import predictor_token_names
from .prompts import PROBE, conversation, is_asked_as_text
from .views import answer_header, user_header

QUERY, DOCUMENT = "llm-jepa: embed a prompt", "llm-jepa: embed a completion"  # the library's prompts
# Texts whose ends and beginnings tokenizers and templates treat in their own way.
SAMPLES = (
    "Word", "two words", "7 is 7", "(ab)", '"ab."', "<b>ab</b>", "{x}", "#ab?", "-ab!", "'ab;'", "`ab`", "/ab/", "*ab*",
    "$ab:", "%ab,", "|ab|", "~ab-", "[ab]", "_ab_", "été", "日本語。", "🙂", "two\nlines", " led", "\nled", "ended ",
    "ended\n\n", "is it?\n",
)  # fmt: skip
# How a template may treat the white space in front of a content; what ends it is never a part of a view.
STRIPS = (".rstrip()", ".strip()", ".rstrip().lstrip('\\n')")


class Plan(NamedTuple):
    """The template for the library, and why it refuses every text (None if it does not)."""

    template: str
    refusal: str | None


def write_files(folder: str | Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Write the library's files beside a saved model."""
    folder = Path(folder)
    reading = reading_of(config)
    layer = reading.readout_layer
    states: Any = "last_hidden_state" if layer == -1 else ["hidden_states", layer]
    how = {"method": "forward", "method_output_name": states}
    modules = {
        "": "sentence_transformers.base.modules.transformer.Transformer",
        "1_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    }
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules.items())]
    write_json(folder / "modules.json", listed)
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": how, "message": {**how, "format": "flat"}},
            "module_output_name": "token_embeddings",
            # Nothing is cut silently, and positions count from the first token.
            "processing_kwargs": {
                "text": {"truncation": False},
                "chat_template": {"chat_template": plan(tokenizer, config).template, "restore_suffix": False},
            },
            "processor_kwargs": {"padding_side": "right"},
            "unpad_inputs": False,
        },
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": QUERY, "document": DOCUMENT},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {
        "embedding_dimension": config.get_text_config().hidden_size,
        "pooling_mode": "mean" if reading.readout == "mean" else "lasttoken",
        "include_prompt": True,
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)


def plan(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Plan:
    """The chat template for the library. It refuses every text if it could not give the sequences of `Sides`."""
    if config.model_type not in MODEL_MAPPING_NAMES:
        return _refused("it loads no model of this type without its head")
    record = json.dumps(getattr(config, "llm_jepa", None), ensure_ascii=False)
    return _plan(tokenizer, str(tokenizer.chat_template), record)


# A run saves many checkpoints with one tokenizer. The template and the record are what may change in between.
@functools.lru_cache(maxsize=4)
def _plan(tokenizer: PreTrainedTokenizerBase, template: str, record: str) -> Plan:
    try:
        sides = Sides(tokenizer, PreTrainedConfig(llm_jepa=json.loads(record)))
        wanted = [
            [(sample, sides.prompt(sample, "a prompt")) for sample in SAMPLES],
            [(sample, sides.completion(sample, "a completion")) for sample in SAMPLES],
        ]
        parts = _parts(sides)
    except UserError as error:
        return _refused(str(error).rstrip("."))
    chosen = []
    for mark, samples in zip((QUERY, DOCUMENT), wanted, strict=True):
        failures = []
        for strip in STRIPS:
            template = _template(parts, (strip, strip))
            failures.append(_first_difference(tokenizer, template, mark, samples))
            if failures[-1] is None:
                chosen.append(strip)
                break
        else:
            name = "prompt" if mark == QUERY else "completion"
            furthest = max(failures, key=lambda sample: SAMPLES.index(str(sample)))
            return _refused(f"the tokens of a {name} alone differ from those in its conversation, e.g. of {furthest!r}")
    return Plan(_template(parts, (chosen[0], chosen[1])), None)


def _refused(reason: str) -> Plan:
    line = f"sentence-transformers cannot embed with this model: {reason}. Use llm_jepa.lm.Embedder."
    return Plan(f"{{{{- raise_exception({_quoted(line)}) -}}}}", line)


def _first_difference(
    tokenizer: PreTrainedTokenizerBase, template: str, mark: str, samples: list[tuple[str, list[int]]]
) -> str | None:
    """The first sample whose tokens differ when the library writes it."""
    for sample, ids in samples:
        turns = [{"role": "system", "content": mark}, {"role": "user", "content": sample}]
        with budget():
            written = tokenizer.apply_chat_template(turns, chat_template=template, return_dict=False)
        if written != ids:
            return sample
    return None


# -- the template -----------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """What a view consists of beside its content, as Jinja code."""

    conversation: str | None  # the model's own template, if a prompt is written with the turns before it
    prompt_header: str
    completion_header: str
    before: tuple[str, str]  # predictor tokens between header and content, of a prompt and of a completion
    after: tuple[str, str]
    system: str | None
    render_kwargs: dict[str, Any]


def _parts(sides: Sides) -> _Parts:
    tokenizer, form, reading = sides.tokenizer, sides.form, sides.reading
    # A view that is a sequence of its own begins with the BOS token if the rows do.
    first = sides.completion("x", "a completion")[:1]
    bos = str(tokenizer.bos_token) if first == [tokenizer.bos_token_id] else ""
    predictors = "".join(predictor_token_names(reading.num_predictor_tokens))
    with_prompt = reading.direction == "forward"
    pair = (predictors, "") if with_prompt else ("", predictors)
    at_start = reading.predictor_position == "first"
    before, after = (pair, ("", "")) if at_start else (("", ""), pair)
    if is_asked_as_text(tokenizer, form):
        return _Parts(None, bos, bos, before, after, None, {})
    prompt = conversation(form.system, "x")
    opening = answer_header(tokenizer, prompt, form.render_kwargs)
    completion_header = opening if bos and opening.startswith(bos) else bos + opening
    if reading.context_view == "message":
        header = user_header(tokenizer, "user", "a prompt")
        header = header if bos and header.startswith(bos) else bos + header
        return _Parts(None, header, completion_header, before, after, None, {})
    own = str(tokenizer.chat_template)
    return _Parts(own, "", completion_header, before, after, form.system, form.render_kwargs)


def _template(parts: _Parts, strips: tuple[str, str]) -> str:
    """Jinja code that writes one view. Names of its own begin with `jepa_`."""
    prompt = _alone(parts.prompt_header + parts.before[0], strips[0], parts.after[0])
    if parts.conversation is not None:
        prompt = _in_conversation(parts, strips[0])
    completion = _alone(parts.completion_header + parts.before[1], strips[1], parts.after[1])
    return (
        "{#- Written by llm-jepa: a text as the model was trained to embed it, for sentence-transformers -#}\n"
        "{%- set jepa_mark = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}\n"
        f"{{%- if jepa_mark == {_quoted(QUERY)} or jepa_mark == {_quoted(DOCUMENT)} -%}}"
        "{%- set messages = messages[1:] -%}{%- endif -%}\n"
        "{%- set jepa_content = messages[-1]['content'] -%}\n"
        "{%- if jepa_content is not string -%}{{- raise_exception('a turn to embed needs a text as its content') -}}"
        "{%- endif -%}\n"
        f"{{%- if jepa_mark == {_quoted(DOCUMENT)} -%}}\n{completion}\n{{%- else -%}}\n{prompt}\n{{%- endif -%}}"
    )


def _alone(before: str, strip: str, after: str) -> str:
    """A view that does not depend on other turns."""
    refusal = "'this model embeds one text at a time here: no other turns, and no prompt of your own'"
    return (
        f"{{%- if messages | length > 1 -%}}{{{{- raise_exception({refusal}) -}}}}{{%- endif -%}}\n"
        f"{{{{- {_quoted(before)} + (jepa_content{strip}) + {_quoted(after)} -}}}}"
    )


def _in_conversation(parts: _Parts, strip: str) -> str:
    """A prompt with the turns before it: the model's own template, up to a probe in place of the last content."""
    own = str(parts.conversation)
    lines = []
    for name, value in parts.render_kwargs.items():
        lines.append(f"{{%- set {name} = {_literal(value)} -%}}")
    if parts.system:
        turn = _literal({"role": "system", "content": parts.system})
        lines.append(
            f"{{%- if messages[0]['role'] != 'system' -%}}{{%- set messages = [{turn}] + messages -%}}{{%- endif -%}}"
        )
    # White space at the start of a template is written; of what follows a block, transformers drops one line break.
    ends = "%}\n" if own[:1].isspace() else "-%}"
    lines += [
        f"{{%- set messages = messages[:-1] + [{{'role': messages[-1]['role'], 'content': '{PROBE}'}}] -%}}",
        f"{{%- set jepa_written {ends}{own}{{%- endset -%}}",
        f"{{{{- jepa_written.rpartition('{PROBE}')[0] + {_quoted(parts.before[0])} + (jepa_content{strip}) + "
        f"{_quoted(parts.after[0])} -}}}}",
    ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A string in Jinja, which takes other characters than these as they are."""
    for character, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escaped)
    return f"'{text}'"


def _literal(value: Any) -> str:
    """A JSON value in Jinja."""
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_quoted(key)}: {_literal(item)}' for key, item in value.items())}}}"
    return repr(value)  # a number, True, False or None, which Jinja writes as Python does
