"""Quantisation-aware distillation of a quantised folder, which package and plain model go through alike.

Between gptqmodel's folders and `tasks.algorithms.recovery.qad`: codes, scales, masks and adapter are read as they will
be packed, the weights before quantisation say where in its cell each code begins, the teacher is the fetched model, the
text is the recovery's corpus at other places. What is written differs in codes alone, and in none where the trained
ones predict a text worse that they were not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.algorithms.model import checkpoints, families, layers
from tasks.algorithms.model.shape import shape_of_config, shape_of_model
from tasks.algorithms.quantisation.codes import Codes
from tasks.algorithms.recovery import qad, training
from tasks.algorithms.scoring import perplexity
from tasks.compression import training_inputs
from tasks.models import dense_folder, gptq_tensors, streamed_folder
from tasks.packed import source_folder
from tasks.parameters import needs, rules
from tasks.sources import json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.packed.stored_model import Linear
    from tasks.runtime.stage import Stage


HELD_OUT = 16
"""Windows of the calibration text on which the model is judged before and after."""


class Distilled(NamedTuple):
    """The training's history, and the share of the codes that are others now; 0 where they stay as they were."""

    history: list[dict[str, float]]
    moved: float


def distil(
    stage: Stage,
    source: Path,
    folder: Path,
    dense: Path,
    kept: Sequence[int],
    masks: Path | None = None,
    saved: checkpoints.Saved = checkpoints.NOTHING,
) -> Distilled:
    """Train the codes of `source` by the parameters of `qad`, and write them to `folder`.

    Args:
        stage: with params.qad, and as inputs vocabulary/model (the teacher) and fetch/corpora.
        source: a gptqmodel checkpoint, with or without an adapter.
        folder: to be written.
        dense: the folder that was quantised.
        kept: of each of the model's blocks, its index in the teacher.
        masks: masks.safetensors; None: nothing is pruned.
        saved: what it holds of an interrupted training is taken up.

    Raises:
        InputError: models, masks or corpus don't fit each other, or the training diverges.
    """
    config = dense_folder.config(source)
    shape = shape_of_config(config)
    params = rules.settle(stage.params.qad, shape, stage.params.device)
    training_inputs.check_length("qad", params.length, shape.context)
    tokenizer = dense_folder.load_tokenizer(source)
    tokens = training_inputs.tokens(stage, tokenizer)
    held_out = _held_out(stage, tokenizer, params.length)
    model, teacher = _opened(source, masks, dense, stage.params.device), None
    if params.distillation.weight > 0 or params.distillation.hidden > 0:
        teacher = training_inputs.teacher(stage.input("vocabulary/model"), model, kept)
    before = _nats(model, held_out, params.batch)
    free = training_inputs.free_memory(model.device)
    with stage.progress("qad", params.steps) as bar:
        history = training.train(
            qad.trainable(model),
            tokens,
            training_inputs.recipe(params),
            teacher=teacher,
            kept=kept,
            report=lambda step, loss: bar.update(step, loss=loss),
            saved=saved,
            checkpointing=needs.qad(params, shape_of_model(model), free).checkpointing,
        )
    after = _nats(model, held_out, params.batch)
    better, total, moved = after < before, 0, 0
    said = f"{before:.4f} -> {after:.4f} nats per token of {len(held_out)} windows that it wasn't trained on"
    remedy = ": the codes stay as they were; lower qad.learning_rate, give it more steps, or switch qad off"
    print(f"{'' if better else 'warning: '}{said}{'' if better else remedy}")
    with gptq_tensors.recoding(source, folder) as write:
        for name, grid in qad.grids(model).items():
            codes = grid.codes() if better else grid.start.codes
            write(name, codes)
            total += codes.numel()
            moved += int((codes != grid.start.codes.to(codes.device)).sum())
    return Distilled(history, moved / total)


def _held_out(stage: Stage, tokenizer: Any, length: int) -> Tensor:
    text = json_lines.documents(stage.input("fetch/corpora") / "calibration.jsonl")
    return perplexity.windows(perplexity.tokenise(tokenizer, text), length, length, HELD_OUT)


def _nats(model: nn.Module, windows: Tensor, batch: int) -> float:
    return float(perplexity.token_nll(model, windows, batch).mean())


def _opened(source: Path, masks: Path | None, dense: Path, device: str) -> PreTrainedModel:
    """The model with trainable codes in its blocks; what is outside of them stays in the type of its file."""
    model = streamed_folder.open_dense(source, device, gptq_tensors.Dequantised(source), stored=True)
    blocks, stored = families.blocks(model), source_folder.read(source, masks).blocks
    before = streamed_folder.Weights(dense, range(len(blocks)))
    for block, linears in zip(blocks, stored, strict=True):
        getattr(block, layers.STORED).load(block, torch.float32)
        for name, linear in linears.items():
            place = model.get_submodule(name)
            grid = _grid(linear, before[name], getattr(place, "bias", None)).to(device)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, grid)
    return model


def _grid(linear: Linear, weight: Tensor, bias: nn.Parameter | None) -> qad.GridLinear:
    start = Codes(linear.codes, linear.scales, linear.zeros, linear.bits, linear.group_size, linear.group_index)
    branch = None if linear.adapter is None else tuple(side.float() for side in linear.adapter)
    return qad.GridLinear(start, weight, linear.keep, None if bias is None else bias.detach(), branch)
