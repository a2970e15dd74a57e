"""Round-to-nearest quantisation of a matrix in groups that share a scale; scales on a coarse logarithmic grid if asked.

A group of consecutive values of a row becomes scale * code with signed integer codes, symmetric around zero, so that
zero stays exactly zero. The scale is the one of least squared error among a fixed series around absmax / largest code:
at 4 bits a narrower range costs the outlier less than it gives the others (Banner et al., arXiv 1810.05723; here
searched, not fitted, as AWQ and GPTQ do). With `scale_steps` scales are powers of 2 ** (1 / scale_steps) only: few
distinct values, which an entropy coder packs into few bits; the search goes over the grid itself.

It looks at no activations: `tasks.algorithms.quantisation.embedding` and `tasks.algorithms.quantisation.gptq_walk`
do. It packs nothing: `tasks.algorithms.packing` does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tasks.algorithms.errors import InputError

SMALLEST = 2.0**-14
"""The smallest normal float16: scales below it would lose precision, and at last be zero."""
LARGEST = 2.0**15
"""Values beyond could leave float16's range when they are rounded up."""
SEARCH_STEPS = 24
"""Scales tried per octave: at 4 bits twice as many lower the squared error by less than 0.5%."""
SEARCH_UP = 1 / 6
"""Octaves above absmax / largest code that are tried; one octave below it is."""
CHUNK = 2**22
"""Values searched at once, to bound the memory."""


class Coded(NamedTuple):
    """This is a quantised matrix.

    Attributes:
        codes: int8 [rows, cols], from -(2 ** (bits - 1) - 1) to 2 ** (bits - 1) - 1.
        scales: float16 [rows, cols // group_size], positive and normal.
        bits: 2 to 8.
        group_size: consecutive values of a row that share a scale.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int


def quantise(matrix: Tensor, bits: int, group_size: int, scale_steps: int | None = None) -> Coded:
    """Round each value to the nearest multiple of its group's scale.

    Args:
        matrix: [rows, cols], any float type.
        bits: 2 to 8.
        group_size: divides cols; -1 is the whole row.
        scale_steps: scales are powers of 2 ** (1 / scale_steps); None: any float16.

    Raises:
        InputError: cols isn't divisible by group_size, or a value is not finite or beyond +-32768.
    """
    grouped = groups(matrix, group_size)  # [rows, cols / group, group]
    rows, count, group_size = grouped.shape
    flat = grouped.reshape(-1, group_size)  # [rows * groups, group]
    scales = torch.cat([choose_scales(part, bits, scale_steps) for part in flat.split(max(1, CHUNK // group_size))])
    scales = spread_to_zeros(scales, (flat == 0).all(dim=1))
    codes = encode(flat, scales.unsqueeze(1), bits)
    return Coded(codes.reshape(rows, count * group_size), scales.reshape(rows, count), bits, group_size)


def values(coded: Coded) -> Tensor:
    """Compute the values of the codes, float32 [rows, cols], rounded to float16: a float16 file holds exactly them."""
    codes = coded.codes.unflatten(1, (-1, coded.group_size))  # [rows, groups, group]
    return decode(codes, coded.scales.unsqueeze(2)).flatten(1)


def snap(scales: Tensor, steps: int) -> Tensor:
    """Round scales to powers of 2 ** (1 / steps), nearest by their logarithm, among the normal float16; same shape.

    Every exponent has one float16: 2 ** (exponent / steps) in float64, rounded once.
    """
    table = _grid(steps).to(scales.device)
    exponents = (scales.double().clamp(SMALLEST, LARGEST).log2() * steps).round().long()  # k of 2 ** (k / steps)
    return table[exponents - _lowest(steps)]


def groups(matrix: Tensor, group_size: int) -> Tensor:
    """Check a matrix [rows, cols] and cut it: float32 [rows, cols / group_size, group_size]; -1 is the whole row.

    Raises:
        InputError: as `quantise`.
    """
    cols = matrix.shape[1]
    size = cols if group_size == -1 else group_size
    if cols % size:
        raise InputError(f"rows of {cols} values are not divisible by group_size = {size}: choose a divisor of {cols}")
    matrix = matrix.detach().float()
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0  # NaN where any value is
    if not largest <= LARGEST:
        raise InputError(
            f"a matrix to be quantised holds a value of magnitude {largest}, beyond {LARGEST:.0f}: the model is broken"
        )
    return matrix.unflatten(1, (-1, size))


def choose_scales(flat: Tensor, bits: int, scale_steps: int | None) -> Tensor:
    """Search the scales of least squared error; of equal ones the first of the series.

    Args:
        flat: float32 [count, group_size].

    Returns:
        float16 [count].
    """
    # The scale at which the largest value has the largest code. A larger one rounds more coarsely, a smaller one clips.
    widest = flat.abs().amax(dim=1) / largest_code(bits)  # [count]
    scales, least = None, None
    for candidate in _series(widest, scale_steps):
        codes = encode(flat, candidate.unsqueeze(1), bits)
        error = (decode(codes, candidate.unsqueeze(1)) - flat).square_().sum(dim=1)  # [count]
        if scales is None:
            scales, least = candidate, error
        else:
            better = error < least  # strictly: of equal ones the first stays
            scales, least = torch.where(better, candidate, scales), torch.where(better, error, least)
    return scales


def encode(matrix: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Find int8 codes of float32 values, by float16 scales that broadcast against them. Ties go to the even code."""
    limit = largest_code(bits)
    return (matrix / scales.float()).round_().clamp_(-limit, limit).to(torch.int8)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Compute the float32 values of codes, by scales that broadcast against them, rounded to float16."""
    return (scales.float() * codes).half().float()


def largest_code(bits: int) -> int:
    """Compute 2 ** (bits - 1) - 1: codes are symmetric, so that -2 ** (bits - 1) isn't used."""
    if not 2 <= bits <= 8:
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
    return 2 ** (bits - 1) - 1


def spread_to_zeros(scales: Tensor, zero: Tensor) -> Tensor:
    """Replace scales [count] of all-zero groups by the most common other one, which costs a coder least.

    Args:
        zero: bool [count]. Where all groups are zero their scale is 1.
    """
    if not zero.any():
        return scales
    distinct, times = scales[~zero].float().unique(return_counts=True)  # sorted
    common = distinct[times.argmax()].half() if len(distinct) else scales.new_ones(())
    return torch.where(zero, common, scales)


def _series(widest: Tensor, scale_steps: int | None) -> Iterator[Tensor]:
    """Yield candidates for scales, float16 [count], starting with the nearest to absmax / largest code."""
    if scale_steps is None:
        for step in (0, *range(math.ceil(SEARCH_UP * SEARCH_STEPS), -SEARCH_STEPS - 1, -1)):
            yield (widest * 2 ** (step / SEARCH_STEPS)).clamp(SMALLEST, LARGEST).half()
        return
    table, stride = _grid(scale_steps), max(1, scale_steps // SEARCH_STEPS)
    nearest = (widest.double().clamp(SMALLEST, LARGEST).log2() * scale_steps).round().long() - _lowest(scale_steps)
    table = table.to(widest.device)
    for step in (0, *range(math.ceil(SEARCH_UP * scale_steps), -scale_steps - 1, -stride)):
        yield table[(nearest + step).clamp(0, len(table) - 1)]


def _lowest(steps: int) -> int:
    """Find the exponent k of the grid's first scale, SMALLEST = 2 ** (k / steps)."""
    return round(math.log2(SMALLEST)) * steps


@functools.cache
def _grid(steps: int) -> Tensor:
    """Tabulate 2 ** (k / steps) from SMALLEST to LARGEST, float16; rounded by numpy, torch would go by float32."""
    exponents = range(_lowest(steps), round(math.log2(LARGEST)) * steps + 1)
    return torch.from_numpy(np.array([2.0 ** (k / steps) for k in exponents], dtype=np.float64).astype(np.float16))
