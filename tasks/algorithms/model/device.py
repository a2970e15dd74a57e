"""The device on which a model computes: chosen once, where a stage starts, by moving the model; all else follows it.

An algorithm takes its inputs wherever they are, computes beside the model, and gives what it measured back on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def beside(model: Any, tensor: Tensor) -> Tensor:
    """The tensor on the device of the model's weights; a stand-in that has none takes it as it is."""
    if not callable(getattr(model, "parameters", None)):
        return tensor
    weight = next(itertools.chain(model.parameters(), model.buffers()), None)
    return tensor if weight is None else tensor.to(weight.device)


def repeatable_attention(device: torch.device) -> Any:
    """Return a context in which attention always gives the same bytes: fused GPU kernels add gradients in any order."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random state of all devices inside, restore it after: for libraries that take no generator."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
