"""Ranks within a budget against every combination, and their worth against what errors do to predictions."""

from __future__ import annotations

import itertools

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.quantisation import eora_ranks
from tests.support.matrices import normal


def naive_best(worth, sizes, budget):
    """The most that ranks within the budget are worth, over all of them."""
    most = 0.0
    for ranks in itertools.product(*(range(len(worth[name]) + 1) for name in worth)):
        if sum(rank * sizes[name] for rank, name in zip(ranks, worth, strict=True)) <= budget:
            most = max(most, sum(float(worth[name][:rank].sum()) for rank, name in zip(ranks, worth, strict=True)))
    return most


def falling(seed, ranks=4):
    return normal(ranks, seed=seed).abs().double().sort(descending=True).values


@pytest.mark.parametrize("budget", [10, 37, 60, 95, 120])
def test_ranks_of_one_size_are_allocated_optimally(budget):
    worth = {name: falling(place) * (place + 1) for place, name in enumerate("abc")}
    ranks = eora_ranks.allocate(worth, dict.fromkeys(worth, 10), budget)
    assert list(ranks) == ["a", "b", "c"] and sum(ranks.values()) == min(budget // 10, 12)
    found = sum(float(worth[name][:rank].sum()) for name, rank in ranks.items())
    assert found == pytest.approx(naive_best(worth, dict.fromkeys(worth, 10), budget))


@pytest.mark.parametrize("seed", range(8))
def test_ranks_of_several_sizes_fit_and_are_short_of_the_best_by_less_than_one(seed):
    sizes, budget = {"a": 7, "b": 12, "c": 19}, 20 + 10 * seed
    worth = {name: falling(3 * seed + place) for place, name in enumerate(sizes)}
    ranks = eora_ranks.allocate(worth, sizes, budget)
    taken = sum(rank * sizes[name] for name, rank in ranks.items())
    assert taken <= budget
    left = [name for name, rank in ranks.items() if rank < 4]
    assert all(taken + sizes[name] > budget for name in left)  # nothing that is worth something fits any more
    found, best = sum(float(worth[name][:rank].sum()) for name, rank in ranks.items()), naive_best(worth, sizes, budget)
    assert best - max(float(gain[0]) for gain in worth.values()) < found <= best + 1e-12


def test_worthless_ranks_are_not_bought():
    worth = {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2)}
    assert eora_ranks.allocate(worth, {"a": 5, "b": 5}, 100) == {"a": 1, "b": 0}
    assert eora_ranks.allocate(worth, {"a": 6, "b": 5}, 4) == {"a": 0, "b": 0}


def test_curvature_foretells_what_a_random_error_of_the_output_does_to_the_predictions(make_model, make_windows):
    model, windows = make_model(), make_windows(24, 32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = eora_ranks.curvature(model, windows)
    assert eora_ranks.curvature(model, windows) == found
    assert all(p.grad is None and p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert list(found) == list(families.block_linears(model))
    with torch.no_grad():
        clean = model(input_ids=windows).logits.double().log_softmax(-1)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.3.mlp.down_proj"):
        generator, squares = torch.Generator().manual_seed(5), []

        def disturb(_, __, output, generator=generator, squares=squares):
            error = 1e-2 * torch.randn(output.shape, generator=generator)
            squares.append(float(error.double().square().sum()))
            return output + error

        handle = families.block_linears(model)[name].register_forward_hook(disturb)
        with torch.no_grad():
            noisy = [model(input_ids=windows).logits.double().log_softmax(-1) for _ in range(4)]
        handle.remove()
        divergence = sum(float((clean.exp() * (clean - each)).sum()) for each in noisy)
        assert divergence == pytest.approx(found[name] * sum(squares) / 2, rel=0.15)


def test_gains_are_the_spectra_on_the_compressed_models_inputs_times_the_curvature(make_model, make_windows):
    teacher, student = make_model(), make_model()
    windows = make_windows(4, 32)
    for linear in families.block_linears(student).values():
        linear.weight.data = (linear.weight * 4).round() / 4
    weights = {name: linear.weight.detach().clone() for name, linear in families.block_linears(student).items()}
    wanted = {name: linear.weight.detach().clone() for name, linear in families.block_linears(teacher).items()}
    found, importance = eora_ranks.gains(student, windows, wanted), eora_ranks.curvature(student, windows)
    assert list(found) == list(wanted)
    for name, linear in families.block_linears(student).items():
        assert torch.equal(linear.weight, weights[name])
    name, seen = "model.layers.2.mlp.down_proj", []
    families.block_linears(student)[name].register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1))
    )
    with torch.no_grad():
        student(input_ids=windows)
    lost = torch.linalg.svdvals(torch.cat(seen).double() @ (wanted[name] - weights[name]).double().T).square()
    assert torch.allclose(found[name], lost * importance[name] / (2 * 4 * 32), rtol=1e-4, atol=1e-12)
    with pytest.raises(InputError, match="in the teacher .*another model's"):
        eora_ranks.gains(student, windows, wanted | {name: wanted[name].T})


def test_ranks_are_weighed_on_the_first_windows(make_model, make_windows):
    teacher, student, windows = make_model(), make_model(seed=1), make_windows(eora_ranks.MEASURED + 3, 16)
    wanted = {name: linear.weight.detach().clone() for name, linear in families.block_linears(teacher).items()}
    found = eora_ranks.gains(student, windows, wanted)
    few = eora_ranks.gains(student, windows[: eora_ranks.MEASURED], wanted)
    assert all(torch.equal(found[name], few[name]) for name in wanted)
