"""A matrix in few bits, as gptqmodel's format and the packed one hold it: codes, scales, zero points, orders of groups.

It knows no file and needs no gptqmodel; how values become codes is the quantisers' matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    """This is a quantised matrix.

    Attributes:
        codes: uint8 [out_features, in_features].
        scales: float16 [out_features, groups].
        zeros: uint8 [out_features, groups]; None: the middle code 2 ** (bits - 1) everywhere.
        bits: 2 to 8.
        group_size: inputs that share a scale; in_features for whole rows.
        group_index: int [in_features], the group of each input; None: consecutive inputs.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    group_index: Tensor | None

    def values(self) -> Tensor:
        """Compute float32(scale) * (code - zero), [out_features, in_features]."""
        rows, cols = self.codes.shape
        if self.group_index is None:
            steps = self.codes.to(torch.int16).view(rows, -1, self.group_size)
            steps -= 2 ** (self.bits - 1) if self.zeros is None else self.zeros.to(torch.int16).unsqueeze(2)
            return (self.scales.float().unsqueeze(2) * steps).view(rows, cols)
        index, steps = self.group_index.long(), self.codes.to(torch.int16)
        steps -= 2 ** (self.bits - 1) if self.zeros is None else self.zeros.to(torch.int16)[:, index]
        return self.scales.float()[:, index] * steps
