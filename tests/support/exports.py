"""Skip a test of an export where what it needs isn't installed; `make` installs all of it but llama-cpp-python."""

from __future__ import annotations

import pytest

from tasks.runners import llama_bindings, onnx_runtime  # noqa: F401  before ONNX Runtime


def needs_writer(kind):
    """Skip where what writes an export isn't installed."""
    for name in ("gguf",) if kind.startswith("gguf") else ("onnx", "onnxruntime_genai", "onnxscript"):
        pytest.importorskip(name)


def needs_engine(kind):
    """Skip where what writes an export, or the engine that runs it, isn't installed."""
    needs_writer(kind)
    try:
        if kind.startswith("gguf"):
            llama_bindings.installed()
    except ModuleNotFoundError as error:
        pytest.skip(f"{kind} needs {error.name}: pip install -e '.[dev]'")
