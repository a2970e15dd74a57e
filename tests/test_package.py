"""package: every file is in the manifest as it is on disk, and a weight that came back stops it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks import checkpoint, package, params
from tasks.algorithms.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PRUNED = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")


@pytest.fixture
def pruned_folder(model_folder: Path) -> Path:
    """The small model with every second input of two matrices at zero."""
    path = model_folder / "model.safetensors"
    tensors = load_file(path)
    for name in PRUNED:
        tensors[f"{name}.weight"][:, 1::2] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    (model_folder / "eora").mkdir()
    (model_folder / "eora/adapter_config.json").write_text("{}")
    return model_folder


def masks(folder: Path) -> dict[str, torch.Tensor]:
    weights = load_file(folder / "model.safetensors")
    even = {name: torch.arange(weights[f"{name}.weight"].shape[1]) % 2 == 0 for name in PRUNED}
    return {name: kept.expand_as(weights[f"{name}.weight"]) for name, kept in even.items()}


@pytest.fixture
def make_package(tmp_path: Path, make_stage, pruned_folder: Path):
    """make_package(out) -> the stage."""
    sections = params.load(ROOT / "params.yaml")
    inputs = {"eora/model": pruned_folder}
    for name, text in (("source.json", '{"model": "here"}'), ("removed.json", '{"removed": [3]}')):
        inputs[name] = tmp_path / name
        inputs[name].write_text(text)
    inputs["masks.safetensors"] = tmp_path / "masks.safetensors"
    checkpoint.save_masks(inputs["masks.safetensors"], masks(pruned_folder), "1:2")
    chosen = {name: getattr(sections, name) for name in ("package", "wanda", "lora")}
    return lambda out="out": make_stage(chosen, inputs, out=out)


def manifest(stage) -> dict:
    return json.loads((stage.output("package/model") / "manifest.json").read_text())


def test_the_manifest_describes_every_file(make_package, pruned_folder: Path, tmp_path: Path) -> None:
    stage = make_package()
    package.run(stage)
    folder, found = stage.output("package/model"), manifest(stage)
    originals = sorted(str(path.relative_to(pruned_folder)) for path in pruned_folder.rglob("*") if path.is_file())
    assert sorted(found["files"]) == originals and "eora/adapter_config.json" in originals
    for name, entry in found["files"].items():
        content = (folder / name).read_bytes()
        assert content == (pruned_folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert (found["pattern"], found["pruned_matrices"]) == ("1:2", 2)
    lineage = found["lineage"]
    assert lineage["source"] == {"model": "here"}
    assert lineage["parameters"]["wanda"] == stage.params.wanda.model_dump()
    assert lineage["inputs"]["removed.json"] == hashlib.sha256(b'{"removed": [3]}').hexdigest()


def test_the_same_inputs_give_the_same_manifest(make_package) -> None:
    one, other = make_package("one"), make_package("other")
    package.run(one)
    package.run(other)
    first, second = (stage.output("package/model") / "manifest.json" for stage in (one, other))
    assert first.read_bytes() == second.read_bytes()


def test_a_weight_that_came_back_stops_the_package(make_package, pruned_folder: Path) -> None:
    path = pruned_folder / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{PRUNED[1]}.weight"][3, 1] = 1e-30
    tensors[f"{PRUNED[1]}.weight"][0, 5] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"package broke .* {PRUNED[1]} \(2 of .* groups, 2 pruned weights not zero"):
        package.run(make_package())


def test_off_passes_the_model_on(make_package, pruned_folder: Path) -> None:
    stage = make_package()
    package.skip(stage)
    assert manifest(stage) == {"files": {}, "pattern": None, "pruned_matrices": 0, "lineage": {}}
    for path in pruned_folder.iterdir():
        if path.is_file():
            assert (stage.output("package/model") / path.name).read_bytes() == path.read_bytes()
