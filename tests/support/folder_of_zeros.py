"""A model folder for what reads sizes alone: a few tensors of zeros beside the config of two layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.algorithms.device_fit.test_footprint import CONFIG


def folder_of_zeros(folder: Path, *, tied: bool = True, quantised: bool = False) -> Path:
    """Tensors of the right names in `folder`, which is returned; only their sizes matter."""
    folder.mkdir(parents=True)
    config = dict(CONFIG)
    tensors = {"model.embed_tokens.weight": torch.zeros(20, 8, dtype=torch.float32)}
    if quantised:
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True}
        tensors["model.layers.0.mlp.gate_proj.qzeros"] = torch.zeros(1, 2, dtype=torch.int32)
        tensors["model.layers.0.mlp.gate_proj.qweight"] = torch.zeros(1, 12, dtype=torch.int32)
        tensors["model.layers.0.mlp.gate_proj.scales"] = torch.zeros(1, 12, dtype=torch.float16)
        adapter = {"model.layers.0.mlp.gate_proj.lora_A.weight": torch.zeros(2, 8, dtype=torch.float16)}
        (folder / "eora").mkdir()
        save_file(adapter, folder / "eora/adapter_model.safetensors")
    else:
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(12, 8, dtype=torch.float32)
    if not tied:
        tensors["lm_head.weight"] = torch.zeros(20, 8, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}" * 50, encoding="utf-8")
    return folder


def add(folder: Path, tensors: dict[str, Tensor]) -> None:
    """More tensors in its file."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
