"""The recovery training that the stages lora and baseline_lora share: between their folders and the algorithms.

The corpus is tokenised as for perplexity (documents joined by newlines, no special tokens), the teacher is the fetched
model. It computes in fp32, on the device of the parameters; weights stay in the types that they are stored in. A
teacher above `streaming.WHOLE` stays on the disk, and what it has in common with the student is held once. It does not
choose what to prune, and does not quantise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import checkpoints, families
from tasks.algorithms.model.shape import shape_of_config, shape_of_model
from tasks.algorithms.recovery import masked_lora, reconstruction, training
from tasks.compression import training_inputs
from tasks.models import dense_folder, streamed_folder
from tasks.parameters import needs, rules

if TYPE_CHECKING:
    from peft import LoraModel
    from transformers import PreTrainedModel

    from tasks.parameters.schema import Lora
    from tasks.runtime.stage import Stage

STAGES = ("lora", "baseline_lora")
"""They train on the same windows with the same teacher."""
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
    tokens = training_inputs.tokens(stage, tokenizer)
    model, teacher = streamed_folder.load_stored(source, stage.params.device), None
    if _needs_teacher(params):
        teacher = training_inputs.teacher(stage.input("vocabulary/model"), model, kept)
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
                training_inputs.recipe(params),
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


def _shared_targets(stage: Stage, tokenizer: Any) -> tuple[checkpoints.Saved, int]:
    """Where the two recoveries leave the targets of their windows, which are the same, and whose turn this one has."""
    params = stage.params.lora
    inputs = [stage.input("fetch/corpora"), stage.input("vocabulary/model")]
    windows = [params.seed, params.batch, params.length]
    shelf = training_inputs.shelf(stage, "targets", inputs, tokenizer, device=stage.params.device, windows=windows)
    return shelf, STAGES.index(stage.name)


def write(recovered: Recovered, source: Path, model: Path, history: Path) -> None:
    """Write the model with its source's tokenizer as a dense checkpoint, and the history."""
    tokenizer = dense_folder.load_tokenizer(source)
    with streamed_folder.writing(recovered.model, tokenizer, model) as writer:
        for index in range(len(families.blocks(recovered.model))):
            writer.block(index)
    training_inputs.write_history(recovered.history, history)


def _checkpointing(params: Lora, model: nn.Module, masked: bool) -> bool:
    """Whether activations of all blocks are too many for the memory that is free; it changes no byte."""
    free = training_inputs.free_memory(model.device)
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
    return reconstruction.reconstruct(
        model,
        teacher,
        tokens,
        training_inputs.recipe(params),
        targets=targets,
        keep=keep,
        kept=kept,
        report=report,
        saved=saved,
    )


def _needs_teacher(params: Lora) -> bool:
    distils = params.distillation.weight > 0 or params.distillation.hidden > 0
    return distils or params.method == "block_reconstruction"


def _check(params: Lora, context: int | None) -> None:
    training_inputs.check_length("lora", params.length, context)
    if params.start == "eora" and params.method == "block_reconstruction":
        raise InputError(
            "lora.start = eora is the start of an adapter, and lora.method = block_reconstruction has none: "
            "set lora.start to zeros"
        )


def _check_zeros(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    if broken := masked_lora.revived(model, keep):
        raise InputError(f"pruned weights of {min(broken)} are not zero; take model and masks from the same run")
