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
    """It is the quantiser: gptqmodel's, or one like it.

    Attributes:
        scale, zero: [rows, 1] of the last `find_params`; the zero point is an integer.
    """

    scale: Tensor
    zero: Tensor

    def find_params(self, x: Tensor, weight: bool = False) -> None:
        """Choose scales and zero points for a group of columns [rows, group]; zeros don't count."""

    def quantize(self, x: Tensor) -> Tensor:
        """Round columns [rows, columns] to the grid's nearest values."""


class Sweep(NamedTuple):
    """This is what became of a matrix [rows, cols].

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
    # Columns of `work` to the right of the current one hold the compensation of all errors so far: [rows, cols].
    work, diagonal = weight.clone(), factor.diagonal()
    quantised, kept = torch.zeros_like(work), torch.zeros_like(work, dtype=torch.bool)
    scales, zeros, loss = [], [], 0.0
    block = max(1, BLOCK // of) * of  # no group of the pattern is cut in two: its choice sees all of its columns
    for group in range(0, cols, size):
        within = slice(group, group + size)
        provisional = choose(work[:, within], diagonal[within], keep, of)  # [rows, size]
        grid.find_params(work[:, within] * provisional, weight=True)
        scales.append(grid.scale)  # [rows, 1]
        zeros.append(grid.zero)
        # Algorithm 1 of SparseGPT, the loop over blocks of B columns, which begins anew with each group of a scale.
        for start in range(group, group + size, block):
            here = slice(start, min(start + block, group + size))
            quantised[:, here], kept[:, here], errors = _block(work[:, here], factor[here, here], keep, of, grid)
            # Its lazy update, W_:,(i+B): -= E H^-1_i:(i+B),(i+B):, with H^-1 standing for the Cholesky factor there.
            work[:, here.stop :] -= errors @ factor[here, here.stop :]
            # OBS (Hassibi and Stork, 1993): a change of w_j by d costs d^2 / (2 [H^-1]_jj).
            loss += float(errors.square().sum()) / 2
    return Sweep(quantised, kept, torch.cat(scales, dim=1), torch.cat(zeros, dim=1), loss)


def choose(weight: Tensor, diagonal: Tensor, keep: int, of: int) -> Tensor:
    """Choose of every `of` consecutive columns the `keep` with the largest w^2 / diagonal^2: bool [rows, cols].

    Args:
        weight: [rows, cols].
        diagonal: of the Cholesky factor of the inverse Hessian, [cols].
    """
    # The squares of Algorithm 1's criterion, w_c^2 / [H^-1]_cc^2 of the factor, are left out: they change no order.
    return n_m.largest((weight / diagonal).abs(), keep, of)


def _block(work: Tensor, factor: Tensor, keep: int, of: int, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Go through columns of one scale group from left to right, each compensated for those before it.

    Returns:
        Quantised, kept, and errors, each over its [H^-1]_jj^(1/2): [rows, columns] each.
    """
    work, diagonal = work.clone(), factor.diagonal()
    quantised, errors = torch.zeros_like(work), torch.zeros_like(work)
    kept = torch.zeros_like(work, dtype=torch.bool)
    for i in range(work.shape[1]):
        if i % of == 0:  # the mask is chosen late: adaptive mask selection, with B_s = of
            kept[:, i : i + of] = choose(work[:, i : i + of], diagonal[i : i + of], keep, of)
        # Joint sparsification and quantisation: the error is w where pruned, and w - quant(w) where kept.
        quantised[:, i] = grid.quantize(work[:, i : i + 1])[:, 0] * kept[:, i]
        errors[:, i] = (work[:, i] - quantised[:, i]) / diagonal[i]  # [rows]
        # Row i of the factor is row i of the inverse Hessian of columns i on, over [H^-1]_ii^(1/2): the OBS update.
        work[:, i:] -= errors[:, i : i + 1] * factor[i, i:]
    return quantised, kept, errors
