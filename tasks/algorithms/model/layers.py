"""The one walk that carries calibration activations from block to block; every algorithm that needs them visits it.

Only the activations at one block boundary are held: [windows, length, hidden]; in memory, or where `streaming.SPILL`
says, such as a mapped file, where they are many. It does not run the final norm and head,
and computes no gradients. A model may keep its blocks elsewhere (`tasks.models.streamed_folder`: on disk). Such a block
has its weights while it is open, and whoever reads them, forward passes too, opens it; the walk does so for its visits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.algorithms.model import families, streaming
from tasks.algorithms.model.device import beside
from tasks.algorithms.model.matrices import Matrix, by_block

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a block after its hidden states: masks, position embeddings, …"""

STORED = "stored_weights"
"""The attribute of a block whose weights are kept elsewhere: called with the block, a context in which it has them."""


def opened(block: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within this context the block has its weights; that of an ordinary model always has them."""
    stored = getattr(block, STORED, None)
    return contextlib.nullcontext() if stored is None else stored(block)


def kept_elsewhere(model: Any) -> bool:
    """Whether a block of the model has to be opened for a forward pass."""
    return isinstance(model, nn.Module) and any(hasattr(module, STORED) for module in model.modules())


def weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield full name -> weight [out, in] of each block's matrices, the block open until the next one is asked for.

    Raises:
        InputError: the model's family isn't supported.
    """
    for block, inside in zip(families.blocks(model), by_block(model), strict=True):
        with opened(block):
            yield {name: matrix.weight for name, matrix in inside.items()}


@contextlib.contextmanager
def opening_themselves(model: nn.Module) -> Iterator[None]:
    """Within this context the model's own forward opens each block when it comes to it: all of them for each token."""
    kept = [module for module in model.modules() if hasattr(module, STORED)] if kept_elsewhere(model) else []

    def opening(block: nn.Module) -> Callable[..., Any]:
        own = block.forward

        def forward(*positional: Any, **named: Any) -> Any:
            with opened(block):
                return own(*positional, **named)

        return forward

    try:
        for block in kept:
            block.forward = opening(block)
        yield
    finally:
        for block in kept:
            vars(block).pop("forward", None)


def run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Run a block on hidden states [batch, length, hidden]; its own, without what some families return beside them."""
    positional, named = call
    output = block(hidden, *positional, **named)
    return output if isinstance(output, Tensor) else output[0]


@dataclass
class BlockInputs:
    """The inputs of one block, valid during the visit only: the walk overwrites `hidden` with the block's outputs.

    Attributes:
        hidden: [windows, length, hidden].
        calls: the block's other arguments, by the number of windows in the batch.
        batch: windows per forward pass.
        carried: `hidden` has become the block's outputs: a visit that ran the block anyway spares the walk its pass.
    """

    hidden: Tensor
    calls: Mapping[int, Call]
    batch: int
    carried: bool = False

    def batches(self) -> Iterator[slice]:
        """Yield the windows of each batch."""
        for start in range(0, len(self.hidden), self.batch):
            yield slice(start, min(start + self.batch, len(self.hidden)))

    def output(self, block: nn.Module, where: slice) -> Tensor:
        """Run the block on one batch: [batch, length, hidden]."""
        with torch.no_grad():
            return run(block, self.hidden[where], self.calls[where.stop - where.start])

    def outputs(self, block: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """Run the block batch by batch, and yield (windows of the batch, outputs [batch, length, hidden])."""
        for where in self.batches():
            yield where, self.output(block, where)

    def carry(self, block: nn.Module, see: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Put the block's outputs, as its weights are now, in the place of its inputs.

        Args:
            see: called with each batch's inputs and outputs, [batch, length, hidden].
        """
        for where, output in self.outputs(block):
            if see:
                see(self.hidden[where], output)
            self.hidden[where] = output
        self.carried = True


class _SeenAll(Exception):
    """It ends a forward pass of which no more is wanted."""


class InputStatistics(NamedTuple):
    """Sums of squares of a linear's inputs over `tokens` tokens, float64 [in_features]."""

    sum_of_squares: Tensor
    tokens: int

    @property
    def norm(self) -> Tensor:
        """The Euclidean norm of each input over all tokens, float64 [in_features]."""
        return self.sum_of_squares.sqrt()


Visit = Callable[[int, nn.Module, BlockInputs], None]


def walk(
    model: nn.Module, input_ids: Tensor, visit: Visit, batch: int = 1, entered: Callable[[], None] | None = None
) -> Tensor:
    """Visit the blocks in order, each with the activations that the blocks before it (as changed by `visit`) produce.

    Args:
        model: a causal language model of a supported family, in evaluation mode.
        input_ids: [windows, length], all tokens count (no padding).
        visit: called with (index, block, inputs), the block open; it may change the block's weights, and run it for
            the walk (`BlockInputs.carry`).
        batch: windows per forward pass; no effect on the result beyond rounding.
        entered: called when the walk has no more need of what is outside of the blocks.

    Returns:
        The last block's outputs [windows, length, hidden], before the final norm.

    Raises:
        InputError: the model's family isn't supported.
    """
    held: list[Tensor] = []  # one: [windows, length, hidden]
    done = 0

    def enter(states: Tensor) -> None:
        nonlocal done
        if not held:
            held.append(room((len(input_ids), *states.shape[1:]), states))
        held[0][done : done + len(states)] = states
        done += len(states)

    calls, hidden = _enter(model, input_ids.split(batch), enter), held[0]
    if entered:
        entered()
    for index, block in enumerate(families.blocks(model)):
        inputs = BlockInputs(hidden, {windows: call for (windows, _), call in calls[index].items()}, batch)
        with opened(block):
            visit(index, block, inputs)
            if not inputs.carried:  # after the visit, so that the next block gets what the changed weights give
                inputs.carry(block)
    return hidden


def carry(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Run all batches through one block after another, so that each block is opened once.

    Args:
        model: as for `walk`.
        batches: token ids [batch, length], each of its own size.

    Returns:
        The last block's outputs of each, [batch, length, hidden], before the final norm.

    Raises:
        InputError: the model's family isn't supported.
    """
    hidden: list[Tensor] = []
    calls = _enter(model, batches, hidden.append)
    for index, block in enumerate(families.blocks(model)):
        with opened(block), torch.no_grad():
            for at, states in enumerate(hidden):
                hidden[at] = run(block, states, calls[index][states.shape[0], states.shape[1]])
    return hidden


def observe(
    matrices: Mapping[str, Matrix],
    block: nn.Module,
    inputs: BlockInputs,
    see: Callable[[str, Tensor], None],
    carry: bool = False,
) -> None:
    """Run the block as it is and call `see(name, x)` with each linear's input x [batch * length, in_features].

    A batch ends where all linears have been seen: what the block would compute after them is left out.

    Args:
        matrices: those of the block to watch (`matrices.by_block(model)[index]`); their modules may be quantised, and
            each runs once in a forward pass.
        carry: the block's weights stay as they are: its outputs take the place of its inputs in the same pass.
    """
    waiting: set[str] = set()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def saw(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            see(name, arguments[0].detach().flatten(0, -2))  # [batch, length, in_features] flattened
            waiting.discard(name)
            if not waiting and not carry:
                raise _SeenAll

        return saw

    handles = [matrix.module.register_forward_pre_hook(hook(name)) for name, matrix in matrices.items()]
    try:
        if carry:
            inputs.carry(block)
            return
        for where in inputs.batches():
            waiting.update(matrices)
            with contextlib.suppress(_SeenAll):
                inputs.output(block, where)
    finally:
        for handle in handles:
            handle.remove()


def input_statistics(
    matrices: Mapping[str, Matrix], block: nn.Module, inputs: BlockInputs, carry: bool = False
) -> dict[str, InputStatistics]:
    """Sum the squares of each linear's inputs, from the block's own forward, in float64; `carry` as for `observe`."""
    statistics: dict[str, InputStatistics] = {}
    last: list[Tensor] = []  # the inputs seen last [tokens, in_features], and their squares' sums [in_features]

    def see(name: str, x: Tensor) -> None:
        if not (last and _same(x, last[0])):  # linears side by side get the same tensor
            last[:] = x, x.double().square().sum(dim=0)
        squares, before = last[1], statistics.get(name)
        if before:
            squares = squares + before.sum_of_squares
        statistics[name] = InputStatistics(squares, len(x) + (before.tokens if before else 0))

    observe(matrices, block, inputs, see, carry)
    return statistics


def _same(x: Tensor, other: Tensor) -> bool:
    """Whether both are views of the same values; `other` is alive, so that nothing else can be in its place."""
    return x.data_ptr() == other.data_ptr() and x.shape == other.shape and x._version == other._version


def room(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Make a tensor of this shape, without values: in memory, or where hidden states are spilled to."""
    spill = streaming.SPILL.get()
    if spill is not None and like.device.type == "cpu":
        room = spill(math.prod(shape) * like.element_size())
        if room is not None:
            return room.view(like.dtype).view(shape)
    return like.new_empty(shape)


def _enter(
    model: nn.Module, batches: Sequence[Tensor], enter: Callable[[Tensor], None]
) -> list[dict[tuple[int, int], Call]]:
    """Call `enter` with each batch's input of the first block; return the blocks' other arguments.

    Per block they are by (windows, length) of a batch.

    The model's own forward runs with blocks that hand their input on and note how they were called: blocks of one model
    can get different masks (sliding windows). All tokens count, so the arguments depend on a batch's sizes only.
    """
    blocks, outputs = families.blocks(model), families.of_model(model).outputs
    calls: list[dict[tuple[int, int], Call]] = [{} for _ in blocks]

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *positional: Any, **named: Any) -> Any:
            calls[index].setdefault((hidden_states.shape[0], hidden_states.shape[1]), (positional, named))
            if index == 0:
                enter(hidden_states)
            return (hidden_states, *(None,) * (outputs - 1)) if outputs else hidden_states

        return forward

    forwards = [vars(block).get("forward") for block in blocks]  # an instance's own: quantised models can have one
    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
        with torch.no_grad():
            for ids in batches:
                model.base_model(input_ids=beside(model, ids), use_cache=False)
    finally:
        for block, forward in zip(blocks, forwards, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
    return calls
