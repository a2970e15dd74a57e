"""How much quantising one linear changes the model's answers: the KL divergence it causes alone, per linear and width.

The divergence of the next-token distributions, as HAWQ's perturbation of the loss (Dong et al., arXiv 1905.03696) but
measured instead of approximated by a Hessian. `tasks.algorithms.quantisation.allocation` turns it into bits per linear;
that the divergences of several linears add up is its assumption, and what quantising them together does isn't measured
here.

A linear's measurement restarts at its own block, from the activations there: in a model of L blocks linears cost L / 2
blocks on average, and those of the last block one. Two activations [windows, length, hidden] are held besides the one
that is computed, at 8B (hidden 4096, float32) 8 MiB per window of 512 each: a few windows are meant. The model needs no
gradients and is the same afterwards, bit by bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tasks.algorithms.model import checkpoints, families, layers, matrices
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
    known = {name: dict(found) for name, found in before.values} if before else {}
    measured: dict[str, dict[int, float]] = {}

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        for name, matrix in by_block[index].items():
            original = matrix.weight
            measured[name] = known.get(name, {})
            if name not in known:
                # `inputs` are the unchanged model's, so that no other linear's error is in what is measured.
                tried = [quantise(name, original, bits) for bits in widths]  # [out, in] each
                changed = [_continued(matrix, weight, blocks[index:], calls[index:], inputs) for weight in tried]
                measured[name] = dict(zip(widths, _divergences(model, last, changed), strict=True))
            if name not in known and saved.due():
                saved.save("measured", {}, [(each, list(found.items())) for each, found in measured.items()])
            if done:
                done(len(measured))

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


def _continued(
    matrix: Matrix,
    weight: Tensor,
    blocks: Sequence[nn.Module],
    calls: Sequence[Mapping[int, layers.Call]],
    inputs: layers.BlockInputs,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (windows of the batch, last block's outputs [batch, length, hidden]) with this weight in the matrix.

    `inputs.hidden` stays as it is, and so does the matrix between two batches.
    """
    for where in inputs.batches():
        hidden = inputs.hidden[where]
        with _replaced(matrix, weight):
            for block, by_batch in zip(blocks, calls, strict=True):
                ((_, hidden),) = layers.BlockInputs(hidden, by_batch, inputs.batch).outputs(block)
        yield where, hidden


def _divergences(model: nn.Module, last: Tensor, changed: Sequence[Iterator[tuple[slice, Tensor]]]) -> list[float]:
    """Average KL per position between the distributions after the last block's outputs `last` and each of `changed`."""
    described = families.of_model(model)
    norm, head = model.get_submodule(described.final_norm), model.get_submodule(described.head)
    totals = [0.0] * len(changed)
    with torch.no_grad():
        for several in zip(*changed, strict=True):
            where = several[0][0]
            parts = [tensor.flatten(0, 1).split(POSITIONS) for tensor in (last[where], *(each for _, each in several))]
            for before, *after in zip(*parts, strict=True):  # [positions, hidden] each
                logits = head(norm(before))  # [positions, vocabulary]
                p = logits.softmax(dim=-1)
                for index, hidden in enumerate(after):
                    totals[index] += _summed_divergence(p, head(norm(hidden)) - logits)
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
