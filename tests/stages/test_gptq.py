"""Stage gptq: masks survive in the saved folder, stock gptqmodel loads it, tables say what it holds."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tasks import gptq as stage_module
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import masks
from tasks.algorithms.quantisation import gptqmodel_library as library
from tasks.algorithms.quantisation import rounding, unpacking
from tasks.compression import block_quantisation
from tasks.models import dense_folder, gptq_folder, mask_files, sparsity_ledger, tensor_files
from tests.support.gptq_oracle import NAME
from tests.support.pruned_model import inputs_of_the_stage, sections


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    """The inputs of the stage: a 2:4 pruned model, its masks, windows."""
    return inputs_of_the_stage(tmp_path_factory.mktemp("gptq"), tiny_llama)


@pytest.fixture(scope="module")
def unpruned(tiny_llama, tmp_path_factory):
    return inputs_of_the_stage(tmp_path_factory.mktemp("dense"), tiny_llama, prune=False)


@pytest.fixture(scope="module")
def untied(tiny_llama, tmp_path_factory):
    return inputs_of_the_stage(tmp_path_factory.mktemp("untied"), tiny_llama, tied=False)


@pytest.fixture
def run(make_stage, pruned, tmp_path, monkeypatch):
    """run(out, **settings) -> the stage's output folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def run(out="out", given=pruned, **changed):
        stage_module.run(make_stage(sections(**changed), given.files, out=out))
        return tmp_path / out

    return run


def test_the_stage_keeps_masks_and_stock_gptqmodel_loads_its_folder(run, pruned, tmp_path):
    folder = run()
    assert {path.name for path in folder.iterdir()} == {
        "model",
        "masks.safetensors",
        "embedding.safetensors",
        "layers.csv",
        "sparsity.csv",
    }
    assert not load_file(folder / "embedding.safetensors")
    rows = pd.read_csv(folder / "layers.csv")
    assert list(rows["linear"]) == list(pruned.keep)
    assert set(rows["bits"]) == {4}
    assert (rows["violations"] == 0).all() and (rows["error"].between(0.001, 0.5)).all()
    written, given = ({path.name for path in of.iterdir()} for of in (folder / "model", pruned.files["lora/model"]))
    assert written == given | {"quantize_config.json"}
    assert list((tmp_path / "elsewhere").iterdir()) == []  # no logs
    package = library.gptqmodel
    stock = package.GPTQModel.load(str(folder / "model"), backend=package.BACKEND.GPTQ_TORCH, device="cpu").model
    for (name, linear), zeros in zip(unpacking.quantised_linears(stock).items(), rows["zeros"], strict=True):
        weight = unpacking.dequantised(linear)
        assert weight[~pruned.keep[name]].count_nonzero() == 0
        assert int((weight == 0).sum()) == zeros
    tensors = load_file(folder / "model/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.int32}
    assert torch.equal(tensors["model.embed_tokens.weight"], pruned.model.model.embed_tokens.weight.half())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"symmetric": False, "mse": 2.4},
        {"act_order": "descending"},
        {"act_order": "group_aware", "scale_steps": 8},
        {"joint": {"keep": 2, "of": 4}},
    ],
    ids=str,
)
def test_descent_lowers_the_error_of_what_is_saved(run, pruned, changed):
    name = "model.layers.0.self_attn.q_proj"
    block = pruned.model.model.layers[0]
    with torch.no_grad():
        x = block.input_layernorm(pruned.model.model.embed_tokens(pruned.windows.long())).flatten(0, 1).double()
    original = pruned.model.get_submodule(name).weight.detach().double()
    errors = {}
    for cycles in (0, 5):
        folder = run(f"out{cycles}", bits=3, descent_cycles=cycles, **changed)
        weight = gptq_folder.block_weights(gptq_folder.load_quantised(folder / "model"))[name].double()
        keep, _ = mask_files.load_masks(folder / "masks.safetensors")
        assert weight[~keep[name]].count_nonzero() == 0
        errors[cycles] = float((x @ (weight - original).T).norm() / (x @ original.T).norm())
        stated = pd.read_csv(folder / "layers.csv").set_index("linear").loc[name, "error"]
        assert errors[cycles] == pytest.approx(stated, rel=0.02)  # stated from gptqmodel's own sums
    assert errors[5] < errors[0]


def test_the_loaded_model_computes_in_float32_and_generates(run, pruned):
    folder = run(bits=8) / "model"
    ids = pruned.windows[:2].long()
    loaded, plain = gptq_folder.load_quantised(folder), gptq_folder.load_dequantised(folder)
    assert not unpacking.quantised_linears(plain)
    with torch.no_grad():
        logits, expected = loaded(input_ids=ids).logits, plain(input_ids=ids).logits
        dense = pruned.model(input_ids=ids).logits
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, expected, atol=1e-4)
    assert 0 < (logits - dense).norm() / dense.norm() < 0.05
    assert loaded.generate(ids[:1, :5], max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_two_runs_write_the_same_bytes(run):
    first, second = run("first", bits=2, symmetric=False), run("second", bits=2, symmetric=False)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) > 4
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    text = (first / "model/config.json").read_text() + (first / "model/quantize_config.json").read_text()
    assert str(first.parent) not in text
    assert json.loads(text[text.rindex('{\n "bits"') :])["sym"] is False


def test_windows_longer_than_the_model_are_refused(run, pruned, monkeypatch, tmp_path):
    path = tmp_path / "windows.safetensors"
    tensor_files.save_tensors(path, {"input_ids": torch.ones((2, 129), dtype=torch.int32)}, {})
    monkeypatch.setitem(pruned.files, "windows.safetensors", path)
    with pytest.raises(
        InputError, match=r"calibrate.length = 129, but the model has 128 positions: choose at most 128"
    ):
        run()
    assert not (tmp_path / "out/model/model.safetensors").exists()


def stored_weights(folder):
    """float32 of every linear, unpacked by gptqmodel."""
    return gptq_folder.block_weights(gptq_folder.load_quantised(folder / "model"))


@pytest.mark.parametrize(
    "changed",
    [
        {"scale_steps": 4},
        {"scale_steps": 4, "act_order": "descending", "symmetric": False, "mse": 2.4, "bits": 3},
        {"scale_steps": 4, "act_order": "group_aware", "mse": 2.0},
    ],
    ids=str,
)
def test_pruned_weights_are_zero_in_the_saved_folder_in_every_order(run, pruned, changed):
    folder = run(**changed)
    for name, weight in stored_weights(folder).items():
        assert weight[~pruned.keep[name]].count_nonzero() == 0, name
        assert weight[pruned.keep[name]].count_nonzero() > 0.3 * weight.numel() * 0.5
    ledger = pd.read_csv(folder / "sparsity.csv")
    assert (ledger[["violations", "revived"]] == 0).all(axis=None) and (ledger["groups"] * 4 == ledger["weights"]).all()
    assert (folder / "masks.safetensors").read_bytes() == pruned.files["masks.safetensors"].read_bytes()
    scales = [t for name, t in load_file(folder / "model/model.safetensors").items() if name.endswith(".scales")]
    assert len(scales) == 14
    assert all(torch.equal(t, rounding.snap(t.float(), 4)) for t in scales)


def test_unmasked_gptq_fills_zeros_and_the_result_is_a_dense_one(run, pruned):
    folder = run(masked=False, enforce=False, bits=8)
    ledger = pd.read_csv(folder / "sparsity.csv")
    assert ledger["revived"].sum() > 100 and ledger["violations"].sum() > 100
    assert mask_files.load_masks(folder / "masks.safetensors") == ({}, "dense")
    weights = stored_weights(folder)
    alive = [int(weights[name][~mask].count_nonzero()) for name, mask in pruned.keep.items()]
    assert alive == ledger["revived"].tolist()


def test_unmasked_gptq_with_enforce_ends_the_stage(run):
    with pytest.raises(InputError, match=r"gptq broke the sparsity pattern of model\.layers\.0.* \(\d+ of \d+ groups"):
        run(masked=False, enforce=True)


def test_joint_masks_hold_exactly_what_they_keep(run, unpruned):
    folder = run(given=unpruned, joint={"keep": 2, "of": 4})
    keep, pattern = mask_files.load_masks(folder / "masks.safetensors")
    assert pattern == "2:4" and set(keep) == set(unpruned.keep)
    for name, weight in stored_weights(folder).items():
        assert (masks.groups(keep[name], 4).sum(dim=-1) == 2).all()
        assert weight[~keep[name]].count_nonzero() == 0
    assert (pd.read_csv(folder / "sparsity.csv")["violations"] == 0).all()
    assert pd.read_csv(folder / "layers.csv")["error"].between(0.01, 0.7).all()


def test_joint_masks_with_an_order_of_columns_are_refused(run, unpruned):
    with pytest.raises(InputError, match="set gptq.act_order to none"):
        run(given=unpruned, joint={"keep": 2, "of": 4}, act_order="descending")


def test_a_budget_gives_widths_that_stock_gptqmodel_loads(run, pruned):
    chosen = sections()["gptq"]
    at = {
        bits: sum(
            block_quantisation.linear_bytes(tuple(mask.shape), int(mask.sum()), "2:4", bits, chosen)
            for mask in pruned.keep.values()
        )
        for bits in (2, 3, 4)
    }
    budget = (at[3] + at[4]) // 2
    folder = run(budget_bytes=budget)
    rows = pd.read_csv(folder / "layers.csv")
    widths = dict(zip(rows["linear"], rows["bits"], strict=True))
    assert len(set(widths.values())) > 1
    spent = sum(
        block_quantisation.linear_bytes(tuple(mask.shape), int(mask.sum()), "2:4", widths[name], chosen)
        for name, mask in pruned.keep.items()
    )
    assert 0.97 * budget < spent <= budget
    package = library.gptqmodel
    stock = package.GPTQModel.load(str(folder / "model"), backend=package.BACKEND.GPTQ_TORCH, device="cpu").model
    for name, linear in unpacking.quantised_linears(stock).items():
        weight = unpacking.dequantised(linear)
        assert linear.bits == widths[name]
        assert weight[~pruned.keep[name]].count_nonzero() == 0
        levels = [len(group.unique()) for group in weight[:, :32]]
        assert 2 ** (widths[name] - 1) * 0.5 < max(levels) <= 2 ** widths[name]
    with pytest.raises(InputError, match="budget is 1000 bytes"):
        run("small", budget_bytes=1000)


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_the_embedding_holds_exactly_its_dequantised_values(run, pruned, method):
    folder = run(embedding={"bits": 4, "group_size": 16, "method": method}, scale_steps=8)
    stored = load_file(folder / "embedding.safetensors")
    assert set(stored) == {"embedding.codes", "embedding.scales"}
    assert (stored["embedding.codes"].dtype, stored["embedding.scales"].dtype) == (torch.int8, torch.float16)
    with safe_open(folder / "embedding.safetensors", framework="pt") as file:
        assert file.metadata() == {"bits": "4", "group_size": "16"}
    tensors = load_file(folder / "model/model.safetensors")
    coded = rounding.Coded(stored["embedding.codes"], stored["embedding.scales"], 4, 16)
    assert torch.equal(tensors["model.embed_tokens.weight"].float(), rounding.values(coded))
    assert "lm_head.weight" not in tensors and dense_folder.config(folder / "model")["tie_word_embeddings"] is True
    loaded = gptq_folder.load_quantised(folder / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    given = pruned.model.model.embed_tokens.weight.detach()
    assert 0 < (loaded.lm_head.weight - given).norm() / given.norm() < 0.2


def test_an_untied_head_is_stored_beside_the_embedding(run, untied):
    folder = run(given=untied, embedding={"bits": 8, "group_size": 32, "method": "gptq"})
    stored, tensors = load_file(folder / "embedding.safetensors"), load_file(folder / "model/model.safetensors")
    assert set(stored) == {f"{name}.{part}" for name in ("embedding", "head") for part in ("codes", "scales")}
    for name, tensor in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        coded = rounding.Coded(stored[f"{name}.codes"], stored[f"{name}.scales"], 8, 32)
        assert torch.equal(tensors[tensor].float(), rounding.values(coded))
    assert not torch.equal(tensors["model.embed_tokens.weight"], tensors["lm_head.weight"])
    assert dense_folder.config(folder / "model")["tie_word_embeddings"] is False


def test_skip_passes_the_dense_model_and_its_masks_on(make_stage, pruned, tmp_path):
    stage_module.skip(make_stage(sections(), pruned.files))
    for path in pruned.files["lora/model"].iterdir():
        assert (tmp_path / "out/model" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "out/masks.safetensors").read_bytes() == pruned.files["masks.safetensors"].read_bytes()
    assert list(pd.read_csv(tmp_path / "out/layers.csv").columns) == stage_module.COLUMNS
    with safe_open(tmp_path / "out/embedding.safetensors", framework="pt") as file:
        assert not list(file.keys()) and file.metadata()["bits"] == "16"
    ledger = pd.read_csv(tmp_path / "out/sparsity.csv")
    assert list(ledger["linear"]) == list(pruned.keep)
    assert (ledger["zeros"] * 2 == ledger["weights"]).all() and (ledger["revived"] == 0).all()


def test_the_table_counts_what_is_broken():
    weight = torch.tensor([[1.0, 0.5, 2, 0, 0, 3, 0, 0]])
    keep = torch.tensor([[True, False, True, False, False, True, True, False]])
    ledger = sparsity_ledger.ledger({NAME: weight}, {NAME: keep}, "2:4")
    row = stage_module.table({NAME: (4, weight)}, ledger, {NAME: 0.1}).iloc[0]
    assert row.tolist() == [NAME, 4, 0.1, 4, 2]  # one pruned weight, one group
