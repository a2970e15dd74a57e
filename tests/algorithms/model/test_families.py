"""Descriptions of the families against the models that transformers builds."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, inspection
from tasks.algorithms.model.families import Keys
from tasks.algorithms.model.shape import shape_of_config

ARCHITECTURES = sorted(families.BY_HEART)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": False, "sliding_window": 16}])
def test_what_is_known_by_heart_is_what_inspection_finds(architecture, sizes, make_model):
    config = families.described(make_model(architecture, **sizes))
    found, shape = inspection.inspect(config), shape_of_config(config)
    assert replace(found.family, keys=Keys()) == families.BY_HEART[architecture]
    assert found.linears == shape.linears
    assert found.sizes == {key: getattr(shape, key) for key in found.sizes}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linears_are_all_of_the_model_but_the_head_in_running_order(architecture, make_model, make_windows):
    model = make_model(architecture)
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    model(input_ids=make_windows(1, 5))
    head = families.of_model(model).head
    assert ran[-1] == head
    assert list(families.block_linears(model)) == ran[:-1]
    assert all(isinstance(linear, nn.Linear) for linear in families.block_linears(model).values())
    assert len(families.blocks(model)) == len(families.linears_by_block(model)) == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_named_modules_exist_and_norms_are_all_of_the_block_s_one_dimensional_weights(architecture, make_model):
    model, described = make_model(architecture), families.BY_HEART[architecture]
    assert model.get_submodule(described.embedding) is model.get_input_embeddings()
    assert model.get_submodule(described.head) is model.get_output_embeddings()
    assert model.get_submodule(described.after[0]).weight.ndim == 1
    block = families.blocks(model)[0]
    names = [name for name, parameter in block.named_parameters() if parameter.ndim == 1]
    vectors = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    assert vectors == set(described.norms)


@pytest.mark.parametrize("config", [{"architectures": None}, {}])
def test_a_config_that_names_nothing_is_refused(config):
    with pytest.raises(InputError, match="names no architecture"):
        families.family(config)


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(InputError, match="Linear"):
        families.blocks(torch.nn.Linear(2, 2))
