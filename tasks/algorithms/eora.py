"""EoRA: a low-rank branch beside a compressed linear that gives back most of what compression took from its output.

Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation"
(arXiv 2410.21271). With the inputs' second moments C = Q L Q^T and the lost weights D = W - W', the rank-r matrix P
that minimises ||X (D - P)^T||_F is the truncated SVD of D Q L^(1/2), projected back with L^(-1/2) Q^T. The mathematics
is gptqmodel's `eora_compute_lora`; its own loop around it is not used, because it takes its teacher from a folder of
the same depth in half precision, and writes files that differ from run to run.

Nothing is trained, and nothing is merged: B A would fill the pruned zeros, so it stays a branch at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tasks.algorithms import families, layers, masked_gptq
from tasks.algorithms.errors import InputError

Done = Callable[[str, float], None]
"""Called after each linear with its name and the error that is left."""


class Branch(NamedTuple):
    """The branch of one linear, x -> x A^T B^T, and what it is good for.

    Attributes:
        a: [rank, in_features], in the type in which it is stored.
        b: [out_features, rank], likewise.
        error_before: ||X (W - W')^T||_F / ||X W^T||_F on the calibration inputs X of the compressed model.
        error_after: the same for W' + B A.
    """

    a: Tensor
    b: Tensor
    error_before: float
    error_after: float


def factors(delta: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-r matrix B A that is closest to `delta` on inputs with these second moments.

    Args:
        delta: [out_features, in_features], teacher's weight minus the compressed one.
        moments: [in_features, in_features], any multiple of X^T X. Directions in which the inputs have no energy
            (eigenvalues below in_features * 1.2e-7 of the largest) get nothing.

    Returns:
        A [rank, in_features] and B [out_features, rank], float32. Of the many pairs with this product it is the one
        where a row of A and its column of B have the same largest magnitude (neither leaves the range of float16), and
        where that of A is positive.

    Raises:
        InputError: rank above the smaller side of the matrix.
    """
    if rank > min(delta.shape):
        raise InputError(
            f"eora.rank = {rank} is above {min(delta.shape)}, the matrix's smaller side: choose a smaller one"
        )
    a, b = masked_gptq.eora_compute_lora(
        w_wq_delta=delta.float(),
        name="",
        eigen_scaling_diag_matrix=moments.double(),
        rank=rank,
        dtype=torch.float32,
        device=delta.device,
    )
    largest = a.gather(1, a.abs().argmax(dim=1, keepdim=True))  # [rank, 1]
    share = (b.abs().amax(dim=0)[:, None] / largest.abs()).sqrt().nan_to_num(1.0, 1.0, 1.0)  # 0 / 0 beyond delta's rank
    share = torch.where(share > 0, share, 1.0) * torch.where(largest < 0, -1.0, 1.0)
    return a * share, b / share.T


def compensate(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Mapping[str, Tensor],
    rank: int,
    dtype: torch.dtype = torch.float16,
    done: Done | None = None,
) -> dict[str, Branch]:
    """Compute a branch for every linear of the blocks, on the inputs that it gets when all before it are compensated.

    Args:
        model: the compressed model with ordinary float32 linears. Changed: the branches are added to its weights.
        input_ids: [windows, length]; every token counts.
        teacher: full module name (of `model`) -> weight [out_features, in_features] to come close to.
        rank: of every branch.
        dtype: the branches are rounded to it, and the error left is that of the rounded ones.

    Raises:
        InputError: rank above the smaller side of a linear, or a teacher's weight of another shape.
    """
    branches: dict[str, Branch] = {}

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        # Linear by linear, each on inputs that the compensated ones before it in the block produced.
        for name, linear in families.linears_by_block(model)[index].items():
            moments = _second_moments(linear, block, inputs)
            branches[name] = _branch(name, linear.weight, teacher[name], moments, rank, dtype)
            linear.weight.data += branches[name].b.float() @ branches[name].a.float()
            if done:
                done(name, branches[name].error_after)

    layers.walk(model, input_ids, visit)
    return branches


def _branch(name: str, weight: Tensor, wanted: Tensor, moments: Tensor, rank: int, dtype: torch.dtype) -> Branch:
    if wanted.shape != weight.shape:
        raise InputError(
            f"{name} is {tuple(weight.shape)}, in the teacher {tuple(wanted.shape)}: it is another model's"
        )
    delta = wanted.float() - weight.detach()
    a, b = (factor.to(dtype) for factor in factors(delta, moments, rank))
    left = delta - b.float() @ a.float()
    return Branch(
        a, b, masked_gptq.relative_error(delta, wanted, moments), masked_gptq.relative_error(left, wanted, moments)
    )


def _second_moments(linear: nn.Module, block: nn.Module, inputs: layers.BlockInputs) -> Tensor:
    """X^T X of the linear's inputs X, float64 [in_features, in_features]."""
    moments = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)

    def see(_: str, x: Tensor) -> None:
        x = x.double()
        moments.addmm_(x.T, x)

    layers.observe({"": linear}, block, inputs, see)
    return moments
