"""The retrieval specialist: sentence-transformers' own training with MultipleNegativesRankingLoss."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Else the library writes every text as a user turn of the chat template, with a system turn: twice the tokens.
PLAIN_TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


def fine_tune(
    folder: Path,
    requests: Sequence[str],
    answers: Sequence[str],
    *,
    tokens: float,
    pooling: str,
    seed: int,
    training: Mapping[str, Any],
    model_options: Mapping[str, Any],
    output_dir: Path,
) -> tuple[Any, dict[str, Any]]:
    """(SentenceTransformer, cost). Pairs of request and answer; the other answers of a batch are the negatives.

    The temperature and the direction are the library's defaults (scale 20, requests search answers).

    Args:
        tokens: how many the run may cost, padding not counted; it takes as many whole steps.
        pooling: "lasttoken" or "mean".
        training: training arguments, those of the other arms.
    """
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.sentence_transformer.training_args import (
        BatchSamplers,
        SentenceTransformerTrainingArguments,
    )

    encoder = _encoder(folder, model_options)
    tokenizer = encoder.tokenizer
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), pooling_mode=pooling)])
    a_pair = tokens_of_pairs(tokenizer, requests, answers)
    batch = training["per_device_train_batch_size"]
    steps = max(1, round(tokens / (a_pair * batch)))
    args = SentenceTransformerTrainingArguments(
        str(output_dir),
        max_steps=steps,
        seed=seed,
        batch_sampler=BatchSamplers.NO_DUPLICATES,  # an equal answer is no negative
        save_strategy="no",
        report_to="none",
        logging_steps=max(1, steps // 10),
        disable_tqdm=True,
        dataloader_drop_last=True,
        use_cpu=not torch.cuda.is_available(),
        **training,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"request": list(requests), "answer": list(answers)}),
        loss=MultipleNegativesRankingLoss(model),
    )
    started = time.process_time()
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return model, {
        "steps": steps,
        "tokens": round(a_pair * batch * steps),
        "process_seconds": round(time.process_time() - started, 1),
        "log": [{name: entry[name] for name in ("step", "loss")} for entry in log],
    }


def _encoder(folder: Path, model_options: Mapping[str, Any]) -> Any:
    from sentence_transformers.sentence_transformer.modules import Transformer

    return Transformer(
        str(folder),
        model_kwargs={"dtype": torch.float32, **model_options},
        modality_config=PLAIN_TEXT,
        module_output_name="token_embeddings",
    )


def tokens_of_pairs(tokenizer: PreTrainedTokenizerBase, requests: Sequence[str], answers: Sequence[str]) -> float:
    """The mean number of tokens in a pair of a request and its answer."""
    total = sum(len(ids) for texts in (requests, answers) for ids in tokenizer(list(texts))["input_ids"])
    return total / len(requests)


def put_into(language_model: PreTrainedModel, specialist: Any) -> None:
    """Give a causal LM the weights of the specialist's encoder; its head is tied to the embedding or stays."""
    language_model.base_model.load_state_dict(specialist[0].model.state_dict(), strict=True)


def mean_of_states(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A SentenceTransformer of the same weights: the mean over the last states of a bare text. Nothing is trained."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    with tempfile.TemporaryDirectory() as folder:
        language_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        encoder = _encoder(Path(folder), {"attn_implementation": language_model.config._attn_implementation})
    return SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")])


def encode(specialist: Any, texts: Sequence[str]) -> Tensor:
    """[N, D] float32"""
    vectors: Tensor = specialist.encode(list(texts), batch_size=64, convert_to_tensor=True, show_progress_bar=False)
    return vectors.float().cpu()
