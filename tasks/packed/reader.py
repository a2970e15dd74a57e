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

import transformers
from torch import nn
from transformers import PreTrainedModel

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.models.skeleton import attach, compute_positions, missing
from tasks.packed.decoder import Decoder
from tasks.packed.description import read_bytes
from tasks.packed.model_config import skeleton
from tasks.packed.packed_folder import PackedFolder
from tasks.packed.packed_linear import module
from tasks.packed.stored_model import Linear, Model

GENERATION = "generation_config.json"
"""Transformers' settings for generation, where the folder has them."""


def load_model(folder: Path) -> PreTrainedModel:
    """The model on the CPU in float32, in evaluation mode; block by block, so that little more than it is in memory.

    Its logits are those of the folder that was packed, bit by bit, as `tasks.models.gptq_folder.load_quantised` has it.

    Raises:
        InputError: a file is damaged, changed or of another version.
    """
    package = PackedFolder(folder)
    decoder, model = Decoder(package), skeleton(package.description.config)
    described = families.of_model(model)
    embedding = nn.Parameter(decoder.matrix("embedding"), requires_grad=False)
    model.get_submodule(described.embedding).weight = embedding
    head = embedding if package.description.tied else nn.Parameter(decoder.matrix("head"), requires_grad=False)
    model.get_submodule(described.head).weight = head
    for _, linears in decoder.blocks():
        for name, linear in linears.items():
            attach(model, name, module(linear))
    for name, tensor in decoder.rest().items():
        attach(model, name, nn.Parameter(tensor.float(), requires_grad=False))
    compute_positions(model)
    if left := missing(model):
        raise RuntimeError(f"the packed model has no {left[0]}: its family isn't described fully")
    if (folder / GENERATION).exists():
        model.generation_config = _generation(folder)
    return model.eval()


def stream(folder: Path) -> Iterator[tuple[int, dict[str, Linear]]]:
    """(block, full module name -> Linear) one after another; only that block's bytes are read, checked and unpacked.

    Raises:
        InputError: as `load_model`.
    """
    return Decoder(PackedFolder(folder)).blocks()


def load(folder: Path) -> Model:
    """All that the folder holds, as it is stored: codes stay codes; blocks are read when they are asked for, once.

    Raises:
        InputError: as `load_model`.
    """
    package = PackedFolder(folder)
    decoder = Decoder(package)
    return Model(
        package.description.config,
        (linears for _, linears in decoder.blocks()),
        decoder.coded("embedding"),
        None if package.description.tied else decoder.coded("head"),
        decoder.rest(),
    )


def _generation(folder: Path) -> transformers.GenerationConfig:
    """The folder's settings for generation."""
    read_bytes(folder / GENERATION, "copy it again")  # refuses what is too long
    try:
        return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # it can be wrong in as many ways as transformers reads it
        raise InputError(
            f"{folder / GENERATION} can't be read ({str(error)[:200]}): remove it or copy it again"
        ) from error
