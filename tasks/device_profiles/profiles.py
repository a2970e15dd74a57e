"""Device profiles, data/devices/<name>.yaml: their schema, and how they are read.

Every figure names its source; one that is nobody's published figure says "estimate" there. No field has a default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.algorithms.device_fit import footprint, placement, verdict
from tasks.algorithms.errors import InputError

Source = Annotated[str, Field(min_length=12)]
"""Publication, data sheet or vendor page, in words."""
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
HOST = "host"
"""The profile that `edgepress profile` measures: git and DVC ignore it, the DAG never reads it."""


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


class Memory(Part):
    """What every memory has."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    bytes: Figure
    bandwidth: Figure
    """Peak bytes per second to the compute unit."""

    def figures(self) -> list[tuple[str, Figure | Reserve]]:
        """(name of the figure, the figure), for a table."""
        named = ((field, getattr(self, field)) for field in type(self).model_fields)
        return [(f"{self.name}.{field}", value) for field, value in named if isinstance(value, Figure | Reserve)]


class Tier(Memory):
    """A memory that the compute unit reads in place, and what may live there."""

    reserved: Reserve
    holds: Annotated[list[Literal["weights", "kv_cache", "activations", "scratch"]], Field(min_length=1)]

    @model_validator(mode="after")
    def _reserve(self) -> Tier:
        if self.reserved.value >= self.bytes.value:
            raise ValueError(f"reserved = {self.reserved.value} leaves nothing of bytes = {self.bytes.value}")
        return self

    def tier(self) -> placement.Tier:
        """The figures alone. Metadata and tables that are looked up in lie where weights may."""
        holds = {*self.holds, *(["lookup"] if "weights" in self.holds else [])}
        return placement.Tier(self.name, self.bytes.value, self.reserved.value, self.bandwidth.value, frozenset(holds))


class Storage(Memory):
    """A memory from which weights are copied into another one before they are used."""

    reserved: Reserve
    buffer: Figure
    """Bytes of one read at full bandwidth; two of them are kept in memory."""


class Cache(Memory):
    """The last-level cache, where the weights of a small model stay."""


class Rate(Figure):
    """Peak operations per second; a multiply-accumulate is two."""

    precision: Precision
    """Of weights and activations in the arithmetic."""


class Formats(Part):
    """Weight formats that the compute unit, or the runtimes usual on the device, compute with as they are."""

    values: Annotated[
        dict[Annotated[str, Field(pattern=r"^(fp32|fp16|bf16|int[2-8]-(channel|group))$")], Precision],
        Field(min_length=1),
    ]
    """Format -> precision of the arithmetic. -channel: one scale per output row; -group: per group of inputs."""
    source: Source


class Sparsity(Part):
    """A pattern the compute unit makes use of: `keep` weights stay of every `of` consecutive inputs."""

    keep: Annotated[int, Field(ge=1)]
    of: Annotated[int, Field(ge=2)]
    saves: Annotated[list[Literal["time", "bytes"]], Field(min_length=1)]
    source: Source


class Margin(Part):
    """Share of each memory's free bytes that stays free, and why."""

    value: Annotated[float, Field(ge=0, lt=1)]
    source: Source


class Profile(Part):
    """A device."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    """As the file."""
    description: str
    tiers: Annotated[list[Tier], Field(min_length=1, max_length=6)]
    """The fastest first."""
    storage: Storage | None
    cache: Cache | None
    compute: Annotated[list[Rate], Field(min_length=1)]
    """A peak per precision."""
    weight_formats: Formats
    sparsity: list[Sparsity]
    """Empty where zeros save nothing."""
    safety_margin: Margin

    @model_validator(mode="after")
    def _homes(self) -> Profile:
        memories = [*self.tiers, *filter(None, (self.storage, self.cache))]
        names = [memory.name for memory in memories]
        if len(set(names)) < len(names):
            raise ValueError(f"names of memories are not unique: {', '.join(names)}")
        held = {item for tier in self.tiers for item in tier.holds}
        homeless = [item for item in ("weights", "kv_cache", "activations", "scratch") if item not in held]
        if homeless:
            raise ValueError(f"no tier holds {', '.join(homeless)}")
        speeds = [tier.bandwidth.value for tier in self.tiers]
        if speeds != sorted(speeds, reverse=True):
            raise ValueError("tiers are not listed from the highest bandwidth to the lowest")
        return self

    @model_validator(mode="after")
    def _precisions(self) -> Profile:
        stated = [rate.precision for rate in self.compute]
        if len(set(stated)) < len(stated):
            raise ValueError(f"compute states a precision twice: {', '.join(stated)}")
        for name, precision in self.weight_formats.values.items():
            if precision not in stated:
                raise ValueError(f"weight format {name} runs in {precision}, of which compute states no peak")
        return self

    def device(self) -> verdict.Device:
        """The figures alone, for the arithmetic."""
        storage, cache = self.storage, self.cache
        saving = {
            kind: frozenset((s.keep, s.of) for s in self.sparsity if kind in s.saves) for kind in ("bytes", "time")
        }
        rates = {rate.precision: rate.value for rate in self.compute}
        return verdict.Device(
            name=self.name,
            tiers=tuple(tier.tier() for tier in self.tiers),
            unit=footprint.Unit(self.weight_formats.values, rates, saving["bytes"], saving["time"]),
            margin=self.safety_margin.value,
            storage=storage and verdict.Storage(_stored(storage), storage.buffer.value),
            cache=cache and verdict.Cache(cache.name, cache.bytes.value, cache.bandwidth.value),
        )

    def sources(self) -> list[dict[str, str | int | float]]:
        """Each figure with its source, for a table."""
        memories = [*self.tiers, *filter(None, (self.storage, self.cache))]
        figures = [named for memory in memories for named in memory.figures()]
        figures += [(f"operations per second in {rate.precision}", rate) for rate in self.compute]
        rows = [{"figure": name, "value": figure.value, "source": figure.source} for name, figure in figures]
        margin, formats = self.safety_margin, self.weight_formats
        rows.append({"figure": "safety_margin", "value": f"{margin.value:.0%}", "source": margin.source})
        rows.append({"figure": "weight_formats", "value": ", ".join(formats.values), "source": formats.source})
        for s in self.sparsity:
            rows.append(
                {"figure": f"sparsity, {s.keep} kept of {s.of}", "value": ", ".join(s.saves), "source": s.source}
            )
        return rows


def _stored(storage: Storage) -> placement.Tier:
    holds = frozenset({"weights", "lookup"})
    return placement.Tier(storage.name, storage.bytes.value, storage.reserved.value, storage.bandwidth.value, holds)


def load_all(folder: Path) -> dict[str, Profile]:
    """Every profile of the folder, by name, but for the measured one of this machine.

    Raises:
        InputError: a file breaks the schema, or the folder holds none.
    """
    profiles = {path.stem: load(path) for path in sorted(folder.glob("*.yaml")) if path.stem != HOST}
    if not profiles:
        raise InputError(f"{folder} holds no device profile (*.yaml)")
    return profiles


def pick(profiles: dict[str, Profile], name: str) -> Profile:
    """The named profile.

    Raises:
        InputError: there is none of that name.
    """
    if name not in profiles:
        raise InputError(f"device {name!r} has no profile; known: {', '.join(profiles)}")
    return profiles[name]


def load_host(folder: Path) -> Profile:
    """The measured profile of this machine.

    Raises:
        InputError: it wasn't measured, or the file is damaged.
    """
    path = folder / f"{HOST}.yaml"
    if not path.exists():
        raise InputError(f"{path} isn't there: edgepress profile measures this machine and writes it")
    return load(path)


def load(path: Path) -> Profile:
    """One profile.

    Raises:
        InputError: the file can't be read, is no YAML, or breaks the schema.
    """
    try:
        profile = Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): name a device profile") from error
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
    return f"{name}: {f'`{where}`: ' if where else ''}{message}; the schema is tasks/device_profiles/profiles.py"
