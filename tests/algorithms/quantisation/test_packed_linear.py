"""A linear packed alone, by hand and by the kernel's own buffers."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.quantisation import gptqmodel_settings, packed_linear
from tests.support.gptq_oracle import SETTINGS


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_what_is_packed_comes_back_and_lies_where_the_format_says(bits, group_size):
    generator = torch.Generator().manual_seed(bits)
    rows, columns = 64, 96
    groups = 1 if group_size == -1 else columns // group_size
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(1, 2**bits, (rows, groups), generator=generator).float()
    scales = (0.1 + torch.rand(rows, groups, generator=generator)).half().float()
    index = torch.randperm(columns, generator=generator).int() % groups
    weight = scales[:, index.long()] * (codes - zeros[:, index.long()])
    config = gptqmodel_settings.config(**SETTINGS | {"bits": bits, "group_size": group_size})
    tensors = packed_linear.pack(weight, scales, zeros, index, bits, config)
    assert packed_linear.width(tensors) == bits and torch.equal(packed_linear.unpack(tensors), weight)
    empty = packed_linear.parts((rows, columns), bits, group_size)
    assert {part: (tensor.shape, tensor.dtype) for part, tensor in tensors.items()} == {
        part: (tensor.shape, tensor.dtype) for part, tensor in empty.items()
    }
    # The codes of a row's inputs as one string of bits, from the lowest of the first word on; zero points one less.
    assert torch.equal(unpacked(tensors["qweight"].T, bits), codes)
    assert torch.equal(unpacked(tensors["qzeros"], bits) + 1, zeros.T.long())


def unpacked(words, bits):
    """int64 [rows, words * 32 / bits] of int32 [rows, words]."""
    ones = (words.long()[:, :, None] >> torch.arange(32)) & 1
    return (ones.flatten(1).unflatten(1, (-1, bits)) * 2 ** torch.arange(bits)).sum(-1)
