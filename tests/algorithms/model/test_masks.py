"""Packed masks and N:M violations against loops over single bits and groups."""

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks

SHAPES = [(1, 1), (3, 5), (4, 8), (7, 9), (16, 32)]


def random_mask(rows, cols, seed=0):
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) > 0.5


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_pack_equals_a_loop_over_bits(rows, cols):
    mask = random_mask(rows, cols)
    expected = [0] * -(-rows * cols // 8)
    for position, bit in enumerate(mask.flatten().tolist()):
        expected[position // 8] |= int(bit) << (7 - position % 8)
    assert masks.pack(mask).tolist() == expected
    assert masks.pack(mask).dtype == torch.uint8
    assert torch.equal(masks.unpack(masks.pack(mask), rows, cols), mask)


def test_a_transposed_mask_is_packed_by_its_own_rows():
    mask = random_mask(6, 4)
    assert torch.equal(masks.unpack(masks.pack(mask.T), 4, 6), mask.T)


def test_bytes_of_another_shape_are_refused():
    with pytest.raises(InputError, match="3 x 5 has 2 bytes, found 4"):
        masks.unpack(torch.zeros(4, dtype=torch.uint8), 3, 5)


def test_only_bool_is_packed():
    with pytest.raises(TypeError, match="float32"):
        masks.pack(torch.zeros(2, 2))


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 2), (4, 8), (7, 8)])
def test_violations_equal_a_loop(keep, of):
    weight = random_mask(9, 16) * torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    expected = 0
    for row in weight.tolist():
        for start in range(0, 16, of):
            expected += sum(value != 0 for value in row[start : start + of]) > keep
    assert masks.violations(weight, keep, of) == expected


def test_inputs_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="10 inputs are not divisible by of = 4"):
        masks.violations(torch.zeros(2, 10), 2, 4)
