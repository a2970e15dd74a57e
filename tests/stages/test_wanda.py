"""WANDA against loops, magnitude pruning, and hooks on the whole model's forward."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from tasks import wanda as stage_module
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, masks
from tasks.algorithms.pruning import wanda
from tasks.models import dense_folder, mask_files, tensor_files

PATTERNS = [(2, 4), (4, 8), (7, 8), (1, 2), (3, 16)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("keep", "of"), PATTERNS)
def test_n_m_equals_six_lines_of_python_and_leaves_exactly_keep_in_every_group(keep, of):
    weight, norm = random(11, 48), random(48, seed=1).abs()
    found = wanda.n_m(wanda.metric(weight, norm), keep, of).keep
    expected = torch.zeros(11, 48, dtype=torch.bool)
    for row in range(11):
        for start in range(0, 48, of):
            scores = {col: abs(float(weight[row, col])) * float(norm[col]) for col in range(start, start + of)}
            for col in sorted(scores, key=lambda col: -scores[col])[:keep]:
                expected[row, col] = True
    assert torch.equal(found, expected)
    assert (masks.groups(found, of).sum(dim=-1) == keep).all()
    assert masks.violations(weight * found, keep, of) == 0


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.29, 0.5, 0.75, 0.99])
def test_unstructured_equals_a_loop_and_prunes_exactly_the_asked_of_each_row(sparsity):
    weight, norm = random(7, 100), random(100, seed=1).abs()
    found = wanda.unstructured(wanda.metric(weight, norm), sparsity).keep
    for row in range(7):
        order = sorted(range(100), key=lambda col: abs(float(weight[row, col])) * float(norm[col]))
        assert sorted(order[: round(100 * sparsity)]) == (~found[row]).nonzero().flatten().tolist()


def test_what_does_not_divide_is_rounded_down():
    assert (wanda.unstructured(random(3, 7).abs().double(), 0.5).keep.sum(dim=1) == 4).all()


SELECTS = {
    "n_m": lambda values: wanda.n_m(values, 2, 4),
    "unstructured": lambda values: wanda.unstructured(values, 0.5),
    "cumulative": lambda values: wanda.cumulative(values, 0.5),
}


@pytest.mark.parametrize("name", SELECTS)
def test_unit_activations_are_magnitude_pruning(name):
    weight = random(9, 32)
    found = SELECTS[name](wanda.metric(weight, torch.ones(32)))
    assert torch.equal(found.keep, SELECTS[name](weight.double().abs()).keep)


@pytest.mark.parametrize("name", SELECTS)
@pytest.mark.parametrize("factor", [0.001, 3, 4096])
def test_scaling_the_activations_changes_nothing(name, factor):
    weight, norm = random(9, 32), random(32, seed=1).abs()
    assert torch.equal(
        SELECTS[name](wanda.metric(weight, norm * factor)).keep, SELECTS[name](wanda.metric(weight, norm)).keep
    )


@pytest.mark.parametrize("name", SELECTS)
def test_the_lower_index_of_equals_stays(name):
    keep = SELECTS[name](torch.ones(2, 8, dtype=torch.float64)).keep
    expected = [1, 1, 0, 0, 1, 1, 0, 0] if name == "n_m" else [1, 1, 1, 1, 0, 0, 0, 0]
    assert keep.int().tolist() == [expected, expected]


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9])
def test_cumulative_prunes_each_row_up_to_alpha_of_its_metric_and_the_asked_in_all(sparsity):
    values = wanda.metric(random(13, 40), random(40, seed=1).abs()) * torch.logspace(-3, 3, 13)[:, None]
    found = wanda.cumulative(values, sparsity)
    assert int((~found.keep).sum()) == int(13 * 40 * sparsity)
    for row in range(13):
        total, pruned = sum(values[row].tolist()), 0.0
        for position, value in enumerate(sorted(values[row].tolist())):
            if pruned + value > found.alpha * total:
                assert int((~found.keep[row]).sum()) == position
                break
            pruned += value


def test_cumulative_prunes_more_of_a_row_with_dominant_weights():
    values = torch.stack([torch.ones(40), torch.full((40,), 0.01)]).double()
    values[1, :4] = 10
    zeros = (~wanda.cumulative(values, 0.5).keep).sum(dim=1)
    assert int(zeros[1]) == 36 > int(zeros[0])


def test_inputs_that_never_fire_are_pruned_first():
    values = wanda.metric(random(4, 8), torch.tensor([0.0, 1, 1, 1, 0, 1, 1, 0]))
    for name, select in SELECTS.items():
        if name != "n_m":
            assert not select(values).keep[:, [0, 4, 7]].any()


def test_a_matrix_of_zeros_does_not_break_the_search():
    assert not wanda.cumulative(torch.zeros(3, 8, dtype=torch.float64), 0.5).keep.any()


@pytest.mark.parametrize("architecture", sorted(families.FAMILIES))
def test_blocks_are_pruned_on_the_activations_of_the_pruned_ones_before_them(architecture, make_model, make_windows):
    model, naive, ids = make_model(architecture), make_model(architecture), make_windows(3, 20)
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    done = []
    found = wanda.prune(model, ids, lambda values: wanda.n_m(values, 2, 4), batch=2, done=done.append)
    for linears in families.linears_by_block(naive):
        seen = {}
        handles = [
            linear.register_forward_pre_hook(lambda _, x, name=name, seen=seen: seen.__setitem__(name, x[0]))
            for name, linear in linears.items()
        ]
        with torch.no_grad():
            naive(input_ids=ids)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            scores = linear.weight.data.abs() * seen[name].flatten(0, 1).norm(dim=0)
            best = scores.reshape(-1, 4).topk(2, dim=-1).indices
            keep = torch.zeros(best.shape[0], 4, dtype=torch.bool).scatter_(1, best, True).reshape(scores.shape)
            linear.weight.data *= keep
    assert done == [1, 2, 3, 4]
    pruned = families.block_linears(model)
    assert list(found) == list(pruned)
    for name, linear in families.block_linears(naive).items():
        assert torch.equal(pruned[name].weight, linear.weight)
        assert torch.equal(pruned[name].weight, dense[f"{name}.weight"] * found[name].keep)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in found:
            assert torch.equal(parameter, dense[name])


def test_inputs_that_do_not_divide_name_the_linear(make_model, make_windows):
    model = make_model(intermediate_size=50)
    with pytest.raises(InputError, match=r"mlp.down_proj: 50 inputs are not divisible by of = 4"):
        wanda.prune(model, make_windows(1, 8), lambda values: wanda.n_m(values, 2, 4))


def test_nan_is_refused(make_model, make_windows):
    model = make_model()
    families.blocks(model)[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers.1.self_attn.q_proj.*not finite"):
        wanda.prune(model, make_windows(1, 8), lambda values: wanda.n_m(values, 2, 4))


def params(**changes):
    return {"wanda": {"method": "wanda", "pattern": "n_m", "keep": 2, "of": 4, "sparsity": None, **changes}}


@pytest.fixture
def inputs(model_folder, make_windows, tmp_path):
    tensor_files.save_tensors(tmp_path / "windows.safetensors", {"input_ids": make_windows(3, 16).int()}, {})
    return {"depth_prune/model": model_folder, "windows.safetensors": tmp_path / "windows.safetensors"}


@pytest.mark.parametrize(
    ("changes", "pattern", "fraction"),
    [
        ({}, "2:4", 0.5),
        ({"keep": 7, "of": 8}, "7:8", 0.125),
        ({"pattern": "unstructured", "sparsity": 0.25}, "unstructured", 0.25),
        ({"method": "wanda_alpha", "pattern": "unstructured", "sparsity": 0.25}, "unstructured", 0.25),
    ],
)
def test_the_stage_s_model_masks_and_table_agree(changes, pattern, fraction, inputs, make_stage, tmp_path, capsys):
    for out in ("a", "b"):
        stage_module.run(make_stage(params(**changes), inputs, out))
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    keep, written = mask_files.load_masks(tmp_path / "a/masks.safetensors")
    linears = families.block_linears(dense_folder.load_dense(tmp_path / "a/wanda/model"))
    table = pd.read_csv(tmp_path / "a/layers.csv")
    assert written == pattern
    assert table["linear"].tolist() == list(linears)
    assert keep.keys() == linears.keys()
    for row in table.itertuples():
        assert torch.equal(linears[row.linear].weight != 0, keep[row.linear])
        assert (row.rows, row.cols) == tuple(keep[row.linear].shape)
        assert row.zeros == row.rows * row.cols * fraction
    assert table["alpha"].notna().all() == (changes.get("method") == "wanda_alpha")
    assert f"zero fraction {fraction:.4f}" in capsys.readouterr().out


def test_switched_off_it_passes_the_bytes_on(inputs, model_folder, make_stage, tmp_path):
    stage_module.skip(make_stage({"wanda": SimpleNamespace()}, inputs))
    for path in model_folder.iterdir():
        assert (tmp_path / "out/wanda/model" / path.name).read_bytes() == path.read_bytes()
    assert mask_files.load_masks(tmp_path / "out/masks.safetensors") == ({}, "dense")
    assert pd.read_csv(tmp_path / "out/layers.csv").empty
