"""What is read of a gptqmodel checkpoint without gptqmodel, against what gptqmodel's own kernel unpacks."""

from __future__ import annotations

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, layers
from tasks.algorithms.quantisation import gptqmodel_settings
from tasks.models import gptq_folder, gptq_tensors, model_files, streamed_folder
from tests.support.gptq_oracle import SETTINGS
from tests.support.packed_models import quantise_linears
from tests.support.pruned_model import inputs_of_the_stage


@pytest.fixture(scope="module")
def quantised(tiny_llama, tmp_path_factory):
    """A folder of asymmetric codes in 3 bits, with groups in another order, and an adapter beside them."""
    pruned = inputs_of_the_stage(tmp_path_factory.mktemp("gptq"), tiny_llama)
    settings = SETTINGS | {"bits": 3, "symmetric": False, "act_order": "descending"}
    config, dense = gptqmodel_settings.config(**settings), pruned.files["lora/model"]
    folder = tmp_path_factory.mktemp("quantised") / "model"
    quantise_linears(streamed_folder.open_dense(dense), dense, folder, pruned.windows, pruned.keep, config)
    linears = families.block_linears(gptq_folder.load_dequantised(folder))
    gptq_folder.save_adapter(
        folder,
        {name: (torch.ones(1, each.in_features), torch.ones(each.out_features, 1)) for name, each in linears.items()},
    )
    return folder


def test_a_streamed_model_has_what_gptqmodel_unpacks(quantised):
    whole = gptq_folder.load_dequantised(quantised)
    streamed = streamed_folder.open_dense(quantised, tensors=gptq_tensors.Dequantised(quantised))
    expected = {name: linear.weight for name, linear in families.block_linears(whole).items()}
    found = {name: weight.clone() for weights in layers.weights(streamed) for name, weight in weights.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    outside = [name for name, weight in streamed.named_parameters() if not weight.is_meta]
    assert outside and all(torch.equal(streamed.get_parameter(name), whole.get_parameter(name)) for name in outside)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad(), layers.opening_themselves(streamed):
        assert torch.equal(streamed(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_another_format_is_refused(quantised, tmp_path):
    for name in ("model.safetensors", model_files.CONFIG):
        (tmp_path / name).symlink_to(quantised / name)
    (tmp_path / model_files.QUANTISED[0]).write_text('{"checkpoint_format": "marlin"}')
    with pytest.raises(InputError, match="is quantised in the format 'marlin'; known are gptq and gptq_v2 of int32"):
        gptq_tensors.GptqTensors(tmp_path)
