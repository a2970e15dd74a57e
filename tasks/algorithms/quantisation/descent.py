"""Coordinate descent on the codes of a quantised matrix, after GPTQ.

GPTQ fixes each column before it has seen the ones that follow. Going over the columns again, each set to the nearest
grid value of its best given all others, lowers the error of the output with every step and needs no new scales
(QuantEase, Behdin et al., arXiv 2309.01885). Pruned weights are no variables here: they stay zero and the kept ones
make up for all of their error, also those to the left. It finds no global minimum, and it changes neither scales nor
zero points.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Columns between two updates of the whole gradient; no effect on the result beyond rounding."""


@torch.no_grad()
def descend(
    weight: Tensor,
    quantised: Tensor,
    hessian: Tensor,
    scales: Tensor,
    zeros: Tensor,
    index: Tensor,
    bits: int,
    cycles: int,
    keep: Tensor | None = None,
) -> Tensor:
    """Lower tr((W - Q) H (W - Q)^T) over the codes of Q, column after column.

    Args:
        weight: W, [out_features, in_features].
        quantised: Q to start from, of the same shape, on the grid scale * (code - zero), 0 where pruned.
        hessian: H, symmetric, [in_features, in_features]; its diagonal above 0.
        scales, zeros: [out_features, groups].
        index: int [in_features], the group of each column.
        bits: of a code, 0 to 2 ** bits - 1.
        cycles: passes over all columns.
        keep: bool [out_features, in_features]; None: all.

    Returns:
        float32 [out_features, in_features]; its error is at most that of `quantised`.
    """
    hessian, found = hessian.float(), quantised.float().clone()
    groups, top = index.long(), 2**bits - 1
    gradient = (weight.float() - found) @ hessian  # [out, in]; of -1/2 the error
    diagonal = hessian.diagonal()
    for _ in range(cycles):
        before = found.clone()
        for start in range(0, found.shape[1], BLOCK):
            end = min(start + BLOCK, found.shape[1])
            near, steps = gradient[:, start:end].clone(), torch.zeros_like(found[:, start:end])
            for column in range(start, end):
                scale, zero = scales[:, groups[column]].float(), zeros[:, groups[column]].float()
                best = found[:, column] + near[:, column - start] / diagonal[column]
                value = scale * (torch.round(best / scale + zero).clamp(0, top) - zero)
                if keep is not None:
                    value = value * keep[:, column]
                steps[:, column - start] = value - found[:, column]
                near -= steps[:, column - start, None] * hessian[column, start:end]
                found[:, column] = value
            gradient -= steps @ hessian[start:end]
        if torch.equal(found, before):
            break
    return found
