"""Read a gptqmodel checkpoint, or a dense folder, as what is to be packed: codes, scales, zero points, masks, factors.

The tensors are read as they are stored, block by block and without gptqmodel. The codes of embedding and adapter, which
gptqmodel's format has no place for, come from files beside it, and must have the values that the folder computes with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families, masks
from tasks.algorithms.quantisation import rounding
from tasks.models import model_files
from tasks.models.gptq_tensors import CODES, GptqTensors
from tasks.models.stored_tensors import StoredTensors
from tasks.packed.description import read_bytes
from tasks.packed.model_config import clean
from tasks.packed.shapes import Shapes, shapes_of
from tasks.packed.stored_model import CHUNK, Linear, Model


def read(
    folder: Path, masks_file: Path | None = None, embedding: Path | None = None, adapter: Path | None = None
) -> Model:
    """A gptqmodel checkpoint or a dense folder as a `Model`; blocks are read when they are asked for.

    Args:
        masks_file: masks.safetensors; None: nothing is pruned, zeros are values like others.
        embedding: embedding.safetensors of the stage gptq; None or without tensors: embedding and head as stored.
        adapter: adapter.safetensors of the stage eora; None or without tensors: the folder's adapter as stored.

    Raises:
        InputError: tensors that the config asks for are missing or have another shape; codes whose values aren't those
            in the folder; a tied head that differs from the embedding; what gptqmodel stores in a way not known here.
            (While the blocks are read:) a pruned weight that isn't zero.
    """
    config = clean(json.loads(read_bytes(folder / "config.json", "it is no model folder")))
    shapes = shapes_of(config)
    described = families.family(config)
    turned = [f"{name}.weight" for block in shapes.linears for name in block if name.endswith(described.transposed)]
    tensors = GptqTensors(folder) if model_files.is_quantised(folder) else StoredTensors(folder, turned)
    table, head = f"{described.embedding}.weight", f"{described.head}.weight"
    if shapes.tied and table not in tensors:
        table = head  # a tied matrix may be stored under either name
    if shapes.tied and head in tensors and not torch.equal(tensors.get(head), tensors.get(table)):
        raise InputError(
            f"{folder} has a head of its own, but its config ties it to the embedding: one of them is wrong"
        )
    coded = read_codes(embedding)
    return Model(
        config,
        _Blocks(folder, shapes, tensors, _Masks(masks_file), read_codes(adapter)),
        _matched(coded, "embedding", tensors.get(table, shapes.table)),
        None if shapes.tied else _matched(coded, "head", tensors.get(head, shapes.table)),
        {name: tensors.get(name, shape) for name, shape in shapes.rest.items()},
    )


class _Masks:
    """masks.safetensors, mask by mask; empty without a file."""

    def __init__(self, path: Path | None) -> None:
        self.file = safe_open(path, framework="pt") if path else None
        metadata = (self.file.metadata() or {}) if path else {"pattern": "dense"}
        if "pattern" not in metadata:
            raise InputError(f"{path} is no mask file: its metadata has no `pattern`; run the stage wanda again")
        self.pattern = metadata["pattern"]
        masks.parse(self.pattern)
        self.names = set(self.file.keys()) if path else set()
        self.shapes = metadata

    def get(self, name: str) -> tuple[Tensor | None, str]:
        """(bool [out, in], pattern) of a linear; (None, "dense") where it isn't pruned."""
        if name not in self.names or self.pattern == "dense":
            return None, "dense"
        rows, cols = map(int, self.shapes[name].split(","))
        return masks.unpack(self.file.get_tensor(name), rows, cols), self.pattern


class _Blocks(Sequence[Mapping[str, Linear]]):
    """The blocks of a model folder; each pass reads them anew."""

    def __init__(
        self, folder: Path, shapes: Shapes, tensors: StoredTensors, keep: _Masks, coded: Mapping[str, rounding.Coded]
    ) -> None:
        self.folder, self.shapes, self.tensors, self.keep, self.coded = folder, shapes, tensors, keep, coded
        branch = folder / model_files.ADAPTER_WEIGHTS
        self.adapter = safe_open(branch, framework="pt") if branch.exists() else None
        names = {name for block in shapes.linears for name in block}
        foreign = sorted((keep.names | {name.rpartition(".")[0] for name in coded}) - names)
        if foreign:
            raise InputError(f"there is a mask or an adapter for {foreign[0]}, which {folder} doesn't have")

    def __len__(self) -> int:
        return len(self.shapes.linears)

    def __getitem__(self, index: int) -> dict[str, Linear]:
        return {name: self._linear(name, shape) for name, shape in self.shapes.linears[index].items()}

    def _linear(self, name: str, shape: tuple[int, int]) -> Linear:
        keep, pattern = self.keep.get(name)
        linear = Linear(keep=keep, pattern=pattern)
        if f"{name}{CODES}" in self.tensors:
            found = self.tensors.codes(name, shape)
            linear.codes, linear.scales, linear.zeros = found.codes, found.scales, found.zeros
            linear.bits, linear.group_size, linear.group_index = found.bits, found.group_size, found.group_index
        else:
            linear.weight = self.tensors.get(f"{name}.weight", shape)
        if name in self.shapes.biases:
            linear.bias = self.tensors.get(f"{name}.bias", shape[:1])
        if self.adapter:
            linear.adapter = self._branch(name)
        return linear

    def _branch(self, name: str) -> tuple[rounding.Coded | Tensor, rounding.Coded | Tensor] | None:
        a, b = (self.adapter.get_tensor(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
        if not len(a):
            return None
        if f"{name}.a" not in self.coded:
            return a, b
        coded_a, coded_b = self.coded[f"{name}.a"], self.coded[f"{name}.b"]
        if not (
            torch.equal(rounding.values(coded_a), a.float()) and torch.equal(rounding.values(coded_b).T, b.float())
        ):
            raise InputError(f"the codes of the adapter of {name} aren't those of {self.folder}: run stage eora again")
        return coded_a, coded_b


def read_codes(path: Path | None) -> dict[str, rounding.Coded]:
    """Name -> Coded, of a file of `<name>.codes` and `<name>.scales`; groups follow from the numbers of both."""
    if path is None:
        return {}
    found = {}
    with safe_open(path, framework="pt") as file:
        bits = int((file.metadata() or {}).get("bits", 16))
        for name in [key.removesuffix(".codes") for key in sorted(file.keys()) if key.endswith(".codes")]:
            codes, scales = file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scales")
            found[name] = rounding.Coded(codes, scales, bits, codes.shape[1] // scales.shape[1])
    return found


def _matched(coded: Mapping[str, rounding.Coded], name: str, stored: Tensor) -> rounding.Coded | Tensor:
    if name not in coded:
        return stored
    found = coded[name]
    step = max(1, CHUNK // stored.shape[1])
    for start in range(0, len(stored), step):
        part = rounding.Coded(found.codes[start : start + step], found.scales[start : start + step], *found[2:])
        if not torch.equal(rounding.values(part), stored[start : start + step].float()):
            raise InputError(f"the codes of the {name} aren't those of its folder: run stage gptq again")
    return found
