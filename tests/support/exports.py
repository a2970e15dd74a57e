"""What tests of exports share: a skip where what one needs isn't installed (`make` has all but one), a comparison."""

from __future__ import annotations

import numpy as np
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


def check_same(ours, theirs, windows, prompts, new):
    """Assert that two engines give the same logits of windows, and the same tokens after some prompts, ties aside."""
    from tasks.export import export  # here, as its libraries may be missing

    for window in windows:
        a, b = ours.logits(window), theirs.logits(window)
        # the head's values are rounded to float16 in PyTorch, and not in MatMulNBits
        assert np.abs(a - b).max() < 2e-3 * np.abs(a).max()
    starts = np.random.default_rng(1).integers(0, 257, (prompts, 8))
    same = (ours.generate(starts, new) == theirs.generate(starts, new)).all(axis=1)
    for prompt in starts[~same]:  # a tie, but for what float32 rounds
        assert export._gap(ours, theirs, prompt) < 1e-2
