"""The recovery training that the stages lora and baseline_lora share: between their folders and the algorithms.

The corpus is tokenised as for perplexity (documents joined by newlines, no special tokens), the teacher is the fetched
model. It computes in fp32, on the device of the parameters; weights stay in the types that they are stored in. A
teacher above `streaming.WHOLE` stays on the disk, and what it has in common with the student is held once. It does not
choose what to prune, and does not quantise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families, stored_type, streaming
from tasks.algorithms.model.shape import shape_of_config, shape_of_model
from tasks.algorithms.recovery import masked_lora, reconstruction, training
from tasks.algorithms.scoring import perplexity
from tasks.models import dense_folder, streamed_folder
from tasks.parameters import needs, rules
from tasks.runtime import files
from tasks.sources import json_lines

if TYPE_CHECKING:
    from peft import LoraModel
    from transformers import PreTrainedModel

    from tasks.parameters.schema import Lora
    from tasks.runtime.stage import Stage

STAGES = ("lora", "baseline_lora")
"""They train on the same windows with the same teacher."""
CODE = "compression/recovery_training"
"""The module whose code what they share depends on."""
EORA_WINDOWS = 64
"""Windows of lora.length tokens, from the train corpus, on which lora.start = eora measures inputs."""


class Recovered(NamedTuple):
    """The model after recovery, each weight in the type that it had in its source, and the training's history."""

    model: PreTrainedModel
    history: list[dict[str, float]]


def recover(stage: Stage, source: Path, keep: Mapping[str, Tensor], kept: Sequence[int]) -> Recovered:
    """Train the model in `source` by the parameters of `lora`, and merge.

    Args:
        stage: with params.lora, and as inputs vocabulary/model (the teacher) and fetch/corpora.
        source: the model's folder.
        keep: full module name -> bool [out, in], True where kept; empty: nothing is pruned, all methods train densely.
        kept: of each of the model's blocks, its index in the teacher.

    Raises:
        InputError: parameters, model, masks, teacher or corpus don't fit each other, or the training diverges.
    """
    config = dense_folder.config(source)
    shape = shape_of_config(config)
    params = rules.settle(stage.params.lora, shape, stage.params.device)
    _check(params, shape.context)
    tokenizer = dense_folder.load_tokenizer(source)
    tokens = _tokens(stage, tokenizer)
    model, teacher = streamed_folder.load_stored(source, stage.params.device), None
    if _needs_teacher(params):
        teacher = _teacher(stage.input("vocabulary/model"), model, kept)
    blocks = len(families.blocks(model))
    steps = params.steps * (blocks if params.method == "block_reconstruction" else 1)
    with stage.progress("recovery", steps) as bar:

        def report(step: int, loss: float) -> None:
            bar.update(step, loss=loss)

        if params.method == "block_reconstruction":
            history = _reconstruct(params, model, teacher, tokens, keep, kept, report, stage.journal)
        else:
            adapted = _attach(params, model, keep)
            if params.start == "eora" and stage.journal.load(training.STATE) is None:
                _start(params, stage.input("vocabulary/model"), adapted, tokens, kept)
            shared, turn = _shared_targets(stage, tokenizer)
            history = training.train(
                adapted,
                tokens,
                _recipe(params),
                teacher=teacher,
                kept=kept,
                report=report,
                saved=stage.journal,
                shared=shared,
                turn=turn,
                checkpointing=_checkpointing(params, model, bool(keep)),
            )
            model = _merge(params, adapted, keep)
    return Recovered(model, history)


def _tokens(stage: Stage, tokenizer: Any) -> Tensor:
    """The training corpus, int32 [tokens]; the two recoveries tokenise it once."""
    corpora = stage.input("fetch/corpora")

    def compute() -> dict[str, Tensor]:
        return {"ids": perplexity.tokenise(tokenizer, json_lines.documents(corpora / "train.jsonl"))}

    shelf = _shelf(stage, "tokens", [corpora], tokenizer)
    return (compute() if shelf is checkpoints.NOTHING else shelf.once("train", compute))["ids"]


def _shared_targets(stage: Stage, tokenizer: Any) -> tuple[checkpoints.Saved, int]:
    """Where the two recoveries leave the targets of their windows, which are the same, and whose turn this one has."""
    params = stage.params.lora
    inputs = [stage.input("fetch/corpora"), stage.input("vocabulary/model")]
    windows = [params.seed, params.batch, params.length]
    shelf = _shelf(stage, "targets", inputs, tokenizer, device=stage.params.device, windows=windows)
    return shelf, STAGES.index(stage.name)


def _shelf(stage: Stage, purpose: str, inputs: Sequence[Path], tokenizer: Any, **given: Any) -> Any:
    """For both recoveries, whose models have one tokenizer; nothing is shared of one that isn't a file of its own."""
    if not tokenizer.is_fast:
        return checkpoints.NOTHING
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    return stage.shelf(purpose, CODE, inputs, tokenizer=digest, **given)


def write(recovered: Recovered, source: Path, model: Path, history: Path) -> None:
    """Write the model with its source's tokenizer as a dense checkpoint, and the history."""
    tokenizer = dense_folder.load_tokenizer(source)
    with streamed_folder.writing(recovered.model, tokenizer, model) as writer:
        for index in range(len(families.blocks(recovered.model))):
            writer.block(index)
    write_history(recovered.history, history)


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write one row per step; an empty cell was not computed."""
    files.write_csv(path, pd.DataFrame(history, columns=list(training.COLUMNS)), "%.9g")


def _teacher(folder: Path, model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The model that is learnt from, on the student's device: whole, or with its blocks on the disk where it is large.

    Raises:
        InputError: it isn't the student's.
    """
    shape = shape_of_config(dense_folder.config(folder))
    if 4 * (shape.in_blocks + shape.outside) > streaming.WHOLE:
        teacher = streamed_folder.open_dense(folder, model.device, stored=True)
    else:
        teacher = dense_folder.load_dense(folder).to(model.device)
    _check_teacher(model, teacher, kept)
    stored_type.share(teacher, model)
    return teacher


def _checkpointing(params: Lora, model: nn.Module, masked: bool) -> bool:
    """Whether activations of all blocks are too many for the memory that is free; it changes no byte."""
    on_card = model.device.type == "cuda" and torch.cuda.is_available()
    free = torch.cuda.mem_get_info(model.device)[0] if on_card else needs.available_memory()
    return needs.recovery(params, shape_of_model(model), masked, free).checkpointing


def _attach(params: Lora, model: nn.Module, keep: Mapping[str, Tensor]) -> LoraModel:
    """Methods masked and remasked: the model with adapters."""
    _check_zeros(model, keep)
    return masked_lora.attach(
        model,
        masked_lora.select(model, params.targets),
        keep if params.method == "masked" else {},
        rank=params.rank,
        alpha=params.alpha,
        dropout=params.dropout,
        seed=params.seed,
    )


def _start(params: Lora, teacher: Path, adapted: LoraModel, tokens: Tensor, kept: Sequence[int]) -> None:
    from tasks.algorithms.recovery import eora_start  # here, as it imports gptqmodel

    generator = torch.Generator().manual_seed(params.seed)
    windows = training.sample(tokens, EORA_WINDOWS, params.length, generator)
    wanted = streamed_folder.Weights(teacher, kept)
    eora_start.start_from_eora(adapted, wanted, windows.to(adapted.model.device), params.batch)


def _merge(params: Lora, adapted: LoraModel, keep: Mapping[str, Tensor]) -> nn.Module:
    if params.method == "masked":
        return masked_lora.merge(adapted, keep)
    merged = masked_lora.merge(adapted, {})
    masked_lora.apply_masks(merged, keep)
    return merged


def _reconstruct(
    params: Lora,
    model: nn.Module,
    teacher: nn.Module,
    tokens: Tensor,
    keep: Mapping[str, Tensor],
    kept: Sequence[int],
    report: reconstruction.Report,
    saved: checkpoints.Saved,
) -> list[dict[str, float]]:
    _check_zeros(model, keep)
    targets = masked_lora.select(model, params.targets)
    recipe = _recipe(params)
    return reconstruction.reconstruct(
        model, teacher, tokens, recipe, targets=targets, keep=keep, kept=kept, report=report, saved=saved
    )


def _recipe(params: Lora) -> training.Recipe:
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


def _needs_teacher(params: Lora) -> bool:
    distils = params.distillation.weight > 0 or params.distillation.hidden > 0
    return distils or params.method == "block_reconstruction"


def _check(params: Lora, context: int | None) -> None:
    if context is not None and params.length > context:
        raise InputError(f"lora.length = {params.length} is above the model's context of {context} tokens; lower it")
    if params.start == "eora" and params.method == "block_reconstruction":
        raise InputError(
            "lora.start = eora is the start of an adapter, and lora.method = block_reconstruction has none: "
            "set lora.start to zeros"
        )


def _check_zeros(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    if broken := masked_lora.revived(model, keep):
        raise InputError(f"pruned weights of {min(broken)} are not zero; take model and masks from the same run")


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
