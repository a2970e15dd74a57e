"""The mask-aware GPTQ against a naive one in double precision, against round-to-nearest, and through saved folders."""

import gc
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from gptqmodel.looper.named_module import NamedModule
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tasks import gptq as stage_module
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, masks
from tasks.algorithms.quantisation import gptqmodel_library as library
from tasks.algorithms.quantisation import masked_gptq, masked_grid, output_error, rounding, unpacking
from tasks.compression import block_quantisation
from tasks.models import dense_folder, gptq_folder, mask_files, sparsity_ledger, tensor_files
from tasks.parameters import schema

NAME = "model.layers.0.mlp.up_proj"
SETTINGS = {"bits": 4, "group_size": 32, "symmetric": True, "damp": 0.05, "act_order": "none", "mse": 0.0}
ORDERS = ["none", "descending", "group_aware"]


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """gptqmodel collects garbage several times per model: without a look at every object of torch, it takes no time."""
    gc.freeze()
    yield
    gc.unfreeze()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_of_four(weight):
    groups = weight.abs().reshape(len(weight), -1, 4)
    best = groups.topk(2, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).reshape(weight.shape)


def inputs(columns, tokens=512, seed=1):
    """Correlated inputs of very different sizes, as in a trained model."""
    return normal(tokens, columns, seed=seed) @ normal(columns, columns, seed=seed + 1) * normal(columns, seed=9).exp()


def library_gptq(weight, x, keep=None, blocksize=128, scale_steps=None, joint=None, **changed):
    """(quantised weight, scales, zeros, result) of gptqmodel's GPTQ on one matrix, led by this project."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    settings = masked_gptq.Settings(scale_steps=scale_steps, joint=joint)
    with (
        library.contained(),
        masked_gptq.MaskedGptq({} if keep is None else {NAME: keep}, settings).in_place() as results,
    ):
        gptq = library.gptq.GPTQ(
            NamedModule(linear, "mlp.up_proj", NAME, 0), masked_gptq.config(**(SETTINGS | changed))
        )
        gptq.quantizer.configure(perchannel=True)
        gptq.add_batch(x, None)
        answer = gptq.quantize(blocksize=blocksize)
    return answer[0], answer[1], answer[2], results[NAME]


def as_stored(scale, steps):
    """float64 of the float16 that a file would hold; by numpy, one value at a time."""
    if steps:
        scale = [2.0 ** (round(math.log2(value) * steps) / steps) for value in scale.tolist()]
    return torch.from_numpy(np.asarray(scale, dtype=np.float64).astype(np.float16).astype(np.float64))


def scale_and_zero(group, bits, symmetric, mse=0.0, scale_steps=None):
    """[rows], [rows] of one group of columns, by the definition of the grid."""
    top = 2**bits - 1
    low, high = group.amin(dim=1).clamp(max=0), group.amax(dim=1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    low, high = torch.where(empty, -torch.ones_like(low), low), torch.where(empty, torch.ones_like(high), high)
    best, found, zero = (torch.full_like(low, value) for value in (math.inf, math.nan, math.nan))
    for shrink in [1 - i / 100 for i in range(80)] if mse else [1.0]:
        tried = shrink * (high - low) / top
        nearest = torch.full_like(tried, (top + 1) / 2) if symmetric else torch.round(-shrink * low / tried)
        middles = [nearest]
        if mse and bits == 2 and not symmetric:  # gptqmodel tries both neighbours of the ideal zero point there
            middles.append(torch.floor(-low * top / (high - low)) * 2 + 1 - nearest)
        for middle in middles:
            code = (torch.round(group / tried[:, None]) + middle[:, None]).clamp(0, top)
            error = ((code - middle[:, None]) * tried[:, None] - group).abs().pow(mse or 2).sum(dim=1)
            found, zero = torch.where(error < best, tried, found), torch.where(error < best, middle, zero)
            best = torch.minimum(error, best)
    scale = as_stored(found, scale_steps)
    return scale, zero if symmetric else torch.round(zero * found / scale).clamp(0, top)


def visiting_order(diagonal, act_order, size):
    """By hand: sorted, or groups sorted by their largest, each sorted within."""
    if act_order == "none":
        return torch.arange(len(diagonal))
    values = diagonal.tolist()
    if act_order == "descending":
        return torch.tensor(sorted(range(len(values)), key=lambda i: -values[i]))
    groups = [sorted(range(i, i + size), key=lambda i: -values[i]) for i in range(0, len(values), size)]
    return torch.tensor(sum(sorted(groups, key=lambda group: -values[group[0]]), []))


def naive_gptq(weight, x, keep, bits, group_size, symmetric, damp, act_order, mse, scale_steps=None):
    """Optimal brain quantisation in a fixed order, column by column, with the inverse Hessian updated by elimination.

    Double precision, no Cholesky, no blocks. Only for up to 128 inputs: there, gptqmodel takes all scales from the
    weights as they were given.
    """
    weight, x = weight.double(), x.double()
    rows, columns = weight.shape
    assert columns <= 128
    hessian = 2 * x.T @ x / len(x)
    order = visiting_order(hessian.diagonal().float(), act_order, group_size)
    weight, keep, hessian = weight[:, order], keep[:, order], hessian[order][:, order]
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    given, work, answer = weight.clone(), weight.clone(), torch.zeros_like(weight)
    size = columns if group_size == -1 else group_size
    for i in range(columns):
        if i % size == 0:
            scale, zero = scale_and_zero((given * keep)[:, i : i + size], bits, symmetric, mse, scale_steps)
        code = (torch.round(work[:, i] / scale) + zero).clamp(0, 2**bits - 1)
        answer[:, i] = (code - zero) * scale * keep[:, i]
        error = (work[:, i] - answer[:, i]) / inverse[i, i]
        work -= error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return answer[:, order.argsort()]


CASES = [
    {},
    {"symmetric": False},
    {"act_order": "descending"},
    {"act_order": "group_aware"},
    {"group_size": -1},
    {"group_size": -1, "act_order": "descending"},
    {"group_size": 16, "act_order": "group_aware", "symmetric": False},
    {"group_size": 128},
    {"bits": 2},
    {"bits": 2, "symmetric": False, "act_order": "descending"},
    {"bits": 3},
    {"bits": 8, "group_size": 64},
    {"mse": 2.4},
    {"mse": 2.0, "bits": 3, "symmetric": False},
    {"scale_steps": 8},
    {"scale_steps": 2, "symmetric": False},
    {"scale_steps": 4, "bits": 3, "mse": 2.4, "act_order": "group_aware"},
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
    expected = rounded_to_nearest(weight, 4, symmetric)
    assert torch.allclose(found.double(), expected, atol=1e-6)


def rounded_to_nearest(weight, bits, symmetric, mse=0.0, scale_steps=None, group_size=32):
    return torch.cat(
        [
            (torch.round(group / scale[:, None]) + zero[:, None]).clamp(0, 2**bits - 1).sub(zero[:, None])
            * scale[:, None]
            for group in weight.double().split(group_size, dim=1)
            for scale, zero in [scale_and_zero(group, bits, symmetric, mse, scale_steps)]
        ],
        dim=1,
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("mse", "steps"), [(0.0, None), (2.0, None), (0.0, 4)])
def test_nearest_is_the_same_grid_without_a_hessian(bits, symmetric, mse, steps):
    weight = normal(8, 64)
    keep = two_of_four(weight)
    weight = weight * keep
    settings = masked_gptq.config(**SETTINGS | {"symmetric": symmetric, "mse": mse, "bits": 8})
    found = masked_grid.nearest(weight, keep, settings, bits, steps)
    assert torch.allclose(found.double(), rounded_to_nearest(weight, bits, symmetric, mse, steps), atol=1e-6)
    assert settings.bits == 8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_scales_are_the_snapped_ones_and_gptq_makes_up_for_it(symmetric, steps):
    x, weight = inputs(64), normal(32, 64, seed=4)
    found, scales, zeros, result = library_gptq(weight, x, scale_steps=steps, symmetric=symmetric)
    exponents = scales.double().log2() * steps
    assert torch.allclose(exponents, exponents.round(), atol=steps * 1e-3)
    assert torch.equal(scales, rounding.snap(scales, steps).float())
    codes = found.reshape(32, 2, 32) / scales[:, :, None]
    assert torch.equal(codes, codes.round())
    free = library_gptq(weight, x, symmetric=symmetric)
    late = (torch.round(free[0].reshape(32, 2, 32) / free[1][:, :, None]) * scales[:, :, None]).reshape(32, 64)
    assert result.error < output_error.relative_error(weight - late, weight, x.T @ x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_of_scales_ignores_pruned_weights_and_lowers_the_error(symmetric):
    weight, x = normal(32, 64, seed=4) ** 3, torch.eye(64)
    keep = two_of_four(weight)
    dense = weight.clone()
    dense[~keep] = 0
    plain, searched = (library_gptq(dense, x, keep, symmetric=symmetric, bits=3, mse=mse) for mse in (0.0, 2.0))
    assert searched[3].error < 0.99 * plain[3].error
    packed = dense[keep].reshape(32, 32)  # the same kept weights without the pruned ones between them
    alone = library_gptq(packed, torch.eye(32), symmetric=symmetric, bits=3, mse=2.0, group_size=16)
    assert torch.equal(searched[1], alone[1]) and torch.equal(searched[2], alone[2])


def test_scales_too_small_for_float16_are_its_smallest():
    weight = normal(4, 64) * 1e-9
    found, scales = library_gptq(weight, torch.eye(64))[:2]
    assert scales.min() == 2.0**-24
    assert found.isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", ORDERS)
def test_values_are_on_the_grid_pruned_ones_zero_and_the_error_below_round_to_nearest(bits, symmetric, act_order):
    x, weight = inputs(192), normal(32, 192, seed=5)
    keep = two_of_four(weight)
    weight = weight * keep
    settings = {"bits": bits, "symmetric": symmetric, "act_order": act_order, "group_size": 64}
    found, scales, zeros, result = library_gptq(weight, x, keep, **settings)
    error = result.error
    assert found[~keep].count_nonzero() == 0
    assert torch.equal(zeros, zeros.round())
    assert zeros.min() >= 0 and zeros.max() <= 2**bits - 1
    codes = found[:, :, None] / scales[:, None, :]  # [rows, columns, groups]: one of the row's grids must fit
    distance = (codes - codes.round()).abs() + (codes.abs() > 2**bits).float()
    assert distance.amin(dim=-1).max() < 1e-3
    rounded, _, _, nearest = library_gptq(weight, torch.eye(192), keep, **(settings | {"act_order": "none"}))
    assert nearest.error > 0
    assert error <= output_error.relative_error(weight - rounded, weight, x.T @ x)
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
    gptq, linear = library.gptq.GPTQ, library.torch_linear.TorchLinear
    before = gptq.quantize, gptq.create_quantizer, list(linear.SUPPORTS_DTYPES), library.torch_linear.torch_compile
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), torch.get_num_threads()
    with (
        pytest.raises(KeyError),
        library.loading_in_float32(),
        masked_gptq.MaskedGptq({}).in_place(),
    ):
        assert gptq.quantize is not before[0]
        random.random(), np.random.rand(), torch.rand(1), torch.set_num_threads(2)
        raise KeyError
    assert before[:2] == (gptq.quantize, gptq.create_quantizer)
    assert before[2:] == (linear.SUPPORTS_DTYPES, library.torch_linear.torch_compile)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2]) and torch.get_num_threads() == states[3]


@pytest.mark.parametrize("columns", [64, 256, 512])
def test_the_number_of_threads_does_not_change_the_inverse_factor(columns):
    x = inputs(columns)
    gptq = SimpleNamespace(qcfg=masked_gptq.config(**SETTINGS), name=NAME)
    factors, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with masked_gptq.MaskedGptq({}).in_place():
                factors.append(library.gptq.GPTQ.hessian_inverse(gptq, x.T @ x)[0])
    finally:
        torch.set_num_threads(before)
    assert factors[0].dtype == torch.float32
    assert torch.equal(factors[0], factors[1]) and torch.equal(factors[0], factors[2])


def test_masks_that_do_not_fit_are_refused():
    weight = normal(8, 32)
    with pytest.raises(InputError, match=r"\d+ pruned weights of .* are not zero"):
        library_gptq(weight, inputs(32), two_of_four(weight))
    with pytest.raises(InputError, match="mask of .* is .* its weight"):
        library_gptq(weight, inputs(32), torch.ones(8, 16, dtype=torch.bool))


@pytest.mark.parametrize("joint", [None, (2, 4)])
def test_a_hessian_that_can_not_be_inverted_is_no_silent_rounding(joint):
    x = inputs(32)
    x[0, 0] = float("nan")
    with pytest.raises(InputError, match="raise gptq.damp"):
        library_gptq(normal(8, 32), x, joint=joint)


@pytest.mark.parametrize("act_order", ORDERS)
def test_widths_of_single_linears_are_asked_for_by_their_whole_names(act_order):
    names = [f"model.layers.{i}.mlp.up_proj" for i in (1, 10, 11)]
    widths = dict(zip(names, (4, 2, 4), strict=True))
    config = masked_gptq.config(**SETTINGS | {"bits": widths, "act_order": act_order})
    assert config.bits == 4
    assert [config.dynamic_get(name, "bits", config.bits) for name in names] == [4, 2, 4]
    assert config.dynamic_get("model.layers.10.mlp.up_project", "bits", 0) == 0
    assert config.dynamic_get("a.model.layers.10.mlp.up_proj", "bits", 0) == 0
    assert config.act_group_aware is (act_order == "group_aware")


def test_equal_widths_need_no_overrides():
    config = masked_gptq.config(**SETTINGS | {"bits": {NAME: 3}})
    assert config.bits == 3 and not config.dynamic


def test_group_aware_without_groups_is_refused():
    with pytest.raises(InputError, match="group_size = -1"):
        masked_gptq.config(**SETTINGS | {"act_order": "group_aware", "group_size": -1})


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    """The inputs of the stage: a 2:4 pruned model, its masks, windows."""
    return inputs_of_the_stage(tmp_path_factory.mktemp("gptq"), tiny_llama)


def inputs_of_the_stage(folder, tiny_llama, prune=True, tied=True):
    dense = folder / "lora/model"
    model = dense_folder.load_dense(tiny_llama(dense))
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(normal(*model.lm_head.weight.shape, seed=8) * 0.2)
    keep = {}
    for name, linear in families.block_linears(model).items():
        keep[name] = two_of_four(linear.weight.detach()) if prune else torch.ones_like(linear.weight, dtype=torch.bool)
        linear.weight.data *= keep[name]
    dense_folder.save_dense(model, dense_folder.load_tokenizer(dense), dense)
    mask_files.save_masks(folder / "masks.safetensors", keep if prune else {}, "2:4" if prune else "dense")
    windows = torch.randint(0, 257, (6, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tensor_files.save_tensors(folder / "windows.safetensors", {"input_ids": windows}, {})
    files = {name: folder / name for name in ("lora/model", "masks.safetensors", "windows.safetensors")}
    return SimpleNamespace(files=files, keep=keep, windows=windows, model=model)


@pytest.fixture(scope="module")
def unpruned(tiny_llama, tmp_path_factory):
    return inputs_of_the_stage(tmp_path_factory.mktemp("dense"), tiny_llama, prune=False)


@pytest.fixture(scope="module")
def untied(tiny_llama, tmp_path_factory):
    return inputs_of_the_stage(tmp_path_factory.mktemp("untied"), tiny_llama, tied=False)


STAGE = SETTINGS | {
    "enabled": True,
    "budget_bytes": None,
    "scale_steps": None,
    "descent_cycles": 0,
    "masked": True,
    "joint": None,
    "embedding": {"bits": 16, "group_size": 32, "method": "nearest"},
}


def sections(enforce=True, **changed):
    return {"gptq": schema.Gptq(**STAGE | changed), "wanda": {"enforce": enforce}}


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
    loaded, plain = gptq_folder.load_model(folder), gptq_folder.load_dequantised(folder)
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


@pytest.mark.parametrize("shape", [(6, 10), (2, 129)])
def test_windows_that_gptqmodel_would_drop_or_cut_are_refused(run, pruned, monkeypatch, tmp_path, shape):
    path = tmp_path / "windows.safetensors"
    tensor_files.save_tensors(path, {"input_ids": torch.ones(shape, dtype=torch.int32)}, {})
    monkeypatch.setitem(pruned.files, "windows.safetensors", path)
    with pytest.raises(InputError, match=f"calibrate.length = {shape[1]}, .* choose 11 to 128"):
        run()


def test_every_calibration_token_counts_once_in_the_given_order(pruned):
    model = gptq_folder.load_for_quantisation(pruned.files["lora/model"], masked_gptq.config(**SETTINGS))
    seen = []
    model.model.model.embed_tokens.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    masked_gptq.quantise(model, pruned.windows, pruned.keep)
    assert torch.equal(torch.cat(seen), pruned.windows.long())
    assert {row["samples"] for row in model.quant_log} == {str(pruned.windows.numel())}


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


def test_the_saved_weights_are_those_that_gptq_computed_with(pruned, tmp_path):
    model = gptq_folder.load_for_quantisation(pruned.files["lora/model"], masked_gptq.config(**SETTINGS | {"bits": 3}))
    solved = {}
    solve = library.gptq.GPTQ.quantize

    def spy(self, blocksize=128):
        answer = solve(self, blocksize)
        solved[self._named_module.full_name] = answer[0].clone()
        return answer

    with library.patched(library.gptq.GPTQ, "quantize", spy):
        masked_gptq.quantise(model, pruned.windows, pruned.keep)
    gptq_folder.save_quantised(model, pruned.files["lora/model"], tmp_path / "out/model")
    for name, weight in stored_weights(tmp_path / "out").items():
        assert torch.equal(weight, solved[name]), name


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
            block_quantisation.linear_bytes(mask.float(), mask, "2:4", bits, chosen) for mask in pruned.keep.values()
        )
        for bits in (2, 3, 4)
    }
    budget = (at[3] + at[4]) // 2
    folder = run(budget_bytes=budget)
    rows = pd.read_csv(folder / "layers.csv")
    widths = dict(zip(rows["linear"], rows["bits"], strict=True))
    assert len(set(widths.values())) > 1
    spent = sum(
        block_quantisation.linear_bytes(mask.float(), mask, "2:4", widths[name], chosen)
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


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "dense"])
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, "none"), (False, "descending")])
def test_bytes_of_a_linear(pattern, symmetric, act_order):
    weight = normal(8, 64)
    keep = None if pattern == "dense" else two_of_four(weight)
    chosen = sections(symmetric=symmetric, act_order=act_order)["gptq"]
    found = block_quantisation.linear_bytes(weight, keep, pattern, 4, chosen)
    # 12 cases of 6 fit 4 bytes, 8 remain; 512 weights of 512 or 256; 16 groups; 64 inputs in one of two groups
    positions = {"2:4": 10 * 4 + 3, "unstructured": math.log2(math.comb(512, 256)) / 8, "dense": 0}[pattern]
    codes = (512 if keep is None else 256) * 4 / 8
    assert found == math.ceil(positions) + codes + 16 * 2 + (0 if symmetric else 16 * 4 / 8 + 64 / 8)


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
    loaded = gptq_folder.load_model(folder / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    given = pruned.model.model.embed_tokens.weight.detach()
    assert 0 < (loaded.lm_head.weight - given).norm() / given.norm() < 0.2


def test_calibration_sees_the_quantised_embedding(pruned):
    chosen = sections(embedding={"bits": 4, "group_size": 16, "method": "nearest"})["gptq"]
    coded, start = block_quantisation.compress_embedding(pruned.files["lora/model"], pruned.windows, chosen)
    model = gptq_folder.load_for_quantisation(pruned.files["lora/model"], block_quantisation.settings(chosen, 4))
    block_quantisation.place(model.model, coded)
    seen = []
    model.model.model.layers[0].register_forward_pre_hook(lambda *given: seen.append(given), with_kwargs=True)
    masked_gptq.quantise(model, pruned.windows, pruned.keep)
    first = seen[0][1][0] if seen[0][1] else seen[0][2]["hidden_states"]
    assert torch.equal(first, rounding.values(coded["embedding"])[pruned.windows[:1].long()])
    assert torch.equal(start.model.embed_tokens.weight, rounding.values(coded["embedding"]))


def test_an_untied_head_is_stored_beside_the_embedding(run, untied):
    folder = run(given=untied, embedding={"bits": 8, "group_size": 32, "method": "gptq"})
    stored, tensors = load_file(folder / "embedding.safetensors"), load_file(folder / "model/model.safetensors")
    assert set(stored) == {f"{name}.{part}" for name in ("embedding", "head") for part in ("codes", "scales")}
    for name, tensor in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        coded = rounding.Coded(stored[f"{name}.codes"], stored[f"{name}.scales"], 8, 32)
        assert torch.equal(tensors[tensor].float(), rounding.values(coded))
    assert not torch.equal(tensors["model.embed_tokens.weight"], tensors["lm_head.weight"])
    assert dense_folder.config(folder / "model")["tie_word_embeddings"] is False


def test_the_heads_moments_are_those_of_its_inputs(pruned):
    seen = []
    handle = pruned.model.lm_head.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1).double())
    )
    with torch.no_grad():
        pruned.model(input_ids=pruned.windows)
    handle.remove()
    x = torch.cat(seen)
    assert torch.allclose(
        block_quantisation.head_moments(pruned.model, pruned.windows), x.T @ x / len(x), rtol=1e-4, atol=1e-5
    )


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
    result = {NAME: masked_gptq.LayerResult(0.1, 0.05)}
    row = stage_module.table({NAME: weight}, {NAME: 4}, ledger, result).iloc[0]
    assert row.tolist() == [NAME, 4, 0.1, 4, 2]  # one pruned weight, one group
