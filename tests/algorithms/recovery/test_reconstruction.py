"""Block reconstruction against independent answers: activations of whole models, closed cases, invariants."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, layers
from tasks.algorithms.pruning import depth_prune
from tasks.algorithms.recovery import masked_lora, reconstruction, training

RECIPE = training.Recipe(
    steps=40, batch=4, length=16, learning_rate=0.01, warmup=0.1, distillation=0.0, temperature=1.0, seed=7
)
TOKENS = torch.randint(96, (600,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def teacher(make_model):
    model = make_model()
    # Uneven inputs, as real models have them: with equal ones the kept weights can't make up for the pruned ones.
    model.model.embed_tokens.weight.data *= torch.logspace(0, -2, 32)
    return model


def prune(model: nn.Module) -> dict[str, torch.Tensor]:
    """Zero two random weights of each group of four, in place; returns the keep masks."""
    generator = torch.Generator().manual_seed(3)
    keep = {}
    for name, linear in families.block_linears(model).items():
        order = torch.rand(linear.weight.numel() // 4, 4, generator=generator).argsort(1)
        keep[name] = (order < 2).reshape(linear.weight.shape)
        linear.weight.data *= keep[name]
    return keep


def reconstruct(model, teacher, keep, kept=range(4), recipe=RECIPE, **changes):
    settings = {"targets": list(families.block_linears(model)), "keep": keep, "kept": kept} | changes
    return reconstruction.reconstruct(model, teacher, TOKENS, recipe, **settings)


def boundaries(model, ids):
    """The hidden states after each block."""
    seen = []
    final = layers.walk(model, ids, lambda index, block, inputs: seen.append(inputs.hidden.clone()))
    return [*seen[1:], final]


def error(ours, theirs):
    return float((ours - theirs).square().sum() / theirs.square().sum())


def test_masks_hold_exactly_and_only_the_targets_change(teacher):
    model = copy.deepcopy(teacher)
    keep = prune(model)
    targets = masked_lora.select(model, "mlp")
    del keep[targets[-1]]  # a dense linear among pruned ones
    before = copy.deepcopy(model.state_dict())
    dense = copy.deepcopy(teacher.state_dict())
    reconstruct(model, teacher, keep, targets=targets)
    for name, mask in keep.items():
        assert torch.count_nonzero(model.get_submodule(name).weight[~mask]) == 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {f"{name}.weight" for name in targets}
    assert torch.count_nonzero(model.get_submodule(targets[-1]).weight == 0) < 10
    assert all(torch.equal(dense[name], value) for name, value in teacher.state_dict().items())
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())


def test_the_error_of_every_block_falls_on_text_it_was_not_trained_on(teacher):
    model = copy.deepcopy(teacher)
    keep = prune(model)
    pruned = copy.deepcopy(model)
    history = reconstruct(model, teacher, keep)
    ids = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(99))
    wanted, before, after = (boundaries(each, ids) for each in (teacher, pruned, model))
    for target, start, end in zip(wanted, before, after, strict=True):
        assert error(end, target) < 0.9 * error(start, target)
    assert [row["step"] for row in history] == list(range(1, 161))
    assert set(history[0]) == set(training.COLUMNS)
    for row in history:
        assert row["loss"] == row["hidden"] and math.isnan(row["causal_lm"]) and math.isnan(row["distillation"])


def test_the_first_loss_of_each_block_is_that_of_the_reconstructed_blocks_before_it(teacher):
    """Each block's inputs are the student's own, its target the dense model's: redone with whole models."""
    model = copy.deepcopy(teacher)
    keep = prune(model)
    pruned = copy.deepcopy(model)
    recipe = training.Recipe(**vars(RECIPE) | {"steps": 3})
    history = reconstruct(model, teacher, keep, recipe=recipe)
    ids = training.sample(TOKENS, 12, 16, torch.Generator().manual_seed(7))
    wanted = boundaries(teacher, ids)
    for index in range(4):
        mixed = copy.deepcopy(model)
        mixed.model.layers[index] = pruned.model.layers[index]
        got = boundaries(mixed, ids)[index]
        assert history[3 * index]["loss"] == pytest.approx(error(got[:4], wanted[index][:4]), rel=1e-4)
        assert history[3 * index]["learning_rate"] == training.rate(1, recipe)


def test_a_dense_model_is_left_as_it_is(teacher):
    model = copy.deepcopy(teacher)
    history = reconstruct(model, teacher, {})
    assert {row["loss"] for row in history} == {0.0}
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_a_removed_block_that_does_nothing_costs_nothing(teacher, removed):
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        teacher.model.layers[removed].get_submodule(name).weight.data.zero_()
    model = copy.deepcopy(depth_prune.without(teacher, [removed]))
    kept = [index for index in range(4) if index != removed]
    history = reconstruct(model, teacher, {}, kept=kept)
    assert len(history) == 3 * RECIPE.steps
    assert max(row["loss"] for row in history) < 1e-12


def test_the_block_before_a_removed_one_takes_its_work_over(teacher):
    """Its target is the teacher after the removed block; that of the next kept one is its own dense output."""
    model = copy.deepcopy(depth_prune.without(teacher, [1]))
    recipe = training.Recipe(**vars(RECIPE) | {"steps": 1})
    ids = training.sample(TOKENS, 4, 16, torch.Generator().manual_seed(7))
    start = boundaries(model, ids)
    history = reconstruct(model, teacher, {}, kept=[0, 2, 3], recipe=recipe)
    wanted = boundaries(teacher, ids)
    assert history[0]["loss"] == pytest.approx(error(start[0], wanted[1]), rel=1e-4)
    long = reconstruct(copy.deepcopy(depth_prune.without(teacher, [1])), teacher, {}, kept=[0, 2, 3])
    assert long[RECIPE.steps - 1]["loss"] < 0.8 * long[0]["loss"]


def test_two_runs_give_the_same_bytes_and_leave_the_global_random_state(teacher):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = copy.deepcopy(teacher)
        reconstruct(model, teacher, prune(model))
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    assert all(value.numpy().tobytes() == states[1][name].numpy().tobytes() for name, value in states[0].items())


def test_what_a_user_can_get_wrong(teacher):
    model = copy.deepcopy(teacher)
    keep = prune(model)
    short = training.Recipe(**vars(RECIPE) | {"length": 601})
    with pytest.raises(InputError, match="has 600 tokens, less than one window of 601"):
        reconstruct(model, teacher, keep, recipe=short)
    model.model.layers[2].mlp.up_proj.weight.data.fill_(math.inf)
    with pytest.raises(InputError, match="of step 1 is .*nan.*expected a finite"):
        reconstruct(model, teacher, {})
