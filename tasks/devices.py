"""Device profiles, data/devices/<name>.yaml: their schema, and how they are read.

Every figure names its source; one that is nobody's published figure says "estimate" there. No field has a default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.algorithms import fit
from tasks.algorithms.errors import InputError

Source = Annotated[str, Field(min_length=12)]
"""Publication, data sheet or vendor page, in words."""


class Part(BaseModel):
    """A part of a profile; strict about unknown keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Figure(Part):
    """A positive whole number and where it is from."""

    value: Annotated[int, Field(gt=0)]
    source: Source


class Reserve(Part):
    """Bytes that the system keeps for itself; 0 where the memory is the model's alone."""

    value: Annotated[int, Field(ge=0)]
    source: Source


class Tier(Part):
    """One memory."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    bytes: Figure
    reserved: Reserve
    bandwidth: Figure
    """Peak bytes per second to the compute unit."""
    holds: Annotated[list[Literal["weights", "kv_cache", "activations", "scratch"]], Field(min_length=1)]

    @model_validator(mode="after")
    def _reserve(self) -> Tier:
        if self.reserved.value >= self.bytes.value:
            raise ValueError(f"reserved = {self.reserved.value} leaves nothing of bytes = {self.bytes.value}")
        return self


class Compute(Part):
    """Peak arithmetic; a multiply-accumulate is two operations."""

    operations_per_second: Figure
    precision: str
    """Of weights and activations at that peak, in words."""
    activation_bits: Annotated[list[Literal[8, 16, 32]], Field(min_length=1)]
    """Widths of activations that run at that peak."""


class Formats(Part):
    """Weight formats the compute unit, or the runtimes usual on the device, take without unpacking by the user."""

    values: Annotated[
        list[Annotated[str, Field(pattern=r"^(fp32|fp16|bf16|int[2-8]-(channel|group))$")]], Field(min_length=1)
    ]
    """-channel: one scale per output row; -group: one per group of inputs."""
    source: Source


class Sparsity(Part):
    """A pattern the compute unit makes use of: `keep` weights stay of every `of` consecutive inputs."""

    keep: Annotated[int, Field(ge=1)]
    of: Annotated[int, Field(ge=2)]
    saves: Annotated[list[Literal["time", "bytes"]], Field(min_length=1)]
    source: Source


class Profile(Part):
    """A device."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    """As the file."""
    description: str
    tiers: Annotated[list[Tier], Field(min_length=1, max_length=6)]
    """In order of preference, the fastest first."""
    compute: Compute
    weight_formats: Formats
    sparsity: list[Sparsity]
    """Empty where zeros save nothing."""
    safety_margin: Annotated[float, Field(ge=0, lt=1)]
    """Share of each tier's free bytes that stays free."""

    @model_validator(mode="after")
    def _homes(self) -> Profile:
        names = [tier.name for tier in self.tiers]
        if len(set(names)) < len(names):
            raise ValueError(f"tier names are not unique: {', '.join(names)}")
        homeless = [item for item in fit.ITEMS if not any(item in tier.holds for tier in self.tiers)]
        if homeless:
            raise ValueError(f"no tier holds {', '.join(homeless)}")
        return self

    def device(self) -> fit.Device:
        """The figures alone, for the arithmetic."""
        return fit.Device(
            name=self.name,
            tiers=tuple(
                fit.Tier(t.name, t.bytes.value, t.reserved.value, t.bandwidth.value, frozenset(t.holds))
                for t in self.tiers
            ),
            operations_per_second=self.compute.operations_per_second.value,
            weight_formats=frozenset(self.weight_formats.values),
            activation_bits=frozenset(self.compute.activation_bits),
            time_saving=frozenset((s.keep, s.of) for s in self.sparsity if "time" in s.saves),
            margin=self.safety_margin,
        )

    def sources(self) -> list[dict[str, str | int]]:
        """Each figure with its source, for a table."""
        rows: list[dict[str, str | int]] = []
        for tier in self.tiers:
            for field in ("bytes", "reserved", "bandwidth"):
                figure = getattr(tier, field)
                rows.append({"figure": f"{tier.name}.{field}", "value": figure.value, "source": figure.source})
        peak = self.compute.operations_per_second
        rows.append({"figure": "operations_per_second", "value": peak.value, "source": peak.source})
        formats = self.weight_formats
        rows.append({"figure": "weight_formats", "value": ", ".join(formats.values), "source": formats.source})
        for s in self.sparsity:
            rows.append(
                {"figure": f"sparsity, {s.keep} kept of {s.of}", "value": ", ".join(s.saves), "source": s.source}
            )
        return rows


def load_all(folder: Path) -> dict[str, Profile]:
    """Every profile of the folder, by name.

    Raises:
        InputError: a file breaks the schema, or the folder holds none.
    """
    profiles = {path.stem: _load(path) for path in sorted(folder.glob("*.yaml"))}
    if not profiles:
        raise InputError(f"{folder} holds no device profile (*.yaml)")
    return profiles


def pick(profiles: dict[str, Profile], name: str) -> Profile:
    """The named profile.

    Raises:
        InputError: there is none of that name.
    """
    if name not in profiles:
        raise InputError(f"hardware_fit.device = {name!r} has no profile in data/devices; known: {', '.join(profiles)}")
    return profiles[name]


def _load(path: Path) -> Profile:
    try:
        profile = Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise InputError("\n".join(_sentence(path.name, e["loc"], e["msg"]) for e in error.errors())) from error
    if profile.name != path.stem:
        raise InputError(f"{path.name}: `name` = {profile.name!r} must be the file's name, {path.stem!r}")
    return profile


def _sentence(name: str, loc: tuple[str | int, ...], message: str) -> str:
    where = ".".join(map(str, loc))
    message = message.removeprefix("Value error, ")
    return f"{name}: {f'`{where}`: ' if where else ''}{message}; the schema is tasks/devices.py"
