"""What differs between model architectures, as data: where the blocks are, which linears they hold, how large they are.

An algorithm asks here and never looks at a model's type. A new family is one row of `FAMILIES`.
It does not load models and knows no weights; families with fused projections (GPT-2, Phi) are not described yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tasks.algorithms.errors import InputError

if TYPE_CHECKING:  # preflight asks for a config's sizes and must not wait for torch
    from torch import nn


@dataclass(frozen=True)
class Family:
    """One architecture. Names of modules are relative to the model, those of `linears` and `norms` to a block.

    Attributes:
        linears: the prunable matrices of a block in the order in which they run.
        sizes: per linear, the names of its (out, in) dimensions; `linear_shapes` resolves them.
        per_layer: keys of the config that hold a list with one entry per block, where present.
        windowed_from: key of the config that counts the leading blocks without a sliding window, where present.
    """

    architecture: str
    linears: tuple[str, ...]
    sizes: Mapping[str, tuple[str, str]]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    per_layer: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    windowed_from: str = "max_window_layers"


_LLAMA_SIZES = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("key_value", "hidden"),
    "self_attn.v_proj": ("key_value", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "mlp.gate_proj": ("mlp", "hidden"),
    "mlp.up_proj": ("mlp", "hidden"),
    "mlp.down_proj": ("hidden", "mlp"),
}
_LLAMA = Family("LlamaForCausalLM", tuple(_LLAMA_SIZES), _LLAMA_SIZES)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        _LLAMA,
        replace(_LLAMA, architecture="MistralForCausalLM"),
        replace(_LLAMA, architecture="Qwen2ForCausalLM"),
        replace(_LLAMA, architecture="Qwen3ForCausalLM", norms=_LLAMA.norms + _HEAD_NORMS),
    )
}


def family(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names.

    Raises:
        InputError: no architecture is named, or it isn't supported.
    """
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    found = ", ".join(map(str, named)) if named else "no architecture"
    raise InputError(f"the model's config.json names {found}; supported are {', '.join(sorted(FAMILIES))}")


def of_model(model: nn.Module) -> Family:
    """The family of an instantiated model (its innermost one: unwrap PEFT or gptqmodel first).

    Raises:
        InputError: its class isn't supported.
    """
    return family({"architectures": [type(model).__name__]})


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of each linear of a block, from the config alone, in running order.

    Raises:
        InputError: unsupported architecture, or a size is missing from the config.
    """
    try:
        heads = config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // heads
        sizes = {
            "hidden": config["hidden_size"],
            "mlp": config["intermediate_size"],
            "query": heads * head,
            "key_value": (config.get("num_key_value_heads") or heads) * head,
        }
    except KeyError as error:
        raise InputError(f"the model's config.json has no {error}, which its architecture needs") from error
    described = family(config)
    return {name: tuple(sizes[size] for size in described.sizes[name]) for name in described.linears}


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's transformer blocks."""
    return model.get_submodule(of_model(model).blocks)


def linears_by_block(model: nn.Module) -> list[dict[str, nn.Linear]]:
    """Per block: full module name -> linear, in running order. In a quantised model they are its quantised modules."""
    described = of_model(model)
    return [
        {f"{described.blocks}.{index}.{name}": block.get_submodule(name) for name in described.linears}
        for index, block in enumerate(blocks(model))
    ]


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Full module name -> linear over all blocks, in running order; neither embedding nor head."""
    return {name: linear for block in linears_by_block(model) for name, linear in block.items()}
