"""Help a long algorithm go on where it was interrupted: entries saved by key, and an optimizer's state among them.

An algorithm asks `saved` for what an earlier run had finished, computes the rest, and hands over what it has. It
knows nothing of files; `tasks.runtime.journal` keeps the entries on disk, `NOTHING` keeps none. A resumed run has to
give the bytes of an uninterrupted one, so an entry holds everything that the rest depends on: weights, optimizer,
positions and states of random generators. Tensors and JSON only, no pickle. When to write is not its affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Entry(NamedTuple):
    """The entry of a key. The tensors are on the CPU and the caller's own; `values` are JSON's types."""

    tensors: dict[str, Tensor]
    values: Any


class Saved(Protocol):
    """Hold entries by key; keys are made of letters, digits and `._-@`."""

    def load(self, key: str) -> Entry | None:
        """Return the last entry of this key; None if there is none."""

    def save(self, key: str, tensors: Mapping[str, Tensor], values: Any = None) -> None:
        """Keep an entry, in the place of an older one of this key.

        It may be written later: the tensors must not change any more, except where `due` has just said True.
        """

    def due(self) -> bool:
        """Tell whether `save` would write now. What is costly to collect, or changes later, is saved only then."""

    def part(self, name: str) -> Saved:
        """Return the same store for keys of a part of the work, apart from all others."""

    def forget(self) -> None:
        """Drop every entry of this part: what follows doesn't need them."""


class Nothing:
    """Keeps nothing."""

    def load(self, key: str) -> Entry | None:
        return None

    def save(self, key: str, tensors: Mapping[str, Tensor], values: Any = None) -> None:
        pass

    def due(self) -> bool:
        return False

    def part(self, name: str) -> Saved:
        return self

    def forget(self) -> None:
        pass


NOTHING = Nothing()


def training_state(
    weights: Sequence[Tensor], optimizer: torch.optim.Optimizer, generators: Sequence[torch.Generator] = ()
) -> dict[str, Tensor]:
    """Collect weights, optimizer and random generators as tensors.

    Args:
        weights: those that the optimizer trains, in its order.
        optimizer: one with tensors alone in its state, as AdamW has.
    """
    state = {f"weight.{index}": weight.detach() for index, weight in enumerate(weights)}
    for index, slots in optimizer.state_dict()["state"].items():  # AdamW: step, exp_avg, exp_avg_sq per weight
        state |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
    return state | {f"generator.{index}": generator.get_state() for index, generator in enumerate(generators)}


def restore_training(
    state: Mapping[str, Tensor],
    weights: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    generators: Sequence[torch.Generator] = (),
) -> None:
    """Put back what `training_state` gave, in place."""
    for index, weight in enumerate(weights):
        weight.data.copy_(state[f"weight.{index}"])
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():  # "optimizer.<index>.<name>" and others
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            index, _, name = rest.partition(".")
            slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    for index, generator in enumerate(generators):
        generator.set_state(state[f"generator.{index}"])
