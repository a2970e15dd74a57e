"""Branches of a model: each on the inputs that it will get, and what their codes hold."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.model import families, layers, matrices
from tasks.algorithms.quantisation import eora, eora_branches, output_error, rounding
from tests.support.matrices import rest


def test_each_branch_is_computed_on_inputs_of_compensated_linears(make_model, make_windows):
    teacher, student = make_model(), make_model()
    windows = make_windows(4, 32)
    for linear in families.block_linears(student).values():
        linear.weight.data = (linear.weight * 4).round() / 4
    wanted = {name: linear.weight.detach().clone() for name, linear in families.block_linears(teacher).items()}
    branches = eora_branches.compensate(student, windows, wanted, eora_branches.Size(16))
    assert list(branches) == list(wanted)
    # At full rank of the smaller sides everything is restored, so that later inputs are the teacher's.
    small = [name for name in wanted if min(wanted[name].shape) == 16]
    assert small and all(branches[name].error_after < 2e-3 for name in small)  # float16
    name = "model.layers.3.mlp.down_proj"
    seen = []
    linear = families.block_linears(student)[name]
    linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        student(input_ids=windows)
    x, branch = torch.cat(seen).double(), branches[name]
    left = wanted[name] - linear.weight.detach()
    whole = (x @ wanted[name].double().T).norm()
    assert branch.error_after == pytest.approx(float((x @ left.double().T).norm() / whole), rel=1e-3)
    lost = left + branch.b.float() @ branch.a.float()
    assert branch.error_before == pytest.approx(float((x @ lost.double().T).norm() / whole), rel=1e-3)
    assert branch.error_after < branch.error_before


@pytest.mark.parametrize(
    "short", [(), ("k_proj",), ("o_proj", "up_proj"), ("q_proj", "down_proj"), ("v_proj", "gate_proj")]
)
def test_moments_serve_as_long_as_nothing_before_a_linear_has_changed(make_model, make_windows, monkeypatch, short):
    """The naive loop: one look at the block per linear, at whatever ranks. The same bits, in fewer looks."""
    wanted = {name: linear.weight.detach().clone() for name, linear in families.block_linears(make_model()).items()}
    ranks = {name: 3 if name.endswith(short) and short else 0 for name in wanted}
    student, windows, looks, look = make_model(seed=1), make_windows(4, 32), [], output_error.second_moments

    def counted(*given):
        looks.append(given)
        return look(*given)

    monkeypatch.setattr(output_error, "second_moments", counted)
    branches = eora_branches.compensate(student, windows, wanted, eora_branches.Size(ranks))
    # a look per block, and one after each change but that of the last linear; k and v have q's inputs
    changes = sum(name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj") for name in short)
    assert len(looks) == 4 * (1 + changes)
    naive = make_model(seed=1)

    def visit(index, block, inputs):
        for name, matrix in matrices.by_block(naive)[index].items():
            moments = look({name: matrix}, block, inputs)[name]
            a, b = eora.factors(wanted[name] - matrix.weight, moments, ranks[name])
            assert torch.equal(branches[name].a, a.half()) and torch.equal(branches[name].b, b.half())
            matrix.weight.add_(b.half().float() @ a.half().float())

    layers.walk(naive, windows, visit)


@pytest.mark.parametrize("bits", [8, 4])
def test_b_is_fitted_to_the_rounded_a_before_it_is_rounded(make_model, make_windows, bits):
    teacher, student = make_model(), make_model()
    windows, name, seen = make_windows(4, 32), "model.layers.0.self_attn.q_proj", []
    wanted = {name: linear.weight.detach().clone() for name, linear in families.block_linears(teacher).items()}
    linear = families.block_linears(student)[name]
    linear.weight.data = (linear.weight * 4).round() / 4
    delta = wanted[name] - linear.weight.detach()
    handle = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        student(input_ids=windows)
    handle.remove()
    x = torch.cat(seen).double()
    branches = eora_branches.compensate(
        student, windows, wanted, eora_branches.Size({n: 6 if n == name else 0 for n in wanted}, bits)
    )
    a, b, coded, _, after = branches[name]
    assert torch.equal(a.float(), rounding.values(coded[0])) and torch.equal(b.float(), rounding.values(coded[1]).T)
    rounded_a = rounding.quantise(eora.factors(delta, x.T @ x, 6)[0], bits, 32)
    assert torch.allclose(a.float(), rounding.values(rounded_a), atol=1e-3)
    fitted = torch.linalg.lstsq(x @ a.double().T, x @ delta.double().T).solution.T.float()
    expected = rounding.values(rounding.quantise(fitted.T, bits, 32)).T
    assert torch.allclose(b.float(), expected, atol=1e-3)
    whole = float((x @ wanted[name].double().T).norm())
    assert after == pytest.approx(rest(delta, a.float(), b.float(), x) / whole, rel=1e-3)
    other = branches["model.layers.0.self_attn.k_proj"]
    assert other.a.shape == (0, 32) and other.b.shape == (16, 0) and other.coded is None
    assert other.error_after == other.error_before == 0


def test_groups_divide_the_rows_and_bytes_are_counted_per_rank():
    assert [eora_branches.group_size(length) for length in (32, 64, 96, 192, 172, 67)] == [32, 64, 48, 64, 43, 1]
    assert eora_branches.rank_bytes((64, 192), 16) == 2 * 256
    assert eora_branches.rank_bytes((64, 192), 8) == 256 + 2 * (1 + 3)
    assert eora_branches.rank_bytes((64, 192), 4) == 128 + 2 * (1 + 3)


def test_a_linear_without_a_branch_costs_no_factors_and_its_block_one_pass(make_model, make_windows, monkeypatch):
    wanted = {name: linear.weight.detach().clone() for name, linear in families.block_linears(make_model()).items()}
    student, windows, passes, factored = make_model(seed=1), make_windows(3, 16), [], []
    for index, block in enumerate(families.blocks(student)):
        block.mlp.down_proj.register_forward_hook(lambda *_, index=index: passes.append(index))
    factors = eora.factors
    monkeypatch.setattr(eora, "factors", lambda *given: factored.append(given[2]) or factors(*given))
    ranks = {name: 2 if name == "model.layers.2.mlp.up_proj" else 0 for name in wanted}
    eora_branches.compensate(student, windows, wanted, eora_branches.Size(ranks))
    assert factored == [2]
    # three windows; block 2 hands on what it computes with its branch, and down_proj is watched in a second look
    assert [passes.count(index) for index in range(4)] == [3, 3, 3, 3]
