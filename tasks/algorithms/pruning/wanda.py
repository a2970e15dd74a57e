"""Prune the weights with the smallest |W| * ||X||_2, compared within each output row; nothing is retrained.

"A Simple and Effective Pruning Approach for Large Language Models" (Sun et al. 2023, arXiv 2306.11695). Block by block:
a block's input norms come from its dense forward, then all its linears are pruned, and the pruned block's outputs feed
the next one. Embedding and head stay dense. It does not update the weights that stay (that is SparseGPT).

Ties: of equal metrics the lower input index stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import layers, matrices
from tasks.algorithms.model.matrices import Matrix
from tasks.algorithms.pruning import n_m as patterns

# rows = out_features, cols = in_features


class Selection(NamedTuple):
    """This is what stays of a matrix.

    Attributes:
        keep: bool [rows, cols].
        alpha: the share of each row's metric that was pruned at most, where the method searches it.
    """

    keep: Tensor
    alpha: float | None = None


Select = Callable[[Tensor], Selection]
"""From a metric [rows, cols] to what stays."""
Pruned = Callable[[int, Mapping[str, Matrix], Mapping[str, Selection]], None]
"""(index of a block, its matrices, pruned, and what stayed of each), by full names in running order."""


def metric(weight: Tensor, norm: Tensor) -> Tensor:
    """Rate each weight by |W| * ||X||_2, float64 [rows, cols].

    Args:
        weight: [rows, cols].
        norm: of each input over the calibration tokens, [cols]; a common factor changes no mask.
    """
    return weight.detach().double().abs() * norm.double()  # eq. 1: S_ij = |W_ij| * ||X_j||_2


def n_m(values: Tensor, keep: int, of: int) -> Selection:
    """Select the `keep` largest of every `of` consecutive inputs.

    Args:
        values: metric [rows, cols].

    Raises:
        InputError: cols isn't divisible by `of`.
    """
    return Selection(patterns.largest(values, keep, of))


def unstructured(values: Tensor, sparsity: float) -> Selection:
    """Prune exactly cols * sparsity, rounded down, of each row's inputs: the smallest.

    Args:
        values: metric [rows, cols].
        sparsity: fraction of zeros in each row.
    """
    # The paper compares within an output (Algorithm 1 sorts dim 1), not within the matrix: each row loses as many.
    pruned = torch.full((len(values), 1), _asked(values.shape[1], sparsity), device=values.device)
    return Selection(_keep_largest(values, pruned))


def cumulative(values: Tensor, sparsity: float) -> Selection:
    """Prune each row's smallest metrics as long as their sum is at most alpha of the row's, with one alpha for all.

    Rows with a few dominant weights lose more than even ones. Alpha is bisected to the largest whose zeros in the whole
    matrix don't exceed `sparsity` (rounded down to weights); they can exceed it only where more metrics than asked are
    exactly 0.

    Args:
        values: metric [rows, cols].
        sparsity: fraction of zeros in the matrix.
    """
    # [rows, cols], ascending; summed on the CPU, as a GPU has no order of sums that repeats
    sums = values.sort(dim=1, stable=True).values.cpu().cumsum(dim=1).to(values.device)
    whole = sums[:, -1:]  # [rows, 1]
    # What pruning up to and with this place costs, as a share of the row's metric; in a row of zeros nothing.
    shares = sums / torch.where(whole > 0, whole, 1)
    wanted = _asked(values.numel(), sparsity)

    def pruned(alpha: float) -> Tensor:
        # [rows, 1]: how many sorted metrics have a share of at most alpha.
        return torch.searchsorted(shares, torch.full_like(whole, alpha), right=True)

    low, high = 0.0, 1.0
    for _ in range(60):  # halves the interval to below the spacing of doubles near 1
        middle = (low + high) / 2
        zeros = int(pruned(middle).sum())
        if zeros > wanted:
            high = middle
        else:
            low = middle
        if zeros == wanted:
            break
    return Selection(_keep_largest(values, pruned(low)), low)


def prune(model: nn.Module, input_ids: Tensor, select: Select, pruned: Pruned, batch: int = 1) -> None:
    """Prune all linears of all blocks in place.

    Args:
        model: of a supported family, in evaluation mode.
        input_ids: calibration windows [windows, length].
        select: what stays, from a metric.
        pruned: called after each block, while its weights are in memory.
        batch: windows per forward pass.

    Raises:
        InputError: a metric isn't finite, or a matrix doesn't suit the pattern.
    """
    by_block = matrices.by_block(model)

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        statistics = layers.input_statistics(by_block[index], block, inputs)
        selections = {}
        for name, matrix in by_block[index].items():
            selections[name] = _select(name, metric(matrix.weight, statistics[name].norm), select)
            # The block's other linears are rated by the same dense forward; the walk runs the block again afterwards.
            matrix.weight.masked_fill_(~selections[name].keep, 0)
        pruned(index, by_block[index], selections)

    layers.walk(model, input_ids, visit, batch)


def _select(name: str, values: Tensor, select: Select) -> Selection:
    if not values.isfinite().all():
        raise InputError(f"{name}: |W| * ||X|| is not finite; the model's weights or activations overflow or hold NaN")
    try:
        return select(values)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _asked(weights: int, sparsity: float) -> int:
    return int(weights * sparsity + 1e-6)  # 100 * 0.29 is 28.999999999999996 in doubles


def _keep_largest(values: Tensor, pruned: Tensor) -> Tensor:
    """Mask the `pruned` [rows, 1] smallest of each row out: bool [rows, cols], True where kept."""
    order = values.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(values.shape[1], device=values.device)
    stays = places < values.shape[1] - pruned  # [rows, cols]: of the sorted ones
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, stays)
