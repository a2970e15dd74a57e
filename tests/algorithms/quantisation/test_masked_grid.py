"""The grid that pruned weights have no say in: against its definition, and within GPTQ."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.quantisation import gptqmodel_settings, masked_grid, output_error, rounding
from tests.support.gptq_oracle import SETTINGS, inputs, library_gptq, rounded_to_nearest
from tests.support.matrices import normal, two_of_four


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("mse", "steps"), [(0.0, None), (2.0, None), (0.0, 4)])
def test_nearest_is_the_same_grid_without_a_hessian(bits, symmetric, mse, steps):
    weight = normal(8, 64)
    keep = two_of_four(weight)
    weight = weight * keep
    settings = gptqmodel_settings.config(**SETTINGS | {"symmetric": symmetric, "mse": mse, "bits": 8})
    found = masked_grid.nearest(weight, keep, settings, bits, steps)
    assert torch.allclose(found.double(), rounded_to_nearest(weight, bits, symmetric, mse, steps), atol=1e-6)
    assert settings.bits == 8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_scales_are_the_snapped_ones_and_gptq_makes_up_for_it(symmetric, steps):
    x, weight = inputs(64), normal(32, 64, seed=4)
    found, scales, zeros, result = library_gptq(weight, x, scale_steps=steps, symmetric=symmetric)
    exponents = scales.double().log2() * steps
    assert torch.allclose(exponents, exponents.round(), atol=steps * 1e-3)
    assert torch.equal(scales, rounding.snap(scales, steps).float())
    codes = found.reshape(32, 2, 32) / scales[:, :, None]
    assert torch.equal(codes, codes.round())
    free = library_gptq(weight, x, symmetric=symmetric)
    late = (torch.round(free[0].reshape(32, 2, 32) / free[1][:, :, None]) * scales[:, :, None]).reshape(32, 64)
    assert result.error < output_error.relative_error(weight - late, weight, x.T @ x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_of_scales_ignores_pruned_weights_and_lowers_the_error(symmetric):
    weight, x = normal(32, 64, seed=4) ** 3, torch.eye(64)
    keep = two_of_four(weight)
    dense = weight.clone()
    dense[~keep] = 0
    plain, searched = (library_gptq(dense, x, keep, symmetric=symmetric, bits=3, mse=mse) for mse in (0.0, 2.0))
    assert searched[3].error < 0.99 * plain[3].error
    packed = dense[keep].reshape(32, 32)  # the same kept weights without the pruned ones between them
    alone = library_gptq(packed, torch.eye(32), symmetric=symmetric, bits=3, mse=2.0, group_size=16)
    assert torch.equal(searched[1], alone[1]) and torch.equal(searched[2], alone[2])


def test_scales_too_small_for_float16_are_its_smallest():
    weight = normal(4, 64) * 1e-9
    found, scales = library_gptq(weight, torch.eye(64))[:2]
    assert scales.min() == 2.0**-24
    assert found.isfinite().all()


def test_a_symmetric_group_without_negative_weights_keeps_its_largest():
    weight = normal(8, 64).abs() + 0.1
    found = library_gptq(weight, torch.eye(64))[0]
    assert (found - weight).abs().max() < 0.6 * 2 * weight.max() / 15  # its range ends half a step below it


def groups(kind):
    """Groups of 64 weights of 200 rows, two of them without negative or without any weights."""
    x = normal(200, 64, seed=7)
    x[3], x[4] = 0, x[4].abs()
    return {"normal": x, "outliers": x**5, "pruned": x * two_of_four(x), "uniform": x.sign() * x.abs().frac()}[kind]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["normal", "outliers", "pruned", "uniform"])
@pytest.mark.parametrize("mse", [2.0, 2.4, 4.0])
def test_the_search_that_ends_early_finds_what_the_whole_one_does(bits, symmetric, kind, mse, monkeypatch):
    settings = gptqmodel_settings.config(**SETTINGS | {"symmetric": symmetric, "mse": mse, "bits": bits})
    found = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(masked_grid.MaskedQuantizer, "_shrink", lambda quantiser, _: quantiser.maxshrink)
        quantiser = masked_grid.MaskedQuantizer(settings, "", None)
        quantiser.configure(perchannel=True)
        if not whole and bits > 3:  # 80 ranges are there to be tried
            assert quantiser._shrink(groups(kind)) < 0.5
        quantiser.find_params(groups(kind), weight=True)
        assert quantiser.maxshrink == 0.8
        found.append((quantiser.scale, quantiser.zero))
    assert all(torch.equal(early, late) for early, late in zip(*found, strict=True))
