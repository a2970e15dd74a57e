"""Packed folders of random models of two blocks, as different from each other as a package's format allows."""

from __future__ import annotations

import json

import numpy as np
import torch
import transformers

from tasks.algorithms.model import families
from tasks.algorithms.quantisation import rounding
from tasks.models import skeleton
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.packed import packed_folder, writer
from tasks.packed.model_config import clean
from tasks.packed.stored_model import Linear, Model

LENGTH = 48
CASES = {
    "plain": {},
    "adapter": {"rank": 3, "pattern": "2:4"},
    "three bits": {"bits": 3, "group": 64, "embedding": 8},
    "eight bits": {"bits": 8, "group": 16, "embedding": 16},
    "zero points": {"zeros": True, "rank": 2, "pattern": "unstructured"},
    "odd groups": {"group": 8, "order": True},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "tied": False, "rank": 1},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "bits": 2, "config": {"head_dim": 32}},
    "mistral": {"architecture": "MistralForCausalLM", "bits": 5, "config": {"sliding_window": None}},
    "stretched": {
        "config": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        }
    },
}
"""What a random package holds -> how it differs from 4 bits in groups of 32 with a tied embedding of 4 bits."""


def windows_of(folder, count=3):
    """int [LENGTH] each, of random tokens."""
    size = packed_folder.config(folder)["vocab_size"]
    return list(np.random.default_rng(0).integers(0, size, (count, LENGTH)))


def write(folder, tokenizer, architecture="LlamaForCausalLM", tied=True, config=(), **settings):
    kind = getattr(transformers, architecture)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 257,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**sizes | dict(config))).eval()
        for name, tensor in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # transformers starts them at 0 and 1
                tensor.data += 0.1 * torch.randn_like(tensor)
    return pack(model, folder, tokenizer, **settings)


def pack(model, folder, tokenizer, embedding=4, **settings):
    """The packed folder of a model, quantised by rounding."""
    model, tied = skeleton.with_linears(model), model.config.tie_word_embeddings
    with torch.random.fork_rng():
        torch.manual_seed(1)
        blocks = [
            {name: _linear(linear, **settings) for name, linear in block.items()}
            for block in families.linears_by_block(model)
        ]
    described = families.of_model(model)
    tables = [model.get_submodule(name).weight.detach().half() for name in (described.embedding, described.head)]
    coded = [table if embedding == 16 else rounding.quantise(table, embedding, 32) for table in tables]
    content = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [described.architecture]}
    taken = {f"{name}.{part}" for block in blocks for name in block for part in ("weight", "bias")}
    taken |= {f"{described.embedding}.weight", f"{described.head}.weight"}
    rest = {name: tensor.detach().half() for name, tensor in model.named_parameters() if name not in taken}
    writer.save(Model(clean(content), blocks, coded[0], None if tied else coded[1], rest), folder)
    copy_tokenizer(tokenizer, folder)
    return folder


def _linear(linear, bits=4, group=32, pattern="dense", zeros=False, order=False, rank=0):
    weight = linear.weight.detach()
    rows, cols = weight.shape
    keep = None
    if pattern == "2:4":
        top = weight.abs().view(rows, -1, 4).topk(2).indices
        keep = torch.zeros(rows, cols // 4, 4, dtype=torch.bool).scatter_(2, top, True).view(rows, cols)
    elif pattern == "unstructured":
        keep = weight.abs() > 0.1
    coded = rounding.quantise(weight if keep is None else weight * keep, bits, group)
    codes = (coded.codes.short() + 2 ** (bits - 1)).to(torch.uint8)
    made = Linear(codes=codes, scales=coded.scales, bits=bits, group_size=group, keep=keep, pattern=pattern)
    if zeros:
        made.zeros = torch.randint(0, 2**bits, made.scales.shape, dtype=torch.uint8)
        made.codes[~keep] = made.zeros.repeat_interleave(group, dim=1)[~keep]
    if order:
        made.group_index = (torch.arange(cols) // group).flip(0).to(torch.int32)
    if linear.bias is not None:
        made.bias = linear.bias.detach().half()
    if rank:
        factors = torch.randn(rank, cols) / 20, torch.randn(rank, rows) / 20
        made.adapter = tuple(rounding.quantise(factor, 8, 32) for factor in factors)
    return made
