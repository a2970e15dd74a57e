"""Sections that no stage reads: when a run starts and what becomes of its result, not what the result is."""

from __future__ import annotations

import zoneinfo
from typing import Annotated, Literal

from pydantic import Field, field_validator

from tasks.parameters.section import Count, Fraction, Rate, Section, Seed


class Upstream(Section):
    """Branches of the hub whose newest commit a night takes; null: it stays at the pinned revision."""

    model: str | None
    corpora: str | None


class Retention(Section):
    """What `edgepress retention` keeps; promoted models and the workspace's data always stay."""

    nights: Count
    """The newest so many nights."""
    days: Count
    """Prefect's runs and the stages' logs that ended within so many days."""


class Nightly(Section):
    """When a night starts (flows/schedule.py) and what it follows."""

    cron: Annotated[str, Field(pattern=r"^\S+( \S+){4}$")]
    """Minute, hour, day of month, month, day of week."""
    timezone: str
    """A name of the IANA data base, such as Europe/Zurich."""
    overlap: Literal["cancel", "queue"]
    """What happens to a night that is due while another one runs."""
    upstream: Upstream
    retention: Retention

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in zoneinfo.available_timezones():
            raise ValueError("not a time zone of the IANA data base, such as UTC or Europe/Zurich")
        return name


class BySplit(Section):
    """A limit for each test split."""

    test: Rate
    test_ood: Rate


class Leak(Section):
    """Largest share of the test text that may stand in the training text."""

    documents: Fraction
    """Of the documents, word for word."""
    ngrams: Fraction
    """Of the 13-grams of words."""


class Gate(Section):
    """Limits that a night's model has to hold to be promoted (tasks/algorithms/statistics/gate.py)."""

    perplexity_ratio: BySplit
    """Most that its perplexity may be of the promoted model's."""
    fetched_ratio: BySplit
    """Most that it may be of the fetched model's, which bounds what many small regressions add up to."""
    dense_ratio: BySplit
    """Least that it may be of the dense model with the same recovery: below it is too good to be true."""
    task_drop: Fraction
    """Most accuracy that a task may lose against the promoted model."""
    bytes_ratio: Rate
    """Most that its bytes may be of the promoted model's."""
    max_bytes: Count | None
    """Of the folder to ship; null: what fits the device."""
    latency_ratio: Rate
    """Most that its seconds per token may be of the promoted model's, measured on the same host."""
    streaming: bool
    """Whether a model that has to stream weights for every token counts as fitting."""
    overlap: Leak
    resamples: Annotated[int, Field(ge=100)]
    """Bootstrap samples of the documents: a limit is broken or held where the whole 95 % interval says so."""
    seed: Seed


class Sla(Section):
    """What a canary has to keep, and how surely that has to be known: tasks.algorithms.statistics.canary."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """Of the requests, where `canary start` names none."""
    p95_latency_ms: Rate
    """The canary's 95th percentile, at most."""
    accuracy_drop: Fraction
    """So much less than the promoted version's its accuracy may be, at most."""
    min_samples: Count
    """Of each version before the first verdict."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    """Of the verdict, over all times that it is asked for."""


class Registry(Section):
    """Versions: tasks.registry.versions."""

    keep: Annotated[int, Field(ge=2)]
    """Promoted versions whose data stays, the one in use included."""
    canary: Sla
