"""package: what went in comes out, every file is in the manifest as on disk, a weight that came back stops it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file, save_file

from tasks import package
from tasks.algorithms.errors import InputError
from tasks.models import dense_folder, mask_files, tensor_files
from tasks.packed import source_folder
from tasks.parameters import schema
from tasks.parameters.compression_sections import Joint
from tasks.runners import any_folder
from tests.support.paths import ROOT

PRUNED = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")


@pytest.fixture
def pruned_folder(model_folder: Path) -> Path:
    """The small model with every second input of two matrices at zero."""
    path = model_folder / "model.safetensors"
    tensors = load_file(path)
    for name in PRUNED:
        tensors[f"{name}.weight"][:, 1::2] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    return model_folder


def masks(folder: Path) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "model.safetensors")
    even = {name: torch.arange(weights[f"{name}.weight"].shape[1]) % 2 == 0 for name in PRUNED}
    return {name: kept.expand_as(weights[f"{name}.weight"]) for name, kept in even.items()}


@pytest.fixture
def make_package(tmp_path: Path, make_stage, pruned_folder: Path):
    """make_package(out) -> the stage."""
    sections = schema.load(ROOT / "params.yaml")
    inputs = {"eora/model": pruned_folder}
    for name, text in (("source.json", '{"model": "here"}'), ("removed.json", '{"removed": [3]}')):
        inputs[name] = tmp_path / name
        inputs[name].write_text(text)
    inputs["masks.safetensors"] = tmp_path / "masks.safetensors"
    mask_files.save_masks(inputs["masks.safetensors"], masks(pruned_folder), "1:2")
    for name in ("embedding.safetensors", "adapter.safetensors"):
        inputs[name] = tmp_path / name
        tensor_files.save_tensors(inputs[name], {}, {"bits": "16", "group_size": "-1"})
    chosen = {
        name: getattr(sections, name) for name in ("package", "depth_prune", "wanda", "lora", "gptq", "eora", "qad")
    }

    def make(out="out", enforce=True, coding="fixed"):
        chosen["package"] = sections.package.model_copy(update={"coding": coding})
        chosen["wanda"] = sections.wanda.model_copy(update={"keep": 1, "of": 2, "enforce": enforce})
        return make_stage(chosen, inputs, out=out)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest(stage) -> dict:
    return json.loads((stage.output("package/model") / "manifest.json").read_text())


TEXTS = {"fixed": {"tokenizer.json", "tokenizer_config.json"}, "entropy": {"tokenizer.bz2"}}


@pytest.mark.parametrize("coding", TEXTS)
def test_what_went_in_comes_out_and_the_manifest_describes_every_file(make_package, pruned_folder, coding) -> None:
    stage = make_package(coding=coding)
    package.run(stage)
    folder, found = stage.output("package/model"), manifest(stage)
    on_disk = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    assert sorted(found["files"]) == on_disk
    assert {"model.safetensors", "model.json", *TEXTS[coding]} <= set(on_disk)
    assert not set(on_disk) & {name for other, names in TEXTS.items() if other != coding for name in names}
    first, second = (dense_folder.load_tokenizer(path) for path in (folder, pruned_folder))
    assert first("The pump shall.").input_ids == second("The pump shall.").input_ids
    for name, entry in found["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    shipped, given = any_folder.load_model(folder), dense_folder.load_dense(pruned_folder)
    expected = dict(given.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in shipped.named_parameters())
    assert (found["pattern"], found["asked"], found["pruned_matrices"]) == ("1:2", "1:2", 2)
    lineage = found["lineage"]
    assert lineage["source"] == {"model": "here"}
    assert lineage["parameters"]["wanda"] == stage.params.wanda.model_dump()
    assert lineage["parameters"]["depth_prune"]["remove"] == 1  # as it was, though params.yaml says auto
    assert "auto" not in json.dumps(lineage) and lineage["parameters"]["lora"]["steps"] == 90
    assert lineage["inputs"]["removed.json"] == hashlib.sha256(b'{"removed": [3]}').hexdigest()


def entropy(values: torch.Tensor) -> float:
    """Bytes of the order-0 entropy of float32 values, place by place of their bytes."""
    places = values.contiguous().numpy().reshape(-1).view(np.uint8).reshape(-1, 4).T
    counts = [np.unique(place, return_counts=True)[1] for place in places]
    return sum(count.sum() * scipy.stats.entropy(count, base=2) for count in counts) / 8


def test_the_bound_is_the_entropy_of_what_is_stored(make_package, pruned_folder: Path) -> None:
    stage = make_package()
    package.run(stage)
    tensors = load_file(pruned_folder / "model.safetensors")
    kept = {f"{name}.weight": mask for name, mask in masks(pruned_folder).items()}
    linears = {name: tensor for name, tensor in tensors.items() if "proj" in name}
    bound = manifest(stage)["bound"]
    assert bound["positions"] == 0  # every group of two keeps its first
    values = (entropy(tensor[kept[name]] if name in kept else tensor) for name, tensor in linears.items())
    assert bound["values"] == pytest.approx(sum(values))
    assert bound["embedding"] == pytest.approx(entropy(tensors["model.embed_tokens.weight"]))


def test_the_ledger_is_that_of_the_shipped_file(make_package) -> None:
    stage = make_package()
    package.run(stage)
    found = pd.read_csv(stage.output("sparsity.csv")).set_index("linear")
    assert len(found) == 4 * 7
    for name, row in found.iterrows():
        assert row["violations"] == row["revived"] == 0
        assert row["groups"] == (row["weights"] // 2 if name in PRUNED else 0)
        assert (row["zeros"] >= row["weights"] // 2) == (name in PRUNED)


@pytest.mark.parametrize("coding", TEXTS)
def test_the_same_inputs_give_the_same_bytes(make_package, coding: str) -> None:
    folders = []
    for out in ("one", "other"):
        stage = make_package(out, coding=coding)
        package.run(stage)
        folders.append(stage.output("package/model"))
    assert contents(folders[0]) == contents(folders[1]) and len(contents(folders[0])) >= 4


def test_a_weight_that_came_back_stops_the_package(make_package, pruned_folder: Path) -> None:
    path = pruned_folder / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{PRUNED[1]}.weight"][3, 1] = 1e-30
    tensors[f"{PRUNED[1]}.weight"][0, 5] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"package broke .* {PRUNED[1]} \(2 of .* groups, 2 pruned weights not zero"):
        package.run(make_package())


def test_a_broken_pattern_that_is_allowed_is_packed_as_dense(make_package, pruned_folder: Path) -> None:
    path = pruned_folder / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{PRUNED[1]}.weight"][3, 1] = 1e-30
    save_file(tensors, path, metadata={"format": "pt"})
    stage = make_package(enforce=False)
    package.run(stage)
    found = manifest(stage)
    assert (found["pattern"], found["asked"], found["pruned_matrices"]) == ("dense", "1:2", 0)
    assert found["bound"]["positions"] == 0
    values = sum(entropy(tensor) for name, tensor in tensors.items() if "proj" in name)
    assert found["bound"]["values"] == pytest.approx(values)
    ledger = pd.read_csv(stage.output("sparsity.csv")).set_index("linear")
    assert ledger.loc[PRUNED[1], "revived"] == 1


def test_off_passes_the_model_on(make_package, pruned_folder: Path) -> None:
    stage = make_package()
    package.skip(stage)
    assert manifest(stage) == {"files": {}, "pattern": None, "pruned_matrices": 0, "lineage": {}}
    written = contents(stage.output("package/model"))
    del written["manifest.json"]
    assert written == contents(pruned_folder) and "model.safetensors" in written


def test_what_the_parameters_ask_for() -> None:
    sections = schema.load(ROOT / "params.yaml")

    def asked(gptq, **wanda):
        changed = sections.wanda.model_copy(update={"enabled": True, "pattern": "n_m", "keep": 2, "of": 4, **wanda})
        return package.asked(changed, sections.gptq.model_copy(update={"enabled": True, "joint": None, **gptq}))

    joint = Joint(keep=4, of=8)
    assert asked({}) == "2:4"
    assert asked({}, pattern="unstructured") == "unstructured"
    assert asked({}, enabled=False) == asked({"enabled": False, "joint": joint}, enabled=False) == "dense"
    assert asked({"joint": joint}, enabled=False) == "4:8"


def test_a_file_that_differs_from_what_was_packed_is_a_bug(make_package, pruned_folder: Path) -> None:
    stage = make_package()
    package.run(stage)
    blocks = source_folder.read(pruned_folder).blocks
    folder = stage.output("package/model")
    list(package.lossless(folder, blocks))
    changed = [dict(linears) for linears in blocks]
    name = next(iter(changed[2]))
    changed[2][name].weight[0, 0] += 1
    with pytest.raises(RuntimeError, match=f"{name} of block 2"):
        list(package.lossless(folder, changed))
