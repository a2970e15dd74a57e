"""Stage eora: the adapter through saved folders, its codes, and what is refused."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tasks import eora as stage_module
from tasks import gptq
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.quantisation import gptqmodel_library as library
from tasks.algorithms.quantisation import gptqmodel_settings, rounding, unpacking
from tasks.models import dense_folder, gptq_folder, mask_files, sparsity_ledger, streamed_folder, tensor_files
from tests.support.matrices import normal
from tests.support.packed_models import quantise_linears

SETTINGS = {"bits": 2, "group_size": 32, "symmetric": False, "damp": 0.05, "act_order": "none"}


@pytest.fixture(scope="module")
def files(tiny_llama, tmp_path_factory):
    """A fetched model of four blocks, the recovered, pruned one of three of them, and the quantised one."""
    folder = tmp_path_factory.mktemp("eora")
    recovered = dense_folder.load_dense(tiny_llama(folder / "vocabulary/model"))
    tokenizer = dense_folder.load_tokenizer(folder / "vocabulary/model")
    del recovered.model.layers[1]
    recovered.config.num_hidden_layers = 3
    if getattr(recovered.config, "layer_types", None):
        recovered.config.layer_types = recovered.config.layer_types[:3]
    keep = {}
    for name, linear in families.block_linears(recovered).items():
        linear.weight.data += 0.02 * normal(*linear.weight.shape, seed=4)
        keep[name] = torch.tensor([True, True, False, True]).repeat(linear.out_features, linear.in_features // 4)
        linear.weight.data *= keep[name]
    dense_folder.save_dense(recovered, tokenizer, folder / "lora/model")
    mask_files.save_masks(folder / "masks.safetensors", keep, "3:4")
    windows = torch.randint(0, 257, (6, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tensor_files.save_tensors(folder / "windows.safetensors", {"input_ids": windows}, {})
    (folder / "removed.json").write_text('{"kept": [0, 2, 3]}')
    model, config = streamed_folder.open_dense(folder / "lora/model"), gptqmodel_settings.config(**SETTINGS)
    quantise_linears(model, folder / "lora/model", folder / "gptq/model", windows, keep, config)
    names = ("gptq/model", "lora/model", "vocabulary/model", "removed.json", "windows.safetensors", "masks.safetensors")
    return {name: folder / name for name in names}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Folders of finished runs by their parameters, shared by the tests."""
    return tmp_path_factory.mktemp("runs"), {}


@pytest.fixture
def run(make_stage, files, done):
    """run(rank or budget_bytes, …) -> the folder of the stage's outputs; `anew` does not take another test's."""
    folder, runs = done

    def run(rank=None, budget_bytes=None, bits=16, teacher="lora", enforce=True, anew=False):
        chosen = {"rank": rank, "budget_bytes": budget_bytes, "bits": bits, "teacher": teacher}
        key = str((chosen, enforce))
        if anew or key not in runs:
            out = folder / str(len(list(folder.iterdir())))
            out.mkdir()
            stage_module.run(make_stage({"eora": chosen, "wanda": {"enforce": enforce}}, files, out=out))
            if anew:
                return out
            runs[key] = out
        return runs[key]

    return run


def factors_in(folder):
    """Per linear (A, B) of the adapter in a model's folder."""
    stored = load_file(folder / "eora/adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in stored if key.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): tuple(stored[f"{name}.lora_{side}.weight"] for side in "AB")
        for name in names
    }


def merged(files, folder):
    """The quantised model as a dense one with B A added to its weights."""
    model, factors = gptq_folder.load_dequantised(files["gptq/model"]), factors_in(folder)
    for name, linear in families.block_linears(model).items():
        a, b = factors[name]
        linear.weight.data += b.float() @ a.float()
    return model


def test_a_rank_that_a_linear_can_not_have_is_refused():
    with pytest.raises(InputError, match="eora.rank = 33 is above 32, the smaller side of k_proj: choose at most that"):
        stage_module.check_rank({"q_proj": (64, 64), "k_proj": (32, 64)}, 33)


def test_a_budget_that_buys_nothing_is_refused():
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64)}
    stage_module.check_budget(shapes, 52, 4)
    with pytest.raises(InputError, match="eora.budget_bytes = 51 is below 52, one rank of k_proj at eora.bits = 4"):
        stage_module.check_budget(shapes, 51, 4)


@pytest.mark.parametrize("teacher", ["lora", "fetch"])
def test_the_stage_brings_the_model_closer_to_its_teacher_and_gptqmodel_loads_it(run, files, teacher, capsys):
    folder = run(rank=8, teacher=teacher, anew=True)
    rows = pd.read_csv(folder / "layers.csv")
    assert len(rows) == 21 and (rows["rank"] == 8).all()
    assert (rows["error_after"] < rows["error_before"]).all()
    factors = factors_in(folder / "model")
    assert rows["bytes"].sum() == sum(a.nbytes + b.nbytes for a, b in factors.values())
    weights = {name: len(b) * a.shape[1] for name, (a, b) in factors.items()}
    expected = [8 * size / weights[name] for name, size in zip(rows["linear"], rows["bytes"], strict=True)]
    assert rows["bits_per_weight_equivalent"].tolist() == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert f"{rows['bytes'].sum()} bytes" in printed
    assert f"are {8 * rows['bytes'].sum() / sum(weights.values()):.3g} more bits per weight" in printed
    assert ("by rule" in printed) == (teacher == "lora")
    wanted = dense_folder.load_dense(files["lora/model"])
    if teacher == "fetch":
        fetched = dense_folder.load_dense(files["vocabulary/model"])
        for name, linear in families.block_linears(wanted).items():
            place = int(name.split(".")[2])
            linear.weight.data = fetched.get_submodule(name.replace(f".{place}.", f".{[0, 2, 3][place]}.", 1)).weight
    ids = load_file(files["windows.safetensors"])["input_ids"].long()
    with torch.no_grad():
        target = wanted(input_ids=ids).logits
        before, after = (
            float((gptq_folder.load_quantised(path)(input_ids=ids).logits - target).norm())
            for path in (files["gptq/model"], folder / "model")
        )
    assert after < 0.9 * before


def test_the_loaded_adapter_is_the_branch_that_was_computed(run, files):
    folder = run(rank=8) / "model"
    factors = factors_in(folder)
    for path in files["gptq/model"].iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    for name, linear in families.block_linears(gptq_folder.load_dequantised(folder)).items():
        a, b = factors[name]
        assert a.shape == (8, linear.in_features) and b.shape == (linear.out_features, 8)
    ids = load_file(files["windows.safetensors"])["input_ids"].long()
    model = gptq_folder.load_quantised(folder)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, merged(files, folder)(input_ids=ids).logits, atol=1e-3)
    assert model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False).shape == (1, 9)


@pytest.mark.parametrize("bits", [16, 4])
def test_ranks_within_a_budget_differ_by_linear_and_gptqmodel_loads_them(run, files, bits):
    budget = {16: 6000, 4: 2000}[bits]
    out = run(budget_bytes=budget, bits=bits)
    folder, rows = out / "model", pd.read_csv(out / "layers.csv").set_index("linear")
    assert rows["rank"].min() == 0 and rows["rank"].nunique() > 3
    assert budget * 0.97 < rows["bytes"].sum() <= budget
    factors = factors_in(folder)
    assert {name: (len(a), b.shape[1]) for name, (a, b) in factors.items()} == {
        name: (rank, rank) for name, rank in rows["rank"].items()
    }
    ids = load_file(files["windows.safetensors"])["input_ids"].long()
    with torch.no_grad():
        logits = gptq_folder.load_quantised(folder)(input_ids=ids).logits
        assert torch.allclose(logits, merged(files, folder)(input_ids=ids).logits, atol=1e-3)


def test_stock_gptqmodel_loads_a_branch_of_any_rank(run, files):
    folder = run(budget_bytes=2000, bits=8) / "model"
    factors, dense = factors_in(folder), families.block_linears(gptq_folder.load_dequantised(files["gptq/model"]))
    package = library.gptqmodel
    adapter = {"name": "lora", "path": str(folder / "eora"), "rank": max(len(a) for a, _ in factors.values())}
    model = package.GPTQModel.load(  # as a user would, in the library's own precision
        str(folder), backend=package.BACKEND.GPTQ_TORCH, device="cpu", adapter=adapter
    ).model
    linears = unpacking.quantised_linears(model)
    assert set(linears) == set(factors)
    for name, linear in linears.items():
        a, b = factors[name]
        assert torch.equal(linear.adapter.lora_A.T.half(), a) and torch.equal(linear.adapter.lora_B.T.half(), b)
    ranks = {len(a): name for name, (a, _) in factors.items()}
    for rank in (0, max(ranks)):  # two, as the library compiles at each linear's first call
        name, (a, b) = ranks[rank], factors[ranks[rank]]
        x = normal(1, 7, a.shape[1], seed=6).to(linears[name].scales.dtype)
        expected = x.float() @ (dense[name].weight.detach() + b.float() @ a.float()).T
        with torch.no_grad():
            found = linears[name](x).float()
        assert torch.allclose(found, expected, rtol=2e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [8, 4])
def test_stored_codes_are_what_the_bytes_and_the_adapter_say(run, bits):
    out = run(budget_bytes=2000, bits=bits)
    rows = pd.read_csv(out / "layers.csv").set_index("linear")
    with safe_open(out / "adapter.safetensors", framework="pt") as file:
        assert file.metadata() == {"bits": str(bits), "group_size": "64"}
    codes, used = load_file(out / "adapter.safetensors"), 0
    for name, (a, b) in factors_in(out / "model").items():
        if not len(a):
            assert not any(key.startswith(name) for key in codes)
            continue
        size = 0
        for side, factor in (("a", a), ("b", b.T)):
            code, scale = codes[f"{name}.{side}.codes"], codes[f"{name}.{side}.scales"]
            assert code.dtype == torch.int8 and code.abs().max() <= 2 ** (bits - 1) - 1 and scale.dtype == torch.float16
            group = code.shape[1] // scale.shape[1]
            values = rounding.values(rounding.Coded(code, scale, bits, group))
            assert torch.equal(factor.float(), values)
            assert torch.equal(values, (code * scale.float().repeat_interleave(group, dim=1)).half().float())
            size += code.numel() * bits // 8 + scale.nbytes
        assert size == rows["bytes"][name]
        used += len([key for key in codes if key.startswith(f"{name}.")])
    assert used == len(codes) > 0


def test_the_error_that_is_reported_is_that_of_the_rounded_factors(run, files):
    out = run(rank=8, bits=4)
    rows = pd.read_csv(out / "layers.csv").set_index("linear")
    exact = pd.read_csv(run(rank=8) / "layers.csv").set_index("linear")
    name, seen = "model.layers.2.mlp.down_proj", []
    model, factors = merged(files, out / "model"), factors_in(out / "model")
    linear = families.block_linears(model)[name]
    linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=load_file(files["windows.safetensors"])["input_ids"].long())
    x, linear = torch.cat(seen).double(), linear.requires_grad_(False)
    wanted = dense_folder.load_dense(files["lora/model"]).get_submodule(name).weight.detach().double()
    whole = (x @ wanted.T).norm()
    assert rows["error_after"][name] == pytest.approx(float((x @ (wanted - linear.weight).T).norm() / whole), rel=1e-3)
    without = linear.weight - factors[name][1].float() @ factors[name][0].float()
    assert rows["error_before"][name] == pytest.approx(float((x @ (wanted - without).T).norm() / whole), rel=1e-3)
    assert exact["error_after"][name] < rows["error_after"][name] < rows["error_before"][name]


def test_two_runs_write_the_same_bytes(run):
    first, second = (run(budget_bytes=2000, bits=8, anew=anew) for anew in (False, True))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) > 8
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    assert str(first.parent) not in (first / "model/eora/adapter_config.json").read_text()


def test_the_ledger_is_that_of_the_quantised_weights_and_a_broken_pattern_ends_the_stage(
    run, files, tmp_path, monkeypatch
):
    rows = pd.read_csv(run(rank=8) / "sparsity.csv")
    assert list(rows.columns) == sparsity_ledger.COLUMNS and len(rows) == 21
    assert (rows["zeros"] >= rows["weights"] / 4).all() and (rows["groups"] == rows["weights"] / 4).all()
    assert not rows["violations"].any() and not rows["revived"].any()
    keep, pattern = mask_files.load_masks(files["masks.safetensors"])
    name = "model.layers.1.mlp.up_proj"
    keep = {**keep, name: ~keep[name]}
    mask_files.save_masks(tmp_path / "other.safetensors", keep, pattern)
    monkeypatch.setitem(files, "masks.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=f"gptq broke the sparsity pattern of {name}"):
        run(rank=1, anew=True)
    rows = pd.read_csv(run(rank=1, enforce=False, anew=True) / "sparsity.csv").set_index("linear")
    assert rows["revived"][name] > 0 and rows["revived"].drop(name).sum() == 0


def test_a_record_of_other_blocks_is_refused(run, files, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="below 192, one rank of self_attn.k_proj at eora.bits = 16"):
        run(budget_bytes=191)
    with pytest.raises(InputError, match="above 32"):
        run(rank=33)
    for kept in ("[0, 2]", "[0, 2, 4]"):
        (tmp_path / "other.json").write_text(f'{{"kept": {kept}}}')
        monkeypatch.setitem(files, "removed.json", tmp_path / "other.json")
        with pytest.raises(InputError, match="run stage depth_prune again"):
            run(rank=8, teacher="fetch")


def test_skip_passes_the_quantised_model_on(make_stage, files, tmp_path):
    stage_module.skip(make_stage({"eora": {}}, files))
    for path in files["gptq/model"].iterdir():
        assert (tmp_path / "out/model" / path.name).read_bytes() == path.read_bytes()
    for name, columns in (("layers.csv", stage_module.COLUMNS), ("sparsity.csv", sparsity_ledger.COLUMNS)):
        rows = pd.read_csv(tmp_path / "out" / name)
        assert list(rows.columns) == columns and rows.empty
    with safe_open(tmp_path / "out/adapter.safetensors", framework="pt") as file:
        assert file.metadata()["bits"] == "16" and not list(file.keys())
    assert gptq.COLUMNS != stage_module.COLUMNS
