"""GPTQ of an embedding against a double loop over rows and columns, and against rounding to the nearest."""

import math

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation import embedding, rounding


def correlated(tokens, hidden, seed=0):
    """Second moments [hidden, hidden] of inputs whose dimensions depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64) @ mixing
    return x.T @ x / tokens


def random(rows, cols, seed=1):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def damped(moments):
    share = embedding.DAMP * float(moments.diagonal().mean())
    return moments + share * torch.eye(len(moments), dtype=torch.float64)


def weighted_error(weight, coded, moments):
    delta = rounding.values(coded).double() - weight.double()
    return float(((delta @ moments) * delta).sum())


def optimal_brain_quantisation(weight, bits, group, moments, steps):
    """Row by row, column by column: the textbook update with the inverse of the moments of the columns left.

    No Cholesky factor: after each column its row and column are eliminated from the inverse.
    """
    rows, cols = weight.shape
    codes, scales = torch.zeros(rows, cols, dtype=torch.int8), torch.zeros(rows, cols // group, dtype=torch.float16)
    limit = 2 ** (bits - 1) - 1
    for row in range(rows):
        left = weight[row].double().clone()
        inverse = torch.linalg.inv(damped(moments))
        for col in range(cols):
            if col % group == 0:
                scales[row, col // group] = rounding.choose_scales(left[None, col : col + group].float(), bits, steps)
            scale = float(scales[row, col // group])
            code = max(-limit, min(limit, round(float(left[col]) / scale)))
            codes[row, col] = code
            value = float(torch.tensor(scale * code).half())
            error = (float(left[col]) - value) / float(inverse[0, 0])
            left[col:] -= error * inverse[0]
            inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return rounding.Coded(codes, scales, bits, group)


@pytest.mark.parametrize(("bits", "group", "steps"), [(4, 8, None), (8, 16, None), (4, 16, 4), (3, 32, None)])
def test_gptq_equals_the_textbook_loop(bits, group, steps):
    weight, moments = random(12, 32), correlated(200, 32)
    coded = embedding.compress(weight, bits, group, "gptq", moments, steps)
    naive = optimal_brain_quantisation(weight, bits, group, moments, steps)
    assert coded.codes.dtype == torch.int8 and coded.scales.dtype == torch.float16
    assert (coded.bits, coded.group_size) == (bits, group)
    assert torch.equal(coded.scales, naive.scales)
    assert torch.equal(coded.codes, naive.codes)


@pytest.mark.parametrize("steps", [None, 4])
def test_nearest_is_rounding(steps):
    weight = random(10, 32)
    coded, expected = embedding.compress(weight, 4, 16, "nearest", None, steps), rounding.quantise(weight, 4, 16, steps)
    assert torch.equal(coded.codes, expected.codes) and torch.equal(coded.scales, expected.scales)


@pytest.mark.parametrize(("bits", "group", "steps"), [(4, 16, None), (8, 8, 4), (4, -1, 8)])
def test_independent_inputs_need_no_compensation(bits, group, steps):
    weight = random(10, 32)
    coded = embedding.compress(weight, bits, group, "gptq", 3.0 * torch.eye(32), steps)
    expected = rounding.quantise(weight, bits, group, steps)
    assert torch.equal(coded.codes, expected.codes) and torch.equal(coded.scales, expected.scales)
    assert coded.group_size == expected.group_size


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [16, 32])
def test_gptq_changes_the_logits_less(bits, group):
    weight, moments = random(96, 64), correlated(400, 64)
    nearest = embedding.compress(weight, bits, group, "nearest")
    gptq = embedding.compress(weight, bits, group, "gptq", moments)
    assert weighted_error(weight, gptq, moments) < 0.8 * weighted_error(weight, nearest, moments)


def test_a_multiple_of_the_moments_is_as_good():
    weight, moments = random(12, 32), correlated(200, 32)
    one = embedding.compress(weight, 4, 16, "gptq", moments)
    more = embedding.compress(weight, 4, 16, "gptq", 1024 * moments.float())
    assert float((one.codes != more.codes).float().mean()) < 0.01
    assert embedding.compress(weight, 4, 16, "gptq", moments).codes.equal(one.codes)


def test_the_weight_stays_as_it_is():
    weight, moments = random(12, 32), correlated(200, 32)
    before = weight.clone()
    embedding.compress(weight, 4, 16, "gptq", moments)
    assert torch.equal(weight, before)


def test_fewer_tokens_than_dimensions_are_damped():
    weight, moments = random(12, 32), correlated(5, 32)
    coded = embedding.compress(weight, 4, 16, "gptq", moments)
    nearest = embedding.compress(weight, 4, 16, "nearest")
    assert weighted_error(weight, coded, moments) < weighted_error(weight, nearest, moments)


def test_tokens_that_are_zero_stay_zero():
    weight = random(12, 32)
    weight[3] = 0
    coded = embedding.compress(weight, 4, 16, "gptq", correlated(200, 32))
    assert not coded.codes[3].any()
    others = torch.cat([coded.scales[:3], coded.scales[4:]])
    assert all(coded.scales[3, group] in others[:, group] for group in range(2))


def test_what_does_not_work_is_told():
    weight = random(4, 32)
    with pytest.raises(InputError, match="not divisible by group_size = 24"):
        embedding.compress(weight, 4, 24, "gptq", correlated(200, 32))
    for bad in (torch.zeros(32, 32), torch.full((32, 32), math.nan), -torch.eye(32)):
        with pytest.raises(InputError, match="can't be inverted"):
            embedding.compress(weight, 4, 16, "gptq", bad)
    with pytest.raises(ValueError, match=r"gptq needs moments \[32, 32\]"):
        embedding.compress(weight, 4, 16, "gptq")
    with pytest.raises(ValueError, match="method is 'awq'"):
        embedding.compress(weight, 4, 16, "awq", torch.eye(32))
