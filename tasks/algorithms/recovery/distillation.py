"""Losses of a model against a dense teacher: on its next-token distribution, and on the outputs of its blocks.

The distribution's is the distillation of Hinton et al. 2015 (arXiv:1503.02531) beside the causal-LM loss. With student
logits z, teacher logits v and a temperature T, q_i = exp(z_i / T) / sum_j exp(z_j / T) (their eq. 1), p likewise from
v, and the loss is T^2 * KL(p || q), since its gradient shrinks as 1 / T^2 (their section 2). Both losses are computed
here with their gradient, a few rows of the logits at a time, in the forward pass: written with autograd they make a
dozen tensors of [positions, vocabulary], which took 30 % of a training step on a CPU with a vocabulary of 2048. The
logits themselves, student's and teacher's, are made chunk by chunk (`tasks.algorithms.model.head`) and dropped: what
stays for the backward pass is the gradient of the head's inputs, [positions, hidden].

The blocks' is the relative squared error ||student - teacher||^2 / ||teacher||^2. Blocks' outputs come from hooks,
because the last of transformers' `output_hidden_states` is the one after the final norm. The module trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.algorithms.model import stored_type
from tasks.algorithms.model.rows import chunks

CHUNK = 2**18
"""A chunk of rows has at most so many logits, 1 MiB in float32: they stay in a core's cache. It moves rounding only."""


class Losses(NamedTuple):
    """The losses of a batch, scalars in nats; only `loss` has a gradient.

    Attributes:
        loss: (1 - weight) * causal + weight * distilled.
        causal: mean cross entropy of each next token.
        distilled: T^2 * KL(teacher || student), averaged over all positions; NaN without a teacher.
    """

    loss: Tensor
    causal: Tensor
    distilled: Tensor


class Said(NamedTuple):
    """What a model says of some positions: its head's inputs [positions, hidden], and the head, which isn't trained."""

    states: Tensor
    head: nn.Module


def token_losses(
    student: Said, ids: Tensor, teacher: Said | None = None, weight: float = 0.0, temperature: float = 1.0
) -> Losses:
    """Return the causal-LM loss, mixed with the distillation of the teacher's logits.

    Args:
        student: of batch * length positions; only its states get a gradient.
        ids: int64 [batch, length].
        teacher: of the same positions and vocabulary.
        weight: the distillation's share, 0 to 1.
        temperature: T; T^2 keeps the gradient's size independent of it.
    """
    if teacher is None:
        weight = 0.0
    following = F.pad(ids[:, 1:], (0, 1), value=-1).flatten()  # -1: nothing follows a window's last token
    with stored_type.widened(student.head), stored_type.widened(None if teacher is None else teacher.head):
        return Losses(*_TokenLosses.apply(student.states, student.head, following, teacher, weight, temperature))


class _TokenLosses(torch.autograd.Function):
    """The losses of the head's inputs [positions, hidden] and their following tokens int64 [positions], -1 for none.

    The gradient is made beside the loss, in one pass over the rows, and kept for `backward`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: nn.Module,
        following: Tensor,
        teacher: Said | None,
        weight: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.gradient = torch.empty_like(states)  # d loss / d states
        predictions = int((following >= 0).sum())
        causal, distilled = states.new_zeros((), dtype=torch.float64), states.new_zeros((), dtype=torch.float64)
        causal_scale = (1 - weight) / predictions
        distilled_scale = weight * temperature / len(states)  # T^2 of the loss times 1 / T of Hinton et al.'s eq. 2
        for at in chunks(len(states), head.out_features):
            with torch.enable_grad():
                inputs = states[at].detach().requires_grad_()
                logits = head(inputs)  # [rows, vocabulary]
            target = None if teacher is None else teacher.head(teacher.states[at])
            gradient = torch.empty_like(logits)  # d loss / d logits
            for part in _cached_rows(logits):
                causal += _causal(logits[part].detach(), following[at][part], causal_scale, gradient[part])
                if target is not None:
                    both = logits[part].detach(), target[part]
                    distilled += _distilled(*both, temperature, distilled_scale, gradient[part])
            (ctx.gradient[at],) = torch.autograd.grad(logits, inputs, gradient)
        causal = causal / predictions
        distilled = distilled * (temperature**2 / len(states) if teacher is not None else torch.nan)
        loss = (1 - weight) * causal + weight * distilled if weight else causal
        values = tuple(value.to(states.dtype) for value in (loss, causal, distilled))
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place: it serves one backward pass
        return gradient.mul_(gradients[0]), None, None, None, None, None


def _cached_rows(logits: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _causal(logits: Tensor, following: Tensor, scale: float, gradient: Tensor) -> Tensor:
    """Return the sum of the rows' cross entropies, float64, and write `scale` times its gradient to `gradient`.

    logits and gradient [rows, vocabulary], following [rows].
    """
    counts = (following >= 0)[:, None]  # [rows, 1]
    target = following.clamp_min(0)[:, None]  # [rows, 1]
    logs = F.log_softmax(logits, dim=1)  # log q, [rows, vocabulary]
    loss = -(logs.gather(1, target) * counts).sum(dtype=torch.float64)
    # d(-log q_y) / dz = q - onehot(y), without a tensor of its own
    torch.exp(logs, out=gradient)
    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
    gradient.mul_(counts * scale)
    return loss


def _distilled(logits: Tensor, teacher: Tensor, temperature: float, scale: float, gradient: Tensor) -> Tensor:
    """Return the sum of the rows' KL(teacher || student), float64, and add `scale` times (q - p) to `gradient`."""
    # Hinton et al., eq. 1: log q and log p, [rows, vocabulary]
    student, target = (F.log_softmax(scores / temperature, dim=1) for scores in (logits, teacher))
    p = target.exp()
    loss = target.sub_(student).mul_(p).sum(dtype=torch.float64)  # sum of p (log p - log q)
    # eq. 2: the gradient by z is (q - p) / T; `scale` holds the 1 / T
    gradient.add_(student.exp_().sub_(p), alpha=scale)
    return loss


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ||student - teacher||^2 / ||teacher||^2 over all elements of two tensors of one shape."""
    return (student - teacher).square().sum() / teacher.square().sum()


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean over blocks of the relative squared error of their outputs [batch, length, hidden]."""
    errors = [relative_error(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(errors).mean()


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """Per block a list of its outputs, of as many passes as are made while the context is open."""
    seen: list[list[Tensor]] = [[] for _ in blocks]

    def note(outputs: list[Tensor]) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.append(output)

    handles = [block.register_forward_hook(note(outputs)) for block, outputs in zip(blocks, seen, strict=True)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
