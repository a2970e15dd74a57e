"""The whole DAG with a tiny model: what reruns, what is restored, what survives a failure, same inputs same bytes."""

from __future__ import annotations

import contextlib
import json
import re
import sys

import pytest
from dvc.repo import Repo

from tests.support.project import Project, ran, restored

pytestmark = pytest.mark.slow

MODELS = (
    "fetch",
    "vocabulary",
    "depth_prune",
    "wanda",
    "lora",
    "gptq",
    "eora",
    "qad",
    "package",
    "baseline_lora",
    "baseline",
)
EVALUATIONS = {f"evaluate@{name}" for name in MODELS}
STAGES = {
    *MODELS,
    "sensitivity",
    "overlap",
    "calibrate",
    "importance",
    "measure",
    "kv_cache",
    "hardware_fit",
    "report",
} | EVALUATIONS
STAGES |= {"code", "harness_data@corpus", "harness@fetch-corpus"}
BELOW_PACKAGE = {"baseline", "measure", "kv_cache", "hardware_fit", "report", "evaluate@package", "evaluate@baseline"}
BELOW_PACKAGE |= {"harness@package-corpus", "harness@baseline-corpus"}
STAGES |= BELOW_PACKAGE
BELOW_WANDA = {"wanda", "lora", "gptq", "eora", "qad", "package"} | BELOW_PACKAGE
BELOW_WANDA |= {f"evaluate@{name}" for name in BELOW_WANDA} & EVALUATIONS


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, tiny_llama):
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model):
    """The project after one `dvc repro`."""
    made = Project(tmp_path_factory.mktemp("project"), tiny_model)
    made.change({"qad.enabled": True, "qad.steps": 2, "qad.batch": 2, "qad.length": 64})
    assert ran(made.repro().stdout) == STAGES
    return made


def test_a_second_run_has_nothing_to_do(project) -> None:
    assert "up to date" in project.repro().stdout
    assert "up to date" in project(sys.executable, "-m", "dvc", "status", "report").stdout


def test_a_comment_changes_nothing(project) -> None:
    path = project.path / "params.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "# a comment\n", encoding="utf-8")
    assert not ran(project.repro().stdout)


def test_a_parameter_reruns_the_stages_that_read_it(project) -> None:
    """Those below them follow by what they write, as where stages are off."""
    project.change({"wanda.keep": 1})
    try:
        assert ran(project.repro("--dry", "report").stdout) == {"wanda", "package"}  # package writes it down
    finally:
        project.change({"wanda.keep": "auto"})
    assert not ran(project.repro("--dry", "report").stdout)


def test_the_flow_has_nothing_to_do_after_dvc_and_dvc_nothing_after_the_flow(project) -> None:
    project.change({"baseline.enabled": False})
    below = {"sensitivity", "baseline", "evaluate@baseline", "harness@baseline-corpus", "measure", "report"}
    assert f"{len(below)} of {len(STAGES)} stages ran" in project.flow().stdout  # the others were made by DVC
    assert not ran(project.repro().stdout)
    project.change({"baseline.enabled": True})
    assert f"0 of {len(STAGES)} stages ran" in project.flow().stdout


def test_a_clone_without_a_cache_gives_the_same_bytes_and_stays_clean(project, tmp_path) -> None:
    project("git", "add", "-A")
    project("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "dvc.lock and records")
    other = Project.found(tmp_path / "elsewhere")
    project("git", "clone", "-q", ".", str(other.path))
    assert ran(other.repro().stdout) == STAGES
    assert other.lock() == project.lock()
    assert other("git", "status", "--porcelain").stdout == ""
    verified = other(sys.executable, "-m", "tasks", "verify").stdout
    assert verified.splitlines()[-1].startswith("the same as HEAD (")
    assert f"{len(STAGES)} of " in verified and "from a cache" not in verified


def test_stages_that_are_off_pass_the_same_files_on_and_come_back_from_the_run_cache(project) -> None:
    off = ("depth_prune", "wanda", "lora", "gptq", "eora", "qad", "package", "hardware_fit")  # vocabulary already is
    below, before = BELOW_WANDA | {"depth_prune", "evaluate@depth_prune"}, project.lock()
    below |= {"baseline_lora", "evaluate@baseline_lora", "sensitivity"}  # which read the sections of lora and gptq
    project.change({f"{name}.enabled": False for name in off})
    try:
        assert ran(project.repro().stdout) == below
        paths = [project.path / f"data/{name}/model/model.safetensors" for name in off[:7]]
        assert len({path.stat().st_ino for path in paths}) == 1  # one file takes space, whatever the number of stages
        folders = [project.path / f"data/{name}/model" for name in ("fetch", "vocabulary", *off[:6], "baseline_lora")]
        contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
        assert all(content == contents[0] for content in contents)
        fetched, last = (
            json.loads((project.path / f"data/evaluate/{name}/metrics.json").read_text()) for name in ("fetch", "qad")
        )
        assert fetched["perplexity"] == last["perplexity"]
    finally:
        project.change({f"{name}.enabled": True for name in off})
        output = project.repro().stdout
    assert ran(output) == {"report"}  # it reads measure's record, no output, which DVC alone doesn't bring back
    assert restored(output) == below - {"report"}
    assert project.lock() == before


BAD = {
    "a typo": ({"wanda.kep": 2}, "unknown parameter `wanda.kep`"),
    "an unknown section": ({"wandda": {}, "wanda.keep": 3}, "unknown parameter `wandda`"),
    "out of range": ({"gptq.damp": 2.0}, "`gptq.damp` = 2.0: input should be less than 1"),
    "keep not below of": ({"wanda.keep": 4}, "keep = 4 must be below of = 4"),
    "lora's rank above the smallest side": ({"lora.rank": 1000}, "lora.rank = 1000 is above the smallest side"),
    "eora's rank above the smallest side": ({"eora.rank": 1000}, "eora.rank = 1000 is above the smallest side"),
    "more layers than are unprotected": ({"depth_prune.remove": 3}, "1 + 1 protected ones leave only 2 to choose"),
    "group size that does not divide": ({"gptq.group_size": 128}, "gptq.group_size = 128 does not divide the 64"),
    "more memory than there is": ({"lora.batch": 10**7}, "lora needs about"),
    "more windows than the corpus has": ({"calibrate.windows": 10**4}, "the calibration text has"),
    "an unknown device": ({"hardware_fit.device": "toaster"}, "hardware_fit.device = toaster has no profile"),
}


def refused(project, words) -> None:
    """One sentence and no traceback."""
    done = project.repro(check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    assert len(re.findall(r"^error: ", done.stdout, re.MULTILINE)) == 1
    assert re.search(rf"^error: .*{re.escape(words)}", done.stdout, re.MULTILINE), done.stdout


def files(project) -> dict[str, bytes]:
    """Every file below data/, locks of stages apart."""
    paths = (path for path in (project.path / "data").rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(project.path)): path.read_bytes() for path in paths}


def unharmed(project, before) -> None:
    """Mended, the project is where it was, and nothing has to be computed or restored."""
    assert project.lock() == before
    with contextlib.chdir(project.path), Repo() as repo:
        assert repo.status(["report"], with_deps=True) == {}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_one_sentence_and_costs_no_output(project, name) -> None:
    values, words = BAD[name]
    lock, outputs, params = project.lock(), files(project), (project.path / "params.yaml").read_text(encoding="utf-8")
    project.change(values)
    try:
        refused(project, words)
        assert files(project) == outputs
    finally:
        (project.path / "params.yaml").write_text(params, encoding="utf-8")
    unharmed(project, lock)


def with_nan(weights: bytes) -> bytes:
    from safetensors.torch import load, save

    tensors = load(weights)
    tensors["model.norm.weight"][3] = float("nan")
    return save(tensors, metadata={"format": "pt"})


def with_more_tokens(tokenizer: bytes) -> bytes:
    content = json.loads(tokenizer)
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"more{i}": len(vocabulary) + i for i in range(9)}
    return json.dumps(content).encode()


BAD_FILES = {
    "an empty corpus": ("test.jsonl", lambda _: b"", "corpus test (source/test.jsonl) is empty"),
    "a corpus shorter than one window": (
        "test_ood.jsonl",
        lambda _: b'{"text": "The pump shall stop."}\n',
        "corpus test_ood has 20 tokens, 64 are needed",
    ),
    "no config": ("model/config.json", None, "source/model has no config.json, so it is no model folder"),
    "a config cut off": ("model/config.json", lambda good: good[:9], "source/model/config.json is not valid JSON"),
    "weights with NaN": ("model/model.safetensors", with_nan, "NaN or infinity in model.norm.weight (1 of 64 values)"),
    "weights cut off": ("model/model.safetensors", lambda good: good[:999], "model.safetensors is no whole"),
    "a tokenizer larger than the embedding": (
        "model/tokenizer.json",
        with_more_tokens,
        "the tokenizer has 266 tokens, the model's embedding 257 rows",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence_and_costs_no_output(project, name) -> None:
    source, change, words = BAD_FILES[name]
    path = project.path / "source" / source
    lock, outputs, good = project.lock(), files(project), path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(good))
    try:
        refused(project, words)
        assert files(project) == outputs
    finally:
        path.write_bytes(good)
    unharmed(project, lock)


def test_a_missing_corpus_is_named_and_the_outputs_come_back_from_the_cache(project) -> None:
    """DVC itself says so, after it has removed the outputs of fetch; its cache keeps them."""
    path = project.path / "source/test.jsonl"
    before, good = files(project), path.read_bytes()
    path.unlink()
    try:
        done = project.repro(check=False)
    finally:
        path.write_bytes(good)
    assert done.returncode != 0 and "Traceback" not in done.stdout
    assert re.search(r"^ERROR: failed to reproduce 'fetch': .*source/test.jsonl", done.stdout, re.MULTILINE)
    assert not ran(project.repro().stdout)
    assert files(project) == before


def test_an_altered_output_is_found_and_put_right(project) -> None:
    target = project.path / "data/gptq/layers.csv"
    content = target.read_bytes()
    target.unlink()  # the workspace file may be a link into the cache
    target.write_bytes(content + b"tampered\n")
    done = project(sys.executable, "-m", "tasks", "lineage", "verify", "data/report/report.html", check=False)
    assert done.returncode == 1 and "data/gptq/layers.csv was altered" in done.stdout
    assert not ran(project.repro().stdout)
    assert target.read_bytes() == content
    project(sys.executable, "-m", "tasks", "lineage", "verify", "data/report/report.html")


def test_lineage_leads_to_the_sources(project) -> None:
    shown = project(sys.executable, "-m", "tasks", "lineage", "show", "data/package/model").stdout
    for name in ("package", "qad", "eora", "gptq", "lora", "wanda", "depth_prune", "fetch", "source/model"):
        assert name in shown


def test_every_model_before_the_package_loads_with_stock_libraries(project) -> None:
    code = """
import torch
from transformers import AutoModelForCausalLM
torch.compiler.set_stance("force_eager")  # gptqmodel would compile every linear; tests/stages/test_eora.py lets it
for name in ("fetch", "depth_prune", "wanda", "lora"):
    model = AutoModelForCausalLM.from_pretrained(f"data/{name}/model")
    print(name, model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, pad_token_id=0).shape)
import os
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
from gptqmodel import GPTQModel, BACKEND
for name in ("gptq", "eora", "qad"):
    model = GPTQModel.load(f"data/{name}/model", backend=BACKEND.GPTQ_TORCH, device="cpu")
    print(name, model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, pad_token_id=0).shape)
"""
    output = project(sys.executable, "-c", code).stdout
    assert output.count("torch.Size([1, 6])") == 7


def test_the_package_computes_what_the_model_that_went_in_computes(project) -> None:
    code = """
from pathlib import Path
import torch
from tasks.runners import any_folder
packed, unpacked = (any_folder.load_model(Path(f"data/{name}/model")) for name in ("package", "qad"))
ids = torch.arange(60).reshape(2, 30)
with torch.no_grad():
    print("equal", torch.equal(packed(ids).logits, unpacked(ids).logits))
"""
    assert "equal True" in project(sys.executable, "-c", code).stdout


def test_the_plain_model_fills_the_bytes_of_the_package(project) -> None:
    package, plain = (
        sum((project.path / f"data/{name}/model" / file).stat().st_size for file in ("model.safetensors", "model.json"))
        for name in ("package", "baseline")
    )
    assert 0.9 * package < plain <= package


def test_each_task_of_each_model_is_cached_alone(project) -> None:
    tasks, params = ("harness@fetch-corpus", "harness@package-corpus"), project.path / "params.yaml"
    rows = [{"goal": f"To open {n}", "sol1": "pull", "sol2": "push", "label": n % 2} for n in range(6)]
    path, before = project.path / "own/piqa.jsonl", params.read_text(encoding="utf-8")
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        project.change({"harness_data.enabled": True, "harness.enabled": True})
        assert ran(project.repro(*tasks).stdout) >= {"harness_data@corpus", *tasks}
        own = {"harness_data.folder": "own", "harness_data.sources.piqa.path": "piqa.jsonl"}
        project.change(own | {"harness.tasks": ["corpus", "piqa"]})
        read_anew = {"harness_data@corpus", "harness_data@piqa"}  # from the other folder
        assert ran(project.repro(*tasks, "harness@fetch-piqa").stdout) == read_anew | {"harness@fetch-piqa"}
        project.change({"harness_data.sources.piqa.path": "gone.jsonl"})
        refused = project.repro("harness_data@piqa", check=False)
        assert refused.returncode and "Traceback" not in refused.stdout
        assert "error: harness_data@piqa: harness_data.sources.piqa.path = gone.jsonl is no file" in refused.stdout
        scores = json.loads((project.path / "data/harness/package-corpus/scores.json").read_text(encoding="utf-8"))
        assert scores["agreement"]["relative_difference"] < 1e-4
    finally:
        params.write_text(before, encoding="utf-8")
