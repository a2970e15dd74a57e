"""The multiple-choice knapsack against every combination, and against dynamic programming over the budget."""

import itertools

import numpy as np
import pytest

from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation import allocation


def instance(seed, layers, widths=(2, 3, 4, 8), unit=1):
    random = np.random.default_rng(seed)
    weights = {f"layer.{index}": int(random.integers(10, 400)) for index in range(layers)}
    sizes = {
        name: {bits: unit * (count * bits + int(random.integers(0, 9))) for bits in widths}
        for name, count in weights.items()
    }
    costs = {
        name: {bits: float(np.exp(1.5 * random.normal()) * 4.0**-bits * random.uniform(0.9, 1.1)) for bits in widths}
        for name in weights
    }
    return costs, sizes


def total(table, chosen):
    return sum(table[name][choice] for name, choice in chosen.items())


def budgets(sizes, shares):
    least = sum(min(row.values()) for row in sizes.values())
    most = sum(max(row.values()) for row in sizes.values())
    return [int(least + share * (most - least)) for share in shares]


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_combinations(seed):
    costs, sizes = instance(seed, 5)
    for budget in budgets(sizes, (0, 0.05, 0.3, 0.6, 0.9, 1)):
        chosen = allocation.allocate(costs, sizes, budget)
        assert list(chosen) == list(costs)
        assert total(sizes, chosen) <= budget
        every = (dict(zip(costs, choices, strict=True)) for choices in itertools.product((2, 3, 4, 8), repeat=5))
        best = min(total(costs, choices) for choices in every if total(sizes, choices) <= budget)
        assert total(costs, chosen) == pytest.approx(best, rel=1e-12)


def by_dynamic_programming(costs, sizes, budget, unit):
    """The least total cost: cost[b] over budgets b in units."""
    least = np.zeros(budget // unit + 1)
    for name, row in costs.items():
        after = np.full_like(least, np.inf)
        for choice, cost in row.items():
            size = sizes[name][choice] // unit
            if size < len(least):
                after[size:] = np.minimum(after[size:], least[: len(least) - size] + cost)
        least = after
    return least[-1]


@pytest.mark.parametrize(("seed", "unit"), [(0, 1), (2, 1000), (3, 100_003)])
def test_models_of_many_layers(seed, unit):
    costs, sizes = instance(seed, 112, unit=unit)
    for budget in budgets(sizes, (0.02, 0.7, 0.95)):
        chosen = allocation.allocate(costs, sizes, budget)
        assert total(sizes, chosen) <= budget
        best = by_dynamic_programming(costs, sizes, budget, unit)
        assert total(costs, chosen) == pytest.approx(best, rel=1e-9)
        assert allocation.allocate(costs, sizes, budget) == chosen


@pytest.mark.parametrize("spread", [1, 1e-3, 1e-6, 1e-9])
def test_choices_that_break_the_model_do_not_blur_the_others(spread):
    costs, sizes = instance(29, 40)
    costs = {
        name: {bits: 5.0 if bits == 2 else cost * spread for bits, cost in row.items()} for name, row in costs.items()
    }
    for budget in budgets(sizes, (0.7, 0.95)):
        chosen = allocation.allocate(costs, sizes, budget)
        assert total(costs, chosen) == pytest.approx(by_dynamic_programming(costs, sizes, budget, 1), rel=1e-9, abs=0)


def test_one_byte_decides():
    costs = {"a": {4: 1.0, 8: 0.0}, "b": {4: 1.0, 8: 0.5}}
    sizes = {"a": {4: 40_000_001, 8: 80_000_001}, "b": {4: 40_000_000, 8: 80_000_000}}
    assert allocation.allocate(costs, sizes, 160_000_001) == {"a": 8, "b": 8}
    assert allocation.allocate(costs, sizes, 160_000_000) == {"a": 8, "b": 4}
    assert allocation.allocate(costs, sizes, 120_000_000) == {"a": 4, "b": 4}


def test_a_larger_choice_that_costs_more_is_not_taken():
    costs = {"a": {"small": 0.2, "large": 0.3}, "b": {"small": 0.0, "large": 0.0}}
    sizes = {"a": {"small": 1, "large": 2}, "b": {"small": 1, "large": 2}}
    assert allocation.allocate(costs, sizes, 10) == {"a": "small", "b": "small"}


def test_choices_can_differ_per_layer_and_be_one():
    costs = {"a": {0: 1.0, 4: 0.5}, "b": {16: 3.0}}
    assert allocation.allocate(costs, {"a": {0: 0, 4: 10}, "b": {16: 5}}, 15) == {"a": 4, "b": 16}
    assert allocation.allocate(costs, {"a": {0: 0, 4: 10}, "b": {16: 5}}, 14) == {"a": 0, "b": 16}
    assert allocation.allocate({}, {}, 0) == {}


def test_a_budget_that_nothing_fits_is_told():
    costs, sizes = instance(0, 3)
    least = sum(min(row.values()) for row in sizes.values())
    with pytest.raises(InputError, match=f"{least} bytes, the budget is {least - 1} bytes"):
        allocation.allocate(costs, sizes, least - 1)


def test_costs_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="the cost of 4 is nan"):
        allocation.allocate({"a": {4: float("nan")}}, {"a": {4: 1}}, 1)
    with pytest.raises(ValueError, match="sizes for"):
        allocation.allocate({"a": {4: 1.0}}, {"a": {8: 1}}, 1)
