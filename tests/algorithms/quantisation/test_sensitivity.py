"""The divergence of one quantised linear against the whole model's own forward with the weight replaced."""

import pytest
import torch

from tasks.algorithms.model import families
from tasks.algorithms.quantisation import rounding, sensitivity

MODELS = [
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    ("MistralForCausalLM", {"sliding_window": 4}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("Qwen3ForCausalLM", {}),
]


def rounded(name, weight, bits):
    return rounding.values(rounding.quantise(weight, bits, 8))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def outputs_of_block(model, ids, name, bits=None):
    """The outputs of the linear's block in the model's own forward, the linear quantised if bits are given."""
    seen, linear = [], model.get_submodule(name)
    handle = model.get_submodule(".".join(name.split(".")[:3])).register_forward_hook(
        lambda *call: seen.append(call[2])
    )
    original = linear.weight.clone()
    with torch.no_grad():
        if bits:
            linear.weight.copy_(rounded(name, original, bits))
        model(input_ids=ids)
        linear.weight.copy_(original)
    handle.remove()
    return seen[0].double()


def by_whole_forwards(model, ids, name, bits):
    """Mean over positions of the sum over tokens of p log(p / q)."""
    linear = model.get_submodule(name)
    with torch.no_grad():
        before = model(input_ids=ids).logits.double().softmax(dim=-1)
        original = linear.weight.clone()
        linear.weight.copy_(rounded(name, original, bits))
        after = model(input_ids=ids).logits.double().softmax(dim=-1)
        linear.weight.copy_(original)
    return float((before * (before / after).log()).sum(dim=-1).mean())


@pytest.mark.parametrize(("architecture", "config"), MODELS)
def test_it_equals_whole_forwards(architecture, config, make_model, make_windows):
    model, ids = make_model(architecture, **config), make_windows(2, 12)
    measured = sensitivity.measure(model, ids, rounded, (2, 3, 8), 3)
    assert list(measured) == list(families.block_linears(model))
    for found in measured.values():
        assert list(found) == [2, 3, 8]
        assert found[2] > found[3] > found[8] > 0
    for name in list(measured)[::3]:
        assert measured[name][3] == pytest.approx(by_whole_forwards(model, ids, name, 3), rel=1e-3, abs=1e-8)


def test_other_widths_follow_by_the_errors_of_the_blocks_outputs(make_model, make_windows):
    model, ids = make_model(), make_windows(2, 12)
    measured = sensitivity.measure(model, ids, rounded, (2, 3, 8), 3)
    for name in list(measured)[::4]:
        before = outputs_of_block(model, ids, name)
        error = {bits: (outputs_of_block(model, ids, name, bits) - before).square().sum() for bits in (2, 3, 8)}
        for bits, divergence in measured[name].items():
            assert divergence == pytest.approx(measured[name][3] * float(error[bits] / error[3]), rel=1e-3)
        # and that is what they cost: the divergence is quadratic in a small change
        assert measured[name][8] == pytest.approx(by_whole_forwards(model, ids, name, 8), rel=0.5)


def test_a_linear_that_the_measured_width_leaves_as_it_is_is_measured_at_the_fewest_bits(make_model, make_windows):
    model, ids = make_model(num_hidden_layers=2), make_windows(2, 9)

    def exact_from_3(name, weight, bits):
        return rounded(name, weight, bits) if bits == 2 else weight.clone()

    for name, found in sensitivity.measure(model, ids, exact_from_3, (2, 3, 4), 3).items():
        assert found[2] == pytest.approx(by_whole_forwards(model, ids, name, 2), rel=1e-3)
        assert found[3] == found[4] == 0


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_batches_and_parts_of_positions_change_nothing(batch, make_model, make_windows, monkeypatch):
    model, ids = make_model(num_hidden_layers=2), make_windows(5, 9)
    one = sensitivity.measure(model, ids, rounded, (3,), 3)
    monkeypatch.setattr(sensitivity, "POSITIONS", 4)
    monkeypatch.setattr(sensitivity, "COMPARED", 150)
    more = sensitivity.measure(model, ids, rounded, (3,), 3, batch=batch)
    for name in one:
        assert more[name][3] == pytest.approx(one[name][3], rel=1e-4)


def test_an_unchanged_weight_diverges_by_nothing(make_model, make_windows):
    model, ids = make_model(num_hidden_layers=2), make_windows(3, 9)
    measured = sensitivity.measure(model, ids, lambda name, weight, bits: weight.clone(), (4, 8), 8, batch=2)
    assert {value for found in measured.values() for value in found.values()} == {0.0}


def test_the_model_is_as_before(make_model, make_windows):
    model, ids = make_model(num_hidden_layers=2), make_windows(2, 9)
    before, places = weights(model), {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    sensitivity.measure(model, ids, rounded, (2,), 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert places == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert not any("forward" in vars(block) for block in families.blocks(model))


@pytest.mark.parametrize("where", ["quantise", "forward", "done"])
def test_the_model_is_as_before_after_an_exception(where, make_model, make_windows):
    model, ids = make_model(num_hidden_layers=2), make_windows(2, 9)
    before = weights(model)
    target = "model.layers.1.self_attn.o_proj"

    def quantise(name, weight, bits):
        if name == target and where == "quantise":
            raise RuntimeError("stop")
        if name == target and where == "forward":
            model.model.norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        return rounded(name, weight, bits)

    def done(count):
        if count == 11 and where == "done":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sensitivity.measure(model, ids, quantise, (2,), 2, done)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_linear_runs_its_own_block_and_later_ones_only(make_model, make_windows):
    model, ids = make_model(), make_windows(1, 9)
    runs = {}
    for index, block in enumerate(families.blocks(model)):
        block.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs.get(index, 0) + 1))
    sensitivity.measure(model, ids, rounded, (2, 4), 4)
    linears, widths = 7, 2
    counts = [runs[index] - linears * (index + widths) for index in range(4)]
    # two walks: each enters once, with blocks that only hand on, and runs a block as it is once
    assert counts == [4] * 4


def test_progress_is_reported_per_linear(make_model, make_windows):
    model, ids = make_model(num_hidden_layers=2), make_windows(1, 9)
    seen = []
    sensitivity.measure(model, ids, rounded, (2,), 2, seen.append)
    assert seen == list(range(1, 15))


def test_a_weight_of_another_shape_is_an_error(make_model, make_windows):
    with pytest.raises(ValueError, match=r"returned \(32,\) for a weight of \(32, 32\)"):
        sensitivity.measure(make_model(), make_windows(1, 9), lambda name, weight, bits: weight[0], (2,), 2)
