"""A small random Llama, half of its weights zero, and adapters on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.algorithms.model import families
from tasks.algorithms.recovery import masked_lora, training

VOCABULARY = 256


RECIPE = training.Recipe(
    steps=30, batch=4, length=16, learning_rate=0.02, warmup=0.1, distillation=0.0, temperature=2.0, seed=7
)


def llama(seed: int = 0, blocks: int = 2, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for linear in families.block_linears(model).values():
            nn.init.normal_(linear.weight, std=0.2)  # transformers' 0.02 leaves blocks that hardly do anything
        nn.init.normal_(model.model.embed_tokens.weight, std=0.3)  # and logits that can't single out a token
    return model.eval()


def prune(model: nn.Module, only: str = "") -> dict[str, Tensor]:
    """Zero two random weights of each group of four, in place; returns the keep masks."""
    generator = torch.Generator().manual_seed(3)
    keep = {}
    for name, linear in families.block_linears(model).items():
        if only in name:
            ranks = torch.rand(linear.weight.numel() // 4, 4, generator=generator).argsort(1)
            keep[name] = (ranks < 2).reshape(linear.weight.shape)
            linear.weight.data *= keep[name]
    return keep


def attach(model: nn.Module, keep: dict[str, Tensor], **changes: object):
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "seed": 0} | changes
    return masked_lora.attach(model, list(families.block_linears(model)), keep, **settings)


def stir(adapted: nn.Module) -> None:
    """Give every adapter factor random values, as after a training."""
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def text_tokens() -> Tensor:
    """A corpus that a tiny model learns quickly: a fixed sequence of 24 tokens, over and over."""
    motif = torch.randint(VOCABULARY, (24,), generator=torch.Generator().manual_seed(2))
    return motif.repeat(20)
