"""Requests of unequal length in batches: longest first, so that a shortage of memory shows at once; little padding."""

from __future__ import annotations

from collections.abc import Sequence

TOKENS = 2**13
"""A batch has at most so many tokens, padding included, unless it is one request."""


def by_length(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Put requests into batches, by falling length; of equal ones the earlier is first.

    Args:
        lengths: tokens of each request.
        most: requests per batch.

    Returns:
        The requests' indices; each batch begins with its longest.
    """
    batches: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        last = batches[-1] if batches else []
        if last and len(last) < most and (len(last) + 1) * lengths[last[0]] <= TOKENS:
            last.append(at)
        else:
            batches.append([at])
    return batches


def most_tokens(longest: int, most: int) -> int:
    """Return how many tokens a batch of `by_length` has at most, where no request has more than `longest`."""
    return min(most * longest, max(TOKENS, longest))
