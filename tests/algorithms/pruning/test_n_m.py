"""The mask of an N:M pattern against a loop."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.model import masks
from tasks.algorithms.pruning import n_m, wanda
from tests.support.matrices import normal

PATTERNS = [(2, 4), (4, 8), (7, 8), (1, 2), (3, 16)]


@pytest.mark.parametrize(("keep", "of"), PATTERNS)
def test_n_m_equals_six_lines_of_python_and_leaves_exactly_keep_in_every_group(keep, of):
    weight, norm = normal(11, 48), normal(48, seed=1).abs()
    found = n_m.largest(wanda.metric(weight, norm), keep, of)
    expected = torch.zeros(11, 48, dtype=torch.bool)
    for row in range(11):
        for start in range(0, 48, of):
            scores = {col: abs(float(weight[row, col])) * float(norm[col]) for col in range(start, start + of)}
            for col in sorted(scores, key=lambda col: -scores[col])[:keep]:
                expected[row, col] = True
    assert torch.equal(found, expected)
    assert (masks.groups(found, of).sum(dim=-1) == keep).all()
    assert masks.violations(weight * found, keep, of) == 0


def test_the_lower_index_of_equals_stays():
    assert n_m.largest(torch.ones(2, 8), 2, 4).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2
