"""What ONNX Runtime GenAI's builder makes of a family: where its graph has a matrix, and what it needs to be told.

The builder's list is its own: what it has no class for it refuses when it is asked to draw. A family gets a row of
`ROWS` once a test runs its file in the engine (tests/export/test_families.py); others are refused before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import inspection
from tasks.algorithms.model.shape import shape_of_config
from tasks.export import source_model

_PLAIN = ("default",)
ROWS: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": ("default", "llama3"),
    "MistralForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": _PLAIN,
    "Qwen3ForCausalLM": _PLAIN,
    "Phi3ForCausalLM": _PLAIN,
    "PhiForCausalLM": _PLAIN,
    "GemmaForCausalLM": _PLAIN,
    "Gemma2ForCausalLM": _PLAIN,
    "Gemma3ForCausalLM": _PLAIN,
    "GraniteForCausalLM": _PLAIN,
    "NemotronForCausalLM": _PLAIN,
    "SmolLM3ForCausalLM": _PLAIN,
    "HunYuanDenseV1ForCausalLM": _PLAIN,
    "Ernie4_5ForCausalLM": _PLAIN,
}
"""Class of transformers -> types of rotary embeddings; some of the builder's classes take others for the plain one."""
WINDOWS = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
"""Those in which the attention of some blocks may have a window."""
PLACES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("attn/qkv_proj",),
    "o_proj": ("attn/o_proj",),
    "dense": ("attn/o_proj",),
    "fc1": ("mlp/fc1",),
    "fc2": ("mlp/fc2",),
    "gate_up_proj": ("mlp/gate_proj", "mlp/up_proj"),
    "gate_proj": ("mlp/gate_proj",),
    "up_proj": ("mlp/up_proj",),
    "down_proj": ("mlp/down_proj",),
}
"""Last part of a linear's name -> the builder's products of it, which have as many outputs each."""
FUSED = ("q_proj", "k_proj", "v_proj")
"""One product of the builder's graph, attn/qkv_proj, where all three are stored alike."""
MULTIPLE = 16
"""Of what heads, and the part of them that is rotated, must have: GroupQueryAttention refuses others when it runs."""


def check(config: Mapping[str, Any]) -> None:
    """Refuse a config.json that the engine isn't proven to compute.

    Raises:
        InputError: the family has no row, or its rotary embedding no place in it; the engine runs no such heads or
            windows.
    """
    kind, own = inspection.read(config)
    named = kind.__name__
    if named not in ROWS:
        raise InputError(
            f"{named} can't be exported to ONNX Runtime GenAI; what it computes is proven for {', '.join(ROWS)}: take"
            " another format, or ship the package itself"
        )
    given = own.rope_parameters
    for rotary in given.values() if inspection.SLIDING in given else (given,):
        if rotary["rope_type"] not in ROWS[named]:
            raise InputError(
                f"a rotary embedding of the type {rotary['rope_type']!r} of {named} can't be exported to ONNX Runtime"
                f" GenAI; what it computes is proven for {', '.join(ROWS[named])}: ship the package itself"
            )
    windows = source_model.windows(own)
    if any(windows) and (named not in WINDOWS or all(windows)):
        raise InputError(
            f"a sliding window of {own.sliding_window} tokens of {named} can't be exported to ONNX Runtime GenAI, which"
            " takes no longer prompt then: ship the package itself"
        )
    size = shape_of_config(config).head_dim
    turned = int(size * (given.get("partial_rotary_factor") or 1))
    for what, count in (("heads", size), ("rotary embeddings", turned)):
        if count % MULTIPLE:
            raise InputError(
                f"{what} of {count} don't run in ONNX Runtime GenAI, which wants multiples of {MULTIPLE}: use gguf"
            )


def as_the_builder_reads(config: Any) -> None:
    """Give a config, changed in place, the entries that the builder (0.18.0) asks for.

    Of Gemma 3 it knows those of transformers 4; those of 5 have a rotary embedding by kind of block. Of Phi-3 it takes
    every context but the one of the default config for a stretched one.
    """
    given = getattr(config, "rope_parameters", None) or {}
    if local := given.get(inspection.SLIDING):
        config.rope_local_base_freq = local["rope_theta"]
        config.rope_parameters = given = dict(given["full_attention"])
    if given.get("rope_type") == "default":
        config.original_max_position_embeddings = config.max_position_embeddings
