"""What the bytes of a packed folder are for, against `stat` and against the bound."""

import math

import numpy as np
import pytest
import scipy.stats

from tasks.algorithms.model import masks
from tasks.packed.description import FILE
from tasks.packed.digits import CODERS
from tasks.packed.layout import COMPONENTS
from tasks.packed.packed_folder import PackedFolder
from tasks.packed.sizes import bound, component_bytes
from tasks.packed.writer import save
from tests.support.packed_models import CASES, SHAPES, realistic, skewed


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("coding", CODERS)
def test_components_sum_to_the_files_and_none_is_below_its_bound(build, case, coding):
    folder = build(case).packed if coding == "fixed" else build(case).coded
    found, least = component_bytes(folder), bound(folder)
    assert tuple(found) == tuple(least) == COMPONENTS
    assert sum(found.values()) == sum(path.stat().st_size for path in folder.iterdir())
    assert all(8 * found[name] >= least[name] - 1e-6 for name in found)
    chosen = CASES[case]
    assert (found["zeros"] > 0) == (not chosen.get("settings", {}).get("symmetric", True))
    assert (found["adapter"] > 0) == ("adapter" in chosen)
    assert (found["positions"] > 0) == ("pattern" in chosen)


def entropy(values):
    """Bits of all of them together, of how often each occurs."""
    counts = np.unique(np.asarray(values).reshape(-1), return_counts=True)[1]
    return counts.sum() * scipy.stats.entropy(counts, base=2)


def positions(linear):
    """Bits of a mask: those of the cases of its groups, or of one of all masks with as many kept."""
    keep = linear.keep.numpy()
    pattern = masks.parse(linear.pattern)
    if pattern is None:
        return math.log2(math.comb(keep.size, int(keep.sum())))
    groups = keep.reshape(-1, pattern[1])
    return entropy(groups @ (1 << np.arange(pattern[1])))


@pytest.mark.parametrize("chosen", SHAPES, ids=str)
def test_a_realistic_model_is_within_2_percent_of_what_it_can_hold(tmp_path, chosen):
    save(realistic(**chosen), tmp_path)
    package = PackedFolder(tmp_path)
    capacity = sum(section.bits for blob in package.sizes for section in package.sections(blob))
    assert 8 * sum(path.stat().st_size for path in tmp_path.iterdir()) < 1.02 * capacity


@pytest.mark.parametrize("chosen", SHAPES, ids=str)
def test_an_entropy_coded_model_is_within_1_percent_of_its_entropy(tmp_path, chosen):
    model = skewed(**{"scales": 16} | chosen)
    save(model, tmp_path, "entropy")
    found, least = component_bytes(tmp_path), bound(tmp_path)
    assert sum(found.values()) == sum(path.stat().st_size for path in tmp_path.iterdir())
    share = 1.03 if "rank" in chosen else 1.01  # a factor has too few values for its entropy to be that of its code
    assert 8 * (tmp_path / FILE).stat().st_size < share * sum(least.values())
    linears = [linear for block in model.blocks for linear in block.values()]
    kept = [linear.codes if linear.keep is None else linear.codes[linear.keep] for linear in linears]
    assert least["values"] == pytest.approx(sum(map(entropy, kept)))
    expected = sum(positions(linear) for linear in linears if linear.keep is not None)
    assert least["positions"] == pytest.approx(expected, rel=1e-3 if "unstructured" in str(chosen) else 1e-6)
    if isinstance(chosen.get("bits", 4), int):
        assert least["values"] < 0.96 * chosen.get("bits", 4) * sum(codes.numel() for codes in kept)
    save(model, tmp_path / "fixed")
    fixed = bound(tmp_path / "fixed")  # whether there is a table of scales may differ, and so what scales are
    assert all(fixed[name] == pytest.approx(least[name]) for name in ("positions", "values", "zeros", "norms"))
