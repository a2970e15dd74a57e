"""Codes trained through their rounding: against autograd on a plain expression, and loops over single weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tasks.algorithms.model import families
from tasks.algorithms.quantisation.codes import Codes
from tasks.algorithms.recovery import qad, training
from tests.algorithms.recovery.test_masked_lora import RECIPE, llama, text_tokens


def made(rows=6, cols=16, bits=3, group=8, zeros=False, order=False, seed=0):
    """Random codes, and weights near what they stand for."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=draw, dtype=torch.uint8)
    scales = (0.05 + torch.rand(rows, cols // group, generator=draw)).half()
    points = torch.randint(0, 2**bits, scales.shape, generator=draw, dtype=torch.uint8) if zeros else None
    index = torch.randperm(cols, generator=draw) // group if order else None
    start = Codes(codes, scales, points, bits, group, index)
    weight = start.values() + 0.6 * scales.float().mean() * torch.randn(rows, cols, generator=draw)
    return start, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("zeros", "order"), [(False, False), (True, False), (False, True), (True, True)])
def test_it_begins_with_the_values_and_the_codes_that_there_are(bits, zeros, order):
    start, weight = made(bits=bits, zeros=zeros, order=order)
    grid = qad.GridLinear(start, weight)
    assert torch.equal(grid.weight, start.values())
    assert torch.equal(grid.codes(), start.codes)
    # and each latent is where its weight is, or as far within the code's cell as that is outside of it
    latent = grid.latent.detach()
    for row in range(2):
        for col in range(0, 16, 3):
            group = int(start.group_index[col]) if order else col // start.group_size
            scale = float(start.scales[row, group])
            points = float(start.zeros[row, group]) if zeros else 2 ** (bits - 1)
            step = float(start.codes[row, col]) - points
            place = float(weight[row, col]) / scale - step
            if abs(place) >= 1:
                place = 0.0
            elif abs(place) > 0.5:
                place = place - 2 * (place - 0.5) if place > 0 else place + 2 * (-0.5 - place)
            wanted = step + min(max(place, -0.499), 0.499)
            assert float(latent[row, col]) == pytest.approx(wanted, abs=1e-5)


def test_of_a_cell_s_codes_few_are_near_its_side():
    start, weight = made(rows=200, cols=64)
    place = qad.GridLinear(start, weight).latent.detach() - (start.codes.float() - 4)
    distance = (weight - start.values()).abs() / start.scales.float().repeat_interleave(8, dim=1)
    assert float((distance > 0.5).float().mean()) > 0.3
    assert float((place.abs() > 0.49).float().mean()) < 0.05  # 0.02 where they were spread evenly


@pytest.mark.parametrize("pruned", [False, True])
def test_the_gradient_is_that_of_the_values_times_the_scale(pruned):
    start, weight = made()
    kept = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) > 0.5 if pruned else None
    if pruned:
        start = start._replace(codes=torch.where(kept, start.codes, 4).to(torch.uint8))
    a, b = torch.randn(2, 16), torch.randn(6, 2)
    grid = qad.GridLinear(start, weight, kept, torch.randn(6), (a, b))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    values = grid.weight.detach().requires_grad_()
    y = x @ values.T + grid.bias + x @ (b @ a).T
    torch.testing.assert_close(grid(x), y)
    y.square().sum().backward()
    grid(x).square().sum().backward()
    wide = start.scales.float().repeat_interleave(8, dim=1)
    wanted = values.grad * wide * (1 if kept is None else kept)
    torch.testing.assert_close(grid.latent.grad, wanted)
    if pruned:
        assert torch.equal(grid.weight == 0, ~kept | (start.codes == 4))


def test_beyond_the_last_code_there_is_no_gradient_and_the_value_stays():
    start, weight = made(bits=2)
    grid = qad.GridLinear(start, weight)
    with torch.no_grad():
        grid.latent.copy_(torch.linspace(-4, 4, 96).view(6, 16))
    grid.weight.sum().backward()
    inside = (grid.latent >= -2.5) & (grid.latent <= 1.5)
    assert torch.equal(grid.latent.grad != 0, inside)
    assert int(grid.codes().max()) == 3 and int(grid.codes().min()) == 0
    assert torch.equal(grid.weight, start._replace(codes=grid.codes()).values())


def quantised(model, bits=2, kept=None):
    """The model with a coarse grid in each of its blocks' linears, and the weights as they were."""
    for name, linear in families.block_linears(model).items():
        weight = linear.weight.detach().clone()
        scales = (weight.abs().amax(dim=1, keepdim=True) / 2 ** (bits - 1)).half()
        codes = (weight / scales.float()).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
        keep = None if kept is None else kept[name]
        if keep is not None:
            codes[~keep] = 2 ** (bits - 1)
        start = Codes(codes.to(torch.uint8), scales, None, bits, weight.shape[1], None)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, qad.GridLinear(start, weight, keep))
    return model


def test_it_comes_nearer_to_its_teacher_and_only_codes_move():
    teacher = llama()
    kept = {name: torch.rand(linear.weight.shape) > 0.3 for name, linear in families.block_linears(llama()).items()}
    model = quantised(copy.deepcopy(teacher), kept=kept)
    ids = text_tokens()[:256].view(4, 64).long()

    def apart():
        with torch.no_grad():
            said, taught = (each(input_ids=ids).logits.log_softmax(-1) for each in (model, teacher))
        return float((taught.exp() * (taught - said)).sum(-1).mean())

    before, frozen = apart(), copy.deepcopy(model.state_dict())
    recipe = training.Recipe(**vars(RECIPE) | {"steps": 40, "learning_rate": 0.05, "distillation": 1.0})
    training.train(qad.trainable(model), text_tokens(), recipe, teacher=teacher)
    assert apart() < 0.8 * before
    for name, value in model.state_dict().items():
        assert name.endswith("latent") or torch.equal(value, frozen[name])
    for name, grid in qad.grids(model).items():
        assert torch.equal(grid.weight == 0, ~kept[name] | (grid.codes() == 2)), name
        assert torch.equal(grid.weight, grid.start._replace(codes=grid.codes()).values())


def test_the_same_training_gives_the_same_codes():
    found = []
    for _ in range(2):
        model = quantised(llama())
        training.train(qad.trainable(model), text_tokens(), RECIPE)
        found.append({name: grid.codes() for name, grid in qad.grids(model).items()})
    assert all(torch.equal(found[0][name], codes) for name, codes in found[1].items())


def test_a_model_without_grids_has_nothing_to_train():
    assert qad.grids(nn.Sequential(nn.Linear(2, 2))) == {}
