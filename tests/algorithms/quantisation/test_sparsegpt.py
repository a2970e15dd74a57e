"""The joint sweep against a loop in double precision that inverts every remaining Hessian, and its invariants."""

import math

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks
from tasks.algorithms.quantisation import sparsegpt


class Steps:
    """A grid of whole steps, symmetric: scale = largest / 7."""

    def find_params(self, x, weight=False):
        self.scale = (x.abs().amax(dim=1, keepdim=True) / 7).clamp(min=1e-9)
        self.zero = torch.zeros_like(self.scale)

    def quantize(self, x):
        return (x / self.scale).round().clamp(-7, 7) * self.scale


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian_of(columns, seed=1):
    x = (
        normal(4 * columns, columns, seed=seed)
        @ normal(columns, columns, seed=seed + 1)
        * normal(columns, seed=9).exp()
    )
    hessian = x.T @ x / len(x)
    return hessian + 0.05 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)


def factor_of(hessian):
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def best(values, keep):
    """Indices of the largest, the first of equal ones."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]


def naive(weight, hessian, keep, of, group_size):
    """One weight at a time; the optimal update after each from the inverse of the Hessian of what is left."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    work, kept, quantised = weight.clone(), torch.zeros_like(weight, dtype=torch.bool), torch.zeros_like(weight)
    scale = {}
    harm = [float(torch.linalg.inv(hessian[j:, j:])[0, 0]) for j in range(columns)]

    def choice(row, start):
        return [start + i for i in best([float(work[row, start + i]) ** 2 / harm[start + i] for i in range(of)], keep)]

    for j in range(columns):
        left = torch.linalg.inv(hessian[j:, j:])
        for row in range(rows):
            if j % size == 0:
                likely = [i for start in range(j, j + size, of) for i in choice(row, start)]
                scale[row] = float(work[row, likely].abs().max()) / 7
            if j % of == 0:
                kept[row, choice(row, j)] = True
            if kept[row, j]:
                quantised[row, j] = max(-7, min(7, round(float(work[row, j]) / scale[row]))) * scale[row]
            work[row, j:] -= (work[row, j] - quantised[row, j]) / left[0, 0] * left[0]
    return quantised, kept


@pytest.mark.parametrize(
    ("columns", "keep", "of", "group_size"),
    [(32, 2, 4, 16), (32, 2, 4, -1), (48, 1, 4, 16), (24, 4, 8, 8), (36, 1, 3, 12)],
)
def test_equals_a_naive_loop(columns, keep, of, group_size):
    weight, hessian = normal(6, columns), hessian_of(columns)
    found = sparsegpt.sweep(weight, factor_of(hessian), keep, of, group_size, Steps())
    quantised, kept = naive(weight, hessian, keep, of, group_size)
    assert torch.equal(found.keep, kept)
    assert torch.allclose(found.quantised, quantised, atol=1e-9)


@pytest.mark.parametrize("group_size", [-1, 96])
def test_blocks_change_nothing(monkeypatch, group_size):
    weight, factor = normal(8, 192), factor_of(hessian_of(192))
    whole = sparsegpt.sweep(weight, factor, 2, 4, group_size, Steps())
    monkeypatch.setattr(sparsegpt, "BLOCK", 8)
    small = sparsegpt.sweep(weight, factor, 2, 4, group_size, Steps())
    assert torch.equal(whole.keep, small.keep)
    assert torch.allclose(whole.quantised, small.quantised, atol=1e-9)
    assert whole.loss == pytest.approx(small.loss)


def test_unit_inputs_give_magnitude_pruning_and_round_to_nearest():
    weight = normal(8, 64)
    found = sparsegpt.sweep(weight, torch.eye(64, dtype=torch.float64), 2, 4, 16, Steps())
    for row in range(8):
        for start in range(0, 64, 4):
            largest = best([abs(float(w)) for w in weight[row, start : start + 4]], 2)
            assert found.keep[row, start : start + 4].nonzero().flatten().tolist() == sorted(largest)
    pruned = weight * found.keep
    scales = pruned.reshape(8, 4, 16).abs().amax(dim=-1) / 7
    assert torch.allclose(found.scales, scales)
    codes = (pruned.reshape(8, 4, 16) / scales[:, :, None]).round()
    assert torch.allclose(found.quantised, (codes * scales[:, :, None]).reshape(8, 64))
    assert found.loss == pytest.approx(float((weight - found.quantised).square().sum()) / 2)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 2), (5, 8)])
def test_every_group_keeps_exactly_as_many_and_the_error_is_below_that_of_magnitude_pruning(keep, of):
    weight, hessian = normal(16, 128), hessian_of(128)
    found = sparsegpt.sweep(weight, factor_of(hessian), keep, of, 32, Steps())
    assert (masks.groups(found.keep, of).sum(dim=-1) == keep).all()
    assert found.quantised[~found.keep].count_nonzero() == 0
    assert found.scales.shape == found.zeros.shape == (16, 4)
    plain = sparsegpt.sweep(weight, torch.eye(128, dtype=torch.float64), keep, of, 32, Steps())

    def lost(quantised):
        delta = weight - quantised
        return float(((delta @ hessian) * delta).sum())

    assert lost(found.quantised) < 0.8 * lost(plain.quantised)
    assert 2 * found.loss == pytest.approx(lost(found.quantised))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="gptq.joint.of = 32: choose a group size that 32 divides"):
        sparsegpt.sweep(normal(2, 64), torch.eye(64, dtype=torch.float64), 2, 32, 16, Steps())
    assert math.isfinite(sparsegpt.sweep(normal(2, 64), torch.eye(64, dtype=torch.float64), 2, 32, -1, Steps()).loss)
