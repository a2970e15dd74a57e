"""Coordinate descent: against a loop over single weights, and what no single step can still improve."""

from __future__ import annotations

import itertools

import pytest
import torch

from tasks.algorithms.quantisation import descent


def problem(rows=6, cols=24, bits=3, group=8, seed=0, asymmetric=False, pruned=False):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    inputs = torch.randn(64, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    hessian = inputs.T @ inputs / 64 + 0.1 * torch.eye(cols)
    keep = torch.rand(rows, cols, generator=generator) > 0.5 if pruned else None
    if pruned:
        weight *= keep
    index = torch.arange(cols) // group
    scales = weight.view(rows, -1, group).abs().amax(2).clamp(min=1e-3) / 2 ** (bits - 1)  # all may be pruned
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if asymmetric:
        zeros += torch.randint(-1, 2, zeros.shape, generator=generator)
        index = index[torch.randperm(cols, generator=generator)]
    start = on_grid(weight / scales[:, index], scales, zeros, index, bits)
    if pruned:
        start *= keep
    return weight, start, hessian, descent.Grid(scales, zeros, index, bits), keep


def on_grid(steps, scales, zeros, index, bits):
    codes = (torch.round(steps) + zeros[:, index]).clamp(0, 2**bits - 1)
    return scales[:, index] * (codes - zeros[:, index])


def error(weight, quantised, hessian):
    delta = (weight - quantised).double()
    return float(((delta @ hessian.double()) * delta).sum())


def by_loops(weight, start, hessian, grid, keep, cycles):
    """Every code of every weight tried, the whole error computed each time."""
    scales, zeros, index, bits = grid
    found = start.double().clone()
    for _, column, row in itertools.product(range(cycles), range(weight.shape[1]), range(weight.shape[0])):
        if keep is not None and not keep[row, column]:
            continue
        group = index[column]
        values = [scales[row, group].double() * (code - zeros[row, group]) for code in range(2**bits)]
        tried = []
        for value in values:
            changed = found[row].clone()
            changed[column] = value
            tried.append(error(weight[row : row + 1], changed[None], hessian))
        found[row, column] = values[tried.index(min(tried))]
    return found


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_every_step_is_the_best_of_all_codes(pruned, asymmetric):
    *given, keep = problem(rows=3, cols=16, asymmetric=asymmetric, pruned=pruned)
    found = descent.descend(*given, cycles=2, keep=keep)
    assert torch.allclose(found.double(), by_loops(*given, keep, 2), atol=1e-6)


@pytest.mark.parametrize("block", [1, 5, 128])
def test_blocks_change_nothing(monkeypatch, block):
    *given, keep = problem(pruned=True)
    expected = descent.descend(*given, cycles=3, keep=keep)
    monkeypatch.setattr(descent, "BLOCK", block)
    assert torch.allclose(descent.descend(*given, cycles=3, keep=keep), expected)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_falls_with_every_cycle_until_no_single_code_lowers_it(seed):
    *given, keep = problem(seed=seed, pruned=seed % 2 == 1)
    weight, start, hessian, grid = given
    scales, zeros, index, bits = grid
    errors = [error(weight, descent.descend(*given, cycles=n, keep=keep), hessian) for n in (0, 1, 2, 50)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    assert errors[0] == pytest.approx(error(weight, start, hessian))
    last = descent.descend(*given, cycles=50, keep=keep)
    assert torch.allclose(by_loops(weight, last, hessian, grid, keep, 1), last.double(), atol=1e-6)
    assert torch.allclose(on_grid(last / scales[:, index], scales, zeros, index, bits), last, atol=1e-6)
    if keep is not None:
        assert last[~keep].count_nonzero() == 0


def test_without_correlations_it_is_round_to_nearest():
    weight, start, hessian, grid, _ = problem()
    scales, zeros, index, _ = grid
    wrong = scales[:, index] * (torch.zeros_like(start) - zeros[:, index])  # all codes 0
    found = descent.descend(weight, wrong, hessian.diagonal().diag(), grid, 1)
    assert torch.allclose(found, start, atol=1e-6)


@pytest.mark.parametrize("cols", [40, 128, 296])
@pytest.mark.parametrize("options", [{}, {"asymmetric": True, "pruned": True}])
def test_columns_hear_of_steps_at_once_or_in_groups(cols, options, monkeypatch):
    """The gradient computed anew after every column, against blocks and groups of columns."""
    weight, start, hessian, grid, keep = problem(rows=9, cols=cols, bits=4, **options)
    hessian = hessian / hessian.diagonal().mean()
    expected = start.double().clone()
    for _, column in itertools.product(range(3), range(cols)):
        gradient = (weight.double() - expected) @ hessian.double()
        value = grid.nearest((expected[:, column] + gradient[:, column] / hessian[column, column]).float(), column)
        expected[:, column] = value if keep is None else value * keep[:, column]
    found = descent.descend(weight, start, hessian, grid, 3, keep)
    assert torch.equal(found, expected.float())
