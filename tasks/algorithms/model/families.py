"""The differences between model architectures, as data: where the blocks are, their matrices, how sizes are named.

An algorithm asks here and never looks at a model's type. A family is one row of `FAMILIES`; one whose blocks hold fused
or transposed projections (GPT-2, Phi) also says how its matrices lie in its modules (`Projection`).
It does not load models and knows no weights: sizes are read by `shape`, weights are seen through `matrices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Projection(NamedTuple):
    """The place of a matrix [out, in]: a module of the block, all of its weight or some rows of it, maybe transposed.

    Attributes:
        module: name within the block.
        part, parts: a fused weight is cut along its outputs into parts by these sizes' names; None: all of it is one.
        transposed: the module keeps [in, out], as transformers' Conv1D does.
    """

    module: str
    part: int = 0
    parts: tuple[str, ...] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture. Names of modules are relative to the model, those of matrices and norms to a block.

    Attributes:
        sizes: the prunable matrices of a block in the order in which they run, name -> names of their (out, in) sides.
        attention: those of the attention; the others are the MLP's.
        projections: where a matrix lies, if it isn't the weight of the module of its name.
        keys: how the config calls the sizes.
        rotary: the module of rotary position embeddings; None: positions are learned.
        per_layer: keys of the config that hold a list with one entry per block, where present.
        windowed_from: key of the config that counts the leading blocks without a sliding window, where present.
    """

    architecture: str
    sizes: Mapping[str, tuple[str, str]]
    attention: tuple[str, ...]
    projections: Mapping[str, Projection] = field(default_factory=dict)
    keys: Keys = Keys()
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    rotary: str | None = "model.rotary_emb"
    per_layer: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    windowed_from: str = "max_window_layers"

    @property
    def linears(self) -> tuple[str, ...]:
        """The prunable matrices of a block in the order in which they run."""
        return tuple(self.sizes)

    def chosen(self, targets: str) -> tuple[str, ...]:
        """Choose the matrices that params.yaml calls "all-linear", "attention" or "mlp", in running order.

        Raises:
            KeyError: `targets` is another word.
        """
        inside = {"all-linear": self.linears, "attention": self.attention}
        inside["mlp"] = tuple(name for name in self.linears if name not in self.attention)
        return inside[targets]

    def projection(self, name: str) -> Projection:
        """Return the place of the matrix of this name."""
        return self.projections.get(name, Projection(name))


_LLAMA = Family(
    "LlamaForCausalLM",
    {
        "self_attn.q_proj": ("query", "hidden"),
        "self_attn.k_proj": ("key_value", "hidden"),
        "self_attn.v_proj": ("key_value", "hidden"),
        "self_attn.o_proj": ("hidden", "query"),
        "mlp.gate_proj": ("mlp", "hidden"),
        "mlp.up_proj": ("mlp", "hidden"),
        "mlp.down_proj": ("hidden", "mlp"),
    },
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
)
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
    """Return the family that a config.json names.

    Raises:
        InputError: no architecture is named, or it isn't supported.
    """
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    listed = ", ".join(map(str, named)) if named else "no architecture"
    raise InputError(f"the model's config.json names {listed}; supported are {', '.join(sorted(FAMILIES))}")


def of_model(model: nn.Module) -> Family:
    """Return the family of an instantiated model (its innermost one: unwrap PEFT or gptqmodel first).

    Raises:
        InputError: its class isn't supported.
    """
    return family({"architectures": [type(model).__name__]})


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
