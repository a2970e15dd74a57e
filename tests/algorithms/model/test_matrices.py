"""The view of a model's matrices, against the modules that hold them: plain, transposed and fused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tasks.algorithms.model import families, matrices
from tasks.algorithms.model.families import Family, Projection

ARCHITECTURES = sorted(families.FAMILIES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_modules_are_seen_as_they_are(architecture, make_model):
    model = make_model(architecture)
    seen, modules = matrices.of_model(model), families.block_linears(model)
    assert list(seen) == list(modules)
    for name, matrix in seen.items():
        assert torch.equal(matrix.weight, modules[name].weight)
        assert matrix.weight.data_ptr() == modules[name].weight.data_ptr() and not matrix.weight.requires_grad
        assert matrix.shape == tuple(modules[name].weight.shape) and matrix.module is modules[name]
    assert [list(block) for block in matrices.by_block(model)] == [list(b) for b in families.linears_by_block(model)]


class Block(nn.Module):
    """A block as GPT-2's: Conv1D, which keeps [in, out], with queries, keys and values in one."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(8 + 2 * 4, 8)
        self.c_proj = nn.Linear(8, 8)


class Config:
    def to_dict(self) -> dict:
        return {
            "num_hidden_layers": 2,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 16,
        }


class Fused(nn.Module):
    """A model of such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.config = nn.ModuleList(Block() for _ in range(2)), Config()


PARTS = ("query", "key_value", "key_value")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Fused:
    sizes = {"q": ("query", "hidden"), "k": ("key_value", "hidden"), "v": ("key_value", "hidden"), "o": ("hidden",) * 2}
    places = {name: Projection("c_attn", part, PARTS, transposed=True) for part, name in enumerate("qkv")}
    family = Family("Fused", sizes, tuple(sizes), places | {"o": Projection("c_proj")}, blocks="h")
    monkeypatch.setitem(families.FAMILIES, "Fused", family)
    torch.manual_seed(0)
    return Fused()


def test_a_fused_transposed_projection_is_cut_into_its_matrices(fused):
    block = matrices.by_block(fused)[1]
    assert list(block) == ["h.1.q", "h.1.k", "h.1.v", "h.1.o"]
    assert [matrix.shape for matrix in block.values()] == [(8, 8), (4, 8), (4, 8), (8, 8)]
    x = torch.randn(5, 8)
    parts = fused.h[1].c_attn(x).split([8, 4, 4], dim=-1)
    for name, expected in zip("qkv", parts, strict=True):
        matrix = block[f"h.1.{name}"]
        torch.testing.assert_close(x @ matrix.weight.T + matrix.bias, expected)


def test_what_is_written_into_a_matrix_reaches_its_rows_alone(fused):
    before = fused.h[0].c_attn.weight.detach().clone()  # [in, out]
    key = matrices.by_block(fused)[0]["h.0.k"]
    key.weight.masked_fill_(torch.ones(4, 8, dtype=torch.bool).triu(), 0)
    after = fused.h[0].c_attn.weight.detach()
    assert torch.equal(after[:, 8:12], before[:, 8:12].T.tril(-1).T)
    assert torch.equal(after[:, :8], before[:, :8]) and torch.equal(after[:, 12:], before[:, 12:])
    key.set(torch.full((4, 8), 3.0, dtype=torch.float64))
    assert (fused.h[0].c_attn.weight[:, 8:12] == 3).all() and fused.h[0].c_attn.weight.dtype == torch.float32


def test_gradients_are_seen_like_weights(fused):
    block = matrices.by_block(fused)[0]
    fused.h[0].c_attn(torch.randn(3, 8)).square().sum().backward()
    gradient = fused.h[0].c_attn.weight.grad
    assert torch.equal(block["h.0.v"].seen(gradient), gradient[:, 12:].T)
