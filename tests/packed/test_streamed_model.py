"""Models whose blocks are unpacked when they are opened, against the same ones loaded whole, bit by bit."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.model import families, layers, streaming
from tasks.models import gptq_folder, skeleton
from tasks.packed import reader, source_folder, streamed_model
from tasks.runners import any_folder
from tests.support.packed_models import CASES, logits


@pytest.mark.parametrize("case", CASES)
def test_packed_and_gptqmodel_s_folders_compute_as_gptqmodel_does(case, build, windows):
    made = build(case)
    whole = gptq_folder.load_quantised(made.model)
    expected, ids = gptq_folder.block_weights(whole), windows[:2].long()
    for model in (reader.open_model(made.packed), streamed_model.open_model(source_folder.read(made.model))):
        closed = skeleton.missing(model)
        assert {name.split(".")[2] for name in closed} == {"0", "1"} and not any("norm" in name for name in closed)
        for _ in range(2):  # the second time from the codes that are held
            with layers.opening_themselves(model):
                assert torch.equal(logits(model, ids), logits(whole, ids))
            assert skeleton.missing(model) == closed
        found = {name: weight.clone() for name, weight in any_folder.block_weights(model)}
        assert list(found) == list(expected)
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
        text = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        with layers.opening_themselves(model):
            assert torch.equal(model.generate(ids, **text), whole.generate(ids, **text))


def test_codes_of_all_blocks_are_kept_together_where_hidden_states_would_be(build, windows):
    rooms = []

    def spill(size):
        rooms.append(torch.empty(size, dtype=torch.uint8))
        return rooms[-1]

    packed = build("coded").packed
    expected, model = logits(reader.load_model(packed), windows[:1].long()), reader.open_model(packed)
    token = streaming.SPILL.set(spill)
    try:
        with layers.opening_themselves(model):
            for _ in range(2):
                assert torch.equal(logits(model, windows[:1].long()), expected)
        assert [len(room) for room in rooms] == [2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)]
        rooms[0].zero_()  # they are read from there
        with layers.opening_themselves(model):
            assert not torch.equal(logits(model, windows[:1].long()), expected)
    finally:
        streaming.SPILL.reset(token)


def test_an_open_block_stays_open_for_what_opens_it_again(build):
    model = reader.open_model(build("coded").packed)
    block = families.blocks(model)[1]
    with layers.opened(block):
        inside = block.mlp.up_proj
        with layers.opened(block):
            assert block.mlp.up_proj is inside
        assert block.mlp.up_proj is inside and not skeleton.missing(block)
    assert block.mlp.up_proj is not inside


def test_a_model_in_fewer_bits_is_the_one_in_float32_rounded(build, windows):
    made = build("asymmetric")
    for folder in (made.packed, made.model):
        half, whole = any_folder.load_model(folder, torch.bfloat16), any_folder.load_model(folder)
        assert {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}
        expected = dict(any_folder.block_weights(whole))
        assert all(torch.equal(w, expected[name].bfloat16().float()) for name, w in any_folder.block_weights(half))
        found, exact = (logits(model, windows[:2].long()).float() for model in (half, whole))
        assert 0 < (found - exact).norm() / exact.norm() < 0.05
