"""Export to GGUF for llama.cpp, with the `gguf` package: the package's own codes and scales as Q4_0, Q5_0 or Q8_0.

These types are blocks of 32 values with a float16 scale and codes around zero, which hold symmetric codes of groups of
a multiple of 32 exactly: the scale is repeated for each block. Codes with zero points of at most 7 bits become Q8_0,
whose steps hold them, too. What has no such groups becomes float32: float16 weights would have the engine round the
activations as well. An EoRA adapter is written as a GGUF LoRA of its own, adapter.gguf, to be loaded with the model.
Pruned weights are stored as zeros.

What differs between families says `gguf_families`. The engine rounds the activations that meet quantised weights to 8
bits: its logits are near the PyTorch model's, not equal. Tokenizers other than byte-level BPE are left out: the model
then takes token ids.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; block layouts: ggml-common.h of ggml
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from torch import Tensor

from tasks.export import gguf_families, source_model
from tasks.export.source_model import Change, Source
from tasks.models import tokenizer_archive
from tasks.models.tokenizer_files import copy_tokenizer
from tasks.packed.stored_model import Linear
from tasks.runners.engines import GGUF, LORA

_BLOCK = 32
_PRE = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}
"""The steps of a tokenizer before BPE -> llama.cpp's name for them."""


def check(config: Mapping[str, Any]) -> None:
    """Refuse a config.json that llama.cpp would not compute as transformers does.

    Raises:
        InputError: as `gguf_families.check`.
    """
    gguf_families.check(config)


def write_float32(source: Source, folder: Path) -> dict[str, Change]:
    """As `write`, with every weight in float32: the engine then rounds no activation."""
    whole = [{name: _plain(linear) for name, linear in block.items()} for block in source.blocks]
    head = None if source.head is None else Linear(weight=source_model.table(source.head))
    table = Linear(weight=source_model.table(source.embedding))
    notes = write(dataclasses.replace(source, blocks=whole, embedding=table, head=head), folder)
    coded = any(linear.codes is not None for linear in source.linears.values())
    return ({"codes and scales": Change("dequantised to float32", "values")} if coded else {}) | notes


def _plain(linear: Linear) -> Linear:
    weight = linear.values().float()
    return Linear(weight=weight, bias=linear.bias, adapter=linear.adapter, pattern=linear.pattern)


def write(source: Source, folder: Path) -> dict[str, Change]:
    """Write model.gguf, adapter.gguf where there is an adapter, and the tokenizer's own files.

    Returns:
        What the format could not express -> what was done instead, to be said in export.json.

    Raises:
        InputError: as `gguf_families.check`; the engine has no such rotary embedding, or no place for a tensor.
    """
    family = gguf_families.check(source.config)
    writer, notes = GGUFWriter(folder / GGUF, family.row.name), _notes(source, family)
    gguf_families.describe(writer, source.config, family)
    notes |= _vocabulary(writer, source)
    described = family.shape.family
    tensors = dict(source.linears) | {described.embedding: source.embedding}
    tensors |= {} if source.head is None else {described.head: source.head}
    for name, linear in tensors.items():
        place, order = family.place(name), family.order(name, linear.shape[0])
        _add(writer, f"{place}.weight", linear, order, notes)
        if linear.bias is not None:
            writer.add_tensor(f"{place}.bias", linear.bias[order].float().numpy())
    for name, values in source.rest.items():
        added = family.row.added if "norm" in name and name.endswith(".weight") else 0
        writer.add_tensor(family.place(name), (values.float() + added).numpy())
    _close(writer)
    notes |= _write_adapter(source, family, folder)
    copy_tokenizer(source.folder, folder)
    return notes


def steps(folder: Path) -> dict[str, np.ndarray]:
    """Tensor name -> the signed codes [out_features, in_features] of Q4_0, Q5_0 and Q8_0, read with `gguf`."""
    found = {}
    for tensor in gguf.GGUFReader(folder / GGUF).tensors:
        if tensor.tensor_type not in (Type.Q4_0, Type.Q5_0, Type.Q8_0):
            continue
        blocks = np.array(tensor.data).reshape(len(tensor.data), -1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])
        blocks = blocks.copy()
        blocks[..., :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)  # scales of one leave the codes
        values = gguf.dequantize(blocks.reshape(len(blocks), -1), tensor.tensor_type)
        found[tensor.name] = values.astype(np.int16)
    return found


def component_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the tensors by what they are for, with the names of `layout.COMPONENTS`, and `rotary`."""
    found = dict.fromkeys(("values", "scales", "embedding", "norms", "adapter", "rotary"), 0)
    for tensor in gguf.GGUFReader(folder / GGUF).tensors:
        block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        scales = 2 * int(tensor.n_elements) // block if block > 1 else 0
        if tensor.name.startswith(("token_embd", "output.")):
            found["embedding"] += int(tensor.n_bytes)
        elif "norm" in tensor.name or tensor.name.endswith("bias") or tensor.name.startswith("position"):
            found["norms"] += int(tensor.n_bytes)
        elif tensor.name.startswith("rope"):
            found["rotary"] += int(tensor.n_bytes)
        else:
            found["scales"] += scales
            found["values"] += int(tensor.n_bytes) - scales
    if (folder / LORA).exists():
        found["adapter"] = (folder / LORA).stat().st_size
    return found


def _notes(source: Source, family: gguf_families.Family) -> dict[str, Change]:
    notes, linears = source_model.densified(source), [*source.linears.values(), source.embedding]
    if any(_type(linear) for linear in linears):
        notes["scales"] = Change(f"float16 for each block of {_BLOCK} inputs, on no grid", "scales")
        rounded = "rounded to 8 bits by the engine where they meet quantised weights"
        notes["activations"] = Change(rounded, None, exact=False)
    if family.row.rough:
        notes["GELU"] = Change(
            "looked up by the engine, in a table of float16 of its form with tanh", None, exact=False
        )
    return notes


def _vocabulary(writer: GGUFWriter, source: Source) -> dict[str, Change]:
    """Tokens and merges of a byte-level BPE; what could not be expressed."""
    with tokenizer_archive.unpacked(source.folder) as folder:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"model": {}}
    pre = _PRE.get(_pre_steps(content))
    end = source.config.get("eos_token_id")
    if end is not None:
        writer.add_eos_token_id(end if isinstance(end, int) else end[0])
    if not content["model"].get("merges") or content.get("normalizer") or pre is None:
        writer.add_tokenizer_model("none")
        return {
            "tokenizer": Change("left out, no byte-level BPE that llama.cpp knows: the model takes ids", "metadata")
        }
    size = source.config["vocab_size"]
    tokens, types = [f"[PAD{index}]" for index in range(size)], [gguf.TokenType.UNUSED] * size
    added = {entry["content"]: entry["special"] for entry in content.get("added_tokens", [])}
    entries = content["model"]["vocab"] | {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    for token, index in entries.items():
        kind = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
        tokens[index], types[index] = token, kind[added[token]] if token in added else gguf.TokenType.NORMAL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if isinstance(source.config.get("bos_token_id"), int):
        writer.add_bos_token_id(source.config["bos_token_id"])
    writer.add_add_bos_token(_adds_bos(content))
    return {}


def _pre_steps(content: dict[str, Any]) -> tuple[str, ...]:
    step = content.get("pre_tokenizer") or {"type": None}
    parts = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    plain = {"Digits": {"individual_digits": True}, "ByteLevel": {"add_prefix_space": False, "use_regex": True}}
    known = all(part.get(key) == value for part in parts for key, value in plain.get(part["type"], {}).items())
    return tuple(part["type"] for part in parts) if known else ()


def _adds_bos(content: dict[str, Any]) -> bool:
    single = (content.get("post_processor") or {}).get("single", [])
    return bool(single) and "SpecialToken" in single[0]


def _add(writer: GGUFWriter, name: str, linear: Linear, order: Tensor | slice, notes: dict[str, Change]) -> None:
    kind = _type(linear)
    if kind is not None:
        blob = _blocks(linear, kind)[order.numpy() if isinstance(order, Tensor) else order]
        writer.add_tensor(name, np.ascontiguousarray(blob), raw_dtype=kind)
        return
    values = linear.values().float()[order]
    writer.add_tensor(name, values.contiguous().numpy())
    if linear.codes is not None:
        done = Change("their linears are dequantised to float32", "values")
        notes[f"groups that are no multiple of {_BLOCK} inputs, or out of order"] = done


def _type(linear: Linear) -> Type | None:
    """The smallest type that holds the codes exactly; None: not even Q8_0."""
    if source_model.block_size(linear, _BLOCK, _BLOCK) is None:
        return None
    if linear.zeros is None:
        return Type.Q4_0 if linear.bits <= 4 else Type.Q5_0 if linear.bits == 5 else Type.Q8_0
    return Type.Q8_0 if linear.bits <= 7 else None


def _blocks(linear: Linear, kind: Type) -> np.ndarray:
    """uint8 [out_features, bytes]: per 32 values a float16 scale, then codes; nibbles hold value i low, i + 16 high."""
    scales = source_model.block_scales(linear, _BLOCK).numpy()[..., None].view(np.uint8)  # [out, blocks, 2]
    codes = source_model.steps(linear).numpy().reshape(*scales.shape[:2], _BLOCK)
    if kind == Type.Q8_0:
        parts = [scales, codes.astype(np.int8).view(np.uint8)]
    else:
        codes = (codes + (8 if kind == Type.Q4_0 else 16)).astype(np.uint8)
        low, high = codes[..., : _BLOCK // 2] & 15, codes[..., _BLOCK // 2 :] & 15
        fifth = [] if kind == Type.Q4_0 else [np.packbits(codes >> 4, axis=-1, bitorder="little")]
        parts = [scales, *fifth, low | high << 4]
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def _write_adapter(source: Source, family: gguf_families.Family, folder: Path) -> dict[str, Change]:
    branches = {name: linear for name, linear in source.linears.items() if linear.adapter is not None}
    if not branches:
        return {}
    writer = GGUFWriter(folder / LORA, family.row.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # no scaling by the rank, which differs between linears
    for name, linear in branches.items():
        a, b = source_model.factors(linear)
        for part, factor in (("a", a), ("b", b[family.order(name, len(b))])):
            writer.add_tensor(f"{family.place(name)}.weight.lora_{part}", np.ascontiguousarray(factor.numpy()))
    _close(writer)
    done = f"a GGUF LoRA in float32 beside the model, {LORA}: the engine has to be told to load it"
    return {"adapter": Change(done, "adapter")}


def _close(writer: GGUFWriter) -> None:
    """Write the file. The tensors are written here: gguf (0.19.0) calls numpy's `tofile` for them.

    That (2.2.6) says nothing where the disk doesn't take the last bytes, which are zeros then, and names no cause.
    """
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,), (tensors,) = writer.fout, writer.tensors  # of one shard
    writer.write_padding(file, file.tell())
    for info in tensors.values():
        file.write(np.ascontiguousarray(info.tensor).data)
        writer.write_padding(file, info.nbytes)
    writer.close()
