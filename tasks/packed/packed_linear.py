"""A linear of a packed model as it computes: in float32, bit by bit as gptqmodel's folder of the same model does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tasks.algorithms.quantisation import rounding
from tasks.packed.stored_model import Linear


class PackedLinear(nn.Module):
    """A linear that computes in float32 what gptqmodel's torch kernel and its `Lora` compute, operation by operation.

    Attributes:
        weight: float32 [out_features, in_features], without the adapter.
        bias: float32 [out_features] or None.
        a: float32 [rank, in_features] or None.
        b: float32 [rank, out_features] or None; x a^T b is added.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("a", adapter[0] if adapter else None)
        self.register_buffer("b", adapter[1] if adapter else None)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] -> […, out_features]."""
        # The product of a matrix with a transposed one, the adapter after the bias: another order rounds differently.
        flat = x.reshape(-1, x.shape[-1])
        out = torch.matmul(flat, self.weight.T)
        if self.bias is not None:
            out.add_(self.bias)
        if self.a is not None:
            out.add_((flat @ self.a.T) @ self.b)
        return out.reshape(*x.shape[:-1], self.out_features)


def module(linear: Linear) -> nn.Module:
    """The linear in float32: an ordinary one where it was neither quantised nor given an adapter."""
    bias = None if linear.bias is None else linear.bias.float()
    weight = linear.values().float()
    if linear.codes is None and linear.adapter is None:
        with torch.device("meta"):
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return plain
    adapter = None
    if linear.adapter is not None:
        a, b = linear.adapter
        a = rounding.values(a) if isinstance(a, rounding.Coded) else a.float()
        b = rounding.values(b) if isinstance(b, rounding.Coded) else b.float().T.contiguous()
        adapter = a, b
    return PackedLinear(weight, bias, adapter)
