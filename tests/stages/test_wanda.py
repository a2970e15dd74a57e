"""Stage wanda: its model, masks and tables agree."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tasks import wanda as stage_module
from tasks.algorithms.model import families
from tasks.models import dense_folder, mask_files, tensor_files


def params(**changes):
    return {"wanda": {"method": "wanda", "pattern": "n_m", "keep": 2, "of": 4, "sparsity": None, **changes}}


@pytest.fixture
def inputs(model_folder, make_windows, tmp_path):
    tensor_files.save_tensors(tmp_path / "windows.safetensors", {"input_ids": make_windows(3, 16).int()}, {})
    return {"depth_prune/model": model_folder, "windows.safetensors": tmp_path / "windows.safetensors"}


@pytest.mark.parametrize(
    ("changes", "pattern", "fraction"),
    [
        ({}, "2:4", 0.5),
        ({"keep": 7, "of": 8}, "7:8", 0.125),
        ({"pattern": "unstructured", "sparsity": 0.25}, "unstructured", 0.25),
        ({"method": "wanda_alpha", "pattern": "unstructured", "sparsity": 0.25}, "unstructured", 0.25),
    ],
)
def test_the_stage_s_model_masks_and_table_agree(changes, pattern, fraction, inputs, make_stage, tmp_path, capsys):
    for out in ("a", "b"):
        stage_module.run(make_stage(params(**changes), inputs, out))
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    keep, written = mask_files.load_masks(tmp_path / "a/masks.safetensors")
    linears = families.block_linears(dense_folder.load_dense(tmp_path / "a/wanda/model"))
    table = pd.read_csv(tmp_path / "a/layers.csv")
    assert written == pattern
    assert table["linear"].tolist() == list(linears)
    assert keep.keys() == linears.keys()
    for row in table.itertuples():
        assert torch.equal(linears[row.linear].weight != 0, keep[row.linear])
        assert (row.rows, row.cols) == tuple(keep[row.linear].shape)
        assert row.zeros == row.rows * row.cols * fraction
    assert table["alpha"].notna().all() == (changes.get("method") == "wanda_alpha")
    assert f"zero fraction {fraction:.4f}" in capsys.readouterr().out


def test_weights_that_stay_are_the_stored_ones_in_their_type(inputs, model_folder, make_stage, tmp_path):
    dense_folder.load_dense(model_folder, torch.bfloat16).save_pretrained(model_folder)
    stage_module.run(make_stage(params(), inputs))
    before, keep = dense_folder.load_dense(model_folder), mask_files.load_masks(tmp_path / "out/masks.safetensors")[0]
    written = load_file(tmp_path / "out/wanda/model/model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    for name, linear in families.block_linears(before).items():
        assert torch.equal(written[f"{name}.weight"].float(), linear.weight * keep[name])


def test_switched_off_it_passes_the_bytes_on(inputs, model_folder, make_stage, tmp_path):
    stage_module.skip(make_stage({"wanda": SimpleNamespace()}, inputs))
    for path in model_folder.iterdir():
        assert (tmp_path / "out/wanda/model" / path.name).read_bytes() == path.read_bytes()
    assert mask_files.load_masks(tmp_path / "out/masks.safetensors") == ({}, "dense")
    assert pd.read_csv(tmp_path / "out/layers.csv").empty
