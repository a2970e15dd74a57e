"""The mask-aware GPTQ against a naive one in double precision, against round-to-nearest, and through saved folders."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from gptqmodel.looper.named_module import NamedModule
from safetensors.torch import load_file
from torch import nn

from tasks import checkpoint, quantised
from tasks import gptq as stage_module
from tasks.algorithms import families, masked_gptq, masks
from tasks.algorithms.errors import InputError

NAME = "model.layers.0.mlp.up_proj"
SETTINGS = {"bits": 4, "group_size": 32, "symmetric": True, "damp": 0.05, "act_order": False}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_of_four(weight):
    groups = weight.abs().reshape(len(weight), -1, 4)
    best = groups.topk(2, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).reshape(weight.shape)


def inputs(columns, tokens=512, seed=1):
    """Correlated inputs of very different sizes, as in a trained model."""
    return normal(tokens, columns, seed=seed) @ normal(columns, columns, seed=seed + 1) * normal(columns, seed=9).exp()


def library_gptq(weight, x, keep=None, blocksize=128, **changed):
    """(quantised weight, scales, zeros, relative error) of gptqmodel's GPTQ on one matrix, led by this project."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    with (
        masked_gptq.contained(),
        masked_gptq.keeping_masks({} if keep is None else {NAME: keep}) as results,
    ):
        gptq = masked_gptq._gptq.GPTQ(
            NamedModule(linear, "mlp.up_proj", NAME, 0), masked_gptq.config(**(SETTINGS | changed))
        )
        gptq.quantizer.configure(perchannel=True)
        gptq.add_batch(x, None)
        answer = gptq.quantize(blocksize=blocksize)
    return answer[0], answer[1], answer[2], results[NAME].error


def scale_and_zero(group, bits, symmetric):
    """[rows], [rows] of one group of columns, by the definition of the grid."""
    top = 2**bits - 1
    low, high = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    low, high = torch.where(empty, -torch.ones_like(low), low), torch.where(empty, torch.ones_like(high), high)
    scale = (high - low) / top
    return scale, torch.full_like(scale, (top + 1) / 2) if symmetric else torch.round(-low / scale)


def naive_gptq(weight, x, keep, bits, group_size, symmetric, damp, act_order):
    """Optimal brain quantisation in a fixed order, column by column, with the inverse Hessian updated by elimination.

    Double precision, no Cholesky, no blocks. Only for up to 128 inputs: there, gptqmodel takes all scales from the
    weights as they were given.
    """
    weight, x = weight.double(), x.double()
    rows, columns = weight.shape
    assert columns <= 128
    hessian = 2 * x.T @ x / len(x)
    order = torch.arange(columns)
    if act_order:
        order = hessian.diagonal().float().argsort(descending=True)
    weight, keep, hessian = weight[:, order], keep[:, order], hessian[order][:, order]
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    given, work, answer = weight.clone(), weight.clone(), torch.zeros_like(weight)
    size = columns if group_size == -1 else group_size
    for i in range(columns):
        if i % size == 0:
            scale, zero = scale_and_zero((given * keep)[:, i : i + size], bits, symmetric)
        code = (torch.round(work[:, i] / scale) + zero).clamp(0, 2**bits - 1)
        answer[:, i] = (code - zero) * scale * keep[:, i]
        error = (work[:, i] - answer[:, i]) / inverse[i, i]
        work -= error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return answer[:, order.argsort()]


CASES = [
    {},
    {"symmetric": False},
    {"act_order": True},
    {"group_size": -1},
    {"group_size": -1, "act_order": True},
    {"group_size": 16},
    {"group_size": 128},
    {"bits": 2},
    {"bits": 2, "symmetric": False, "act_order": True},
    {"bits": 3},
    {"bits": 8, "group_size": 64},
]


@pytest.mark.parametrize("changed", CASES, ids=str)
@pytest.mark.parametrize("pruned", [False, True])
def test_equals_a_naive_gptq_in_double_precision(changed, pruned):
    settings = SETTINGS | changed
    x = inputs(128)
    weight = normal(24, 128, seed=3)
    keep = two_of_four(weight) if pruned else torch.ones_like(weight, dtype=torch.bool)
    weight = weight * keep
    found = library_gptq(weight, x, keep, **changed)[0]
    expected = naive_gptq(weight, x, keep, **settings)
    # A value half way between two codes can fall either way in float32, and then changes what follows in its row.
    rows = ((found - expected).abs().amax(dim=1) < 1e-3 * expected.abs().max()).double().mean()
    assert rows > 0.85
    lost = [float(((weight - q.to(weight.dtype)) @ x.T).norm()) for q in (found, expected)]
    assert lost[0] == pytest.approx(lost[1], rel=0.02)
    assert found[~keep].count_nonzero() == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pruned", [False, True])
def test_unit_inputs_give_round_to_nearest_exactly(symmetric, pruned):
    weight = normal(16, 64)
    keep = two_of_four(weight) if pruned else torch.ones_like(weight, dtype=torch.bool)
    weight = weight * keep
    found = library_gptq(weight, torch.eye(64), keep, symmetric=symmetric)[0]
    expected = torch.cat(
        [
            (torch.round(group / scale[:, None]) + zero[:, None]).clamp(0, 15).sub(zero[:, None]) * scale[:, None]
            for group in weight.split(32, dim=1)
            for scale, zero in [scale_and_zero(group, 4, symmetric)]
        ],
        dim=1,
    )
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_values_are_on_the_grid_pruned_ones_zero_and_the_error_below_round_to_nearest(bits, symmetric, act_order):
    x, weight = inputs(192), normal(32, 192, seed=5)
    keep = two_of_four(weight)
    weight = weight * keep
    settings = {"bits": bits, "symmetric": symmetric, "act_order": act_order, "group_size": 64}
    found, scales, zeros, error = library_gptq(weight, x, keep, **settings)
    assert found[~keep].count_nonzero() == 0
    assert torch.equal(zeros, zeros.round())
    assert zeros.min() >= 0 and zeros.max() <= 2**bits - 1
    codes = found[:, :, None] / scales[:, None, :]  # [rows, columns, groups]: one of the row's grids must fit
    distance = (codes - codes.round()).abs() + (codes.abs() > 2**bits).float()
    assert distance.amin(dim=-1).max() < 1e-3
    _, _, _, nearest = library_gptq(weight, torch.eye(192), keep, **(settings | {"act_order": False}))
    rounded = library_gptq(weight, torch.eye(192), keep, **(settings | {"act_order": False}))[0]
    assert nearest > 0
    assert error <= masked_gptq.relative_error(weight - rounded, weight, x.T @ x)
    assert error == pytest.approx(float(((weight - found) @ x.T).norm() / (weight @ x.T).norm()), rel=1e-3)


@pytest.mark.parametrize("pruned", [False, True])
def test_block_size_1_equals_block_size_128(pruned):
    x, weight = inputs(160), normal(16, 160, seed=6)
    keep = two_of_four(weight) if pruned else torch.ones_like(weight, dtype=torch.bool)
    one, many = (library_gptq(weight * keep, x, keep, blocksize=size, group_size=-1)[0] for size in (1, 128))
    assert ((one - many).abs().amax(dim=1) < 1e-4).float().mean() > 0.85  # a tie can fall either way


def test_without_the_lead_the_masks_break():
    weight = normal(32, 64, seed=7)
    keep = two_of_four(weight)
    weight = weight * keep
    plain = library_gptq(weight, inputs(64), bits=8)[0]
    assert masks.violations(plain, 2, 4) > 0
    led = library_gptq(weight, inputs(64), keep, bits=8)[0]
    assert masks.violations(led, 2, 4) == 0


def test_a_symmetric_group_without_negative_weights_keeps_its_largest():
    weight = normal(8, 64).abs() + 0.1
    found = library_gptq(weight, torch.eye(64))[0]
    assert (found - weight).abs().max() < 0.6 * 2 * weight.max() / 15  # its range ends half a step below it


def test_the_library_is_put_back():
    gptq, linear = masked_gptq._gptq.GPTQ, masked_gptq._torch_linear.TorchLinear
    before = gptq.quantize, gptq.create_quantizer, list(linear.SUPPORTS_DTYPES), masked_gptq._torch_linear.torch_compile
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), torch.get_num_threads()
    with (
        pytest.raises(KeyError),
        masked_gptq.loading_in_float32(),
        masked_gptq.keeping_masks({}),
    ):
        assert gptq.quantize is not before[0]
        random.random(), np.random.rand(), torch.rand(1), torch.set_num_threads(2)
        raise KeyError
    assert before[:2] == (gptq.quantize, gptq.create_quantizer)
    assert before[2:] == (linear.SUPPORTS_DTYPES, masked_gptq._torch_linear.torch_compile)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2]) and torch.get_num_threads() == states[3]


def test_masks_that_do_not_fit_are_refused():
    weight = normal(8, 32)
    with pytest.raises(InputError, match=r"\d+ pruned weights of .* are not zero"):
        library_gptq(weight, inputs(32), two_of_four(weight))
    with pytest.raises(InputError, match="mask of .* is .* its weight"):
        library_gptq(weight, inputs(32), torch.ones(8, 16, dtype=torch.bool))


def test_a_hessian_that_can_not_be_inverted_is_no_silent_rounding():
    x = inputs(32)
    x[0, 0] = float("nan")
    with pytest.raises(InputError, match="raise gptq.damp"):
        library_gptq(normal(8, 32), x)


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "message"),
    [
        ((64, 96), 4, 64, "96 inputs, not divisible by gptq.group_size = 64"),
        ((64, 40), 3, -1, "40 inputs, not divisible by 32"),
        ((20, 64), 2, -1, "20 outputs, not divisible by 16"),
    ],
)
def test_shapes_that_do_not_pack_are_refused(shape, bits, group_size, message):
    with pytest.raises(InputError, match=message):
        masked_gptq.check_shapes({NAME: shape}, bits, group_size)


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    """The inputs of the stage: a 2:4 pruned model, its masks, windows."""
    folder = tmp_path_factory.mktemp("gptq")
    dense = folder / "lora/model"
    model = checkpoint.load_dense(tiny_llama(dense))
    keep = {}
    for name, linear in families.block_linears(model).items():
        keep[name] = two_of_four(linear.weight.detach())
        linear.weight.data *= keep[name]
    checkpoint.save_dense(model, checkpoint.load_tokenizer(dense), dense)
    checkpoint.save_masks(folder / "masks.safetensors", keep, "2:4")
    windows = torch.randint(0, 257, (6, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    checkpoint.save_tensors(folder / "windows.safetensors", {"input_ids": windows}, {})
    files = {name: folder / name for name in ("lora/model", "masks.safetensors", "windows.safetensors")}
    return SimpleNamespace(files=files, keep=keep, windows=windows, model=model)


@pytest.fixture
def run(make_stage, pruned, tmp_path, monkeypatch):
    """run(out, **settings) -> the stage's output folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def run(out="out", **changed):
        stage_module.run(make_stage({"gptq": SETTINGS | changed}, pruned.files, out=out))
        return tmp_path / out

    return run


def test_the_stage_keeps_masks_and_stock_gptqmodel_loads_its_folder(run, pruned, tmp_path):
    folder = run()
    rows = pd.read_csv(folder / "layers.csv")
    assert list(rows["linear"]) == list(pruned.keep)
    assert (rows["violations"] == 0).all() and (rows["error"].between(0.001, 0.5)).all()
    written, given = ({path.name for path in of.iterdir()} for of in (folder / "model", pruned.files["lora/model"]))
    assert written == given | {"quantize_config.json"}
    assert list((tmp_path / "elsewhere").iterdir()) == []  # no logs
    library = masked_gptq.gptqmodel
    stock = library.GPTQModel.load(str(folder / "model"), backend=library.BACKEND.GPTQ_TORCH, device="cpu").model
    for (name, linear), zeros in zip(masked_gptq.quantised_linears(stock).items(), rows["zeros"], strict=True):
        weight = masked_gptq.dequantised(linear)
        assert weight[~pruned.keep[name]].count_nonzero() == 0
        assert int((weight == 0).sum()) == zeros
    tensors = load_file(folder / "model/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16, torch.int32}
    assert torch.equal(tensors["model.embed_tokens.weight"], pruned.model.model.embed_tokens.weight.half())


def test_the_loaded_model_computes_in_float32_and_generates(run, pruned):
    folder = run(bits=8) / "model"
    ids = pruned.windows[:2].long()
    loaded, plain = quantised.load_model(folder), quantised.load_dequantised(folder)
    assert not masked_gptq.quantised_linears(plain)
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


@pytest.mark.parametrize("shape", [(6, 10), (2, 129)])
def test_windows_that_gptqmodel_would_drop_or_cut_are_refused(run, pruned, monkeypatch, tmp_path, shape):
    path = tmp_path / "windows.safetensors"
    checkpoint.save_tensors(path, {"input_ids": torch.ones(shape, dtype=torch.int32)}, {})
    monkeypatch.setitem(pruned.files, "windows.safetensors", path)
    with pytest.raises(InputError, match=f"calibrate.length = {shape[1]}, .* choose 11 to 128"):
        run()


def test_every_calibration_token_counts_once_in_the_given_order(pruned):
    model = quantised.load_for_quantisation(pruned.files["lora/model"], masked_gptq.config(**SETTINGS))
    seen = []
    model.model.model.embed_tokens.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    masked_gptq.quantise(model, pruned.windows, pruned.keep)
    assert torch.equal(torch.cat(seen), pruned.windows.long())
    assert {row["samples"] for row in model.quant_log} == {str(pruned.windows.numel())}


def test_skip_passes_the_dense_model_on(make_stage, pruned, tmp_path):
    stage_module.skip(make_stage({"gptq": SETTINGS}, pruned.files))
    for path in pruned.files["lora/model"].iterdir():
        assert (tmp_path / "out/model" / path.name).read_bytes() == path.read_bytes()
    assert list(pd.read_csv(tmp_path / "out/layers.csv").columns) == stage_module.COLUMNS


def test_a_broken_mask_ends_the_stage():
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 3, 0, 0]])
    keep = weight != 0
    result = {NAME: masked_gptq.LayerResult(0.1, 0.05)}
    assert stage_module.table({NAME: weight}, {NAME: keep}, "2:4", result)["zeros"].tolist() == [5]
    weight[0, 1] = 0.5
    assert stage_module.violations(weight, keep, "2:4") == 2  # one pruned weight, one group
    assert stage_module.violations(weight, keep, "unstructured") == 1
    with pytest.raises(RuntimeError, match="2 violations"):
        stage_module.table({NAME: weight}, {NAME: keep}, "2:4", result)
    with pytest.raises(InputError, match="pattern is 'x'"):
        stage_module.violations(weight, keep, "x")
