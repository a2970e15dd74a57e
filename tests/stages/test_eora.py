"""EoRA against its closed forms, and the adapter through saved folders."""

import itertools
import json

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tasks import eora as stage_module
from tasks import gptq
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.quantisation import eora, eora_branches, eora_ranks, masked_gptq, rounding, unpacking
from tasks.algorithms.quantisation import gptqmodel_library as library
from tasks.models import dense_folder, gptq_folder, mask_files, sparsity_ledger, tensor_files


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(columns, tokens=256):
    return normal(tokens, columns, seed=1) @ normal(columns, columns, seed=2) * normal(columns, seed=3).exp()


def rest(delta, a, b, x):
    return float((x.double() @ (delta - b @ a).double().T).norm())


def test_full_rank_restores_the_weight():
    x, delta = inputs(24), normal(40, 24)
    a, b = eora.factors(delta, x.double().T @ x.double(), 24)
    assert rest(delta, a, b, x) < 1e-4 * float((x @ delta.T).norm())
    assert torch.allclose(b @ a, delta, atol=1e-2)


def test_full_rank_restores_the_weight_on_the_range_of_singular_inputs():
    x = inputs(24)
    x[:, 5] = 0  # an input that never fires
    x[:, 7] = x[:, 8]
    delta = normal(40, 24)
    a, b = eora.factors(delta, x.double().T @ x.double(), 24)
    assert rest(delta, a, b, x) < 1e-4 * float((x @ delta.T).norm())
    assert a.isfinite().all() and a[:, 5].abs().max() < 1e-4


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_unit_moments_give_the_truncated_svd(rank):
    delta = normal(16, 24)
    a, b = eora.factors(delta, 7.0 * torch.eye(24), rank)
    u, s, v = torch.linalg.svd(delta.double())
    expected = u[:, :rank] * s[:rank] @ v[:rank]
    assert torch.allclose((b @ a).double(), expected, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_error_is_the_least_that_any_matrix_of_that_rank_leaves(rank):
    # Eckart-Young on the outputs: X delta^T has rank min(...), and a B A^T of rank r can't beat its tail.
    x, delta = inputs(24), normal(16, 24)
    a, b = eora.factors(delta, x.double().T @ x.double(), rank)
    tail = torch.linalg.svdvals(x.double() @ delta.double().T)[rank:]
    assert rest(delta, a, b, x) == pytest.approx(float(tail.norm()), rel=1e-3)


def test_the_error_falls_with_the_rank():
    x, delta = inputs(24), normal(16, 24)
    moments = x.double().T @ x.double()
    errors = [rest(delta, *eora.factors(delta, moments, rank), x) for rank in range(1, 17)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))


def test_signs_are_fixed_and_scale_of_the_moments_does_not_matter():
    x, delta = inputs(24), normal(16, 24)
    moments = x.double().T @ x.double()
    a, b = eora.factors(delta, moments, 6)
    assert (a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all()
    again, _ = eora.factors(delta, moments * 3, 6)
    assert torch.allclose(a, again, rtol=1e-3, atol=1e-4)


def test_a_rank_above_the_smaller_side_is_refused():
    with pytest.raises(InputError, match="eora.rank = 17 is above 16"):
        eora.factors(normal(16, 24), torch.eye(24), 17)
    with pytest.raises(InputError, match="eora.rank = 33 is above 32, the smaller side of k_proj: choose at most that"):
        stage_module.check_rank({"q_proj": (64, 64), "k_proj": (32, 64)}, 33)


def test_each_branch_is_computed_on_inputs_of_compensated_linears(make_model, make_windows):
    teacher, student = make_model(), make_model()
    windows = make_windows(4, 32)
    for linear in families.block_linears(student).values():
        linear.weight.data = (linear.weight * 4).round() / 4
    wanted = {name: linear.weight.detach().clone() for name, linear in families.block_linears(teacher).items()}
    branches = eora_branches.compensate(student, windows, wanted, eora_branches.Size(16))
    assert list(branches) == list(wanted)
    # At full rank of the smaller sides everything is restored, so that later inputs are the teacher's.
    small = [name for name in wanted if min(wanted[name].shape) == 16]
    assert small and all(branches[name].error_after < 2e-3 for name in small)  # float16
    name = "model.layers.3.mlp.down_proj"
    seen = []
    linear = families.block_linears(student)[name]
    linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        student(input_ids=windows)
    x, branch = torch.cat(seen).double(), branches[name]
    left = wanted[name] - linear.weight.detach()
    whole = (x @ wanted[name].double().T).norm()
    assert branch.error_after == pytest.approx(float((x @ left.double().T).norm() / whole), rel=1e-3)
    lost = left + branch.b.float() @ branch.a.float()
    assert branch.error_before == pytest.approx(float((x @ lost.double().T).norm() / whole), rel=1e-3)
    assert branch.error_after < branch.error_before


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_the_spectrum_is_what_each_rank_removes_of_the_squared_output_error(shape):
    x, delta = inputs(shape[1]), normal(*shape)
    moments = x.double().T @ x.double()
    removed = eora.spectrum(delta, moments)
    errors = [rest(delta, *eora.factors(delta, moments, rank), x) ** 2 for rank in range(17)]
    assert len(removed) == 16 and float(removed.sum()) == pytest.approx(errors[0], rel=1e-6)
    for rank in range(16):
        assert float(removed[rank]) == pytest.approx(errors[rank] - errors[rank + 1], rel=1e-2, abs=1e-5 * errors[0])


def test_refit_is_least_squares_on_the_outputs():
    x, delta = inputs(24), normal(16, 24)
    a = (eora.factors(delta, x.double().T @ x.double(), 4)[0] * 2).round() / 2
    b = eora.refit(delta, x.double().T @ x.double(), a)
    wanted = torch.linalg.lstsq((x @ a.T).double(), (x @ delta.T).double()).solution.T
    assert torch.allclose(b.double(), wanted, rtol=1e-4, atol=1e-5)
    a[2] = 0
    assert eora.refit(delta, x.double().T @ x.double(), a)[:, 2].abs().max() < 1e-6


def naive_best(worth, sizes, budget):
    """The most that ranks within the budget are worth, over all of them."""
    most = 0.0
    for ranks in itertools.product(*(range(len(worth[name]) + 1) for name in worth)):
        if sum(rank * sizes[name] for rank, name in zip(ranks, worth, strict=True)) <= budget:
            most = max(most, sum(float(worth[name][:rank].sum()) for rank, name in zip(ranks, worth, strict=True)))
    return most


def falling(seed, ranks=4):
    return normal(ranks, seed=seed).abs().double().sort(descending=True).values


@pytest.mark.parametrize("budget", [10, 37, 60, 95, 120])
def test_ranks_of_one_size_are_allocated_optimally(budget):
    worth = {name: falling(place) * (place + 1) for place, name in enumerate("abc")}
    ranks = eora_ranks.allocate(worth, dict.fromkeys(worth, 10), budget)
    assert list(ranks) == ["a", "b", "c"] and sum(ranks.values()) == min(budget // 10, 12)
    found = sum(float(worth[name][:rank].sum()) for name, rank in ranks.items())
    assert found == pytest.approx(naive_best(worth, dict.fromkeys(worth, 10), budget))


@pytest.mark.parametrize("seed", range(8))
def test_ranks_of_several_sizes_fit_and_are_short_of_the_best_by_less_than_one(seed):
    sizes, budget = {"a": 7, "b": 12, "c": 19}, 20 + 10 * seed
    worth = {name: falling(3 * seed + place) for place, name in enumerate(sizes)}
    ranks = eora_ranks.allocate(worth, sizes, budget)
    taken = sum(rank * sizes[name] for name, rank in ranks.items())
    assert taken <= budget
    left = [name for name, rank in ranks.items() if rank < 4]
    assert all(taken + sizes[name] > budget for name in left)  # nothing that is worth something fits any more
    found, best = sum(float(worth[name][:rank].sum()) for name, rank in ranks.items()), naive_best(worth, sizes, budget)
    assert best - max(float(gain[0]) for gain in worth.values()) < found <= best + 1e-12


def test_worthless_ranks_are_not_bought_and_a_budget_that_buys_nothing_is_refused():
    worth = {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2)}
    assert eora_ranks.allocate(worth, {"a": 5, "b": 5}, 100) == {"a": 1, "b": 0}
    assert eora_ranks.allocate(worth, {"a": 6, "b": 5}, 4) == {"a": 0, "b": 0}
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64)}
    stage_module.check_budget(shapes, 52, 4)
    with pytest.raises(InputError, match="eora.budget_bytes = 51 is below 52, one rank of k_proj at eora.bits = 4"):
        stage_module.check_budget(shapes, 51, 4)


def test_curvature_foretells_what_a_random_error_of_the_output_does_to_the_predictions(make_model, make_windows):
    model, windows = make_model(), make_windows(24, 32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = eora_ranks.curvature(model, windows)
    assert eora_ranks.curvature(model, windows) == found
    assert all(p.grad is None and p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert list(found) == list(families.block_linears(model))
    with torch.no_grad():
        clean = model(input_ids=windows).logits.double().log_softmax(-1)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.3.mlp.down_proj"):
        generator, squares = torch.Generator().manual_seed(5), []

        def disturb(_, __, output, generator=generator, squares=squares):
            error = 1e-2 * torch.randn(output.shape, generator=generator)
            squares.append(float(error.double().square().sum()))
            return output + error

        handle = families.block_linears(model)[name].register_forward_hook(disturb)
        with torch.no_grad():
            noisy = [model(input_ids=windows).logits.double().log_softmax(-1) for _ in range(4)]
        handle.remove()
        divergence = sum(float((clean.exp() * (clean - each)).sum()) for each in noisy)
        assert divergence == pytest.approx(found[name] * sum(squares) / 2, rel=0.15)


def test_gains_are_the_spectra_on_the_compressed_models_inputs_times_the_curvature(make_model, make_windows):
    teacher, student = make_model(), make_model()
    windows = make_windows(4, 32)
    for linear in families.block_linears(student).values():
        linear.weight.data = (linear.weight * 4).round() / 4
    weights = {name: linear.weight.detach().clone() for name, linear in families.block_linears(student).items()}
    wanted = {name: linear.weight.detach().clone() for name, linear in families.block_linears(teacher).items()}
    found, importance = eora_ranks.gains(student, windows, wanted), eora_ranks.curvature(student, windows)
    assert list(found) == list(wanted)
    for name, linear in families.block_linears(student).items():
        assert torch.equal(linear.weight, weights[name])
    name, seen = "model.layers.2.mlp.down_proj", []
    families.block_linears(student)[name].register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1))
    )
    with torch.no_grad():
        student(input_ids=windows)
    lost = torch.linalg.svdvals(torch.cat(seen).double() @ (wanted[name] - weights[name]).double().T).square()
    assert torch.allclose(found[name], lost * importance[name] / (2 * 4 * 32), rtol=1e-4, atol=1e-12)
    with pytest.raises(InputError, match="in the teacher .*another model's"):
        eora_ranks.gains(student, windows, wanted | {name: wanted[name].T})


@pytest.mark.parametrize("bits", [8, 4])
def test_b_is_fitted_to_the_rounded_a_before_it_is_rounded(make_model, make_windows, bits):
    teacher, student = make_model(), make_model()
    windows, name, seen = make_windows(4, 32), "model.layers.0.self_attn.q_proj", []
    wanted = {name: linear.weight.detach().clone() for name, linear in families.block_linears(teacher).items()}
    linear = families.block_linears(student)[name]
    linear.weight.data = (linear.weight * 4).round() / 4
    delta = wanted[name] - linear.weight.detach()
    handle = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        student(input_ids=windows)
    handle.remove()
    x = torch.cat(seen).double()
    branches = eora_branches.compensate(
        student, windows, wanted, eora_branches.Size({n: 6 if n == name else 0 for n in wanted}, bits)
    )
    a, b, coded, _, after = branches[name]
    assert torch.equal(a.float(), rounding.values(coded[0])) and torch.equal(b.float(), rounding.values(coded[1]).T)
    rounded_a = rounding.quantise(eora.factors(delta, x.T @ x, 6)[0], bits, 32)
    assert torch.allclose(a.float(), rounding.values(rounded_a), atol=1e-3)
    fitted = torch.linalg.lstsq(x @ a.double().T, x @ delta.double().T).solution.T.float()
    expected = rounding.values(rounding.quantise(fitted.T, bits, 32)).T
    assert torch.allclose(b.float(), expected, atol=1e-3)
    whole = float((x @ wanted[name].double().T).norm())
    assert after == pytest.approx(rest(delta, a.float(), b.float(), x) / whole, rel=1e-3)
    other = branches["model.layers.0.self_attn.k_proj"]
    assert other.a.shape == (0, 32) and other.b.shape == (16, 0) and other.coded is None
    assert other.error_after == other.error_before == 0


def test_groups_divide_the_rows_and_bytes_are_counted_per_rank():
    assert [eora_branches.group_size(length) for length in (32, 64, 96, 192, 172, 67)] == [32, 64, 48, 64, 43, 1]
    assert eora_branches.rank_bytes((64, 192), 16) == 2 * 256
    assert eora_branches.rank_bytes((64, 192), 8) == 256 + 2 * (1 + 3)
    assert eora_branches.rank_bytes((64, 192), 4) == 128 + 2 * (1 + 3)


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
    model = gptq_folder.load_for_quantisation(folder / "lora/model", masked_gptq.config(**SETTINGS))
    masked_gptq.quantise(model, windows, keep)
    gptq_folder.save_quantised(model, folder / "lora/model", folder / "gptq/model")
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
            float((gptq_folder.load_model(path)(input_ids=ids).logits - target).norm())
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
    model = gptq_folder.load_model(folder)
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
        logits = gptq_folder.load_model(folder)(input_ids=ids).logits
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


def test_peft_is_told_the_ranks(tmp_path):
    factors = {
        f"model.layers.{place}.mlp.up_proj": (torch.zeros(rank, 8), torch.zeros(4, rank))
        for place, rank in enumerate((3, 0, 5))
    }
    gptq_folder.save_adapter(tmp_path, factors)
    described = json.loads((tmp_path / "eora/adapter_config.json").read_text())
    assert described["r"] == described["lora_alpha"] == 5
    assert described["rank_pattern"] == described["alpha_pattern"] == {"model.layers.0.mlp.up_proj": 3}
    assert described["target_modules"] == ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"]
    (tmp_path / "none").mkdir()
    gptq_folder.save_adapter(tmp_path / "none", {"q": (torch.zeros(0, 8), torch.zeros(4, 0))})
    assert not list((tmp_path / "none").iterdir())


def test_the_ledger_is_that_of_the_quantised_weights_and_a_broken_pattern_ends_the_stage(
    run, files, tmp_path, monkeypatch
):
    rows = pd.read_csv(run(rank=8) / "sparsity.csv")
    assert list(rows.columns) == sparsity_ledger.COLUMNS and len(rows) == 21
    assert (rows["zeros"] >= rows["weights"] / 4).all() and (rows["groups"] == rows["weights"] / 4).all()
    assert not rows["violations"].any() and not rows["revived"].any()
    keep, pattern = mask_files.load_masks(files["masks.safetensors"])
    name = "model.layers.1.mlp.up_proj"
    keep[name] = ~keep[name]
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
