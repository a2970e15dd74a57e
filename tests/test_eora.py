"""EoRA against its closed forms, and the adapter through saved folders."""

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tasks import checkpoint, gptq, quantised
from tasks import eora as stage_module
from tasks.algorithms import eora, families, masked_gptq
from tasks.algorithms.errors import InputError


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
    branches = eora.compensate(student, windows, wanted, 16, dtype=torch.float32)
    assert list(branches) == list(wanted)
    # At full rank of the smaller sides everything is restored, so that later inputs are the teacher's.
    small = [name for name in wanted if min(wanted[name].shape) == 16]
    assert small and all(branches[name].error_after < 1e-4 for name in small)
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
    lost = left + branch.b @ branch.a
    assert branch.error_before == pytest.approx(float((x @ lost.double().T).norm() / whole), rel=1e-3)
    assert branch.error_after < branch.error_before


SETTINGS = {"bits": 2, "group_size": 32, "symmetric": False, "damp": 0.05, "act_order": False}


@pytest.fixture(scope="module")
def files(tiny_llama, tmp_path_factory):
    """A fetched model of four blocks, the recovered one of three of them, and the quantised one, without DVC."""
    folder = tmp_path_factory.mktemp("eora")
    recovered = checkpoint.load_dense(tiny_llama(folder / "fetch/model"))
    tokenizer = checkpoint.load_tokenizer(folder / "fetch/model")
    del recovered.model.layers[1]
    recovered.config.num_hidden_layers = 3
    if getattr(recovered.config, "layer_types", None):
        recovered.config.layer_types = recovered.config.layer_types[:3]
    for linear in families.block_linears(recovered).values():
        linear.weight.data += 0.02 * normal(*linear.weight.shape, seed=4)
    checkpoint.save_dense(recovered, tokenizer, folder / "lora/model")
    windows = torch.randint(0, 257, (6, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    checkpoint.save_tensors(folder / "windows.safetensors", {"input_ids": windows}, {})
    (folder / "removed.json").write_text('{"kept": [0, 2, 3]}')
    model = quantised.load_for_quantisation(folder / "lora/model", masked_gptq.config(**SETTINGS))
    masked_gptq.quantise(model, windows, {})
    quantised.save_quantised(model, folder / "lora/model", folder / "gptq/model")
    names = ("gptq/model", "lora/model", "fetch/model", "removed.json", "windows.safetensors")
    return {name: folder / name for name in names}


@pytest.fixture
def run(make_stage, files, tmp_path):
    def run(rank=8, teacher="lora", out="out"):
        stage_module.run(make_stage({"eora": {"rank": rank, "teacher": teacher}}, files, out=out))
        return tmp_path / out

    return run


@pytest.mark.parametrize("teacher", ["lora", "fetch"])
def test_the_stage_brings_the_model_closer_to_its_teacher_and_gptqmodel_loads_it(run, files, teacher):
    folder = run(rank=16, teacher=teacher)
    rows = pd.read_csv(folder / "layers.csv")
    assert len(rows) == 21 and (rows["rank"] == 16).all()
    assert (rows["error_after"] < rows["error_before"]).all()
    stored = load_file(folder / "model/eora/adapter_model.safetensors")
    assert rows["bytes"].sum() == sum(tensor.nbytes for tensor in stored.values())
    wanted = checkpoint.load_dense(files["lora/model"])
    if teacher == "fetch":
        fetched = checkpoint.load_dense(files["fetch/model"])
        for name, linear in families.block_linears(wanted).items():
            place = int(name.split(".")[2])
            linear.weight.data = fetched.get_submodule(name.replace(f".{place}.", f".{[0, 2, 3][place]}.", 1)).weight
    ids = load_file(files["windows.safetensors"])["input_ids"].long()
    with torch.no_grad():
        target = wanted(input_ids=ids).logits
        before, after = (
            float((quantised.load_model(path)(input_ids=ids).logits - target).norm())
            for path in (files["gptq/model"], folder / "model")
        )
    assert after < 0.8 * before


def test_the_loaded_adapter_is_the_branch_that_was_computed(run, files):
    folder = run(rank=4) / "model"
    for path in files["gptq/model"].iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    merged = quantised.load_dequantised(folder)
    stored = load_file(folder / "eora/adapter_model.safetensors")
    for name, linear in families.block_linears(merged).items():
        a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
        assert a.shape == (4, linear.in_features) and b.shape == (linear.out_features, 4)
        linear.weight.data += b @ a
    ids = load_file(files["windows.safetensors"])["input_ids"].long()
    model = quantised.load_model(folder)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-3)
    assert model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False).shape == (1, 9)
    library = masked_gptq.gptqmodel
    stock = library.GPTQModel.load(  # as a user would, in the library's own precision
        str(folder),
        backend=library.BACKEND.GPTQ_TORCH,
        device="cpu",
        adapter={"name": "lora", "path": str(folder / "eora"), "rank": 4},
    ).model
    for name, linear in masked_gptq.quantised_linears(stock).items():
        assert torch.equal(linear.adapter.lora_A.T.half(), stored[f"base_model.model.{name}.lora_A.weight"])


def test_two_runs_write_the_same_bytes(run):
    first, second = run(out="first"), run(out="second")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) > 6
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    assert str(first.parent) not in (first / "model/eora/adapter_config.json").read_text()


def test_a_record_of_other_blocks_is_refused(run, files, tmp_path, monkeypatch):
    for kept in ("[0, 2]", "[0, 2, 4]"):
        (tmp_path / "other.json").write_text(f'{{"kept": {kept}}}')
        monkeypatch.setitem(files, "removed.json", tmp_path / "other.json")
        with pytest.raises(InputError, match="run stage depth_prune again"):
            run(teacher="fetch")
    with pytest.raises(InputError, match="above 32"):
        run(rank=33)


def test_skip_passes_the_quantised_model_on(make_stage, files, tmp_path):
    stage_module.skip(make_stage({"eora": {}}, files))
    for path in files["gptq/model"].iterdir():
        assert (tmp_path / "out/model" / path.name).read_bytes() == path.read_bytes()
    assert list(pd.read_csv(tmp_path / "out/layers.csv").columns) == stage_module.COLUMNS
    assert gptq.COLUMNS != stage_module.COLUMNS
