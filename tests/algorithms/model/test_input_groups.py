"""Groups of linears by what they see, and passes that run only what changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tasks.algorithms.model import families, layers, matrices
from tasks.algorithms.model.input_groups import InputGroups


class _ScaledAttention(nn.Module):
    """It doesn't hand on what its last linear gives."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *given, **named):
        output, weights = self.inner(*given, **named)
        return 2 * output, weights


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_block_changed_group_by_group_gives_what_it_gives_when_run_anew(batch, scaled, make_model, make_windows):
    model, windows = make_model(num_hidden_layers=2), make_windows(5, 12)
    by_block = matrices.by_block(model)
    if scaled:
        for block in families.blocks(model):
            block.self_attn = _ScaledAttention(block.self_attn)
    seen = []

    def visit(index, block, inputs):
        given = inputs.hidden.clone()
        groups = InputGroups(by_block[index], block, inputs)
        assert [len(names) for names in groups.names] == [3, 1, 2, 1]
        for number, names in enumerate(groups.names):
            got = []
            groups.observe(number, got.append)
            expected = {}
            fresh = layers.BlockInputs(given.clone(), inputs.calls, batch)
            see = lambda name, x, into=expected: into.setdefault(name, []).append(x.clone())  # noqa: E731
            layers.observe({name: by_block[index][name] for name in names}, block, fresh, see)
            for name in names:
                assert torch.equal(torch.cat(got).flatten(0, 1), torch.cat(expected[name])), name
                by_block[index][name].weight.mul_(0.7)
        groups.carry()
        fresh = layers.BlockInputs(given, inputs.calls, batch)
        fresh.carry(block)
        assert inputs.carried and torch.equal(inputs.hidden, fresh.hidden)
        seen.append(index)
        assert not any("forward" in vars(module) for module in block.modules())

    layers.walk(model, windows, visit, batch)
    assert seen == [0, 1]
