"""Batches by length: cuts by hand, and the bounds that an estimate of memory relies on."""

from __future__ import annotations

import random

import pytest

from tasks.algorithms.scoring import batches


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([], 8, []),
        ([3, 9, 5, 9], 2, [[1, 3], [2, 0]]),
        ([3, 9, 5], 8, [[1, 2, 0]]),
        ([5000, 4096, 4096, 4096, 1], 8, [[0], [1, 2], [3, 4]]),  # 8,192 tokens, padding included
        ([9000, 1], 8, [[0], [1]]),  # more than that alone
    ],
)
def test_the_longest_come_first_and_together(lengths: list[int], most: int, expected: list[list[int]]) -> None:
    assert batches.by_length(lengths, most) == expected


@pytest.mark.parametrize("longest", [1, 700, 3000, 8192, 20000])
def test_no_batch_has_more_tokens_than_is_said(longest: int) -> None:
    lengths = [random.Random(place).randint(1, longest) for place in range(200)] + [longest]
    for most in (1, 8, 64):
        cut = batches.by_length(lengths, most)
        assert sorted(at for batch in cut for at in batch) == list(range(201))
        assert all(len(batch) <= most for batch in cut)
        tokens = [len(batch) * lengths[batch[0]] for batch in cut]
        assert max(tokens) <= batches.most_tokens(longest, most)
