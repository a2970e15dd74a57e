"""A model's sizes from its config, against the models that transformers builds from it."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.model.shape import ModelShape, shape_of_config, shape_of_model

ARCHITECTURES = sorted(families.BY_HEART)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 64,
}


def test_every_size_by_hand() -> None:
    linears = {
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
    }
    found = shape_of_config(CONFIG)
    assert found == ModelShape(
        layers=2,
        hidden=8,
        mlp=12,
        heads=2,
        kv_heads=1,
        head_dim=4,
        vocabulary=20,
        context=64,
        window=None,
        tied=False,
        stored=4,
        family=families.BY_HEART["LlamaForCausalLM"],
        linears=linears,
    )
    assert list(found.linears) == list(linears)  # in running order
    assert (found.in_blocks, found.outside, found.widest) == (2 * (192 + 288), 320, 12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8}])
@pytest.mark.parametrize("tied", [True, False])
def test_the_sizes_are_the_model_s(architecture, sizes, tied, make_model):
    model = make_model(architecture, tie_word_embeddings=tied, **sizes)
    found = shape_of_model(model)
    for block in families.linears_by_block(model):
        weights = {name.split(".", 3)[-1]: tuple(linear.weight.shape) for name, linear in block.items()}
        assert list(found.linears.items()) == list(weights.items())
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert found.in_blocks + found.outside == matrices
    assert found.layers == len(families.blocks(model))
    assert (found.vocabulary, found.hidden) == tuple(model.get_input_embeddings().weight.shape)


def test_head_dim_defaults_to_hidden_over_heads():
    assert (
        shape_of_config(CONFIG | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": None}).head_dim
        == 8
    )


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),
        ({"sliding_window": 16}, 16),
        ({"sliding_window": 16, "use_sliding_window": True}, 16),
        ({"sliding_window": 16, "use_sliding_window": False}, None),
    ],
)
def test_a_window_counts_where_the_config_uses_it(changes, window):
    assert shape_of_config(CONFIG | changes).window == window


@pytest.mark.parametrize("dtype", [{"dtype": "bfloat16"}, {"torch_dtype": "float16"}])
def test_bytes_as_stored(dtype):
    assert shape_of_config(CONFIG | dtype).stored == 2


def test_every_chosen_matrix_is_attention_s_or_the_mlp_s():
    for family in families.BY_HEART.values():
        attention, mlp = family.chosen("attention"), family.chosen("mlp")
        assert attention and mlp and not set(attention) & set(mlp)
        assert set(attention) | set(mlp) == set(family.chosen("all-linear")) == set(family.linears)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -2, 1.5, True, 2**31])
def test_a_size_that_is_missing_or_wrong_is_named(key, value):
    with pytest.raises(InputError, match=f"has {key} = {value!r}, expected a whole number above 0"):
        shape_of_config(CONFIG | {key: value})


def test_it_reads_a_config_without_a_limit_of_context():
    assert shape_of_config({key: CONFIG[key] for key in CONFIG if key != "max_position_embeddings"}).context is None


def test_no_weights_are_needed(make_model):
    with torch.device("meta"):
        assert shape_of_model(make_model()).layers == 4
