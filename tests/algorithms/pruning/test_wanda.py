"""WANDA against loops, magnitude pruning, and hooks on the whole model's forward."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.pruning import wanda
from tests.support.matrices import normal


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.29, 0.5, 0.75, 0.99])
def test_unstructured_equals_a_loop_and_prunes_exactly_the_asked_of_each_row(sparsity):
    weight, norm = normal(7, 100), normal(100, seed=1).abs()
    found = wanda.unstructured(wanda.metric(weight, norm), sparsity).keep
    for row in range(7):
        order = sorted(range(100), key=lambda col: abs(float(weight[row, col])) * float(norm[col]))
        assert sorted(order[: round(100 * sparsity)]) == (~found[row]).nonzero().flatten().tolist()


def test_what_does_not_divide_is_rounded_down():
    assert (wanda.unstructured(normal(3, 7).abs().double(), 0.5).keep.sum(dim=1) == 4).all()


SELECTS = {
    "n_m": lambda values: wanda.n_m(values, 2, 4),
    "unstructured": lambda values: wanda.unstructured(values, 0.5),
    "cumulative": lambda values: wanda.cumulative(values, 0.5),
}


@pytest.mark.parametrize("name", SELECTS)
def test_unit_activations_are_magnitude_pruning(name):
    weight = normal(9, 32)
    found = SELECTS[name](wanda.metric(weight, torch.ones(32)))
    assert torch.equal(found.keep, SELECTS[name](weight.double().abs()).keep)


@pytest.mark.parametrize("name", SELECTS)
@pytest.mark.parametrize("factor", [0.001, 3, 4096])
def test_scaling_the_activations_changes_nothing(name, factor):
    weight, norm = normal(9, 32), normal(32, seed=1).abs()
    assert torch.equal(
        SELECTS[name](wanda.metric(weight, norm * factor)).keep, SELECTS[name](wanda.metric(weight, norm)).keep
    )


@pytest.mark.parametrize("name", SELECTS)
def test_the_lower_index_of_equals_stays(name):
    keep = SELECTS[name](torch.ones(2, 8, dtype=torch.float64)).keep
    expected = [1, 1, 0, 0, 1, 1, 0, 0] if name == "n_m" else [1, 1, 1, 1, 0, 0, 0, 0]
    assert keep.int().tolist() == [expected, expected]


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9])
def test_cumulative_prunes_each_row_up_to_alpha_of_its_metric_and_the_asked_in_all(sparsity):
    values = wanda.metric(normal(13, 40), normal(40, seed=1).abs()) * torch.logspace(-3, 3, 13)[:, None]
    found = wanda.cumulative(values, sparsity)
    assert int((~found.keep).sum()) == int(13 * 40 * sparsity)
    for row in range(13):
        total, pruned = sum(values[row].tolist()), 0.0
        for position, value in enumerate(sorted(values[row].tolist())):
            if pruned + value > found.alpha * total:
                assert int((~found.keep[row]).sum()) == position
                break
            pruned += value


def test_cumulative_prunes_more_of_a_row_with_dominant_weights():
    values = torch.stack([torch.ones(40), torch.full((40,), 0.01)]).double()
    values[1, :4] = 10
    zeros = (~wanda.cumulative(values, 0.5).keep).sum(dim=1)
    assert int(zeros[1]) == 36 > int(zeros[0])


def test_inputs_that_never_fire_are_pruned_first():
    values = wanda.metric(normal(4, 8), torch.tensor([0.0, 1, 1, 1, 0, 1, 1, 0]))
    for name, select in SELECTS.items():
        if name != "n_m":
            assert not select(values).keep[:, [0, 4, 7]].any()


def test_a_matrix_of_zeros_does_not_break_the_search():
    assert not wanda.cumulative(torch.zeros(3, 8, dtype=torch.float64), 0.5).keep.any()


@pytest.mark.parametrize("architecture", sorted(families.BY_HEART))
def test_blocks_are_pruned_on_the_activations_of_the_pruned_ones_before_them(architecture, make_model, make_windows):
    model, naive, ids = make_model(architecture), make_model(architecture), make_windows(3, 20)
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    done, found = [], {}

    def pruned(index, block, selections):
        assert list(block) == list(selections)
        done.append(index)
        found.update(selections)

    wanda.prune(model, ids, lambda values: wanda.n_m(values, 2, 4), pruned, batch=2)
    for linears in families.linears_by_block(naive):
        seen = {}
        handles = [
            linear.register_forward_pre_hook(lambda _, x, name=name, seen=seen: seen.__setitem__(name, x[0]))
            for name, linear in linears.items()
        ]
        with torch.no_grad():
            naive(input_ids=ids)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            scores = linear.weight.data.abs() * seen[name].flatten(0, 1).norm(dim=0)
            best = scores.reshape(-1, 4).topk(2, dim=-1).indices
            keep = torch.zeros(best.shape[0], 4, dtype=torch.bool).scatter_(1, best, True).reshape(scores.shape)
            linear.weight.data *= keep
    assert done == [0, 1, 2, 3]
    pruned = families.block_linears(model)
    assert list(found) == list(pruned)
    for name, linear in families.block_linears(naive).items():
        assert torch.equal(pruned[name].weight, linear.weight)
        assert torch.equal(pruned[name].weight, dense[f"{name}.weight"] * found[name].keep)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in found:
            assert torch.equal(parameter, dense[name])


def test_inputs_that_do_not_divide_name_the_linear(make_model, make_windows):
    model = make_model(intermediate_size=50)
    with pytest.raises(InputError, match=r"mlp.down_proj: 50 inputs are not divisible by of = 4"):
        wanda.prune(model, make_windows(1, 8), lambda values: wanda.n_m(values, 2, 4), lambda *_: None)


def test_nan_is_refused(make_model, make_windows):
    model = make_model()
    families.blocks(model)[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers.1.self_attn.q_proj.*not finite"):
        wanda.prune(model, make_windows(1, 8), lambda values: wanda.n_m(values, 2, 4), lambda *_: None)
