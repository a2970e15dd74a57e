"""Recovery block by block: the kept weights of a pruned block are trained to reproduce a dense teacher's activations.

The unit of reconstruction is BRECQ's block (Li et al. 2021, arXiv:2102.05426), the objective is AdaRound's asymmetric
reconstruction (Nagel et al. 2020, arXiv:2004.10568), with the pruning mask in the place of the rounding: a block gets
the activations that the already reconstructed blocks before it produce, and is trained (AdamW on the full weights under
the mask, no adapter) to give what the teacher has at this depth on its own, dense inputs; so a block also makes up for
errors of those before. After depth pruning the target of a block is the teacher's hidden state just before the next
block that was kept: the removed blocks' effect is part of it.

Loss: squared error relative to the target's energy. No backward pass goes through more than one block; no loss is on
tokens. Every block is trained for all steps of the recipe, on the same windows, each used once per block: as many
forward and backward passes of each block as a training of the whole model has, less embedding and head. It holds the
activations of all windows at one depth twice: 8 bytes * steps * batch * length * hidden size. Norms are not trained. A
student's weights may be in the type that they are stored in: those of the block that is trained are float32 meanwhile,
and rounded when the next block has its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tasks.algorithms.model import checkpoints, families, layers, matrices, stored_type
from tasks.algorithms.model.device import repeatable_attention
from tasks.algorithms.recovery import distillation
from tasks.algorithms.recovery.training import COLUMNS, STATE, Recipe, rate, sample, update

Report = Callable[[int, float], None]
"""It is called after each step with its number (from 1, over all blocks) and its loss."""


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    tokens: Tensor,
    recipe: Recipe,
    *,
    targets: Collection[str],
    keep: Mapping[str, Tensor],
    kept: Sequence[int],
    report: Report = lambda step, loss: None,
    saved: checkpoints.Saved = checkpoints.NOTHING,
) -> list[dict[str, float]]:
    """Train the blocks one after the other, in place; the model is in evaluation mode and frozen afterwards.

    Args:
        model: one of a supported family; its weights are zero wherever `keep` is False, and stay so.
        teacher: the dense model, with the same embedding, on the same device.
        tokens: int64 [corpus], the corpus as one row of token ids, on the CPU.
        recipe: `steps` are per block; `distillation` and `hidden` have no effect.
        targets: full names of the linears to train.
        keep: module name -> bool [out, in]; a linear without a mask is dense.
        kept: the index in the teacher of each of the model's blocks, ascending.
        saved: what it holds of an interrupted run on the same models is taken up: the rest gives the same bytes.

    Returns:
        One row per step of each block, `COLUMNS`; `loss` and `hidden` are the relative squared error before the update.

    Raises:
        InputError: the corpus is shorter than a window; loss or gradient stop being finite.
    """
    windows = recipe.steps * recipe.batch
    ids = sample(tokens, windows, recipe.length, torch.Generator().manual_seed(recipe.seed))  # [windows, length]
    model.eval().requires_grad_(False)
    blocks, by_block = families.blocks(model), matrices.by_block(model)
    calls: list[layers.Call] = []  # for the student's blocks up to the one that is trained next
    history: list[dict[str, float]] = []
    state: list[Tensor] = []  # one tensor: the student's hidden states [windows, length, hidden]

    def fit(target: Tensor) -> None:
        index = len(calls) - 1
        trained = {name: each.module for name, each in by_block[index].items() if name in targets}
        with stored_type.rounded_afterwards(trained.values()):
            weights = {module.weight: keep.get(name) for name, module in trained.items()}
            steps = _fit(blocks[index], calls[index], weights, state[0], target, recipe, saved, index)
            for learning_rate, loss in steps:
                history.append(_row(len(history) + 1, loss, learning_rate))
                report(len(history), loss)

    def visit(index: int, _: nn.Module, inputs: layers.BlockInputs) -> None:
        if not state:
            state.append(inputs.hidden.clone())  # both models embed alike
        # the teacher's hidden states before block `index`; those before a removed block are no target
        if index in kept:
            if calls:  # these inputs are the target of the kept block before this one
                fit(inputs.hidden)
            calls.append(inputs.calls[recipe.batch])

    with repeatable_attention(model.device):  # the last block's target is what the walk ends with
        fit(layers.walk(teacher, ids.to(model.device), visit, recipe.batch))
    return history


def _fit(
    block: nn.Module,
    call: layers.Call,
    weights: Mapping[nn.Parameter, Tensor | None],
    hidden: Tensor,
    target: Tensor,
    recipe: Recipe,
    saved: checkpoints.Saved,
    index: int,
) -> Iterator[tuple[float, float]]:
    """Train a block on hidden -> target, both [windows, length, hidden], and yield each step's learning rate and loss.

    At the end `hidden` holds the block's outputs.

    Args:
        weights: those to train, each with its mask of what was kept, or None.
        saved: its entry `block<index>` holds the trained weights, `STATE` the training that was interrupted.
    """
    positional, named = call
    batches = [slice(start, start + recipe.batch) for start in range(0, len(hidden), recipe.batch)]
    trained = list(weights)
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    steps, finished = _taken(saved, index, trained, optimizer)
    yield from list(steps)
    with _trainable(weights):
        for step, where in enumerate(batches[len(steps) :], start=len(steps) + 1):
            # ||f(x') - f_teacher(x)||^2 / ||f_teacher(x)||^2: x' comes from reconstructed blocks, x from the teacher's
            loss = distillation.relative_error(block(hidden[where], *positional, **named), target[where])
            learning_rate = rate(step, recipe)
            update(loss, optimizer, step, learning_rate)
            steps.append((learning_rate, float(loss.detach())))
            if saved.due():
                state = checkpoints.training_state(trained, optimizer)
                saved.save(STATE, state, {"block": index, "steps": steps})
            yield steps[-1]
    if not finished:
        saved.save(f"block{index}", {str(place): weight.detach() for place, weight in enumerate(trained)}, steps)
    with torch.no_grad():
        for where in batches:  # in place: the next block's inputs
            hidden[where] = block(hidden[where], *positional, **named)


def _taken(
    saved: checkpoints.Saved, index: int, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[list[tuple[float, float]], bool]:
    """Return this block's steps that an interrupted run took, and whether these are all; restore what it trained."""
    if finished := saved.load(f"block{index}"):
        for place, weight in enumerate(trained):
            weight.data.copy_(finished.tensors[str(place)])
        return finished.values, True
    begun = saved.load(STATE)
    if begun is None or begun.values["block"] != index:
        return [], False
    checkpoints.restore_training(begun.tensors, trained, optimizer)
    return begun.values["steps"], False


@contextmanager
def _trainable(weights: Mapping[nn.Parameter, Tensor | None]) -> Iterator[None]:
    """Give the weights gradients inside the context, exactly zero where pruned: AdamW then moves nothing there."""

    def masked(mask: Tensor) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            weight.grad.mul_(mask)

        return hook

    handles = []
    for weight, mask in weights.items():
        weight.requires_grad_(True)
        if mask is not None:
            handles.append(weight.register_post_accumulate_grad_hook(masked(mask.to(weight.device))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def _row(step: int, loss: float, learning_rate: float) -> dict[str, float]:
    row = dict.fromkeys(COLUMNS, math.nan)
    return row | {"step": step, "loss": loss, "hidden": loss, "learning_rate": learning_rate}
