"""The linears of a block in groups that see the same input, and passes through the block that run what has changed.

GPTQ needs the inputs of one group after the other, each as the changed linears before it give it. A pass ends at the
group that it is for. Where a submodule of the block (attention, MLP) hands the outputs of its last linear on as its
own, these inputs are kept, and the next passes run that linear instead of the submodule: no linear of a Llama block
runs twice. What is kept is [windows, length, in_features] of such a linear, in memory or where `layers.room` has it.

Groups and submodules are found by watching the forward pass of one batch, not by their names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tasks.algorithms.model import layers
from tasks.algorithms.model.matrices import Matrix

See = Callable[[Tensor], None]
"""Called with a batch's inputs of a group, [batch, length, in_features]."""


class InputGroups:
    """The groups of one block, within a visit of the walk.

    Attributes:
        names: full names of the linears of each group, in running order.
    """

    def __init__(self, matrices: Mapping[str, Matrix], block: nn.Module, inputs: layers.BlockInputs) -> None:
        """Watch the first batch.

        Args:
            matrices: those of the block (`matrices.by_block(model)[index]`); each module runs once in a forward pass.
        """
        self._matrices, self._block, self._inputs = matrices, block, inputs
        self._kept: list[_Kept] = []
        self.names: list[list[str]] = []
        self._watch()

    def observe(self, group: int, see: See) -> None:
        """Run what changed before a group of `names`, and call `see` with its inputs, batch after batch.

        Groups are asked for in their order, and the weights of those before don't change any more.
        """
        first = self._matrices[self.names[group][0]].module
        keeping = [
            kept for kept in self._kept if kept.linear in {self._matrices[name].module for name in self.names[group]}
        ]

        def saw(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach()  # [batch, length, in_features], or its first two flattened
            for kept in keeping:
                kept.keep(x, where, self._inputs)
            see(x.view(*self._inputs.hidden[where].shape[:2], -1))
            raise _Seen

        handle = first.register_forward_pre_hook(saw)
        try:
            for where in self._inputs.batches():
                with self._replaying(where), contextlib.suppress(_Seen):
                    self._inputs.output(self._block, where)
        finally:
            handle.remove()
        for kept in keeping:
            kept.complete = True

    def carry(self) -> None:
        """Put the block's outputs in the place of its inputs, when all groups have been observed and changed."""
        for where in self._inputs.batches():
            with self._replaying(where):
                self._inputs.hidden[where] = self._inputs.output(self._block, where)
        self._inputs.carried = True
        self._kept.clear()

    def _watch(self) -> None:
        """Run the block on the first batch: which linears get one and the same tensor, and what submodules return."""
        got: list[tuple[str, Tensor]] = []
        given: dict[nn.Module, Tensor] = {}
        returned: list[tuple[nn.Module, Any]] = []
        handles = []
        for name, matrix in self._matrices.items():
            handles.append(matrix.module.register_forward_pre_hook(lambda _, x, name=name: got.append((name, x[0]))))
            handles.append(matrix.module.register_forward_hook(lambda module, _, y: given.__setitem__(module, y)))
        for child in self._block.children():
            handles.append(child.register_forward_hook(lambda module, _, y: returned.append((module, y))))
        try:
            self._inputs.output(self._block, next(self._inputs.batches()))
        finally:
            for handle in handles:
                handle.remove()
        last: Tensor | None = None
        for name, x in got:  # tensors that are held can't be mistaken for others
            if x is last:
                self.names[-1].append(name)
            else:
                self.names.append([name])
            last = x
        for child, output in returned:
            first, *others = output if isinstance(output, tuple) else (output,)
            inside = set(child.modules()) - {child}  # OPT's linears are the block's own
            ends = [module for module, y in given.items() if y is first and module in inside]
            if ends and not any(isinstance(other, Tensor) for other in others):
                self._kept.append(_Kept(child, ends[0], output if isinstance(output, tuple) else None))

    @contextlib.contextmanager
    def _replaying(self, where: slice) -> Iterator[None]:
        """Within this context submodules whose last linear's inputs are kept run it and nothing else."""
        ready = [kept for kept in self._kept if kept.complete]
        try:
            for kept in ready:
                kept.module.forward = kept.forward(where)
            yield
        finally:
            for kept in ready:
                vars(kept.module).pop("forward", None)


@dataclass
class _Kept:
    """A submodule that returns what its last linear gives.

    Attributes:
        output: the tuple that it returns, that tensor first; None where it returns a tensor.
        inputs: of the linear, [windows, length, in_features], as far as they have been seen.
        complete: all of them.
        run: firsts of the batches that `inputs` has the linear's outputs of, by now.
    """

    module: nn.Module
    linear: nn.Module
    output: tuple[Any, ...] | None
    inputs: Tensor | None = None
    complete: bool = False
    run: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.output is not None:
            self.output = self.output[1:]

    def keep(self, x: Tensor, where: slice, inputs: layers.BlockInputs) -> None:
        if self.inputs is None:
            self.inputs = layers.room((len(inputs.hidden), *x.shape[1:]), x)
        self.inputs[where] = x

    def forward(self, where: slice) -> Callable[..., Any]:
        def forward(*_: Any, **__: Any) -> Any:
            given = self.inputs[where]
            if where.start not in self.run:
                given = self.linear(given)
                if given.shape[-1] == self.inputs.shape[-1]:  # as wide: next time it need not run again
                    self.inputs[where] = given
                    self.run.add(where.start)
            return given if self.output is None else (given, *self.output)

        return forward


class _Seen(Exception):
    """It ends a forward pass of which no more is wanted."""
