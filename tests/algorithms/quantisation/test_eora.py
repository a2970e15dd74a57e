"""EoRA of one matrix against its closed forms."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation import eora
from tests.support.matrices import normal, rest


def inputs(columns, tokens=256):
    return normal(tokens, columns, seed=1) @ normal(columns, columns, seed=2) * normal(columns, seed=3).exp()


def test_full_rank_restores_the_weight():
    x, delta = inputs(24), normal(40, 24)
    a, b = eora.factors(delta, x.double().T @ x.double(), 24)
    assert rest(delta, a, b, x) < 1e-4 * float((x @ delta.T).norm())
    assert torch.allclose(b @ a, delta, atol=1e-2)


def test_full_rank_restores_the_weight_on_the_range_of_singular_inputs():
    x = inputs(24)
    x[:, 5] = 0  # an input that never fires
    x[:, 7] = x[:, 8]
    delta = normal(40, 24)
    a, b = eora.factors(delta, x.double().T @ x.double(), 24)
    assert rest(delta, a, b, x) < 1e-4 * float((x @ delta.T).norm())
    assert a.isfinite().all() and a[:, 5].abs().max() < 1e-4


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_unit_moments_give_the_truncated_svd(rank):
    delta = normal(16, 24)
    a, b = eora.factors(delta, 7.0 * torch.eye(24), rank)
    u, s, v = torch.linalg.svd(delta.double())
    expected = u[:, :rank] * s[:rank] @ v[:rank]
    assert torch.allclose((b @ a).double(), expected, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_error_is_the_least_that_any_matrix_of_that_rank_leaves(rank):
    # Eckart-Young on the outputs: X delta^T has rank min(...), and a B A^T of rank r can't beat its tail.
    x, delta = inputs(24), normal(16, 24)
    a, b = eora.factors(delta, x.double().T @ x.double(), rank)
    tail = torch.linalg.svdvals(x.double() @ delta.double().T)[rank:]
    assert rest(delta, a, b, x) == pytest.approx(float(tail.norm()), rel=1e-3)


def test_the_error_falls_with_the_rank():
    x, delta = inputs(24), normal(16, 24)
    moments = x.double().T @ x.double()
    errors = [rest(delta, *eora.factors(delta, moments, rank), x) for rank in range(1, 17)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))


def test_signs_are_fixed_and_scale_of_the_moments_does_not_matter():
    x, delta = inputs(24), normal(16, 24)
    moments = x.double().T @ x.double()
    a, b = eora.factors(delta, moments, 6)
    assert (a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all()
    again, _ = eora.factors(delta, moments * 3, 6)
    assert torch.allclose(a, again, rtol=1e-3, atol=1e-4)


def test_a_rank_above_the_smaller_side_is_refused():
    with pytest.raises(InputError, match="eora.rank = 17 is above 16"):
        eora.factors(normal(16, 24), torch.eye(24), 17)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_the_spectrum_is_what_each_rank_removes_of_the_squared_output_error(shape):
    x, delta = inputs(shape[1]), normal(*shape)
    moments = x.double().T @ x.double()
    removed = eora.spectrum(delta, moments)
    errors = [rest(delta, *eora.factors(delta, moments, rank), x) ** 2 for rank in range(17)]
    assert len(removed) == 16 and float(removed.sum()) == pytest.approx(errors[0], rel=1e-6)
    for rank in range(16):
        assert float(removed[rank]) == pytest.approx(errors[rank] - errors[rank + 1], rel=1e-2, abs=1e-5 * errors[0])


def test_refit_is_least_squares_on_the_outputs():
    x, delta = inputs(24), normal(16, 24)
    a = (eora.factors(delta, x.double().T @ x.double(), 4)[0] * 2).round() / 2
    b = eora.refit(delta, x.double().T @ x.double(), a)
    wanted = torch.linalg.lstsq((x @ a.T).double(), (x @ delta.T).double()).solution.T
    assert torch.allclose(b.double(), wanted, rtol=1e-4, atol=1e-5)
    a[2] = 0
    assert eora.refit(delta, x.double().T @ x.double(), a)[:, 2].abs().max() < 1e-6
