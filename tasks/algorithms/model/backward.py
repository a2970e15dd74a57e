"""A backward pass block by block: weights, activations and gradients of one block at a time, whatever keeps the others.

Forward, the hidden states at all block boundaries are kept, where `streaming.SPILL` says if they are many. Backward,
from the last block to the first, each block runs once more with gradients. Gradients are those of one pass through the
whole model, bit by bit, for one forward pass more. No weight's `.grad` is touched; the head, the final norm and the
embedding get no gradients.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tasks.algorithms.model import families, head, layers
from tasks.algorithms.model.device import beside, repeatable_attention

Loss = Callable[[Tensor, slice, Tensor], Tensor]
"""(token ids of a batch [batch, length], rows of [batch * length], their logits [rows, vocabulary]) -> their share."""
Back = Callable[[Sequence[Tensor]], list[Tensor]]
"""Goes back through a block; weights of it that gradients are wanted of -> these, summed over all batches."""
Visit = Callable[[int, nn.Module, Back], None]


class Reached(NamedTuple):
    """How far a pass has come.

    Attributes:
        block: the gradient is that of its outputs; blocks below it are still to be visited, and itself.
        gradient: [windows, length, hidden].
    """

    block: int
    gradient: Tensor


def backward(
    model: nn.Module,
    input_ids: Tensor,
    loss: Loss,
    visit: Visit,
    batch: int = 1,
    begun: Reached | None = None,
    reached: Callable[[Reached], None] | None = None,
) -> None:
    """Visit the blocks from the last to the first, each open, with what goes back through it.

    Args:
        input_ids: int64 [windows, length].
        loss: a sum over rows; called for each batch, from the first to the last.
        visit: called with (index, block, back) and calls `back` once.
        batch: windows per pass.
        begun: where an interrupted pass came to.
        reached: called after each block; what it gets is valid during the call only.
    """
    blocks = families.blocks(model)
    with repeatable_attention(beside(model, input_ids[:0]).device):
        states, calls, last = _boundaries(model, input_ids, batch)
        if begun is None:
            gradient = _through_head(model, beside(model, input_ids).long(), last, loss, batch)
        else:
            gradient = begun.gradient.to(last.device)
        del last
        for index in reversed(range(len(blocks) if begun is None else begun.block + 1)):
            inputs = layers.BlockInputs(states[index], calls[index], batch)
            with layers.opened(blocks[index]):
                visit(index, blocks[index], functools.partial(_through, blocks[index], inputs, gradient))
            if reached and index:
                reached(Reached(index - 1, gradient))


def _boundaries(model: nn.Module, input_ids: Tensor, batch: int) -> tuple[Tensor, list, Tensor]:
    """Return the blocks' inputs [blocks, windows, length, hidden], their other arguments, and the last's outputs."""
    states: list[Tensor] = []  # one
    calls, blocks = [], len(families.blocks(model))

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        if not states:
            states.append(layers.room((blocks, *inputs.hidden.shape), inputs.hidden))
        states[0][index] = inputs.hidden
        calls.append(inputs.calls)
        inputs.carry(block)

    last = layers.walk(model, input_ids, visit, batch)
    return states[0], calls, last


def _through_head(model: nn.Module, input_ids: Tensor, hidden: Tensor, loss: Loss, batch: int) -> Tensor:
    """Return the gradient of the last block's outputs [windows, length, hidden], in the place of these."""
    for start in range(0, len(hidden), batch):
        where = slice(start, start + batch)
        inputs = hidden[where].clone().requires_grad_()
        with torch.enable_grad():
            said = head.finished(model, inputs).flatten(0, 1)
            leaf, gradient = said.detach().requires_grad_(), torch.zeros_like(said)
            for rows, logits in head.logits(model, leaf):
                gradient += torch.autograd.grad(loss(input_ids[where], rows, logits), leaf)[0]
            (hidden[where],) = torch.autograd.grad(said, inputs, gradient)
    return hidden


def _through(
    block: nn.Module, inputs: layers.BlockInputs, gradient: Tensor, weights: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Put the gradient of the block's inputs in the place of that of its outputs; return the weights' gradients."""
    found: list[Tensor] = []
    with _differentiable(weights):
        for where in inputs.batches():
            hidden = inputs.hidden[where].clone().requires_grad_()
            with torch.enable_grad():
                output = layers.run(block, hidden, inputs.calls[where.stop - where.start])
                gradient[where], *own = torch.autograd.grad(output, [hidden, *weights], gradient[where])
            found = [before.add_(each) for before, each in zip(found, own, strict=True)] if found else own
    return found


@contextlib.contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Within this context the weights ask for gradients."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
