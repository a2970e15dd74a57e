"""What an ONNX graph holds, with the package's codes, and what ONNX Runtime GenAI makes of it."""

from __future__ import annotations

import errno
import importlib.metadata
import json

import numpy as np
import pytest

from tasks.algorithms.errors import InputError
from tasks.export import export
from tasks.models import dense_folder
from tasks.packed import reader
from tasks.runners import engines
from tests.support.exports import needs_writer
from tests.support.paths import ROOT

BASE = ROOT / "data/base_model/model"


@pytest.mark.parametrize("case", ["plain", "adapter", "three bits", "eight bits", "zero points", "qwen3"])
def test_the_graph_holds_the_package_s_codes(exported, case):
    needs_writer("onnx-int4")
    from tasks.export import onnx_format

    folder, out = exported(case, "onnx-int4")
    found = onnx_format.codes(out)
    for index, block in reader.stream(folder):
        name = f"model.layers.{index}"
        attention = [block[f"{name}.self_attn.{side}_proj"] for side in "qkv"]
        expected = {f"/{name.replace('model.', 'model/')}/attn/qkv_proj/MatMul": attention}
        for part, module in (("attn/o", "self_attn.o"), *((f"mlp/{x}", f"mlp.{x}") for x in ("gate", "up", "down"))):
            expected[f"/{name.replace('model.', 'model/')}/{part}_proj/MatMul"] = [block[f"{name}.{module}_proj"]]
        for place, linears in expected.items():
            codes = np.concatenate([linear.codes.numpy().astype(int) for linear in linears])
            bits, wide = linears[0].bits, 4 if linears[0].bits <= 4 else 8
            shift = 0 if linears[0].zeros is not None else 2 ** (wide - 1) - 2 ** (bits - 1)
            assert np.array_equal(found[place], codes + shift), place


def test_codes_of_4_bits_take_half_a_byte_and_scales_two(exported):
    needs_writer("onnx-int4")
    folder, out = exported("adapter", "onnx-int4")
    report = json.loads((out / "export.json").read_text(encoding="utf-8"))
    weights = sum(linear.codes.numel() for _, block in reader.stream(folder) for linear in block.values())
    assert report["components"]["export"]["values"] == weights // 2
    assert report["components"]["export"]["scales"] == 2 * weights // 32


def test_the_graph_names_the_builder_s_version_and_no_commit_of_a_repository(exported):
    needs_writer("onnx-int4")
    import onnx

    graph = onnx.load(exported("plain", "onnx-int4")[1] / "model.onnx")
    assert graph.producer_version == importlib.metadata.version("onnxruntime-genai")


def test_the_builder_s_tensors_tell_where_the_disk_does_not_take_them():
    needs_writer("onnx-int4")
    import onnx_ir

    from tasks.export import onnx_format

    def write():
        with open("/dev/full", "wb", buffering=0) as file:
            onnx_ir.tensor(np.zeros(10)).tofile(file)

    write()  # numpy's way: once this fails, too, onnx_ir can do as it likes
    with onnx_format._written_by_python(), pytest.raises(OSError) as caught:
        write()
    assert caught.value.errno == errno.ENOSPC


def test_genai_tokenises_as_the_model_does(tmp_path):
    needs_writer("onnx-int4")
    import onnxruntime_genai

    export.export(BASE, "onnx-int4", tmp_path / "out")
    engine = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(tmp_path / "out")))
    tokenizer = dense_folder.load_tokenizer(BASE)
    for text in ("The pump shall stop within 250 ms.", "it's 3.5 °C;  two  blanks\n\nand lines"):
        assert list(engine.encode(text)) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_heads_that_the_engine_cannot_run_are_refused(model_folder, tmp_path):
    needs_writer("onnx-int4")
    with pytest.raises(InputError, match="heads of 8"):
        export.export(model_folder, "onnx-int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_constants_too_large_for_one_file_lie_beside_the_graph(pack, exported, tmp_path, monkeypatch):
    needs_writer("onnx-int4")
    from tasks.export import onnx_format

    monkeypatch.setattr(onnx_format, "_ONE_FILE", 0)
    export.export(pack("adapter"), "onnx-int4", tmp_path / "out")
    assert (tmp_path / "out/model.onnx.data").stat().st_size > 10_000
    ids = np.arange(1, 20)
    together = engines.load(exported("adapter", "onnx-int4")[1]).logits(ids)
    assert np.array_equal(engines.load(tmp_path / "out").logits(ids), together)
