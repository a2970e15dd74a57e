"""The walk over the blocks against the model's own forward."""

import pytest
import torch

from tasks.algorithms.model import families, layers, matrices

WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
MODELS = [
    *((architecture, {}) for architecture in sorted(families.BY_HEART)),
    ("MistralForCausalLM", {"sliding_window": 4}),
    ("Qwen2ForCausalLM", WINDOWED),
    ("Qwen3ForCausalLM", WINDOWED),
]


def nothing(index, block, inputs):
    pass


@pytest.mark.parametrize(("architecture", "config"), MODELS)
def test_a_walk_that_changes_nothing_is_the_forward(architecture, config, make_model, make_windows):
    model, ids = make_model(architecture, **config), make_windows(4, 12)
    seen = []
    last = layers.walk(model, ids, lambda index, block, inputs: seen.append(inputs.hidden.clone()), batch=4)
    own = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
    assert len(seen) == 4
    for index, hidden in enumerate(seen):
        assert torch.equal(hidden, own.hidden_states[index])
    assert torch.equal(model.base_model.norm(last), own.last_hidden_state)


@pytest.mark.parametrize(("architecture", "config"), MODELS)
def test_batches_of_any_size_are_carried_as_the_forward_runs_them(architecture, config, make_model, make_windows):
    model = make_model(architecture, **config)
    batches = [make_windows(*size) for size in ((3, 12), (1, 12), (3, 7), (2, 3), (3, 12))]
    found = layers.carry(model, batches)
    for ids, last in zip(batches, found, strict=True):
        own = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.equal(model.base_model.norm(last), own)


def test_sliding_windows_matter_in_these_models(make_model, make_windows):
    ids = make_windows(1, 12)
    full, windowed = make_model("Qwen2ForCausalLM"), make_model("Qwen2ForCausalLM", **WINDOWED)
    assert not torch.allclose(layers.walk(full, ids, nothing), layers.walk(windowed, ids, nothing))


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_the_batch_size_changes_nothing(batch, make_model, make_windows):
    model, ids = make_model(), make_windows(5, 9)
    assert torch.allclose(layers.walk(model, ids, nothing, batch), layers.walk(model, ids, nothing, 5), atol=1e-4)


def test_the_model_is_as_before(make_model, make_windows):
    model, ids = make_model(), make_windows(2, 9)
    before = model(input_ids=ids).logits
    layers.walk(model, ids, nothing)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in vars(block) for block in families.blocks(model))


def test_a_changed_block_feeds_the_next_one(make_model, make_windows):
    model, ids = make_model(), make_windows(2, 9)

    def visit(index, block, inputs):
        block.mlp.down_proj.weight.data *= index

    last = layers.walk(model, ids, visit, batch=2)
    assert torch.equal(model.base_model.norm(last), model.base_model(input_ids=ids).last_hidden_state)


def test_input_statistics_equal_hooks_on_the_whole_forward(make_model, make_windows):
    model, ids = make_model(), make_windows(3, 7)
    by_block, found, naive = matrices.by_block(model), {}, {}

    def visit(index, block, inputs):
        found.update(layers.input_statistics(by_block[index], block, inputs))

    layers.walk(model, ids, visit, batch=2)
    for name, linear in families.block_linears(model).items():
        linear.register_forward_pre_hook(lambda _, x, name=name: naive.__setitem__(name, x[0].detach()))
    model(input_ids=ids)
    assert list(found) == list(naive)
    for name, inputs in naive.items():
        for column in range(0, inputs.shape[-1], 5):
            expected = sum(float(value) ** 2 for value in inputs[..., column].flatten())
            assert float(found[name].sum_of_squares[column]) == pytest.approx(expected, rel=1e-4)
        assert found[name].tokens == 21
        assert found[name].sum_of_squares.dtype == torch.float64
        assert torch.allclose(found[name].norm.float(), inputs.flatten(0, 1).norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_visit_that_watches_may_run_the_block_for_the_walk(batch, make_model, make_windows):
    """The same sums and outputs in one pass instead of two."""
    model, ids = make_model(), make_windows(3, 7)
    by_block, found, ran = matrices.by_block(model), {True: {}, False: {}}, []
    for block in families.blocks(model):
        block.mlp.act_fn.register_forward_hook(lambda *_: ran.append(1))

    def walk(carry):
        def visit(index, block, inputs):
            found[carry].update(layers.input_statistics(by_block[index], block, inputs, carry))

        return layers.walk(model, ids, visit, batch)

    last = walk(carry=True)
    assert len(ran) == 4 * -(-3 // batch)
    assert torch.equal(last, walk(carry=False)) and len(found[True]) == 28
    for name, (squares, tokens) in found[True].items():
        assert tokens == found[False][name].tokens and torch.equal(squares, found[False][name].sum_of_squares)


def test_what_follows_the_last_linear_that_is_watched_does_not_run(make_model, make_windows):
    model, ids = make_model(), make_windows(3, 7)
    ran = []
    for name, linear in families.block_linears(model).items():
        linear.register_forward_hook(lambda *_, name=name: ran.append(name.rpartition(".")[2]))
    seen = []

    def visit(index, block, inputs):
        if index == 1:
            ran.clear()
            name = "model.layers.1.self_attn.o_proj"
            layers.observe({name: matrices.by_block(model)[1][name]}, block, inputs, lambda *given: seen.append(given))
            assert ran == ["q_proj", "k_proj", "v_proj"] * 2  # a batch of two windows and one of one

    layers.walk(model, ids, visit, batch=2)
    naive = []
    model.get_submodule("model.layers.1.self_attn.o_proj").register_forward_pre_hook(lambda _, x: naive.append(x[0]))
    model(input_ids=ids)
    assert [name for name, _ in seen] == ["model.layers.1.self_attn.o_proj"] * 2
    assert torch.allclose(torch.cat([x for _, x in seen]), naive[0].flatten(0, 1), atol=1e-6)
