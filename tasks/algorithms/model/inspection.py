"""A family found by looking at the model that transformers makes of a config, on the meta device: without weights.

The blocks are the list of as many modules as the config counts layers. A block's matrices are its linears and Conv1Ds,
in the order in which one forward pass of a few tokens runs them; what runs after the last block, up to the head, is
noted in the same pass. What can't be told from that is refused with the reason. Whether what was found computes as the
model does is `self_test`'s question.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from tasks.algorithms.errors import InputError
from tasks.algorithms.model.families import Family, Keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 4
"""Of the pass that is watched."""
SLIDING = "sliding_attention"
"""What configs call a block whose attention has a window."""
LAYERS = 1024
"""More blocks than any model has; each takes time to make."""
MULTIMODAL = ("vision_config", "audio_config", "text_config", "vq_config")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config")
STATES = ("state_size", "mamba_d_state", "ssm_state_size", "attention_hidden_size", "lru_width", "conv_L_cache")
"""Entries of a config that say what it is a config of: sub-configs, numbers of experts, sizes of recurrent states."""


@dataclass(frozen=True)
class Found:
    """What inspection finds of a config.

    Attributes:
        sizes: the names of `ModelShape`'s fields -> value.
        linears: name within a block -> (out, in).
    """

    family: Family
    sizes: Mapping[str, Any]
    linears: Mapping[str, tuple[int, int]]


def inspect(config: Mapping[str, Any]) -> Found:
    """Look at the model of a config.json; remembered.

    Raises:
        InputError: transformers has no such language model, or it is built in a way that isn't known here.
    """
    key = repr(sorted(config.items(), key=lambda item: str(item[0])))
    if key not in _REMEMBERED:
        _REMEMBERED[key] = _inspect(config)
    return _REMEMBERED[key]


_REMEMBERED: dict[str, Found] = {}
"""What was found, by the config."""


def _inspect(config: Mapping[str, Any]) -> Found:
    kind, own = read(config)
    name = kind.__name__
    model = _built(kind, own)
    path, blocks = _blocks(model, own.num_hidden_layers, name)
    linears, others = _linears(blocks, name)
    watched = _Watched(model, blocks, linears)
    order = tuple(sorted(linears, key=watched.ran.index)) if set(linears) <= set(watched.ran) else ()
    if not order:
        never = next(each for each in linears if each not in watched.ran)
        raise InputError(f"{name} is not supported: a forward pass never runs the {never} of its blocks")
    family = Family(
        architecture=name,
        linears=order,
        attention=tuple(each for each in order if _in_attention(blocks[0], each)),
        norms=others,
        blocks=path,
        embedding=_name_of(model, model.get_input_embeddings()),
        head=_name_of(model, model.get_output_embeddings()),
        after=tuple(watched.after),
        transposed=tuple(each for each in order if isinstance(linears[each], Conv1D)),
        outputs=watched.outputs,
        keys=_keys(own),
    )
    sides = {each: _sides(linears[each]) for each in order}
    return Found(family, _sizes(model, own, family, sides, watched.kept), sides)


def _kind(config: Mapping[str, Any]) -> type[PreTrainedModel]:
    """The class of transformers that a config names."""
    named = [each for each in config.get("architectures") or [] if isinstance(each, str)]
    for key in MULTIMODAL:
        if isinstance(config.get(key), Mapping):
            raise InputError(f"{', '.join(named)} is multimodal ({key} in its config.json); take a text-only model")
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for each in named:
        if each in causal:
            kind = getattr(transformers, each)
            own = config.get("model_type", kind.config_class.model_type)
            if own != kind.config_class.model_type:
                raise InputError(
                    f"the model's config.json names {each}, whose model_type is {kind.config_class.model_type}, and has"
                    f" {own!r}: one of them is wrong"
                )
            return kind
    raise InputError(
        f"the model's config.json names {', '.join(named)}, which is no language model that transformers"
        f" {transformers.__version__} has; supported are decoders such as LlamaForCausalLM and GPT2LMHeadModel"
    )


def read(config: Mapping[str, Any]) -> tuple[type[PreTrainedModel], Any]:
    """The class of transformers that a config.json names, and its config.

    Raises:
        InputError: there is none, or it is one of a kind of models that isn't supported.
    """
    kind = _kind(config)
    name = kind.__name__
    try:
        entries = {key: value for key, value in config.items() if key != "quantization_config"}
        own = kind.config_class.from_dict(copy.deepcopy(entries))  # a config may change what it is given
        for key in EXPERTS:
            if getattr(own, key, None):
                raise InputError(f"{name} is a mixture of experts ({key} in its config), which isn't supported")
        for key in STATES:
            if getattr(own, key, None):
                raise InputError(f"{name} is a state-space model ({key} in its config), which isn't supported")
        if getattr(own, "is_encoder_decoder", False) or getattr(own, "add_cross_attention", False):
            raise InputError(f"{name} reads an encoder's states, too; take a model that is a decoder alone")
        if not 1 <= getattr(own, "num_hidden_layers", 0) <= LAYERS:
            raise InputError(f"{name} is not supported: its config counts no layers, or more than {LAYERS}")
        own._attn_implementation = None
    except InputError:
        raise
    except Exception as error:  # any entry of an untrusted config can be wrong in its own way
        line = " ".join(str(error).split())[:200]
        raise InputError(f"transformers can't read the {name} of config.json: {line}") from error
    return kind, own


def _built(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The model without weights."""
    try:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=torch.float32)
        model.tie_weights()
    except Exception as error:  # as above
        line = " ".join(str(error).split())[:200]
        raise InputError(f"transformers can't build the {kind.__name__} of config.json: {line}") from error
    return model.eval()


def _blocks(model: nn.Module, layers: int, name: str) -> tuple[str, nn.ModuleList]:
    """The list of modules of one class, as many as there are layers, that holds most weights."""
    found = [
        (path, each)
        for path, each in model.named_modules()
        if isinstance(each, nn.ModuleList) and len(each) == layers and len({type(block) for block in each}) == 1
    ]
    if not found:
        raise InputError(f"{name} is not supported: it has no list of {layers} blocks of one kind")
    return max(found, key=lambda pair: sum(weight.numel() for weight in pair[1].parameters()))


def _linears(blocks: nn.ModuleList, name: str) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """The matrices of a block, and the other modules that hold weights; the same of each block.

    Raises:
        InputError: blocks differ, or hold weights in a way that isn't known.
    """
    found = [_of_block(block) for block in blocks]
    linears, others = found[0]
    if any(_all_sides(those) != _all_sides(linears) for those, _ in found):
        raise InputError(f"{name} is not supported: its blocks differ in their matrices")
    if any(names != others for _, names in found):
        raise InputError(f"{name} is not supported: its blocks differ in what they hold")
    for each in others:
        module = blocks[0].get_submodule(each)
        if any(weight.ndim > 1 and max(weight.shape) < weight.numel() for weight in module.parameters(recurse=False)):
            kind = type(module).__name__
            raise InputError(f"{name} is not supported: its blocks hold matrices in {kind}, such as experts or states")
    if not any(_in_attention(blocks[0], each) for each in linears):
        raise InputError(f"{name} is not supported: its blocks have no attention, as those of state-space models")
    return linears, others


def _of_block(block: nn.Module) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    linears, others = {}, []
    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            linears[name] = module
        elif next(module.parameters(recurse=False), None) is not None:
            others.append(name)
    return linears, tuple(others)


def _sides(module: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _all_sides(linears: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    return {name: _sides(module) for name, module in linears.items()}


def _in_attention(block: nn.Module, name: str) -> bool:
    """Whether a module around this one, within the block, is an attention by its class."""
    parts = name.split(".")[:-1]
    around = (block.get_submodule(".".join(parts[: end + 1])) for end in range(len(parts)))
    return any("attention" in type(module).__name__.lower() for module in around)


class _Watched:
    """One forward pass, watched.

    Attributes:
        ran: the names of the first block's linears in the order in which they began to run.
        after: full names of the modules that ran between the last block and the head, outermost ones.
        outputs: `Family.outputs`.
        kept: keys and values of the first block, as the cache has them: shape [1, heads, tokens, size of a head].
    """

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList, linears: Mapping[str, nn.Module]) -> None:
        self.ran: list[str] = []
        self.after: list[str] = []
        self.outputs, self.kept, self._passed = 0, None, False
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: self.ran.append(name))
            for name, module in linears.items()
        ]
        handles.append(blocks[-1].register_forward_hook(self._left))
        inside = {module for block in blocks for module in block.modules()} | {blocks}
        for name, module in model.named_modules():
            if module not in inside and not any(each in inside for each in module.modules()):
                handles.append(module.register_forward_hook(lambda *_, name=name: self._outside(name)))
        try:
            # with a cache: without one transformers (5.23) looks at values of the positions, and here are none
            said = model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long, device="meta"), use_cache=True)
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(f"{type(model).__name__} is not supported: its forward pass fails ({line})") from error
        finally:
            for handle in handles:
                handle.remove()
        head = _name_of(model, model.get_output_embeddings())
        self.after = [name for name in self.after if name != head and not _below(name, self.after)]
        if around := [name for name in self.after if head.startswith(f"{name}.")]:
            raise InputError(f"{type(model).__name__} is not supported: its head {around[0]} is more than one matrix")
        self._keep(said)

    def _left(self, _: nn.Module, __: Any, output: Any) -> None:
        self.outputs = 0 if isinstance(output, Tensor) else len(output)
        self._passed = True

    def _outside(self, name: str) -> None:
        if self._passed:
            self.after.append(name)

    def _keep(self, said: Any) -> None:
        cached = getattr(said, "past_key_values", None)
        for layer in getattr(cached, "layers", None) or ():
            if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.ndim == 4:
                self.kept = tuple(layer.keys.shape)
                return


def _below(name: str, names: Iterable[str]) -> bool:
    """Whether the module is part of another one of these."""
    return any(name.startswith(f"{other}.") for other in names)


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    for name, module in model.named_modules():
        if module is wanted:
            return name
    raise InputError(f"{type(model).__name__} is not supported: it has no embedding or no head of its own")


def _keys(config: Any) -> Keys:
    """What the config calls the sizes: transformers keeps a table of the names that differ."""
    names = getattr(config, "attribute_map", {})
    plain = Keys()
    return Keys(**{field: names.get(key, key) for field, key in vars(plain).items()})


def _sizes(
    model: PreTrainedModel,
    config: Any,
    family: Family,
    sides: Mapping[str, tuple[int, int]],
    kept: tuple[int, ...] | None,
) -> dict[str, Any]:
    table, head = model.get_submodule(family.embedding).weight, model.get_submodule(family.head).weight
    heads, hidden = config.num_attention_heads, config.hidden_size
    _, kv_heads, _, head_dim = kept or (1, getattr(config, "num_key_value_heads", None) or heads, 0, hidden // heads)
    if table.shape[1] != hidden or head.shape[1] != hidden:
        raise InputError(
            f"{family.architecture} is not supported with an embedding of {table.shape[1]} values and hidden states of"
            f" {hidden} (word_embed_proj_dim); take one where they are the same"
        )
    mlp = [rows for name, (rows, _) in sides.items() if name not in family.attention]
    mlp += [columns for name, (_, columns) in sides.items() if name not in family.attention]
    inside = {id(weight) for block in model.get_submodule(family.blocks) for weight in block.parameters()}
    other = sum(
        weight.numel()
        for weight in model.parameters()
        if id(weight) not in inside and weight is not table and weight is not head and weight.ndim > 1
    )
    return {
        "layers": config.num_hidden_layers,
        "hidden": hidden,
        "mlp": max(mlp, default=hidden),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocabulary": table.shape[0],
        "context": _whole(getattr(config, "max_position_embeddings", None)),
        "window": _window(config),
        "tied": head is table,
        "mixed": _mixed(config),
        "elsewhere": other,
    }


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _window(config: Any) -> int | None:
    """What every block's attention reaches back; None where one reaches all."""
    if not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None) or ()
    if any(kind != SLIDING for kind in kinds):
        return None
    return _whole(getattr(config, "sliding_window", None))


def _mixed(config: Any) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ())
    return SLIDING in kinds and len(kinds) > 1
