"""Quantisation-aware distillation: codes move on their grids until the quantised model predicts what its teacher does.

The forward pass computes with the values that the file will hold; the gradient passes through their rounding as if it
were not there (straight-through estimator, Bengio et al., arXiv 1308.3432), as in LLM-QAT (Liu et al., arXiv
2305.17888), but after GPTQ and from its codes. Scales, zero points, masks, norms, embedding and a low-rank branch stay:
the model takes as many bytes as before.

What is trained of a matrix is a latent code for each weight, in steps of the grid, so that one learning rate fits all
widths and scales. It begins in the cell of GPTQ's code, at the place there that the weight before quantisation had, or,
where GPTQ chose another cell than the weight's (11 to 15 % of them), as far inside as that was outside: nothing changes
at first, and what GPTQ had to decide by little moves first. Training itself is `training`'s.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.algorithms.quantisation.codes import Codes

INSIDE = 0.499
"""How far from a code its latent may begin, in steps: it still rounds to it."""


class GridLinear(nn.Module):
    """A quantised linear whose codes can be trained.

    Attributes:
        latent: float32 [out_features, in_features], in steps from the zero point; trained.
        start: codes, scales and zero points as they were.
        scales, zeros: float32 [out_features, groups]; where all zero points are the middle code, zeros are [1, 1].
        kept: bool [out_features, in_features]; None where nothing is pruned.
        bias: float32 [out_features] or None.
        a, b: of a low-rank branch, [rank, in_features] and [out_features, rank], added as b a; or None.
    """

    def __init__(
        self,
        start: Codes,
        weight: Tensor,
        kept: Tensor | None = None,
        bias: Tensor | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Begin with GPTQ's codes.

        Args:
            weight: before quantisation, float [out_features, in_features].
            kept, bias: as the attributes.
            branch: (a, b).
        """
        super().__init__()
        self.start = start
        a, b = branch or (None, None)
        fixed = {"scales": start.scales.float(), "zeros": _zeros(start), "kept": kept, "bias": bias, "a": a, "b": b}
        fixed["index"] = None if start.group_index is None else start.group_index.long()
        for name, tensor in fixed.items():
            self.register_buffer(name, tensor, persistent=False)
        steps = start.codes.float() - self._wide(self.zeros)
        place = weight.float() / self._wide(self.scales) - steps
        latent = steps + _inside(place.nan_to_num_(0.0))
        if kept is not None:
            latent.masked_fill_(~kept, 0.0)
        self.latent = nn.Parameter(latent)

    @property
    def weight(self) -> Tensor:
        """The values that the file would hold now, [out_features, in_features]; a gradient reaches the latent codes."""
        return _Rounded.apply(self.latent, self)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features]."""
        y = F.linear(x, self.weight, self.bias)
        return y if self.a is None else y + F.linear(F.linear(x, self.a), self.b)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes as trained, uint8 [out_features, in_features]; pruned weights keep theirs."""
        found = (self.latent.round() + self._wide(self.zeros)).clamp_(0, 2**self.start.bits - 1).to(torch.uint8)
        return found if self.kept is None else torch.where(self.kept, found, self.start.codes.to(found.device))

    def _wide(self, groups: Tensor) -> Tensor:
        """A value per group as one per weight: [out_features, in_features] of [out_features, groups]."""
        if groups.shape[1] == 1:
            return groups
        if self.index is None:
            return groups.repeat_interleave(self.start.group_size, dim=1)
        return groups[:, self.index]


class _Rounded(torch.autograd.Function):
    """Latent codes to values, with a gradient as if they were not rounded; it keeps no tensor of their size."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, grid: GridLinear) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(latent)
        zeros = grid._wide(grid.zeros)
        steps = (latent.round() + zeros).clamp_(0, 2**grid.start.bits - 1).sub_(zeros)
        values = steps.mul_(grid._wide(grid.scales))
        return values if grid.kept is None else values.masked_fill_(~grid.kept, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (latent,), grid = ctx.saved_tensors, ctx.grid
        # d value / d latent = scale; none beyond half a step outside of the codes, where a latent comes to rest
        place = latent + grid._wide(grid.zeros)
        outside = (place < -0.5) | (place > 2**grid.start.bits - 0.5)
        if grid.kept is not None:
            outside |= ~grid.kept
        return (gradient * grid._wide(grid.scales)).masked_fill_(outside, 0.0), None


class Adapted(nn.Module):
    """A model in whose place `training.train` expects one with adapters: what is trained has a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def trainable(model: nn.Module) -> Adapted:
    """Freeze all but the latent codes."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for linear in grids(model).values():
        linear.latent.requires_grad_(True)
    return Adapted(model)


def grids(model: nn.Module) -> dict[str, GridLinear]:
    """Full name -> the linears whose codes are trained, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GridLinear)}


def _inside(place: Tensor) -> Tensor:
    """Places in steps from the code's as places within its cell, reflected at its sides; beyond a step: the code's.

    All at one side they would cross it together: after four steps of training SmolLM2's loss rose from 2.1 to 6.4.
    """
    distance = place.abs()
    return place.sign() * torch.minimum(distance, 1 - distance).clamp_(0.0, INSIDE)


def _zeros(start: Codes) -> Tensor:
    if start.zeros is None:
        return torch.full((1, 1), 2.0 ** (start.bits - 1))
    return start.zeros.float()
