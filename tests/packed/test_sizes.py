"""What the bytes of a packed folder are for, against `stat` and against the bound."""

import math

import pytest

from tasks.algorithms import packing
from tasks.packed.layout import COMPONENTS
from tasks.packed.sizes import bound, component_bytes
from tasks.packed.writer import save
from tests.support.packed_models import CASES, SHAPES, realistic


@pytest.mark.parametrize("case", CASES)
def test_components_sum_to_the_files_and_none_is_below_its_bound(build, case):
    folder = build(case).packed
    found, least = component_bytes(folder), bound(folder)
    assert tuple(found) == tuple(least) == COMPONENTS
    assert sum(found.values()) == sum(path.stat().st_size for path in folder.iterdir())
    assert all(8 * found[name] >= least[name] - 1e-6 for name in found)
    chosen = CASES[case]
    assert (found["zeros"] > 0) == (not chosen.get("settings", {}).get("symmetric", True))
    assert (found["adapter"] > 0) == ("adapter" in chosen)
    assert (found["positions"] > 0) == ("pattern" in chosen)


@pytest.mark.parametrize("chosen", SHAPES, ids=str)
def test_a_realistic_model_is_within_2_percent_of_the_bound(tmp_path, chosen):
    model = realistic(**chosen)
    save(model, tmp_path)
    found, least = component_bytes(tmp_path), bound(tmp_path)
    assert sum(found.values()) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 8 * sum(found.values()) < 1.02 * sum(least.values())
    if chosen.get("bits", 4) == 4 and not chosen.get("zeros"):
        linears = [linear for block in model.blocks for linear in block.values()]
        count = sum(linear.codes.numel() for linear in linears)
        kept = sum(int(linear.keep.sum()) for linear in linears)
        assert least["values"] == 4 * kept
        positions = {"2:4": count / 4 * math.log2(6)}.get(chosen.get("pattern", "2:4"))
        if positions is None:
            sizes = [(linear.codes.numel(), int(linear.keep.sum())) for linear in linears]
            positions = sum(
                math.log2(math.comb(n, k)) if n < 2**14 else packing.log2_combinations(n, k) for n, k in sizes
            )
        assert least["positions"] == pytest.approx(positions)
