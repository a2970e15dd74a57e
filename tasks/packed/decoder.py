"""The bytes of an opened packed folder as tensors: codes, scales, masks and factors, one blob at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks.algorithms import packing
from tasks.algorithms.model import masks
from tasks.algorithms.quantisation import rounding
from tasks.packed.description import SIZES
from tasks.packed.digits import CODERS
from tasks.packed.layout import COUNTS, Spec, divisor
from tasks.packed.packed_folder import PackedFolder
from tasks.packed.stored_model import DTYPES, Linear, zero_codes

Parts = Mapping[tuple[str, str], np.ndarray]
"""(linear, part) -> its bytes."""


class Decoder(Sequence[Mapping[str, Linear]]):
    """Reads matrices of an opened packed folder, each when it is asked for; as a sequence it is that of the blocks.

    Every method raises InputError where the blob that it reads is damaged.
    """

    def __init__(self, package: PackedFolder) -> None:
        self.package, self.description, self.layout = package, package.description, package.layout
        self._unpack = CODERS[package.description.coding].unpack

    def __len__(self) -> int:
        return len(self.layout.specs)

    def __getitem__(self, index: int) -> dict[str, Linear]:
        """A block: full module name -> Linear."""
        specs = self.layout.specs[index]  # IndexError behind the last, which ends an iteration
        parts = self.package.parts(f"layers.{index}")
        return {spec.name: self._linear(spec, parts) for spec in specs}

    def coded(self, name: str) -> rounding.Coded | Tensor:
        """Embedding or head [vocabulary, hidden] as it is stored."""
        parts, (rows, cols) = self.package.parts(name), self.layout.table_shape
        coding = getattr(self.description, name)
        if coding is None:
            return self._tensor(parts["", "codes"], self.layout.dtype(name), (rows, cols))
        size = divisor(cols, coding.group_size)
        codes = self._unpack(parts["", "codes"], rows * cols, 2**coding.bits).reshape(rows, cols)
        scales = self._scales(parts["", "scales"], (rows, cols // size), "embedding")
        return rounding.Coded(_signed(codes, coding.bits), scales, coding.bits, size)

    def rest(self) -> dict[str, Tensor]:
        """Full parameter name -> tensor, of the norms."""
        parts = self.package.parts("rest")
        return {
            name: self._tensor(parts["", name], self.layout.dtype(name), shape)
            for name, shape in self.layout.rest.items()
        }

    @functools.cached_property
    def table(self) -> Tensor:
        """float16 [distinct scales]."""
        data = self.package.parts("scales")["", "scales"]
        return self._tensor(data, "F16", (self.description.scales.values,))

    def _tensor(self, data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """Values that aren't quantised."""
        values = self._unpack(data, math.prod(shape), 2 ** (8 * SIZES[dtype]))
        return torch.from_numpy(values.view(np.uint8)).view(DTYPES[dtype]).reshape(shape)

    def _scales(self, data: np.ndarray, shape: tuple[int, int], kind: str) -> Tensor:
        table = self.description.scales
        if not (table and kind in table.kinds):
            return self._tensor(data, "F16", shape)
        index = self._unpack(data, math.prod(shape), table.values)
        return self.table[torch.from_numpy(index.astype(np.int32)).reshape(shape)]

    def _linear(self, spec: Spec, parts: Parts) -> Linear:
        name, shape = spec.name, (spec.rows, spec.cols)
        keep = self._keep(spec, parts.get((name, "positions")))
        kept = spec.rows * spec.cols if keep is None else int(keep.sum())
        linear = Linear(bits=spec.bits, pattern=spec.pattern)
        linear.keep = None if keep is None else torch.from_numpy(keep)
        if spec.bits:
            self._quantised(spec, parts, keep, kept, linear)
        else:
            dtype = self.layout.dtype(f"{name}.weight")
            values = self._tensor(parts[name, "values"], dtype, (kept,))
            linear.weight = values.reshape(shape) if keep is None else torch.zeros(shape, dtype=values.dtype)
            if keep is not None:
                linear.weight[linear.keep] = values
        if spec.bias:
            linear.bias = self._tensor(parts[name, "bias"], self.layout.dtype(f"{name}.bias"), (spec.rows,))
        if spec.rank:
            linear.adapter = tuple(self._factor(spec, part, parts) for part in "ab")
        return linear

    def _keep(self, spec: Spec, data: np.ndarray | None) -> np.ndarray | None:
        """bool [out, in], or None where nothing is pruned."""
        if data is None:
            return None
        pattern = masks.parse(spec.pattern)
        if pattern:
            return packing.unpack_positions(data, spec.rows, spec.cols, *pattern, self._unpack)
        kept, _ = COUNTS.unpack(data[: COUNTS.size].tobytes())
        mask = packing.decode_mask(data[COUNTS.size :], spec.rows * spec.cols, kept)
        return mask.reshape(spec.rows, spec.cols)

    def _quantised(self, spec: Spec, parts: Parts, keep: np.ndarray | None, kept: int, linear: Linear) -> None:
        grid, base, name = (spec.rows, spec.groups), 2**spec.bits, spec.name
        linear.group_size = spec.group_size
        linear.scales = self._scales(parts[name, "scales"], grid, "linears")
        if spec.zeros:
            zeros = self._unpack(parts[name, "zeros"], math.prod(grid), base)
            linear.zeros = torch.from_numpy(zeros).reshape(grid)
        if spec.order:
            order = self._unpack(parts[name, "order"], spec.cols, spec.groups)
            linear.group_index = torch.from_numpy(order.astype(np.int32))
        values = self._unpack(parts[name, "values"], kept, base)
        codes = values if keep is None else zero_codes(linear, spec.rows, spec.cols)
        if keep is not None:
            codes[keep] = values
        linear.codes = torch.from_numpy(codes).reshape(spec.rows, spec.cols)

    def _factor(self, spec: Spec, part: str, parts: Parts) -> rounding.Coded | Tensor:
        length, name = (spec.cols if part == "a" else spec.rows), spec.name
        if not self.description.adapter:
            shape = (spec.rank, length) if part == "a" else (length, spec.rank)
            return self._tensor(parts[name, part], self.layout.dtype(f"{name}.{part}"), shape)
        coding = self.description.adapter["ab".index(part)]
        size = divisor(length, coding.group_size)
        codes = self._unpack(parts[name, part], spec.rank * length, 2**coding.bits).reshape(spec.rank, length)
        scales = self._scales(parts[name, f"{part}.scales"], (spec.rank, length // size), "adapter")
        return rounding.Coded(_signed(codes, coding.bits), scales, coding.bits, size)


def _signed(codes: np.ndarray, bits: int) -> Tensor:
    """int8 codes around zero of unsigned ones."""
    return torch.from_numpy((codes - np.uint8(2 ** (bits - 1))).view(np.int8))  # the difference wraps
