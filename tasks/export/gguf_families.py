"""What llama.cpp makes of a family: its name there, the order of a matrix's rows, the sizes, what the engine has fixed.

The engine's list is asked for the names: `gguf` knows the tensors of each architecture, and what transformers calls
them. A row of `ROWS` has what neither that list nor the model's config says. A family gets a row once a test runs its
file in llama.cpp (tests/export/test_families.py); others are refused, as are configs that the engine would compute
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from gguf import GGUFWriter
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import inspection
from tasks.algorithms.model.shape import ModelShape, shape_of_config
from tasks.export import source_model
from tasks.models import skeleton
from tasks.packed import model_config

_GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""llama.cpp has one table of them, of the form with tanh in float16: as near to one as to another."""


@dataclass(frozen=True)
class Row:
    """A family in llama.cpp.

    Attributes:
        name: of the architecture.
        epsilon: what the config calls that of the norms, which says their kind, too.
        pairs: linears of queries or keys whose heads are rotated as neighbours, where transformers rotates halves.
        mixed: linears with query, key and value of one head after the other, where the engine has all queries first.
        added: to a norm's weights, which transformers adds when it computes.
        windows: every how many blocks the engine's attention has no window; 1: as the file says; 0: it has none.
        writes: call of GGUFWriter -> the entry of the config that it writes.
        computes: entry of the config -> the values that the engine computes with.
        equal: entry of the config -> the one that the engine takes in its place.
    """

    name: str
    epsilon: str = "rms_norm_eps"
    pairs: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    added: float = 0.0
    windows: int = 0
    writes: Mapping[str, str] = field(default_factory=dict)
    computes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)

    @property
    def rough(self) -> bool:
        """Whether the engine looks its activation up in a table of float16."""
        return any("gelu" in value for values in self.computes.values() for value in values if isinstance(value, str))


_SILU = {"hidden_act": ("silu",)}
_LLAMA = Row("llama", pairs=("q_proj", "k_proj"), computes=_SILU)
_SCALED = {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}
_UNTIED = {"tie_word_embeddings": (False,)}
_ALL_HEADS = {"num_key_value_heads": "num_attention_heads"}
_PARALLEL = {"add_parallel_residual": "use_parallel_residual"}
ROWS: dict[str, Row] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "ArceeForCausalLM": Row("arcee", pairs=_LLAMA.pairs, computes={"hidden_act": ("relu2",)}),
    "GraniteForCausalLM": Row(
        "granite",
        pairs=_LLAMA.pairs,
        writes={
            "add_attention_scale": "attention_multiplier",
            "add_embedding_scale": "embedding_multiplier",
            "add_residual_scale": "residual_multiplier",
            "add_logit_scale": "logits_scaling",
        },
        computes=_SILU,
    ),
    "Qwen2ForCausalLM": Row("qwen2", computes=_SILU),
    "Qwen3ForCausalLM": Row("qwen3", computes=_SILU),
    "Olmo2ForCausalLM": Row("olmo2", computes={**_SILU, **_UNTIED}, equal=_ALL_HEADS),
    "SeedOssForCausalLM": Row("seed_oss", computes=_SILU),
    "HunYuanDenseV1ForCausalLM": Row("hunyuan-dense", computes=_SILU),
    "Ernie4_5ForCausalLM": Row("ernie4_5", computes={**_SILU, "use_bias": (False,)}),
    "Glm4ForCausalLM": Row("glm4", computes=_SILU),
    "Phi3ForCausalLM": Row("phi3", computes=_SILU),
    "PhiForCausalLM": Row("phi2", "layer_norm_eps", computes={"hidden_act": _GELU, "qk_layernorm": (False,)}),
    "StableLmForCausalLM": Row(
        "stablelm", "layer_norm_eps", writes=_PARALLEL, computes={**_SILU, **_UNTIED, "qk_layernorm": (False,)}
    ),
    "Starcoder2ForCausalLM": Row("starcoder2", "norm_epsilon", computes={"hidden_act": _GELU, "use_bias": (True,)}),
    "CohereForCausalLM": Row(
        "command-r",
        "layer_norm_eps",
        writes={"add_logit_scale": "logit_scale"},
        computes={**_SILU, "use_qk_norm": (False,), "tie_word_embeddings": (True,)},
    ),
    "NemotronForCausalLM": Row("nemotron", "norm_eps", added=1.0, computes={"hidden_act": ("relu2",)}),
    "Jais2ForCausalLM": Row(
        "jais2", "layer_norm_eps", computes={"hidden_act": ("relu2",), **_UNTIED}, equal=_ALL_HEADS
    ),
    "GemmaForCausalLM": Row("gemma", added=1.0, computes={"hidden_act": _GELU}),
    "Gemma2ForCausalLM": Row(
        "gemma2",
        added=1.0,
        windows=2,
        writes={
            "add_attn_logit_softcapping": "attn_logit_softcapping",
            "add_final_logit_softcapping": "final_logit_softcapping",
        },
        computes={"hidden_activation": _GELU, "use_bidirectional_attention": (False, None)},
        equal={"query_pre_attn_scalar": "head_dim"},
    ),
    "Gemma3ForCausalLM": Row(
        "gemma3",
        added=1.0,
        windows=1,
        computes={
            "hidden_activation": _GELU,
            "final_logit_softcapping": (None,),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        equal={"query_pre_attn_scalar": "head_dim"},
    ),
    "GPT2LMHeadModel": Row("gpt2", "layer_norm_epsilon", computes={"activation_function": _GELU, **_SCALED}),
    "GPTBigCodeForCausalLM": Row(
        "starcoder",
        "layer_norm_epsilon",
        computes={"activation_function": _GELU, "multi_query": (True,), "scale_attn_weights": (True,)},
    ),
    "GPTNeoXForCausalLM": Row(
        "gptneox",
        "layer_norm_eps",
        mixed=("query_key_value",),
        writes=_PARALLEL,
        computes={"hidden_act": _GELU, "attention_bias": (True,), **_UNTIED},
    ),
    "FalconForCausalLM": Row(
        "falcon",
        "layer_norm_epsilon",
        computes={
            "activation": _GELU,
            "multi_query": (True,),
            "parallel_attn": (True,),
            "new_decoder_architecture": (False,),
            "alibi": (False,),
            "bias": (False,),
        },
    ),
}
"""Class of transformers -> what llama.cpp makes of it."""


@dataclass(frozen=True)
class Family:
    """A model's family in llama.cpp.

    Attributes:
        row: of the family.
        architecture: gguf's.
        names: from those of transformers.
        shape: the model's sizes.
    """

    row: Row
    architecture: gguf.MODEL_ARCH
    names: gguf.TensorNameMap
    shape: ModelShape

    def place(self, name: str) -> str:
        """The engine's name of a module or, with `.weight` or `.bias`, of a tensor.

        Raises:
            InputError: it has none.
        """
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{name} has no place in GGUF's {self.row.name}: ship the package instead")
        return found

    def order(self, name: str, rows: int) -> Tensor | slice:
        """Which row of a linear of transformers each of the engine's is."""
        size, last = self.shape.head_dim, name.rpartition(".")[2]
        if last in self.row.pairs:
            return torch.arange(rows).view(-1, 2, size // 2).transpose(1, 2).reshape(-1)
        if last in self.row.mixed:
            return torch.arange(rows).view(-1, 3, size).transpose(0, 1).reshape(-1)
        return slice(None)


def check(config: Mapping[str, Any]) -> Family:
    """What the engine makes of a config.json, before any weight is read.

    Raises:
        InputError: the family isn't proven, or the engine would compute it otherwise.
    """
    kind, own = inspection.read(config)
    named = kind.__name__
    row, known = ROWS.get(named), {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if row is None or row.name not in known:
        raise InputError(
            f"{named} can't be exported to GGUF; what llama.cpp computes is proven for {', '.join(ROWS)}: take another"
            " format, or ship the package itself"
        )
    for key, values in row.computes.items():
        if getattr(own, key) not in values:
            _refuse(f"{key} = {getattr(own, key)!r} of {named}", f"llama.cpp computes with {values[0]!r}")
    for key, other in row.equal.items():
        if getattr(own, key) != getattr(own, other):
            _refuse(
                f"{key} = {getattr(own, key)} of {named}", f"llama.cpp computes with {other} = {getattr(own, other)}"
            )
    shape, architecture = shape_of_config(config), known[row.name]
    _period(own, row, shape)
    return Family(row, architecture, gguf.get_tensor_name_map(architecture, shape.layers), shape)


def describe(writer: GGUFWriter, config: Mapping[str, Any], family: Family) -> None:
    """The sizes, and factors of the rotary embedding where it isn't the plain one.

    Args:
        config: as a package has it, without second spellings.

    Raises:
        InputError: the engine has no such rotary embedding.
    """
    own, shape, row = inspection.read(config)[1], family.shape, family.row
    down = shape.family.chosen("mlp")[-1]
    writer.add_block_count(shape.layers)
    writer.add_context_length(own.max_position_embeddings)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.linears[down][1])
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    epsilon = writer.add_layer_norm_rms_eps if row.epsilon.startswith("rms") else writer.add_layer_norm_eps
    epsilon(getattr(own, row.epsilon))
    writer.add_vocab_size(shape.vocabulary)
    for call, key in row.writes.items():
        getattr(writer, call)(getattr(own, key))
    if period := _period(own, row, shape):
        writer.add_sliding_window(own.sliding_window)
        writer.add_sliding_window_pattern(period)
    _rotary(writer, config, family)


def _refuse(what: str, why: str) -> None:
    raise InputError(f"{what} can't be exported to GGUF, as {why}: take another format, or ship the package itself")


def _period(own: Any, row: Row, shape: ModelShape) -> int:
    """Every how many blocks attention has no window; 0 of a family in which the engine has none.

    Whether a window is shorter than the context doesn't count: a block that has one can have another rotary embedding.

    Raises:
        InputError: the engine has no window for the family, or not in these blocks.
    """
    if not row.windows:
        if any(source_model.windows(own)):
            _refuse(f"a sliding window of {own.sliding_window} tokens", f"llama.cpp's {row.name} has none")
        return 0
    whole = [index for index, kind in enumerate(own.layer_types) if kind != inspection.SLIDING]
    period = whole[0] + 1 if whole else shape.layers + 1
    if whole != list(range(period - 1, shape.layers, period)) or row.windows not in (1, period) or period == 1:
        _refuse(f"attention without a window in the blocks {whole}", f"llama.cpp's {row.name} wants a fixed distance")
    return period


def _rotary(writer: GGUFWriter, config: Mapping[str, Any], family: Family) -> None:
    """What turns queries and keys, if anything does: the frequencies as transformers computes them, or nothing."""
    own = inspection.read(config)[1]
    model = model_config.skeleton(config)
    skeleton.compute_buffers(model)
    tables = {name.rpartition(".")[2]: table for name, table in model.named_buffers() if name.endswith("inv_freq")}
    if not tables:
        return
    given = own.rope_parameters
    local, whole = given.get(inspection.SLIDING), given.get("full_attention", given)
    table = tables.get("full_attention_inv_freq", tables.get("inv_freq"))
    scaled = [
        value for module in model.modules() for name, value in vars(module).items() if "attention_scaling" in name
    ]
    plain = _plain(whole, table)
    size = 2 * len(table)
    if any(value != 1 for value in scaled) or size > family.shape.head_dim:
        _refuse(f"a rotary embedding of the type {whole['rope_type']!r}", "llama.cpp has other factors")
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(whole["rope_theta"]))
    if local:
        near = tables["sliding_attention_inv_freq"]
        if not torch.allclose(near, _plain(local, near)):
            _refuse(f"a rotary embedding of the type {local['rope_type']!r} in windows", "llama.cpp scales none there")
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    if torch.allclose(table, plain):
        return
    factors = (plain / table).float()
    if torch.allclose(factors, factors[0]):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(factors[0]))
    elif family.row.name == _LLAMA.name:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    else:
        _refuse(f"a rotary embedding of the type {whole['rope_type']!r}", f"llama.cpp's {family.row.name} has none")


def _plain(parameters: Mapping[str, Any], table: Tensor) -> Tensor:
    size = 2 * len(table)
    return 1 / float(parameters["rope_theta"]) ** (torch.arange(0, size, 2) / size)
