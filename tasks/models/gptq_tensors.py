"""The tensors of a gptqmodel checkpoint, as they are stored and without gptqmodel: one matrix is in memory at a time.

A quantised linear is `qweight`, `qzeros`, `scales` and `g_idx`; all else is stored as in any checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.algorithms import packing
from tasks.algorithms.errors import InputError
from tasks.algorithms.quantisation.codes import Codes
from tasks.models import model_files, tensor_files
from tasks.models.stored_tensors import StoredTensors
from tasks.models.tensor_headers import Entry

CODES, PARTS, ADAPTER = ".qweight", (".qzeros", ".scales", ".g_idx"), ".lora_"


class GptqTensors(StoredTensors):
    """The tensors of a gptqmodel checkpoint.

    Raises:
        InputError: as for `StoredTensors`; another format of quantised linears.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        settings = json.loads((folder / model_files.QUANTISED[0]).read_text(encoding="utf-8"))
        found = settings.get("checkpoint_format", settings.get("format"))
        if found not in ("gptq", "gptq_v2") or settings.get("pack_dtype", "int32") != "int32":
            raise InputError(f"{folder} is quantised in the format {found!r}; known are gptq and gptq_v2 of int32")
        self._less_one = found == "gptq"  # zero points are stored less one

    def codes(self, name: str, shape: tuple[int, int]) -> Codes:
        """What is stored of a quantised linear of this full name and shape [out_features, in_features].

        Raises:
            InputError: its tensors don't fit each other.
        """
        rows, cols = shape
        words = self.get(f"{name}{CODES}")  # int32 [in * bits / 32, out]
        bits = len(words) * 32 // cols
        if bits not in (2, 3, 4, 8) or tuple(words.shape) != (cols * bits // 32, rows):
            raise InputError(f"{name}.qweight of {self.folder} is {tuple(words.shape)}: no codes of 2, 3, 4 or 8 bits")
        codes = torch.from_numpy(_fields(words.T, bits))
        scales = self.get(f"{name}.scales").T.contiguous()
        groups = scales.shape[1]
        size = cols // groups
        index = self.get(f"{name}.g_idx", (cols,))
        trivial = torch.arange(cols, dtype=index.dtype) // size
        zeros = self._zeros(name, bits)
        if tuple(zeros.shape) != (groups, rows) or tuple(scales.shape) != (rows, groups):
            raise InputError(f"scales and zero points of {name} in {self.folder} don't fit its shape {shape}")
        return Codes(
            codes,
            scales,
            torch.from_numpy(zeros.T.copy()) if (zeros != 2 ** (bits - 1)).any() else None,
            bits,
            size,
            None if torch.equal(index, trivial) else index,
        )

    def _zeros(self, name: str, bits: int) -> np.ndarray:
        """uint8 [groups, out]."""
        words = self.get(f"{name}.qzeros")  # int32 [groups, out * bits / 32]
        if self._less_one and bits != 3:
            one = sum(1 << place for place in range(0, 32, bits))  # of each field, with carries: gptqmodel's arithmetic
            words = torch.from_numpy((words.numpy().view(np.uint32) + np.uint32(one)).view(np.int32))
        zeros = _fields(words, bits)
        return (zeros + 1) & 7 if self._less_one and bits == 3 else zeros


class Dequantised(StoredTensors):
    """A gptqmodel checkpoint as the tensors of a dense one: a quantised linear has its weight, in float32; no adapter.

    Raises:
        InputError: as for `GptqTensors`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._stored = GptqTensors(folder)
        stored, self.entries = self.entries, {}
        for name, entry in stored.items():
            linear = name.removesuffix(CODES)
            if linear != name:
                shape = [entry.shape[1], stored[f"{linear}.g_idx"].shape[0]]  # [out_features, in_features]
                self.entries[f"{linear}.weight"] = Entry("F32", shape, 4 * shape[0] * shape[1])
            elif not name.endswith(PARTS) and ADAPTER not in name:
                self.entries[name] = entry

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """As `StoredTensors.read`."""
        if name in self._stored:
            return super().read(name, dtype)
        weight = self._stored.codes(name.removesuffix(".weight"), self.shapes[name]).values()
        return weight if dtype is None else weight.to(dtype)


@contextlib.contextmanager
def recoding(source: Path, folder: Path) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a checkpoint that differs from `source` in its codes alone; within this context they are written.

    Called with each quantised linear's full name and its codes, uint8 [out_features, in_features], in any order.

    Raises:
        InputError: as for `GptqTensors`.
        RuntimeError: a linear's codes have not been written; then the file isn't there.
    """
    stored = GptqTensors(source)
    shutil.copytree(source, folder, ignore=lambda place, _: [model_files.SINGLE] * (Path(place) == source))
    entries = {name: entry for name, entry in stored.entries.items() if ADAPTER not in name}  # which has its own file
    with tensor_files.writing(folder / model_files.SINGLE, entries, {"format": "pt"}) as write:
        for name in entries:
            if not name.endswith(CODES):
                write(name, stored.read(name))

        def recode(name: str, codes: Tensor) -> None:
            words = stored.entries[f"{name}{CODES}"].shape[0]  # [in * bits / 32, out]
            write(f"{name}{CODES}", _words(codes.cpu(), words * 32 // codes.shape[1]))

        yield recode


def _words(codes: Tensor, bits: int) -> Tensor:
    """int32 [in * bits / 32, out] of uint8 [out, in], as `_fields` reads them."""
    data = packing.pack_digits(codes.numpy(), 2**bits)  # of each row whole words
    return torch.from_numpy(data.view("<i4").reshape(len(codes), -1).T.copy())


def _fields(words: Tensor, bits: int) -> np.ndarray:
    """uint8 [rows, words * 32 / bits] of int32 [rows, words], the lowest bits first, across words."""
    data = words.contiguous().numpy().astype("<i4", copy=False)
    count = data.size * 32 // bits
    return packing.unpack_digits(data.view(np.uint8).reshape(-1), count, 2**bits).reshape(len(data), -1)
