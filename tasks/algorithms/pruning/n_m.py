"""The mask of an N:M pattern: which N of every M consecutive inputs of a row stay, by ratings that the caller gives."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.algorithms.model.masks import groups


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
    best = grouped.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True).reshape(values.shape)
