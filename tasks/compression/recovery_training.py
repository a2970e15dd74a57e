"""The recovery training that the stages lora and baseline_lora share: between their folders and the algorithms.

The corpus is tokenised as for perplexity (documents joined by newlines, no special tokens); the teacher is the fetched
model. It trains in fp32, on the device of the parameters, and gives the weights in the data type of the source. It does
not choose what to prune, and does not quantise.
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
from tasks.algorithms.model import checkpoints, families, matrices
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.recovery import masked_lora, reconstruction
from tasks.algorithms.scoring import perplexity
from tasks.models import dense_folder
from tasks.parameters import rules
from tasks.runtime import files
from tasks.sources import json_lines

if TYPE_CHECKING:
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
    """The model after recovery, on the CPU in its source's data type, and the training's history."""

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
    params = rules.settle(stage.params.lora, shape_of_config(config), stage.params.device)
    _check(params, config)
    tokenizer = dense_folder.load_tokenizer(source)
    tokens = _tokens(stage, tokenizer)
    device = stage.params.device
    model, teacher = dense_folder.load_dense(source).to(device), None
    if _needs_teacher(params):
        teacher = dense_folder.load_dense(stage.input("vocabulary/model")).to(device)
        _check_teacher(model, teacher, kept)
    blocks = len(families.blocks(model))
    steps = params.steps * (blocks if params.method == "block_reconstruction" else 1)
    with stage.progress("recovery", steps) as bar:

        def report(step: int, loss: float) -> None:
            bar.update(step, loss=loss)

        if params.method == "block_reconstruction":
            history = _reconstruct(params, model, teacher, tokens, keep, kept, report, stage.journal)
        else:
            shared = _shared_targets(stage, tokenizer)
            model, history = _adapt(params, model, teacher, tokens, keep, kept, report, stage.journal, *shared)
    return Recovered(model.cpu().to(_dtype(config)), history)


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
    dense_folder.save_dense(recovered.model, dense_folder.load_tokenizer(source), model)
    write_history(recovered.history, history)


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write one row per step; an empty cell was not computed."""
    files.write_csv(path, pd.DataFrame(history, columns=list(masked_lora.COLUMNS)), "%.9g")


def _adapt(
    params: Lora,
    model: nn.Module,
    teacher: nn.Module | None,
    tokens: Tensor,
    keep: Mapping[str, Tensor],
    kept: Sequence[int],
    report: reconstruction.Report,
    saved: checkpoints.Saved,
    shared: checkpoints.Saved,
    turn: int,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Methods masked and remasked: train adapters, merge."""
    _check_zeros(model, keep)
    adapted = masked_lora.attach(
        model,
        masked_lora.select(model, params.targets),
        keep if params.method == "masked" else {},
        rank=params.rank,
        alpha=params.alpha,
        dropout=params.dropout,
        seed=params.seed,
    )
    if params.start == "eora" and saved.load(masked_lora.STATE) is None:
        _start(params, adapted, teacher, tokens, kept)
    distils = params.distillation.weight > 0 or params.distillation.hidden > 0
    history = masked_lora.train(
        adapted,
        tokens,
        _recipe(params),
        teacher=teacher if distils else None,
        kept=kept,
        report=report,
        saved=saved,
        shared=shared,
        turn=turn,
    )
    if params.method == "masked":
        return masked_lora.merge(adapted, keep), history
    merged = masked_lora.merge(adapted, {})
    masked_lora.apply_masks(merged, keep)
    return merged, history


def _start(params: Lora, adapted: nn.Module, teacher: nn.Module, tokens: Tensor, kept: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(params.seed)
    windows = masked_lora.sample(tokens, EORA_WINDOWS, params.length, generator)
    by_block = matrices.by_block(teacher)
    wanted = {
        name: matrix.weight
        for names, index in zip(by_block, kept, strict=False)
        for name, matrix in zip(names, by_block[index].values(), strict=True)
    }
    masked_lora.start_from_eora(adapted, wanted, windows.to(teacher.device), params.batch)


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
        hidden=params.distillation.hidden,
    )


def _needs_teacher(params: Lora) -> bool:
    distils = params.distillation.weight > 0 or params.distillation.hidden > 0
    return distils or params.start == "eora" or params.method == "block_reconstruction"


def _check(params: Lora, config: Mapping) -> None:
    context = config.get("max_position_embeddings")
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


def _dtype(config: Mapping) -> torch.dtype:
    """The checkpoint's data type; transformers before version 5 wrote it as `torch_dtype`."""
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
