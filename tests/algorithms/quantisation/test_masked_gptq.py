"""The mask-aware GPTQ against a naive one in double precision, and against round-to-nearest."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks
from tasks.algorithms.quantisation import gptqmodel_library as library
from tasks.algorithms.quantisation import gptqmodel_settings, masked_gptq, output_error
from tests.support import fake_card
from tests.support.gptq_oracle import NAME, SETTINGS, inputs, library_gptq, naive_gptq, rounded_to_nearest
from tests.support.matrices import normal, two_of_four

ORDERS = ["none", "descending", "group_aware"]


CASES = [
    {},
    {"symmetric": False},
    {"act_order": "descending"},
    {"act_order": "group_aware"},
    {"group_size": -1},
    {"group_size": -1, "act_order": "descending"},
    {"group_size": 16, "act_order": "group_aware", "symmetric": False},
    {"group_size": 128},
    {"bits": 2},
    {"bits": 2, "symmetric": False, "act_order": "descending"},
    {"bits": 3},
    {"bits": 8, "group_size": 64},
    {"mse": 2.4},
    {"mse": 2.0, "bits": 3, "symmetric": False},
    {"scale_steps": 8},
    {"scale_steps": 2, "symmetric": False},
    {"scale_steps": 4, "bits": 3, "mse": 2.4, "act_order": "group_aware"},
]


@pytest.mark.parametrize("changed", CASES, ids=str)
@pytest.mark.parametrize("pruned", [False, True])
def test_equals_a_naive_gptq_in_double_precision(changed, pruned):
    settings = SETTINGS | changed
    x = inputs(128)
    weight = normal(24, 128, seed=3)
    keep = two_of_four(weight) if pruned else torch.ones_like(weight, dtype=torch.bool)
    weight = weight * keep
    found = library_gptq(weight, x, keep, **changed)[0]
    expected = naive_gptq(weight, x, keep, **settings)
    # A value half way between two codes can fall either way in float32, and then changes what follows in its row.
    rows = ((found - expected).abs().amax(dim=1) < 1e-3 * expected.abs().max()).double().mean()
    assert rows > 0.85
    lost = [float(((weight - q.to(weight.dtype)) @ x.T).norm()) for q in (found, expected)]
    assert lost[0] == pytest.approx(lost[1], rel=0.02)
    assert found[~keep].count_nonzero() == 0


@pytest.mark.parametrize(
    "changed", [*({"act_order": order, "mse": 2.4} for order in ORDERS), {"joint": (2, 4)}], ids=str
)
def test_on_a_card_it_computes_there(changed):
    x, weight = inputs(128), normal(24, 128, seed=3)
    keep = two_of_four(weight)
    given = {"scale_steps": 8, "cycles": 2, **changed}
    given |= {} if "joint" in changed else {"keep": keep}
    expected = library_gptq(weight * keep, x, **given)
    with fake_card.installed():
        found = library_gptq(weight * keep, x, **given, device="cuda")
        assert all(isinstance(tensor, fake_card.OnCard) for tensor in found[:3])
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found[:3], expected[:3], strict=True))
        assert found[3].error == expected[3].error


@pytest.mark.parametrize("changed", [*({"act_order": order} for order in ORDERS), {"joint": (2, 4)}], ids=str)
def test_linears_of_one_input_are_quantised_as_each_alone(changed):
    x, weights = inputs(96), {name: normal(rows, 96, seed=rows) for name, rows in (("q", 24), ("k", 8), ("v", 9))}
    keep = {} if "joint" in changed else {"q": two_of_four(weights["q"]), "v": two_of_four(weights["v"])}
    weights |= {name: weights[name] * mask for name, mask in keep.items()}
    joint = changed.get("joint")
    widths = {"bits": {"q": 4, "k": 2, "v": 3}, **{key: value for key, value in changed.items() if key != "joint"}}
    config, settings = gptqmodel_settings.config(**SETTINGS | widths), masked_gptq.Settings(8, joint, 2)
    hessian = x.T @ x
    found = masked_gptq.quantise(weights, hessian.clone(), config, settings, keep)
    for name, weight in weights.items():
        alone = masked_gptq.quantise({name: weight}, hessian.clone(), config, settings, keep)[name]
        assert all(torch.equal(*pair) for pair in zip(found[name][:4], alone[:4], strict=True)), name
        assert found[name].error == alone.error
        assert len(found[name].quantised[0, found[name].index == 0].unique()) <= 2 ** {"q": 4, "k": 2, "v": 3}[name]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pruned", [False, True])
def test_unit_inputs_give_round_to_nearest_exactly(symmetric, pruned):
    weight = normal(16, 64)
    keep = two_of_four(weight) if pruned else torch.ones_like(weight, dtype=torch.bool)
    weight = weight * keep
    found = library_gptq(weight, torch.eye(64), keep, symmetric=symmetric)[0]
    expected = rounded_to_nearest(weight, 4, symmetric)
    assert torch.allclose(found.double(), expected, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", ORDERS)
def test_values_are_on_the_grid_pruned_ones_zero_and_the_error_below_round_to_nearest(bits, symmetric, act_order):
    x, weight = inputs(192), normal(32, 192, seed=5)
    keep = two_of_four(weight)
    weight = weight * keep
    settings = {"bits": bits, "symmetric": symmetric, "act_order": act_order, "group_size": 64}
    found, scales, zeros, result = library_gptq(weight, x, keep, **settings)
    error = result.error
    assert found[~keep].count_nonzero() == 0
    assert torch.equal(zeros, zeros.round())
    assert zeros.min() >= 0 and zeros.max() <= 2**bits - 1
    codes = found[:, :, None] / scales[:, None, :]  # [rows, columns, groups]: one of the row's grids must fit
    distance = (codes - codes.round()).abs() + (codes.abs() > 2**bits).float()
    assert distance.amin(dim=-1).max() < 1e-3
    rounded, _, _, nearest = library_gptq(weight, torch.eye(192), keep, **(settings | {"act_order": "none"}))
    assert nearest.error > 0
    assert error <= output_error.relative_error(weight - rounded, weight, x.T @ x)
    assert error == pytest.approx(float(((weight - found) @ x.T).norm() / (weight @ x.T).norm()), rel=1e-3)


def test_without_the_lead_the_masks_break():
    weight = normal(32, 64, seed=7)
    keep = two_of_four(weight)
    weight = weight * keep
    plain = library_gptq(weight, inputs(64), bits=8)[0]
    assert masks.violations(plain, 2, 4) > 0
    led = library_gptq(weight, inputs(64), keep, bits=8)[0]
    assert masks.violations(led, 2, 4) == 0


def test_the_library_is_put_back():
    linear = library.torch_linear.TorchLinear
    before = list(linear.SUPPORTS_DTYPES), library.torch_linear.torch_compile
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(KeyError), library.loading_in_float32():
        assert before[0] != linear.SUPPORTS_DTYPES
        random.random(), np.random.rand(), torch.rand(1), torch.set_num_threads(2)
        raise KeyError
    assert before == (linear.SUPPORTS_DTYPES, library.torch_linear.torch_compile)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2]) and torch.get_num_threads() == states[3]


@pytest.mark.parametrize("columns", [64, 256, 512])
def test_the_number_of_threads_does_not_change_the_inverse_factor(columns):
    x = inputs(columns)
    hessian, config = x.T @ x, gptqmodel_settings.config(**SETTINGS)
    factors, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            gptq = masked_gptq._Gptq(
                torch.zeros(8, columns), hessian, config, masked_gptq.PLAIN, masked_gptq._Factors()
            )
            factors.append(gptq.hessian_inverse(hessian.clone())[0])
    finally:
        torch.set_num_threads(before)
    assert factors[0].dtype == torch.float32
    assert torch.equal(factors[0], factors[1]) and torch.equal(factors[0], factors[2])


def test_masks_that_do_not_fit_are_refused():
    weight = normal(8, 32)
    with pytest.raises(InputError, match=r"\d+ pruned weights of .* are not zero"):
        library_gptq(weight, inputs(32), two_of_four(weight))
    with pytest.raises(InputError, match="mask of .* is .* its weight"):
        library_gptq(weight, inputs(32), torch.ones(8, 16, dtype=torch.bool))


@pytest.mark.parametrize("joint", [None, (2, 4)])
def test_a_hessian_that_can_not_be_inverted_is_no_silent_rounding(joint):
    x = inputs(32)
    x[0, 0] = float("nan")
    with pytest.raises(InputError, match="raise gptq.damp"):
        library_gptq(normal(8, 32), x, joint=joint)


@pytest.mark.parametrize("act_order", ORDERS)
def test_widths_of_single_linears_are_asked_for_by_their_whole_names(act_order):
    names = [f"model.layers.{i}.mlp.up_proj" for i in (1, 10, 11)]
    widths = dict(zip(names, (4, 2, 4), strict=True))
    config = gptqmodel_settings.config(**SETTINGS | {"bits": widths, "act_order": act_order})
    assert config.bits == 4
    assert [config.dynamic_get(name, "bits", config.bits) for name in names] == [4, 2, 4]
    assert config.dynamic_get("model.layers.10.mlp.up_project", "bits", 0) == 0
    assert config.dynamic_get("a.model.layers.10.mlp.up_proj", "bits", 0) == 0
    assert config.act_group_aware is (act_order == "group_aware")


def test_equal_widths_need_no_overrides():
    config = gptqmodel_settings.config(**SETTINGS | {"bits": {NAME: 3}})
    assert config.bits == 3 and not config.dynamic


def test_group_aware_without_groups_is_refused():
    with pytest.raises(InputError, match="group_size = -1"):
        gptqmodel_settings.config(**SETTINGS | {"act_order": "group_aware", "group_size": -1})
