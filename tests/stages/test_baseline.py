"""baseline: a plain quantised model in the package's bytes, with the bits that harm least."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tasks import baseline, sensitivity
from tasks.compression import block_quantisation
from tasks.models import dense_folder, tensor_files
from tasks.packed import reader
from tasks.packed.sizes import component_bytes
from tasks.parameters import schema
from tasks.runners import any_folder

MEASURED = ("sensitivity.csv", "embedding.safetensors")
GPTQ = {
    "enabled": True,
    "bits": 4,
    "budget_bytes": None,
    "group_size": 32,
    "scale_steps": None,
    "symmetric": True,
    "damp": 0.05,
    "act_order": "none",
    "mse": 0.0,
    "descent_cycles": 1,
    "masked": True,
    "joint": None,
    "embedding": {"bits": 8, "group_size": 32, "method": "nearest"},
}


@pytest.fixture(scope="module")
def given(tiny_llama, tmp_path_factory):
    """The recovered dense model of two layers, and calibration windows."""
    folder = tmp_path_factory.mktemp("baseline")
    dense = folder / "baseline_lora/model"
    model = dense_folder.load_dense(tiny_llama(dense))
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    dense_folder.save_dense(model, dense_folder.load_tokenizer(dense), dense)
    windows = torch.randint(0, 257, (4, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tensor_files.save_tensors(folder / "windows.safetensors", {"input_ids": windows}, {})
    return SimpleNamespace(dense=dense, windows=folder / "windows.safetensors")


@pytest.fixture
def run(make_stage, given, tmp_path, monkeypatch):
    """run(limit, out, **gptq) -> the output folder, with a package of `limit` bytes."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # gptqmodel writes logs to the working folder

    def run(limit, out="out", coding="fixed", **changed):
        package = tmp_path / f"package-{limit}"
        package.mkdir(exist_ok=True)
        (package / "model.safetensors").write_bytes(b"\0" * (limit - 2))
        (package / "model.json").write_bytes(b"{}")
        (package / "manifest.json").write_bytes(b"\0" * 5000)  # is no part of what the model takes
        params = {"gptq": schema.Gptq(**GPTQ | changed), "baseline": schema.Baseline(enabled=True)}
        params["package"] = schema.Package(enabled=True, coding=coding)
        files = {"baseline_lora/model": given.dense, "windows.safetensors": given.windows}
        sensitivity.run(make_stage(params, files, out=f"sensitivity-{out}"))
        measured = {f"sensitivity/{name}": tmp_path / f"sensitivity-{out}" / name for name in MEASURED}
        baseline.run(make_stage(params, files | measured | {"package/model": package}, out=out))
        return tmp_path / out

    return run


def size(folder):
    return sum((folder / "model" / name).stat().st_size for name in ("model.safetensors", "model.json"))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored_bits(folder):
    return {name: linear.bits for _, block in reader.stream(folder / "model") for name, linear in block.items()}


@pytest.mark.parametrize("limit", [48_000, 60_000, 75_000])
@pytest.mark.parametrize("changed", [{}, {"symmetric": False, "scale_steps": 4}], ids=str)
def test_it_fills_the_bytes_of_the_package(run, limit, changed):
    folder = run(limit, **changed)
    assert 0.96 * limit < size(folder) <= limit
    table = pd.read_csv(folder / "bits.csv").set_index("linear")
    assert table["bits"].to_dict() == stored_bits(folder) and table["bits"].nunique() > 1
    if not changed:  # scales are stored as they are: what was counted is what the file has
        found = component_bytes(folder / "model")
        assert table["bytes"].sum() == found["positions"] + found["values"] + found["scales"] + found["zeros"]


def test_nothing_is_pruned_and_the_embedding_is_coded(run, given):
    folder = run(60_000)
    dense, plain = dense_folder.load_dense(given.dense), any_folder.load_model(folder / "model")
    for name, weight in any_folder.block_weights(plain):
        original = dense.get_submodule(name).weight.detach()
        assert float((weight - original).norm() / original.norm()) < 0.6
    assert all(linear.keep is None for _, block in reader.stream(folder / "model") for linear in block.values())
    table, original = plain.get_input_embeddings().weight, dense.get_input_embeddings().weight
    step = original.view(257, -1, 32).abs().amax(2, keepdim=True) / 127  # of int8 in groups of 32
    # half a step; scale and value in float16: each 2 ** -11 of at most 127 steps
    assert ((table - original).view(257, -1, 32).abs() <= (0.5 + 2 * 127 / 2**11) * step * 1.001).all()
    assert (folder / "model/tokenizer.json").exists()


def test_more_bytes_harm_less(run):
    harm = [
        pd.read_csv(run(limit, f"out-{limit}") / "bits.csv")["sensitivity"].sum() for limit in (45_000, 55_000, 90_000)
    ]
    assert harm[0] > harm[1] > harm[2] > 0


def test_sensitivity_is_what_rounding_a_linear_alone_does_to_the_predictions(run, given):
    folder = run(60_000)
    model = dense_folder.load_dense(given.dense)
    windows = load_file(given.windows)["input_ids"][: block_quantisation.MEASURED].long()
    table = any_folder.load_model(folder / "model").get_input_embeddings().weight  # coded before anything else
    model.get_input_embeddings().weight.data.copy_(table.detach())
    with torch.no_grad():
        before = model(input_ids=windows).logits.double().log_softmax(-1)
        for row in pd.read_csv(folder / "bits.csv").itertuples():
            weight = model.get_submodule(row.linear).weight
            original = weight.clone()
            weight.copy_(to_the_nearest(original, row.bits))
            after = model(input_ids=windows).logits.double().log_softmax(-1)
            weight.copy_(original)
            nats = float((before.exp() * (before - after)).sum(-1).mean())
            assert row.sensitivity == pytest.approx(nats, rel=1e-3), row.linear


def to_the_nearest(weight, bits, group=32):
    """Symmetric: codes from 0 to 2 ** bits - 1 around half of them, a float16 scale for a group's largest magnitude."""
    groups, top = weight.view(len(weight), -1, group), 2**bits - 1
    scale = (2 * groups.abs().amax(2, keepdim=True) / top).half().float()
    codes = ((groups / scale).round() + (top + 1) / 2).clamp(0, top)
    return (scale * (codes - (top + 1) / 2)).view_as(weight)


def test_a_package_smaller_than_any_plain_model_is_met_by_the_narrowest(run):
    folder = run(20_000)
    assert size(folder) > 20_000
    assert set(stored_bits(folder).values()) == {2}


@pytest.mark.parametrize("changed", [{}, {"scale_steps": 4}, {"symmetric": False, "scale_steps": 8}], ids=str)
def test_an_entropy_coded_one_fills_them_by_its_coded_bytes(run, monkeypatch, changed):
    sizes, quantise, limit = [], baseline.quantise, 60_000

    def counted(*given):
        sizes.append(quantise(*given))
        return sizes[-1]

    monkeypatch.setattr(baseline, "quantise", counted)
    fixed, folder = run(limit, "fixed", **changed), run(limit, coding="entropy", **changed)
    assert 0.98 * limit < size(folder) <= limit
    bits = [pd.read_csv(each / "bits.csv").set_index("linear") for each in (fixed, folder)]
    weighted = [(table["bits"] * table["weights"]).sum() for table in bits]
    assert weighted[1] > 1.02 * weighted[0]  # what coding saves is spent
    assert bits[1]["sensitivity"].sum() < bits[0]["sensitivity"].sum()
    assert bits[1]["bits"].to_dict() == stored_bits(folder)
    found = component_bytes(folder / "model")
    content = found["values"] + found["scales"] + found["zeros"]
    assert bits[1]["bytes"].sum() == pytest.approx(content, rel=0.03)  # GPTQ's codes have nearly the same entropy
    assert (folder / "model/tokenizer.bz2").exists() and not (folder / "model/tokenizer.json").exists()


@pytest.mark.parametrize("limit", [48_000, 75_000])
@pytest.mark.parametrize("scale_steps", [4, 8])
def test_the_plan_knows_the_scales_and_is_quantised_once(run, monkeypatch, limit, scale_steps):
    sizes, quantise = [], baseline.quantise

    def counted(*given):
        sizes.append(quantise(*given))
        return sizes[-1]

    monkeypatch.setattr(baseline, "quantise", counted)
    run(limit, scale_steps=scale_steps)
    assert 0.98 * limit < sizes[0] <= limit
    assert len(sizes) == 1 or sizes[0] < (1 - baseline.NEAR) * limit  # a width more or less is 2 % of so small a model


def test_a_plan_that_was_too_hopeful_is_put_right(run, monkeypatch):
    monkeypatch.setattr(baseline, "planned_around", lambda *_: 0)
    assert 0.9 * 60_000 < size(run(60_000)) <= 60_000


def test_the_same_inputs_give_the_same_bytes(run):
    one, other = (contents(run(60_000, out)) for out in ("one", "other"))
    assert one == other and {"bits.csv", "model/model.safetensors", "model/model.json"} < one.keys()


def test_without_gptq_there_is_no_plain_model(run, given):
    folder = run(60_000, enabled=False)
    assert pd.read_csv(folder / "bits.csv").empty
    assert list(pd.read_csv(folder / "bits.csv").columns) == baseline.COLUMNS
    assert contents(folder / "model") == contents(given.dense) and "model.safetensors" in contents(given.dense)
