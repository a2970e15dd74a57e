"""What a packed folder holds, in memory: codes, scales, masks and factors as they are stored.

`tasks.packed.source_folder` makes it of a model folder, `tasks.packed.writer` writes it, `tasks.packed.reader` gives it
back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.algorithms.quantisation import rounding
from tasks.algorithms.quantisation.codes import Codes

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Of what isn't quantised, by the names that safetensors gives them."""
CHUNK = 2**24
"""Values, or bytes, that are worked on at once."""


@dataclass
class Linear:
    """One linear of a block: quantised (codes, scales, bits, …) or not (weight).

    Attributes:
        codes: uint8 [out_features, in_features], the zero point where pruned; None where not quantised.
        scales: float16 [out_features, groups].
        zeros: uint8 [out_features, groups]; None: the middle code 2 ** (bits - 1) everywhere.
        bits: 2 to 8.
        group_size: inputs that share a scale; in_features for whole rows.
        group_index: int [in_features], the group of each input; None: consecutive inputs.
        weight: float [out_features, in_features], 0 where pruned; None where quantised.
        bias: float [out_features] or None.
        keep: bool [out_features, in_features]; None where nothing is pruned.
        pattern: "2:4" (keep : of), "unstructured" or "dense".
        adapter: (A, B), added as B A: float [rank, in_features] and [out_features, rank], or Coded of A and of B^T
            [rank, out_features]; None without.
    """

    codes: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    bits: int | None = None
    group_size: int | None = None
    group_index: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    keep: Tensor | None = None
    pattern: str = "dense"
    adapter: tuple[rounding.Coded | Tensor, rounding.Coded | Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return tuple((self.weight if self.codes is None else self.codes).shape)

    @property
    def rank(self) -> int:
        """The adapter's; 0 without one."""
        if self.adapter is None:
            return 0
        a = self.adapter[0]
        return len(a.codes if isinstance(a, rounding.Coded) else a)

    def values(self) -> Tensor:
        """The weight [out_features, in_features], without adapter: float32(scale) * (code - zero), or as stored."""
        if self.codes is None:
            return self.weight
        return Codes(self.codes, self.scales, self.zeros, self.bits, self.group_size, self.group_index).values()


@dataclass
class Model:
    """What a packed folder holds.

    Attributes:
        config: the model's config.json.
        blocks: per block, full module name -> Linear in running order; one is read whenever it is asked for.
        embedding: [vocabulary, hidden], of a float type or coded.
        head: the same of an untied head; None where it is the embedding.
        rest: full parameter name -> tensor: all norms.
    """

    config: dict[str, Any]
    blocks: Sequence[Mapping[str, Linear]]
    embedding: rounding.Coded | Tensor
    head: rounding.Coded | Tensor | None
    rest: Mapping[str, Tensor] = field(default_factory=dict)


def zero_codes(linear: Linear, rows: int, cols: int) -> np.ndarray:
    """uint8 [out, in]: the code of the value zero."""
    if linear.zeros is None:
        return np.full((rows, cols), 2 ** (linear.bits - 1), np.uint8)
    zeros = linear.zeros.numpy()
    if linear.group_index is None:
        return np.repeat(zeros, linear.group_size, axis=1)
    return zeros[:, linear.group_index.numpy()]
