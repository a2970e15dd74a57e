"""`device: cuda` of every stage that computes with a model, on a stand-in for a GPU: nothing there meets the CPU.

The stand-in (`tests.support.fake_card`) computes on the CPU, so a stage has to write the bytes that it writes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tasks.runtime import accelerator
from tests.benchmarks.chain import Chain, declared
from tests.support import fake_card, project
from tests.support.paths import ROOT

LORA = {"lora.steps": 2}
QAD = {"qad.enabled": True, "qad.steps": 2, "qad.batch": 2, "qad.length": 32}
CASES = {
    "calibrate": ("calibrate", {}),
    "importance": ("importance", {}),
    "depth_prune": ("depth_prune", {"depth_prune.schedule": "greedy", "importance.method": "compound"}),
    "wanda": ("wanda", {}),
    "wanda, unstructured": ("wanda", {"wanda.pattern": "unstructured", "wanda.sparsity": 0.5}),
    "wanda_alpha": (
        "wanda",
        {"wanda.method": "wanda_alpha", "wanda.pattern": "unstructured", "wanda.sparsity": 0.5},
    ),
    "lora": ("lora", LORA),
    "lora, remasked, hidden": ("lora", LORA | {"lora.method": "remasked", "lora.distillation.hidden": 1.0}),
    "lora, from EoRA": ("lora", LORA | {"lora.start": "eora"}),
    "lora, blocks": ("lora", LORA | {"lora.method": "block_reconstruction"}),
    "baseline_lora": ("baseline_lora", LORA),
    "gptq": ("gptq", {}),
    "gptq, budget": ("gptq", {"gptq.budget_bytes": 60000}),
    "eora": ("eora", {}),
    "eora, budget": ("eora", {"eora.rank": None, "eora.budget_bytes": 4000, "eora.teacher": "fetch"}),
    "qad": ("qad", QAD),
    "sensitivity": ("sensitivity", {}),
    "baseline": ("baseline", {}),
    "baseline, trained codes": ("baseline", QAD),
    "evaluate, dense": ("evaluate@wanda", {}),
    "evaluate, quantised": ("evaluate@eora", {}),
    "evaluate, packed": ("evaluate@package", {}),
    "kv_cache": ("kv_cache", {"kv_cache.bits": [8]}),
    "harness": (
        "harness@package-corpus",
        {"harness_data.enabled": True, "harness.enabled": True, "harness.limit": 2},
    ),
}
"""Name -> the stage's address, and parameters of which its code depends."""


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """The chain of a tiny model; attention as on the card, where training has it."""
    folder = tmp_path_factory.mktemp("card")
    model = project.tiny_llama(folder / "model")
    with sdpa_kernel(SDPBackend.MATH):
        yield Chain(model, project.short_corpora(folder), folder / "cache", project.QUICK | LORA)


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_stage_writes_on_the_card_what_it_writes_on_the_cpu(name, on_the_cpu, monkeypatch):
    address, params = CASES[name]
    here = on_the_cpu.variant(params)
    expected = written(here.output(address))
    inputs = {(address, dep): here._place(here.stages[address], dep) for dep in here.stages[address].deps}
    there = here.variant({"device": "cuda"}, inputs)
    monkeypatch.setattr(accelerator, "prepare", lambda device: None)  # for the whole process
    with fake_card.installed():
        found = written(there.output(address))
    assert there.computed == [address]
    if name == "kv_cache":  # HQQ searches in float16 on a card
        tables = [pd.read_csv(each.output(address) / "kv_cache.csv") for each in (here, there)]
        full, quantised = ([table[table["bits"] == bits] for table in tables] for bits in (16, 8))
        assert full[0].equals(full[1])
        assert quantised[0]["perplexity"].tolist() == pytest.approx(quantised[1]["perplexity"].tolist(), rel=0.01)
        return
    assert found == expected


def test_every_stage_that_has_a_device_is_tried():
    stages = declared(ROOT / "dvc.yaml", Chain().values)
    asking = {each.name for each in stages.values() if "device" in each.params}
    tried = {address.partition("@")[0] for address, _ in CASES.values()}
    assert asking - {"package"} == tried  # package only notes what the rules made of it


def test_the_stand_in_refuses_to_mix_devices_as_cuda_does():
    with fake_card.installed():
        there, here = torch.arange(3.0, device="cuda"), torch.ones(3)
        assert there.device == torch.device("cuda:0") and (there + torch.tensor(1.0)).sum() == 6
        with pytest.raises(RuntimeError, match="at least two devices"):
            there + here
        with pytest.raises(RuntimeError, match="at least two devices"):
            here[there.long()]
        with pytest.raises(RuntimeError, match="at least two devices"):
            torch.nn.Linear(3, 2).to("cuda")(here)
        with pytest.raises(TypeError, match="cuda:0"):
            there.numpy()
        assert there[torch.tensor([2, 0])].tolist() == [2.0, 0.0]  # an index may come from the CPU
        assert type(there.cpu()) is torch.Tensor and (there.cpu() + here).tolist() == [1.0, 2.0, 3.0]


def test_a_stage_that_mixes_devices_does_not_pass(on_the_cpu, monkeypatch):
    monkeypatch.setattr(accelerator, "prepare", lambda device: None)
    monkeypatch.setattr("tasks.algorithms.model.layers.beside", lambda model, tensor: tensor)
    with fake_card.installed(), pytest.raises(RuntimeError, match="at least two devices"):
        on_the_cpu.variant({"device": "cuda", "calibrate.seed": 1}).output("calibrate")
