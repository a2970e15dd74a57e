"""The view of a model's matrices, against the modules that hold them."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.model import families, matrices

ARCHITECTURES = [*sorted(families.BY_HEART), "GPTNeoXForCausalLM", "Phi3ForCausalLM"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modules_are_seen_as_they_are(architecture, make_model):
    model = make_model(architecture)
    seen, modules = matrices.of_model(model), families.block_linears(model)
    assert list(seen) == list(modules)
    for name, matrix in seen.items():
        assert torch.equal(matrix.weight, modules[name].weight)
        assert matrix.weight.data_ptr() == modules[name].weight.data_ptr() and not matrix.weight.requires_grad
        assert matrix.shape == tuple(modules[name].weight.shape) and matrix.module is modules[name]
    assert [list(block) for block in matrices.by_block(model)] == [list(b) for b in families.linears_by_block(model)]


def test_what_is_written_into_a_matrix_reaches_the_model(make_model):
    model = make_model("GPTNeoXForCausalLM")
    fused = matrices.of_model(model)["gpt_neox.layers.1.attention.query_key_value"]
    assert fused.shape == (96, 32)  # queries, keys and values of a head, head by head
    fused.weight.masked_fill_(torch.ones(96, 32, dtype=torch.bool).triu(), 0)
    assert not model.gpt_neox.layers[1].attention.query_key_value.weight.triu().any()
    fused.set(torch.full((96, 32), 3.0, dtype=torch.float64))
    weight = model.gpt_neox.layers[1].attention.query_key_value.weight
    assert (weight == 3).all() and weight.dtype == torch.float32
