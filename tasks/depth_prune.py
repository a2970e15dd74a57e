"""Stage depth_prune: the model without its least important layers, as an ordinary smaller checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.algorithms.model import families
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.pruning import depth_prune, importance
from tasks.models import dense_folder, streamed_folder, tensor_files
from tasks.parameters import rules
from tasks.runtime import files

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.parameters.schema import DepthPrune
    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write the smaller model and removed.json; `remove: 0` passes the model on.

    Raises:
        InputError: fewer layers than `remove` are unprotected.
    """
    shape = shape_of_config(dense_folder.config(stage.model_in))
    params, layers = rules.settle(stage.params.depth_prune, shape, stage.params.device), shape.layers
    depth_prune.unprotected(layers, params.remove, params.protect_first, params.protect_last)
    if not params.remove:
        print("remove = 0: the model is passed on")
        return skip(stage)
    import pandas as pd
    import torch

    model = streamed_folder.open_dense(stage.model_in, stage.params.device)
    scores = torch.tensor(pd.read_csv(stage.input("scores.csv"))[stage.params.importance.method].to_numpy(dtype=float))
    removed = SCHEDULES[params.schedule](stage, params, model, scores)
    smaller = depth_prune.without(model, removed)
    tokenizer = dense_folder.load_tokenizer(stage.model_in)
    with streamed_folder.writing(smaller, tokenizer, stage.output("model")) as writer:
        writer.copy()
    _record(stage, layers, removed)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, smaller))
    print(f"removed layers {removed} of {layers} in this order, by {stage.params.importance.method}, {params.schedule}")
    print(f"their scores before the first removal: {[float(f'{scores[index]:.4g}') for index in removed]}")
    print(f"{layers - len(removed)} layers left, {after:,} of {before:,} parameters ({after / before:.1%})")


def skip(stage: Stage) -> None:
    """The model as it is, nothing removed."""
    stage.pass_on(stage.model_in, stage.output("model"))
    _record(stage, shape_of_config(dense_folder.config(stage.model_in)).layers, [])


def _one_shot(stage: Stage, params: DepthPrune, model: nn.Module, scores: Tensor) -> list[int]:
    return depth_prune.one_shot(scores, params.remove, params.protect_first, params.protect_last)


def _greedy(stage: Stage, params: DepthPrune, model: nn.Module, scores: Tensor) -> list[int]:
    scoring = stage.params.importance
    input_ids = tensor_files.load_tensors(stage.input("windows.safetensors"))["input_ids"][: scoring.windows].long()
    with stage.progress("depth_prune", params.remove) as progress:

        def rescore(smaller: nn.Module) -> Tensor:
            values = importance.score(smaller, input_ids, scoring.method)
            progress.update(len(scores) - len(families.blocks(smaller)))
            return values

        removed = depth_prune.greedy(model, scores, rescore, params.remove, params.protect_first, params.protect_last)
        progress.update(params.remove)
    return removed


SCHEDULES = {"one_shot": _one_shot, "greedy": _greedy}


def _record(stage: Stage, layers: int, removed: list[int]) -> None:
    record = {
        "removed": removed,
        "kept": [index for index in range(layers) if index not in removed],
        "method": stage.params.importance.method,
        "schedule": stage.params.depth_prune.schedule,
    }
    files.write_json(stage.output("removed.json"), record)
