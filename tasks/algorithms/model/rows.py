"""How many rows of logits are made at once; without torch, as estimates of memory ask, too."""

from __future__ import annotations

LARGEST = 2**24
"""So many logits are made at once, 64 MiB in float32; where a batch has fewer there is one chunk.

Of several chunks each has more than half of that: from 32 MiB on glibc gives memory back as soon as it is free. With
smaller ones the heap grew to 500 MiB for 1,300 rows at a vocabulary of 65,536 (chunks of 31 MiB, glibc 2.36).
"""


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Cut `rows` of logits into equal chunks of at most `LARGEST` values, one row at least; none for no rows."""
    most = max(1, LARGEST // vocabulary)
    size = -(-rows // -(-rows // most)) if rows else 1
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
