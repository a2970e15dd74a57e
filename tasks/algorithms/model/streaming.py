"""From which size on a model that is only evaluated stays on disk; without torch, as estimates of memory ask, too.

No result depends on either figure.
"""

from __future__ import annotations

WHOLE = 2**31
"""Bytes of a dense model's weights in float32 up to which it is loaded whole."""
STATES = 2**26
"""Values of hidden states, 256 MiB in float32, that wait for the next block where blocks are opened one by one."""
