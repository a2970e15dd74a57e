"""The ledger counts what a plain loop counts, and a broken pattern ends the stage with the linear's name."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.models import sparsity_ledger


def naive(weight, keep, kept, of):
    """(zeros, groups, violations, revived) by counting one weight at a time."""
    zeros = groups = violations = revived = 0
    for row, mask in zip(weight.tolist(), keep.tolist(), strict=True):
        zeros += row.count(0.0)
        revived += sum(value != 0 and not stays for value, stays in zip(row, mask, strict=True))
        for start in range(0, len(row), of):
            groups += 1
            violations += sum(value != 0 for value in row[start : start + of]) > kept
    return zeros, groups, violations, revived


@pytest.mark.parametrize("broken", [0, 1, 9])
@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (7, 8)])
def test_ledger_counts_as_a_loop_does(broken, kept, of):
    generator = torch.Generator().manual_seed(broken)
    weight = torch.randn(8, 32, generator=generator)
    keep = torch.zeros(8, 32 // of, of, dtype=torch.bool)
    order = torch.rand(keep.shape, generator=generator).argsort(dim=-1)
    keep.scatter_(-1, order[..., :kept], True)
    keep = keep.reshape(8, 32)
    pruned = weight * keep
    for place in torch.randperm(256, generator=generator)[:broken].tolist():
        pruned.view(-1)[place] = 0.5
    table = sparsity_ledger.ledger({"a": pruned, "b": weight}, {"a": keep}, f"{kept}:{of}")
    first, second = table.to_dict("records")
    assert tuple(first[key] for key in ("zeros", "groups", "violations", "revived")) == naive(pruned, keep, kept, of)
    assert second == {"linear": "b", "weights": 256, "zeros": 0, "groups": 0, "violations": 0, "revived": 0}


def test_unstructured_has_no_groups_but_counts_revived_weights():
    keep = torch.tensor([[True, False, False, True]])
    table = sparsity_ledger.ledger({"a": torch.tensor([[1.0, 2.0, 0.0, 0.0]])}, {"a": keep}, "unstructured")
    assert table.iloc[0].to_dict() == {
        "linear": "a",
        "weights": 4,
        "zeros": 2,
        "groups": 0,
        "violations": 0,
        "revived": 1,
    }


def test_a_broken_pattern_ends_the_stage_unless_it_may_not():
    keep = torch.zeros(1, 4, dtype=torch.bool)
    keep[0, :2] = True
    whole = sparsity_ledger.ledger({"q": torch.tensor([[1.0, 2.0, 0.0, 0.0]])}, {"q": keep}, "2:4")
    broken = sparsity_ledger.ledger({"q": torch.tensor([[1.0, 2.0, 3.0, 0.0]])}, {"q": keep}, "2:4")
    assert sparsity_ledger.check(whole, "gptq", enforce=True)
    assert not sparsity_ledger.check(broken, "gptq", enforce=False)
    with pytest.raises(InputError, match=r"gptq broke the sparsity pattern of q \(1 of 1 groups, 1 pruned weights"):
        sparsity_ledger.check(broken, "gptq", enforce=True)


def test_negative_zero_is_zero():
    keep = torch.tensor([[True, False]])
    table = sparsity_ledger.ledger({"q": torch.tensor([[1.0, -0.0]])}, {"q": keep}, "1:2")
    assert table.iloc[0]["revived"] == 0 and table.iloc[0]["zeros"] == 1


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"p": torch.ones(1, 4)}, "there is a mask for q"),
        ({"q": torch.ones(2, 4)}, r"mask of q is \(1, 4\), its weight"),
    ],
)
def test_masks_of_another_model_are_refused(weights, says):
    with pytest.raises(InputError, match=says):
        sparsity_ledger.ledger(weights, {"q": torch.ones(1, 4, dtype=torch.bool)}, "2:4")


@pytest.mark.parametrize("pattern", ["", "2", "4:2", "2:4:8", "0:4", "half"])
def test_unknown_patterns_are_refused(pattern):
    with pytest.raises(InputError, match="pattern"):
        sparsity_ledger.ledger({"q": torch.ones(1, 4)}, {}, pattern)
