"""What the widths of a plain model's linears take when the file is entropy coded.

A code of b bits has less than b bits of entropy, the less the narrower it is, so that bits don't say which width is
worth its bytes. Codes of rounding to the nearest are coded as the package's are; GPTQ's have nearly the same entropy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tasks.algorithms import entropy_coding
from tasks.algorithms.model import families, layers, matrices
from tasks.algorithms.quantisation import masked_grid, packable
from tasks.compression import block_quantisation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.algorithms.quantisation import rounding
    from tasks.parameters.schema import Gptq

_ENTRY = 4
"""Bytes for the size of a stream."""


def of_linears(model: nn.Module, chosen: Gptq, device: str) -> dict[str, dict[int, int]]:
    """Full module name -> bits -> bytes, by the codes of rounding to the nearest; nothing is pruned.

    Args:
        model: dense; its blocks may be kept elsewhere.
    """
    config = block_quantisation.settings(chosen, chosen.bits, device)
    found: dict[str, dict[int, int]] = {}
    for block, linears in zip(families.blocks(model), matrices.by_block(model), strict=True):
        with layers.opened(block):
            for name, matrix in linears.items():
                found[name] = {
                    bits: _bytes(*masked_grid.codes(matrix.weight, config, bits, chosen.scale_steps), bits, chosen)
                    for bits in packable.WIDTHS
                }
    return found


def of_table(coded: rounding.Coded, chosen: Gptq) -> int:
    """Bytes of a coded embedding or head."""
    codes = coded.codes.numpy().view(np.uint8) + np.uint8(2 ** (coded.bits - 1))  # the sum wraps
    return _stream(codes, 2**coded.bits) + _scale_bytes(coded.scales, chosen)


def _bytes(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, chosen: Gptq) -> int:
    columns, groups = codes.shape[1], scales.shape[1]
    size = _stream(codes.cpu().numpy(), 2**bits) + _scale_bytes(scales, chosen)
    if not chosen.symmetric:
        size += _stream(zeros.cpu().numpy(), 2**bits)
    if chosen.act_order == "descending":  # which group a column is in is as good as random
        size += _ENTRY + int(columns * np.log2(groups) / 8) + 1
    return size


def _scale_bytes(scales: Tensor, chosen: Gptq) -> int:
    """Scales on a grid are indices into a table that all matrices share; its values are in no particular linear's."""
    values = scales.half().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    if not chosen.scale_steps:
        return _stream(values, 2**16)
    used, index = np.unique(values, return_inverse=True)
    return _stream(index.astype(np.uint16), used.size)


def _stream(digits: np.ndarray, base: int) -> int:
    return _ENTRY + entropy_coding.encode(digits, base).size
