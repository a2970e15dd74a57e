"""An exported adapter merged into the model beside it, as llama.cpp computes with the two."""

from __future__ import annotations

import shutil

import gguf

from tasks.runners.engines import GGUF, LORA


def quantised(folder):
    """Whether a weight of the model is of another type than float32."""
    return any(tensor.tensor_type != gguf.GGMLQuantizationType.F32 for tensor in gguf.GGUFReader(folder / GGUF).tensors)


def merge(folder, to):
    """A copy of an export in float32, with W + scale B A for each W [out, in] that the adapter has A [rank, in] for.

    scale = alpha / rank, and 1 where alpha is 0: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.h
    """
    shutil.copytree(folder, to)
    adapter = gguf.GGUFReader(folder / LORA)
    alpha = float(adapter.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents())
    factors = {tensor.name: tensor.data for tensor in adapter.tensors}
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(to / GGUF, "r+").tensors}
    names = [name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")]
    assert names and len(factors) == 2 * len(names)
    for name in names:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        weights[name] += (alpha / len(a) if alpha else 1) * (b @ a)
    (to / LORA).unlink()
    return to
