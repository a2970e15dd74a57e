"""What an algorithm knows of an architecture, as data: where the blocks are, their matrices, how sizes are named.

An algorithm asks here and never looks at a model's type. A family is found by inspecting the model that transformers
makes of a config (`inspection`). A few are known by heart, so that a check of their configs needs no torch; a test
holds each of them against what inspection finds.
It does not load models and knows no weights: sizes are read by `shape`, weights are seen through `matrices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tasks.algorithms.errors import InputError

if TYPE_CHECKING:  # preflight asks for a config's sizes and must not wait for torch
    from torch import nn


@dataclass(frozen=True)
class Keys:
    """The names of the sizes in a family's config.json; `windowed` switches the sliding window, where there is one."""

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    mlp: str = "intermediate_size"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    vocabulary: str = "vocab_size"
    context: str = "max_position_embeddings"
    window: str = "sliding_window"
    windowed: str = "use_sliding_window"
    tied: str = "tie_word_embeddings"


@dataclass(frozen=True)
class Family:
    """One architecture. Names of modules are relative to the model, those of matrices and norms to a block.

    Attributes:
        linears: the prunable matrices of a block in the order in which they run.
        attention: those of the attention; the others are the MLP's.
        norms: the other modules of a block that hold weights.
        after: the modules between the last block and the head, in the order in which they run.
        transposed: those of `linears` that the files keep as [in, out], as transformers' Conv1D does.
        outputs: entries of the tuple that a block returns, its hidden states first; 0: it returns these alone.
        keys: how the config calls the sizes.
    """

    architecture: str
    linears: tuple[str, ...]
    attention: tuple[str, ...]
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    after: tuple[str, ...] = ("model.norm",)
    transposed: tuple[str, ...] = ()
    outputs: int = 0
    keys: Keys = Keys()

    def chosen(self, targets: str) -> tuple[str, ...]:
        """Choose the matrices that params.yaml calls "all-linear", "attention" or "mlp", in running order.

        Raises:
            KeyError: `targets` is another word.
        """
        inside = {"all-linear": self.linears, "attention": self.attention}
        inside["mlp"] = tuple(name for name in self.linears if name not in self.attention)
        return inside[targets]


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LLAMA = Family(
    "LlamaForCausalLM", (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), attention=_ATTENTION
)

BY_HEART: dict[str, Family] = {
    family.architecture: family
    for family in (
        _LLAMA,
        replace(_LLAMA, architecture="MistralForCausalLM"),
        replace(_LLAMA, architecture="Qwen2ForCausalLM"),
        replace(_LLAMA, architecture="Qwen3ForCausalLM", norms=("self_attn.q_norm", "self_attn.k_norm", *_LLAMA.norms)),
    )
}


def known(config: Mapping[str, Any]) -> Family | None:
    """Return the family that a config.json names, if it is known by heart.

    Raises:
        InputError: no architecture is named.
    """
    named = config.get("architectures")
    if not named or not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise InputError("the model's config.json names no architecture; expected one that transformers has")
    return next((BY_HEART[architecture] for architecture in named if architecture in BY_HEART), None)


def family(config: Mapping[str, Any]) -> Family:
    """Return the family that a config.json names.

    Raises:
        InputError: no architecture is named, or it isn't supported.
    """
    found = known(config)
    if found is None:
        from tasks.algorithms.model import inspection  # here, as it imports torch and transformers

        found = inspection.inspect(config).family
    return found


def of_model(model: nn.Module) -> Family:
    """Return the family of an instantiated model (its innermost one: unwrap PEFT or gptqmodel first).

    Raises:
        InputError: its class isn't supported.
    """
    architecture = type(model).__name__
    return BY_HEART.get(architecture) or family(described(model))


def described(model: nn.Module) -> dict[str, Any]:
    """Return what a config.json of an instantiated model would say.

    Raises:
        InputError: it is no model of transformers.
    """
    architecture, config = type(model).__name__, getattr(model, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        raise InputError(f"{architecture} is no language model of transformers")
    return {**config.to_dict(), "architectures": [architecture]}


def blocks(model: nn.Module) -> nn.ModuleList:
    """Return the model's transformer blocks."""
    return model.get_submodule(of_model(model).blocks)


def linears_by_block(model: nn.Module) -> list[dict[str, nn.Linear]]:
    """Return, per block, full module name -> linear in running order. A quantised model gives its quantised modules."""
    described = of_model(model)
    return [
        {f"{described.blocks}.{index}.{name}": block.get_submodule(name) for name in described.linears}
        for index, block in enumerate(blocks(model))
    ]


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return full module name -> linear over all blocks, in running order; neither embedding nor head."""
    return {name: linear for block in linears_by_block(model) for name, linear in block.items()}
