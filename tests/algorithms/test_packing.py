"""Packed digits and positions come back as they were, take the bytes that were announced, and damage is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tasks.algorithms import packing
from tasks.algorithms.errors import InputError


def mask_of(rows: int, cols: int, keep: int, of: int, seed: int = 0) -> np.ndarray:
    """bool [rows, cols] with exactly `keep` of every `of`, drawn at random."""
    order = np.random.default_rng(seed).random((rows, cols // of, of)).argsort(axis=-1)
    return (order < keep).reshape(rows, cols)


@pytest.mark.parametrize("base", [2, 3, 4, 6, 7, 8, 16, 70, 255, 256, 257, 12870, 2**16, 601080390, 2**32])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 12, 1000])
def test_digits_come_back(base: int, count: int) -> None:
    digits = np.random.default_rng(count).integers(0, base, count, dtype=np.uint64)
    digits[: count // 2] = base - 1  # the largest words
    packed = packing.pack_digits(digits, base)
    assert packed.dtype == np.uint8 and packed.size == packing.digits_bytes(count, base)
    assert packed.size * 8 >= count * math.log2(base) - 1e-9
    assert np.array_equal(packing.unpack_digits(packed, count, base), digits)


def test_bits_are_a_dense_stream() -> None:
    for bits in range(1, 9):
        assert packing.digits_bytes(8000, 2**bits) == 1000 * bits


@pytest.mark.parametrize(
    ("keep", "of", "over"),
    [(1, 2, 0), (2, 4, 0.032), (3, 4, 0), (4, 8, 0.045), (7, 8, 0), (8, 16, 0.03), (5, 20, 0.15), (16, 32, 0.1)],
)
def test_positions_come_back_close_to_their_information(keep: int, of: int, over: float) -> None:
    cols = of * 40
    mask = mask_of(48, cols, keep, of)
    packed = packing.pack_positions(mask, keep, of)
    assert packed.size == packing.positions_bytes(mask.size, keep, of)
    assert np.array_equal(packing.unpack_positions(packed, 48, cols, keep, of), mask)
    least = mask.size // of * math.log2(math.comb(of, keep)) / 8
    assert least <= packed.size <= (1 + over) * least + 8  # `over` is what the words waste


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (7, 8), (3, 20)])
def test_ranks_number_the_combinations(keep: int, of: int) -> None:
    masks = np.array([[i in kept for i in range(of)] for kept in itertools.combinations(range(of), keep)])
    ranks = packing.rank(masks, keep)
    assert sorted(ranks.tolist()) == list(range(math.comb(of, keep)))
    naive = [sum(math.comb(place, i + 1) for i, place in enumerate(np.flatnonzero(row))) for row in masks]
    assert ranks.tolist() == naive
    assert np.array_equal(packing.unrank(ranks, keep, of), masks)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 1.0])
def test_unstructured_positions_come_back_within_one_percent(share: float) -> None:
    mask = np.random.default_rng(1).random((128, 256)) < share
    packed = packing.encode_mask(mask)
    kept = int(mask.sum())
    assert np.array_equal(packing.decode_mask(packed, mask.size, kept).reshape(mask.shape), mask)
    assert packed.size * 8 <= 1.01 * packing.log2_combinations(mask.size, kept) + 64


def test_groups_of_another_size_and_damage_are_refused() -> None:
    mask = mask_of(4, 16, 2, 4)
    mask[1, :4] = True
    with pytest.raises(InputError, match="1 of 16 groups of 4 don't keep exactly 2"):
        packing.pack_positions(mask, 2, 4)
    good = packing.pack_positions(mask_of(4, 16, 2, 4), 2, 4)
    for bad in (good[:-1], np.append(good, 0).astype(np.uint8), np.full_like(good, 255)):
        with pytest.raises(InputError, match="damaged"):
            packing.unpack_positions(bad, 4, 16, 2, 4)
    coded = packing.encode_mask(mask)
    for data, kept in ((coded[:-1], int(mask.sum())), (coded, 0), (coded, mask.size + 1)):
        with pytest.raises(InputError, match="damaged"):
            packing.decode_mask(data, mask.size, kept)
