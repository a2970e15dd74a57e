"""Weights that stay in memory in the type that they are stored in, of a model that computes in float32.

A weight in bfloat16 or float16 becomes float32 where it is used, which is exact: every result has the bits that it has
with all weights in float32, in half of the memory. Embedding, head and linears are kept so; vectors (norms, biases)
are float32 from the beginning. A model whose weights are float32 is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredLinear(nn.Linear):
    """A linear whose weight has another type than its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in the type of x."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def compute_in_float32(model: nn.Module) -> None:
    """Have a model with weights in a shorter type compute in float32, in place."""
    for name, module in list(model.named_modules()):
        if not any(weight.dtype != torch.float32 for weight in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _stored_linear(module))
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(_in_float32)
        else:
            module.float()


def share(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Let a model have another one's embedding and head where they are equal: both are held once, also in float32."""
    for get, put in (
        ("get_input_embeddings", model.set_input_embeddings),
        ("get_output_embeddings", model.set_output_embeddings),
    ):
        ours, theirs = getattr(model, get)(), getattr(other, get)()
        if ours.weight.dtype == theirs.weight.dtype and torch.equal(ours.weight, theirs.weight):
            put(theirs)


@contextmanager
def widened(module: nn.Module | None) -> Iterator[None]:
    """Within this context the module's weight is float32; afterwards it is what it was."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dtype == torch.float32:
        yield
        return
    module.weight = _frozen(weight.detach().float())
    try:
        yield
    finally:
        module.weight = weight


@contextmanager
def rounded_afterwards(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context the modules' weights are float32; what they are then is rounded to the type they had."""
    stored = {module: module.weight.dtype for module in modules if module.weight.dtype != torch.float32}
    for module in stored:
        module.weight = _frozen(module.weight.detach().float())
    yield
    for module, dtype in stored.items():
        module.weight = _frozen(module.weight.detach().to(dtype))


@contextmanager
def taken_for_float32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context the modules' weights say that they are float32 and have no values, nor memory."""
    stored = {module: module.weight for module in modules if module.weight.dtype != torch.float32}
    for module, weight in stored.items():
        module.weight = _frozen(weight.detach().new_empty(1, dtype=torch.float32).expand(weight.shape))
    try:
        yield
    finally:
        for module, weight in stored.items():
            module.weight = _frozen(weight.detach())


def _stored_linear(linear: nn.Linear) -> StoredLinear:
    stored = StoredLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    stored.weight = linear.weight  # itself: a tied one stays tied
    if linear.bias is not None:
        stored.bias = _frozen(linear.bias.detach().float())
    return stored.train(linear.training)


def _in_float32(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
