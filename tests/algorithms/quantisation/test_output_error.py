"""Second moments of a block's inputs against the inputs that the whole forward gives, and who shares them."""

import pytest
import torch

from tasks.algorithms.model import families, layers, matrices
from tasks.algorithms.quantisation import output_error


@pytest.mark.parametrize("architecture", sorted(families.BY_HEART))
def test_moments_are_those_of_each_matrix_s_own_inputs(architecture, make_model, make_windows):
    model, ids = make_model(architecture), make_windows(5, 9)
    by_block, found, naive = matrices.by_block(model), {}, {}
    layers.walk(model, ids, lambda at, *given: found.update(output_error.second_moments(by_block[at], *given)), batch=2)
    handles = []
    for name, matrix in matrices.of_model(model).items():

        def see(_, given, name=name):
            naive[name] = given[0].detach().flatten(0, 1).double()

        handles.append(matrix.module.register_forward_pre_hook(see))
    model(input_ids=ids)
    assert list(found) == list(naive)
    for name, x in naive.items():
        assert torch.allclose(found[name], x.T @ x, rtol=1e-4, atol=1e-6)


def test_equal_inputs_are_multiplied_once(make_model, make_windows):
    model, ids = make_model(), make_windows(3, 9)
    found = {}

    def visit(index, block, inputs):
        found.update(output_error.second_moments(matrices.by_block(model)[index], block, inputs))

    layers.walk(model, ids, visit)
    sums = {name.rpartition(".")[2]: each for name, each in found.items() if name.startswith("model.layers.2.")}
    assert sums["q_proj"] is sums["k_proj"] is sums["v_proj"] and sums["gate_proj"] is sums["up_proj"]
    assert len({id(each) for each in sums.values()}) == 4
