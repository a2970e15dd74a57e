"""What the teacher says of a training's windows, computed once by two trainings on the same windows at once.

Both trainings go through the same steps in their own time. Of two, each computes every second step's target, some steps
before it needs it, and leaves it where the other one finds it; what isn't there in time it computes itself. So none
waits, and each gets what it would have computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tasks.algorithms.model import checkpoints, head

AHEAD = 32
"""Steps between a target's making and its use, at most: so far one training may run ahead of the other before it has to
make the other's targets, too (lora is 13 % faster than baseline_lora, 26 steps of 200)."""
HELD = 2**26
"""Bytes of targets that are held in memory until they are used, about."""


class Targets:
    """The teacher's states ahead of its head, step by step.

    Args:
        teacher: in evaluation mode.
        windows: a step's number, from 1 -> its windows, int64 [batch, length] on the teacher's device.
        steps: of the training.
        shared: where targets are left and found.
        turn: 0 or 1, of the two trainings: which steps' targets are this one's to make.
    """

    def __init__(
        self,
        teacher: Any,
        windows: Callable[[int], Tensor],
        steps: int,
        shared: checkpoints.Saved = checkpoints.NOTHING,
        turn: int = 0,
    ) -> None:
        self.teacher, self.windows, self.steps, self.shared, self.turn = teacher, windows, steps, shared, turn
        self.made: dict[int, Tensor] = {}
        self.ahead = 0  # until a target's size is known

    def of(self, step: int) -> Tensor:
        """Return the teacher's states of a step's windows, float32 [batch * length, hidden]; steps come in order."""
        if self.shared is not checkpoints.NOTHING:
            for later in range(step, min(step + self.ahead, self.steps) + 1):
                if later % 2 == self.turn and later not in self.made:
                    self.made[later] = self._found(later)
        target = self.made.pop(step, None)
        target = self._found(step) if target is None else target
        self.ahead = min(AHEAD, HELD // (target.numel() * target.element_size()))
        return target

    def _found(self, step: int) -> Tensor:
        windows = self.windows(step)
        if found := self.shared.load(f"step-{step}"):
            return found.tensors["states"].to(windows.device)
        with torch.no_grad():  # inference_mode's can't be part of a loss
            states = head.states(self.teacher, windows)
        self.shared.save(f"step-{step}", {"states": states})
        return states
