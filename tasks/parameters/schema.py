"""The schema of params.yaml: which sections there are, and what may not be combined.

A field per parameter, its unit and range beside it, is in the `*_sections` modules of this room. No field has a default
(a default in Python is a parameter DVC can't see) and unknown keys are refused. What can't change a result (threads,
verbosity) is no parameter; the device changes the last bits, so it is one. Constraints that need the model's config are
in `tasks.parameters.preflight`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from tasks.algorithms.errors import InputError
from tasks.parameters import parameter_file
from tasks.parameters.compression_sections import (
    Baseline,
    BaselineLora,
    Calibrate,
    DepthPrune,
    Eora,
    Gptq,
    Importance,
    Lora,
    Package,
    Qad,
    Sensitivity,
    Vocabulary,
    Wanda,
)
from tasks.parameters.evaluation_sections import Evaluate, HardwareFit, Harness, KvCache, Measure, Report
from tasks.parameters.operation_sections import Gate, Nightly, Registry
from tasks.parameters.section import Section
from tasks.parameters.source_sections import BaseModelParams, Corpus, Fetch, HarnessData, Overlap

SHARED = ("device",)
"""Keys of params.yaml that are no section: several stages share them."""
OPERATIONS = ("nightly", "gate", "registry")
"""Sections that no stage reads: they say when a run starts and what becomes of its result, not what the result is."""


class Params(Section):
    """The whole of params.yaml: the device, one section per stage, then those of OPERATIONS."""

    device: Literal["cpu", "cuda"]
    """Where the stages that use a model compute; results of the two differ in their last bits and are cached apart."""

    corpus: Corpus
    base_model: BaseModelParams
    fetch: Fetch
    overlap: Overlap
    vocabulary: Vocabulary
    calibrate: Calibrate
    importance: Importance
    depth_prune: DepthPrune
    wanda: Wanda
    lora: Lora
    gptq: Gptq
    eora: Eora
    qad: Qad
    package: Package
    baseline_lora: BaselineLora
    sensitivity: Sensitivity
    baseline: Baseline
    evaluate: Evaluate
    measure: Measure
    kv_cache: KvCache
    harness_data: HarnessData
    harness: Harness
    hardware_fit: HardwareFit
    report: Report
    nightly: Nightly
    gate: Gate
    registry: Registry

    @model_validator(mode="after")
    def _across(self) -> Params:
        users = [s for s in ("importance", "wanda", "gptq", "eora") if getattr(self, s).enabled]
        if users and not self.calibrate.enabled:
            raise ValueError(f"calibrate is switched off, but {', '.join(users)} need its windows: switch them off too")
        if self.depth_prune.enabled and self.depth_prune.remove and not self.importance.enabled:
            raise ValueError("importance is switched off, but depth_prune needs its scores: switch depth_prune off too")
        if self.wanda.enforce and self.wanda.enabled and self.gptq.enabled and not self.gptq.masked:
            raise ValueError("gptq.masked = false breaks wanda's pattern: set wanda.enforce to false, too")
        if self.gptq.enabled and self.gptq.joint and self.wanda.enabled:
            raise ValueError("gptq.joint chooses the masks itself: switch wanda off")
        if self.eora.enabled and not self.gptq.enabled:
            raise ValueError("gptq is switched off, but eora compensates its error: switch eora off too")
        if self.qad.enabled and not self.gptq.enabled:
            raise ValueError("gptq is switched off, but qad trains its codes: switch qad off too")
        if self.baseline.enabled and self.gptq.enabled and not self.sensitivity.enabled:
            raise ValueError("sensitivity is switched off, but baseline chooses bits by it: switch baseline off too")
        if self.harness.enabled and not self.harness_data.enabled:
            raise ValueError("harness_data is switched off, but harness needs its documents: switch harness off too")
        if self.importance.enabled and self.importance.windows > self.calibrate.windows:
            raise ValueError(
                f"importance.windows = {self.importance.windows} is above calibrate.windows = {self.calibrate.windows}"
            )
        return self


def parse(raw: Any, source: str) -> Params:
    """Validate parsed YAML.

    Raises:
        InputError: one line per problem, each with the key, the value and what was expected.
    """
    if not raw or not isinstance(raw, dict):
        raise InputError(f"{source} holds {type(raw).__name__ if raw else 'nothing'}, expected one section per stage")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise InputError("\n".join(_sentence(source, e) for e in error.errors())) from error


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and validate the parameter file.

    Raises:
        InputError: as `parameter_file.read`, or the file breaks the schema.
    """
    return parse(parameter_file.read(path), str(path))


def _sentence(source: str, error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{source}: unknown parameter `{key}`; check its spelling against {_described_in(error['loc'][0])}"
    if error["type"] == "missing":
        return f"{source}: parameter `{key}` is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{source}: {key + ': ' if key else ''}{message}"
    return f"{source}: `{key}` = {error['input']!r}: {message[0].lower() + message[1:]}"


def _described_in(section: str) -> str:
    """The module that names the parameters of a section; of what is no section, the one that names the sections."""
    known = Params.model_fields.get(section)
    return (known.annotation if known else Params).__module__.replace(".", "/") + ".py"
