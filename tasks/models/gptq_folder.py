"""Read and write quantised model folders with gptqmodel.

Apart from `tasks.models.dense_folder` because gptqmodel takes seconds to import, and because the code of a stage that
only knows dense models must not change with it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, matrices
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.quantisation import gptqmodel_library as library
from tasks.algorithms.quantisation import packed_linear, unpacking
from tasks.models import dense_folder, generations, model_files, streamed_folder, tensor_files
from tasks.models.stored_tensors import StoredTensors
from tasks.runtime import files

_META = (
    "damp_percent",
    "damp_auto_increment",
    "true_sequential",
    "static_groups",
    "act_group_aware",
    "mse",
)
"""Of what gptqmodel notes about the quantisation: what had an effect on the weights."""

Write = Callable[[str, Mapping[str, Tensor]], None]
"""Called with the full name of a linear and its packed tensors."""


def load_quantised(folder: Path, adapter: bool = True) -> PreTrainedModel:
    """A gptqmodel checkpoint with gptqmodel's torch kernel, on the CPU, computing in float32.

    The kernel's weights are unpacked once, so it takes the memory of the dense model and is as fast.

    Args:
        adapter: load the adapter of the folder too, where it has one.
    """
    model_files.check_sizes(folder)
    model_files.check_unambiguous(folder)
    branch = folder / model_files.ADAPTER
    with library.loading_in_float32():
        model = library.gptqmodel.GPTQModel.load(
            str(folder),
            backend=library.gptqmodel.BACKEND.GPTQ_TORCH,
            device="cpu",
            dtype=torch.float32,
            adapter=library.Lora(rank=None, path=str(branch)) if adapter and branch.exists() else None,
        ).model
    unpacking.unpack_once(model)
    return model.eval()


def load_dequantised(folder: Path) -> PreTrainedModel:
    """A gptqmodel checkpoint as an ordinary dense float32 model, without its adapter."""
    model = load_quantised(folder, adapter=False)
    unpacking.densify(model)
    return model


@contextlib.contextmanager
def writing(model: PreTrainedModel, quantisation: Any, dense: Path, folder: Path) -> Iterator[Write]:
    """Write a quantised model as a folder that stock gptqmodel loads; within this context its linears are written.

    They come in any order, as `tasks.algorithms.quantisation.packed_linear` packs them. What isn't quantised is stored
    in float16, embedding and head as they are in the model. gptqmodel's own files hold times, settings of this machine
    and a changed tokenizer: all but its description of the quantisation comes from the dense folder.

    Args:
        model: of `streamed_folder.open_dense`.
        quantisation: gptqmodel's QuantizeConfig.
        dense: the folder that the model was opened from.

    Raises:
        InputError: a value is too large for float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    linears = matrices.of_model(model)
    rest, entries = streamed_folder.rest(model, linears), {}
    for name, shape in rest.items():
        entries[name] = tensor_files.entry(torch.empty(shape, dtype=torch.float16, device="meta"))
    for name, matrix in linears.items():
        bits = quantisation.dynamic_get(name, "bits", quantisation.bits)
        parts = packed_linear.parts(matrix.shape, bits, quantisation.group_size)
        entries |= {f"{name}.{part}": tensor_files.entry(tensor) for part, tensor in parts.items()}
    with tensor_files.writing(folder / model_files.SINGLE, entries, {"format": "pt"}) as write:
        for name in rest:
            write(name, _half(name, streamed_folder.value(model, name)))

        def linear(name: str, tensors: Mapping[str, Tensor]) -> None:
            for part, tensor in tensors.items():
                write(f"{name}.{part}", tensor)

        yield linear
    described = _description(quantisation)
    files.write_json(folder / model_files.QUANTISED[0], described)
    config = dense_folder.config(dense) | {"dtype": "float16", "quantization_config": described}
    files.write_json(folder / model_files.CONFIG, config)
    for name in (*model_files.TOKENIZER, model_files.GENERATION):
        if (dense / name).is_file():
            shutil.copyfile(dense / name, folder / name)
    generations.rewrite(folder)


def stored_linears(folder: Path) -> Iterator[dict[str, tuple[int, Tensor]]]:
    """Per block, full name -> (bits, weight) of a gptqmodel checkpoint's linears, as stored, without adapter.

    A weight is float32 [out_features, in_features], as `load_quantised` computes with it; one block is in memory.
    """
    described, tensors = dense_folder.config(folder), StoredTensors(folder)
    family = families.family(described)
    for index in range(shape_of_config(described).layers):
        block = {}
        for short in family.linears:
            name = f"{family.blocks}.{index}.{short}"
            packed = {part: tensors.read(f"{name}.{part}") for part in packed_linear.PARTS}
            block[name] = packed_linear.width(packed), packed_linear.unpack(packed)
        yield block


def save_adapter(folder: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Add a low-rank adapter to a quantised model's folder, in the format of gptqmodel's `Lora` (that of PEFT).

    A linear without a branch has factors of rank 0 in the file: gptqmodel gives every quantised linear an adapter and
    refuses one without tensors. Where no linear has a branch, nothing is written.

    Args:
        factors: full module name -> (A [rank, in_features], B [out_features, rank]), added as B A; of every quantised
            linear. Ranks may differ.
    """
    ranks = {name: len(a) for name, (a, _) in factors.items() if len(a)}
    if not ranks:
        return
    branch = folder / model_files.ADAPTER
    branch.mkdir()
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    tensor_files.save_tensors(folder / model_files.ADAPTER_WEIGHTS, tensors, {"format": "pt"})
    files.write_json(folder / model_files.ADAPTER_CONFIG, _adapter_config(ranks, whole=len(ranks) == len(factors)))


def block_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Full module name -> float32 [out_features, in_features], dequantised, of the blocks; without adapter."""
    found = {}
    for name, linear in families.block_linears(model).items():
        if isinstance(linear, nn.Linear):
            found[name] = linear.weight.detach().float()
        else:
            found[name] = unpacking.dequantised(linear)
    return found


def _adapter_config(ranks: dict[str, int], whole: bool) -> dict[str, Any]:
    """PEFT's description; `whole`: every quantised linear has a branch, so that short names find them all."""
    rank = max(ranks.values())  # gptqmodel compares it to the rank that a user gives, and takes shapes from the tensors
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        "r": rank,
        "lora_alpha": rank,  # PEFT scales by alpha / r: by 1, for each linear
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks} if whole else ranks),
        "bias": "none",
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
    }


def _description(quantisation: Any) -> dict[str, Any]:
    """What gptqmodel says of a quantisation in a checkpoint: its settings, and by what the weights were made."""
    described = json.loads(json.dumps(quantisation.to_dict()))
    described["meta"] = {key: getattr(quantisation, key) for key in _META} | {
        "quantizer": [f"gptqmodel:{library.LIBRARY_VERSION}"],
        "uri": "https://github.com/modelcloud/gptqmodel",
    }
    return described


def _half(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        return tensor
    half = tensor.half()
    if not half.isfinite().all():
        raise InputError(f"{name} has values up to {tensor.abs().max():.3g}, float16 ends at 65504: it can't be stored")
    return half
