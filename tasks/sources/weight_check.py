"""Do the weights of an untrusted model folder belong to its config? Every tensor is read once, none is kept.

Names and shapes are compared with the model that transformers builds of the config without memory for it; values must
be finite. No code of the model is run, and nothing is loaded as a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.models import model_files, skeleton, stored_tensors
from tasks.models.stored_tensors import some
from tasks.sources import hub

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage

DTYPES = ("F64", "F32", "F16", "BF16")
PART = 2**22
"""Values that are looked at at once: of a whole embedding the answer took six times the memory of its weights."""


def check_weights(folder: Path, stage: Stage) -> int:
    """Compare the tensors of a model folder with its config, and look for values that are no numbers.

    Args:
        stage: shows the progress.

    Returns:
        The number of tensors.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape or type, or holds NaN or infinity; a head that
            the config ties differs from the embedding.
    """
    expected, tied, family = _expected(folder)
    broken, digests = [], {}
    shapes: dict[str, tuple[int, ...]] = {}
    tables: list[torch.Tensor] = []
    with stage.progress("weights", len(expected) - len(tied) // 2) as progress:
        for name, tensor in _tensors(folder):
            shapes[name] = tuple(tensor.shape)
            tables += [tensor] if name in tied else []
            if not tied and name.rpartition(".")[0] in (family.embedding, family.head):
                digests[name] = _digest(tensor)
            bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(PART))
            if bad:
                broken.append(f"{name} ({bad} of {tensor.numel()} values)")
            progress.update(len(shapes))
    stored_tensors.compare(shapes, expected, tied)
    if broken:
        raise InputError(f"the weights hold NaN or infinity in {some(broken)}; fetch or train the model again")
    if len(tables) > 1 and not _same(*tables):
        raise InputError(
            f"the weights hold {tied[0]} and another {tied[1]}, which config.json ties to it (tie_word_embeddings); set"
            f" that to false, or leave {tied[1]} out"
        )
    if len(digests) > len(set(digests.values())):
        print(f"{' and '.join(digests)} are equal: with tie_word_embeddings true in config.json one of them is stored")
    return len(shapes)


def _digest(tensor: torch.Tensor) -> str:
    found = hashlib.sha256(str(tensor.dtype).encode())
    for part in tensor.flatten().split(PART):
        found.update(part.view(torch.uint8).numpy())
    return found.hexdigest()


def _expected(folder: Path) -> tuple[stored_tensors.Shapes, tuple[str, ...], families.Family]:
    """Names and shapes that the config calls for; embedding and head where they are one matrix, else nothing."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = skeleton.build(config)
    except Exception as error:  # any entry of an untrusted config can be wrong in its own way
        raise InputError(f"transformers can't build the model of config.json: {hub.line(error)}") from error
    return skeleton.stored_shapes(model), skeleton.tied(model), families.of_model(model)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor at a time, of all weight files."""
    for name in model_files.weights(folder):
        try:
            yield from _tensors_of(folder / name)
        except SafetensorError as error:
            why = hub.line(error)
            raise InputError(f"{name} is no whole safetensors file ({why}); fetch the model again") from error


def _tensors_of(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            dtype = file.get_slice(name).get_dtype()
            if dtype not in DTYPES:
                raise InputError(f"the weights' {name} is stored as {dtype}, expected {', '.join(DTYPES)}")
            yield name, file.get_tensor(name)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    wider = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wider), other.to(wider))
