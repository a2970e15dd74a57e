"""A naive GPTQ in double precision, and gptqmodel's on one matrix, led by this project, to compare with it."""

from __future__ import annotations

import math

import numpy as np
import torch

from tasks.algorithms.quantisation import gptqmodel_settings, masked_gptq
from tests.support.matrices import normal

NAME = "model.layers.0.mlp.up_proj"
SETTINGS = {"bits": 4, "group_size": 32, "symmetric": True, "damp": 0.05, "act_order": "none", "mse": 0.0}


def inputs(columns, tokens=512, seed=1):
    """Correlated inputs of very different sizes, as in a trained model."""
    return normal(tokens, columns, seed=seed) @ normal(columns, columns, seed=seed + 1) * normal(columns, seed=9).exp()


def library_gptq(weight, x, keep=None, scale_steps=None, joint=None, cycles=0, device="cpu", **changed):
    """(quantised weight, scales, zeros, all of the answer) of gptqmodel's GPTQ on one matrix, led by this project."""
    settings = masked_gptq.Settings(scale_steps=scale_steps, joint=joint, descent_cycles=cycles)
    config, x = gptqmodel_settings.config(**(SETTINGS | changed)), x.to(device)
    hessian = (x.T @ x) * (2.0 / len(x))
    masks = {} if keep is None else {NAME: keep}
    answer = masked_gptq.quantise({NAME: weight.clone().to(device)}, hessian, config, settings, masks)[NAME]
    return answer.quantised, answer.scales, answer.zeros, answer


def as_stored(scale, steps):
    """float64 of the float16 that a file would hold; by numpy, one value at a time."""
    if steps:
        scale = [2.0 ** (round(math.log2(value) * steps) / steps) for value in scale.tolist()]
    return torch.from_numpy(np.asarray(scale, dtype=np.float64).astype(np.float16).astype(np.float64))


def scale_and_zero(group, bits, symmetric, mse=0.0, scale_steps=None):
    """[rows], [rows] of one group of columns, by the definition of the grid."""
    top = 2**bits - 1
    low, high = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    low, high = torch.where(empty, -torch.ones_like(low), low), torch.where(empty, torch.ones_like(high), high)
    best, found, zero = (torch.full_like(low, value) for value in (math.inf, math.nan, math.nan))
    for shrink in [1 - i / 100 for i in range(80)] if mse else [1.0]:
        tried = shrink * (high - low) / top
        nearest = torch.full_like(tried, (top + 1) / 2) if symmetric else torch.round(-shrink * low / tried)
        middles = [nearest]
        if mse and bits == 2 and not symmetric:  # gptqmodel tries both neighbours of the ideal zero point there
            middles.append(torch.floor(-low * top / (high - low)) * 2 + 1 - nearest)
        for middle in middles:
            code = (torch.round(group / tried[:, None]) + middle[:, None]).clamp(0, top)
            error = ((code - middle[:, None]) * tried[:, None] - group).abs().pow(mse or 2).sum(dim=1)
            found, zero = torch.where(error < best, tried, found), torch.where(error < best, middle, zero)
            best = torch.minimum(error, best)
    scale = as_stored(found, scale_steps)
    return scale, zero if symmetric else torch.round(zero * found / scale).clamp(0, top)


def visiting_order(diagonal, act_order, size):
    """By hand: sorted, or groups sorted by their largest, each sorted within."""
    if act_order == "none":
        return torch.arange(len(diagonal))
    values = diagonal.tolist()
    if act_order == "descending":
        return torch.tensor(sorted(range(len(values)), key=lambda i: -values[i]))
    groups = [sorted(range(i, i + size), key=lambda i: -values[i]) for i in range(0, len(values), size)]
    return torch.tensor(sum(sorted(groups, key=lambda group: -values[group[0]]), []))


def naive_gptq(weight, x, keep, bits, group_size, symmetric, damp, act_order, mse, scale_steps=None):
    """Optimal brain quantisation in a fixed order, column by column, with the inverse Hessian updated by elimination.

    Double precision, no Cholesky, no blocks. Only for up to 128 inputs: there, gptqmodel takes all scales from the
    weights as they were given.
    """
    weight, x = weight.double(), x.double()
    rows, columns = weight.shape
    assert columns <= 128
    hessian = 2 * x.T @ x / len(x)
    order = visiting_order(hessian.diagonal().float(), act_order, group_size)
    weight, keep, hessian = weight[:, order], keep[:, order], hessian[order][:, order]
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    given, work, answer = weight.clone(), weight.clone(), torch.zeros_like(weight)
    size = columns if group_size == -1 else group_size
    for i in range(columns):
        if i % size == 0:
            scale, zero = scale_and_zero((given * keep)[:, i : i + size], bits, symmetric, mse, scale_steps)
        code = (torch.round(work[:, i] / scale) + zero).clamp(0, 2**bits - 1)
        answer[:, i] = (code - zero) * scale * keep[:, i]
        error = (work[:, i] - answer[:, i]) / inverse[i, i]
        work -= error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return answer[:, order.argsort()]


def rounded_to_nearest(weight, bits, symmetric, mse=0.0, scale_steps=None, group_size=32):
    return torch.cat(
        [
            (torch.round(group / scale[:, None]) + zero[:, None]).clamp(0, 2**bits - 1).sub(zero[:, None])
            * scale[:, None]
            for group in weight.double().split(group_size, dim=1)
            for scale, zero in [scale_and_zero(group, bits, symmetric, mse, scale_steps)]
        ],
        dim=1,
    )
