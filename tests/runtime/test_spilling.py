"""Hidden states in a file without a name, against the same in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, layers, streaming
from tasks.algorithms.pruning import importance
from tasks.runtime import spilling


def mapped(folder):
    """Bytes of this process's mappings of files that are or were in a folder."""
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    bounds = [[int(end, 16) for end in words[0].split("-")] for words in ranges]
    return sum(end - start for start, end in bounds)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_walk_through_a_file_gives_the_same_bits(batch, dtype, make_model, make_windows, tmp_path):
    model, ids, sizes = make_model().to(dtype), make_windows(5, 64), []

    def visit(index, block, inputs):
        sizes.append(mapped(tmp_path))
        block.mlp.down_proj.weight.data *= 1.5

    held = layers.walk(model, ids, visit, batch)
    assert sizes == [0] * 4
    for block in families.blocks(model):
        block.mlp.down_proj.weight.data /= 1.5
    with spilling.spilling(tmp_path, limit=100):
        spilled = layers.walk(model, ids, visit, batch)
    size = 5 * 64 * 32 * held.element_size()
    assert set(sizes[4:]) == {-(-size // 4096) * 4096} and list(tmp_path.iterdir()) == []
    assert spilled.dtype == dtype and torch.equal(spilled, held)
    del spilled
    assert mapped(tmp_path) == 0
    with spilling.spilling(tmp_path, limit=size):
        assert torch.equal(layers.walk(model, ids, lambda *_: None), layers.walk(model, ids, lambda *_: None))
        assert mapped(tmp_path) == 0


def test_scores_are_the_same(make_model, make_windows, tmp_path):
    model, ids = make_model(), make_windows(3, 16)
    held = importance.block_influence(model, ids)
    with spilling.spilling(tmp_path, limit=0):
        assert torch.equal(importance.block_influence(model, ids), held)


def test_the_limit_is_a_share_of_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(spilling.needs, "available_memory", lambda: 1000)
    with spilling.spilling(tmp_path):
        spill = streaming.SPILL.get()
        assert spill(250) is None and len(spill(251)) == 251
    assert streaming.SPILL.get() is None


def test_a_disk_without_room_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(spilling.shutil, "disk_usage", lambda _: type("usage", (), {"free": 99}))
    with spilling.spilling(tmp_path, limit=0), pytest.raises(InputError, match="of 100 bytes are too many .* 99 are"):
        streaming.SPILL.get()(100)
