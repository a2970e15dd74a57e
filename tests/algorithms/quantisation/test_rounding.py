"""Group quantisation against loops over groups, candidates and grid points."""

import math

import numpy as np
import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation import rounding

CASES = [(2, 16, None), (3, 16, None), (4, 16, None), (4, 32, 4), (4, 16, 1), (8, 32, None), (8, 16, 8), (4, 32, 64)]


def random(rows, cols, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * spread


def naive_error(group, scale, bits):
    """Squared error of a list of floats for one float16 scale, each value by its own nearest code."""
    limit, total = 2 ** (bits - 1) - 1, 0.0
    for value in group:
        total += min((float(np.float16(np.float32(scale) * c)) - value) ** 2 for c in range(-limit, limit + 1))
    return total


@pytest.mark.parametrize(("bits", "group", "steps"), CASES)
def test_codes_scales_and_values_belong_together(bits, group, steps):
    matrix = random(6, 64)
    coded = rounding.quantise(matrix, bits, group, steps)
    assert coded.codes.dtype == torch.int8 and coded.codes.shape == (6, 64)
    assert coded.scales.dtype == torch.float16 and coded.scales.shape == (6, 64 // group)
    assert (coded.bits, coded.group_size) == (bits, group)
    limit = 2 ** (bits - 1) - 1
    got = rounding.values(coded)
    assert got.dtype == torch.float32
    for row in range(6):
        for col in range(64):
            scale, code = float(coded.scales[row, col // group]), int(coded.codes[row, col])
            assert code == max(-limit, min(limit, round(float(matrix[row, col] / scale))))
            assert float(got[row, col]) == float(np.float16(np.float32(scale) * np.float32(code)))
    assert torch.equal(got, got.half().float())


@pytest.mark.parametrize(("bits", "group", "steps"), [case for case in CASES if case[0] < 8 or case[2]])
def test_no_scale_of_a_dense_scan_is_much_better(bits, group, steps):
    matrix = random(4, 64, seed=3)
    coded = rounding.quantise(matrix, bits, group, steps)
    limit = 2 ** (bits - 1) - 1
    found = scanned = 0.0
    for row in range(4):
        for index in range(64 // group):
            values = matrix[row, index * group : (index + 1) * group].tolist()
            widest = max(map(abs, values)) / limit
            if steps is None:
                scales = [np.float16(widest * (0.5 + step / 100)) for step in range(62)]
            else:
                middle = round(math.log2(widest) * steps)
                scales = [np.float16(2 ** (k / steps)) for k in range(middle - steps, middle + steps // 6 + 2)]
            found += naive_error(values, float(coded.scales[row, index]), bits)
            scanned += min(naive_error(values, float(scale), bits) for scale in scales)
    assert found <= scanned * (1.02 if steps in (None, 64) else 1.000001)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_is_never_worse_than_the_largest_value(bits):
    matrix = random(32, 64, seed=1)
    limit = 2 ** (bits - 1) - 1
    coded = rounding.quantise(matrix, bits, 16)
    widest = (matrix.unflatten(1, (4, 16)).abs().amax(dim=2) / limit).half()
    plain = rounding.Coded(rounding.encode(matrix, widest.repeat_interleave(16, dim=1), bits), widest, bits, 16)

    def errors(of):
        return (rounding.values(of) - matrix).square().unflatten(1, (4, 16)).sum(dim=2)

    assert (errors(coded) <= errors(plain)).all()
    assert errors(coded).sum() < errors(plain).sum()


@pytest.mark.parametrize("steps", [1, 3, 4, 8, 64])
def test_snap_is_the_nearest_power(steps):
    scales = torch.logspace(-5, 4.4, 301, dtype=torch.float64)
    snapped = rounding.snap(scales, steps)
    assert snapped.dtype == torch.float16
    table = {k: np.float16(2.0 ** (k / steps)) for k in range(-14 * steps, 15 * steps + 1)}
    for scale, got in zip(scales.tolist(), snapped.tolist(), strict=True):
        exponent = min(table, key=lambda k: abs(k / steps - math.log2(scale)))
        assert got == float(table[exponent])


@pytest.mark.parametrize("steps", [1, 4, 64])
def test_snapped_scales_stay_and_are_what_quantise_uses(steps):
    coded = rounding.quantise(random(8, 64, spread=0.01), 4, 16, steps)
    assert torch.equal(rounding.snap(coded.scales, steps), coded.scales)
    assert torch.equal(rounding.snap(coded.scales.reshape(-1, 2), steps), coded.scales.reshape(-1, 2))


def test_every_exponent_has_its_own_scale_at_the_finest_grid():
    exponents = torch.arange(-14 * 64, 15 * 64 + 1, dtype=torch.float64)
    assert len(rounding.snap(2 ** (exponents / 64), 64).unique()) == len(exponents)


def test_a_zero_group_takes_the_most_common_scale():
    matrix = torch.zeros(3, 8)
    matrix[0, :4] = matrix[1, 4:] = torch.tensor([7.0, 1.0, -3.0, 2.0])
    matrix[2, :4] = torch.tensor([0.7, 0.0, -0.3, 0.2])  # a single zero makes no zero group
    coded = rounding.quantise(matrix, 4, 4)
    assert float(coded.scales[0, 0]) == 1.0
    assert coded.scales[0, 1] == coded.scales[1, 0] == coded.scales[2, 1] == 1.0
    assert float(coded.scales[2, 0]) != 1.0
    assert torch.equal(rounding.values(coded)[matrix == 0], torch.zeros(13))


@pytest.mark.parametrize("steps", [None, 4])
def test_a_zero_matrix(steps):
    coded = rounding.quantise(torch.zeros(2, 16), 4, 16, steps)
    assert torch.equal(coded.scales, torch.ones(2, 1, dtype=torch.float16))
    assert not rounding.values(coded).any()


@pytest.mark.parametrize("steps", [None, 1, 7])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 3e-4, 1.0, 32768.0])
def test_scales_are_normal_and_values_finite(steps, magnitude):
    matrix = random(4, 32).clamp(-1, 1) * magnitude
    for bits in (2, 4, 8):
        coded = rounding.quantise(matrix, bits, 16, steps)
        assert float(coded.scales.min()) >= torch.finfo(torch.float16).tiny
        got = rounding.values(coded)
        assert got.isfinite().all()
        assert float((got - matrix).abs().max()) <= max(magnitude, 2**-15)


def test_a_group_of_minus_one_is_the_row():
    matrix = random(3, 24)
    whole, named = rounding.quantise(matrix, 4, -1), rounding.quantise(matrix, 4, 24)
    assert whole.group_size == 24
    assert torch.equal(whole.codes, named.codes) and torch.equal(whole.scales, named.scales)


def test_chunks_and_float16_inputs_change_nothing(monkeypatch):
    matrix = random(5, 32).half()
    whole = rounding.quantise(matrix.float(), 4, 16)
    monkeypatch.setattr(rounding, "CHUNK", 48)
    parts = rounding.quantise(matrix, 4, 16)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scales, parts.scales)


def test_a_transposed_matrix_is_grouped_by_its_own_rows():
    matrix = random(16, 32)
    turned, copied = rounding.quantise(matrix.T, 4, 16), rounding.quantise(matrix.T.contiguous(), 4, 16)
    assert torch.equal(turned.codes, copied.codes) and torch.equal(turned.scales, copied.scales)


def test_what_does_not_work_is_told():
    with pytest.raises(InputError, match="rows of 20 values are not divisible by group_size = 16"):
        rounding.quantise(torch.ones(2, 20), 4, 16)
    for bad in (math.nan, math.inf, 40000.0):
        with pytest.raises(InputError, match="beyond 32768"):
            rounding.quantise(torch.tensor([[1.0, bad]]), 4, 2)
    with pytest.raises(ValueError, match="2 to 8 bits, not 9"):
        rounding.quantise(torch.ones(2, 4), 9, 2)
