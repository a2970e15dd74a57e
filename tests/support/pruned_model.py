"""What stage gptq gets: a small pruned model in its folder, masks, windows and parameters."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tasks.algorithms.model import families
from tasks.models import dense_folder, mask_files, tensor_files
from tasks.parameters import schema
from tests.support.gptq_oracle import SETTINGS
from tests.support.matrices import normal, two_of_four

STAGE = SETTINGS | {
    "enabled": True,
    "budget_bytes": None,
    "scale_steps": None,
    "descent_cycles": 0,
    "masked": True,
    "joint": None,
    "embedding": {"bits": 16, "group_size": 32, "method": "nearest"},
}


def sections(enforce=True, **changed):
    """The sections of the parameters that stage gptq reads."""
    return {"gptq": schema.Gptq(**STAGE | changed), "wanda": {"enforce": enforce}}


def inputs_of_the_stage(folder, tiny_llama, prune=True, tied=True):
    """The inputs of stage gptq: a 2:4 pruned model of two layers, its masks, windows; as files and as they are."""
    dense = folder / "lora/model"
    model = dense_folder.load_dense(tiny_llama(dense))
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(normal(*model.lm_head.weight.shape, seed=8) * 0.2)
    keep = {}
    for name, linear in families.block_linears(model).items():
        keep[name] = two_of_four(linear.weight.detach()) if prune else torch.ones_like(linear.weight, dtype=torch.bool)
        linear.weight.data *= keep[name]
    dense_folder.save_dense(model, dense_folder.load_tokenizer(dense), dense)
    mask_files.save_masks(folder / "masks.safetensors", keep if prune else {}, "2:4" if prune else "dense")
    windows = torch.randint(0, 257, (6, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tensor_files.save_tensors(folder / "windows.safetensors", {"input_ids": windows}, {})
    files = {name: folder / name for name in ("lora/model", "masks.safetensors", "windows.safetensors")}
    return SimpleNamespace(files=files, keep=keep, windows=windows, model=model)
