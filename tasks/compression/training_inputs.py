"""What trainings of stages have in common: the corpus in tokens, the teacher, settings, and the history.

Recovery and quantisation-aware distillation take both from here, and stages that train on the same windows share what
they compute alike of them. What is trained is `recovery_training`'s and `qad_training`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families, stored_type, streaming
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.recovery import training
from tasks.algorithms.scoring import perplexity
from tasks.models import dense_folder, streamed_folder
from tasks.parameters import needs
from tasks.runtime import files
from tasks.sources import json_lines

if TYPE_CHECKING:
    from tasks.parameters.schema import Lora, Qad
    from tasks.runtime.stage import Stage

CODE = "compression/training_inputs"
"""The module whose code what is shared depends on."""


def tokens(stage: Stage, tokenizer: Any) -> Tensor:
    """The training corpus, int32 [tokens]; the stages that train tokenise it once."""
    corpora = stage.input("fetch/corpora")

    def compute() -> dict[str, Tensor]:
        return {"ids": perplexity.tokenise(tokenizer, json_lines.documents(corpora / "train.jsonl"))}

    kept = shelf(stage, "tokens", [corpora], tokenizer)
    return (compute() if kept is checkpoints.NOTHING else kept.once("train", compute))["ids"]


def shelf(stage: Stage, purpose: str, inputs: Sequence[Path], tokenizer: Any, **given: Any) -> Any:
    """For stages whose models have one tokenizer; nothing is shared of one that isn't a file of its own."""
    if not tokenizer.is_fast:
        return checkpoints.NOTHING
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return stage.shelf(purpose, CODE, inputs, tokenizer=digest, **given)


def teacher(folder: Path, model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The model that is learnt from, on the student's device: whole, or with its blocks on the disk where it is large.

    Raises:
        InputError: it isn't the student's.
    """
    shape = shape_of_config(dense_folder.config(folder))
    if 4 * (shape.in_blocks + shape.outside) > streaming.WHOLE:
        found = streamed_folder.open_dense(folder, model.device, stored=True)
    else:
        found = dense_folder.load_dense(folder).to(model.device)
    _check_teacher(model, found, kept)
    stored_type.share(found, model)
    return found


def recipe(params: Lora | Qad) -> training.Recipe:
    """The settings of a training."""
    return training.Recipe(
        steps=params.steps,
        batch=params.batch,
        length=params.length,
        learning_rate=params.learning_rate,
        warmup=params.warmup,
        distillation=params.distillation.weight,
        temperature=params.distillation.temperature,
        seed=params.seed,
        hidden=params.distillation.hidden,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a training on the device may still get."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[0]
    return needs.available_memory()


def check_length(section: str, length: int, context: int | None) -> None:
    """Refuse windows that are longer than the model's context.

    Raises:
        InputError: they are.
    """
    if context is not None and length > context:
        raise InputError(f"{section}.length = {length} is above the model's context of {context} tokens; lower it")


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write one row per step; an empty cell was not computed."""
    files.write_csv(path, pd.DataFrame(history, columns=list(training.COLUMNS)), "%.9g")


def _check_teacher(model: nn.Module, teacher: nn.Module, kept: Sequence[int]) -> None:
    blocks, theirs = len(families.blocks(model)), len(families.blocks(teacher))
    if len(kept) != blocks or max(kept) >= theirs:
        raise InputError(
            f"{len(kept)} of the teacher's {theirs} blocks were kept (the last: {max(kept)}), and the model has "
            f"{blocks}: run stage depth_prune again"
        )
    ours, wanted = model.config.vocab_size, teacher.config.vocab_size
    if ours != wanted:
        raise InputError(f"the model has {ours} tokens, its teacher {wanted}: run stage depth_prune again")
