"""The table of stages."""

from __future__ import annotations

import pytest

from tasks.reporting import model_rows


@pytest.mark.parametrize(
    ("max_kept", "expected"),
    [
        ({"4": 2, "8": 4, "16": 8, "32": 16}, ["2:4"]),
        ({"4": 4, "8": 7, "16": 14, "32": 28}, ["7:8"]),
        ({"4": 3, "8": 4, "16": 8, "32": None}, ["3:4", "4:8"]),
        ({"4": 4, "8": 8, "16": 16, "32": 32}, []),
        ({}, []),
    ],
)
def test_patterns_name_the_shortest(max_kept, expected):
    assert model_rows.patterns(max_kept) == expected
