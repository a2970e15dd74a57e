"""How many rows of logits are made at once; without torch, as estimates of memory ask, too."""

from __future__ import annotations

LARGEST = 2**23
"""So many logits are held at once, 32 MiB in float32; where a batch has fewer there is one chunk."""


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Cut `rows` of logits into equal chunks of at most `LARGEST` values, one row at least; none for no rows."""
    most = max(1, LARGEST // vocabulary)
    size = -(-rows // -(-rows // most)) if rows else 1
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
