"""Random matrices, a 2:4 mask and an error of outputs, for tests of several algorithms."""

from __future__ import annotations

import torch


def normal(*shape, seed=0):
    """Normally distributed float32 of this shape; the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_of_four(weight):
    """The mask of the two largest of every four consecutive inputs."""
    groups = weight.abs().reshape(len(weight), -1, 4)
    best = groups.topk(2, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).reshape(weight.shape)


def rest(delta, a, b, x):
    """What is left of the output of a lost weight, ||X (D - B A)^T||_F."""
    return float((x.double() @ (delta - b @ a).double().T).norm())
