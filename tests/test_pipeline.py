"""The whole DAG with a tiny model: what reruns, what is restored, what survives a failure, same inputs same bytes."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import yaml

from tests.project import SMALL, Project, ran, restored

pytestmark = pytest.mark.slow

EVALUATIONS = {f"evaluate@{name}" for name in ("fetch", "depth_prune", "wanda", "lora", "gptq", "eora", "package")}
STAGES = {"fetch", "calibrate", "importance", "depth_prune", "wanda", "lora", "gptq", "eora", "package"}
STAGES |= {"hardware_fit", "report"} | EVALUATIONS
BELOW_WANDA = {"wanda", "lora", "gptq", "eora", "package", "hardware_fit", "report"}
BELOW_WANDA |= {f"evaluate@{name}" for name in BELOW_WANDA} & EVALUATIONS


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, tiny_llama):
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model):
    """The project after one `dvc repro`."""
    made = Project(tmp_path_factory.mktemp("project"), tiny_model)
    assert ran(made.repro().stdout) == STAGES
    return made


def test_a_second_run_has_nothing_to_do(project) -> None:
    assert "up to date" in project.repro().stdout
    assert "up to date" in project(sys.executable, "-m", "dvc", "status", "report").stdout


def test_a_comment_changes_nothing(project) -> None:
    path = project.path / "params.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "# a comment\n", encoding="utf-8")
    assert not ran(project.repro().stdout)


def test_a_parameter_reruns_what_depends_on_it_and_comes_back_from_the_run_cache(project) -> None:
    before = project.lock()
    project.change({"wanda.keep": 1})
    assert ran(project.repro().stdout) == BELOW_WANDA
    project.change({"wanda.keep": 2})
    output = project.repro().stdout
    assert not ran(output)
    assert restored(output) == BELOW_WANDA
    assert project.lock() == before


def test_the_flow_has_nothing_to_do_after_dvc_and_dvc_nothing_after_the_flow(project) -> None:
    assert "0 of 18 stages ran" in project.flow().stdout
    project.change({"eora.rank": 5})
    below = {"eora", "package", "hardware_fit", "report", "evaluate@eora", "evaluate@package"}
    assert f"{len(below)} of 18 stages ran" in project.flow().stdout
    assert not ran(project.repro().stdout)
    project.change({"eora.rank": 4})
    assert "0 of 18 stages ran" in project.flow().stdout


def test_the_dag_elsewhere_gives_the_same_bytes(project, tiny_model, tmp_path) -> None:
    other = Project(tmp_path / "elsewhere", tiny_model)
    other.repro()
    assert other.lock() == project.lock()


def test_stages_that_are_off_pass_the_same_files_on_without_taking_space(project) -> None:
    off = ("depth_prune", "wanda", "lora", "gptq", "eora", "package", "hardware_fit")
    project.change({f"{name}.enabled": False for name in off})
    project.repro()
    files = [project.path / f"data/{name}/model/model.safetensors" for name in ("fetch", *off[:5])]
    assert len({file.stat().st_ino for file in files}) == 1
    metrics = [
        json.loads((project.path / f"data/evaluate/{name}/metrics.json").read_text()) for name in ("fetch", "eora")
    ]
    assert metrics[0]["perplexity"] == metrics[1]["perplexity"]
    project.change({f"{name}.enabled": True for name in off})
    assert not ran(project.repro().stdout)


BAD = {
    "a typo": ({"wanda.kep": 2}, "wanda.kep"),
    "an unknown section": ({"wandda": {}, "wanda.keep": 1}, "wandda"),
    "out of range": ({"gptq.damp": 2.0}, "gptq.damp"),
    "keep not below of": ({"wanda.keep": 4}, "keep = 4 must be below of = 4"),
    "rank above the smallest dimension": ({"lora.rank": 1000}, "lora.rank"),
    "more layers than are unprotected": ({"depth_prune.remove": 3}, "depth_prune.remove"),
    "group size that does not divide": ({"gptq.group_size": 128}, "gptq.group_size"),
    "an unknown device": ({"hardware_fit.device": "toaster"}, "toaster"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_one_sentence_and_costs_no_output(project, name) -> None:
    values, words = BAD[name]
    before, params = project.lock(), (project.path / "params.yaml").read_text(encoding="utf-8")
    project.change(values)
    try:
        done = project.repro(check=False)
    finally:
        (project.path / "params.yaml").write_text(params, encoding="utf-8")
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    assert re.search(rf"error: .*{re.escape(words)}", done.stdout), done.stdout
    assert project.lock() == before
    assert "up to date" in project(sys.executable, "-m", "dvc", "status", "report").stdout
    assert not ran(project.repro().stdout)


def test_a_model_with_nan_is_refused_and_the_previous_outputs_stay(project) -> None:
    from safetensors.torch import load_file, save_file

    path = project.path / "source/model/model.safetensors"
    good = path.read_bytes()
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    try:
        done = project.repro(check=False)
    finally:
        path.write_bytes(good)
    assert done.returncode != 0 and "Traceback" not in done.stdout
    assert "model.norm.weight" in done.stdout
    assert not ran(project.repro().stdout)


def test_an_altered_output_is_found_and_put_right(project) -> None:
    target = project.path / "data/gptq/layers.csv"
    content = target.read_bytes()
    target.unlink()  # the workspace file may be a link into the cache
    target.write_bytes(content + b"tampered\n")
    done = project(sys.executable, "-m", "tasks.lineage", "verify", "data/report/report.html", check=False)
    assert done.returncode == 1 and "data/gptq/layers.csv was altered" in done.stdout
    assert not ran(project.repro().stdout)
    assert target.read_bytes() == content
    project(sys.executable, "-m", "tasks.lineage", "verify", "data/report/report.html")


def test_lineage_leads_to_the_sources(project) -> None:
    shown = project(sys.executable, "-m", "tasks.lineage", "show", "data/package/model").stdout
    for name in ("package", "eora", "gptq", "lora", "wanda", "depth_prune", "fetch", "source/model"):
        assert name in shown


def test_every_model_loads_with_stock_libraries(project) -> None:
    code = """
import sys
from transformers import AutoModelForCausalLM
for name in ("fetch", "depth_prune", "wanda", "lora"):
    model = AutoModelForCausalLM.from_pretrained(f"data/{name}/model")
    import torch
    print(name, model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, pad_token_id=0).shape)
import os
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
from gptqmodel import GPTQModel, BACKEND
for name in ("gptq", "eora", "package"):
    model = GPTQModel.load(f"data/{name}/model", backend=BACKEND.GPTQ_TORCH, device="cpu")
    print(name, model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, pad_token_id=0).shape)
"""
    output = project(sys.executable, "-c", code).stdout
    assert output.count("torch.Size([1, 6])") == 7


def test_the_dag_is_the_same_for_every_parameter_file(project) -> None:
    assert set(yaml.safe_load((project.path / "params.yaml").read_text())) >= {key.split(".")[0] for key in SMALL}
    assert shutil.which("git")
