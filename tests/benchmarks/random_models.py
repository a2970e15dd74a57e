"""Random Llamas of published models' shapes: what a stage costs depends on the shape alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
"""In the place of each shape's, to try the script out."""


def make(folder: Path, shape: Mapping[str, Any], device: str) -> int:
    """Fill a folder with a random model in bfloat16 and the built-in tokenizer; returns how many weights it has.

    Args:
        shape: of transformers' LlamaConfig.
        device: where its weights are drawn.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.LlamaConfig(**shape, bos_token_id=0, eos_token_id=0, initializer_range=0.02)
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    unfinished = folder.with_name(f".{folder.name}")
    model.save_pretrained(unfinished)
    for path in (ROOT / "data/base_model/model").glob("tokenizer*"):
        shutil.copyfile(path, unfinished / path.name)
    unfinished.rename(folder)
    return sum(weight.numel() for weight in model.parameters())
