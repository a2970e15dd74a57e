"""Mask files come back as they were, byte by byte; another file is refused."""

import pytest
import torch
from safetensors import safe_open

from tasks.algorithms.errors import InputError
from tasks.models import mask_files, tensor_files


def random_mask(rows, cols, seed=0):
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) > 0.5


@pytest.mark.parametrize("names", [[], ["a"], [f"model.layers.{index}.mlp" for index in range(12)]])
def test_mask_files_come_back_and_their_bytes_depend_on_content_alone(tmp_path, names):
    keep = {name: random_mask(5, 7 + seed, seed) for seed, name in enumerate(names)}
    for run in range(5):
        mask_files.save_masks(tmp_path / str(run), keep, "2:4")
    assert len({(tmp_path / str(run)).read_bytes() for run in range(5)}) == 1
    found, pattern = mask_files.load_masks(tmp_path / "0")
    assert pattern == "2:4"
    assert found.keys() == keep.keys()
    assert all(torch.equal(found[name], keep[name]) for name in names)
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == {"pattern": "2:4"} | {name: f"5,{keep[name].shape[1]}" for name in names}


def test_another_safetensors_file_is_no_mask_file(tmp_path):
    tensor_files.save_tensors(tmp_path / "x", {"a": torch.zeros(2)}, {})
    with pytest.raises(InputError, match="no mask file"):
        mask_files.load_masks(tmp_path / "x")
