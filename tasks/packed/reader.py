"""Read a packed model folder: as a model that computes, block by block, or as all that it stores.

A folder holds one safetensors file and one model.json with what is in it, lossless and near its bound.
`model.safetensors` holds one blob of bytes per block, one for the embedding (one more for an untied head), one for all
norms, and, where it pays, a table of the scales that occur; `model.json` the model's config, how each linear is stored,
and the sha256 of every blob. Offsets in a blob follow from shapes, so nothing but content takes bytes. How integers and
positions are packed is `tasks.algorithms.packing`'s.

Nothing is quantised and nothing rounded: what went in comes out, bit by bit. It is no format for kernels: weights are
unpacked to float32 once, at loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from tasks.algorithms.errors import InputError
from tasks.packed import streamed_model
from tasks.packed.decoder import Decoder
from tasks.packed.description import read_bytes
from tasks.packed.packed_folder import PackedFolder
from tasks.packed.stored_model import Linear, Model

GENERATION = "generation_config.json"
"""Transformers' settings for generation, where the folder has them."""


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model on the CPU, in evaluation mode; block by block, so that little more than it is in memory.

    In float32 its logits are those of the folder that was packed, bit by bit, as
    `tasks.models.gptq_folder.load_quantised` has it.

    Raises:
        InputError: a file is damaged, changed or of another version.
    """
    return _with_generation(streamed_model.load_model(load(folder), dtype=dtype), folder)


def open_model(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model as `load_model` gives it, on a device; a block has its weights while it is open.

    Raises:
        InputError: as `load_model`; for a block, when it is opened.
    """
    return _with_generation(streamed_model.open_model(load(folder), device), folder)


def stream(folder: Path) -> Iterator[tuple[int, dict[str, Linear]]]:
    """(block, full module name -> Linear) one after another; only that block's bytes are read, checked and unpacked.

    Raises:
        InputError: as `load_model`.
    """
    return enumerate(Decoder(PackedFolder(folder)))


def load(folder: Path) -> Model:
    """All that the folder holds, as it is stored: codes stay codes; blocks are read when they are asked for.

    Raises:
        InputError: as `load_model`.
    """
    package = PackedFolder(folder)
    decoder = Decoder(package)
    return Model(
        package.description.config,
        decoder,
        decoder.coded("embedding"),
        None if package.description.tied else decoder.coded("head"),
        decoder.rest(),
    )


def _with_generation(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    if (folder / GENERATION).exists():
        model.generation_config = _generation(folder)
    return model


def _generation(folder: Path) -> transformers.GenerationConfig:
    """The folder's settings for generation."""
    read_bytes(folder / GENERATION, "copy it again")  # refuses what is too long
    try:
        return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # it can be wrong in as many ways as transformers reads it
        raise InputError(
            f"{folder / GENERATION} can't be read ({str(error)[:200]}): remove it or copy it again"
        ) from error
