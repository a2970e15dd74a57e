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
GROUP = 16
"""Columns between two updates of the block's gradient, likewise; divides BLOCK."""


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
        group = int(self.index[column])
        scale, zero = self.scales[:, group].float(), self.zeros[:, group].float()
        return values.div(scale).add_(zero).round_().clamp_(0, 2**self.bits - 1).sub_(zero).mul_(scale)


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
    hessian, start = hessian.float(), quantised.float()
    # G = (W - Q) H is -1/2 of the error's gradient with respect to Q. It is kept up to date, not computed again.
    gradient = (weight.float() - start) @ hessian  # [out, in]
    # Column after column is read and written: as rows of their own, [in, out], each lies in one piece.
    current, keep = start.T.contiguous(), None if keep is None else keep.T.contiguous()
    grid = Grid(_columns(grid.scales), _columns(grid.zeros), grid.index.cpu(), grid.bits)
    for _ in range(cycles):
        before = current.clone()
        for first in range(0, len(current), BLOCK):
            columns = slice(first, min(first + BLOCK, len(current)))
            steps = _descend_block(current, gradient, hessian, grid, columns, keep)  # [block, out]
            # A step S of Q lowers G by S H; the columns of other blocks hear of it here, all at once.
            gradient -= steps.T.contiguous() @ hessian[columns]
        if torch.equal(current, before):
            break  # no single code can be bettered: all further cycles would repeat this one
    return current.T.contiguous()


def _columns(matrix: Tensor) -> Tensor:
    """The same matrix, float32, with each column in one piece of memory."""
    return matrix.float().T.contiguous().T


def _descend_block(
    current: Tensor, gradient: Tensor, hessian: Tensor, grid: Grid, columns: slice, keep: Tensor | None
) -> Tensor:
    """Set the columns of a block, one after the other, in `current` [in, out]; return by how much, [block, out]."""
    diagonal = hessian.diagonal()[columns].tolist()
    near, inside = gradient[:, columns].T.contiguous(), hessian[columns, columns]  # [block, out], [block, block]
    steps, moved = torch.zeros_like(near), torch.empty_like(near)
    for place, column in enumerate(range(columns.start, columns.stop)):
        # The error is a parabola in each q_ij, with its minimum at q_ij + G_ij / H_jj; the grid's nearest value is the
        # best one on the grid, because a parabola is symmetric.
        value = grid.nearest(near[place].div(diagonal[place]).add_(current[column]), column)  # [out]
        if keep is not None:
            value *= keep[column]
        torch.sub(value, current[column], out=steps[place])
        current[column] = value
        # G of the group's later columns, by the step's outer product; those before it are done for this cycle.
        end = place // GROUP * GROUP + GROUP
        later = slice(place + 1, end)
        near[later] -= torch.mul(inside[place, later, None], steps[place], out=moved[later])
        if place + 1 == end:  # and of the block's later columns, by the steps of the group
            near[end:] -= inside[end - GROUP : end, end:].T @ steps[end - GROUP : end]
    return steps
