"""Stage calibrate: the token windows that later stages measure activations on, and each linear's input norms on them.

Windows are cut from the calibration text by the joined protocol (`tasks.algorithms.scoring.perplexity`), never overlap,
and are a seeded choice without replacement. The norms are the fetched model's; stages that prune or quantise measure
their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, layers, matrices
from tasks.algorithms.scoring import perplexity
from tasks.models import dense_folder, streamed_folder, tensor_files
from tasks.sources import json_lines

if TYPE_CHECKING:
    from tasks.runtime.progress import Progress
    from tasks.runtime.stage import Stage

BATCH = 4
"""Windows per forward pass: no effect on the result beyond rounding, and no parameter."""


def run(stage: Stage) -> None:
    """Write the windows, int32 [windows, length], and per linear its inputs' sums of squares, fp32 [in_features].

    Raises:
        InputError: the calibration text has fewer windows than asked.
    """
    params = stage.params.calibrate
    model = streamed_folder.open_dense(stage.model_in, stage.params.device)
    tokenizer = dense_folder.load_tokenizer(stage.model_in)
    tokens = perplexity.tokenise(tokenizer, json_lines.documents(stage.input("fetch/corpora") / "calibration.jsonl"))
    input_ids = choose(tokens, params.windows, params.length, params.seed)
    available = len(tokens) // params.length
    print(f"{len(tokens)} calibration tokens: {params.windows} of {available} windows of {params.length} tokens chosen")
    with stage.progress("calibrate", len(families.blocks(model))) as progress:
        statistics = _statistics(model, input_ids, progress)
    tensor_files.save_tensors(stage.output("windows.safetensors"), {"input_ids": input_ids.to(torch.int32)}, {})
    tensor_files.save_tensors(
        stage.output("norms.safetensors"),
        {f"{name}.sum_of_squares": each.sum_of_squares.float().cpu() for name, each in statistics.items()},
        {"tokens": str(input_ids.numel())},
    )
    for name in list(statistics)[:: max(1, len(statistics) - 1)]:
        norm = statistics[name].norm
        print(f"{name}: input norms {norm.min():.4g} to {norm.max():.4g} over {statistics[name].tokens} tokens")
    print(f"norms of {len(statistics)} linears")


def skip(stage: Stage) -> None:
    """No windows and no norms."""
    empty = torch.zeros(0, stage.params.calibrate.length, dtype=torch.int32)
    tensor_files.save_tensors(stage.output("windows.safetensors"), {"input_ids": empty}, {})
    tensor_files.save_tensors(stage.output("norms.safetensors"), {}, {"tokens": "0"})


def choose(tokens: Tensor, windows: int, length: int, seed: int) -> Tensor:
    """A seeded choice of non-overlapping windows, int64 [windows, length], in random order.

    Raises:
        InputError: the text [tokens] has fewer windows than asked.
    """
    available = len(tokens) // length
    if available < windows:
        raise InputError(
            f"the calibration text has {len(tokens)} tokens, {windows} windows of {length} need {windows * length}: "
            "give a longer text, or lower calibrate.windows or calibrate.length"
        )
    every = perplexity.windows(tokens, length, length)
    return every[torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:windows]]


def _statistics(model: nn.Module, input_ids: Tensor, progress: Progress) -> dict[str, layers.InputStatistics]:
    by_block = matrices.by_block(model)
    statistics: dict[str, layers.InputStatistics] = {}

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        statistics.update(layers.input_statistics(by_block[index], block, inputs, carry=True))
        progress.update(index + 1)

    layers.walk(model, input_ids, visit, BATCH)
    return statistics
