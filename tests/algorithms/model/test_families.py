"""Descriptions of the families against the models that transformers builds."""

import pytest
import torch
from torch import nn

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families

ARCHITECTURES = sorted(families.FAMILIES)


def test_the_issue_s_families_are_there():
    assert {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"} <= set(ARCHITECTURES)


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
    model, described = make_model(architecture), families.FAMILIES[architecture]
    assert model.get_submodule(described.embedding) is model.get_input_embeddings()
    assert model.get_submodule(described.head) is model.get_output_embeddings()
    assert model.get_submodule(described.final_norm).weight.ndim == 1
    block = families.blocks(model)[0]
    names = [name for name, parameter in block.named_parameters() if parameter.ndim == 1]
    vectors = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    assert vectors == set(described.norms)


@pytest.mark.parametrize("config", [{"architectures": ["GPT2LMHeadModel"]}, {"architectures": None}, {}])
def test_unsupported_is_refused_with_what_is_supported(config):
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        families.family(config)


def test_an_unsupported_model_is_refused():
    with pytest.raises(InputError, match="Linear"):
        families.blocks(torch.nn.Linear(2, 2))
