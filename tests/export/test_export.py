"""Exports run in their engines and compared with the PyTorch model; their bytes, and what is refused."""

from __future__ import annotations

import json
import resource
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tasks.algorithms.errors import InputError
from tasks.export import export
from tasks.packed.sizes import component_bytes
from tasks.runners import engines
from tests.benchmarks import engines as benchmark
from tests.support import random_package
from tests.support.command import edgepress
from tests.support.exports import check_same, needs_engine, needs_writer
from tests.support.paths import ROOT

PACKAGE, TEST = ROOT / "data/package/model", ROOT / "data/corpus/test.jsonl"
NEW = 24


@pytest.mark.parametrize("case", random_package.CASES)
@pytest.mark.parametrize("kind", ["onnx-int4", "gguf-f32"])
def test_engines_that_compute_in_float32_give_the_same_logits_and_greedy_tokens(exported, runnable, case, kind):
    needs_engine(kind)
    folder, out = exported(case, kind)
    ours, theirs = engines.load(folder), engines.load(runnable(out))
    check_same(ours, theirs, random_package.windows_of(folder), prompts=20, new=NEW)


@pytest.mark.parametrize(
    ("case", "kind"), [("adapter", "onnx-int4"), ("adapter", "onnx-int8"), ("adapter", "gguf"), ("plain", "gguf")]
)
def test_perplexity_is_within_1_percent(exported, runnable, case, kind):
    needs_engine(kind)
    folder, out = exported(case, kind)
    ours, theirs = engines.load(folder), engines.load(runnable(out))
    windows = [
        ours.generate(window[None, :4], random_package.LENGTH)[0] for window in random_package.windows_of(folder)
    ]  # likely text
    assert engines.perplexity(theirs, windows) == pytest.approx(engines.perplexity(ours, windows), rel=0.01)


@pytest.mark.parametrize("kind", ["onnx-int4", "gguf-f32"])
def test_sequences_generated_side_by_side_are_those_generated_alone(exported, runnable, kind):
    needs_engine(kind)
    _, out = exported("adapter", kind)
    engine = engines.load(runnable(out))
    ids = np.random.default_rng(2).integers(1, 257, (4, 8))
    alone = [engine.generate(row[None], NEW)[0] for row in ids]
    assert np.array_equal(engine.generate(ids, NEW), alone)


@pytest.mark.parametrize("kind", ["onnx-int4", "onnx-int8", "gguf"])
def test_bytes_are_those_of_the_files_and_the_same_each_time(exported, tmp_path, kind):
    needs_writer(kind)
    folder, out = exported("adapter", kind)
    report = json.loads((out / "export.json").read_text(encoding="utf-8"))
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.name != "export.json"}
    assert {name: file["bytes"] for name, file in report["files"].items()} == sizes
    assert report["bytes"]["export"] == sum(sizes.values()) == sum(report["components"]["export"].values())
    assert report["bytes"]["source"] == sum(path.stat().st_size for path in folder.iterdir())
    assert min(report["components"]["export"].values()) >= 0
    again = export.export(folder, kind, tmp_path / "again")
    assert again["files"] == report["files"]


EXACT = {
    "onnx-int4": {"zeros at 2:4": True, "scales": True, "head": False, "adapter": True, "rotary embedding": True},
    "onnx-int8": {"zeros at 2:4": True, "codes and scales": False, "adapter": False},
    "gguf": {"zeros at 2:4": True, "scales": True, "activations": False, "adapter": True},
    "gguf-f32": {"zeros at 2:4": True, "codes and scales": True, "adapter": True},
}


@pytest.mark.parametrize("kind", EXACT)
def test_what_was_densified_or_merged_is_said_with_its_bytes(exported, kind):
    needs_writer(kind)
    folder, out = exported("adapter", kind)
    report = json.loads((out / "export.json").read_text(encoding="utf-8"))
    found, stored = report["changes"], component_bytes(folder)
    assert EXACT[kind].items() <= {what: change["exact"] for what, change in found.items()}.items()
    ours = report["components"]["export"]
    assert found["zeros at 2:4"]["bytes"] == ours["values"] - stored["values"] - stored["positions"] > 0
    assert found["adapter"]["bytes"] == ours["adapter"] - stored["adapter"]
    if kind == "onnx-int8":
        assert found["adapter"]["bytes"] == -stored["adapter"] < 0  # it is merged
        assert found["tied head"]["bytes"] == ours["embedding"] - stored["embedding"] > 0
    if kind == "gguf":
        assert found["activations"]["bytes"] == 0


def test_a_check_compares_both_on_a_text(pack, tmp_path):
    needs_writer("onnx-int4")
    rows = [{"text": f"The pump {n} shall start within {n} seconds and report to the operator."} for n in range(40)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = export.export(pack("adapter"), "onnx-int4", tmp_path / "out", text)
    found = report["check"]
    assert found["prompts"] == 20 and abs(found["perplexity"]["change"]) < 1e-3
    assert found["widest_gap"] < 1e-2 and found["largest_logit_difference"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(export.FORMATS))
def test_the_built_in_model_s_exports(tmp_path, runnable, kind):
    needs_engine(kind)
    if not PACKAGE.exists():
        pytest.skip("the built-in model isn't packed here: dvc repro package")
    export.export(PACKAGE, kind, tmp_path / "out")
    found = export.check(PACKAGE, runnable(tmp_path / "out"), *export._check_data(PACKAGE, TEST))
    assert abs(found["perplexity"]["change"]) < 0.01
    if kind in ("onnx-int4", "gguf-f32"):
        assert found["same_prompts"] == found["prompts"] == 20
    else:  # activations are rounded to 8 bits: other tokens only where two are nearly as likely
        assert found["widest_gap"] < 0.1


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(pack, tmp_path, monkeypatch):
    needs_writer("gguf")
    with pytest.raises(InputError, match="'onnx' is not known"):
        export.export(pack("plain"), "onnx", tmp_path / "out")
    with pytest.raises(InputError, match="is no folder"):
        export.export(tmp_path / "nothing", "gguf", tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    with pytest.raises(InputError, match="isn't empty"):
        export.export(pack("plain"), "gguf", full)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "too short"}\n')
    with pytest.raises(InputError, match="where a check needs"):
        export.export(pack("plain"), "gguf", tmp_path / "out", short)
    for content in ("no JSON", '{"txt": "x"}', '{"text": 1}', "[]"):
        short.write_text(content + "\n")
        with pytest.raises(InputError, match="is no JSONL of"):
            export.export(pack("plain"), "gguf", tmp_path / "out", short)
    with pytest.raises(InputError, match="cannot write to"):
        export.export(pack("plain"), "gguf", short / "out")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "cyllama", None)
    with pytest.raises(
        InputError, match="checking gguf needs the package cyllama.*: pip install cyllama, or llama-cpp-python"
    ):
        export.export(pack("plain"), "gguf", tmp_path / "out", short)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "tasks.export.onnx_format", raising=False)
    with pytest.raises(InputError, match=r"onnx-int4 needs the package onnx, .*: pip install -e '\.\[export\]'"):
        export.export(pack("plain"), "onnx-int4", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "short.jsonl"]


@pytest.mark.parametrize("kind", ["gguf", "onnx-int4"])
def test_a_file_that_is_not_written_whole_is_told_and_nothing_is_left(pack, exported, tmp_path, capsys, kind):
    """The last bytes of GGUF's, where the file's own length would tell nothing; ONNX's in what it is drawn from."""
    needs_writer(kind)
    most = (exported("adapter", kind)[1] / "model.gguf").stat().st_size - 100 if kind == "gguf" else 20_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        calls = ("--format", kind, "--model", str(pack("adapter")), "--out", str(tmp_path / "out"))
        code, out, errors = edgepress(capsys, "export", *calls)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (1, "") and errors.startswith("error: cannot read or write ")
    assert "the largest file size allowed here is too small" in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_removed_and_what_another_one_writes_stays(pack, tmp_path):
    needs_writer("gguf")
    for name in (".out.killed.export", ".out.living.export", ".other.killed.export"):
        (tmp_path / name / "model").mkdir(parents=True)
    with export._held(tmp_path / ".out.living.export"):
        export.export(pack("plain"), "gguf", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.living.export", ".other.killed.export"}


def test_a_benchmark_s_row_is_of_what_its_processes_measured(pack):
    figures = {"import_seconds": 1.0, "load_seconds": 0.5, "first_token_seconds": 0.02, "cpu_seconds_per_token": 0.003}
    figures |= {"peak_bytes": 3 * 2**20, "above_libraries_bytes": 2**20, "joules_per_token": None}
    found = [figures | {"generation_seconds": [s, 9.0, s], "together_seconds": 8.0} for s in (1.0, 2.0, 4.0)]
    rows = []
    benchmark.show(SimpleNamespace(add=lambda **row: rows.append(row)), "x", pack("plain"), found, 8.0)
    assert list(rows[0]) == list(benchmark.COLUMNS)
    assert rows[0]["times the fp32 original"] == 4.0 and rows[0]["largest"] == benchmark.NEW
    assert rows[0]["tokens/s at batch 4"] == rows[0]["tokens/s"] == benchmark.NEW / 2
    assert rows[0]["load, s"] == 1.5 and rows[0]["peak, MiB"] == 3
    assert rows[0]["energy, mJ per token"] == "not available"


def test_a_dense_folder_can_be_exported(tokenizer, tmp_path):
    needs_writer("onnx-int4")
    export.export(tokenizer, "onnx-int4", tmp_path / "out")  # the fixture's folder holds a model, too
    ours, theirs = engines.load(tokenizer), engines.load(tmp_path / "out")
    window = np.arange(1, 40)
    assert np.abs(ours.logits(window) - theirs.logits(window)).max() < 1e-3
