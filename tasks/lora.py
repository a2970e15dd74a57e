"""Recover what pruning lost: train LoRA adapters on the train corpus, merge them, keep every pruned weight at zero.

The mathematics is in tasks.algorithms.masked_lora. The corpus is tokenised as for perplexity (documents joined by
newlines, no special tokens); the teacher of the distillation is the fetched model. It trains in fp32, on a GPU where
there is one, and writes the weights in the data type that the pruned model came in. CPU and GPU round differently: the
bytes repeat on each of them, not across them. It does not choose what to prune, and does not quantise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from tasks import checkpoint, corpora
from tasks.algorithms import families, masked_lora, perplexity
from tasks.algorithms.errors import InputError

if TYPE_CHECKING:
    from tasks.params import Lora
    from tasks.stage import Stage


def run(stage: Stage) -> None:
    """Write lora/model (merged, dense checkpoint) and lora/history.csv (one row per step; empty cell: not computed)."""
    params = stage.params.lora
    source = stage.input("wanda/model")
    config = checkpoint.config(source)
    _check_length(params.length, config.get("max_position_embeddings"))
    tokenizer = checkpoint.load_tokenizer(source)
    tokens = perplexity.tokenise(tokenizer, corpora.read(stage.input("fetch/corpora") / "train.jsonl"))
    keep, _ = checkpoint.load_masks(stage.input("wanda/masks.safetensors"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = checkpoint.load_dense(source).to(device)
    teacher = None
    if params.distillation.weight > 0:
        teacher = checkpoint.load_dense(stage.input("fetch/model")).to(device)
    adapted = masked_lora.attach(
        model,
        masked_lora.select(families.block_linears(model), params.targets),
        keep,
        rank=params.rank,
        alpha=params.alpha,
        dropout=params.dropout,
        seed=params.seed,
    )
    with stage.progress("lora", params.steps) as bar:
        history = masked_lora.train(
            adapted,
            tokens,
            _recipe(params),
            teacher=teacher,
            report=lambda step, loss: bar.update(step, loss=loss),
        )
    merged = masked_lora.merge(adapted, keep).cpu().to(_dtype(config))
    checkpoint.save_dense(merged, tokenizer, stage.output("lora/model"))
    _write(history, stage.output("history.csv"))


def skip(stage: Stage) -> None:
    """Pass the pruned model on; a history without rows."""
    stage.pass_on(stage.input("wanda/model"), stage.output("lora/model"))
    _write([], stage.output("history.csv"))


def _recipe(params: Lora) -> masked_lora.Recipe:
    return masked_lora.Recipe(
        steps=params.steps,
        batch=params.batch,
        length=params.length,
        learning_rate=params.learning_rate,
        warmup=params.warmup,
        distillation=params.distillation.weight,
        temperature=params.distillation.temperature,
        seed=params.seed,
    )


def _check_length(length: int, context: int | None) -> None:
    if context is not None and length > context:
        raise InputError(f"lora.length = {length} is above the model's context of {context} tokens; lower it")


def _dtype(config: dict) -> torch.dtype:
    """The checkpoint's data type; transformers before version 5 wrote it as `torch_dtype`."""
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def _write(history: list[dict[str, float]], path: Path) -> None:
    table = pd.DataFrame(history, columns=list(masked_lora.COLUMNS))
    table.to_csv(path, index=False, lineterminator="\n", float_format="%.9g")
