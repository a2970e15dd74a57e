"""What the formats share of reading a model."""

from __future__ import annotations

import torch

from tasks.export import source_model
from tasks.packed.stored_model import Linear


def test_blocks_are_the_largest_power_of_two_that_divides_a_group():
    def size(group, order=None, least=16, most=256):
        linear = Linear(codes=torch.zeros(1, 1), group_size=group, group_index=order)
        return source_model.block_size(linear, least, most)

    assert [size(group) for group in (32, 48, 96, 128, 1024, 8, 20)] == [32, 16, 32, 128, 256, None, None]
    assert size(32, order=torch.zeros(1)) is None and size(64, least=32, most=32) == 32
    assert source_model.block_size(Linear(weight=torch.zeros(1, 1)), 16, 256) is None


def test_a_part_of_a_linear_has_its_rows_of_everything():
    given = {"codes": torch.arange(24).view(6, 4), "scales": torch.arange(6.0).view(6, 1), "bias": torch.arange(6.0)}
    linear = Linear(**given, bits=4, group_size=4, adapter=(torch.ones(2, 4), torch.arange(12.0).view(6, 2)))
    part = source_model.part(linear, slice(4, 6))
    assert part.shape == (2, 4) and part.bias.tolist() == [4, 5] and part.scales.tolist() == [[4], [5]]
    assert part.zeros is None and part.adapter[0].shape == (2, 4) and part.adapter[1].tolist() == [[8, 9], [10, 11]]
