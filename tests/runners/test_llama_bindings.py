"""llama.cpp's binding: which one is used, and what it says of files that it can't load."""

from __future__ import annotations

import sys

import pytest

from tasks.algorithms.errors import InputError
from tasks.runners import engines, llama_bindings


@pytest.fixture
def cyllama(monkeypatch):
    """The binding without a compiler, also where the other is installed."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    return pytest.importorskip("cyllama")


def test_the_binding_that_needs_a_compiler_comes_first_and_neither_is_said(monkeypatch, tmp_path):
    here = {"llama_cpp", "cyllama"}
    monkeypatch.setattr(llama_bindings.importlib.util, "find_spec", lambda name: name if name in here else None)
    assert llama_bindings.installed() == "llama_cpp"
    here.remove("llama_cpp")
    assert llama_bindings.installed() == "cyllama"
    here.clear()
    (tmp_path / engines.GGUF).write_bytes(b"")
    with pytest.raises(InputError, match="needs the package cyllama, which isn't installed"):
        engines.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no GGUF", b"GGUF\x03\0\0\0"])
def test_a_damaged_file_is_refused_in_a_sentence(cyllama, tmp_path, content):
    (tmp_path / engines.GGUF).write_bytes(content)
    with pytest.raises(InputError, match="llama.cpp can't load .*model.gguf: export it again"):
        engines.load(tmp_path)


def test_an_adapter_that_cannot_be_switched_on_is_refused_rather_than_left_out(cyllama, tmp_path):
    (tmp_path / engines.GGUF).write_bytes(b"")
    (tmp_path / engines.LORA).write_bytes(b"")
    with pytest.raises(InputError, match="cyllama can't switch .*adapter.gguf on: pip install llama-cpp-python"):
        engines.load(tmp_path)
