"""What a changed weight does to a linear's output: its relative error on inputs with known second moments.

||X D^T||_F for inputs X and a difference of weights D needs X^T X alone, so that the inputs are seen once and not kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tasks.algorithms.model import layers


def second_moments(linears: Mapping[str, nn.Module], block: nn.Module, inputs: layers.BlockInputs) -> dict[str, Tensor]:
    """Sum up X^T X of each linear's inputs X, float64 [in_features, in_features], in one pass through the block."""
    moments = {
        name: torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64, device=inputs.hidden.device)
        for name, linear in linears.items()
    }

    def see(name: str, x: Tensor) -> None:
        x = x.double()  # [batch * length, in_features]
        moments[name].addmm_(x.T, x)

    layers.observe(linears, block, inputs, see)
    return moments


def relative_error(delta: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Compute ||X delta^T||_F / ||X weight^T||_F by a Hessian that is any multiple of X^T X; 0 where both are 0.

    Args:
        delta, weight: [out_features, in_features].
        hessian: [in_features, in_features].
    """
    hessian = hessian.double()

    def energy(matrix: Tensor) -> float:
        matrix = matrix.double()
        return float(((matrix @ hessian) * matrix).sum().clamp_min(0))  # tr(M H M^T) = ||X M^T||_F^2, H = X^T X

    lost, whole = energy(delta), energy(weight)
    return 0.0 if lost == 0 else float("inf") if whole == 0 else (lost / whole) ** 0.5
