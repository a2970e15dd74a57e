"""Coordinate descent on the codes of a quantised matrix, after GPTQ.

GPTQ fixes each column before it has seen the ones that follow. Going over the columns again, each set to the nearest
grid value of its best given all others, lowers the error of the output with every step and needs no new scales
(QuantEase, Behdin et al., arXiv 2309.01885). Pruned weights are no variables here: they stay zero and the kept ones
make up for all of their error, also those to the left. It finds no global minimum, and it changes neither scales nor
zero points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Columns between two updates of the whole gradient; no effect on the result beyond rounding."""


class Grid(NamedTuple):
    """These are the values that a quantised matrix can have: scale * (code - zero), by the group of the column.

    Attributes:
        scales, zeros: [out_features, groups].
        index: int [in_features], the group of each column.
        bits: of a code, 0 to 2 ** bits - 1.
    """

    scales: Tensor
    zeros: Tensor
    index: Tensor
    bits: int

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """Round values of a column to its grid, float32 [out_features]."""
        group = self.index[column].long()
        scale, zero = self.scales[:, group].float(), self.zeros[:, group].float()
        return scale * (torch.round(values / scale + zero).clamp(0, 2**self.bits - 1) - zero)


@torch.no_grad()
def descend(
    weight: Tensor, quantised: Tensor, hessian: Tensor, grid: Grid, cycles: int, keep: Tensor | None = None
) -> Tensor:
    """Lower tr((W - Q) H (W - Q)^T) over the codes of Q, column after column.

    Args:
        weight: W, [out_features, in_features].
        quantised: Q to start from, of the same shape, on the grid, 0 where pruned.
        hessian: H, symmetric, [in_features, in_features]; its diagonal above 0.
        cycles: passes over all columns.
        keep: bool [out_features, in_features]; None: all.

    Returns:
        float32 [out_features, in_features]; its error is at most that of `quantised`.
    """
    hessian, current = hessian.float(), quantised.float().clone()
    # G = (W - Q) H is -1/2 of the error's gradient with respect to Q. It is kept up to date, not computed again.
    gradient = (weight.float() - current) @ hessian  # [out, in]
    for _ in range(cycles):
        before = current.clone()
        for start in range(0, current.shape[1], BLOCK):
            columns = slice(start, min(start + BLOCK, current.shape[1]))
            steps = _descend_block(current, gradient, hessian, grid, columns, keep)  # [out, block]
            # A step S of Q lowers G by S H; the columns of other blocks hear of it here, all at once.
            gradient -= steps @ hessian[columns]
        if torch.equal(current, before):
            break  # no single code can be bettered: all further cycles would repeat this one
    return current


def _descend_block(
    current: Tensor, gradient: Tensor, hessian: Tensor, grid: Grid, columns: slice, keep: Tensor | None
) -> Tensor:
    """Set the columns of a block, one after the other, in `current`; return by how much, [out_features, block]."""
    diagonal = hessian.diagonal()
    near, steps = gradient[:, columns].clone(), torch.zeros_like(current[:, columns])
    for place, column in enumerate(range(columns.start, columns.stop)):
        # The error is a parabola in each q_ij, with its minimum at q_ij + G_ij / H_jj; the grid's nearest value is the
        # best one on the grid, because a parabola is symmetric.
        value = grid.nearest(current[:, column] + near[:, place] / diagonal[column], column)  # [out]
        if keep is not None:
            value = value * keep[:, column]
        steps[:, place] = value - current[:, column]
        near -= steps[:, place, None] * hessian[column, columns]  # G of this block, by the step's outer product
        current[:, column] = value
    return steps
