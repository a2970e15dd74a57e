"""SparseGPT's joint sweep: the N:M mask is chosen column group by column group while GPTQ quantises.

"SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (Frantar & Alistarh, arXiv 2301.00774, its
N:M masks and its joint sparsification and quantisation). At every `of`-th column the weights of the next `of` columns,
which hold the compensation of all columns before, are ranked by w^2 / [H^-1]_jj, H being the Hessian of the columns
from j on; the `keep` largest stay. A pruned weight becomes 0, a kept one a value of the grid; either error moves on.

A scale comes from the weights that a choice made at its group's first column would keep: the final choice is not known
yet, and differs from it little. Columns are visited in their own order, because the pattern counts consecutive inputs.
It computes no Hessian and writes no file; `tasks.algorithms.quantisation.masked_gptq` calls it in the place of
gptqmodel's loop.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.algorithms.pruning import n_m

BLOCK = 128
"""Columns that compensate each other one by one, before all later ones do at once; no effect beyond rounding."""


class Grid(Protocol):
    """The quantiser: gptqmodel's, or one like it.

    Attributes:
        scale, zero: [rows, 1] of the last `find_params`; the zero point is an integer.
    """

    scale: Tensor
    zero: Tensor

    def find_params(self, x: Tensor, weight: bool = False) -> None:
        """Choose scales and zero points for a group of columns [rows, group]; zeros don't count."""

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest values of the grid for columns [rows, columns]."""


class Sweep(NamedTuple):
    """What became of a matrix [rows, cols].

    Attributes:
        quantised: [rows, cols], exactly 0 where pruned.
        keep: bool [rows, cols], True where kept.
        scales, zeros: [rows, groups].
        loss: sum of squared errors over 2 [H^-1]_jj: the increase of the squared output error, as GPTQ estimates it.
    """

    quantised: Tensor
    keep: Tensor
    scales: Tensor
    zeros: Tensor
    loss: float


def sweep(weight: Tensor, factor: Tensor, keep: int, of: int, group_size: int, grid: Grid) -> Sweep:
    """Prune and quantise a matrix.

    Args:
        weight: [rows, cols].
        factor: upper Cholesky factor U [cols, cols] of the inverse Hessian, H^-1 = U^T U; the squared diagonal is
            [H^-1]_jj of the columns from j on.
        keep, of: weights that stay of every `of` consecutive columns.
        group_size: columns that share a scale; -1 is the whole row.
        grid: scales and rounding.

    Raises:
        InputError: cols or group_size isn't divisible by `of`.
    """
    rows, cols = weight.shape
    size = cols if group_size == -1 else group_size
    if size % of:
        raise InputError(
            f"{size} inputs share a scale (gptq.group_size = {group_size}) and can't be cut into groups of"
            f" gptq.joint.of = {of}: choose a group size that {of} divides"
        )
    work, diagonal = weight.clone(), factor.diagonal()
    quantised, kept = torch.zeros_like(work), torch.zeros_like(work, dtype=torch.bool)
    scales, zeros, loss = [], [], 0.0
    for group in range(0, cols, size):
        within = slice(group, group + size)
        provisional = choose(work[:, within], diagonal[within], keep, of)
        grid.find_params(work[:, within] * provisional, weight=True)
        scales.append(grid.scale)
        zeros.append(grid.zero)
        for start in range(group, group + size, max(1, BLOCK // of) * of):
            here = slice(start, min(start + max(1, BLOCK // of) * of, group + size))
            quantised[:, here], kept[:, here], errors = _block(work[:, here], factor[here, here], keep, of, grid)
            work[:, here.stop :] -= errors @ factor[here, here.stop :]
            loss += float(errors.square().sum()) / 2
    return Sweep(quantised, kept, torch.cat(scales, dim=1), torch.cat(zeros, dim=1), loss)


def choose(weight: Tensor, diagonal: Tensor, keep: int, of: int) -> Tensor:
    """bool [rows, cols]: of every `of` consecutive columns the `keep` with the largest w^2 / diagonal^2.

    Args:
        weight: [rows, cols].
        diagonal: of the Cholesky factor of the inverse Hessian, [cols].
    """
    return n_m.largest((weight / diagonal).abs(), keep, of)


def _block(work: Tensor, factor: Tensor, keep: int, of: int, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of one scale group from left to right: quantised, kept, errors (each over its [H^-1]_jj^(1/2))."""
    work, diagonal = work.clone(), factor.diagonal()
    quantised, errors = torch.zeros_like(work), torch.zeros_like(work)
    kept = torch.zeros_like(work, dtype=torch.bool)
    for i in range(work.shape[1]):
        if i % of == 0:
            kept[:, i : i + of] = choose(work[:, i : i + of], diagonal[i : i + of], keep, of)
        quantised[:, i] = grid.quantize(work[:, i : i + 1])[:, 0] * kept[:, i]
        errors[:, i] = (work[:, i] - quantised[:, i]) / diagonal[i]
        work[:, i:] -= errors[:, i : i + 1] * factor[i, i:]
    return quantised, kept, errors
