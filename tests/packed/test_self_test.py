"""What the self-test of a family finds, by models that were made wrong on purpose."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, inspection
from tasks.packed import self_test
from tests.support.family_list import FAMILIES


def config(name, **changes):
    with torch.device("meta"):
        return families.described(FAMILIES[name].make(**changes))


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "Gemma 3"])
def test_a_family_passes_and_the_random_state_stays(name):
    before = torch.get_rng_state()
    self_test.check(config(name))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_large_model_is_cut_down():
    large = transformers.GPTNeoXConfig(architectures=["GPTNeoXForCausalLM"]).to_dict()
    small = self_test._small(large)
    assert small.config.num_hidden_layers == 2 and small.config.hidden_size == 64 and small.config.vocab_size == 64
    assert sum(weight.numel() for weight in small.parameters()) < 2**20


def test_a_model_that_stays_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(self_test, "LARGEST", 1000)
    with pytest.raises(InputError, match="two blocks have more than 1000 weights, and can't be cut down"):
        self_test.check(config("GPT-2"))


def test_an_attention_that_depends_on_its_place_is_refused():
    with pytest.raises(InputError, match="without a block it says what it says where that does nothing"):
        self_test.check(config("GPT-2", scale_attn_by_inverse_layer_idx=True))


def test_an_embedding_of_another_width_is_refused():
    with pytest.raises(InputError, match="OPTForCausalLM is not supported with an embedding of 32 values"):
        inspection.inspect(config("OPT", word_embed_proj_dim=32))


@pytest.mark.parametrize(
    ("step", "broken"),
    [
        ("its blocks run alone give what the model gives", {"after": ()}),
        ("pruned, packed and read back it is the same", {"linears": ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")}),
    ],
)
def test_a_family_that_is_described_wrongly_is_refused_with_the_step(step, broken, monkeypatch):
    described = config("GPT-2")
    found = inspection.inspect(described)
    wrong = dataclasses.replace(found, family=dataclasses.replace(found.family, **broken))
    monkeypatch.setattr(inspection, "inspect", lambda _: wrong)
    with pytest.raises(InputError, match=f"GPT2LMHeadModel is not supported: the check `{step}` fails"):
        self_test.check(described)
