"""gptqmodel's folders: what is written is what was computed, and what PEFT reads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation import gptqmodel_settings, masked_gptq
from tasks.models import dense_folder, gptq_folder, streamed_folder
from tests.support.gptq_oracle import SETTINGS
from tests.support.packed_models import quantise_linears
from tests.support.pruned_model import inputs_of_the_stage


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    """The inputs of the stage: a 2:4 pruned model, its masks, windows."""
    return inputs_of_the_stage(tmp_path_factory.mktemp("gptq"), tiny_llama)


def test_the_saved_weights_are_those_that_gptq_computed_with(pruned, tmp_path, monkeypatch):
    config, solved = gptqmodel_settings.config(**SETTINGS | {"bits": 3}), {}
    solve = masked_gptq.quantise

    def spy(*given):
        answers = solve(*given)
        solved.update({name: answer.quantised.clone() for name, answer in answers.items()})
        return answers

    monkeypatch.setattr(masked_gptq, "quantise", spy)
    dense, target = pruned.files["lora/model"], tmp_path / "out/model"
    quantise_linears(streamed_folder.open_dense(dense), dense, target, pruned.windows, pruned.keep, config)
    stored = gptq_folder.block_weights(gptq_folder.load_quantised(target))
    assert set(stored) == set(solved)
    for name, weight in stored.items():
        assert torch.equal(weight, solved[name]), name
    blocks = list(gptq_folder.stored_linears(target))
    assert [name for block in blocks for name in block] == list(pruned.keep) and len(blocks) == 2
    for name, (bits, weight) in (item for block in blocks for item in block.items()):
        assert bits == 3 and torch.equal(weight, solved[name]), name


def test_no_dense_shard_stays_beside_the_quantised_file(pruned, tmp_path):
    given = pruned.files["lora/model"]
    dense = shutil.copytree(given, tmp_path / "dense")
    (dense / "model.safetensors").unlink()
    dense_folder.load_dense(given).save_pretrained(dense, max_shard_size="20KB")
    assert len(list(dense.glob("*.safetensors"))) > 1
    (dense / "optimizer.pt").write_bytes(bytes(10_000))
    written, config = {}, gptqmodel_settings.config(**SETTINGS)
    for source in (given, dense):
        model, target = streamed_folder.open_dense(source), tmp_path / f"out/{source.name}"
        quantise_linears(model, source, target, pruned.windows, pruned.keep, config)
        written[source.name] = {path.name: path.read_bytes() for path in target.iterdir()}
    assert written["dense"] == written[given.name]
    assert {name for name in written["dense"] if name.endswith(".safetensors")} == {"model.safetensors"}


@pytest.mark.parametrize("widths", [4, [2, 3, 4, 8]], ids=str)
@pytest.mark.parametrize("act_order", ["none", "descending"])
def test_the_description_is_gptqmodels_own(pruned, tmp_path, widths, act_order):
    """What gptqmodel's own writer says of the same settings, but for what only tells how they were carried out."""
    names = list(pruned.keep)
    bits = widths if isinstance(widths, int) else dict(zip(names, widths * len(names), strict=False))
    config = gptqmodel_settings.config(**SETTINGS | {"bits": bits, "act_order": act_order})
    dense = pruned.files["lora/model"]
    model = streamed_folder.open_dense(dense)
    quantise_linears(model, dense, tmp_path / "out", pruned.windows, pruned.keep, config)
    config.save_pretrained(tmp_path)
    found, expected = (
        json.loads((tmp_path / name).read_text()) for name in ("out/quantize_config.json", "quantize_config.json")
    )
    assert found.pop("meta")["quantizer"] == ["gptqmodel:7.6.0"]
    expected.pop("meta")
    assert (
        found == expected
        and json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["bits"] == found["bits"]
    )


def test_a_value_beyond_float16_is_refused_and_nothing_is_written(pruned, tmp_path):
    dense = pruned.files["lora/model"]
    model = streamed_folder.open_dense(dense)
    model.model.norm.weight.data[3] = 7e4
    with pytest.raises(InputError, match=r"model\.norm\.weight has values up to 7e\+04"):
        quantise_linears(
            model, dense, tmp_path / "out", pruned.windows, pruned.keep, gptqmodel_settings.config(**SETTINGS)
        )
    assert not list((tmp_path / "out").iterdir())


def test_peft_is_told_the_ranks(tmp_path):
    factors = {
        f"model.layers.{place}.mlp.up_proj": (torch.zeros(rank, 8), torch.zeros(4, rank))
        for place, rank in enumerate((3, 0, 5))
    }
    gptq_folder.save_adapter(tmp_path, factors)
    described = json.loads((tmp_path / "eora/adapter_config.json").read_text())
    assert described["r"] == described["lora_alpha"] == 5
    assert described["rank_pattern"] == described["alpha_pattern"] == {"model.layers.0.mlp.up_proj": 3}
    assert described["target_modules"] == ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"]
    (tmp_path / "none").mkdir()
    gptq_folder.save_adapter(tmp_path / "none", {"q": (torch.zeros(0, 8), torch.zeros(4, 0))})
    assert not list((tmp_path / "none").iterdir())
