"""gptqmodel's folders: what is written is what was computed, and what PEFT reads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tasks.algorithms.quantisation import gptqmodel_library as library
from tasks.algorithms.quantisation import gptqmodel_settings, masked_gptq
from tasks.models import dense_folder, gptq_folder
from tests.support.gptq_oracle import SETTINGS
from tests.support.pruned_model import inputs_of_the_stage


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    """The inputs of the stage: a 2:4 pruned model, its masks, windows."""
    return inputs_of_the_stage(tmp_path_factory.mktemp("gptq"), tiny_llama)


def test_the_saved_weights_are_those_that_gptq_computed_with(pruned, tmp_path):
    model = gptq_folder.load_for_quantisation(
        pruned.files["lora/model"], gptqmodel_settings.config(**SETTINGS | {"bits": 3})
    )
    solved = {}
    solve = library.gptq.GPTQ.quantize

    def spy(self, blocksize=128):
        answer = solve(self, blocksize)
        solved[self._named_module.full_name] = answer[0].clone()
        return answer

    with library.patched(library.gptq.GPTQ, "quantize", spy):
        masked_gptq.quantise(model, pruned.windows, pruned.keep)
    gptq_folder.save_quantised(model, pruned.files["lora/model"], tmp_path / "out/model")
    stored = gptq_folder.block_weights(gptq_folder.load_quantised(tmp_path / "out/model"))
    for name, weight in stored.items():
        assert torch.equal(weight, solved[name]), name


def test_no_dense_shard_stays_beside_the_quantised_file(pruned, tmp_path):
    given = pruned.files["lora/model"]
    dense = shutil.copytree(given, tmp_path / "dense")
    (dense / "model.safetensors").unlink()
    dense_folder.load_dense(given).save_pretrained(dense, max_shard_size="20KB")
    assert len(list(dense.glob("*.safetensors"))) > 1
    (dense / "optimizer.pt").write_bytes(bytes(10_000))
    written = {}
    for source in (given, dense):
        model = gptq_folder.load_for_quantisation(source, gptqmodel_settings.config(**SETTINGS))
        masked_gptq.quantise(model, pruned.windows, pruned.keep)
        gptq_folder.save_quantised(model, source, tmp_path / f"out/{source.name}")
        written[source.name] = {path.name: path.read_bytes() for path in (tmp_path / f"out/{source.name}").iterdir()}
    assert written["dense"] == written[given.name]
    assert {name for name in written["dense"] if name.endswith(".safetensors")} == {"model.safetensors"}


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
