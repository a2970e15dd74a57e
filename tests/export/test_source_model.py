"""What the formats share of reading a model."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.export import source_model
from tasks.packed.stored_model import Linear
from tests.support.family_list import FAMILIES


def test_a_family_that_no_format_is_written_for_is_refused(tmp_path):
    folder = FAMILIES["OPT"].save(tmp_path / "model")
    with pytest.raises(
        InputError, match="OPTForCausalLM can't be exported: the formats are written for LlamaForCausalLM"
    ):
        source_model.read(folder)


def test_blocks_are_the_largest_power_of_two_that_divides_a_group():
    def size(group, order=None, least=16, most=256):
        linear = Linear(codes=torch.zeros(1, 1), group_size=group, group_index=order)
        return source_model.block_size(linear, least, most)

    assert [size(group) for group in (32, 48, 96, 128, 1024, 8, 20)] == [32, 16, 32, 128, 256, None, None]
    assert size(32, order=torch.zeros(1)) is None and size(64, least=32, most=32) == 32
    assert source_model.block_size(Linear(weight=torch.zeros(1, 1)), 16, 256) is None
