"""The mask of an N:M pattern: which N of every M consecutive inputs of a row stay, by ratings that the caller gives."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.algorithms.model.masks import groups

PIECE = 2**18
"""Values whose order is found at once: sorting takes four times their memory."""


def largest(values: Tensor, keep: int, of: int) -> Tensor:
    """Keep the `keep` largest of every `of` consecutive inputs; of equal ones the lower index stays.

    Args:
        values: [rows, cols], higher = more important.

    Returns:
        bool [rows, cols], True where kept.

    Raises:
        InputError: cols isn't divisible by `of`.
    """
    grouped = groups(values, of)  # [rows, cols / of, of]
    kept = torch.zeros(grouped.shape, dtype=torch.bool, device=values.device)
    rows = max(1, PIECE // values.shape[1])
    for part, stays in zip(grouped.split(rows), kept.split(rows), strict=True):
        stays.scatter_(-1, part.argsort(dim=-1, descending=True, stable=True)[..., :keep], True)
    return kept.view(values.shape)
