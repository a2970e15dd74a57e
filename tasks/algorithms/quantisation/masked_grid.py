"""The grid of values that gptqmodel rounds to, chosen without looking at pruned weights, and rounding to it alone.

gptqmodel's `Quantizer` chooses scales and zero points and rounds; its GPTQ decides what to round. Here it leaves pruned
weights out, and its scales are those that a file holds: float16, or powers of a root of two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tasks.algorithms.quantisation import gptqmodel_library as library
from tasks.algorithms.quantisation import rounding


class MaskedQuantizer(library.gptq.Quantizer):
    """It is gptqmodel's quantiser, but blind to pruned weights, and its scales are those that are stored.

    GPTQ calls it with the columns from left to right (after their permutation, if there is one): `find_params` at the
    first column of each group, `quantize` once per column. Hence the count of columns is the place in the mask.

    Attributes:
        steps: scales are powers of 2 ** (1 / steps); None: any float16.
        mask: bool [out_features, in_features] in the order of the calls, True where kept; None where nothing is pruned.
        column: columns quantised so far.
    """

    def __init__(self, qcfg: Any, name: str, steps: int | None, whole_first: bool = False) -> None:
        """Note what leads.

        Args:
            whole_first: the first `find_params` is for whole rows, which GPTQ makes and where there are groups drops.
        """
        super().__init__(qcfg=qcfg, name=name)
        self.steps = steps
        self._dropped = whole_first and qcfg.group_size != -1
        self.mask: Tensor | None = None
        self.column = 0

    def find_params(self, x: Tensor, weight: bool = False) -> None:
        """Choose scales and zero points of a group of columns [out_features, group], from its kept weights alone.

        The scale is rounded here, so that GPTQ makes up for that too, and what it computes with is what is stored.
        """
        if self._dropped:
            self._dropped, self.maxq = False, self.maxq.to(x.device)
            return
        # Pruned weights got errors of earlier columns and would widen the range. With whole rows as groups the range is
        # taken once and before that (they are still zero), and in the order before the permutation.
        if self.mask is not None and self.qcfg.group_size != -1:
            x = x * self.mask[:, self.column : self.column + x.shape[1]]
        if self.qcfg.sym:
            # Where no weight of a group is negative, gptqmodel's symmetric range is [0, max] with the middle code as
            # zero, so that it clips at half the maximum. Few groups of 32 are like that, many with half of it pruned.
            # Anything below zero makes it [-max, max]; so small that it counts for nothing in the search by `mse`.
            x = torch.cat([x, -1e-30 * x.any(dim=1, keepdim=True)], dim=1)
        widest, self.maxshrink = self.maxshrink, self._shrink(x)
        super().find_params(x, weight=weight)
        self.maxshrink = widest
        chosen = self.scale  # [out_features, 1]
        # A scale of 0 would divide by zero: 2^-24 is the smallest float16 above it.
        self.scale = (rounding.snap(chosen, self.steps) if self.steps else chosen.half()).float().clamp(min=2.0**-24)
        if not self.qcfg.sym:  # the lower end of the range, -zero * scale, stays nearly where it was
            self.zero = torch.round(self.zero * chosen / self.scale).clamp(0, self.maxq)

    def _shrink(self, x: Tensor) -> float:
        """By how much of its range gptqmodel's search may have to shrink a group [out_features, columns], at most.

        It tries the range times p = 1, 0.99, … 0.21 and keeps the first of least error. From some p on the largest
        value of a group is clipped by more than the whole error at p = 1: nothing further can be chosen.
        """
        power = float(self.qcfg.mse or 0)
        if not power:
            return self.maxshrink
        steps, most = int(self.maxshrink * self.grid), 2**self.qcfg.bits - 1
        low, high = x.amin(dim=1).clamp(max=0), x.amax(dim=1).clamp(min=0)  # [out_features]
        largest = torch.maximum(-low, high)
        if self.qcfg.sym:
            low, high, zero = -largest, largest, torch.full_like(largest, (most + 1) / 2)
        scale = (high - low) / most
        if not self.qcfg.sym:
            zero = (-low / scale).round()
        errors = x / scale[:, None] + zero[:, None]
        errors = scale[:, None] * (errors.round_().clamp_(0, most) - zero[:, None]) - x
        error = errors.abs_().pow_(power).sum(dim=1)  # of the range as it is
        # The codes reach as far as p * (largest + a step, or half of one): what is beyond is lost of the largest value.
        reach = largest + scale * (0.5 if self.qcfg.sym else 1.0)
        needed = (largest - (1.001 * error).pow(1 / power)) / reach  # p below which more than the error is lost
        lowest = float(torch.where(largest > 0, needed, torch.ones_like(needed)).min())
        if not math.isfinite(lowest):  # a broken model's, which is refused later
            return self.maxshrink
        tried = min(steps, math.ceil((1 - lowest) * self.grid) + 1)
        return (tried + 0.5) / self.grid  # gptqmodel rounds down

    def quantize(self, x: Tensor) -> Tensor:
        """Round columns [out_features, columns] to the grid's nearest values; pruned weights become zero."""
        q = super().quantize(x)  # scale * (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero)
        if self.mask is not None:
            q = q * self.mask[:, self.column : self.column + x.shape[1]]
        self.column += x.shape[1]
        return q


def nearest(
    weight: Tensor, keep: Tensor | None, quantisation: Any, bits: int, scale_steps: int | None = None
) -> Tensor:
    """Round to nearest on the grid that GPTQ would have at its start: no Hessian, nothing compensated.

    Args:
        weight: [out_features, in_features], 0 where pruned.
        keep: bool of the same shape, or None.
        quantisation: gptqmodel's QuantizeConfig; group size, symmetry and mse are taken from it.
        bits: 2, 3, 4 or 8.

    Returns:
        float32 [out_features, in_features].
    """
    rounded = _by_group(weight, keep, quantisation, bits, scale_steps)
    return torch.cat([values for _, _, values in rounded], dim=1)


def scales(weight: Tensor, keep: Tensor | None, quantisation: Any, bits: int, scale_steps: int | None = None) -> Tensor:
    """Return the scales that `nearest` rounds by, float32 [out_features, groups]; arguments as there."""
    rounded = _by_group(weight, keep, quantisation, bits, scale_steps)
    return torch.cat([scale for scale, _, _ in rounded], dim=1)


def codes(
    weight: Tensor, quantisation: Any, bits: int, scale_steps: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a file of `nearest` holds, nothing pruned; arguments as there.

    Returns:
        Codes uint8 [out_features, in_features], scales float16 and zero points uint8 [out_features, groups].
    """
    found = [
        ((values / scale).round() + zero, scale, zero)
        for scale, zero, values in _by_group(weight, None, quantisation, bits, scale_steps)
    ]
    unpacked = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return tuple(part.to(kind) for part, kind in zip(unpacked, (torch.uint8, torch.float16, torch.uint8), strict=True))


def _by_group(
    weight: Tensor, keep: Tensor | None, quantisation: Any, bits: int, scale_steps: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield scale, zero point [out_features, 1] and rounded values [out_features, group] of each group of columns."""
    weight = weight.detach().float()
    size = weight.shape[1] if quantisation.group_size == -1 else quantisation.group_size
    settings = copy.copy(quantisation)
    settings.bits = bits
    quantiser = MaskedQuantizer(settings, "", scale_steps)
    quantiser.mask = None if keep is None else keep.to(weight.device)
    quantiser.configure(perchannel=True)
    for group in weight.split(size, dim=1):  # [out_features, size]
        quantiser.find_params(group, weight=True)
        yield quantiser.scale, quantiser.zero, quantiser.quantize(group)
