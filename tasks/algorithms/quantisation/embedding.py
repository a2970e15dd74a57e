"""Quantisation of an embedding or head matrix, one row of hidden values per token of the vocabulary.

"nearest" rounds each value (`rounding`). "gptq" (Frantar et al., arXiv 2210.17323) goes through the hidden dimension
column by column and moves each column's rounding error to the columns that follow, so that the logits change least on
calibration inputs; of a tied embedding that fits the head's use of it, not the lookup. A group's scales are chosen when
its first column is reached, from the values that it has by then.

It computes no moments, quantises no linears of blocks (`tasks.algorithms.quantisation.masked_gptq` does) and packs
nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation import rounding
from tasks.algorithms.quantisation.rounding import Coded

DAMP = 0.01
"""Share of the moments' mean diagonal that is added to them, as in the GPTQ code."""


def compress(
    weight: Tensor,
    bits: int,
    group_size: int,
    method: Literal["nearest", "gptq"],
    moments: Tensor | None = None,
    scale_steps: int | None = None,
) -> Coded:
    """Quantise a matrix [vocabulary, hidden].

    Args:
        weight: [vocabulary, hidden], any float type.
        bits: 2 to 8.
        group_size: consecutive values of a token that share a scale; divides hidden.
        method: "gptq" needs `moments`.
        moments: X^T X of the head's inputs X [tokens, hidden], or any multiple of it, [hidden, hidden].
        scale_steps: scales are powers of 2 ** (1 / scale_steps); None: any float16.

    Raises:
        InputError: hidden isn't divisible by group_size; a value is not finite or too large; moments can't be inverted.
    """
    if method == "nearest":
        return rounding.quantise(weight, bits, group_size, scale_steps)
    if method != "gptq":
        raise ValueError(f"method is {method!r}, not nearest or gptq")
    if moments is None or moments.shape != (weight.shape[1],) * 2:
        raise ValueError(f"gptq needs moments [{weight.shape[1]}, {weight.shape[1]}]")
    grouped = rounding.groups(weight, group_size)  # checked, [vocabulary, groups, group]
    return _compensated(grouped.flatten(1), bits, grouped.shape[2], _inverse_factor(moments).float(), scale_steps)


def _inverse_factor(moments: Tensor) -> Tensor:
    """Compute the upper triangular U with U^T U = (moments + damping)^-1, float64 [hidden, hidden]."""
    moments = moments.double()
    damp = DAMP * moments.diagonal().mean()
    damped = moments + damp * torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        # GPTQ's Algorithm 1 begins with it: all that the elimination of eq. 3 would give column by column is in U.
        lower, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower))
    if failed or not lower.isfinite().all():
        raise InputError(
            "the moments of the head's inputs can't be inverted: calibrate on other text, "
            "or set gptq.embedding.method to nearest"
        )
    return lower.T


def _compensated(weight: Tensor, bits: int, group_size: int, factor: Tensor, scale_steps: int | None) -> Coded:
    """Sweep over float32 [vocabulary, hidden] as GPTQ does, with the factor [hidden, hidden] of the inverse moments."""
    remaining = weight.clone()  # the columns to come hold the errors of those before
    scales, codes = [], []
    for start in range(0, weight.shape[1], group_size):
        stop = start + group_size
        group = remaining[:, start:stop]  # [vocabulary, group], a view
        scale = rounding.choose_scales(group, bits, scale_steps)  # [vocabulary]
        scale = rounding.spread_to_zeros(scale, (group == 0).all(dim=1))
        columns = group.T.contiguous()  # [group, vocabulary]: each column in one piece
        errors = torch.empty_like(columns)
        for column, values in enumerate(columns):
            row = factor[start + column]  # [hidden]
            code = rounding.encode(values, scale, bits)  # [vocabulary]
            # GPTQ's Algorithm 1, the loop over columns: E_:,j = (W_:,j - Q_:,j) / [H^-1]_jj, of which eq. 2 moves
            # E_:,j H^-1_j,j: to the columns that follow. H^-1 is the factor there.
            torch.div(values - rounding.decode(code, scale), row[start + column], out=errors[column])
            columns[column + 1 :] -= errors[column] * row[start + column + 1 : stop, None]
            codes.append(code)
        # The lazy batch update (eq. 4), with a group of a scale as the block of columns.
        remaining[:, stop:] -= errors.T.contiguous() @ factor[start:stop, stop:]
        scales.append(scale)
    return Coded(torch.stack(codes, dim=1), torch.stack(scales, dim=1), bits, group_size)
