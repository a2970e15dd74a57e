"""What a changed weight does to a linear's output: its relative error on inputs with known second moments.

||X D^T||_F for inputs X and a difference of weights D needs X^T X alone, so that the inputs are seen once and not kept.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tasks.algorithms.model import layers
from tasks.algorithms.model.matrices import Matrix


def second_moments(
    matrices: Mapping[str, Matrix], block: nn.Module, inputs: layers.BlockInputs, carry: bool = False
) -> dict[str, Tensor]:
    """Sum up X^T X of each matrix's inputs X, float64 [in, in], in one pass through the block.

    Matrices that get one and the same input, such as queries, keys and values, have one sum: don't change it in place.

    Args:
        carry: as for `layers.observe`.
    """
    moments: dict[str, Tensor] = {}
    owners: dict[str, str] = {}  # whose sum a matrix has
    last: list[tuple[str, Tensor]] = []  # held, so that its memory isn't another input's meanwhile

    def see(name: str, x: Tensor) -> None:
        if last and name not in moments and _same(last[0][1], x):
            owners[name] = last[0][0]
            return
        last[:] = [(name, x)]
        owners[name] = name
        x = x.double()  # [batch * length, in]
        if name not in moments:
            moments[name] = x.new_zeros(x.shape[1], x.shape[1])
        moments[name].addmm_(x.T, x)

    layers.observe(matrices, block, inputs, see, carry)
    return {name: moments[owners[name]] for name in matrices}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def relative_error(delta: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Compute ||X delta^T||_F / ||X weight^T||_F by a Hessian that is any multiple of X^T X; 0 where both are 0.

    Args:
        delta, weight: [out_features, in_features].
        hessian: [in_features, in_features].
    """
    hessian = hessian.double()

    def energy(matrix: Tensor) -> float:
        matrix = matrix.to(hessian)  # its type and device
        return float(((matrix @ hessian) * matrix).sum().clamp_min(0))  # tr(M H M^T) = ||X M^T||_F^2, H = X^T X

    lost, whole = energy(delta), energy(weight)
    return 0.0 if lost == 0 else float("inf") if whole == 0 else (lost / whole) ** 0.5
