"""The folder to ship: its manifest against hashlib and stat, and a mask that no longer holds."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch

from tasks import checkpoint, package, tensor_files


@pytest.fixture
def inputs(model_folder, tmp_path):
    """The model, a mask that its first linear holds, and the two records."""
    model = checkpoint.load_dense(model_folder)
    name = "model.layers.0.self_attn.q_proj"
    keep = torch.rand(model.get_submodule(name).weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        model.get_submodule(name).weight.masked_fill_(~keep, 0)
    checkpoint.save_dense(model, checkpoint.load_tokenizer(model_folder), model_folder)
    checkpoint.save_masks(tmp_path / "masks.safetensors", {name: keep}, "unstructured")
    for record in ("source.json", "removed.json"):
        checkpoint.write_json(tmp_path / record, {"name": record})
    files = {record: tmp_path / record for record in ("masks.safetensors", "source.json", "removed.json")}
    return {"eora/model": model_folder, **files}


def section(**values):
    return SimpleNamespace(model_dump=lambda: values)


def test_the_manifest_names_every_file_with_its_size_and_hash(make_stage, inputs, tmp_path) -> None:
    package.run(make_stage({"wanda": section(keep=2)}, inputs))
    folder = tmp_path / "out/package/model"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"}
    assert set(manifest["files"]) == set(files) and "model.safetensors" in files
    for name, entry in manifest["files"].items():
        content = files[name].read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["lineage"]["parameters"] == {"wanda": {"keep": 2}}
    assert manifest["lineage"]["source"] == {"name": "source.json"}


def test_a_weight_that_came_back_stops_the_package(make_stage, inputs) -> None:
    folder = inputs["eora/model"]
    model = checkpoint.load_dense(folder)
    keep = checkpoint.load_masks(inputs["masks.safetensors"])[0]["model.layers.0.self_attn.q_proj"]
    row, column = (~keep).nonzero()[0].tolist()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[row, column] = 0.5
    checkpoint.save_dense(model, checkpoint.load_tokenizer(folder), folder)
    with pytest.raises(RuntimeError, match=r"'model.layers.0.self_attn.q_proj': 1"):
        package.run(make_stage({}, inputs))


def test_switched_off_it_passes_the_files_on(make_stage, inputs, tmp_path) -> None:
    package.skip(make_stage({}, inputs))
    folder = tmp_path / "out/package/model"
    for path in inputs["eora/model"].iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert json.loads((folder / "manifest.json").read_text())["files"] == {}


def test_components_add_up_to_what_stat_says(inputs) -> None:
    folder = inputs["eora/model"]
    sizes = tensor_files.component_bytes(folder)
    assert sum(sizes.values()) == sum(path.stat().st_size for path in folder.iterdir())
    tensors = checkpoint.load_dense(folder).state_dict()
    assert sizes["embedding"] == tensors["model.embed_tokens.weight"].numel() * 4  # tied: stored once
    assert sizes["norms"] == sum(t.numel() * 4 for name, t in tensors.items() if "norm" in name)
    assert sizes["scales"] == sizes["adapter"] == 0
