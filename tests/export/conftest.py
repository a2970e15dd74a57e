"""Fixtures of exports: random packages, what they were exported to, and a folder that the engine here can run."""

from __future__ import annotations

import json

import pytest

from tasks.export import export
from tasks.runners import engines, llama_bindings
from tests.support import random_package


@pytest.fixture(scope="module")
def tokenizer(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pack(tokenizer, tmp_path_factory):
    """pack(case) -> a packed folder of a random model of two blocks."""
    made = {}

    def make(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("packed")
            made[case] = random_package.write(folder, tokenizer, **random_package.CASES[case])
        return made[case]

    return make


@pytest.fixture(scope="module")
def exported(pack, tmp_path_factory):
    """exported(case, kind) -> (package, exported folder)."""
    made = {}

    def make(case, kind):
        if (case, kind) not in made:
            out = tmp_path_factory.mktemp("exported") / "model"
            report = export.export(pack(case), kind, out)
            assert report == json.loads((out / "export.json").read_text(encoding="utf-8"))
            made[case, kind] = pack(case), out
        return made[case, kind]

    return make


@pytest.fixture
def runnable(tmp_path):
    """runnable(exported folder) -> the folder, or a copy with the adapter merged where cyllama is llama.cpp's binding.

    It can't switch an adapter on. An adapter can be merged into weights of float32 alone: else the test skips.
    """

    def make(out):
        if not (out / engines.LORA).exists() or llama_bindings.installed() == "llama_cpp":
            return out
        from tests.support import gguf_adapter

        if gguf_adapter.quantised(out):
            pytest.skip("cyllama can't switch an adapter on: pip install llama-cpp-python")
        return gguf_adapter.merge(out, tmp_path / "merged")

    return make
