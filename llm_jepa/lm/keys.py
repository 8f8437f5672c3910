"""Every key of ours that a recipe of `family: lm` can hold, and what their values must be. Needs no library.

`arguments.LLMJEPAConfig` adds the keys of TRL and transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from ..core.errors import UserError
from ..core.patterns import matching
from ..core.row_files import LIMITS, RowLimits
from ..core.signals import seconds_of
from ..core.values import (
    check_counts_steps,
    check_fixed,
    check_ranges,
    check_stream,
    check_streamed_data,
    check_used,
    check_validation,
)
from .formats import check_columns
from .rows import MAX_ROW_PAIRS

MAX_PREDICTOR_TOKENS = 10  # as many as the reference code defines
# Options of SFTConfig and TrainingArguments that must keep these values, and why.
FIXED = (
    ("packing", False, "it cuts and mixes examples; share_rows: true saves the padding and changes nothing else"),
    ("padding_free", False, "views need their own attention mask"),
    ("label_smoothing_factor", 0.0, "our loss does not smooth and would ignore it"),
    ("neftune_noise_alpha", None, "its noise scales with the row length, which the views change"),
    ("loss_type", "nll", "the LM term is the negative log-likelihood"),
    ("assistant_only_loss", False, "label_protocol decides which tokens are trained"),
    ("completion_only_loss", None, "label_protocol decides which tokens are trained"),
    ("use_liger_kernel", False, "its fused loss returns no hidden states"),
    ("activation_offloading", False, "it is not tested with packed rows"),
    ("dataset_kwargs", None, "rows are always turned into views"),
    ("truncation_mode", "keep_start", "the views start at the start of the row"),
    ("model_init_kwargs", None, "it would replace how the model is loaded; pass a loaded model"),
    ("trust_remote_code", False, "code from a checkpoint is never run"),
    ("hub_token", None, "it would be written to disk in clear; log in with `hf auth login`"),
    ("auto_find_batch_size", False, "it restarts mid-run with weights already moved"),
    ("logging_nan_inf_filter", False, "it hides the NaN that should stop the run"),
)


@dataclass
class ModelArguments:
    """> Which model to start from: a checkpoint, or a config to train from scratch."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Causal LM (safetensors): a Hub id, a folder, or nl-rx of `llm-jepa checkpoints`."},
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit; pin a commit to repeat a run."}
    )
    model_config: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Train from scratch: a transformers config, e.g. {model_type: llama, hidden_size: 128}."},
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Default: the model's own. From scratch without it, a BPE is trained."}
    )
    tokenizer_vocab_size: int = field(
        default=640, metadata={"help": "Size of the byte-level BPE trained on the training rows (from scratch only)."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = field(
        default="float32",
        metadata={
            "help": "Dtype of the master weights. Keep float32 under bf16: pure bf16 rounds small steps away. "
            "float64 is for checks, e.g. that two ranks compute the gradient of one process."
        },
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = field(
        default=None,
        metadata={
            "help": "Attention backend. null: sdpa if the model has it, else eager. Both can mask packed rows; flash "
            "attention cannot, so it needs num_predictor_tokens: 0."
        },
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter; the saved model is merged."})
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA: hold the frozen linear layers in 4 bits (NF4, twice quantized). Needs use_peft, and the "
            "extra quant. The adapter is saved apart; merge it into the whole weights with llm-jepa export."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA dropout."})
    lora_target_modules: str | list[str] = field(
        default="all-linear",
        metadata={
            "help": "Modules that get an adapter: a list of last names, all-linear, or a regular expression for whole "
            "names."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            (
                ("tokenizer_vocab_size", 257, 10**7, "256 bytes and the special tokens"),
                ("lora_r", 1, 2**16, "8 to 64 is usual"),
                ("lora_alpha", 1, 10**6, "twice lora_r is usual"),
                ("lora_dropout", 0, 0.999, "0 is off"),
            ),
        )
        lora_keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        for name in lora_keys:
            value = getattr(self, name)
            if not self.use_peft and value != type(self).__dataclass_fields__[name].default:
                raise UserError(
                    f"{name}: {value} would be ignored: it belongs to use_peft: true; set that or remove it."
                )
        if self.load_in_4bit:
            self._check_4bit()
        if (self.model_name_or_path is None) == (self.model_config is None):
            raise UserError(
                "Set exactly one of model_name_or_path (a checkpoint) and model_config (from scratch); "
                "a from-scratch recipe takes a checkpoint with --model_config null --model_name_or_path NAME."
            )
        targets = self.lora_target_modules
        if isinstance(targets, str) and not re.fullmatch(r"[\w-]+", targets):
            matching(targets, [], "lora_target_modules")  # a malformed pattern is refused before a model is loaded
        if self.model_config is not None and "model_type" not in self.model_config:
            raise UserError("model_config has no model_type; add one, e.g. model_type: llama.")

    def _check_4bit(self) -> None:
        if not self.use_peft:
            raise UserError("load_in_4bit: true freezes the weights, so nothing would learn; set use_peft: true, too.")
        if self.model_config is not None:
            raise UserError("load_in_4bit: true with model_config would freeze random weights; name a checkpoint.")
        if self.dtype in ("float16", "float64"):
            raise UserError(f"load_in_4bit: true computes in float32 or bfloat16, not in {self.dtype}; change dtype.")
        if find_spec("bitsandbytes") is None:
            raise UserError('load_in_4bit: true needs bitsandbytes: pip install "llm-jepa[quant]"')


@dataclass
class DataArguments:
    """> Which rows to train on: TRL's prompt-completion or conversational format."""

    train_data: str | list[str] = field(
        metadata={
            "help": "A .jsonl, .json, .csv or .parquet file, a glob or a list of files, a folder, or a Hub dataset id."
        }
    )
    validation_data: str | list[str] | None = field(default=None, metadata={"help": "The same for validation."})
    validation_rows: int = field(
        default=0, metadata={"help": "Without validation_data: rows held out of train_data, drawn with data_seed."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of a folder or Hub dataset to train on."})
    validation_split: str = field(
        default="validation", metadata={"help": "Split of validation_data in a folder or on the Hub."}
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Other names of columns, in training and validation data: {prompt: question, completion: answer}."
        },
    )

    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training rows while training goes on, for data that fit no disk or memory. Needs "
            "max_steps; a stream that ends begins again."
        },
    )
    shuffle_buffer: int = field(
        default=0,
        metadata={
            "help": "With streaming: rows held in memory, of which a random one comes next. 0: the order of the files."
        },
    )
    max_rows: int = field(
        default=LIMITS.max_rows, metadata={"help": "Refuse data of more rows; a small file can unpack to any number."}
    )
    max_row_bytes: int = field(
        default=LIMITS.max_row_bytes,
        metadata={"help": "Refuse a longer line of JSON or record of CSV. A row takes up to 1 kB of memory per byte."},
    )

    def __post_init__(self) -> None:
        check_validation(self)
        check_streamed_data(self)
        check_columns(self.columns or {})

    @property
    def limits(self) -> RowLimits:
        """How much a source may hold."""
        return RowLimits(self.max_rows, self.max_row_bytes)


@dataclass
class JEPAKeys:
    """> The JEPA term: what is compared with what, and how much it weighs. `jepa_weight=0` is plain SFT."""

    # -- the loss
    jepa_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the JEPA loss (the paper's lambda); the LM loss has 1. 0: plain SFT, no token is added."
        },
    )
    jepa_weight_end: float | None = field(
        default=None, metadata={"help": "Move jepa_weight to this in a straight line over the run; null: constant."}
    )
    jepa_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of optimizer steps without the JEPA term; they cost as much as plain SFT (the paper's LD, "
            "which advises jepa_weight * (1 - LD) = constant)."
        },
    )
    objective: Literal["info_nce", "cosine", "l2", "mse", "smooth_l1", "stp"] = field(
        default="info_nce",
        metadata={
            "help": "Distance between predicted and target embedding. The paper uses cosine, which collapsed in all of "
            "our small runs; info_nce did not. stp: Semantic Tube Prediction, which has no views."
        },
    )
    temperature: float = field(default=0.07, metadata={"help": "Temperature of info_nce; smaller is sharper."})
    negatives: Literal["micro_batch", "optimizer_step"] = field(
        default="micro_batch",
        metadata={
            "help": "Source of the negatives of info_nce: the micro-batch of all ranks, or all micro-batches of the "
            "optimizer step (GradCache: one more forward pass, same gradient as one big batch)."
        },
    )
    regularizer: Literal["vicreg", "sigreg"] | None = field(
        default=None,
        metadata={"help": "Anti-collapse term on each view, over the pairs of all ranks."},
    )
    regularizer_weight: float = field(default=1.0, metadata={"help": "Its weight relative to the distance."})
    projector_dim: int = field(
        default=128,
        metadata={
            "help": "With a regularizer: project the embeddings linearly to this many dimensions before both terms. "
            "The projector is trained too and is not saved with the model. 0: no projector."
        },
    )
    stp_formula: Literal["paper", "code"] = field(
        default="paper",
        metadata={"help": "Formula of objective: stp, as in the paper or as in its released code."},
    )

    # -- the two embeddings
    target_encoder: Literal["self", "stop_gradient", "ema", "base"] = field(
        default="self",
        metadata={
            "help": "Source of the targets. self: this model; both sides learn (paper). stop_gradient: this model, "
            "forward only. ema: its moving average. base: the model at the start; its targets are computed once."
        },
    )
    ema_decay: float = field(
        default=0.99, metadata={"help": "Decay per optimizer step at the start; rises to 1 on a cosine (BYOL)."}
    )
    num_predictor_tokens: int = field(
        default=1,
        metadata={"help": f"Predictor tokens of the context, 0..{MAX_PREDICTOR_TOKENS} (the paper's k)."},
    )
    predictor_position: Literal["last", "first"] = field(
        default="last", metadata={"help": "Predictor tokens after the context, or before its content (paper, table 3)."}
    )
    direction: Literal["forward", "reverse"] = field(
        default="forward", metadata={"help": "reverse: the completion predicts the prompt (paper, table 3)."}
    )
    readout: Literal["last", "mean"] = field(
        default="last",
        metadata={"help": "Embedding of a view: the state of its last token, or the mean over all of its tokens."},
    )
    readout_layer: int = field(
        default=-1,
        metadata={"help": "Hidden state to read: -1 is the last one (after the final norm), 8 the one after layer 8."},
    )
    context_view: Literal["prefix", "message"] = field(
        default="prefix",
        metadata={
            "help": "prefix: the LM row up to the end of the prompt, with system prompt and earlier turns; nearly "
            "free. message: only the last user turn, as in the paper. These are two different objectives."
        },
    )
    label_protocol: Literal["completion", "paper"] = field(
        default="completion",
        metadata={
            "help": "completion: train the completion and its end-of-turn token. paper: train every non-pad token, as "
            "the published script really does (so end-of-turn is never trained if pad = eos)."
        },
    )
    too_long: Literal["truncate", "drop", "refuse"] = field(
        default="truncate",
        metadata={
            "help": "Rows longer than max_length. truncate: cut their ends, and refuse rows whose prompt leaves no "
            "completion token. drop: leave them out. refuse: train nothing. All are counted."
        },
    )
    max_row_pairs: int = field(
        default=MAX_ROW_PAIRS,
        metadata={"help": "Refuse a row whose `views` make more pairs: all of its contexts with all of its targets."},
    )
    diagnostics_pairs: int = field(
        default=512, metadata={"help": "Validation pairs whose geometry is measured at every evaluation; 0 for none."}
    )
    stop_after: str | None = field(
        default=None,
        metadata={"help": "Time from the start of training, as 2h or 1h30m: then save a checkpoint and exit with 75."},
    )
    share_rows: bool = field(
        default=False,
        metadata={
            "help": "Put several examples of a batch into one row if that saves padding. The batch and its gradient "
            "stay the same (TRL's packing changes both)."
        },
    )

    # Other defaults than the parents'.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay off: it hides the NaN that should stop the run."}
    )

    def check(self) -> None:
        """Raises UserError for values that cannot be right, and for inherited options that our loss would ignore.

        The inherited keys must be attributes too.
        """
        inherited: Any = self
        check_ranges(
            self,
            (
                ("jepa_weight", 0, 1e6, "0 is plain SFT"),
                ("jepa_weight_end", 0, 1e6, "0 ends as plain SFT"),
                ("jepa_dropout", 0, 1, "it is the share of steps without the JEPA term"),
                ("regularizer_weight", 0, 1e6, "0 is none"),
                ("temperature", 1e-4, 1e4, "CLIP starts at 0.07"),
                ("max_length", 1, 2**31, "it counts tokens; null for no limit"),
                ("pad_to_multiple_of", 1, 2**16, "8 or 64 is usual"),
                ("router_aux_loss_coef", 0, 1e6, "0.001 is usual"),
                ("projector_dim", 0, 4096, "64 to 256 is usual, 0 is none"),
                ("ema_decay", 0, 1, "0.99 is usual"),
                ("num_predictor_tokens", 0, MAX_PREDICTOR_TOKENS, "the reference code defines no more"),
                ("diagnostics_pairs", 0, math.inf, "0 is off"),
                ("max_row_pairs", 1, math.inf, "each row has a pair"),
            ),
        )
        if self.jepa_dropout == 1:
            raise UserError("jepa_dropout=1 leaves no step with the JEPA term; set jepa_weight: 0 for plain SFT.")
        check_fixed(self, FIXED)
        if inherited.eval_packing:
            raise UserError(
                "eval_packing=True is not supported: share_rows: true lays out evaluation rows as well; remove it."
            )
        if self.uses_jepa:
            self._check_jepa()
        check_used(self, (("too_long", inherited.max_length is not None, "max_length"),))
        if self.stop_after is not None:
            seconds_of(self.stop_after)
        if inherited.parallelism_config is not None:
            raise UserError("parallelism_config: context and sequence parallelism drop the attention mask; remove it.")
        if inherited.chat_template_path is not None and not inherited.chat_template_path.endswith((".jinja", ".j2")):
            raise UserError(f"chat_template_path={inherited.chat_template_path!r} must be a .jinja file.")

    def _check_jepa(self) -> None:
        """Refuse combinations of our own keys that contradict each other."""
        info_nce, regularized = self.objective == "info_nce", self.regularizer is not None
        views = "an objective with views, which stp is not"
        check_used(
            self,
            (
                ("temperature", info_nce, "objective: info_nce"),
                ("negatives", info_nce and not regularized, "objective: info_nce, without a regularizer"),
                ("regularizer_weight", regularized, "a regularizer"),
                ("projector_dim", regularized, "a regularizer"),
                ("ema_decay", self.target_encoder == "ema", "target_encoder: ema"),
                ("stp_formula", self.objective == "stp", "objective: stp"),
                ("predictor_position", self.num_predictor_tokens > 0, "num_predictor_tokens: 1 or more"),
                ("regularizer", self.uses_views, views),
                ("target_encoder", self.uses_views, views),
                ("predictor_position", self.uses_views, views),
                ("direction", self.uses_views, views),
                ("readout", self.uses_views, views),
                ("context_view", self.uses_views, views),
            ),
        )
        inherited: Any = self
        is_best_by_loss = inherited.load_best_model_at_end and inherited.metric_for_best_model in ("loss", "eval_loss")
        if is_best_by_loss and self.jepa_weight_end not in (None, self.jepa_weight):
            raise UserError(
                "load_best_model_at_end would compare losses of different jepa_weight, which jepa_weight_end moves; "
                "set metric_for_best_model: eval_lm_loss, or remove one of the two."
            )
        if self.predictor_position == "first" and self.context_view == "prefix" and self.direction == "forward":
            raise UserError(
                "predictor_position: first cannot share the LM row, whose tokens do not see predictor tokens; set "
                "context_view: message."
            )

    @property
    def target_placement(self) -> Literal["inside", "apart", "cached"]:
        """Where the target views are computed.

        inside: in the rows that learn. apart: in rows for a forward pass without gradient. cached: before training.
        """
        if self.target_encoder == "self" or not self.uses_views:
            return "inside"
        return "cached" if self.target_encoder == "base" else "apart"

    @property
    def uses_views(self) -> bool:
        """Whether rows have a context and a target view; `stp` reads the LM row alone."""
        return self.uses_jepa and self.objective != "stp"

    @property
    def uses_jepa(self) -> bool:
        """Whether any step of the run has a JEPA term."""
        return self.jepa_weight > 0 or (self.jepa_weight_end or 0) > 0


def check_together(model: ModelArguments, data: DataArguments, training: JEPAKeys, given: Mapping[str, Any]) -> None:
    """Refuse keys that do not go with streaming. Raises UserError."""
    if not data.streaming:
        return
    check_streamed_training(training)
    check_counts_steps(given)


def check_streamed_training(training: Any) -> None:
    """Raises UserError for training options that need to know all rows."""
    check_stream(training)
    if training.shuffle_dataset:
        raise UserError("shuffle_dataset needs all rows, which streaming: true does not know; set shuffle_buffer.")
    if training.uses_views and training.target_encoder == "base":
        raise UserError(
            "target_encoder: base embeds the targets of all rows before training, and streaming: true does not know "
            "them; choose stop_gradient or ema."
        )
