"""Entropy coding against entropies that scipy computes, and on thousands of damaged codes."""

import hashlib
import random

import numpy as np
import pytest
import scipy.stats

from tasks.algorithms import entropy_coding
from tasks.algorithms.errors import InputError
from tests.benchmarks.damaged_codes import damage, fuzz

BASES = [1, 2, 3, 6, 16, 30, 255, 256, 257, 12870, 2**16, 2**20, 2**32]


def kind(base):
    return np.uint8 if base <= 2**8 else np.uint16 if base <= 2**16 else np.uint32


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("count", [0, 1, 2, 15, 17, 1000, 5003])
def test_digits_come_back(base, count):
    chance = np.random.default_rng(base + count)
    uniform = chance.integers(0, base, count)
    peaked = np.minimum(np.abs(chance.normal(0, base / 9, count)).astype(np.int64), base - 1)
    for digits in (uniform, peaked, np.zeros(count, int), np.full(count, base - 1)):
        digits = digits.astype(kind(base))
        data = entropy_coding.encode(digits, base)
        found = entropy_coding.decode(data, count, base)
        assert data.dtype == np.uint8 and found.dtype == digits.dtype and np.array_equal(found, digits)
        uniform = sum(np.log2(min(256, -(-base // 256**place))) for place in range(4) if 256**place < base)
        assert data.size <= count * uniform / 8 + 9  # of each byte; and two words


@pytest.mark.parametrize("base", [2, 6, 16, 30, 256])
@pytest.mark.parametrize("spread", [0.02, 0.2, 5])
def test_long_codes_are_within_half_a_percent_of_the_entropy(base, spread):
    count = 200_000
    digits = np.random.default_rng(base).normal(base / 2, spread * base, count).round().clip(0, base - 1)
    shares = np.unique(digits, return_counts=True)[1]
    bits = count * scipy.stats.entropy(shares, base=2)
    digits = digits.astype(np.uint8)
    assert entropy_coding.information(digits, base) == pytest.approx(bits, abs=1e-6)
    assert 8 * entropy_coding.encode(digits, base).size < 1.005 * bits + 8 * 24


def test_the_information_of_wide_digits_is_that_of_their_bytes():
    digits = np.random.default_rng(0).normal(1, 0.1, 4000).astype(np.float16).view(np.uint16)
    low, high = (np.unique(part, return_counts=True)[1] for part in (digits & 255, digits >> 8))
    expected = 4000 * (scipy.stats.entropy(low, base=2) + scipy.stats.entropy(high, base=2))
    assert entropy_coding.information(digits, 2**16) == pytest.approx(expected)
    assert entropy_coding.information(digits[:0], 2**16) == 0
    assert 8 * entropy_coding.encode(digits, 2**16).size < 1.02 * expected


def test_many_digits_need_no_memory_of_their_own_for_models():
    digits = np.random.default_rng(0).integers(0, 16, 3 * 2**20 + 5, dtype=np.uint8) // 2
    assert np.array_equal(entropy_coding.decode(entropy_coding.encode(digits, 16), digits.size, 16), digits)


def test_the_code_stays_what_files_have():
    squares = np.arange(5000, dtype=np.uint64) ** 2
    for base, digits, expected in (
        (16, (squares % 97 % 16).astype(np.uint8), "7f761e91acca72bad13bd896a4a0ee839e20023875f0ac8bc6c3bc14797dadfb"),
        (9973, (squares % 9973).astype(np.uint16), "a10b0f10dafeb18bbc5864f7671eae9ac546eee7502a95a3b29b6cab85f2e731"),
    ):
        assert hashlib.sha256(entropy_coding.encode(digits, base)).hexdigest() == expected


def test_digits_that_are_none_are_refused():
    with pytest.raises(ValueError, match="a digit is 6, not below its base 6"):
        entropy_coding.encode(np.array([1, 6], np.uint8), 6)
    code = entropy_coding.encode(np.arange(6, dtype=np.uint8), 6)
    for data, count, base in (
        (code, 0, 6),
        (code, 6, 1),
        (code[:0], 6, 6),
        (np.append(code, np.uint8(1)), 6, 6),
        (np.concatenate([[np.uint8(4)], code[1:]]), 6, 6),  # of a second byte, which digits below 6 don't have
        (entropy_coding.encode(np.array([299], np.uint16), 300), 1, 299),
    ):
        with pytest.raises(InputError, match=f"{count} digits of base {base} can't be decoded: the file is damaged"):
            entropy_coding.decode(data, count, base)


def test_damaged_codes_are_refused_or_give_digits():
    found = fuzz(2_000, seed=1)
    assert sum(found.values()) == 2_000 and min(found.values()) > 200


def test_damage_changes_codes():
    chance, code = random.Random(0), bytes(range(1, 40))
    assert sum(damage(chance, code) != code for _ in range(200)) > 180
