"""How much quantising one linear changes the model's answers: the KL divergence it causes alone, per linear and width.

The divergence of the next-token distributions, as HAWQ's perturbation of the loss (Dong et al., arXiv 1905.03696) but
measured instead of approximated by a Hessian. `tasks.algorithms.quantisation.allocation` turns it into bits per linear;
that the divergences of several linears add up is its assumption, and what quantising them together does isn't measured
here.

A linear's measurement restarts at its own block, from the activations there: in a model of L blocks linears cost L / 2
blocks on average, and those of the last block one. All linears and widths of a block go through the later blocks side
by side, so that one block is needed at a time and may be kept elsewhere; it is opened once for each block before it.
Activations [windows, length, hidden] are held of each of them, 28 in a block of 7 linears and 4 widths: at 8B (hidden
4096, float32) 8 MiB per window of 512 each, and a few windows are meant. The model needs no gradients and is the same
afterwards, bit by bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tasks.algorithms.model import checkpoints, families, head, layers, matrices
from tasks.algorithms.model.matrices import Matrix

POSITIONS = 128
"""Positions whose distributions are compared at once: float64 over a vocabulary of 128k they are 131 MB."""

Quantise = Callable[[str, Tensor, int], Tensor]
"""(linear's full name, weight [out, in], bits) -> dequantised weight [out, in]."""
Done = Callable[[int], None]
"""Called after each linear with the number of linears measured so far."""


def measure(
    model: nn.Module,
    input_ids: Tensor,
    quantise: Quantise,
    widths: Sequence[int],
    done: Done | None = None,
    batch: int = 1,
    saved: checkpoints.Saved = checkpoints.NOTHING,
) -> dict[str, dict[int, float]]:
    """Measure KL(original || model with this linear quantised), averaged over all positions, in nats per token.

    Args:
        model: a causal language model of a supported family, in evaluation mode.
        input_ids: [windows, length], all tokens count.
        quantise: must not change the weight it gets.
        widths: the bits to try.
        batch: windows per forward pass; no effect on the result beyond rounding.
        saved: linears that it holds aren't measured again.

    Returns:
        full module name -> bits -> divergence, in the order in which the linears run.

    Raises:
        InputError: the model's family isn't supported.
    """
    # One walk of the unchanged model, for its outputs and for how each block is called: [windows, length, hidden].
    calls: list[Mapping[int, layers.Call]] = []
    last = layers.walk(model, input_ids, lambda index, block, inputs: calls.append(inputs.calls), batch)
    blocks, by_block = families.blocks(model), matrices.by_block(model)
    before = saved.load("measured")
    measured = {name: dict(found) for name, found in before.values} if before else {}
    reported = 0

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        nonlocal reported
        names = list(by_block[index])
        if names[0] not in measured:  # a block's linears are all saved at once
            # `inputs` are the unchanged model's, so that no other linear's error is in what is measured.
            states = [
                _changed(matrix, quantise(name, matrix.weight, bits), block, inputs)
                for name, matrix in by_block[index].items()
                for bits in widths
            ]  # [windows, length, hidden] each
            for later, call in zip(blocks[index + 1 :], calls[index + 1 :], strict=True):
                with layers.opened(later):
                    for each in states:
                        layers.BlockInputs(each, call, inputs.batch).carry(later)
            found = iter(_divergences(model, last, states, inputs))
            measured.update({name: {bits: next(found) for bits in widths} for name in names})
            if saved.due():
                saved.save("measured", {}, [(each, list(found.items())) for each, found in measured.items()])
        for _ in names if done else ():
            reported += 1
            done(reported)

    layers.walk(model, input_ids, visit, batch)
    return measured


@contextlib.contextmanager
def _replaced(matrix: Matrix, weight: Tensor) -> Iterator[None]:
    """Within this context the matrix has another weight [out, in]."""
    if tuple(weight.shape) != matrix.shape:
        raise ValueError(f"quantise returned {tuple(weight.shape)} for a weight of {matrix.shape}")
    original = matrix.weight.clone()
    matrix.set(weight)
    try:
        yield
    finally:
        matrix.set(original)


def _changed(matrix: Matrix, weight: Tensor, block: nn.Module, inputs: layers.BlockInputs) -> Tensor:
    """Return the block's outputs [windows, length, hidden] with this weight in the matrix; `inputs.hidden` stays."""
    outputs = torch.empty_like(inputs.hidden)
    with _replaced(matrix, weight):
        for where, output in inputs.outputs(block):
            outputs[where] = output
    return outputs


def _divergences(model: nn.Module, last: Tensor, changed: Sequence[Tensor], inputs: layers.BlockInputs) -> list[float]:
    """Average KL per position between the distributions after the last block's outputs `last` and each of `changed`."""
    said = head.of(model)
    totals = [0.0] * len(changed)
    with torch.no_grad():
        for where in inputs.batches():
            parts = [tensor[where].flatten(0, 1).split(POSITIONS) for tensor in (last, *changed)]
            for before, *after in zip(*parts, strict=True):  # [positions, hidden] each
                logits = said(head.finished(model, before))  # [positions, vocabulary]
                p = logits.softmax(dim=-1)
                for index, hidden in enumerate(after):
                    totals[index] += _summed_divergence(p, said(head.finished(model, hidden)) - logits)
    # rounding can make a divergence of nothing negative
    return [max(0.0, total / last[..., 0].numel()) for total in totals]


def _summed_divergence(p: Tensor, moved: Tensor) -> float:
    """Sum KL(P || Q) over positions, of P [positions, vocabulary] and logits that moved by so much; `moved` is used up.

    With z_q = z_p + d and c = sum of p d, KL = log(sum of p exp(d - c)): sum of P (log P - log Q) would be a difference
    of logarithms, which float32 rounds by as much as 8 bits change them.
    """
    moved -= (p * moved).sum(dim=-1, keepdim=True, dtype=torch.float64)
    # exp(x) - 1 - x instead of exp(x) - 1: the p-weighted mean of x is 0, but for its rounding
    return float((p * moved.expm1().sub_(moved)).sum(dim=-1, dtype=torch.float64).log1p().sum())
