"""GPTQ of a whole model: each group's Hessian is of the inputs that the quantised linears before it give."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.quantisation import gptq_walk, gptqmodel_settings, masked_gptq, packed_linear
from tasks.runtime.journal import Journal
from tests.support.gptq_oracle import SETTINGS
from tests.support.matrices import two_of_four

GROUPS = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
MODELS = [
    ("LlamaForCausalLM", {}),
    ("MistralForCausalLM", {"sliding_window": 8}),
    ("Qwen2ForCausalLM", {"tie_word_embeddings": False}),
    ("Qwen3ForCausalLM", {"head_dim": 16}),
]


class _Stop(Exception):
    pass


@pytest.fixture
def small(make_model):
    def small(architecture="LlamaForCausalLM", **config):
        return make_model(architecture, num_hidden_layers=2, intermediate_size=96, **config)

    return small


def quantised(model, windows, keep=None, saved=None, settings=masked_gptq.PLAIN, stop=None, **changed):
    """Quantise the model in place -> full name -> what became of the linear."""
    found = {}

    def done(name, result):
        if name == stop:
            raise _Stop
        found[name] = result

    config = gptqmodel_settings.config(**SETTINGS | changed)
    given = {} if saved is None else {"saved": saved}
    gptq_walk.quantise(model, windows, keep or {}, config, done, settings, **given)
    return found


@pytest.mark.parametrize(("architecture", "config"), MODELS)
def test_every_group_is_calibrated_on_what_the_quantised_ones_before_give(
    architecture, config, small, make_windows, monkeypatch
):
    model, reference, windows = small(architecture, **config), small(architecture, **config), make_windows(5, 24)
    seen, solve = [], masked_gptq.quantise

    def spy(weights, hessian, *given):
        seen.append((list(weights), hessian.clone()))
        return solve(weights, hessian, *given)

    monkeypatch.setattr(masked_gptq, "quantise", spy)
    found = quantised(model, windows)
    assert [tuple(name.rpartition(".")[2] for name in names) for names, _ in seen] == GROUPS * 2
    assert list(found) == list(families.block_linears(model))
    for names, hessian in seen:  # each by the whole model's own forward, the linears before it quantised by hand
        expected = whole_forward_moments(reference, names[0], windows)
        assert torch.allclose(hessian.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.diagonal().mean()))
        for name in names:
            reference.get_submodule(name).weight.data.copy_(packed_linear.unpack(found[name].tensors))
            assert torch.equal(reference.get_submodule(name).weight, model.get_submodule(name).weight)


def whole_forward_moments(model, name, windows):
    """2 X^T X / tokens, float64, of a linear's inputs."""
    got = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: got.append(x[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(input_ids=windows)
    handle.remove()
    x = torch.cat(got)
    return 2 * x.T @ x / len(x)


def test_every_linear_and_the_attention_run_once_per_window(small, make_windows):
    model, windows = small(), make_windows(6, 16)
    runs = {}
    for name, module in model.named_modules():
        if name.endswith(("_proj", "act_fn")):
            module.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs.get(name, 0) + 1))
    quantised(model, windows)
    once_and_the_first_to_find_the_groups = len(windows) + 1
    assert len(runs) == 16 and set(runs.values()) == {once_and_the_first_to_find_the_groups}


@pytest.mark.parametrize("threads", [2, 4])
def test_the_number_of_threads_changes_nothing(threads, small, make_windows):
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            found.append(quantised(small(), make_windows(6, 64), mse=2.4))
    finally:
        torch.set_num_threads(before)
    for name, one in found[0].items():
        assert all(torch.equal(tensor, found[1][name].tensors[part]) for part, tensor in one.tensors.items()), name
        assert one.error == found[1][name].error


@pytest.mark.parametrize("stop", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj"])
@pytest.mark.parametrize("joint", [None, (2, 4)])
def test_a_stopped_run_goes_on_with_the_same_result(stop, joint, small, make_windows, tmp_path, monkeypatch):
    settings, windows = masked_gptq.Settings(8, joint, 2), make_windows(6, 24)
    expected = quantised(small(), windows, settings=settings)
    with pytest.raises(_Stop):
        quantised(small(), windows, settings=settings, saved=Journal(tmp_path / "journal", 0), stop=stop)
    solved, solve = [], masked_gptq.quantise
    monkeypatch.setattr(
        masked_gptq, "quantise", lambda weights, *given: solved.extend(weights) or solve(weights, *given)
    )
    model = small()
    found = quantised(model, windows, settings=settings, saved=Journal(tmp_path / "journal", 0))
    assert list(found) == list(expected)
    finished = list(expected)[: list(expected).index(stop)]
    assert not set(finished) & set(solved) and set(expected) - set(finished) - {stop} <= set(solved)
    for name, result in expected.items():
        assert all(torch.equal(tensor, found[name].tensors[part]) for part, tensor in result.tensors.items()), name
        assert (result.error, result.damp) == (found[name].error, found[name].damp)
        assert (result.keep is None) == (joint is None)
        assert joint is None or torch.equal(result.keep, found[name].keep)


def test_masks_of_other_models_and_windows_that_are_too_long_are_refused(small, make_windows):
    model = small()
    keep = {name: two_of_four(linear.weight.detach()) for name, linear in families.block_linears(model).items()}
    with pytest.raises(InputError, match=r"a mask for model\.layers\.9\.mlp\.up_proj, which the model does not have"):
        quantised(model, make_windows(2, 16), {"model.layers.9.mlp.up_proj": keep["model.layers.1.mlp.up_proj"]})
    with pytest.raises(InputError, match="calibrate.length = 65, but the model has 64 positions: choose at most 64"):
        quantised(model, make_windows(2, 65))
