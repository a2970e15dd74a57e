"""Losses of tokens and of hidden states against hand-computed and naive ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.algorithms.model import layers, rows
from tasks.algorithms.pruning import depth_prune
from tasks.algorithms.recovery import distillation, training
from tests.support.pruned_llama import RECIPE, attach, prune
from tests.support.stand_in import Says


def said(logits: Tensor) -> distillation.Said:
    return distillation.Said(logits.flatten(0, 1), Says(logits.shape[-1]))


def test_distillation_is_the_hand_computed_divergence():
    student = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0]]])
    teacher = torch.tensor([[[math.log(9.0), 0.0], [0.0, 0.0]]])
    ids = torch.zeros(1, 2, dtype=torch.int64)
    # At T = 2 the odds are their square roots: teacher 3:1 against 1:1, then 1:1 against sqrt(3):1.
    root = math.sqrt(3.0)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.5 * math.log(0.5 / (root / (1 + root))) + 0.5 * math.log(0.5 / (1 / (1 + root)))
    got = distillation.token_losses(said(student), ids, said(teacher), 1.0, 2.0)
    assert float(got.distilled) == float(got.loss) == pytest.approx(4 * (first + second) / 2, rel=1e-6)
    assert float(got.causal) == pytest.approx(math.log(2.0), rel=1e-6)
    same = distillation.token_losses(said(teacher), ids, said(teacher), 0.5, 3.0)
    assert float(same.distilled) == pytest.approx(0.0, abs=1e-7)
    alone = distillation.token_losses(said(student), ids, None, 0.5, 3.0)
    assert float(alone.loss) == float(alone.causal) and math.isnan(alone.distilled)


@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 40, 2**18])
@pytest.mark.parametrize("largest", [1, 100, 2**24])
def test_token_losses_and_their_gradient_are_autograds_of_the_plain_formula(weight, chunk, largest, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", chunk)  # logits: one row, 3 rows, or all 15 at once
    monkeypatch.setattr(rows, "LARGEST", largest)  # one row, 5 rows, all
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(13, (3, 5), generator=generator)
    student = (torch.randn(3, 5, 13, generator=generator) * 3).requires_grad_()
    teacher = None if weight is None else torch.randn(3, 5, 13, generator=generator) * 3
    plain = student.detach().clone().double().requires_grad_()
    causal = F.cross_entropy(plain[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = causal
    if teacher is not None:
        p, q = ((each.double() / 1.7).softmax(-1) for each in (teacher, plain))
        divergence = 1.7**2 * (p * (p / q).log()).sum(-1).mean()
        expected = (1 - weight) * causal + weight * divergence
    (2.5 * expected).backward()
    got = distillation.token_losses(said(student), ids, None if teacher is None else said(teacher), weight or 0.0, 1.7)
    (2.5 * got.loss).backward()
    torch.testing.assert_close(got.loss.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.causal.double(), causal.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(student.grad.double(), plain.grad, rtol=1e-4, atol=1e-7)


def boundaries(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The hidden states before each block and after the last one, by the walk that calibrations use."""
    seen: list[Tensor] = []
    final = layers.walk(model, ids, lambda index, block, inputs: seen.append(inputs.hidden.clone()))
    return [*seen, final]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_hidden_loss_is_the_naive_one_at_the_corresponding_blocks(weight, make_model):
    """A corpus of exactly one window; the student has lost blocks 0 and 2 of four, so the last ones match."""
    teacher = make_model(seed=1)
    student = copy.deepcopy(depth_prune.without(teacher, [0, 2]))
    keep = prune(student)
    ids = torch.randint(96, (16,), generator=torch.Generator().manual_seed(0))
    wanted, got = boundaries(teacher, ids[None]), boundaries(student, ids[None])
    errors = [
        sum((a - b) ** 2 for a, b in zip(got[i + 1].flatten().tolist(), wanted[j + 1].flatten().tolist(), strict=True))
        / sum(b**2 for b in wanted[j + 1].flatten().tolist())
        for i, j in enumerate((1, 3))
    ]
    recipe = training.Recipe(**vars(RECIPE) | {"hidden": 10.0, "distillation": weight})
    history = training.train(attach(student, keep), ids, recipe, teacher=teacher, kept=[1, 3])
    first = history[0]
    assert first["hidden"] == pytest.approx(sum(errors) / 2, rel=1e-4)
    tokens = (1 - weight) * first["causal_lm"] + (weight * first["distillation"] if weight else 0.0)
    assert first["loss"] == pytest.approx(tokens + 10 * first["hidden"], rel=1e-5)
    assert math.isnan(first["distillation"]) == (weight == 0)
    assert history[-1]["hidden"] < first["hidden"]  # it has a gradient


def test_a_removed_block_that_does_nothing_costs_nothing(make_model):
    teacher = make_model(seed=1)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        teacher.model.layers[1].get_submodule(name).weight.data.zero_()
    student = copy.deepcopy(depth_prune.without(teacher, [1]))
    ids = torch.randint(96, (16,), generator=torch.Generator().manual_seed(0))
    recipe = training.Recipe(**vars(RECIPE) | {"hidden": 1.0, "distillation": 1.0, "steps": 1})
    for kept, fits in (([0, 2, 3], True), ([0, 1, 2], False)):
        adapted = attach(copy.deepcopy(student), {})
        row = training.train(adapted, ids, recipe, teacher=teacher, kept=kept)[0]
        assert (row["hidden"] < 1e-10) == fits
        assert row["distillation"] == pytest.approx(0.0, abs=1e-5)
