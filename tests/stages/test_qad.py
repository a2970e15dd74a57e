"""qad: what the stage writes of a quantised model, in gptqmodel's format, and that nothing but codes differs."""

from __future__ import annotations

import csv

import pytest
import torch

from tasks import qad
from tasks.algorithms.errors import InputError
from tasks.models import gptq_folder, gptq_tensors, mask_files
from tasks.models.stored_tensors import StoredTensors
from tasks.packed import reader, source_folder
from tests.support import stage_memory

CHANGED = {"eora.rank": 2, "qad.steps": 12, "qad.batch": 2, "qad.length": 64, "qad.learning_rate": 0.1}
BEFORE = ("fetch", "vocabulary", "calibrate", "importance", "depth_prune", "wanda", "lora", "gptq", "eora")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The stages up to qad, of a tiny model with 2:4 and an adapter."""
    folder = tmp_path_factory.mktemp("qad").resolve()
    stage_memory.chain(folder, stage_memory.TINY, CHANGED, [*BEFORE, "qad", "package"])
    return folder


def stage(root, name="qad", **changed):
    return stage_memory.MeasuredStage(name, root, stage_memory.parameters(CHANGED | changed))


def test_nothing_but_codes_differs_and_some_do(root):
    before, after = root / "data/eora/model", root / "data/qad/model"
    assert sorted(path.relative_to(before) for path in before.rglob("*")) == sorted(
        path.relative_to(after) for path in after.rglob("*")
    )
    for path in before.rglob("*"):
        if path.is_file() and path.name != "model.safetensors":
            assert (after / path.relative_to(before)).read_bytes() == path.read_bytes()
    ours, theirs = StoredTensors(before), StoredTensors(after)
    differ = {name for name in ours.entries if not torch.equal(ours.read(name), theirs.read(name))}
    assert differ and all(name.endswith(".qweight") for name in differ)


def test_stock_gptqmodel_computes_with_the_trained_codes(root):
    loaded = gptq_folder.load_dequantised(root / "data/qad/model")
    stored = source_folder.read(root / "data/qad/model").blocks
    for block in stored:
        for name, linear in block.items():
            assert torch.equal(loaded.get_submodule(name).weight.float(), linear.values())


def test_pruned_weights_stay_zero_and_the_ledger_says_so(root):
    keep, pattern = mask_files.load_masks(root / "data/gptq/masks.safetensors")
    for block in gptq_folder.stored_linears(root / "data/qad/model"):
        for name, (_, weight) in block.items():
            assert not weight[~keep[name]].any()
    with (root / "data/qad/sparsity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert pattern == "2:4" and len(rows) == len(keep)
    assert all(row["violations"] == row["revived"] == "0" for row in rows)


def test_the_package_holds_them_and_every_step_is_in_the_history(root):
    packed = {name: linear for _, block in reader.stream(root / "data/package/model") for name, linear in block.items()}
    for block in source_folder.read(root / "data/qad/model").blocks:
        for name, linear in block.items():
            assert torch.equal(packed[name].values(), linear.values())
    with (root / "data/qad/history.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(step) for step in range(1, 13)]


def test_codes_written_as_they_were_are_the_same_file(root, tmp_path):
    source = root / "data/eora/model"
    with gptq_tensors.recoding(source, tmp_path / "same") as write:
        for block in source_folder.read(source).blocks:
            for name, linear in block.items():
                write(name, linear.codes)
    assert (tmp_path / "same/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_switched_off_it_passes_the_model_on(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    off = stage(root)
    off.folder = tmp_path / "off"
    qad.skip(off)
    assert (tmp_path / "off/model/model.safetensors").read_bytes() == (
        root / "data/eora/model/model.safetensors"
    ).read_bytes()
    assert (tmp_path / "off/history.csv").read_text().count("\n") == 1


def test_windows_longer_than_the_context_are_refused_before_a_model_is_read(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    long = stage(root, **{"qad.length": 4096})
    long.folder = tmp_path / "long"
    with pytest.raises(InputError, match=r"qad\.length = 4096 is above the model's context of 512 tokens"):
        qad.run(long)


def test_a_training_that_makes_it_worse_changes_no_code(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    wild = stage(root, **{"qad.learning_rate": 30.0})
    wild.folder = tmp_path / "wild"
    qad.run(wild)
    assert (tmp_path / "wild/model/model.safetensors").read_bytes() == (
        root / "data/eora/model/model.safetensors"
    ).read_bytes()
    said = capsys.readouterr().out
    assert "warning: " in said and "the codes stay as they were; lower qad.learning_rate" in said
    assert "0.00% of the codes have moved" in said
