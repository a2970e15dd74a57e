"""model.json: how each matrix of a packed model is stored, and the sha256 of every blob of model.safetensors.

With the shapes that the model's config gives, a `Description` fixes where each byte is (`tasks.packed.layout`). What
the file says is checked here as far as it can be without the other one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from tasks.algorithms.errors import InputError

FILE = "model.safetensors"
DESCRIPTION = "model.json"
HEAD: dict[str, Any] = {"format": "edgepress-packed", "version": 1}
"""What every description begins with."""
SIZES = {"F16": 2, "BF16": 2, "F32": 4}
"""Bytes per value of what isn't quantised, by safetensors' name of its type."""
LIMIT = 2**24
"""Bytes of model.json and of the safetensors header, at most."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


_Count = Annotated[int, Field(ge=0, lt=2**31)]
Width = Annotated[int, Field(ge=2, le=8)]
_Size = Annotated[int, Field(ge=1, lt=2**31)]
Dtype = Literal["F16", "BF16", "F32"]
Pattern = Annotated[str, Field(pattern="^(dense|unstructured|[0-9]{1,2}:[0-9]{1,2})$")]
Kind = Literal["linears", "embedding", "adapter"]
Coded = Literal["fixed", "entropy"]
"""How integers are coded: in words that waste little, at places that follow from shapes; or to their entropy."""


class Coding(_Strict):
    """A coded matrix; its groups have the largest size that divides its rows and is at most `group_size`."""

    bits: Width
    group_size: _Size


class Table(_Strict):
    """The distinct scales of some kinds of matrices are stored once, and each scale as an index."""

    values: Annotated[int, Field(ge=1, le=2**16)]
    kinds: list[Kind]


class Description(_Strict):
    """model.json. Fields that differ between linears hold a list with one entry per linear, in running order."""

    format: Literal["edgepress-packed"]
    version: Literal[1]
    coding: Coded = "fixed"
    config: dict[str, JsonValue]
    tied: bool
    dtype: Dtype
    dtypes: dict[str, Dtype] = {}
    bits: Width | None | list[Width | None]
    group_size: _Size | list[_Size]
    pattern: Pattern | list[Pattern]
    zeros: bool | list[bool] = False
    order: bool | list[bool] = False
    rank: _Count | list[_Count] = 0
    adapter: tuple[Coding, Coding] | None = None
    embedding: Coding | None = None
    head: Coding | None = None
    scales: Table | None = None
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]

    def json(self) -> bytes:
        """The file's bytes."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def read_description(path: Path) -> tuple[Description, str]:
    """A model.json, and the sha256 of its bytes.

    Raises:
        InputError: it can't be read, is damaged, or of another version.
    """
    text = read_bytes(path, "run the stage package again")
    try:
        return Description.model_validate_json(text), hashlib.sha256(text).hexdigest()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "its text"
        raise InputError(
            f"{path} describes no packed model: {place}: {first['msg']}; it is damaged or of another version of "
            "edgepress"
        ) from error


def read_bytes(path: Path, hint: str) -> bytes:
    """A small file's content.

    Raises:
        InputError: it can't be read, with the hint; or it is too long for what it should be.
    """
    try:
        if path.stat().st_size > LIMIT:
            raise InputError(f"{path} has {path.stat().st_size} bytes, more than {LIMIT}: it is no {path.name}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): {hint}") from error


def uniform(values: list[Any]) -> Any:
    """The value that all share, or the list."""
    return values[0] if all(value == values[0] for value in values) else values


def subsets(kinds: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """All of them, the empty one first."""
    kinds = tuple(kinds)
    return itertools.chain.from_iterable(itertools.combinations(kinds, n) for n in range(len(kinds) + 1))
