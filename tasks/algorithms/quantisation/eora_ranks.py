"""How many ranks each linear's branch gets of a budget of bytes, by what they are worth to the model's predictions.

The squared singular values of EoRA's matrix (`tasks.algorithms.quantisation.eora`) are what each further rank removes
of the squared output error. To be comparable across linears they are weighted by what an output error of each linear
costs the prediction (`gains`); `allocate` spends the budget. The branches themselves are computed afterwards.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from tasks.algorithms.model import backward, checkpoints, layers, matrices
from tasks.algorithms.quantisation import eora, output_error

MEASURED = 8
"""Calibration windows on which ranks are weighed, at most: their order is asked for, not their digits. Branches are
computed on all of them."""

Done = Callable[[str, float], None]
"""Called after each linear with its name and an error: the one left, or the one that there is."""


def curvature(model: nn.Module, input_ids: Tensor, saved: checkpoints.Saved = checkpoints.NOTHING) -> dict[str, float]:
    """Measure how much a linear's output errors change the prediction: its outputs' Fisher information, per output.

    An error e [tokens, out_features] whose directions are random changes the predicted distributions by about
    curvature * ||e||_F^2 / 2 (KL divergence, nats, summed over tokens). The gradients are those of labels that the
    model draws itself, which makes it the true Fisher information and not the empirical one of the corpus.

    Args:
        model: with ordinary linears in its blocks, in evaluation mode; left as it was.
        input_ids: [windows, length]; windows run one by one, and blocks are gone through backward one by one.
        saved: what it holds of an interrupted run isn't computed again.

    Returns:
        Full module name -> squared gradient of the summed loss, averaged over outputs and tokens.
    """
    inside = matrices.by_block(model)
    squares = {name: 0.0 for block in inside for name in block}
    generator = torch.Generator().manual_seed(0)  # the labels are part of the method: the same in every run
    came_to = None
    if begun := saved.load("curvature"):
        block, squares = begun.values
        came_to = backward.Reached(block, begun.tensors["gradient"])

    def visit(index: int, _: nn.Module, back: backward.Back) -> None:
        with _watching_gradients(inside[index], squares):
            back(())

    def reached(here: backward.Reached) -> None:
        if saved.due():
            saved.save("curvature", {"gradient": here.gradient}, [here.block, squares])

    def loss(_: Tensor, __: slice, logits: Tensor) -> Tensor:
        return _own_loss(logits.float(), generator)

    backward.backward(model, input_ids, loss, visit, 1, came_to, reached)
    return {name: square / input_ids.numel() for name, square in squares.items()}


def _own_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the summed loss of labels that the logits [rows, vocabulary] draw themselves."""
    # Fisher information is E[g g^T] over labels y ~ p(y | x), g the gradient of -log p(y | x).
    # They are drawn on the CPU, as the generator is there: one seed is one series of labels.
    labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)  # [rows]
    return nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")


@contextlib.contextmanager
def _watching_gradients(inside: Mapping[str, matrices.Matrix], squares: dict[str, float]) -> Iterator[None]:
    """Within this context a backward pass adds to `squares` each linear's squared gradients, averaged over outputs."""

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:  # [1, length, out_features]
            squares[name] += float(gradient.double().square().mean(dim=-1).sum())

        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(add)

        return hook

    handles = [matrix.module.register_forward_hook(watch(name)) for name, matrix in inside.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gains(
    model: nn.Module,
    input_ids: Tensor,
    teacher: Mapping[str, Tensor],
    done: Done | None = None,
    saved: checkpoints.Saved = checkpoints.NOTHING,
) -> dict[str, Tensor]:
    """Estimate what each rank of each linear's branch is worth: the KL divergence that it removes, nats per token.

    It is the squared output error that the rank removes (exact and additive within a linear), times half the linear's
    `curvature` (an estimate: to second order, errors in random directions, no interaction between linears). Relative
    output errors would not do: they give ranks to linears whose output hardly matters.

    Inputs are those of the compressed model without any branch. Branches are computed in order afterwards, each on
    inputs that the ones before it changed, so that their errors differ a little from what the ranks were chosen by.

    Args:
        model: the compressed model with ordinary float32 linears; left as it was.
        input_ids, teacher, saved: as for `eora_branches.compensate`; the first `MEASURED` windows are used.

    Returns:
        Full module name -> float64 [smaller side], falling; ranks that remove nothing are 0.

    Raises:
        InputError: a teacher's weight of another shape.
    """
    input_ids = input_ids[:MEASURED]
    weights = curvature(model, input_ids, saved)
    worth: dict[str, Tensor] = {}

    def visit(index: int, block: nn.Module, inputs: layers.BlockInputs) -> None:
        block_matrices = matrices.by_block(model)[index]
        if before := saved.load(f"gains{index}"):
            worth.update(before.tensors)
            for name, error in before.values.items() if done else ():
                done(name, error)
            return
        errors = {}
        for name, moments in output_error.second_moments(block_matrices, block, inputs, carry=True).items():
            delta = eora.lost(name, block_matrices[name].weight, teacher[name])
            # To second order KL is 1/2 e^T F e: with F taken as curvature * I, a rank's part of ||e||_F^2 alone counts.
            worth[name] = eora.spectrum(delta, moments) * weights[name] / (2 * input_ids.numel())
            errors[name] = output_error.relative_error(delta, teacher[name], moments)
            if done:
                done(name, errors[name])
        saved.save(f"gains{index}", {name: worth[name] for name in block_matrices}, errors)

    layers.walk(model, input_ids, visit)
    return {name: worth[name] for name in teacher}


def allocate(worth: Mapping[str, Tensor], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Choose ranks that fit a budget, by what they are worth per byte; a linear's rank may be 0.

    The next rank is always the one that is worth most per byte among those that still fit. As a linear's ranks are
    worth less and less, that is optimal where all sizes are equal, and else short of it by less than one rank.

    Args:
        worth: name -> [ranks], falling (`gains`); a rank that is worth nothing is not bought.
        sizes: name -> bytes of one rank (`eora_branches.rank_bytes`).
        budget: bytes.

    Returns:
        name -> rank, in the order of `worth`.
    """
    ranks = dict.fromkeys(worth, 0)
    values = {name: gain.tolist() for name, gain in worth.items()}
    places = {name: place for place, name in enumerate(worth)}  # settles ties
    # Worth falls with the rank: the best rank to buy is the best among each linear's next one, and a heap holds those.
    heap = [(-value[0] / sizes[name], places[name], name) for name, value in values.items()]
    heapq.heapify(heap)
    while heap:
        _, _, name = heapq.heappop(heap)
        rank = ranks[name]
        if values[name][rank] <= 0 or sizes[name] > budget:
            continue  # the linear is out: its further ranks are worth no more and cost as much
        ranks[name], budget = rank + 1, budget - sizes[name]
        if rank + 1 < len(values[name]):
            heapq.heappush(heap, (-values[name][rank + 1] / sizes[name], places[name], name))
    return ranks
