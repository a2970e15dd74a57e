"""The safetensors header of a packed model's blobs, which its content fixes to the byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from tasks.algorithms.errors import InputError
from tasks.models import tensor_headers
from tasks.packed.description import DESCRIPTION, LIMIT


def header_bytes(sizes: Mapping[str, int], digest: str) -> bytes:
    """The safetensors header, length included, of blobs of these sizes; digest: sha256 of model.json."""
    entries = {name: tensor_headers.Entry("U8", [size], size) for name, size in sizes.items()}
    return tensor_headers.header_bytes(entries, {DESCRIPTION: digest})


def checked_sizes(path: Path, digest: str) -> dict[str, int]:
    """Blob -> bytes of a file whose header is the one that `header_bytes` gives for it.

    Raises:
        InputError: it isn't, the file is longer or shorter, or belongs to another model.json.
    """
    damaged = InputError(
        f"{path} is no packed model or is damaged: its header is not the one that its content asks for"
    )
    try:
        total = path.stat().st_size
        text = tensor_headers.header_text(path, LIMIT)
        entries = json.loads(text)
        found = entries.pop("__metadata__")[DESCRIPTION]
        sizes = {name: entry["shape"][0] for name, entry in entries.items()}
        expected = header_bytes(sizes, found)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): run the stage package again") from error
    except (struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise damaged from error
    if expected[8:] != text or any(type(size) is not int or size < 0 for size in sizes.values()):
        raise damaged
    if found != digest:
        raise InputError(f"{path} belongs to another {DESCRIPTION}: one of them was changed; fetch the folder again")
    if total != len(expected) + sum(sizes.values()):
        raise InputError(
            f"{path} has {total} bytes, its header gives {len(expected) + sum(sizes.values())}: truncated?"
        )
    return sizes
