"""Keep masks of pruned matrices as packed bits, and the check of an N:M pattern.

A mask is a bool matrix [rows, cols] = [out_features, in_features], True where the weight is kept.
Files are `tasks.models.mask_files`'s; which weights to keep is `tasks.algorithms.pruning.wanda`'s.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tasks.algorithms.errors import InputError


def pack(mask: Tensor) -> Tensor:
    """Pack bool [rows, cols] to uint8 [ceil(rows * cols / 8)]: row-major, from the highest bit on, zero padded."""
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is bool, got {mask.dtype}")
    return torch.from_numpy(np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1)))


def unpack(packed: Tensor, rows: int, cols: int) -> Tensor:
    """Unpack uint8 [bytes] to bool [rows, cols], on its device.

    Raises:
        InputError: the bytes don't belong to a matrix of that shape.
    """
    expected = -(-rows * cols // 8)  # rounded up
    if packed.numel() != expected:
        raise InputError(f"a mask of {rows} x {cols} has {expected} bytes, found {packed.numel()}: run wanda again")
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)  # from the highest bit on
    bits = packed.unsqueeze(1).bitwise_right_shift(shifts).bitwise_and_(1)  # [bytes, 8]
    return bits.view(torch.bool).flatten()[: rows * cols].reshape(rows, cols)


def groups(matrix: Tensor, of: int) -> Tensor:
    """Cut each row of [rows, cols] into groups of `of` consecutive inputs: [rows, cols / of, of].

    Raises:
        InputError: cols isn't divisible by `of`.
    """
    rows, cols = matrix.shape
    if cols % of:
        raise InputError(f"{cols} inputs are not divisible by of = {of}: choose an `of` that divides them")
    return matrix.reshape(rows, cols // of, of)


def violations(weight: Tensor, keep: int, of: int) -> int:
    """Count the groups of `of` consecutive inputs that hold more than `keep` nonzeros."""
    return int((groups(weight, of).ne(0).sum(dim=-1) > keep).sum())


def densest_group(weight: Tensor, of: int) -> int:
    """Return the largest number of nonzeros in any group of `of` consecutive inputs."""
    return int(groups(weight, of).ne(0).sum(dim=-1).max())


def revived(weight: Tensor, keep: Tensor) -> int:
    """Count the pruned weights that are not exactly zero; weight and keep [rows, cols]."""
    return int(weight.detach()[~keep.to(weight.device)].count_nonzero())


def parse(pattern: str) -> tuple[int, int] | None:
    """Read an N:M pattern "keep:of" as (kept, of); None for "unstructured" and "dense".

    Raises:
        InputError: it is none of them.
    """
    if pattern in ("unstructured", "dense"):
        return None
    kept, _, of = pattern.partition(":")
    if not (kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)):
        raise InputError(
            f"the masks' pattern is {pattern!r}, not keep:of, unstructured or dense: run stage wanda again"
        )
    return int(kept), int(of)
