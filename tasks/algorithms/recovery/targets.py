"""What the teacher says of a training's windows, made some steps ahead, and once by two trainings on the same windows.

A teacher whose blocks lie on a disk is opened block by block, for as many steps at once as there is room for: it is
never in memory beside the student. Two trainings may go through the same steps, each in its own time. Of these, each
makes every second step's target some steps before it needs it, and leaves it where the other one finds it; what isn't
there in time it makes itself. So none waits, and each gets what it would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tasks.algorithms.model import checkpoints, head, layers
from tasks.algorithms.recovery import distillation

AHEAD = 32
"""Steps between a target's making and its use, at most: so far one training may run ahead of the other before it has to
make the other's targets, too (lora is 13 % faster than baseline_lora, 26 steps of 200)."""
HELD = 2**28
"""Bytes of targets that are held in memory until they are used, about."""


class Target(NamedTuple):
    """What the teacher says of a step's windows.

    Attributes:
        said: its head with the head's inputs, float32 [batch * length, hidden].
        outputs: those of the blocks that are compared, [batch, length, hidden].
    """

    said: distillation.Said
    outputs: list[Tensor]


class Targets:
    """The teacher's states ahead of its head, step by step.

    Args:
        teacher: in evaluation mode.
        windows: a step's number, from 1 -> its windows, int64 [batch, length] on the teacher's device.
        steps: of the training.
        shared: where targets are left and found; not with `blocks`, as two trainings may compare others.
        turn: 0 or 1, of the two trainings: which steps' targets are this one's to make.
        blocks: the teacher's whose outputs are wanted, too.
    """

    def __init__(
        self,
        teacher: Any,
        windows: Callable[[int], Tensor],
        steps: int,
        shared: checkpoints.Saved = checkpoints.NOTHING,
        turn: int = 0,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        self.teacher, self.windows, self.steps, self.shared, self.turn = teacher, windows, steps, shared, turn
        self.blocks, self.head = blocks, head.of(teacher)
        self.made: dict[int, Target] = {}
        size = 4 * windows(1).numel() * teacher.config.hidden_size * (1 + len(blocks))
        self.ahead = min(AHEAD, HELD // size)
        self.streamed = layers.kept_elsewhere(teacher)
        self.together = max(1, self.ahead // 4) if self.streamed else 1
        self.missed = 0  # of the other training's steps in a row, how many it had not made

    def of(self, step: int) -> Target:
        """Return the target of a step; steps come in order."""
        wanted = [later for later in self._wanted(step) if not self._found(later)]
        if step in wanted and step % 2 != self.turn:
            self.missed += 1
        if wanted:
            self._make(wanted)
        return self.made.pop(step)

    def _wanted(self, step: int) -> list[int]:
        """The steps whose targets are to be found or made now."""
        window = [later for later in range(step, min(step + self.ahead, self.steps) + 1) if later not in self.made]
        alone = self.shared is checkpoints.NOTHING
        if self.streamed and (alone or self.missed > 1):  # nobody else makes them
            return window if step in window else []
        own = [later for later in window if later == step or (not alone and later % 2 == self.turn)]
        return own if step in own or len(own) >= self.together else []

    def _found(self, step: int) -> bool:
        found = self.shared.load(f"step-{step}")
        if found is None:
            return False
        if step % 2 != self.turn:
            self.missed = 0
        self.made[step] = self._target(found.tensors["states"].to(self.windows(step).device), [])
        return True

    def _make(self, steps: Sequence[int]) -> None:
        with torch.no_grad(), distillation.outputs_of(self.blocks) as outputs:  # inference_mode's can't be in a loss
            said = list(head.states_of(self.teacher, [self.windows(step) for step in steps]))
        for place, step in enumerate(steps):
            # from the end: a walk over blocks on a disk calls each before it has its weights, too
            self.made[step] = self._target(said[place], [each[place - len(steps)] for each in outputs])
            self.shared.save(f"step-{step}", {"states": said[place]})

    def _target(self, states: Tensor, outputs: list[Tensor]) -> Target:
        return Target(distillation.Said(states, self.head), outputs)
