"""EoRA: the low-rank matrix beside a compressed linear that gives back most of what compression took from its output.

Liu et al., "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation"
(arXiv 2410.21271). With the inputs' second moments C = Q L Q^T and the lost weights D = W - W', the rank-r matrix P
that minimises ||X (D - P)^T||_F is the truncated SVD of D Q L^(1/2), projected back with L^(-1/2) Q^T. The mathematics
is gptqmodel's `eora_compute_lora`; its own loop around it is not used, because it takes its teacher from a folder of
the same depth in half precision, and writes files that differ from run to run.

One matrix at a time: the walk over a model is `tasks.algorithms.quantisation.eora_branches`', how many ranks a linear
gets `tasks.algorithms.quantisation.eora_ranks`'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation import gptqmodel_library as library


def factors(delta: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find the rank-r matrix B A that is closest to `delta` on inputs with these second moments.

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
    a, b = library.eora_compute_lora(
        w_wq_delta=delta.float(),
        name="",
        eigen_scaling_diag_matrix=moments.double(),
        rank=rank,
        dtype=torch.float32,
        device=delta.device,
    )
    # It splits the singular values evenly, B = U S^(1/2) and A = S^(1/2) V^T L^(-1/2) Q^T: where inputs are tiny, A
    # leaves float16's range. B A stays the same when a row of A is multiplied and its column of B divided by a number.
    largest = a.gather(1, a.abs().argmax(dim=1, keepdim=True))  # [rank, 1]
    share = (b.abs().amax(dim=0)[:, None] / largest.abs()).sqrt().nan_to_num(1.0, 1.0, 1.0)  # 0 / 0 beyond delta's rank
    # An SVD leaves the signs open: fixed, so that they don't hang on the library that computed it.
    share = torch.where(share > 0, share, 1.0) * torch.where(largest < 0, -1.0, 1.0)  # [rank, 1]
    return a * share, b / share.T


def refit(delta: Tensor, moments: Tensor, a: Tensor) -> Tensor:
    """Find the B [out_features, rank] for which B A is closest to `delta`, given an A that is no longer the best.

    It is weighted least squares, B = D C A^T (A C A^T)^+, in float32. At worst B is 0: a rounded A can't add error.

    Args:
        delta, moments: as for `factors`.
        a: [rank, in_features].
    """
    a, moments = a.double(), moments.double()
    seen = a @ moments  # A C, [rank, in_features]
    # The gradient of ||X (D - B A)^T||_F^2 = tr((D - B A) C (D - B A)^T) is 0 where B (A C A^T) = D C A^T. Rounding can
    # make rows of A 0 or alike: hence the pseudoinverse.
    return (delta.double() @ seen.T @ torch.linalg.pinv(seen @ a.T, hermitian=True)).float()


def spectrum(delta: Tensor, moments: Tensor) -> Tensor:
    """Tell what each further rank of `factors` removes of ||X delta^T||_F^2, float64 [smaller side], falling.

    Their sum is all of it, where `moments` is X^T X. In float64; below 1e-16 of the largest they are rounding.
    """
    delta, moments = delta.double(), moments.double()
    # By Eckart and Young a rank removes the square of its singular value of X D^T: an eigenvalue of D C D^T, and of
    # R^T D^T D R with C = R R^T, whichever is smaller. A decomposition of C itself is needed for the second alone.
    if delta.shape[0] > delta.shape[1]:
        eigenvalues, vectors = torch.linalg.eigh(moments)  # C = Q L Q^T: [in_features], [in_features, in_features]
        product = delta @ (vectors * eigenvalues.clamp_min(0).sqrt())  # D Q L^(1/2); rounding can make L negative
        gram = product.T @ product
    else:
        gram = delta @ moments @ delta.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def lost(name: str, weight: Tensor, wanted: Tensor) -> Tensor:
    """Subtract: what compression took from a weight, float32 [out_features, in_features], on the weight's device."""
    if wanted.shape != weight.shape:
        raise InputError(
            f"{name} is {tuple(weight.shape)}, in the teacher {tuple(wanted.shape)}: it is another model's"
        )
    return wanted.to(weight.device, torch.float32) - weight.detach()
