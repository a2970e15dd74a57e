"""What of a model and of its hidden states is not held in memory; without torch, as estimates of memory ask, too.

No result depends on any of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

WHOLE = 2**31
"""Bytes of a dense model's weights in float32 up to which it is loaded whole."""
STATES = 2**26
"""Values of hidden states, 256 MiB in float32, that wait for the next block where blocks are opened one by one."""
Elsewhere = Callable[[int], Any]
"""Bytes -> a tensor of as many uint8 that is not in memory, such as a mapped file; None: they are few enough."""
SPILL: ContextVar[Elsewhere | None] = ContextVar("spill", default=None)
"""Where the walk keeps hidden states between two blocks; None: in memory. `tasks.runtime.spilling` sets it."""
