"""Failures of generation on continuations made by hand."""

from __future__ import annotations

import pytest

from tasks.algorithms.scoring import generation_failures as failures

END = 0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5, 6, 7, 5, 6, 7, 5, 6, 7], True),
        ([1, 2, 3, 5, 6, 5, 6, 5, 6], True),  # the loop begins late
        ([5, 6, 5, 6, 5, 6, 9], False),  # it got out
        ([5, 6, 7, 5, 6, 7], False),  # twice is none
        ([1, 4, 4, 4, 4, 4], False),  # five times one token
        ([1, 4, 4, 4, 4, 4, 4], True),
        ([2, 5, 6, 7, 5, 6, 7, 5, 6], False),  # the third one is cut off
        (list(range(60)), False),
        ([], False),
    ],
)
def test_loops(tokens: list[int], expected: bool) -> None:
    assert failures.loops(tokens) is expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4, 5], 0.0),
        ([7] * 10, 1 - 1 / 7),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 - 4 / 5),  # 1234 2341 3412 4123 1234
    ],
)
def test_seq_rep_4(tokens: list[int], expected: float) -> None:
    assert failures.repetition(tokens) == pytest.approx(expected)


def test_a_continuation_that_ends_and_one_that_does_not() -> None:
    ended = failures.describe([5, 6, END], " naïve żółw", [END])
    assert ended == {"tokens": 2, "ended": True, "empty": False, "loop": False, "seq_rep_4": 0.0, "non_ascii": 4}
    assert failures.describe([END], "", [END]) == {**ended, "tokens": 0, "empty": True, "non_ascii": 0}
    assert not failures.describe([5, END], "a", [])["ended"]  # a model without an end token


def test_counts_of_a_model() -> None:
    texts = [([4] * 9, "aaaa aaaa"), ([END], " \n"), ([5, 6, 7, END], "éé"), ([1, 2, 3, 4, 1, 2, 3, 4], "12345678")]
    rows = [{"completion": text, **failures.describe(tokens, text, [END])} for tokens, text in texts]
    found = failures.count(rows)
    assert found == {
        "completions": 4,
        "loops": 1,
        "empty": 1,
        "never_ending": 2,
        "seq_rep_4": pytest.approx((1 - 1 / 6 + 0 + 0 + 0.2) / 4),
        "non_ascii_share": 2 / 21,
    }
    assert failures.count([]) == dict.fromkeys(found, 0) | {"seq_rep_4": None, "non_ascii_share": None}
